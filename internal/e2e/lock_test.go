package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// lockAll has a stranger lock all files and directories below dirs that he can open, in every way
// that there is, until the test ends. It returns what he has.
func (h *host) lockAll(dirs ...string) (locked []string) {
	h.t.Helper()
	var fds []int
	h.t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	h.as(stranger, func(ready func()) {
		defer ready()
		for _, dir := range dirs {
			_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, _ error) error { // as far as he gets
				fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
				if err != nil {
					return nil
				}
				fds = append(fds, fd)
				if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == nil || err == unix.EWOULDBLOCK { // another test's stranger
					locked = append(locked, path)
				}
				_ = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}) // of a file only
				return nil
			})
		}
	})
	for _, dir := range dirs {
		if !slices.Contains(locked, dir) {
			h.t.Errorf("the stranger does not have %s", dir)
		}
	}
	return locked
}

// TestLockedByStrangers: whatever of ours a stranger can open, his lock of it is nobody's concern.
func TestLockedByStrangers(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "192.0.2.2/24", "192.0.2.3/24")
	h.link("wan1", "198.51.100.2/24")
	dir, err := os.MkdirTemp("/run", "strangers")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	state := filepath.Join(dir, "state") // 0700 in an installation
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(state, 0o755)); err != nil {
		t.Fatal(err)
	}
	h.db = filepath.Join(state, "leases.db")
	servers := filepath.Join(dir, "servers")
	resolver := []string{"--nameserver", "192.0.2.53", "--dnsmasq-servers", servers}
	lines := func(addrs ...string) {
		t.Helper()
		var want []string
		for _, addr := range addrs {
			want = append(want, "server=192.0.2.53@"+addr)
		}
		eventually(t, "the resolver lines are there", func() error {
			text, err := os.ReadFile(servers)
			return errors.Join(err, unorderedError(strings.Fields(string(text)), want))
		})
	}
	server := h.serve(`"table_timeout":4`)
	client, _ := h.front(append(resolver, "-4", "-i", "wan0", "-a", "192.0.2.2")...)
	config := h.watchFile(`{"links":[{"ifname":"wan1","nameservers":["192.0.2.53"],"dnsmasq_servers":"` + servers + `"}]}`)
	watch := h.watch("-c", config, "--clean")
	h.served("198.51.100.2")
	lines("192.0.2.2", "198.51.100.2")
	locked := h.lockAll(dir, "/run/table-allocator")
	if slices.ContainsFunc(locked, func(path string) bool { return filepath.Base(path) == "locks" }) {
		t.Errorf("the stranger has the locks: %q", locked)
	}

	if got := h.lease("192.0.2.3", "wan0", resolver...); got == 0 {
		t.Error("no table for 192.0.2.3")
	}
	lines("192.0.2.2", "192.0.2.3", "198.51.100.2")
	h.ns.IP(t, "address add 203.0.113.3/24 dev wan1")
	h.served("203.0.113.3")
	lines("192.0.2.2", "192.0.2.3", "198.51.100.2", "203.0.113.3")
	eventually(t, "all leases are renewed", func() error {
		if n := strings.Count(server.log.String(), "lease expired"); n > 0 {
			t.Fatalf("%d leases expired", n)
		}
		if n := strings.Count(server.log.String(), "lease renewed"); n < 3*4 {
			return fmt.Errorf("%d renewals", n)
		}
		return nil
	})
	if r := h.client(append(resolver, "-r", "-4", "-i", "wan0", "-a", "192.0.2.3")...); r.stdout != "0\n" || r.code != 0 {
		t.Errorf("-r: %+v", r)
	}
	h.ns.IP(t, "address del 198.51.100.2/24 dev wan1")
	h.waitNotServed("198.51.100.2")
	lines("192.0.2.2", "203.0.113.3")
	if code := server.stop(); code != 0 {
		t.Errorf("server: exit code %d", code)
	}
	server = h.serve(`"table_timeout":4`)
	for _, p := range []*process{client, watch, server} {
		if code := p.stop(); code != 0 {
			t.Errorf("%s: exit code %d", p.cmd, code)
		}
	}
	lines()
	h.wantRules()
}

// TestCgroupsLockedByStrangers: the same with cgroups.
func TestCgroupsLockedByStrangers(t *testing.T) {
	c := newCrossing(t)
	if err := os.Chmod(c.cgroup, 0o755); err != nil { // as /sys/fs/cgroup is
		t.Fatal(err)
	}
	inet, _ := at(1)
	ask := "new s udp4\nask s " + far4
	c.bound("wan1").want(inet, "%s", ask)
	other := c.prober()
	dir := c.must("bind", "--cgroup", "--ifname", "wan1")
	locked := c.lockAll(c.cgroup, "/run/table-allocator")
	if !slices.Contains(locked, filepath.Join(c.cgroup, "user", "ta-wan1")) {
		t.Errorf("the stranger has only %q", locked)
	}

	c.bound("wan1").want(inet, "%s", ask)
	pid := strconv.Itoa(c.pidOf(other))
	c.must("attach", "--ifname", "wan1", pid)
	other.want(inet, "%s", ask)
	c.must("detach", pid)
	inet, _ = at(0)
	other.want(inet, "new t udp4\nask t "+far4)
	if got := c.must("bind", "--cgroup", "--ifname", "wan1"); got != dir {
		t.Errorf("cgroup of the interface: got %q, want %q", got, dir)
	}
	if got := c.must("bound"); !strings.Contains(got, "wan1") {
		t.Errorf("bound: %q", got)
	}
	c.must("unbind", "--cgroup", "--ifname", "wan1")
}

// TestWatchConfigFIFO: a configuration that nobody writes delays nothing but itself.
func TestWatchConfigFIFO(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "192.0.2.2/24")
	h.serve()
	const text = `{"links":[{"ifname":"wan0"}]}`
	file := h.watchFile(text)
	watch := h.watch("-c", file, "--clean")
	h.served("192.0.2.2")
	if err := errors.Join(os.Remove(file), unix.Mkfifo(file, 0o600), watch.cmd.Process.Signal(unix.SIGHUP)); err != nil {
		t.Fatal(err)
	}
	h.ns.IP(t, "address add 198.51.100.2/24 dev wan0")
	h.served("198.51.100.2")
	if err := os.WriteFile(file, []byte(text), 0); err != nil { // waits for the reader
		t.Fatal(err)
	}
	watch.waitLog("configuration read again")
	if err := watch.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	h.ns.IP(t, "address add 203.0.113.2/24 dev wan0")
	h.served("203.0.113.2")
	if code := watch.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	h.wantRules()
}
