package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestBindAttach: a program that runs follows, but for its connections, and comes back.
func TestBindAttach(t *testing.T) {
	c := newCrossing(t)
	inet0, inet60 := at(0)
	inet1, inet61 := at(1)
	p := c.prober()
	p.want(inet0, "new old tcp4\nconnect old %s\nask old", far4)
	p.want(inet60, "new old6 tcp6\nconnect old6 %s\nask old6", far6)
	p.want(inet0, "new dgram udp4\nconnect dgram %s\nask dgram", far4)
	p.want("ok", "new idle tcp4\nnew idle6 tcp6\nnew ping ping4\nnew raw raw6\nnew mptcp mptcp4\nnew listener tcp4\nbind listener 0.0.0.0:0")
	p.do("listen listener")
	p.want(inet60, "new used udp6\nask used %s", far6)
	pid := strconv.Itoa(c.pidOf(p))

	out := c.must("attach", "--ifname", "wan1", pid)
	for _, want := range []string{pid + " (", "cgroup /user/ta-wan1", "left alone: connected", "left alone: listening", "bound"} {
		if !strings.Contains(out, want) {
			t.Errorf("attach does not say %q:\n%s", want, out)
		}
	}
	if n := strings.Count(out, "left alone: connected"); n != 3 {
		t.Errorf("%d connections left alone, want 3:\n%s", n, out)
	}
	// explain says of sockets that are older what becomes of them, and of new ones what becomes of those.
	out = c.must("explain", "--pid", pid)
	if n := strings.Count(out, "leaves by wan0 "); n != 3 || strings.Contains(out, "leaves by wan1 ") {
		t.Errorf("%d sockets leave by wan0, want 3:\n%s", n, out)
	}
	if out = c.must("explain", internet, "--pid", pid); !strings.Contains(out, "leaves by wan1 ") {
		t.Errorf("a new socket:\n%s", out)
	}
	c.only(0, func() {
		p.want(inet0, "ask old")
		p.want(inet60, "ask old6")
		p.want(inet0, "ask dgram")
	})
	c.only(1, func() {
		p.want(inet1, "connect idle %s\nask idle", far4)
		p.want(inet61, "connect idle6 %s\nask idle6", far6)
		p.want("reply", "ask ping %s", far4)
		p.want("reply", "ask raw %s", far6)
		p.want(inet1, "connect mptcp %s\nask mptcp", far4)
		p.want(inet61, "ask used %s", far6)
		p.want(inet1, "new next tcp4\nconnect next %s\nask next", far4)
	})

	out = c.must("detach", pid)
	if !strings.Contains(out, "cgroup /user\n") {
		t.Errorf("detach says:\n%s", out)
	}
	c.only(1, func() { p.want(inet1, "ask next") })
	c.only(0, func() {
		p.want(inet60, "ask used %s", far6)
		p.want("reply", "ask ping %s", far4)
		p.want(inet0, "new after tcp4\nconnect after %s\nask after", far4)
		p.want(inet0, "ask old")
	})

	// Cut, a program connects again, and by the uplink.
	out = c.must("attach", "--ifname", "wan1", "--reset", pid)
	if !strings.Contains(out, "reset") {
		t.Errorf("attach --reset says:\n%s", out)
	}
	p.want("ECONNABORTED", "ask old")
	p.want("ECONNABORTED", "ask old6")
	p.want("EDESTADDRREQ", "ask dgram") // it is connected no more
	p.want("ECONNABORTED", "connect dgram %s\nask dgram", far4)
	c.only(1, func() { p.want(inet1, "ask dgram") })
	c.leaves(p, 1)
	if left := c.ours(); len(left) == 0 {
		t.Error("nothing is bound")
	}
}

// pidOf is the process of a prober, whose parent entered the cgroup for it.
func (c *crossing) pidOf(p *probing) int {
	c.t.Helper()
	pid := p.p.cmd.Process.Pid // all of them executed the next
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
		c.t.Fatal(err)
	}
	return pid
}

// TestBindAttachTree: parents and children, with what they start later.
func TestBindAttachTree(t *testing.T) {
	c := newCrossing(t)
	inet1, _ := at(1)
	p := c.prober("sh", "-c", `"$0"; exit`)
	parent := p.p.cmd.Process.Pid
	p.want("ok", "new s udp4")
	out := c.must("attach", "--ifname", "wan1", "--tree", strconv.Itoa(parent))
	if n := strings.Count(out, "cgroup /user/ta-wan1"); n != 2 {
		t.Errorf("%d processes attached, want 2:\n%s", n, out)
	}
	c.only(1, func() { p.want(inet1, "ask s %s", far4) })
	out = c.must("detach", "--tree", strconv.Itoa(parent))
	if n := strings.Count(out, "cgroup /user\n"); n != 2 {
		t.Errorf("%d processes detached, want 2:\n%s", n, out)
	}
	c.leaves(p, 0)
	// Without it only that one.
	out = c.must("attach", "--ifname", "wan1", strconv.Itoa(parent))
	if n := strings.Count(out, "cgroup"); n != 1 {
		t.Errorf("%d processes attached, want 1:\n%s", n, out)
	}
	c.leaves(p, 0)
	_ = syscall.Kill(parent, 0) // it is still there
}

// TestBindAttachHidden: sockets that are not in /proc/PID/fd follow, too: on their way through a unix socket, of a thread
// with descriptors of its own, of a process whose main thread has ended. What cannot follow is named.
func TestBindAttachHidden(t *testing.T) {
	c := newCrossing(t)
	const program = `
import ctypes, os, socket, sys, threading, time
how, far, dir = sys.argv[1:]
libc = ctypes.CDLL(None)
f = socket.AF_INET6 if ":" in far else socket.AF_INET
def wait():
    open(dir + "/ready", "w").close()
    while not os.path.exists(dir + "/go"): time.sleep(.02)
def work():
    if how == "thread": libc.unshare(0x400) # CLONE_FILES
    s = socket.socket(f, socket.SOCK_DGRAM)
    if how == "device": s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"wan0")
    if how == "own": s.bind(("fd02::2" if ":" in far else "10.2.0.2", 0))
    if how == "passed":
        a, b = socket.socketpair()
        socket.send_fds(a, [b"x"], [s.fileno()])
        s.close()
    wait()
    if how == "passed": s = socket.socket(fileno=socket.recv_fds(b, 9, 1)[1][0])
    s.settimeout(10)
    s.sendto(b"?", (far, 7))
    print(s.recv(99).decode().strip(), flush=True)
    os._exit(0)
t = threading.Thread(target=work)
t.start()
if how == "ended": libc.pthread_exit(None)
t.join()`
	for _, tt := range []struct {
		how  string
		n    int
		said string
	}{{"plain", 1, "udp * bound"}, {"passed", 1, "udp * bound"}, {"thread", 1, "udp * bound"}, {"ended", 1, "udp * bound"},
		{"own", 1, "bound"}, {"device", 0, "left alone: bound to a link"}} {
		for family, far := range []string{internet, internet6} {
			dir := t.TempDir()
			p := c.start(c.here("python3", "-c", program, tt.how, far, dir))
			eventually(t, "the program has its socket", func() error {
				_, err := os.Stat(filepath.Join(dir, "ready"))
				return err
			})
			out := c.must("attach", "--ifname", "wan1", strconv.Itoa(p.cmd.Process.Pid))
			if !strings.Contains(out, tt.said) {
				t.Errorf("%s: attach says:\n%s", tt.how, out)
			}
			inet, inet6 := at(tt.n)
			c.only(tt.n, func() {
				if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
					t.Fatal(err)
				}
				p.waitWriting()
			})
			if want := []string{inet, inet6}[family]; strings.TrimSpace(p.log.String()) != want {
				t.Errorf("%s, %s: seen as %s, want %s", tt.how, far, p.log, want)
			}
		}
	}
}

// TestBindCheck: bound --check says what holds a process and its children, also one that left.
func TestBindCheck(t *testing.T) {
	c := newCrossing(t)
	if err := os.Mkdir(filepath.Join(c.cgroup, "app.scope"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := c.start(c.here(bin(t, clientBin), "run", "--ifname", "wan1", "sh", "-c",
		`exec >/dev/null 2>&1; sleep 1000 & sh -c 'echo 0 >/sys/fs/cgroup/app.scope/cgroup.procs && exec sleep 2000' & unshare --net sleep 3000 & wait`))
	pid := strconv.Itoa(p.cmd.Process.Pid)
	eventually(t, "its children run", func() error {
		r := c.do("bound", "--check", pid)
		for _, want := range []string{pid + " (sh): wan1 block\n", "(sleep): wan1 block\n", "(sleep): not bound: cgroup /app.scope is none of ours\n",
			"(sleep): wan1 block, in another network namespace"} {
			if r.code != 1 || !strings.Contains(r.stdout, want) {
				return fmt.Errorf("%+v lacks %q", r, want)
			}
		}
		return nil
	})
	alone := c.start(c.here(bin(t, clientBin), "run", "--ifname", "wan1", "--on-loss", "fallback", "sleep", "1000"))
	eventually(t, "all of a process is held", func() error {
		if r := c.do("bound", "--check", strconv.Itoa(alone.cmd.Process.Pid)); r.code != 0 || !strings.HasSuffix(r.stdout, "(sleep): wan1 fallback\n") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if r := c.do("bound", "--check", "4194303"); r.code != 1 || !strings.Contains(r.stderr, "4194303") {
		t.Errorf("a process that has ended: %+v", r)
	}
	if r := c.do("bound", "--check"); r.code != 2 {
		t.Errorf("no process: %+v", r)
	}
}
