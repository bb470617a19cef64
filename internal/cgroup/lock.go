package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
)

// A Lock is the map of a network namespace that says by which links, and with which source addresses, sockets with a
// mark may send. The programs of all cgroups read it. What nobody has written does not leave: without a writer the
// lock is closed.
//
// It is pinned below PinRoot, and whoever may write to the file may write to the map.
type Lock struct{ m *ebpf.Map }

// ErrNoLock says that nothing would keep bound traffic from leaving by another uplink.
var ErrNoLock = errors.New("--on-loss block is refused, since nothing would drop what leaves by another uplink (--on-loss fallback works without that)")

const (
	loopbackIndex = 1
	lockPrefix    = "lock-"
	inodePrefix   = lockPrefix + "inode-"
	lockEntries   = 1 << 14
	noPreallocate = 1 // BPF_F_NO_PREALLOC: entries take memory when they are made
)

// Values of an entry for a whole link.
const (
	hostSource = 0 // a local link: to its networks alone, from localSources and what the mark's link has
	ownSource  = 1 // of no address yet, and link-local ones; others have entries of their own
)

// lockKey is a mark, an ifindex and an address. No address stands for the link, and IPv4 addresses are written in a
// form that no source address of IPv6 has. At the ifindex 0 a mark has the ifindex of its link, and as 0.0.0.0 an IPv4
// address of the link: what joins a group of multicast needs them. At localSources it has the addresses of its local links,
// and at the negative ifindex of such a link the networks there, and as :: and 0.0.0.0 their lengths: a byte for each, of
// the form that has 128 bits.
type lockKey [24]byte

func keyOf(mark uint32, index int, addr netip.Addr) (k lockKey) {
	binary.NativeEndian.PutUint32(k[0:], mark)
	binary.NativeEndian.PutUint32(k[4:], uint32(index))
	switch {
	case addr.Is4():
		for i := 8; i < 20; i++ {
			k[i] = 0xff
		}
		copy(k[20:], addr.AsSlice())
	case addr.Is6():
		copy(k[8:], addr.AsSlice())
	}
	return k
}

func (k lockKey) mark() uint32 { return binary.NativeEndian.Uint32(k[0:]) }
func (k lockKey) index() int   { return int(int32(binary.NativeEndian.Uint32(k[4:]))) }

// OpenLock opens the lock of this network namespace. fs.ErrNotExist says that there is none.
func OpenLock() (*Lock, error) {
	dir, err := bpfDir()
	if err != nil {
		return nil, err
	}
	name, _, err := lockName()
	if err != nil {
		return nil, err
	}
	return openLock(dir, name)
}

// CheckLock returns why this network namespace has no lock that can be used. The error of who may not look is fs.ErrPermission.
func CheckLock() error {
	l, err := OpenLock()
	if err != nil {
		return err
	}
	l.Close()
	return nil
}

func openLock(dir, name string) (*Lock, error) {
	root := filepath.Join(dir, filepath.Base(PinRoot))
	if err := onlyOurs(root, fs.ModeDir); err != nil {
		return nil, err
	}
	path := filepath.Join(root, name)
	if err := onlyOurs(path, 0); err != nil {
		return nil, err
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open the lock %s: %w", path, err)
	}
	if m.Type() != ebpf.Hash || m.KeySize() != uint32(len(lockKey{})) || m.ValueSize() != 4 || m.MaxEntries() != lockEntries {
		m.Close()
		return nil, fmt.Errorf("%s: not a lock of this version: remove it", path)
	}
	return &Lock{m}, nil
}

// MakeLock opens the lock of this network namespace, and makes it if there is none. All its errors are ErrNoLock.
func MakeLock() (*Lock, error) {
	l, err := makeLock()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoLock, err)
	}
	return l, nil
}

func makeLock() (*Lock, error) {
	dir, err := bpfDir()
	if errors.Is(err, fs.ErrNotExist) {
		dir, err = mountBPF()
	}
	if err != nil {
		return nil, err
	}
	name, namespace, err := lockName()
	if err != nil {
		return nil, err
	}
	l, err := openLock(dir, name)
	if !errors.Is(err, fs.ErrNotExist) {
		return l, err
	}
	root := filepath.Join(dir, filepath.Base(PinRoot))
	if err := os.Mkdir(root, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := onlyOurs(root, fs.ModeDir); err != nil {
		return nil, err
	}
	removeEnded(root, namespace)
	m, err := newLockMap()
	if err != nil {
		return nil, err
	}
	l = &Lock{m}
	err = l.m.Put(namespaceKey(namespace), pidNamespace())
	if err == nil {
		err = m.Pin(filepath.Join(root, name))
	}
	if err == nil {
		return l, nil
	}
	m.Close()
	if errors.Is(err, unix.EEXIST) { // another process was first
		return openLock(dir, name)
	}
	return nil, fmt.Errorf("pin the lock %s: %w", filepath.Join(root, name), err)
}

func newLockMap() (m *ebpf.Map, err error) {
	spec := &ebpf.MapSpec{Name: "ta_lock", Type: ebpf.Hash, KeySize: uint32(len(lockKey{})), ValueSize: 4, MaxEntries: lockEntries, Flags: noPreallocate}
	findNames()
	if m, err = ebpf.NewMap(spec); errors.Is(err, unix.EPERM) { // see load
		if again := withMemory(func() error { m, err = ebpf.NewMap(spec); return nil }); again != nil {
			return nil, again
		}
	}
	if err != nil {
		return nil, fmt.Errorf("make BPF map: %w", err)
	}
	return m, nil
}

// bpfDir is where a bpf file system is mounted: at its usual place, or after `ip netns exec`, which mounts a bare
// /sys, where process 1 sees it. fs.ErrNotExist says that none is.
func bpfDir() (string, error) {
	usual := filepath.Dir(PinRoot)
	for _, dir := range []string{usual, "/proc/1/root" + usual} {
		// Root of a user namespace may not look into that of the host, and has nothing there.
		if isBPF(dir) && !errors.Is(unix.Access(dir, unix.X_OK), fs.ErrPermission) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no bpf file system at %[1]s: mount one with `mount -t bpf -o mode=0700 bpf %[1]s`: %[2]w", usual, fs.ErrNotExist)
}

func isBPF(dir string) bool {
	var stat unix.Statfs_t
	err := unix.Statfs(dir, &stat)
	return err == nil && uint32(stat.Type) == unix.BPF_FS_MAGIC
}

// mountBPF mounts the file system so that root alone can make files in it.
func mountBPF() (string, error) {
	dir := filepath.Dir(PinRoot)
	unlock, _ := lock(PinRoot, lockTries) // a second one would cover the first
	defer unlock()
	if isBPF(dir) {
		return dir, nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return "", fmt.Errorf("mount a bpf file system at %s, where the lock of --on-loss block has its place: %w", dir, err)
	}
	return dir, nil
}

// onlyOurs returns why others could have made a file, or could change it.
func onlyOurs(path string, kind fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(stat.Uid) != os.Geteuid() || info.Mode().Type() != kind || info.Mode().Perm()&0o022 != 0 {
		what := "a file"
		if kind == fs.ModeDir {
			what = "a directory"
		}
		return fmt.Errorf("%s: want %s of uid %d that nobody else can write to: remove it", path, what, os.Geteuid())
	}
	return nil
}

var namespaceCookie = remember.Namespace

// lockName is the name of this network namespace's lock, and the inode number of the namespace. Numbers of namespaces
// that ended are used again, cookies are not; there are none before Linux 5.14.
func lockName() (name string, namespace uint64, err error) {
	inode, err := remember.NamespaceInode()
	if err != nil {
		return "", 0, fmt.Errorf("own network namespace: %w", err)
	}
	cookie, err := namespaceCookie()
	if err != nil {
		return "", 0, err
	}
	if cookie == 0 {
		return inodePrefix + strconv.FormatUint(inode, 10), inode, nil
	}
	return lockPrefix + strconv.FormatUint(cookie, 10), inode, nil
}

// namespaceKey is the key under which a lock has the inode number of its network namespace. No program looks for it.
func namespaceKey(namespace uint64) (k lockKey) {
	binary.NativeEndian.PutUint64(k[8:], namespace)
	return k
}

// firstPIDNamespace is the one in which all processes are seen: PROC_PID_INIT_INO of the kernel.
const firstPIDNamespace = 0xEFFFFFFC

// pidNamespace is the number of the pid namespace of the caller, whose processes /proc shows; 0 if it is not known.
func pidNamespace() uint32 {
	var stat unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/pid", &stat) != nil {
		return 0
	}
	return uint32(stat.Ino)
}

// removeEnded removes locks of network namespaces that no thread is in and no file stands for any more. Of those that were
// made in another pid namespace it knows nothing, unless it sees all processes.
func removeEnded(root string, own uint64) {
	pins, err := filepath.Glob(filepath.Join(root, lockPrefix+"*"))
	if err != nil || len(pins) == 0 {
		return
	}
	there, sees := namespaces(), pidNamespace()
	delete(there, own) // the lock of this one is not made yet: another one that ended had the number
	for _, pin := range pins {
		l, err := openLock(filepath.Dir(root), filepath.Base(pin))
		if err != nil {
			continue // whatever it is, it is in nobody's way
		}
		ended := true
		err = l.each(func(k lockKey, maker uint32) {
			if k.mark() == 0 && k.index() == 0 && (there[binary.NativeEndian.Uint64(k[8:])] || sees != firstPIDNamespace && maker != sees) {
				ended = false
			}
		})
		l.Close()
		if ended && err == nil {
			_ = os.Remove(pin) // the next one tries again
		}
	}
}

// namespaces are the inode numbers of the network namespaces that threads and mounts show.
func namespaces() map[uint64]bool {
	there := make(map[uint64]bool)
	links, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net") // the pattern is right
	for _, link := range links {
		var stat unix.Stat_t
		if unix.Stat(link, &stat) == nil {
			there[stat.Ino] = true
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo") // without it those count that have a process
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 3 {
			if text, ok := strings.CutPrefix(f[3], "net:["); ok {
				ino, _ := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64)
				there[ino] = true
			}
		}
	}
	return there
}

// RemoveLock removes the lock of this network namespace, if there is one. Programs that read it go on to read it.
func RemoveLock() error {
	dir, err := bpfDir()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	name, _, err := lockName()
	if err != nil {
		return err
	}
	root := filepath.Join(dir, filepath.Base(PinRoot))
	if err := os.Remove(filepath.Join(root, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return removeIfEmpty(root)
}

// Close ends the use of the lock, which stays.
func (l *Lock) Close() {
	if l != nil {
		l.m.Close()
	}
}

func (l *Lock) fd() int { return l.m.FD() }

func (l *Lock) id() ebpf.MapID {
	info, err := l.m.Info()
	if err != nil {
		return 0
	}
	id, _ := info.ID() // before Linux 4.13 there is none
	return id
}

// Allowed is what sockets with a mark may use.
type Allowed struct {
	Index int          // the ifindex of their link; 0: no link
	Addrs []netip.Addr // addresses of the link
	Local []Local      // links to networks of the host itself
}

// SetLocal notes whether what has the mark may use links to networks of the host, for each Sync that follows.
func (l *Lock) SetLocal(mark uint32, local bool) error {
	var value uint32
	if local {
		value = 1
	}
	if err := l.m.Put(localKey(mark), value); err != nil {
		return fmt.Errorf("write the lock: %w", err)
	}
	return nil
}

// localKey is the key of what SetLocal notes.
func localKey(mark uint32) lockKey { return keyOf(mark, 0, netip.IPv6LinkLocalAllNodes()) }

// uplinkKey is the key of a link that was an uplink. No program looks for it.
func uplinkKey(ifname string) (k lockKey) {
	binary.NativeEndian.PutUint32(k[4:], ^uint32(0))
	copy(k[8:], ifname)
	return k
}

// NoteUplink notes that a link is an uplink, and was one after it has lost addresses and routes.
func (l *Lock) NoteUplink(ifname string) error {
	if err := l.m.Put(uplinkKey(ifname), uint32(0)); err != nil {
		return fmt.Errorf("write the lock: %w", err)
	}
	return nil
}

// WasUplink reports whether NoteUplink was called for a link of that name.
func (l *Lock) WasUplink(ifname string) (bool, error) {
	var value uint32
	err := l.m.Lookup(uplinkKey(ifname), &value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Sync lets what has the mark use what read returns and nothing else. read reads that from the kernel, and is told what
// SetLocal noted.
func (l *Lock) Sync(mark uint32, read func(local bool) (Allowed, error)) error {
	// The map is read first: what another process adds after that is newer than what the kernel says below.
	have := make(map[lockKey]uint32)
	if err := l.each(func(k lockKey, value uint32) {
		if k.mark() == mark {
			have[k] = value
		}
	}); err != nil {
		return fmt.Errorf("read the lock: %w", err)
	}
	local, noted := have[localKey(mark)]
	allowed, err := read(local != 0)
	if err != nil {
		return err
	}
	want := allowed.entries(mark)
	if noted {
		want[localKey(mark)] = local
	}
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := l.remove(k); err != nil {
			return err
		}
	}
	for k, value := range want {
		if old, ok := have[k]; ok && old == value {
			continue
		}
		if err := l.m.Put(k, value); err != nil {
			return fmt.Errorf("write the lock: %w", err)
		}
	}
	return nil
}

// entries are those of the map for a mark.
func (a Allowed) entries(mark uint32) map[lockKey]uint32 {
	entries := make(map[lockKey]uint32)
	if a.Index == 0 {
		return entries
	}
	for _, l := range a.Local {
		l.entries(mark, entries)
	}
	entries[keyOf(mark, 0, netip.Addr{})] = uint32(a.Index)
	entries[keyOf(mark, a.Index, netip.Addr{})] = ownSource
	for _, addr := range a.Addrs {
		entries[keyOf(mark, a.Index, addr)] = ownSource
		if first := keyOf(mark, 0, netip.IPv4Unspecified()); addr.Is4() && entries[first] == 0 {
			entries[first] = binary.NativeEndian.Uint32(addr.AsSlice())
		}
	}
	return entries
}

// RemoveLink lets nothing leave by a link: its ifindex may be another link's later.
func (l *Lock) RemoveLink(index int) error {
	var gone []lockKey
	if err := l.each(func(k lockKey, value uint32) {
		if k.mark() != 0 && (k.index() == index || k.index() == -index || k == keyOf(k.mark(), 0, netip.Addr{}) && value == uint32(index)) {
			gone = append(gone, k)
		}
	}); err != nil {
		return fmt.Errorf("read the lock: %w", err)
	}
	for _, k := range gone {
		if err := l.remove(k); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lock) remove(k lockKey) error {
	if err := l.m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("write the lock: %w", err)
	}
	return nil
}

func (l *Lock) each(f func(k lockKey, value uint32)) error {
	var key lockKey
	var value uint32
	entries := l.m.Iterate()
	for entries.Next(&key, &value) {
		f(key, value)
	}
	return entries.Err()
}
