package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestReleaseLink: a link, or an address, loses its leases and nothing else does; the watch serves it when it is added
// again.
func TestReleaseLink(t *testing.T) {
	h := twoUplinks(t, "--routes", "move")
	const four, six = "10.78.0.2", "2001:db8:78::2"
	h.waitMain("wan1")
	r := h.run(bin(t, clientBin), "release", "wan1")
	if r.code != 0 || strings.Count(r.stdout, "the watch (pid ") != 2 || !strings.Contains(r.stderr, "goes on, and serves these addresses again") {
		t.Errorf("release wan1: %+v", r)
	}
	for _, addr := range []string{four, six} {
		if err := h.left(addr); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	h.mainHolds("default via 10.78.0.1 dev wan1 metric 200")
	h.waitStatus("10.77.0.2", "ok", "")
	eventually(t, "status says what the watch serves no more, and since when", func() error { // which is noted behind it
		shown := h.run(bin(t, clientBin), "status", "wan1").stdout
		for _, text := range []string{"not served by the watch that runs", "    since 20", "is a watch, and has no lease for the address", "    do  restart the service table-allocator-watch"} {
			if !strings.Contains(shown, text) {
				return fmt.Errorf("not %q in\n%s", text, shown)
			}
		}
		return nil
	})
	h.ns.Batch(t, "address del 10.78.0.2/24 dev wan1", "address add 10.78.0.2/24 dev wan1")
	h.served(four)
	if r := h.run(bin(t, clientBin), "release", "2001:DB8:77::2"); r.code != 0 || !strings.Contains(r.stdout, "2001:db8:77::2 on wan0: the watch") {
		t.Errorf("release of an address: %+v", r)
	}
	if err := h.left("2001:db8:77::2"); err != nil {
		t.Error(err)
	}
	h.served("10.77.0.2")
	for args, code := range map[string]int{"wan7": 2, "192.0.2.9": 2, "10.78.0.2 wan7": 2, six: 0, "": 2, "--all wan1": 2, "../x": 2} {
		if r := h.run(bin(t, clientBin), append([]string{"release"}, strings.Fields(args)...)...); r.code != code {
			t.Errorf("release %s: %+v, want exit code %d", args, r, code)
		}
	}
	if r := h.run("setpriv", "--reuid=4711", "--clear-groups", bin(t, clientBin), "release", "--all"); r.code != 2 {
		t.Errorf("without rights: %+v", r)
	}
	h.served(four)
}

// TestReleaseAll: nothing is left of a watch, of clients for an address and for any text, of one that was killed, and of
// one whose server is gone.
func TestReleaseAll(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "2001:db8:77::2/64")
	h.link("wan1", "10.78.0.2/24", "2001:db8:78::2/64")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 metric 100", "route add default via 10.78.0.1 dev wan1 metric 200")
	main := h.routes("main")
	h.serve()
	h.lease6("2001:db8:78::2", "wan1", "--routes", "copy")
	h.client("--unspec", "-a", "any text", "-i", "wan1")
	h.watch("-i", "wan0")
	h.served("10.77.0.2")
	killed, _ := h.front("-4", "-a", "10.78.0.2", "-i", "wan1", "--routes", "move")
	killed.kill()
	r := h.run(bin(t, clientBin), "release", "--all")
	if r.code != 0 || !strings.Contains(r.stdout, "any text on wan1: its holder (pid ") || !strings.Contains(r.stdout, "the watch (pid ") ||
		!strings.Contains(r.stdout, "10.78.0.2 on wan1: what was left of it is deleted") || !strings.Contains(r.stdout, "2001:db8:78::2 on wan1: its holder (pid ") {
		t.Errorf("release --all: %+v", r)
	}
	h.waitClean()
	if diff := unordered(h.routes("main"), main); diff != "" {
		t.Errorf("main: %s", diff)
	}
	if r := h.run(bin(t, clientBin), "release", "--all"); r.code != 0 || !strings.Contains(r.stdout, "no lease was held") {
		t.Errorf("again: %+v", r)
	}
}

// TestReleaseSilent: a holder that is stopped may go on later, so what it holds is not called released.
func TestReleaseSilent(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	p, _ := h.front("-4", "-a", "10.77.0.2", "-i", "wan0")
	h.served("10.77.0.2")
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if r := h.run(bin(t, clientBin), "release", "wan0"); r.code != 1 || !strings.Contains(r.stderr, "10.77.0.2 on wan0: its holder does not answer") || r.stdout != "" {
		t.Errorf("release wan0: %+v", r)
	}
	p.kill()
	if r := h.run(bin(t, clientBin), "release", "--all"); r.code != 0 {
		t.Errorf("release --all: %+v", r)
	}
	h.waitClean()
}

// TestReleaseImpostor: root of a container that has the name of a watch is neither ended nor waited for.
func TestReleaseImpostor(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.watch()
	h.served("10.77.0.2")
	const take = `
import socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(b"\0:watch--0-77-%d".ljust(108, b"\0"))
print("taken", flush=True); time.sleep(600)`
	impostors := make(map[string]*process)
	for what, before := range h.impostors() {
		p := h.start(exec.Command("sh", "-c", fmt.Sprintf("exec %s python3 -c '%s'", before, fmt.Sprintf(take, len(impostors)))))
		p.waitLog("taken")
		impostors[what] = p
	}
	r := h.run(bin(t, clientBin), "release", "--all")
	if r.code != 0 || strings.Count(r.stdout, "is ended") != 1 {
		t.Errorf("release --all: %+v", r)
	}
	h.waitClean()
	for what, p := range impostors {
		select {
		case <-p.done:
			t.Errorf("root %s was ended", what)
		default:
		}
	}
}

// TestReleaseBound: while programs and users are bound nothing is released, and with --force what was bound with block
// sends nothing more.
func TestReleaseBound(t *testing.T) {
	c := newCrossing(t)
	strict, loose := c.bound("wan1"), c.bound("wan1", "--on-loss", "fallback")
	c.must("bind", "wan1", "--uid", "4711")
	c.leaves(strict, 1)
	r := c.do("release", "--all")
	if r.code != 1 || strings.Count(r.stdout, "wan1") != 3 || !strings.Contains(r.stdout, "--uid 4711") || !strings.Contains(r.stderr, "--force") {
		t.Errorf("release --all: %+v", r)
	}
	c.leaves(strict, 1)
	inet0, _ := at(0)
	if r := c.do("release", inet0); r.code != 0 { // wan0 has nothing bound
		t.Errorf("release %s: %+v", inet0, r)
	}
	inet1, _ := at(1)
	if r := c.do("release", inet1); r.code != 0 { // wan1 still has its IPv6 lease
		t.Errorf("release %s: %+v", inet1, r)
	}
	if r := c.do("release", "wan1"); r.code != 1 {
		t.Errorf("release wan1: %+v", r)
	}
	if r := c.do("release", "--all", "--force"); r.code != 0 {
		t.Errorf("release --all --force: %+v", r)
	}
	c.waitClean()
	if rules := c.rules6(); len(rules) > 0 {
		t.Errorf("rules: %q", rules)
	}
	c.nothing(func() {
		for _, far := range []string{"4 " + far4, "6 " + far6} {
			family, to, _ := strings.Cut(far, " ")
			strict.want("EPERM", "new s udp%s\nask s %s", family, to)
		}
	})
	c.leaves(loose, 0)
}

// TestReleaseUnit: a watch that systemd would start again is not ended, and the message says what to do. Here the
// parent has systemd's name, and the cgroup that of a unit.
func TestReleaseUnit(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	systemd := filepath.Join(h.dir, "systemd")
	if out, err := exec.Command("cp", "/bin/sh", systemd).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	unit, err := os.MkdirTemp("/sys/fs/cgroup", "*-watch.service")
	if err != nil {
		t.Fatal(err)
	}
	p := h.start(exec.Command(systemd, "-c", `echo $$ >"$1"/cgroup.procs; "$2" watch & wait`, systemd, unit, bin(t, clientBin)))
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(unit, "cgroup.kill"), []byte("1"), 0) // Remove says whether a process is left
		p.kill()
		eventually(t, "the cgroup is removed", func() error { return os.Remove(unit) })
	})
	h.served("10.77.0.2")
	r := h.run(bin(t, clientBin), "release", "--all", "--force")
	if want := fmt.Sprintf("systemctl disable --now %s\n", filepath.Base(unit)); r.code != 1 || r.stdout != "" || !strings.HasSuffix(r.stderr, want) {
		t.Errorf("release --all: %+v, want %s", r, want)
	}
	h.served("10.77.0.2")
	if r := h.run(bin(t, clientBin), "release", "wan0"); r.code != 0 {
		t.Errorf("release wan0: %+v", r)
	}
	h.waitNotServed("10.77.0.2")
}

// TestReleaseAllWhileClientsStart: a client that starts meanwhile is ended, or goes on with all of its rules, and none of them
// is taken for what another one left.
func TestReleaseAllWhileClientsStart(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.serve()
	for n := range 12 {
		p := h.start(exec.Command(bin(t, clientBin), "-4", "-f", "-a", "10.77.0.2", "-i", "wan0", "--routes", "copy"))
		time.Sleep(time.Duration(n) * 4 * time.Millisecond) // each round meets it elsewhere
		if r := h.run(bin(t, clientBin), "release", "--all"); r.code != 0 {
			t.Errorf("round %d: release --all: %+v", n, r)
		}
		select {
		case <-p.done:
		case <-time.After(300 * time.Millisecond):
			if strings.Contains(p.log.String(), "deleted") {
				t.Errorf("round %d: rules of a client that starts were deleted:\n%s", n, p.log.String())
			}
			h.served("10.77.0.2")
			p.stop()
		}
		h.waitClean()
	}
}
