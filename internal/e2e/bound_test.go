package e2e

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

// TestBound: traffic that is bound leaves by its uplink, with its address, in both families,
// whoever holds the leases.
func TestBound(t *testing.T) {
	for how := range holders {
		t.Run(how, func(t *testing.T) {
			p := newPair(t)
			server := p.serve(boundTimeouts)
			stop := p.serveAddresses(how)
			strict := p.mustBind("wan1", uplink.Block)
			loose := p.mustBind("wan1", uplink.Fallback)
			p.mustBind("wan1", uplink.Block, user7, udp8)
			if strict.Mark() != 0x02000000 || loose.Mark() != 0x03000000 || strict.Marking != loose.Marking {
				t.Errorf("marks are %#x and %#x", strict.Mark(), loose.Mark())
			}
			for _, family := range []int{4, 6} {
				first, second := p.addr(0, family), p.addr(1, family)
				p.wantSeen("not bound", packet{family: family}, first)
				p.wantSeen("block", packet{family: family, mark: strict.Mark()}, second)
				p.wantSeen("fallback", packet{family: family, mark: loose.Mark()}, second)
				p.wantSeen("with bits of others", packet{family: family, mark: strict.Mark() | 0x80123}, second)
				p.wantSeen("user", packet{family: family, uid: 4711}, second)
				p.wantSeen("another user", packet{family: family, uid: 4712}, first)
				for tcp, want := range map[bool]string{false: second, true: first} {
					if got := p.look(packet{family: family, tcp: tcp, port: port2}); got != want {
						t.Errorf("UDP to a port, TCP %v: seen as %s, want %s", tcp, got, want)
					}
				}
			}
			rules := p.boundRules()
			if len(rules) != 2*(2*4+1+2) { // lookups and guards, an own lookup, two for the other address
				t.Fatalf("rules are %s", strings.Join(rules, "\n"))
			}

			// Holders and server die, and others take over: nothing changes.
			stop(syscall.SIGKILL)
			server.kill()
			for _, family := range []int{4, 6} {
				p.wantSeen("after kill -9", packet{family: family, mark: strict.Mark()}, p.addr(1, family))
			}
			h4, h6 := p.hear("4"), p.hear("6")
			server = p.serve(boundTimeouts)
			stop = p.serveAddresses(how)
			if again := p.mustBind("wan1", uplink.Block); again.Marking != strict.Marking {
				t.Errorf("the mark is another: %+v", again)
			}
			for _, r := range append(h4(), h6()...) {
				if strings.Contains(r, "fwmark") || strings.Contains(r, "uidrange") {
					t.Errorf("rule changed: %s", r)
				}
			}
			if got := p.boundRules(); !slices.Equal(got, rules) {
				t.Errorf("rules are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(rules, "\n"))
			}

			// Lookups come back when others delete them.
			for _, family := range []string{"-4", "-6"} {
				p.ns.IP(t, family+" rule del pref 9002 uidrange 4711-4711")
				p.ns.IP(t, family+" rule del pref 15002")
				p.ns.IP(t, family+" rule del pref 9000")
			}
			eventually(t, "the lookups are back", func() error {
				if diff := unordered(p.boundRules(), rules); diff != "" {
					return errors.New(diff)
				}
				return nil
			})

			// Other tables: the lookups move.
			server.stop()
			p.serve(boundTimeouts, `"table_offset":20000`)
			for _, family := range []int{4, 6} {
				p.waitSeen("bound in the new table", packet{family: family, mark: strict.Mark()}, p.addr(1, family))
			}
			moved := make([]string, len(rules))
			tables := strings.NewReplacer("lookup 1000", "lookup 2000")
			for i, r := range rules {
				moved[i] = tables.Replace(r)
			}
			eventually(t, "the lookups have moved", func() error {
				got := p.boundRules()
				for i, r := range got {
					// Which of the new tables it is depends on who asked first.
					if at := strings.Index(r, "lookup 2000"); at >= 0 {
						got[i] = r[:at] + "lookup 2000" + r[at+len("lookup 20000"):]
					}
				}
				want := slices.Clone(moved)
				for i, r := range want {
					if at := strings.Index(r, "lookup 2000"); at >= 0 {
						want[i] = r[:at] + "lookup 2000" + r[at+len("lookup 20000"):]
					}
				}
				if diff := unordered(got, want); diff != "" {
					return errors.New(diff)
				}
				return nil
			})

			// All leases end: guards stay, and nothing of what is bound leaves.
			stop(syscall.SIGTERM)
			if how == "watch" { // it leaves all in place
				return
			}
			for _, r := range p.boundRules() {
				if strings.Contains(r, "lookup") {
					t.Errorf("rule stays behind: %s", r)
				}
			}
			for _, family := range []int{4, 6} {
				p.wantSeen("block without a lease", packet{family: family, mark: strict.Mark()}, unreachable)
				p.wantSeen("user without a lease", packet{family: family, uid: 4711}, unreachable)
				p.wantSeen("fallback without a lease", packet{family: family, mark: loose.Mark()}, p.addr(0, family))
			}
		})
	}
}

// TestBoundLoss: what is bound with block leaves by no other uplink, in neither family; what
// is bound with fallback does.
func TestBoundLoss(t *testing.T) {
	for how := range holders {
		t.Run(how, func(t *testing.T) {
			p := newPair(t)
			p.serve()
			p.serveAddresses(how)
			strict := p.mustBind("wan1", uplink.Block)
			loose := p.mustBind("wan1", uplink.Fallback)

			// One family goes, with its lease.
			p.ns.IP(t, "address del "+p.addr(1, 6)+"/64 dev wan1")
			eventually(t, "IPv6 is not served", func() error {
				for _, rule := range p.rules6() {
					if strings.Contains(rule, "from "+p.addr(1, 6)+" lookup") {
						return errors.New(rule)
					}
				}
				return nil
			})
			p.waitSeen("block without IPv6", packet{family: 6, mark: strict.Mark()}, unreachable)
			p.waitSeen("fallback without IPv6", packet{family: 6, mark: loose.Mark()}, p.addr(0, 6))
			p.wantSeen("block, the other family", packet{family: 4, mark: strict.Mark()}, p.addr(1, 4))

			// The link goes down: the kernel empties the table.
			p.ns.IP(t, "link set wan1 down")
			p.wantSeen("block with the link down", packet{family: 4, mark: strict.Mark()}, unreachable)
			p.wantSeen("block with the link down", packet{family: 6, mark: strict.Mark()}, unreachable)
			p.waitSeen("fallback with the link down", packet{family: 4, mark: loose.Mark()}, p.addr(0, 4))

			// All come back, and so does what is bound.
			p.ns.IP(t, "link set wan1 up")
			p.ns.IP(t, "address add "+p.addr(1, 6)+"/64 dev wan1 nodad")
			p.ns.IP(t, "route replace default via 10.2.0.1 dev wan1 metric 200")
			p.ns.IP(t, "-6 route replace default via fd02::1 dev wan1 metric 200")
			if how == "clients" { // each is for one address
				p.lease6(p.addr(1, 6), "wan1", "--routes", "copy")
			}
			for _, family := range []int{4, 6} {
				p.waitSeen("block", packet{family: family, mark: strict.Mark()}, p.addr(1, family))
				p.waitSeen("fallback", packet{family: family, mark: loose.Mark()}, p.addr(1, family))
				// Emptied by somebody who leaves the holder no say: the rest of the table's rules stay.
				p.wantSeen("not bound", packet{family: family}, p.addr(0, family))
			}
		})
	}
}
