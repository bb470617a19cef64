package choice

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Candidate is an uplink of one family that may serve traffic that is bound to none.
type Candidate struct {
	Ifname  string
	Address string
	Table   uint32
	State   State
	Rank    int    // lower is better
	Metered bool   // behind the others of its state
	Default bool   // its table has a default route of its own
	Metric  uint32 // of that route
	Held    time.Duration
	Age     int  // lower is an older lease
	Speaks  bool // unbound traffic that leaves by the link has this address
}

// Decision is the choice for one family.
type Decision struct {
	Table uint32 // 0: none
	Why   string
	// At is when the choice has to be made again though nothing happened; 0: never.
	At     time.Duration
	Pinned bool
}

// Choose returns which candidate serves unbound traffic. current is the table of the choice so far, 0 for none; pinned
// is the link that the user wants, "" for none. If none works, the choice stays.
func Choose(now time.Duration, all []Candidate, current uint32, pinned string) Decision {
	all = slices.DeleteFunc(slices.Clone(all), func(c Candidate) bool { return !c.Default })
	link := ""
	if at := slices.IndexFunc(all, func(c Candidate) bool { return c.Table == current }); at >= 0 {
		link = all[at].Ifname
	}
	slices.SortFunc(all, func(a, b Candidate) int { return compare(a, b, current, link) })
	if at := slices.IndexFunc(all, func(c Candidate) bool { return c.Ifname == pinned }); pinned != "" && at >= 0 {
		return Decision{Table: all[at].Table, Why: "the user wants it", Pinned: true}
	}
	at := slices.IndexFunc(all, func(c Candidate) bool { return c.Table == current })
	if current == 0 && slices.ContainsFunc(all, func(c Candidate) bool { return c.State == Unknown }) {
		return Decision{Why: "none, until it is known which uplinks work"}
	}
	if current == 0 || at < 0 {
		if len(all) > 0 && class(all[0].State) < useless {
			return Decision{Table: all[0].Table, Why: reason(all, all[0])}
		}
		if len(all) == 0 {
			return Decision{Why: "no uplink has a default route"}
		}
		return Decision{Why: "none works"}
	}
	used := all[at]
	if used.State == Unknown {
		return Decision{Table: current, Why: "kept until it is known whether it works"}
	}
	var until time.Duration
	var waits string
	for _, c := range all[:at] {
		if class(c.State) >= useless && (used.State != NoCarrier || c.State != Dead) { // targets may be down for all uplinks, and a carrier is not
			break
		}
		if c.Held <= now || !used.State.Works() || c.Ifname == used.Ifname { // a hold keeps traffic from a link that may fail again
			return Decision{Table: c.Table, Why: reason(all, c)}
		}
		if until == 0 || c.Held < until {
			until, waits = c.Held, c.Ifname
		}
	}
	d := Decision{Table: current, Why: reason(all, used), At: until}
	switch {
	case class(used.State) >= useless:
		d.Why = "kept, since none works"
	case until != 0:
		d.Why = fmt.Sprintf("%s works again, and is used in %v if it goes on to work", waits, max(until-now, 0).Round(time.Second))
	}
	return d
}

// Unused says why a candidate is not the one in use.
func Unused(now time.Duration, c, used Candidate, pinned bool) string {
	differs := func(text string, of func(Candidate) any) string {
		return fmt.Sprintf("%s %v, %s has %v", text, of(c), used.Ifname, of(used))
	}
	switch {
	case !c.Default:
		return "its table has no default route of its own"
	case pinned:
		return "the user wants " + used.Ifname
	case class(c.State) >= useless:
		return "it does not work"
	case class(c.State) > class(used.State):
		return used.Ifname + " is " + used.State.String()
	case class(c.State) < class(used.State) || compare(c, used, used.Table, used.Ifname) < 0:
		if c.Held > now {
			return fmt.Sprintf("it failed, and is used again in %v if it goes on to work", (c.Held - now).Round(time.Second))
		}
		return "it is used as soon as the kernel has its routes"
	case c.Metered != used.Metered:
		return "it is metered"
	case c.Rank != used.Rank:
		return differs("rank", func(o Candidate) any { return o.Rank })
	case c.State != used.State:
		return "it is not probed"
	case c.Metric != used.Metric:
		return differs("metric", func(o Candidate) any { return o.Metric })
	}
	return used.Ifname + " is in use"
}

// useless is the class of uplinks that are not chosen.
const useless = 3

func class(s State) int {
	switch s {
	case Alive, Off:
		return 0
	case Degraded:
		return 1
	case Portal:
		return 2
	case NoCarrier:
		return useless + 1
	}
	return useless
}

// compare puts the better one first. link is that of the table current.
func compare(a, b Candidate, current uint32, link string) int {
	first := func(is bool) int {
		if is {
			return 0
		}
		return 1
	}
	return cmp.Or(
		cmp.Compare(class(a.State), class(b.State)),
		cmp.Compare(first(!a.Metered), first(!b.Metered)),
		cmp.Compare(a.Rank, b.Rank),
		cmp.Compare(first(a.State != Off), first(b.State != Off)),
		cmp.Compare(a.Metric, b.Metric),
		cmp.Compare(first(a.Speaks && a.Ifname == link), first(b.Speaks && b.Ifname == link)),
		cmp.Compare(first(a.Table == current), first(b.Table == current)),
		cmp.Compare(a.Age, b.Age),
		cmp.Compare(a.Table, b.Table),
	)
}

// reason says why a candidate is the one of all.
func reason(all []Candidate, c Candidate) string {
	working := 0
	for _, o := range all {
		if o.State.Works() {
			working++
		}
	}
	switch {
	case c.State == Portal:
		return "behind a captive portal, and none works"
	case c.State == Dead:
		return "none works, and it has a carrier"
	case !c.State.Works():
		return "none works"
	case working == 1:
		return "the only one that works"
	}
	return "the best that works"
}
