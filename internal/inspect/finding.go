package inspect

import (
	"cmp"
	"slices"
)

// Finding is something that is not as it should be, or that somebody who looks wants to know. status and doctor print
// findings, and have them in their JSON.
type Finding struct {
	Name     string   `json:"name"` // a word of a list in the manual page, which never changes its meaning
	Severity Severity `json:"severity"`
	What     string   `json:"what"`     // in a few words
	Evidence string   `json:"evidence"` // what was seen
	Cure     string   `json:"cure"`     // a command, mostly
}

// Severity is how bad a Finding is.
type Severity string

// The severities. A note is no fault.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
	Note    Severity = "note"
)

func (s Severity) rank() int { return slices.Index([]Severity{Error, Warning, Note}, s) }

// IsFault reports whether a finding is more than a note.
func (f Finding) IsFault() bool { return f.Severity != Note }

// sortFindings puts errors first, then warnings, then notes.
func sortFindings(all []Finding) {
	slices.SortStableFunc(all, func(a, b Finding) int { return cmp.Compare(a.Severity.rank(), b.Severity.rank()) })
}
