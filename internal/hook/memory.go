package hook

import (
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
	presentName = "present" // holds the Lease for the addresses that AwaitPresent waits for
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
	files, err := m.files()
	if err != nil || slices.ContainsFunc(files, func(f fs.FileInfo) bool { return f.Name() == name }) {
		return err
	}
	if err := m.forgetOldest(files); err != nil {
		return err
	}
	return m.Write(name, struct{}{})
}

func (m memory) removeAddress(addr netip.Addr) error { return m.Remove(addressName + addr.String()) }

// addresses returns the addresses that were held and not released.
func (m memory) addresses() ([]netip.Addr, error) {
	files, err := m.files()
	var addrs []netip.Addr
	for _, f := range files {
		if addr, err := netip.ParseAddr(strings.TrimPrefix(f.Name(), addressName)); err == nil {
			addrs = append(addrs, addr)
		}
	}
	return addrs, err
}

// files are those of addresses.
func (m memory) files() ([]fs.FileInfo, error) {
	if m.Dir == "" {
		return nil, nil
	}
	files, err := m.Files()
	return slices.DeleteFunc(files, func(f fs.FileInfo) bool { return !strings.HasPrefix(f.Name(), addressName) }), err
}

// forgetOldest makes room for one address more. A router may announce new prefixes for years, and the
// holders of old addresses have ended by themselves.
func (m memory) forgetOldest(files []fs.FileInfo) error {
	if len(files) < maxAddresses {
		return nil
	}
	oldest := slices.MinFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
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
	text, err := remember.Ask(func() ([]byte, error) {
		f, err := remember.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		text, err := io.ReadAll(io.LimitReader(f, maxValue))
		return text, errors.Join(err, os.Remove(path))
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = take(strings.TrimSpace(string(text)))
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return err
}
