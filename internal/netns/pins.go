package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
)

// netRoot is where ip-netns(8) looks for network namespaces.
const netRoot = "/run/netns"

func netPin(name string) string { return filepath.Join(netRoot, name) }

// mountPins is the directory of the pins of mount namespaces.
func (m memory) mountPins() string { return m.path(".mnt") }

func (m memory) mountPin(name string) string { return filepath.Join(m.mountPins(), name) }

// resolvFile is the file that programs in a namespace have at /etc/resolv.conf.
func (m memory) resolvFile(name string) string { return m.path("." + name + ".resolv") }

// isPinned reports whether a file stands for a namespace.
func isPinned(path string) bool {
	var stat unix.Statfs_t
	return unix.Statfs(path, &stat) == nil && stat.Type == unix.NSFS_MAGIC
}

// pin makes the network namespace and the mount namespace of a configuration, unless both are there.
func (m memory) pin(c Config) error {
	name := c.Name
	if isPinned(netPin(name)) && isPinned(m.mountPin(name)) {
		return nil
	}
	if err := m.makePinDirs(); err != nil {
		return err
	}
	// The kernel takes the pin of a mount namespace only in an older one, which it tells by their numbers. From Linux 6.18
	// on each processor has numbers of its own: where those of one are too small, those of another one are not.
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for cpu := range len(all) * 64 {
		if !all.IsSet(cpu) {
			continue
		}
		if err := m.unpin(name); err != nil {
			return err
		}
		if err := m.pinOn(cpu, c); !errors.Is(err, errYounger) {
			return err
		}
	}
	return errYounger
}

// errYounger says that the kernel takes this process's mount namespace for the younger one.
var errYounger = errors.New("the kernel refuses to mount the mount namespace in that of this process: try it outside of this container or unit")

// pinOn is pin with namespaces that are made on a processor.
func (m memory) pinOn(cpu int, c Config) error {
	name := c.Name
	for _, path := range []string{netPin(name), m.mountPin(name)} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			return err
		}
	}
	ready, pinned := make(chan error, 1), make(chan struct{})
	var dir string
	go func() {
		runtime.LockOSThread() // the thread ends with this goroutine: it cannot return
		var one unix.CPUSet
		one.Set(cpu)
		err := unix.SchedSetaffinity(0, &one)
		if err == nil {
			err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWNET)
		}
		if err == nil {
			dir = fmt.Sprintf("/proc/%d/task/%d/ns/", os.Getpid(), unix.Gettid())
			err = m.prepare(c)
		}
		ready <- err
		<-pinned
	}()
	defer close(pinned)
	if err := <-ready; err != nil {
		return err
	}
	if err := unix.Mount(dir+"net", netPin(name), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the network namespace at %s: %w", netPin(name), err)
	}
	err := unix.Mount(dir+"mnt", m.mountPin(name), "", unix.MS_BIND, "")
	if errors.Is(err, unix.EINVAL) {
		return errYounger
	}
	if err != nil {
		return fmt.Errorf("mount the mount namespace at %s: %w", m.mountPin(name), err)
	}
	return nil
}

// makePinDirs makes the directories of pins. That of network namespaces is shared with other mount namespaces, as
// ip-netns(8) makes it, so that a deleted namespace goes everywhere. Mount namespaces cannot be pinned in such a place.
func (m memory) makePinDirs() error {
	if err := m.dir.Make(); err != nil {
		return err
	}
	for _, dir := range []struct {
		path        string
		mode        fs.FileMode
		propagation uintptr
	}{{netRoot, 0o755, unix.MS_SHARED | unix.MS_REC}, {m.mountPins(), 0o700, unix.MS_PRIVATE}} {
		if err := os.MkdirAll(dir.path, dir.mode); err != nil {
			return err
		}
		err := unix.Mount("", dir.path, "", dir.propagation, "")
		if errors.Is(err, unix.EINVAL) { // it is no mount point yet
			if err = unix.Mount(dir.path, dir.path, "", unix.MS_BIND|unix.MS_REC, ""); err == nil {
				err = unix.Mount("", dir.path, "", dir.propagation, "")
			}
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", dir.path, err)
		}
	}
	return nil
}

// unpin lets the namespaces of a name go. The kernel removes each with its last program.
func (m memory) unpin(name string) error {
	var errs []error
	for _, path := range []string{netPin(name), m.mountPin(name)} {
		for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil { // once for each mount there
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removePins removes the directory of pins of mount namespaces, after the last namespace.
func (m memory) removePins() error {
	entries, err := os.ReadDir(m.mountPins())
	if err != nil || len(entries) > 0 {
		return nil // there is none, or some are left
	}
	for unix.Unmount(m.mountPins(), unix.MNT_DETACH) == nil {
	}
	return os.Remove(m.mountPins())
}

// maskable are the directories of resolvers of the host, which would answer for the host and not for the namespace. One that
// is missing is made, since its service may begin later: systemd and the services take a directory that is there.
var maskable = map[string]string{"nscd": "/run/nscd", "resolved": "/run/systemd/resolve", "avahi": "/run/avahi-daemon"}

// masks are the directories that a namespace has empty.
func (c Config) masks() (dirs []string) {
	for name, dir := range maskable {
		if c.Mask == nil || slices.Contains(c.Mask, name) {
			dirs = append(dirs, dir)
		}
	}
	slices.Sort(dirs)
	return dirs
}

// makeMasked makes a directory for a mask, and remembers those that it made.
func (m memory) makeMasked(dir string) error {
	var made []string
	for ; !exists(dir); dir = filepath.Dir(dir) {
		made = append(made, dir)
	}
	if len(made) == 0 {
		return nil
	}
	slices.Reverse(made)
	var before []string
	if err := m.dir.Read(madeFile, &before); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, path := range made {
		if !slices.Contains(before, path) {
			before = append(before, path)
		}
	}
	if err := m.dir.Write(madeFile, before); err != nil {
		return err
	}
	for _, path := range made {
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(path, 0o755); err != nil { // whatever the umask is
			return err
		}
	}
	return nil
}

// removeMasked removes, after the last namespace, the directories that were made for masks and that no service uses.
func (m memory) removeMasked() error {
	states, err := m.all()
	if err != nil || len(states) > 0 {
		return err
	}
	var made []string
	if err := m.dir.Read(madeFile, &made); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	for _, path := range slices.Backward(made) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return m.dir.Remove(madeFile)
}

// prepare makes this thread's new namespaces what programs find in them.
func (m memory) prepare(c Config) error {
	// What the host mounts later appears in here, too, and nothing of this appears there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts ours: %w", err)
	}
	if err := errors.Join(mountFiles(c.Name), m.mountResolver(c), m.mountSys()); err != nil {
		return err
	}
	for path, value := range map[string]string{
		"ipv6/conf/all/disable_ipv6": "0", "ipv6/conf/default/disable_ipv6": "0", "ipv6/conf/default/accept_ra": "0", "ipv6/conf/all/accept_ra": "0",
		"ipv4/ping_group_range": "0\t2147483647",
	} {
		err := writeSetting(path, value)
		if errors.Is(err, unix.EINVAL) { // a user namespace has fewer groups: they ask for no echoes there
			err = nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// remount mounts again what is no longer in its place in a namespace: another program renamed a file over it, or its service
// made its directory again.
func (h *Host) remount(name string) error {
	h.mounting.Lock()
	defer h.mounting.Unlock()
	s, found, err := h.memory.get(name)
	if err != nil || !found { // deleted meanwhile
		return err
	}
	return h.memory.withMounts(name, func() error { return h.memory.mountResolver(s.Config) })
}

// withMounts calls f on a thread with the mounts of a namespace.
func (m memory) withMounts(name string, f func() error) error {
	return onThread(m.mountPin(name), unix.CLONE_NEWNS, f)
}

// mountResolver mounts the namespace's resolv.conf, and empty directories over those of the host's resolvers, where that has
// not been done.
func (m memory) mountResolver(c Config) error {
	conf, err := filepath.EvalSymlinks(resolvConf)
	if err != nil {
		return noPlace(err)
	}
	masks := c.masks()
	for _, dir := range maskable {
		for !slices.Contains(masks, dir) && isMasked(dir) {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount the mask of %s: %w", dir, err)
			}
		}
	}
	for _, dir := range masks {
		if err := m.makeMasked(dir); err != nil {
			return fmt.Errorf("make a place for a mask: %w", err)
		}
		if err := mask(dir, conf); err != nil {
			return err
		}
	}
	have, ok := identity(conf)
	if want, found := identity(m.resolvFile(c.Name)); ok && found && have == want {
		return nil
	}
	if err := unix.Mount(m.resolvFile(c.Name), conf, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount at %s: %w", conf, err)
	}
	return nil
}

// maskSource is the name of the file systems of masks.
const maskSource = "table-allocator"

// isMasked reports whether a directory is masked.
func isMasked(dir string) bool {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	last := ""
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == dir {
			last = line
		}
	}
	return err == nil && strings.Contains(last, " "+maskSource+" ")
}

// linked are the files in maskable directories that /etc/resolv.conf may be a link to, also later: the namespace's own is
// mounted there then.
var linked = map[string][]string{"/run/systemd/resolve": {"resolv.conf", "stub-resolv.conf"}}

// hasPlaces reports whether a mask has the files that are linked: those that an older version made have not.
func hasPlaces(dir string) bool {
	for _, file := range linked[dir] {
		if !exists(filepath.Join(dir, file)) {
			return false
		}
	}
	return true
}

// mask mounts a directory over one, with nothing in it but places for mounts: those linked, and conf, if it is below.
func mask(dir, conf string) error {
	if isMasked(dir) && hasPlaces(dir) {
		return nil
	}
	if err := unix.Mount(maskSource, dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=64k"); err != nil {
		return fmt.Errorf("mount over %s: %w", dir, err)
	}
	files := slices.Clone(linked[dir])
	if rest, below := strings.CutPrefix(conf, dir+"/"); below {
		files = append(files, rest)
	}
	for _, file := range files {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			return err
		}
	}
	return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

// mountFiles mounts the files of /etc/netns/NAME over those of /etc, as ip-netns(8) does. resolv.conf is not among them.
func mountFiles(name string) error {
	dir := filepath.Join("/etc/netns", name)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		file := filepath.Join(dir, e.Name())
		if e.Name() == "resolv.conf" {
			continue
		}
		source, err := remember.RootsFile(file)
		if err != nil {
			return err
		}
		if err := unix.Mount(source, filepath.Join("/etc", e.Name()), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s at /etc/%s: %w", file, e.Name(), err)
		}
	}
	return err
}

// mountSys shows the links of the namespace, and not those of the host, in /sys. The rest, cgroups among it, stays.
func (m memory) mountSys() error {
	dir := m.path(".sys")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("sysfs", dir, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	for _, part := range []string{"class/net", "devices/virtual/net"} {
		if err := unix.Mount(filepath.Join(dir, part), filepath.Join("/sys", part), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount at /sys/%s: %w", part, err)
		}
	}
	return unix.Unmount(dir, unix.MNT_DETACH)
}

// inside calls f on a thread in the network namespace of a name.
func inside(name string, f func() error) error { return onThread(netPin(name), unix.CLONE_NEWNET, f) }

// insideWith is inside, for what asks the kernel there.
func insideWith(name string, f func(kernel *route.Conn) error) error {
	return inside(name, func() error {
		kernel, err := route.Dial()
		if err != nil {
			return err
		}
		defer kernel.Close()
		return f(kernel)
	})
}

// onThread calls f on a thread in the namespace of a pin.
func onThread(pin string, kind int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // as in pinOn
		ns, err := os.Open(pin)
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		if kind == unix.CLONE_NEWNS { // a thread whose directory others share cannot change its mounts
			err = unix.Unshare(unix.CLONE_FS)
		}
		if err == nil {
			err = unix.Setns(int(ns.Fd()), kind)
		}
		if err != nil {
			done <- fmt.Errorf("enter %s: %w", pin, err)
			return
		}
		done <- f()
	}()
	return <-done
}
