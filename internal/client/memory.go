package client

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// remembered is what a hook said to a watch about an address: gateways, resolvers, a prefix. A watch that was killed
// could not read it from the kernel, which shows what was made of it. Each key has a file.
type remembered struct {
	// Link and Created are the address's ifindex and when it was added, in hundredths of seconds since the boot. An
	// address that was added later is another one, and so is one of another network namespace with the same number.
	Link     int    `json:"link"`
	Created  uint32 `json:"created"`
	Tag      string `json:"tag"`
	Settings string `json:"settings"` // as a Replace carries them
	Profile  string `json:"profile"`  // the settings of the profile at that time
}

const staleTemp = time.Minute // a temporary file that is still being written is younger

// staleNames are the names of files whose keys no process holds. held are those that a process holds.
func staleNames(dir remember.Dir, held []string, now time.Time) ([]string, error) {
	files, err := dir.Files()
	var names []string
	for _, e := range files {
		if strings.HasPrefix(e.Name(), ".") && now.Sub(e.ModTime()) < staleTemp {
			continue
		}
		if !slices.Contains(held, e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// saveSettings saves what a hook said about the address of a session, for the next watch.
func (h *host) saveSettings(s *session) {
	if !s.hooked || s.lease.state == releasing || s.lease.state == done {
		return
	}
	u := s.lease.uplink
	profile, ok := h.config.Reselect(u, u.Key.Ifname)
	if !ok {
		return
	}
	settings, err := u.Settings.Encode()
	under, underErr := profile.Settings.Encode()
	now := remembered{Link: s.inst.Index, Created: s.created, Tag: u.Tag, Settings: string(settings), Profile: string(under)}
	if now == s.saved {
		return
	}
	if err = errors.Join(err, underErr); err == nil {
		err = h.memory.Write(u.Key.String(), now)
	}
	if err == nil {
		s.saved = now
	}
	s.warn("save what a hook said for the next watch", err)
}

// loadSettings returns an uplink with what a hook said to the last watch about its address, and what that was.
func (h *host) loadSettings(u uplink.Uplink, a route.Address, log *slog.Logger) (uplink.Uplink, remembered) {
	var t remembered
	err := h.memory.Read(u.Key.String(), &t)
	if errors.Is(err, fs.ErrNotExist) {
		return u, remembered{}
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
		profile, err = u.Settings.Encode()
	}
	if err != nil || t.Link != a.Index || t.Created != a.Created {
		err = errors.Join(err, h.memory.Remove(u.Key.String()), h.env.RemoveServers(uplink.Uplink{Key: u.Key, Settings: settings}))
		if err != nil {
			log.Warn("cannot load what a hook said to the last watch", "err", err)
		}
		return u, remembered{}
	}
	settings.ServersFile, settings.PIDFile = u.Settings.ServersFile, u.Settings.PIDFile
	if string(profile) == t.Profile {
		u.Tag, u.Settings = t.Tag, settings
	} else {
		u.Settings = settings.Under(u.Settings)
	}
	log.Info("settings of a hook loaded", "tag", u.Tag, "settings", u.Settings.String())
	return u, t
}

// dropSettings deletes what is remembered of a session that is over.
func (h *host) dropSettings(s *session) {
	if s.hooked {
		s.warn("drop the settings of a hook", h.memory.Remove(s.lease.uplink.Key.String()))
	}
}

// dropStale deletes what is remembered of addresses that were deleted while no watch ran. held are names of holders; a holder
// that has come since may have written a file, and is there now.
func (h *host) dropStale(held []string) error {
	names, err := staleNames(h.memory, held, time.Now())
	if err != nil || len(names) == 0 {
		return err
	}
	if held, err = peer.HolderNames(); err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if !slices.Contains(held, name) {
			errs = append(errs, h.memory.Remove(name))
		}
	}
	return errors.Join(errs...)
}

// removeServers removes the resolver lines of an address that was deleted while no watch ran.
func (h *host) removeServers(addr netip.Addr) error {
	var errs []error
	for _, p := range h.config.Profiles {
		errs = append(errs, h.env.RemoveServers(uplink.Uplink{Key: wire.Key{Address: addr.String()}, Settings: p.Settings}))
	}
	return errors.Join(errs...)
}
