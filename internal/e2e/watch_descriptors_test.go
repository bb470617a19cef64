package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// mayOpen sets how many descriptors a process may have; -1: no more than it has now.
func (p *process) mayOpen(limit int) {
	p.t.Helper()
	pid := p.cmd.Process.Pid
	for n := 0; limit < 0; n++ { // the lowest one that is free
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, n)); err != nil {
			limit = n
		}
	}
	var old unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old)
	if err == nil {
		err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(limit), Max: old.Max}, nil)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// TestWatchFewDescriptors: a watch that may not open a descriptor for each address serves as many as it can, says how many it
// leaves out and what to do, and serves these, too, once it may.
func TestWatchFewDescriptors(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve()
	p := h.watch()
	p.mayOpen(30)
	const all = 30
	var add strings.Builder
	for n := range all {
		fmt.Fprintf(&add, "address add 10.77.0.%d/24 dev wan0\n", 2+n)
	}
	h.ns.Batch(t, add.String())
	served := func() int { return strings.Count(strings.Join(h.rules(), "\n"), ": from 10.77.0.") }
	p.waitLog("so some are not served: raise LimitNOFILE= of the unit, or ulimit -n")
	eventually(t, "it serves some addresses", func() error {
		if n := served(); n < 2 || n == all {
			return fmt.Errorf("%d are served", n)
		}
		return nil
	})
	if log := p.log.String(); strings.Contains(log, "not trusted") || strings.Contains(log, "too many open files") {
		t.Errorf("it wrote:\n%s", log)
	}
	p.mayOpen(1000)
	h.ns.IP(t, "address add 10.77.0.99/24 dev wan0")
	eventually(t, "it serves all", func() error {
		if n := served(); n != all+1 {
			return fmt.Errorf("%d are served", n)
		}
		return nil
	})
	p.waitLog("there are descriptors for all addresses again")
}

// TestClientFewDescriptors: a client that cannot find out who answers says why, and takes the answer once it can.
func TestClientFewDescriptors(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	p := h.start(h.command("-f", "-4", "-a", "10.77.0.2", "-i", "wan0", "--routes", "copy"))
	p.waitLog(`level=ERROR msg="no table"`)
	p.mayOpen(-1)
	h.serve()
	eventually(t, "it cannot open what tells who sent the answer", func() error {
		p.mayOpen(-1) // one that was open for a moment during the look before would be there for it
		if log := p.log.String(); !strings.Contains(log, "cannot be found out now whether its sender is root of this host") {
			return errors.New(log)
		}
		return nil
	})
	p.waitLog("too many open files")
	if strings.Contains(p.log.String(), "not trusted") {
		t.Error("it says that the server is not trusted")
	}
	p.mayOpen(1000)
	p.waitLog("has table 10000")
	eventually(t, "its rules stand", func() error {
		if !strings.Contains(strings.Join(h.rules(), "\n"), "from 10.77.0.2 lookup 10000") {
			return errors.New(strings.Join(h.rules(), "\n"))
		}
		return nil
	})
}

// TestMovedFewDescriptors: a client that can open no file at its end gives main back what it moved all the same.
func TestMovedFewDescriptors(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.ns.IP(t, "-6 route add default via 2001:db8::1 dev wan0 metric 7")
	before := h.routeLines("-6", "main")
	h.serve()
	p := h.start(h.command("-f", "-6", "-a", "2001:db8::2", "-i", "wan0", "--routes", "move"))
	p.waitLog("has table 10000")
	if now := h.routeLines("-6", "main"); slices.Equal(now, before) {
		t.Fatalf("nothing is moved: %q", now)
	}
	p.mayOpen(-1)
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it runs
	eventually(t, "main has its routes back", func() error {
		if now := h.routeLines("-6", "main"); !slices.Equal(now, before) {
			return fmt.Errorf("%q\n%s", now, p.log.String())
		}
		return nil
	})
	p.waitLog("too many open files")
	h.waitClean()
}

// TestPlacedUnread: a client that cannot read what it needs for the table fills it once it can.
func TestPlacedUnread(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.ns.IP(t, "-6 route add default via 2001:db8::1 dev wan0 metric 7")
	info, err := os.Stat(h.ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	dir := fmt.Sprintf("/run/table-allocator/moved/%d", info.Sys().(*syscall.Stat_t).Ino)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	index, _, _ := strings.Cut(h.ns.IP(t, "-o link show dev wan0"), ":")
	inTheWay := filepath.Join(dir, index+"-10")
	if err := os.RemoveAll(inTheWay); err != nil { // of an earlier test, whose namespace had this number
		t.Fatal(err)
	}
	if err := os.WriteFile(inTheWay, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.serve()
	p := h.start(h.command("-f", "-6", "-a", "2001:db8::2", "-i", "wan0", "--routes", "move"))
	p.waitLog("has table 10000")
	p.waitLog("cannot read the routes")
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the table is filled, and main has lost the route", func() error {
		if now := h.routeLines("-6", "10000"); len(now) < 2 || strings.Contains(strings.Join(h.routeLines("-6", "main"), "\n"), "default") {
			return fmt.Errorf("%q\n%s", now, p.log.String())
		}
		return nil
	})
}
