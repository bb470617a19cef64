package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
)

// Names of our cgroups. A colon cannot be in the name of an interface, and no other program begins
// the name of a cgroup like this.
const (
	childPrefix = "ta-"              // inside the cgroup that a process is in: ta-wwan0
	rootName    = "/table-allocator" // below it one for each interface: table-allocator/wwan0
)

// Cgroups is the cgroup2 file system. Paths in it begin at what is mounted.
type Cgroups struct {
	dir     string   // where it is mounted
	below   string   // what is mounted there, as /proc/PID/cgroup has it
	private *os.File // the mount, if it is nobody else's
}

// Open finds the cgroup2 file system, also beside the older one. Where none is mounted, as after
// `ip netns exec`, which mounts a bare /sys, it mounts one that only this process sees.
func Open() (*Cgroups, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	mounts, err := cgroupMounts(file)
	if err != nil {
		return nil, err
	}
	for _, c := range mounts {
		var fs unix.Statfs_t
		if err := unix.Statfs(c.dir, &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC { // else something covers it
			return &c, nil
		}
	}
	private, err := mountCgroups()
	if err != nil {
		return nil, fmt.Errorf("no cgroup2 file system is mounted: mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup`: %w", err)
	}
	return &Cgroups{dir: fmt.Sprintf("/proc/self/fd/%d", private.Fd()), below: "/", private: private}, nil
}

// cgroupMounts returns the cgroup2 mounts of a mountinfo that can be written, the one with the most
// in it first.
func cgroupMounts(mountinfo io.Reader) ([]Cgroups, error) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var mounts []Cgroups
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		// mount id, parent, device, root, mount point, options, ..., "-", type
		before, after, _ := strings.Cut(lines.Text(), " - ")
		f := strings.Fields(before)
		if len(f) < 6 || !strings.HasPrefix(after, "cgroup2 ") || slices.Contains(strings.Split(f[5], ","), "ro") {
			continue
		}
		root := unescape.Replace(f[3])
		if !strings.HasPrefix(root, "/") || strings.HasPrefix(root, "/..") { // of a namespace outside of ours
			continue
		}
		mounts = append(mounts, Cgroups{dir: unescape.Replace(f[4]), below: root})
	}
	slices.SortStableFunc(mounts, func(a, b Cgroups) int { return len(a.below) - len(b.below) })
	return mounts, lines.Err()
}

// mountCgroups mounts the file system nowhere: its open descriptor is the only way in.
func mountCgroups() (*os.File, error) {
	config, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open file system cgroup2: %w", err)
	}
	defer unix.Close(config)
	if err := unix.FsconfigCreate(config); err != nil {
		return nil, fmt.Errorf("open file system cgroup2: %w", err)
	}
	mount, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount file system cgroup2: %w", err)
	}
	return os.NewFile(uintptr(mount), "cgroup2"), nil
}

// Close ends the use of what Open has mounted.
func (c *Cgroups) Close() {
	if c.private != nil {
		_ = c.private.Close() // was only read
	}
}

// file is where the cgroup is in the file system.
func (c *Cgroups) file(cgroup string) string { return filepath.Join(c.dir, cgroup) }

// cutPath returns path, which begins with a slash, without the directories dir before it.
func cutPath(path, dir string) (string, bool) {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return "/" + strings.TrimPrefix(rest, "/"), ok && (rest == "" || rest[0] == '/')
}

// of returns the cgroup of a process.
func (c *Cgroups) of(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	if err != nil {
		return "", err
	}
	cgroup, ok := parseCgroup(string(text))
	if !ok {
		return "", fmt.Errorf("process %d is in no cgroup of cgroup2", pid)
	}
	inside, ok := cutPath(cgroup, c.below)
	if !ok || !filepath.IsLocal("."+inside) {
		return "", fmt.Errorf("process %d is in cgroup %s, outside of what %s shows", pid, cgroup, c.dir)
	}
	return inside, nil
}

// parseCgroup finds the cgroup of cgroup2 in a /proc/PID/cgroup.
func parseCgroup(text string) (string, bool) {
	for line := range strings.Lines(text) {
		if cgroup, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/"); ok {
			return "/" + strings.TrimSuffix(cgroup, " (deleted)"), true
		}
	}
	return "", false
}

// outside is the cgroup that a process would be in without us.
func outside(cgroup string) string {
	if _, ok := cutPath(cgroup, rootName); ok {
		return "/"
	}
	for strings.HasPrefix(path.Base(cgroup), childPrefix) {
		cgroup = path.Dir(cgroup)
	}
	return cgroup
}

// uplinkOf is what the cgroup itself is bound to by its name.
func uplinkOf(cgroup string) (Uplink, bool) {
	if path.Dir(cgroup) == rootName {
		return parseUplink(path.Base(cgroup))
	}
	if name, ok := strings.CutPrefix(path.Base(cgroup), childPrefix); ok {
		return parseUplink(name)
	}
	return Uplink{}, false
}

// childOf is where a process of the cgroup goes to be bound. A process that is in one of our children
// already goes to another beside it; in a cgroup of an interface, to one inside, whose programs are
// asked first.
func childOf(cgroup string, u Uplink) string {
	if here, ok := uplinkOf(cgroup); ok && here == u {
		return cgroup
	}
	if _, ok := cutPath(cgroup, rootName); !ok {
		cgroup = outside(cgroup)
	}
	return path.Join(cgroup, childPrefix+u.String())
}

// bindRounds is how often a cgroup is made that another process of ours takes for left over, between
// its making and the first process in it.
const bindRounds = 20

// place makes the cgroup with the programs for the mark in it, and moves a process there: 0 is the
// caller, -1 nobody. What is missing is told by whoever makes the cgroup.
func (c *Cgroups) place(pid int, cgroup string, m Mark) (missing []Missing, err error) {
	return c.placeFrom(pid, cgroup, m, false)
}

// placeFrom is place, for a process that may have sockets: the cgroup above, which it leaves, gets programs that hold them.
func (c *Cgroups) placeFrom(pid int, cgroup string, m Mark, sockets bool) (missing []Missing, err error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	lock, err := lockFor(m)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	dir, all := c.file(cgroup), hooks(m, lock)
	var upper []hook
	if sockets && lock != nil {
		upper = formerHooks(m, lock)
	}
	for range bindRounds {
		if missing, err = c.placeOnce(pid, dir, all, upper); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", cgroup, err)
	}
	return missing, nil
}

// lockFor is the lock that programs for a mark read; nil: they read none.
func lockFor(m Mark) (*Lock, error) {
	if m.fallback() {
		return nil, nil
	}
	return MakeLock()
}

// orLimits says why the kernel makes no more cgroups, if limits are why.
func orLimits(err error) error {
	if !errors.Is(err, unix.EAGAIN) {
		return err
	}
	return fmt.Errorf("cgroup.max.descendants or cgroup.max.depth of a cgroup above allows no more: raise it, or begin in another cgroup: %w", err)
}

func (c *Cgroups) placeOnce(pid int, dir string, all, upper []hook) ([]Missing, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, orLimits(err)
	}
	unlock, _ := lock(dir, lockTries)
	defer unlock()
	err := os.Mkdir(dir, 0o755)
	fresh := err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, orLimits(err)
	}
	open, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer open.Close()
	missing, err := install(open, all)
	if err == nil && len(upper) > 0 {
		var more []Missing
		more, err = installAt(filepath.Dir(dir), upper)
		missing = append(missing, more...)
	}
	if err != nil {
		if fresh {
			_ = os.Remove(dir) // the error is the one to tell
		}
		return nil, err
	}
	if pid >= 0 {
		if err := move(pid, dir); err != nil {
			return nil, err
		}
	}
	if !fresh {
		return nil, nil
	}
	return missing, nil
}

// Tries to get a lock, and the time between two: together five seconds.
const (
	lockTries = 500
	lockEvery = 10 * time.Millisecond
)

// lock takes the lock of a cgroup, which is that of the one above: so it outlives the cgroup. Two
// processes that attach at once would each add programs of their own, and one that sweeps would remove
// a cgroup that the other is about to enter. Both can be lived with: where there is no lock, as with a
// /run that cannot be written to, it is nobody's.
func lock(dir string, tries int) (unlock func(), busy bool) {
	var stat unix.Stat_t
	if unix.Stat(filepath.Dir(dir), &stat) != nil {
		return func() {}, false
	}
	for ; ; tries-- {
		unlock, err := remember.Lock(stat.Ino)
		if err == nil {
			return unlock, false
		}
		if busy := errors.Is(err, remember.ErrBusy); !busy || tries == 1 {
			return func() {}, busy
		}
		time.Sleep(lockEvery)
	}
}

// move puts a process, all its threads, into a cgroup. The kernel fails with ESRCH for one that has
// ended.
func move(pid int, dir string) error {
	file, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.WriteString(strconv.Itoa(pid)); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("the cgroup is among threaded ones (cgroup.type), where only threads move: begin in another cgroup, or bind --cgroup: %w", err)
		}
		return fmt.Errorf("move process %d: %w", pid, err)
	}
	return nil
}

// processes returns the pids in a cgroup, without those of a pid namespace that is not ours.
func processes(dir string) ([]int, error) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) || errors.Is(err, fs.ErrNotExist) {
		return nil, nil // has threads only, or was removed
	}
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, word := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("%s/cgroup.procs: %w", dir, err)
		}
		if pid != 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Enter moves the calling process to where all that it executes is bound to the uplink. It returns
// what the kernel lacks, if nobody was told yet.
func (c *Cgroups) Enter(u Uplink, m Mark) ([]Missing, error) {
	if err := u.Check(); err != nil {
		return nil, err
	}
	cgroup, err := c.of(os.Getpid())
	if err != nil {
		return nil, err
	}
	child := childOf(cgroup, u)
	missing, err := c.place(0, child, m)
	if err != nil {
		return nil, err
	}
	c.sweepIn(path.Dir(child))
	return missing, verify(m)
}

// verify makes a socket to see whether it gets the mark. Until Linux 5.15 the first use of net_cls or
// net_prio keeps programs of cgroups from being asked, until the next boot and without a word.
func verify(m Mark) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		return fmt.Errorf("make a socket to look at its mark: %w", err)
	}
	defer unix.Close(fd)
	mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil {
		return fmt.Errorf("look at the mark of a socket: %w", err)
	}
	if got := uint32(mark) & m.Mask; got != m.Value {
		return fmt.Errorf("sockets get mark %#x, not %#x: before Linux 5.15 a mounted net_cls or net_prio, such as container engines use, switches BPF programs of cgroups off until the next boot", got, m.Value)
	}
	return nil
}

var errNotMounted = errors.New("no cgroup2 file system is mounted where others could see the cgroup: mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup`")

// Interface makes the cgroup of an interface and returns its path: whoever is put into it is bound.
func (c *Cgroups) Interface(u Uplink, m Mark) (dir string, missing []Missing, err error) {
	if err := u.Check(); err != nil {
		return "", nil, err
	}
	if c.private != nil {
		return "", nil, errNotMounted
	}
	cgroup := path.Join(rootName, u.String())
	if missing, err = c.place(-1, cgroup, m); err != nil {
		return "", nil, err
	}
	return c.file(cgroup), missing, nil
}

// RemoveInterface removes the cgroup of an interface. Processes in it are detached first.
func (c *Cgroups) RemoveInterface(u Uplink) error {
	if err := u.Check(); err != nil {
		return err
	}
	cgroup := path.Join(rootName, u.String())
	dir := c.file(cgroup)
	for range bindRounds {
		pids, err := processes(dir)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if _, err := c.Detach(pid); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		c.sweepIn(cgroup)
		err = os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return removeIfEmpty(filepath.Dir(dir))
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return fmt.Errorf("remove cgroup %s: there are processes, or cgroups, in it: %w", cgroup, unix.EBUSY)
}

// sweepIn removes our children of the cgroup that have no process any more.
func (c *Cgroups) sweepIn(cgroup string) {
	dir := c.file(cgroup)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // it went with its last process
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), childPrefix) {
			sweep(filepath.Join(dir, e.Name()))
		}
	}
}

// sweep removes a cgroup of ours if it is empty, is not to stand, and nobody is about to enter it.
func sweep(dir string) {
	if stands(dir) {
		return
	}
	unlock, busy := lock(dir, 1)
	if busy {
		return
	}
	defer unlock()
	if _, ours, err := programsMark(dir); ours && err == nil && os.Remove(dir) == nil { // EBUSY where it is in use
		_ = removeFormer(filepath.Dir(dir)) // one that stays changes nothing of others, and goes another time
	}
}

// removeFormer removes what formerHooks are from a cgroup that has no cgroup of ours below it any more.
func removeFormer(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), childPrefix) }) {
		return err
	}
	open, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer open.Close()
	var errs []error
	for name, at := range formers {
		have, err := attached(int(open.Fd()), at, name)
		if err == nil {
			err = have.detach(int(open.Fd()), at, -1)
			have.close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
