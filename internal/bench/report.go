package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"time"
)

// report is the figures, in the order in which they are printed.
type report struct {
	Lines    []*line `json:"lines"`
	Faults   faults  `json:"faults"`
	Original *faults `json:"original_faults,omitempty"`
}

// line is one figure. A line without a target is there to compare others with.
type line struct {
	What     string   `json:"what"`
	Value    float64  `json:"value"`
	Unit     string   `json:"unit"`
	Original *float64 `json:"original,omitempty"`    // the original's figure
	Of       *float64 `json:"of_original,omitempty"` // Value divided by Original
	Target   *float64 `json:"target,omitempty"`
	Least    bool     `json:"at_least,omitempty"` // the target is a lower bound; else an upper one
}

func newReport(o options) *report {
	r := &report{}
	if o.original != "" {
		r.Original = &faults{}
	}
	return r
}

// faults returns the faults of our commands, 0, or of the original, 1.
func (r *report) faults(of int) *faults {
	if of == 0 {
		return &r.Faults
	}
	return r.Original
}

func (r *report) add(unit string, value float64, what string, args ...any) *line {
	l := &line{What: fmt.Sprintf(what, args...), Value: value, Unit: unit}
	r.Lines = append(r.Lines, l)
	return l
}

// against adds the original's figure: the median of its measurements, if there are any.
func (l *line) against(original []float64) *line {
	if len(original) > 0 {
		value := median(original)
		if l.Original = &value; value > 0 {
			of := l.Value / value
			l.Of = &of
		}
	}
	return l
}

func (l *line) atLeast(target float64) { l.Target, l.Least = &target, true }

func (l *line) atMost(target float64) { l.Target = &target }

// met reports whether the value reaches the target.
func (l *line) met() bool {
	return l.Target == nil || l.Least && l.Value >= *l.Target || !l.Least && l.Value <= *l.Target
}

const (
	perSecond = "/s"
	perMinute = "/min"
	ratio     = "x"
	seconds   = "s"
	octets    = "B"
	count     = ""
)

func format(v float64, unit string) string {
	switch unit {
	case seconds:
		return time.Duration(v * float64(time.Second)).Round(roundTo(v)).String()
	case octets:
		return fmt.Sprintf("%.2f MiB", v/(1<<20))
	case ratio:
		return fmt.Sprintf("%.2f", v)
	case perMinute:
		return fmt.Sprintf("%.1f%s", v, unit)
	}
	return fmt.Sprintf("%.0f%s", v, unit)
}

// times formats a ratio with at least two digits.
func times(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0fx", v)
	}
	return fmt.Sprintf("%.2gx", v)
}

// roundTo returns the unit to which a time is rounded so that three digits are left.
func roundTo(v float64) time.Duration {
	if v <= 0 {
		return 1
	}
	return time.Duration(math.Pow(10, math.Floor(math.Log10(v*1e9))-2))
}

// print writes the report. It returns an error if one of our commands answered wrongly or not at all.
func (r *report) print(o options) error {
	if o.json {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		if err := e.Encode(r); err != nil {
			return err
		}
	} else {
		r.printText()
	}
	if r.Faults.sum() > 0 {
		return errors.New(r.Faults.String())
	}
	return nil
}

func (r *report) printText() {
	row := func(what, reached, original, of, wanted string) {
		if r.Original == nil {
			fmt.Printf("%-70s %12s  %s\n", what, reached, wanted)
		} else {
			fmt.Printf("%-70s %12s %12s %9s  %s\n", what, reached, original, of, wanted)
		}
	}
	row("", "reached", "original's", "ours of it", "wanted")
	for _, l := range r.Lines {
		original, of, wanted := "", "", ""
		if l.Original != nil {
			original = format(*l.Original, l.Unit)
		}
		if l.Of != nil {
			of = times(*l.Of)
		}
		if l.Target != nil {
			wanted = "at most "
			if l.Least {
				wanted = "at least "
			}
			wanted += format(*l.Target, l.Unit)
			if !l.met() {
				wanted += "  MISSED"
			}
		}
		row(l.What, format(l.Value, l.Unit), original, of, wanted)
	}
	original := ""
	if r.Original != nil {
		original = strconv.Itoa(r.Original.sum())
	}
	row("wrong answers, lost answers, refusals", strconv.Itoa(r.Faults.sum()), original, "", "")
	if r.Original != nil && r.Original.sum() > 0 {
		fmt.Printf("\nThe original: %v\n", r.Original)
	}
}

// median returns the middle value; the values may have any order.
func median(v []float64) float64 { return quantile(v, 0.5) }

func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	return v[min(int(q*float64(len(v))), len(v)-1)]
}
