package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	peers "github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// pair is a host with two routed uplinks of both families, of which main prefers the first.
type pair struct{ *uplinks }

const (
	port2         = 8 // answers, too
	unreachable   = "network is unreachable"
	boundTimeouts = `"table_timeout":4` // so that a renewal is never far
)

func newPair(t *testing.T) *pair {
	p := &pair{newHost(t).behind(routed(0), routed(1))}
	p.internet.Do(func() {
		for _, addr := range []string{internet, internet6} {
			serveWho(t, net.JoinHostPort(addr, fmt.Sprint(port2)))
		}
	})
	for n := range p.isps {
		p.address(n)
	}
	for i, ifname := range []string{"wan0", "wan1"} { // neighbours take their time to find each other
		for _, family := range []int{4, 6} {
			p.waitSeen("the internet is behind "+ifname, packet{family: family, device: ifname}, p.addr(i, family))
		}
	}
	return p
}

func (p *pair) addr(i, family int) string {
	inet, inet6 := at(i)
	if family == 4 {
		return inet
	}
	return inet6
}

// look is the address from which the internet sees a packet, or why it does not.
func (p *pair) look(b packet) string {
	p.t.Helper()
	b.tries = 4 // one may be lost, while neighbours are looked for
	seen, err := p.seen(b)
	if err != nil {
		return err.Error()
	}
	return seen
}

// wantSeen fails unless packets of UDP and TCP are seen so.
func (p *pair) wantSeen(what string, b packet, want string) {
	p.t.Helper()
	for _, tcp := range []bool{false, true} {
		b.tcp = tcp
		if got := p.look(b); got != want {
			p.t.Errorf("%s, IPv%d, TCP %v: seen as %s, want %s", what, b.family, tcp, got, want)
		}
	}
}

// waitSeen waits until they are.
func (p *pair) waitSeen(what string, b packet, want string) {
	p.t.Helper()
	eventually(p.t, what, func() error {
		for _, tcp := range []bool{false, true} {
			b.tcp = tcp
			if got := p.look(b); got != want {
				return fmt.Errorf("IPv%d, TCP %v: seen as %s, want %s", b.family, tcp, got, want)
			}
		}
		return nil
	})
}

// holders are the two ways to serve the addresses of the host.
var holders = map[string]func(*pair) (stop func(syscall.Signal)){
	"watch": func(p *pair) func(syscall.Signal) {
		w := p.watch("--config", p.watchFile(`{"links":[{"ifname":"wan*","routes":"copy"}]}`))
		return func(sig syscall.Signal) {
			_ = w.cmd.Process.Signal(sig) // it may have ended
			<-w.done
		}
	},
	"clients": func(p *pair) func(syscall.Signal) {
		for i, ifname := range []string{"wan0", "wan1"} {
			p.lease(p.addr(i, 4), ifname, "--routes", "copy")
			p.lease6(p.addr(i, 6), ifname, "--routes", "copy")
		}
		return func(sig syscall.Signal) {
			p.signalClients(sig)
			p.waitNoClient()
		}
	},
}

func (p *pair) serveAddresses(how string) (stop func(syscall.Signal)) {
	p.t.Helper()
	stop = holders[how](p)
	p.waitServed(0, 1)
	return stop
}

func (p *pair) waitServed(uplinks ...int) {
	p.t.Helper()
	for _, i := range uplinks {
		for _, family := range []int{4, 6} {
			p.waitRoute(i, family)
		}
	}
}

// waitRoute waits until the table of an address has its default route, and returns the table.
func (p *pair) waitRoute(i, family int) (table string) {
	p.t.Helper()
	table = p.served(p.addr(i, family))
	eventually(p.t, "the table of "+p.addr(i, family)+" has a default route", func() error {
		out, _ := p.ns.Output("ip", fmt.Sprint("-", family), "route", "show", "default", "table", table)
		if out == "" {
			return errors.New("it has none")
		}
		return nil
	})
	return table
}

// bind binds traffic to an interface as the commands do.
func (p *pair) bind(ifname string, onLoss uplink.OnLoss, traffic ...route.Traffic) (b bind.Binding, err error) {
	p.t.Helper()
	cfg := bind.Config{Ifname: ifname, OnLoss: onLoss, Traffic: traffic, Server: "tas_socket", Wait: patience}
	p.ns.Do(func() { b, err = bind.Bind(context.Background(), cfg) })
	return b, err
}

func (p *pair) mustBind(ifname string, onLoss uplink.OnLoss, traffic ...route.Traffic) bind.Binding {
	p.t.Helper()
	var b bind.Binding
	eventually(p.t, "traffic is bound, by the holders, in both families", func() (err error) {
		if b, err = p.bind(ifname, onLoss, traffic...); err != nil {
			return err
		}
		if len(b.Tables[wire.Inet]) == 0 || len(b.Tables[wire.Inet6]) == 0 || len(b.Unanswered) > 0 {
			return fmt.Errorf("%+v", b)
		}
		return nil
	})
	return b
}

// boundRules are the rules of both families that select by more than addresses and links, or let
// nothing pass.
func (p *pair) boundRules() (rules []string) {
	p.t.Helper()
	for family, all := range map[string][]string{"4 ": p.rules(), "6 ": p.rules6()} {
		for _, r := range all {
			if strings.Contains(r, "fwmark") || strings.Contains(r, "uidrange") || strings.Contains(r, "ipproto") || strings.Contains(r, "unreachable") {
				rules = append(rules, family+r)
			}
		}
	}
	slices.Sort(rules)
	return rules
}

var (
	user7 = route.Traffic{UIDs: route.UIDs{First: 4711, Last: 4711, Set: true}}
	udp8  = route.Traffic{IPProto: unix.IPPROTO_UDP, Dports: route.Ports{First: port2, Last: port2}}
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
			if len(rules) != 2*(2*4+1) {
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

// bindings are what is bound, one line each.
func (p *pair) bindings(server string, more ...string) (all []bind.Bound, lines []string) {
	p.t.Helper()
	var err error
	p.ns.Do(func() { all, err = bind.List(server, nil, more...) })
	if err != nil {
		p.t.Fatal(err)
	}
	for _, b := range all {
		lines = append(lines, fmt.Sprintf("%s %s %s %d %v %v", b.Ifname, b.Traffic, b.OnLoss, b.Priority, b.Guarded, b.Tables))
	}
	return all, lines
}

// TestBindingsSlowServer: what a server answers late, and to each try, is not taken for another link's mark.
func TestBindingsSlowServer(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.link("wan1")
	server := h.serve()
	p := &pair{&uplinks{host: h}}
	if _, err := p.bind("wan1", uplink.Block); !errors.Is(err, bind.ErrNoLease) {
		t.Fatal(err)
	}
	for range 3 { // links come in any order
		h.freeze(server.cmd.Process.Pid)
		time.AfterFunc(1200*time.Millisecond, func() { _ = syscall.Kill(server.cmd.Process.Pid, syscall.SIGCONT) }) // after two tries
		if all, lines := p.bindings("tas_socket"); len(all) != 1 || all[0].Ifname != "wan1" {
			t.Errorf("bound are %q", lines)
		}
	}
}

// TestBindings: what is bound is listed with its interface, and goes without a trace.
func TestBindings(t *testing.T) {
	p := newPair(t)
	server := p.serve()
	p.lease(p.addr(0, 4), "wan0", "--routes", "copy")
	p.lease(p.addr(1, 4), "wan1", "--routes", "copy")
	want := func(what string, got, want []string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: got\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	if _, got := p.bindings("tas_socket"); len(got) != 0 {
		t.Errorf("nothing is bound, and listed are %q", got)
	}
	b, err := p.bind("wan1", uplink.Block)
	if err != nil || b.Ifname != "wan1" || !slices.Equal(b.Tables[wire.Inet], []uint32{10001}) || b.Tables[wire.Inet6] != nil {
		t.Fatalf("binding: %+v, %v", b, err)
	}
	if _, err := p.bind("wan0", uplink.Fallback, user7); err != nil {
		t.Fatal(err)
	}
	p.ns.IP(t, "link add old0 type veth peer name old1")
	cfg := bind.Config{Ifname: "old0", OnLoss: uplink.Block, Server: "tas_socket"}
	p.ns.Do(func() { b, err = bind.Bind(context.Background(), cfg) })
	if !errors.Is(err, bind.ErrNoLease) || b.Mark() != 0x06000000 {
		t.Errorf("binding to an interface without a lease: %+v, %v", b, err)
	}
	p.ns.IP(t, "link del old0")
	wan0 := "wan0 uidrange 4711-4711 fallback 15004 [inet inet6] map[inet:[10000]]"
	wan1 := "wan1 fwmark 0x2000000/0xff000000 block 9002 [inet inet6] map[inet:[10001]]"
	old0 := "fwmark 0x6000000/0xff000000 block 9006 [inet inet6] map[]"
	all, lines := p.bindings("tas_socket")
	want("all", lines, []string{" " + old0, wan0, wan1})
	_, lines = p.bindings("tas_socket", "old0")
	want("with an interface that went", lines, []string{"old0 " + old0, wan0, wan1})
	server.stop()
	_, lines = p.bindings("tas_socket")
	want("without the server", lines, []string{" " + old0, wan0, wan1})

	p.ns.Do(func() { err = bind.Unbind(all[:2]) })
	if err != nil {
		t.Fatal(err)
	}
	_, lines = p.bindings("tas_socket")
	want("what is left", lines, []string{wan1})
	p.ns.Do(func() { err = bind.Unbind(all) })
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "no rule is left of what was bound", func() error {
		if rules := p.boundRules(); len(rules) > 0 {
			return fmt.Errorf("%q", rules)
		}
		return nil
	})
	p.wantSeen("unbound", packet{family: 4, mark: b.Mark()}, p.addr(0, 4))
}

// TestBindErrors: each thing that is missing has a name, and is waited for if that is wanted.
func TestBindErrors(t *testing.T) {
	p := newPair(t)
	var b bind.Binding
	var err error
	tryBind := func(change func(*bind.Config)) error {
		cfg := bind.Config{Ifname: "wan1", OnLoss: uplink.Block, Server: "tas_socket"}
		if change != nil {
			change(&cfg)
		}
		p.ns.Do(func() { b, err = bind.Bind(context.Background(), cfg) })
		return err
	}
	if err := tryBind(nil); !errors.Is(err, peers.ErrNoServer) || !strings.Contains(err.Error(), "bind to wan1: no server answers: nobody has the name ") {
		t.Errorf("without a server: %v", err)
	}
	if rules := p.boundRules(); len(rules) != 0 {
		t.Errorf("rules are %q", rules)
	}
	waiting := make(chan error, 1)
	go func() {
		cfg := bind.Config{Ifname: "wan1", OnLoss: uplink.Block, Server: "tas_socket", Wait: patience}
		p.ns.Do(func() {
			b, err := bind.Bind(context.Background(), cfg)
			if err == nil && !slices.Equal(b.Tables[wire.Inet], []uint32{10000}) {
				err = fmt.Errorf("%+v", b)
			}
			waiting <- err
		})
	}()
	p.serve(`"allowed_users":[4711]`)
	if err := tryBind(func(c *bind.Config) { c.Wait = 300 * time.Millisecond }); !errors.Is(err, bind.ErrNoLease) {
		t.Errorf("without a lease: %v", err)
	}
	p.wantSeen("guarded before there is a lease", packet{family: 4, mark: b.Mark()}, unreachable)
	if err := tryBind(func(c *bind.Config) { c.Ifname = "nolink" }); !errors.Is(err, bind.ErrNoLease) || !strings.Contains(err.Error(), "there is no such interface") {
		t.Errorf("without the interface: %v", err)
	}
	if err := tryBind(func(c *bind.Config) { c.Traffic = []route.Traffic{{}} }); err == nil || !strings.Contains(err.Error(), "all traffic cannot be bound") {
		t.Errorf("all traffic: %v", err)
	}
	done := make(chan struct{})
	p.as(4711, func(ready func()) {
		_, err = bind.Bind(context.Background(), bind.Config{Ifname: "wan1", OnLoss: uplink.Block, Server: "tas_socket", ServerUIDs: []uint32{0}})
		close(done)
		ready()
	})
	<-done
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "only root and the server's own user may ask for marks") {
		t.Errorf("as a user who may lease: %v", err)
	}
	p.lease(p.addr(1, 4), "wan1", "--routes", "copy")
	if err := <-waiting; err != nil {
		t.Errorf("after a lease came: %v", err)
	}

	// Others' rules in the bits of marks are told, and what they are.
	p.ns.IP(t, "rule add pref 77 fwmark 0x1e7700ce lookup 99")
	p.ns.IP(t, "-6 rule add pref 78 fwmark 0x80000/0xff0000 lookup 99")
	if err := tryBind(nil); err != nil || len(b.Overlapping) != 1 || b.Overlapping[0].String() != "77: from all fwmark 0x1e7700ce lookup 99" {
		t.Errorf("overlapping rules: %v, %v", b.Overlapping, err)
	}
}

// TestBindBusyServer: a server that has not read the request yet is not one that knows no marks.
func TestBindBusyServer(t *testing.T) {
	p := newPair(t)
	server := p.serve()
	p.lease(p.addr(1, 4), "wan1", "--routes", "copy")
	p.freeze(server.cmd.Process.Pid)
	cfg := bind.Config{Ifname: "wan1", OnLoss: uplink.Block, Server: "tas_socket"}
	bound := make(chan error, 1)
	go p.ns.Do(func() {
		_, err := bind.Bind(context.Background(), cfg)
		bound <- err
	})
	select {
	case err := <-bound:
		t.Fatalf("beside a server that stands still: %v", err)
	case <-time.After(3 * time.Second): // the original, which is silent, would have read it long ago
	}
	if err := syscall.Kill(server.cmd.Process.Pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := <-bound; err != nil {
		t.Errorf("once it goes on: %v", err)
	}

	// One that reads and says nothing knows none; one that never reads is none.
	server.kill()
	for _, tt := range []struct {
		reads bool
		want  error
	}{{true, peers.ErrNoMarks}, {false, peers.ErrNoServer}} {
		conn := p.bound(0, padded(t, "tas_socket"))
		if tt.reads {
			go func() {
				for {
					if _, err := conn.Receive(); err != nil {
						return
					}
				}
			}()
		}
		var err error
		p.ns.Do(func() { _, err = bind.Bind(context.Background(), cfg) })
		if !errors.Is(err, tt.want) {
			t.Errorf("a server that reads is %v: got %v, want %v", tt.reads, err, tt.want)
		}
		conn.Close()
	}
}

// TestBindOldHolders: for holders that know no bindings the lookups are placed all the same.
func TestBindOldHolders(t *testing.T) {
	p := newPair(t)
	p.serve()
	for i, answer := range []string{"", `{"version":1,"cmd":2,"table":5678,"lease_expires":99,"pid":1}`} {
		conn := p.bound(0, padded(t, fmt.Sprintf("wan%d-%s-2", i, p.addr(i, 4))))
		go func() {
			for answer != "" {
				datagrams, err := conn.Receive()
				if err != nil {
					return
				}
				for _, d := range datagrams {
					conn.Send(wire.Message{Data: []byte(answer), To: d.From})
				}
			}
		}()
		table := []string{"1234", "5678"}[i]
		p.ns.IP(t, fmt.Sprintf("rule add pref 10000 from %s lookup %s", p.addr(i, 4), table)) // unmarked, as the original's
		p.ns.IP(t, fmt.Sprintf("route add default via 10.%d.0.1 dev wan%d table %s", i+1, i, table))
		b, err := p.bind(fmt.Sprint("wan", i), uplink.Block)
		if err != nil || len(b.Unanswered) != 1 || fmt.Sprint(b.Tables) != "map[inet:["+table+"]]" {
			t.Errorf("wan%d: %+v, %v", i, b, err)
		}
		p.wantSeen("bound for an old holder", packet{family: 4, mark: b.Mark()}, p.addr(i, 4))
		p.wantSeen("bound, without a lease in the family", packet{family: 6, mark: b.Mark()}, unreachable)
	}

	// A watch that cleans up takes nothing of a lease whose holder is there, though it marks no rule.
	inet := func() []string {
		return slices.DeleteFunc(p.boundRules(), func(r string) bool { return !strings.HasPrefix(r, "4 ") })
	}
	before := inet()
	p.ns.IP(t, "rule add pref 9900 from 203.0.113.9 lookup 4242 protocol 116") // is nobody's
	p.watch("--config", p.watchFile(`{"links":[{"ifname":"wan*"}],"reconcile_seconds":1}`))
	eventually(t, "the watch has cleaned up", func() error {
		if rules := p.rules(); slices.ContainsFunc(rules, func(r string) bool { return strings.HasPrefix(r, "9900:") }) {
			return fmt.Errorf("%q", rules)
		}
		return nil
	})
	if diff := unordered(inet(), before); diff != "" {
		t.Errorf("after a watch cleaned up: %s", diff)
	}
}

// TestBoundSharedAndMissing: two addresses of an interface serve what is bound to it one after the
// other, and status tells of a lookup that is not there.
func TestBoundSharedAndMissing(t *testing.T) {
	p := newPair(t)
	p.serve()
	p.ns.IP(t, "address add 10.2.0.3/24 dev wan1")
	p.lease(p.addr(1, 4), "wan1", "--routes", "copy")
	b, err := p.bind("wan1", uplink.Block)
	if err != nil {
		t.Fatal(err)
	}
	// Who finds all in place asks nobody, and is not kept waiting.
	pid := p.onlyClient()
	p.freeze(pid)
	if b, err = p.bind("wan1", uplink.Block); err != nil || len(b.Unanswered) > 0 {
		t.Errorf("beside a holder that stands still: %+v, %v", b, err)
	}
	// For who finds it not, the lookup is placed; the holder is none the worse for it.
	if other, err := p.bind("wan1", uplink.Block, user7); err != nil || len(other.Unanswered) != 1 {
		t.Errorf("beside a holder that stands still: %+v, %v", other, err)
	}
	p.wantSeen("bound beside a holder that stands still", packet{family: 4, uid: 4711}, p.addr(1, 4))
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	all, _ := p.bindings("tas_socket")
	p.ns.Do(func() { err = bind.Unbind(all[len(all)-1:]) })
	if _, lines := p.bindings("tas_socket"); err != nil || len(lines) != 1 {
		t.Errorf("left are %q, %v", lines, err)
	}
	// The second learns of it with its lease, without being told. No routes: the first serves.
	p.lease("10.2.0.3", "wan1")
	// What is bound to one of the addresses has the table of that.
	first := []string{"4 9000: from 10.2.0.2 fwmark 0x2000000/0xff000000 lookup 10000 proto 116",
		"4 9002: from all fwmark 0x2000000/0xff000000 lookup 10000 proto 116"}
	second := []string{"4 9000: from 10.2.0.3 fwmark 0x2000000/0xff000000 lookup 10001 proto 116",
		"4 9002: from all fwmark 0x2000000/0xff000000 lookup 10001 proto 116"}
	guards := []string{"4 9003: from all fwmark 0x2000000/0xff000000 unreachable proto 116",
		"6 9003: from all fwmark 0x2000000/0xff000000 unreachable proto 116"}
	if diff := unordered(p.boundRules(), slices.Concat(first, second, guards)); diff != "" {
		t.Errorf("rules: %s", diff)
	}
	p.wantSeen("bound", packet{family: 4, mark: b.Mark()}, p.addr(1, 4))
	if r := p.client("-4", "-a", p.addr(1, 4), "-i", "wan1", "-r"); r.code != 0 {
		t.Fatalf("release: %s", r.stderr)
	}
	if diff := unordered(p.boundRules(), slices.Concat(second, guards)); diff != "" {
		t.Errorf("rules after a release: %s", diff)
	}
	p.wantSeen("bound, with an empty table", packet{family: 4, mark: b.Mark()}, unreachable)

	// Somebody deletes the lookup again and again: it comes back once a second then.
	p.wantStatusMissing("10.2.0.3", "rule 9002: from all fwmark 0x2000000/0xff000000 lookup 10001 proto 116", func() {
		_, _ = p.ns.Output("ip", "rule", "del", "pref", "9002") // perhaps it is not back yet
	})
	eventually(t, "the lookup is back", func() error {
		if diff := unordered(p.boundRules(), slices.Concat(second, guards)); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// wantStatusMissing waits until status says that something of an address is missing, while
// again takes it away.
func (p *pair) wantStatusMissing(addr, want string, again func()) {
	p.t.Helper()
	eventually(p.t, "status tells what is missing", func() error {
		again()
		r := p.run(bin(p.t, clientBin), "status", "--json")
		if !strings.Contains(r.stdout, want) {
			return fmt.Errorf("%s: %s%s", addr, r.stdout, r.stderr)
		}
		return nil
	})
}

// TestBoundSoakMany: an interface with many addresses serves what is bound to it by each of
// them, and another one with as many pays nothing for it.
func TestBoundSoakMany(t *testing.T) {
	each, other := 20, 20
	if fullSize() {
		each, other = 1000, 300
	}
	p := &pair{&uplinks{host: newHost(t)}}
	p.many(2)
	var lines []string
	for link, addresses := range []int{each, other} {
		for n := range addresses {
			lines = append(lines, fmt.Sprintf("address add %s dev wan%d", strings.Replace(numbered(link, 2*(n%100)), ".2/", fmt.Sprintf(".%d/", 2+n/100), 1), link))
		}
	}
	p.ns.Batch(p.t, lines...)
	p.serve(fmt.Sprintf(`"num_tables":%d`, 2*(each+other)))
	w := p.watchPlain()
	eventually(t, "all addresses are served", func() error {
		if got := p.unboundRules(); got != each+other {
			return fmt.Errorf("%d of %d", got, each+other)
		}
		return nil
	})
	lookups := func(want, own int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d lookups are there, %d from addresses", want, own), func() error {
			got, gotOwn := strings.Count(p.ns.IP(t, "rule show pref 9002"), "\n"), strings.Count(p.ns.IP(t, "rule show pref 9000"), "\n")
			if got != want || gotOwn != own {
				return fmt.Errorf("%d and %d", got, gotOwn)
			}
			return nil
		})
	}
	for _, what := range []string{"first", "again"} {
		began := time.Now()
		b, err := p.bind("wan0", uplink.Block)
		if err != nil || len(b.Tables[wire.Inet]) != each || len(b.Unanswered) > 0 {
			t.Fatalf("%d tables, unanswered %q, %v", len(b.Tables[wire.Inet]), b.Unanswered, err)
		}
		t.Logf("bound to an interface with %d addresses, %s: %v", each, what, time.Since(began).Round(time.Millisecond))
	}
	lookups(each, each)
	began := time.Now()
	p.ns.IP(t, "rule add pref 9003 uidrange 4711-4711 unreachable protocol 116") // as another program may
	lookups(2*each, each)
	t.Logf("another guard served after %v", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	all, _ := p.bindings("tas_socket")
	var err error
	p.ns.Do(func() { err = bind.Unbind(all) })
	if err != nil || len(all) != 2 {
		t.Fatalf("%d are bound, %v", len(all), err)
	}
	lookups(0, 0)
	t.Logf("nothing is bound after %v", time.Since(began).Round(time.Millisecond))
	if strings.Contains(w.log.String(), "level=WARN") {
		t.Error("the log has a level=WARN")
	}
}
