package client

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// told is what a hook told a watch about an address: gateways, resolvers, a prefix. The kernel shows
// what became of that, and not what of it a hook had said, so a watch that was killed would lose it.
// Each key has a file.
type told struct {
	// Link and Created tell the address from one that came later: its link and when it was
	// put there, in hundredths of seconds since the boot.
	Link     int    `json:"link"`
	Created  uint32 `json:"created"`
	Tag      string `json:"tag"`
	Settings string `json:"settings"` // as a Replace carries them
	Profile  string `json:"profile"`  // the settings of the profile at that time
}

const staleTemp = time.Minute // a file that is being written is younger

// memory is the directory of a network namespace; "" is none.
type memory struct{ remember.Dir }

// ownMemory is that of the namespace that this process is in. Its inode number may be
// another's later, while no other has an address on the same link since the same moment.
func ownMemory() (memory, error) {
	dir, err := remember.Own("told")
	return memory{dir}, err
}

func (m memory) path(key wire.Key) string { return m.Path(wire.HolderName(key)) }

// write keeps what was told about key.
func (m memory) write(key wire.Key, t told) error { return m.Write(wire.HolderName(key), t) }

// read returns what was told about key; fs.ErrNotExist says that there is nothing.
func (m memory) read(key wire.Key) (t told, err error) {
	err = m.Read(wire.HolderName(key), &t)
	return t, err
}

func (m memory) remove(key wire.Key) error { return m.Remove(wire.HolderName(key)) }

// stale are the names of files that belong to no key that is held, by this process or by
// another one.
func (m memory) stale(held []string, now time.Time) ([]string, error) {
	entries, err := os.ReadDir(string(m.Dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			if info, err := e.Info(); err != nil || now.Sub(info.ModTime()) < staleTemp {
				continue
			}
		}
		if !slices.Contains(held, e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// keep writes down what a hook told about the address of a session, for the next watch.
func (l *loop) keep(s *session) {
	if l.watch == nil || !s.hooked || s.lease.state == releasing || s.lease.state == done {
		return
	}
	profile, ok := l.watch.config.Reselect(s.lease.uplink, s.lease.uplink.Key.Ifname)
	if !ok {
		return
	}
	settings, err := s.lease.uplink.Settings.Encode()
	under, underErr := profile.Settings.Encode()
	if err = errors.Join(err, underErr); err == nil {
		err = l.watch.memory.write(s.lease.uplink.Key,
			told{Link: s.inst.Index, Created: s.created, Tag: s.lease.uplink.Tag, Settings: string(settings), Profile: string(under)})
	}
	s.warn("keep what a hook told for the next watch", err)
}

// recall gives an address that is new to this watch what a hook told the one before.
func (l *loop) recall(s *session) {
	key := s.lease.uplink.Key
	memory := l.watch.memory
	t, err := memory.read(key)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var settings uplink.Settings
	if err == nil {
		settings, err = uplink.DecodeSettings([]byte(t.Settings))
	}
	if err == nil {
		err = wire.CheckTag(t.Tag)
	}
	var profile []byte
	if err == nil {
		profile, err = s.lease.uplink.Settings.Encode()
	}
	if err != nil || t.Link != s.inst.Index || t.Created != s.created {
		err = errors.Join(err, memory.remove(key), l.env.RemoveServers(uplink.Uplink{Key: key, Settings: settings}))
		s.warn("take over what a hook told the last watch", err)
		return
	}
	s.hooked = true
	if string(profile) == t.Profile {
		s.lease.uplink.Tag, s.lease.uplink.Settings = t.Tag, settings
	} else {
		s.lease.uplink.Settings = settings.Under(s.lease.uplink.Settings)
	}
	s.inst.Uplink, s.inst.Rules.Uplink = s.lease.uplink, s.lease.uplink
	s.log.Info("told by a hook before", "tag", s.lease.uplink.Tag, "settings", fmt.Sprintf("%+v", s.lease.uplink.Settings))
}

// unlearn drops what was told about a key that has no session any more.
func (l *loop) unlearn(s *session) {
	if s.hooked {
		s.warn("drop what a hook told", l.watch.memory.remove(s.lease.uplink.Key))
	}
}

// forgetStale drops what was told about addresses that went while nobody looked.
func (l *loop) forgetStale(held []string) error {
	memory := l.watch.memory
	names, err := memory.stale(held, time.Now())
	for _, name := range names {
		err = errors.Join(err, memory.Remove(name))
	}
	return err
}

// forgetServers takes out the resolver lines of an address that went while nobody looked.
func (l *loop) forgetServers(addr netip.Addr) error {
	var errs []error
	for _, p := range l.watch.config.Profiles {
		errs = append(errs, l.env.RemoveServers(uplink.Uplink{Key: wire.Key{Address: addr.String()}, Settings: p.Settings}))
	}
	return errors.Join(errs...)
}
