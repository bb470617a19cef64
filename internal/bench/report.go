package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"time"
)

// report is what was measured, in order.
type report struct {
	Lines  []line `json:"lines"`
	Faults faults `json:"faults"`
}

// line is one figure. Without a target it is there to compare with.
type line struct {
	What   string   `json:"what"`
	Value  float64  `json:"value"`
	Unit   string   `json:"unit"`
	Target *float64 `json:"target,omitempty"`
	Least  bool     `json:"at_least,omitempty"` // the target is a lower bound; else an upper one
}

func newReport() *report { return &report{} }

func (r *report) add(unit string, value float64, what string, args ...any) {
	r.Lines = append(r.Lines, line{What: fmt.Sprintf(what, args...), Value: value, Unit: unit})
}

func (r *report) atLeast(target float64, unit string, value float64, what string, args ...any) {
	r.add(unit, value, what, args...)
	l := &r.Lines[len(r.Lines)-1]
	l.Target, l.Least = &target, true
}

func (r *report) atMost(target float64, unit string, value float64, what string, args ...any) {
	r.add(unit, value, what, args...)
	r.Lines[len(r.Lines)-1].Target = &target
}

// met tells whether a line reaches its target.
func (l line) met() bool {
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

// roundTo leaves three digits of a time.
func roundTo(v float64) time.Duration {
	if v <= 0 {
		return 1
	}
	return time.Duration(math.Pow(10, math.Floor(math.Log10(v*1e9))-2))
}

// print writes the report, and returns an error if an answer was wrong or lost.
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
	f := &r.Faults
	if !f.some() {
		return nil
	}
	err := fmt.Errorf("%d violations, %d requests without an answer, %d refused", f.Violations, f.Lost, f.Refused)
	for _, first := range f.First {
		err = errors.Join(err, errors.New(first))
	}
	return err
}

func (r *report) printText() {
	fmt.Printf("%-70s %12s  %s\n", "", "reached", "wanted")
	for _, l := range r.Lines {
		wanted := ""
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
		fmt.Printf("%-70s %12s  %s\n", l.What, format(l.Value, l.Unit), wanted)
	}
	fmt.Printf("%-70s %12d\n", "wrong answers, lost answers, refusals", r.Faults.Violations+r.Faults.Lost+r.Faults.Refused)
}

func clone(v []float64) []float64 { return slices.Clone(v) }

// median sorts its argument.
func median(v []float64) float64 { return quantile(v, 0.5) }

func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return v[min(int(q*float64(len(v))), len(v)-1)]
}
