package inspect

import (
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/outside"
)

// fault is what history says of an address, or of a link without one.
type fault struct {
	since  time.Time // of the last loss, unless it is over
	before time.Time // of a loss before the holder that serves the address now
	ended  time.Time // when the last holder ended
}

// history is what happened, as far as it can be read: root alone may, and a file system may never answer. The rest of an answer
// is true without it.
func history() []events.Event {
	all, _ := outside.Ask("history", readLimit, events.Read)
	return all
}

// readLimit is how long the files of other processes may take.
const readLimit = 2 * time.Second

// noteSince fills in when the faults of rows began, as holders noted it.
func noteSince(rows []Row, server *Server, history []events.Event) {
	type key struct{ ifname, address string }
	faults := make(map[key]fault)
	var away time.Time                       // since when the server does not answer
	type front struct{ family, rule string } // with the rule in quotes
	rules := make(map[front]time.Time)       // since when rules of other programs come first
	for _, e := range history {
		k := key{e.Ifname, e.Address}
		f := faults[k]
		switch e.What {
		case events.RouteLost, events.Refused, events.Excluded:
			if f.since.IsZero() {
				f.since = e.Time
			}
		case events.Served: // it notes what changes from then on
			f = fault{before: f.since}
		case events.RouteBack:
			f = fault{}
		case events.Ended:
			f = fault{ended: e.Time}
		case events.RuleCame:
			rules[front{e.Family, strings.TrimSuffix(e.Text, " "+events.CameFront)}] = e.Time
		case events.RuleWent:
			delete(rules, front{e.Family, strings.TrimSuffix(e.Text, " "+events.WentFront)})
		case events.Started: // rules may have gone meanwhile
			clear(rules)
		case events.ServerAway:
			away = e.Time
		case events.ServerBack:
			away = time.Time{}
		}
		faults[k] = f
	}
	if server.State == Stopped && !away.IsZero() && away.Unix() > server.Since { // one that was no unit, perhaps
		server.Since = away.Unix()
	}
	for i := range rows {
		r := &rows[i]
		if !r.IsFault() {
			continue
		}
		var since time.Time
		switch f := faults[key{r.Ifname, r.Address}]; r.State {
		case "server-stopped":
			if since = away; server.Since != 0 {
				since = time.Unix(server.Since, 0)
			}
		case "excluded":
			since = faults[key{ifname: r.Ifname}].since
		case "no-route", "blocked", "shadowed", "link-down", "no-carrier", "no-lease":
			if since = f.since; since.IsZero() {
				since = f.before
			}
		case "shadowed-part":
			since = rules[front{r.Family, strings.TrimSuffix(r.Findings[0].Evidence, " "+beforeAddress)}]
		case "not-served":
			if since = f.since; since.IsZero() {
				since = f.ended
			}
		}
		if !since.IsZero() {
			r.Since = since.Unix()
		}
	}
}
