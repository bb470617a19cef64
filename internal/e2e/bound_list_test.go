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

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/nettest"
	peers "github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

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
	var err error // there is no lease, and nothing to wait for
	p.ns.Do(func() {
		_, err = bind.Bind(context.Background(), bind.Config{Ifname: "wan1", OnLoss: uplink.Block, Server: "tas_socket", Wait: time.Second})
	})
	if !errors.Is(err, bind.ErrNoLease) {
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
	want("all", lines, []string{"old0 " + old0, wan0, wan1})
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

// TestBoundToNoLink: what is bound to a link that is not there is shown with its name, as it is undone.
func TestBoundToNoLink(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	c.must("bind", "--force", "wan9", "--uid", "4711")
	c.must("bind", "--force", "wan8", "--proto", "tcp", "--dport", "80", "--on-loss", "fallback")
	rows := c.do("bound", "--json")
	for _, want := range []string{`"ifname":"wan9","on_loss":"block"`, `"ifname":"wan8","on_loss":"fallback"`} {
		if !strings.Contains(rows.stdout, want) {
			t.Errorf("no %s in %+v", want, rows)
		}
	}
	c.must("unbind", "wan9", "--uid", "4711")
	c.must("unbind", "wan8", "--proto", "tcp", "--dport", "80", "--on-loss", "fallback")
	if left := c.ours(); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
}

// TestBoundElsewhere: a program that is bound in another network namespace, as that of a container, is none of this one's:
// bound, doctor and release do not name it.
func TestBoundElsewhere(t *testing.T) {
	c := newCrossing(t)
	c.bound("wan1").do("new s udp4")
	inside := c.must("bound", "--json")
	if !strings.Contains(inside, `"ifname":"wan1"`) {
		t.Errorf("in its namespace: %s", inside)
	}
	other := &machine{t: t, ns: nettest.New(t, "other"), dir: t.TempDir()}
	for _, args := range []string{"bound", "doctor --only program-32bit,lock-missing", "release --all"} {
		cmd := c.here(bin(t, clientBin), strings.Fields(args)...) // sees the same cgroups
		if r := other.run(cmd.Args[0], cmd.Args[1:]...); r.code != 0 || strings.Contains(r.stdout, "wan1") {
			t.Errorf("%s in another namespace: %+v", args, r)
		}
	}
	if again := c.must("bound", "--json"); again != inside {
		t.Errorf("afterwards: %s, before: %s", again, inside)
	}
}
