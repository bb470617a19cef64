package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/bind"
	peers "github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

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
	deleting := p.start(p.sh("while :; do ip rule del pref 9002 2>/dev/null; sleep 0.05; done"))
	p.wantStatusMissing("10.2.0.3", "rule 9002: from all fwmark 0x2000000/0xff000000 lookup 10001 proto 116")
	deleting.kill()
	eventually(t, "the lookup is back", func() error {
		if diff := unordered(p.boundRules(), slices.Concat(second, guards)); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// wantStatusMissing waits until status says that something of an address is missing.
func (p *pair) wantStatusMissing(addr, want string) {
	p.t.Helper()
	eventually(p.t, "status tells what is missing", func() error {
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
