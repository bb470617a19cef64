package server

import (
	"context"
	"reflect"
	"slices"
	"strings"
)

// Reload is the configuration as it is read while the server runs, or why it cannot be read.
type Reload struct {
	Config Config
	Err    error
}

// followReloads takes over configurations until ctx ends.
func (s *server) followReloads(ctx context.Context, reloads <-chan Reload) {
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-reloads:
			if r.Err != nil {
				s.log.Error("cannot read the configuration, the old one stays in force", "err", r.Err)
				continue
			}
			s.reconfigure(r.Config)
		}
	}
}

// reconfigure takes over a configuration, all of it or nothing: names of sockets, the pools and the bits of marks are
// in use, and cannot change.
func (s *server) reconfigure(cfg Config) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed, fixed := s.cfg.difference(cfg)
	switch {
	case len(fixed) > 0:
		s.log.Error("cannot take over the configuration, the old one stays in force: these keys change when the server is restarted",
			"keys", strings.Join(fixed, " "))
		return
	case len(changed) == 0:
		s.log.Info("the configuration is read again, nothing has changed")
		return
	}
	s.cfg, s.timeout = cfg, cfg.Timeout
	s.access.permit(cfg)
	s.leases.SetLimits(cfg.limits())
	s.arm()
	s.changeNames()
	s.log.Info("the configuration is read again", "changed", strings.Join(changed, " "))
}

// difference returns the keys that other has with another value: those that can change while the server runs, and
// those that cannot.
func (c *Config) difference(other Config) (changed, fixed []string) {
	for _, key := range []struct {
		name      string
		fixed     bool
		have, get any
	}{
		{"socket_path", true, c.SocketName, other.SocketName},
		{"table_offset", true, c.FirstTable, other.FirstTable},
		{"num_tables", true, c.Tables, other.Tables},
		{"db_path", true, c.Database, other.Database},
		{"addr_families", true, slices.Sorted(slices.Values(c.Families)), slices.Sorted(slices.Values(other.Families))},
		{"do_syslog", true, c.Syslog, other.Syslog},
		{"log_path", true, c.LogPath, other.LogPath},
		{"bind_mark_mask", true, c.Marking.mask, other.Marking.mask},
		{"bind_priority", true, c.Marking.block, other.Marking.block},
		{"bind_fallback_priority", true, c.Marking.fallback, other.Marking.fallback},
		{"table_timeout", false, c.Timeout, other.Timeout},
		{"allowed_users", false, sorted(c.AllowedUIDs), sorted(other.AllowedUIDs)},
		{"allowed_groups", false, sorted(c.AllowedGIDs), sorted(other.AllowedGIDs)},
		{"root_tables", false, c.rootTables(), other.rootTables()},
		{"user_tables", false, c.UserTables, other.UserTables},
		{"table_names", false, c.TableNames, other.TableNames},
	} {
		switch {
		case reflect.DeepEqual(key.have, key.get):
		case key.fixed:
			fixed = append(fixed, key.name)
		default:
			changed = append(changed, key.name)
		}
	}
	return changed, fixed
}

func sorted(ids []uint32) []uint32 { return slices.Sorted(slices.Values(ids)) }
