package client

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func tagged(tag string) uplink.Uplink {
	u := cable()
	u.Tag = tag
	return u
}

// carried is the same, with routes.
func carried() uplink.Uplink {
	u := cable()
	u.Settings = uplink.Settings{Routes: uplink.CopyRoutes, OnLoss: uplink.Fallback}
	return u
}

// cable is the uplink of the tests.
func cable() uplink.Uplink {
	return uplink.Uplink{
		Key:        wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "10.77.0.2"},
		Network:    netip.MustParsePrefix("10.77.0.2/24"),
		Tag:        "cable",
		Priorities: uplink.OriginalPriorities,
	}
}

func granted(table uint32, expires int64) event {
	return event{kind: replied, reply: wire.Reply{Table: table, Expires: expires}}
}

func refusal(code wire.Code, why string) event {
	return event{kind: replied, reply: wire.Refuse(code, why)}
}

func placed(err error) event { return event{kind: rulesPlaced, err: err} }

var (
	tick    = event{kind: timer}
	full    = event{kind: timer, full: true}
	seen    = event{kind: addressSeen}
	gone    = event{kind: addressGone, why: "the address is gone"}
	stopped = event{kind: end, why: "stopped"}
	nobody  = event{kind: unreachable, err: errors.New("nobody serves it")}
	// released is the answer to a release.
	released = event{kind: replied}
)

// String is the action as the tests write it.
func (a action) String() string {
	switch a.kind {
	case send:
		name := map[wire.Command]string{wire.Acquire: "acquire", wire.Release: "release"}[a.request.Cmd]
		return fmt.Sprintf("%s %s %s", name, a.request.Key, a.request.Tag)
	case placeRules:
		return fmt.Sprintf("place %d", a.table)
	case clearRules:
		return fmt.Sprintf("clear %d", a.table)
	case block:
		return fmt.Sprintf("block %d", a.table)
	case fallBack:
		return "fall back"
	case report:
		return strings.TrimSpace(fmt.Sprintf("report %d %s", a.table, a.why))
	case finish:
		return "finish: " + a.why
	}
	return fmt.Sprintf("action %d", a.kind)
}

const (
	acquire = "acquire wan0-10.77.0.2-2 cable"
	release = "release wan0-10.77.0.2-2 cable"
	never   = time.Duration(0)
)

// moment is one event and what has to follow from it. The clock of a case begins at
// 1000 s; times are counted from there.
type moment struct {
	at   time.Duration
	ev   event
	want []string
	next time.Duration // of the deadline; never
}

const epoch = 1000 * time.Second

func at(d time.Duration, ev event, next time.Duration, want ...string) moment {
	return moment{d, ev, want, next}
}

// life is what happens to a machine, in order; without a machine of its own to that of cable.
type life struct {
	name    string
	machine *machine
	moments []moment
}

func live(t *testing.T, lives []life) {
	for _, l := range lives {
		t.Run(l.name, func(t *testing.T) {
			m := l.machine
			if m == nil {
				m = newMachine(cable(), true, false)
			}
			for i, moment := range l.moments {
				var got []string
				for _, a := range m.step(epoch+moment.at, moment.ev) {
					got = append(got, a.String())
				}
				if strings.Join(got, "; ") != strings.Join(moment.want, "; ") {
					t.Errorf("moment %d: actions: got %q, want %q", i, got, moment.want)
				}
				want := moment.next
				if want != never {
					want += epoch
				}
				if got := m.deadline(); got != want {
					t.Errorf("moment %d: deadline: got %v, want %v", i, got-epoch, want-epoch)
				}
			}
		})
	}
}

// heldLife is a life up to the moment when the rules stand, and what comes then; the lease ends at 100 s.
func heldLife(more ...moment) []moment {
	const s, ms = time.Second, time.Millisecond
	return append([]moment{
		at(0, event{kind: start}, 2*s, acquire),
		at(0, seen, 2*s),
		at(1*s, granted(10000, 1100), never, "place 10000"),
		at(1*s, placed(nil), 50*s+500*ms, "report 10000"),
	}, more...)
}
