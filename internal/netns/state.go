package netns

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/remember"
)

// Names of files of the memory, beside those of namespaces. No namespace can have them.
const (
	poolsFile    = ".pools"
	settingsFile = ".settings"
	madeFile     = ".made" // directories that we made on the host, as places of masks
)

// memory is what is remembered of the namespaces of this host's network namespace until the next boot.
type memory struct{ dir remember.Dir }

func openMemory() (memory, error) {
	dir, err := remember.Own("netns")
	return memory{dir}, err
}

// path is a file of the memory.
func (m memory) path(name string) string { return m.dir.Path(name) }

// lockNumber is the lock of all changes. Others are 0, and those of cgroups, inode numbers that are smaller.
const lockNumber = 1<<62 + 1

// lockPatience is how long a command waits for another one to end.
const lockPatience = 30 * time.Second

// lockPause is between two tries.
const lockPause = 20 * time.Millisecond

// lockWaits is the lock of who waits for that one.
const lockWaits = lockNumber + 1

// lock waits for the lock of all changes. The service, which locks for one namespace after the other, lets a command that
// waits go first.
func (m memory) lock() (unlock func(), err error) {
	if free, err := remember.Lock(lockWaits); err == nil {
		free()
	} else if errors.Is(err, remember.ErrBusy) {
		time.Sleep(2 * lockPause)
	}
	waits := func() {}
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(lockPause) {
		unlock, err = remember.Lock(lockNumber)
		if !errors.Is(err, remember.ErrBusy) || time.Now().After(deadline) {
			waits()
			return unlock, err
		}
		if done, err := remember.Lock(lockWaits); err == nil { // else another one waits, too, or this one has it
			waits = done
		}
	}
}

// all returns the namespaces, by name.
func (m memory) all() ([]State, error) {
	files, err := m.dir.Files()
	if err != nil {
		return nil, err
	}
	var states []State
	for _, f := range files {
		if CheckName(f.Name()) != nil || !f.Mode().IsRegular() {
			continue
		}
		s, found, err := m.get(f.Name())
		if err != nil {
			return nil, err
		}
		if found {
			states = append(states, s)
		}
	}
	return states, nil
}

// get returns the namespace of a name, and whether there is one.
func (m memory) get(name string) (s State, found bool, err error) {
	err = m.dir.Read(name, &s)
	if errors.Is(err, fs.ErrNotExist) {
		return s, false, nil
	}
	if err == nil && (s.Name != name || s.Number < 1 || s.Number > maxNumber) {
		err = fmt.Errorf("%s: is no namespace of this name", m.path(name))
	}
	return s, true, err
}

func (m memory) put(s State) error { return m.dir.Write(s.Name, s) }

// pools returns the pools of addresses. That of IPv6 is a random one (RFC 4193), chosen once.
func (m memory) pools() (Pools, error) {
	var p Pools
	err := m.dir.Read(poolsFile, &p)
	if err == nil && p.Inet.IsValid() && p.Inet6.IsValid() {
		return p, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	addr := [16]byte{0xfd}
	if _, err := rand.Read(addr[1:6]); err != nil {
		return p, err
	}
	p = Pools{Inet: DefaultInet, Inet6: netip.PrefixFrom(netip.AddrFrom16(addr), 64)}
	return p, m.dir.Write(poolsFile, p)
}

// setPool makes another network the pool of IPv4 addresses, unless there are namespaces, whose addresses would change.
func (m memory) setPool(p Pools, inet netip.Prefix) (Pools, error) {
	states, err := m.all()
	if err != nil || !inet.IsValid() || inet == p.Inet || len(states) > 0 {
		return p, err
	}
	p.Inet = inet
	return p, m.dir.Write(poolsFile, p)
}

// sysctlRoot is where the kernel has the settings of networks.
const sysctlRoot = "/proc/sys/net/"

// closed are the uplinks among the links of settings that forward, or will, because of us.
func (m memory) closed(want []string) ([]string, error) {
	changed, err := m.changedSettings()
	if err != nil {
		return nil, err
	}
	var links []string
	for _, path := range want {
		link := strings.Split(path, "/")[2]
		ours := strings.HasSuffix(path, "forwarding") && (readSetting(path) == "0" || slices.Contains(changed, path))
		if ours && !strings.HasPrefix(link, nat.Prefix) && readSetting(generalOf(path)) != "1" && !slices.Contains(links, link) {
			links = append(links, link)
		}
	}
	return links, nil
}

// canForwardIPv6 reports whether links can forward IPv6 each for itself, which came with Linux 6.17, or all do.
func canForwardIPv6() bool {
	return readSetting("ipv6/conf/all/force_forwarding") != "" || readSetting("ipv6/conf/all/forwarding") == "1"
}

// openLinks sets the wanted settings to 1, and remembers which were 0.
func (m memory) openLinks(want []string) error {
	changed, err := m.changedSettings()
	if err != nil {
		return err
	}
	was := slices.Clone(changed)
	for _, path := range want {
		if off, _ := valuesOf(path); readSetting(path) == off && !slices.Contains(changed, path) {
			changed = append(changed, path)
		}
	}
	// The kernel deletes the default routes by routers of all links whose accept_ra is 1 when one begins to forward IPv6. With 2,
	// which means the same where a link does not forward, they stay.
	routers, err := beforeForwarding(changed)
	if err != nil {
		return err
	}
	if !slices.Equal(was, changed) || len(routers) > 0 { // first, so that what a killed process has set is known
		if err := m.dir.Write(settingsFile, slices.Concat(changed, routers)); err != nil {
			return err
		}
	}
	if err := errors.Join(setUnlessGeneral(routers, true), setUnlessGeneral(changed, true), setUnlessGeneral(routers, false)); err != nil || len(routers) == 0 {
		return err
	}
	return m.dir.Write(settingsFile, changed)
}

// beforeForwarding are the settings of other links to change for the moment in which one of these links begins to forward IPv6.
func beforeForwarding(paths []string) (routers []string, err error) {
	if !slices.ContainsFunc(paths, func(path string) bool {
		return strings.HasPrefix(path, "ipv6/") && strings.HasSuffix(path, "/forwarding") && readSetting(path) == "0"
	}) {
		return nil, nil
	}
	found, err := filepath.Glob(sysctlRoot + "ipv6/conf/*/accept_ra")
	for _, path := range found {
		path = strings.TrimPrefix(path, sysctlRoot)
		general := slices.Contains([]string{"all", "default"}, strings.Split(path, "/")[2])
		if !general && readSetting(path) == "1" && !slices.Contains(paths, path) {
			routers = append(routers, path)
		}
	}
	return routers, err
}

// closeLinks puts back the settings that are no longer wanted.
func (m memory) closeLinks(want []string) error {
	changed, err := m.changedSettings()
	if err != nil {
		return err
	}
	var kept, unwanted []string
	for _, path := range changed {
		if slices.Contains(want, path) {
			kept = append(kept, path)
		} else {
			unwanted = append(unwanted, path)
		}
	}
	if err := setUnlessGeneral(unwanted, false); err != nil || len(unwanted) == 0 {
		return err
	}
	return m.dir.Write(settingsFile, kept)
}

// changedSettings are the settings that were 0 before we set them.
func (m memory) changedSettings() (changed []string, err error) {
	if err := m.dir.Read(settingsFile, &changed); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return changed, nil
}

// setUnlessGeneral sets settings of links, but for those of a host that forwards for others, too. What somebody else has set
// meanwhile is not put back.
func setUnlessGeneral(paths []string, open bool) error {
	var errs []error
	for _, path := range paths {
		to, from := valuesOf(path)
		if open {
			to, from = from, to
		}
		if readSetting(path) == from && (strings.HasSuffix(path, "/proxy_ndp") || readSetting(generalOf(path)) != "1") {
			errs = append(errs, writeSetting(path, to))
		}
	}
	return errors.Join(errs...)
}

// valuesOf are the values of a setting before and while namespaces need it.
func valuesOf(path string) (off, on string) {
	if strings.HasSuffix(path, "/accept_ra") {
		return "1", "2" // with 1 a link that forwards ignores routers
	}
	return "0", "1"
}

// generalOf is the setting of all links beside that of one.
func generalOf(path string) string {
	return strings.SplitN(path, "/conf/", 2)[0] + "/conf/all/forwarding"
}

// readSetting is "" for a setting that there is not: the link is gone, or the kernel is older.
func readSetting(path string) string {
	text, err := os.ReadFile(sysctlRoot + path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// writeSetting sets a setting, if there is one and it differs.
func writeSetting(path, value string) error {
	if have := readSetting(path); have == "" || have == value {
		return nil
	}
	err := os.WriteFile(sysctlRoot+path, []byte(value), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
