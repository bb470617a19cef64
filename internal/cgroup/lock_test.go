package cgroup

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

var (
	lockMark = Mark{Value: 0x0a000000, Mask: 0xff000000}
	refused  = unix.EPERM.Error()
)

// ifindex is that of a link of the sandbox.
func ifindex(t *testing.T, name string) int {
	t.Helper()
	req, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		t.Fatal(err)
	}
	return int(req.Uint32())
}

// syncLock lets a mark leave by a link from addresses.
func syncLock(t *testing.T, mark uint32, index int, addrs ...string) {
	t.Helper()
	lock, err := MakeLock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := lock.Sync(mark, func(bool) (Allowed, error) {
		allowed := Allowed{Index: index}
		for _, addr := range addrs {
			allowed.Addrs = append(allowed.Addrs, netip.MustParseAddr(addr))
		}
		return allowed, nil
	}); err != nil {
		t.Fatal(err)
	}
}

// What nobody has let out is dropped; what leaves by the link with its addresses, and by the loopback, is not.
func TestEgress(t *testing.T) {
	inNamespace(t) // it removes a link from the lock
	c := testCgroups(t)
	addresses(t)
	if _, err := c.place(-1, "/ta-wan0", lockMark); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file("/ta-wan0"))
	link, other := ifindex(t, "bind0"), ifindex(t, "bind1")
	const m = "0xa000000"
	send := func(want string, from, to string) {
		t.Helper()
		kind := "udp4"
		if strings.Contains(to, "]") {
			kind = "udp6"
		}
		p.want(m, "s socket %s", kind)
		p.want(m, "s bind %s", from)
		if got := p.do("s send %s", to); got != want {
			t.Errorf("from %s to %s: got %s, want %s", from, to, got, want)
		}
	}
	far := map[string][2]string{"4": {"192.0.2.1:0", "192.0.2.9:9"}, "6": {"[2001:db8::1]:0", "[2001:db8::9]:9"},
		"mapped": {"[::ffff:192.0.2.1]:0", "[::ffff:192.0.2.9]:9"}, "multicast": {"192.0.2.1:0", "224.0.0.251:9"}}
	all := func(want string, which ...string) {
		t.Helper()
		for _, name := range which {
			send(want, far[name][0], far[name][1])
		}
	}
	if out, err := exec.Command("ip", "route", "add", "224.0.0.0/4", "dev", "bind0").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	all(refused, "4", "6", "mapped", "multicast")
	send(m, "0.0.0.0:0", "127.0.0.1:9")
	send(m, "127.0.0.1:0", "192.0.2.1:9") // to an own address
	send(m, "[::]:0", "[::1]:9")

	syncLock(t, lockMark.Value, link, "192.0.2.1")
	all(m, "4", "mapped", "multicast")
	all(refused, "6")
	syncLock(t, lockMark.Value, link, "2001:db8::1")
	all(m, "6")
	all(refused, "4", "mapped", "multicast")
	syncLock(t, lockMark.Value, link, "192.0.2.1", "2001:db8::1")
	all(m, "4", "6", "mapped", "multicast")
	syncLock(t, lockMark.Value, other, "192.0.2.1", "2001:db8::1")
	all(refused, "4", "6", "mapped", "multicast")
	syncLock(t, lockMark.Value, 0)
	all(refused, "4", "6", "mapped", "multicast")

	// A link that goes takes its entries with it.
	syncLock(t, lockMark.Value, link, "192.0.2.1", "2001:db8::1")
	lock, err := OpenLock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	for _, step := range []struct {
		index int
		want  string
	}{{other, m}, {link, refused}} {
		if err := lock.RemoveLink(step.index); err != nil {
			t.Fatal(err)
		}
		all(step.want, "4", "6")
	}

	// Who was taken out is out, and so is who may use other uplinks.
	p.want(m, "out socket udp4")
	if _, err := c.Detach(p.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	p.want("0x1000000", "out send 192.0.2.9:9")
	soft := Mark{lockMark.Value | lockMark.out(), lockMark.Mask}
	if _, err := c.place(-1, "/ta-wan0:fallback", soft); err != nil {
		t.Fatal(err)
	}
	p = startIn(t, c.file("/ta-wan0:fallback"))
	p.want("0xb000000", "s socket udp4")
	p.want("0xb000000", "s send 192.0.2.9:9")
}

// A socket goes where its process was put last, also when the cgroup that it was made in is gone.
func TestEgressElsewhere(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	first, second := Mark{0x0c000000, 0xff000000}, Mark{0x0e000000, 0xff000000}
	syncLock(t, second.Value, ifindex(t, "bind0"), "192.0.2.1")
	if _, err := c.place(-1, "/ta-wan0", first); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file("/ta-wan0"))
	p.want("0xc000000", "s socket udp4")
	p.want(refused, "s send 192.0.2.9:9")
	if _, err := c.Attach(p.cmd.Process.Pid, wan1, second, false); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.file("/ta-wan0")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the first cgroup is left: %v", err)
	}
	p.want("0xe000000", "s send 192.0.2.9:9")
	p.want("cannot assign requested address", "s bind 192.0.2.77:0")
	p.want("0xe000000", "s send 192.0.2.9:9")
	syncLock(t, second.Value, 0)
	p.want(refused, "s send 192.0.2.9:9")
}

// The programs at a cgroup that a process left are there as long as a process from there is bound. They hold its sockets
// from before, and nobody else's.
func TestFormerCgroup(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	m := Mark{0x12000000, 0xff000000}
	syncLock(t, m.Value, ifindex(t, "bind0"), "192.0.2.1")
	outer := c.file("/outer")
	if err := os.Mkdir(outer, 0o755); err != nil {
		t.Fatal(err)
	}
	programs := func(want int) {
		t.Helper()
		open, err := os.Open(outer)
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		for name, at := range formers {
			have, err := attached(int(open.Fd()), at, name)
			if err != nil {
				t.Fatal(err)
			}
			have.close()
			if len(have) != want {
				t.Errorf("%s: %d programs, want %d", name, len(have), want)
			}
		}
	}
	first, second, other := startIn(t, outer), startIn(t, outer), startIn(t, outer)
	first.want("0x0", "s socket udp4")
	second.want("0x0", "s socket udp4")
	for _, p := range []*child{first, second} {
		if _, err := c.Attach(p.cmd.Process.Pid, wan1, m, false); err != nil {
			t.Fatal(err)
		}
		programs(1)
		p.want("0x12000000", "s send 192.0.2.9:9")
		p.want("0x12000099", "s set 0x7f000099")
		p.want("0x12000000", "s set 0")
	}
	other.want("0x0", "s socket udp4")
	other.want("0x99", "s set 0x99")
	other.want("0x0", "s set 0")
	syncLock(t, m.Value, 0)
	first.want(refused, "s join %d,ef01020300000000", unix.IP_ADD_MEMBERSHIP)
	first.want(refused, "s send 192.0.2.9:9")
	for n, p := range []*child{first, second} {
		if _, err := c.Detach(p.cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		programs(1 - n)
	}
}

// A lock that was removed is closed, and the next program in the cgroup has the new one.
func TestEgressLostPin(t *testing.T) {
	inNamespace(t)
	c := testCgroups(t)
	m := Mark{0x10000000, 0xff000000}
	place := func() {
		t.Helper()
		if _, err := c.place(-1, "/ta-wan0", m); err != nil {
			t.Fatal(err)
		}
	}
	missing := func(want string) {
		t.Helper()
		all, err := c.Bound()
		if err != nil || len(all) != 1 || !strings.Contains(all[0].Unlocked, want) || want == "" && all[0].Unlocked != "" {
			t.Errorf("bound: %+v, %v; want %q", all, err, want)
		}
	}
	place()
	startIn(t, c.file("/ta-wan0"))
	missing("")
	if err := RemoveLock(); err != nil {
		t.Fatal(err)
	}
	missing("lock")
	lock, err := MakeLock()
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
	missing("removed")
	place()
	missing("")

	// What a version before this one has bound, that is without the program.
	file, err := os.Open(c.file("/ta-wan0"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	have, err := attached(int(file.Fd()), ebpf.AttachCGroupInetEgress, egressName)
	if err != nil {
		t.Fatal(err)
	}
	if err := have.detach(int(file.Fd()), ebpf.AttachCGroupInetEgress, -1); err != nil {
		t.Fatal(err)
	}
	have.close()
	missing("older version")
	old, err := load(&ebpf.ProgramSpec{Name: "ta_bind4", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Bind,
		Instructions: verdict(allow), License: "MIT"})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := attachTwice(file, old, &hook{spec: ebpf.ProgramSpec{AttachType: ebpf.AttachCGroupInet4Bind}}); err != nil {
		t.Fatal(err)
	}
	place()
	missing("")
	if have, err := attached(int(file.Fd()), ebpf.AttachCGroupInet4Bind, "ta_bind4"); err != nil || len(have) != 0 {
		t.Errorf("the old program is left: %v, %v", have, err)
	}
}

// inNamespace runs the rest of the test in a network namespace of its own, whose lock no other test has. The thread ends
// with the test.
func inNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// A lock, or its directory, that others could have made is refused by its name.
func TestLockOfOthers(t *testing.T) {
	inNamespace(t)
	l, err := MakeLock()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	name, _, err := lockName()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(PinRoot, name)
	for what, do := range map[string]func() error{
		"of another user":  func() error { return os.Chown(path, 4711, 0) },
		"others may write": func() error { return os.Chmod(path, 0o622) },
		"a link": func() error {
			return errors.Join(os.Rename(path, path+"-real"), os.Symlink(path+"-real", path))
		},
		"a directory": func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"another map": func() error {
			m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
			if err != nil {
				return err
			}
			defer m.Close()
			return errors.Join(os.Remove(path), m.Pin(path))
		},
		"a program": func() error {
			h := testHooks(t, Mark{0x11000000, 0xff000000})[0]
			program, err := load(&h.spec)
			if err != nil {
				return err
			}
			defer program.Close()
			return errors.Join(os.Remove(path), program.Pin(path))
		},
	} {
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if _, err := OpenLock(); err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := MakeLock(); !errors.Is(err, ErrNoLock) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", what, err)
		}
		if err := errors.Join(os.RemoveAll(path), os.RemoveAll(path+"-real")); err != nil {
			t.Fatal(err)
		}
		if l, err = MakeLock(); err != nil {
			t.Fatalf("%s, once it is removed: %v", what, err)
		}
		l.Close()
	}
}

// endedLock makes a lock in a network namespace that ends at once, and returns its path. maker is the pid namespace that the
// lock says it was made in.
func endedLock(t *testing.T, maker uint32) string {
	t.Helper()
	var path string
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread, and the namespace with it, ends with this function
		failed <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			l, err := MakeLock()
			if err != nil {
				return err
			}
			defer l.Close()
			name, namespace, err := lockName()
			path = filepath.Join(PinRoot, name)
			return errors.Join(err, l.m.Put(namespaceKey(namespace), maker))
		}()
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	return path
}

// Locks of network namespaces that ended go when another one is made, unless they were made where other processes are seen.
func TestLockEnded(t *testing.T) {
	gone := func(path string) bool {
		_, err := os.Stat(path)
		return errors.Is(err, fs.ErrNotExist)
	}
	sees := pidNamespace()
	foreign := endedLock(t, sees+1)
	// Threads take a moment to end, and any namespace of the machine may get the number of one that ended.
	before := []string{endedLock(t, sees)}
	for deadline := time.Now().Add(time.Minute); !slices.ContainsFunc(before, gone); {
		next := endedLock(t, sees)
		if gone(next) {
			t.Fatal("the new lock is not there")
		}
		if before = append(before, next); time.Now().After(deadline) {
			t.Fatalf("the locks of %d namespaces that ended are left", len(before))
		}
	}
	if sees != firstPIDNamespace && gone(foreign) {
		t.Error("a lock is gone that was made in another pid namespace")
	}
}

// A kernel without cookies of namespaces names a lock by the inode number, which a namespace that ended may have had: what is
// in the lock then does not count.
func TestLockInode(t *testing.T) {
	before := namespaceCookie
	namespaceCookie = func() (uint64, error) { return 0, nil }
	defer func() { namespaceCookie = before }()
	inNamespace(t)
	entries := func() (n int) {
		t.Helper()
		l, err := OpenLock()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.each(func(k lockKey, _ uint32) {
			if k.mark() != 0 {
				n++
			}
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	syncLock(t, 0x18000000, 7, "192.0.2.1")
	if name, _, err := lockName(); err != nil || !strings.HasPrefix(name, inodePrefix) {
		t.Errorf("the lock is %s, %v", name, err)
	}
	for _, step := range []struct {
		unused bool
		want   int
	}{{false, 4}, {true, 0}} { // of the mark: its link, the link, the address, and the first address
		if err := EmptyReused(func() (bool, error) { return step.unused, nil }); err != nil {
			t.Fatal(err)
		}
		if got := entries(); got != step.want {
			t.Errorf("nothing is bound: %v; %d entries, want %d", step.unused, got, step.want)
		}
	}
	if err := RemoveLock(); err != nil {
		t.Error(err)
	}
}
