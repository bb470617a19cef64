package inspect

import (
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
)

// fault is what history says of an address, or of a link without one.
type fault struct {
	since  time.Time // of the last loss, unless it is over
	before time.Time // of a loss before the holder that serves the address now
	ended  time.Time // when the last holder ended
}

// noteSince fills in when the faults of rows began, as holders noted it.
func noteSince(rows []Row, history []events.Event) {
	type key struct{ ifname, address string }
	faults := make(map[key]fault)
	var away time.Time // since when the server does not answer
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
		case events.ServerAway:
			away = e.Time
		case events.ServerBack:
			away = time.Time{}
		}
		faults[k] = f
	}
	for i := range rows {
		r := &rows[i]
		if !r.IsFault() {
			continue
		}
		var since time.Time
		switch f := faults[key{r.Ifname, r.Address}]; r.State {
		case "server-stopped":
			since = away
		case "excluded":
			since = faults[key{ifname: r.Ifname}].since
		case "no-route", "blocked", "shadowed", "link-down", "no-carrier", "no-lease":
			if since = f.since; since.IsZero() {
				since = f.before
			}
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
