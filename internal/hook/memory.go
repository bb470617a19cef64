package hook

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/remember"
)

// memory is the directory of one link, with a file for each thing to remember.
type memory struct {
	remember.Dir
	ifname string
}

// The names of the files. The name of an address's file begins with addressName.
const (
	prefixName  = "prefix"  // holds the delegated netip.Prefix
	awaitedName = "awaited" // holds the Lease for the address that Await waits for
	watchName   = "watch"   // holds a watchRecord
	addressName = "address-"
)

// prefix returns the delegated prefix, or the zero Prefix.
func (m memory) prefix() (p netip.Prefix) {
	if m.Read(prefixName, &p) != nil { // the next renewal writes it again
		return netip.Prefix{}
	}
	return p
}

// addAddress remembers an address that is held, so that ReleaseAll finds it when the link is gone.
func (m memory) addAddress(addr netip.Addr) error {
	name := addressName + addr.String()
	if m.Dir == "" {
		return nil
	}
	if _, err := os.Lstat(m.Path(name)); err == nil {
		return nil
	}
	if err := m.forgetOldest(); err != nil {
		return err
	}
	return m.Write(name, struct{}{})
}

func (m memory) removeAddress(addr netip.Addr) error { return m.Remove(addressName + addr.String()) }

// addresses returns the addresses that were held and not released.
func (m memory) addresses() ([]netip.Addr, error) {
	entries, err := m.entries()
	var addrs []netip.Addr
	for _, entry := range entries {
		if addr, err := netip.ParseAddr(strings.TrimPrefix(entry.Name(), addressName)); err == nil {
			addrs = append(addrs, addr)
		}
	}
	return addrs, err
}

func (m memory) entries() ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(string(m.Dir))
	if m.Dir == "" || errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return !strings.HasPrefix(e.Name(), addressName) }), err
}

// forgetOldest makes room for one address more. A router may announce new prefixes for years, and the
// holders of old addresses have ended by themselves.
func (m memory) forgetOldest() error {
	entries, err := m.entries()
	if err != nil || len(entries) < maxAddresses {
		return err
	}
	age := func(e fs.DirEntry) int64 {
		info, err := e.Info()
		if err != nil {
			return 0
		}
		return info.ModTime().UnixNano()
	}
	oldest := slices.MinFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(age(a), age(b)) })
	return m.Remove(oldest.Name())
}

// watchRecord names a process that watches the link.
type watchRecord struct {
	PID     int    `json:"pid"`
	Started uint64 `json:"started"` // see process
}

func (m memory) watchRead() (w watchRecord, err error) {
	err = m.Read(watchName, &w)
	return w, err
}

// watch returns the watch for the link, which the caller closes, if the process runs.
func (m memory) watch() (process, bool) {
	w, err := m.watchRead()
	if err != nil {
		return process{}, false
	}
	p, err := openProcess(w.PID)
	if err != nil {
		return process{}, false
	}
	if p.started != w.Started {
		p.close()
		return process{}, false
	}
	return p, true
}

func (m memory) setWatch(pid int) error {
	p, err := openProcess(pid)
	if err != nil {
		return fmt.Errorf("remember the watch for %s: %w", m.ifname, err)
	}
	defer p.close()
	return m.Write(watchName, watchRecord{pid, p.started})
}

// takeOver moves what hooks of the version before wrote about the link into files of this version.
func (m memory) takeOver() error {
	if m.Dir == "" {
		return nil
	}
	return errors.Join(
		m.takeFile("prefix."+m.ifname, func(text string) error {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return err
			}
			return m.Write(prefixName, p)
		}),
		m.takeFile("watch."+m.ifname+".pid", func(text string) error {
			pid, err := strconv.Atoi(text)
			if err != nil {
				return err
			}
			p, err := openProcess(pid)
			if err != nil {
				// The watch was killed: EndWatch cleans up behind it.
				return m.Write(watchName, watchRecord{PID: pid})
			}
			defer p.close()
			if !slices.Contains(p.args(), "watch") || !slices.Contains(p.args(), m.ifname) {
				return m.Write(watchName, watchRecord{PID: pid})
			}
			return m.Write(watchName, watchRecord{pid, p.started})
		}))
}

func (m memory) takeFile(name string, take func(text string) error) error {
	path := filepath.Join(remember.Root, name)
	f, err := remember.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		defer f.Close()
		var text []byte
		if text, err = io.ReadAll(io.LimitReader(f, maxValue)); err == nil {
			err = take(strings.TrimSpace(string(text)))
		}
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return errors.Join(err, os.Remove(path))
}
