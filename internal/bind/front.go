package bind

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// far are addresses of the internet, to which nothing is sent: the kernel is asked for the way there.
var far = map[int]netip.Addr{unix.AF_INET: netip.MustParseAddr("1.1.1.1"), unix.AF_INET6: netip.MustParseAddr("2606:4700:4700::1111")}

// Front is a rule of another program that takes traffic before the rules of its binding do. Programs that add rules
// without a priority, as wg-quick does, get a place before all others. The zero Front is none.
type Front struct {
	Rule   route.Rule
	Family wire.Family // where it was found
}

// inFront returns the first such rule.
func inFront(kernel *route.Conn, b Bound) (Front, error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := kernel.Rules(family)
		if err != nil {
			return Front{}, err
		}
		q, err := question(kernel, family, b.Traffic)
		if err != nil {
			return Front{}, err
		}
		got, err := kernel.Match(q)
		reached := err == nil && slices.Contains(b.Tables[wire.Family(family)], got.Table) // the lookup reaches the rules of the binding
		for _, r := range rules {
			if r.Priority >= b.Priority {
				break
			}
			if r.Protocol == route.Protocol || !mayTake(r, b.Traffic) {
				continue
			}
			passes := !reached && r.Action == route.Goto && r.Goto > b.Priority // it jumps over the rules of the binding
			if passes || err == nil && r.Action == route.Lookup && r.Table == got.Table || err != nil && stops(r) {
				return Front{r, wire.Family(family)}, nil
			}
		}
	}
	return Front{}, nil
}

// mayTake reports whether a rule may select the traffic, whatever its addresses are.
func mayTake(r route.Rule, t route.Traffic) bool {
	if r.Src.Bits() > 0 || r.Dst.Bits() > 0 || r.Iif != "" && r.Iif != cmp.Or(t.Iif, uplink.Loopback) || r.Oif != "" {
		return false
	}
	marked := (t.Mark^r.Mark)&r.Mask == 0
	if r.Flags&inverted != 0 {
		return r.Mask == 0 || !marked
	}
	return marked
}

// inverted is FIB_RULE_INVERT of linux/fib_rules.h: "not".
const inverted = 2

// stops reports whether a rule ends the lookup with an error.
func stops(r route.Rule) bool {
	return !slices.Contains([]uint8{route.Lookup, route.Nop, route.Goto}, r.Action)
}

// Cure is what to do about the rule.
const Cure = "give that rule a priority behind theirs (wg-quick: set Table = off, and add the rules in PostUp; tailscale: \"bind_priority\": 5000 in server.json puts them first)"

// missing says that a rule takes traffic, and what to do; "" if there is none.
func (f Front) missing(t route.Traffic, onLoss uplink.OnLoss) string {
	if f == (Front{}) {
		return ""
	}
	return fmt.Sprintf("the first place for its rules: rule %q takes its %s traffic%s; %s", f.Rule, f.Family, f.Fate(t, onLoss), Cure)
}

// Fate says what becomes of what the rule takes, if the lock holds it.
func (f Front) Fate(t route.Traffic, onLoss uplink.OnLoss) string {
	if onLoss == uplink.Block && t.Mask != 0 {
		return ", and the lock drops it"
	}
	return ""
}

// question asks where a packet of some traffic to the Internet leaves.
func question(kernel *route.Conn, family int, t route.Traffic) (route.Question, error) {
	q := route.Question{Dst: far[family], Mark: t.Mark, UID: t.UIDs.First, IPProto: t.IPProto, Dport: t.Dports.First}
	if t.Iif == "" {
		return q, nil
	}
	link, found, err := kernel.LinkByName(t.Iif)
	if err != nil || !found {
		return q, err
	}
	addresses, err := kernel.AddressesOn(family, link.Index)
	for _, a := range addresses {
		if a.Scope == unix.RT_SCOPE_UNIVERSE && !a.Network().IsSingleIP() { // the sender is a neighbour: the kernel wants its address
			q.Iif, q.Src = link.Index, a.Network().Masked().Addr()
			if q.Src == a.Addr {
				q.Src = a.Addr.Next()
			}
		}
	}
	return q, err
}

// blocked reports whether traffic that is bound finds no route to the Internet, in any family that it has a table in.
func blocked(kernel *route.Conn, b Bound) bool {
	families := 0
	for family, tables := range b.Tables {
		if len(tables) == 0 {
			continue
		}
		families++
		q, err := question(kernel, int(family), b.Traffic)
		if err == nil {
			_, err = kernel.Match(q)
		}
		if err == nil {
			return false
		}
	}
	return families > 0
}
