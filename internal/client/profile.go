package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Profile is what a watch wants for the addresses of some links.
type Profile struct {
	Ifname     string // pattern of path.Match
	Families   []wire.Family
	Tag        string
	Want       uint32 // the table to ask for, which one address can have; 0: any
	Priorities Priorities
	NoNetwork  bool
	Forward    bool
	Settings   Settings
}

// WatchConfig says which addresses of the host a watch serves, and how.
type WatchConfig struct {
	Server     string
	ServerUIDs []uint32
	Profiles   []Profile // the first whose pattern a link's name has counts
	Exclude    []string  // patterns of links to leave alone, before any profile

	ReconcileEvery time.Duration // 0: DefaultReconcile
}

// DefaultExclude are links that lead to this host itself or to its containers, and
// tunnels whose programs have rules of their own.
var DefaultExclude = []string{"lo", "docker*", "br-*", "veth*", "virbr*", "vnet*", "lxc*", "lxdbr*", "cni*", "cali*",
	"flannel*", "podman*", "tailscale*", "ifb*", "dummy*"}

// DefaultProfile copies routes, which takes nothing from anybody.
func DefaultProfile() Profile {
	return Profile{
		Ifname:     "*",
		Families:   []wire.Family{wire.Inet, wire.Inet6},
		Priorities: OriginalPriorities,
		Settings:   Settings{Routes: CopyRoutes, OnLoss: Fallback, ServersFile: DefaultServersFile},
	}
}

// LoadWatchConfig reads a file: "links", a list of profiles, "exclude", "reconcile_seconds"
// and "socket_path", in the manner of the server's. base is what the file does not say.
func LoadWatchConfig(file string, base WatchConfig) (WatchConfig, error) {
	cfg := base
	if err := jsonc.Load(file, cfg.set); err != nil {
		return cfg, err
	}
	if err := cfg.Validate(); err != nil {
		return cfg, fmt.Errorf("configuration %s: %w", file, err)
	}
	return cfg, nil
}

func (c *WatchConfig) set(key string, value []byte) error {
	switch key {
	case "links":
		var list []json.RawMessage
		if err := jsonc.Decode(key, value, &list, "a list of objects"); err != nil {
			return err
		}
		c.Profiles = nil
		for i, entry := range list {
			p, err := parseProfile(fmt.Sprintf("links[%d]", i), entry)
			if err != nil {
				return err
			}
			c.Profiles = append(c.Profiles, p)
		}
		return nil
	case "exclude":
		c.Exclude = nil // not into the array of base, which the next reading begins with
		return jsonc.Decode(key, value, &c.Exclude, "a list of patterns")
	case "reconcile_seconds":
		var seconds uint32
		err := jsonc.Decode(key, value, &seconds, "seconds, at least 1")
		if err == nil && seconds == 0 {
			err = fmt.Errorf("%s: want at least 1", key)
		}
		c.ReconcileEvery = time.Duration(seconds) * time.Second
		return err
	case "socket_path":
		return jsonc.Decode(key, value, &c.Server, "a string")
	}
	return fmt.Errorf("%s: unknown key (there are links, exclude, reconcile_seconds and socket_path)", key)
}

func parseProfile(name string, text []byte) (Profile, error) {
	p := DefaultProfile()
	err := jsonc.Each(text, func(key string, value []byte) error {
		full := name + "." + key
		switch key {
		case "ifname":
			return jsonc.Decode(full, value, &p.Ifname, "a pattern")
		case "families":
			return parseFamilies(full, value, &p.Families)
		case "tag":
			return jsonc.Decode(full, value, &p.Tag, "a string")
		case "table":
			return jsonc.Decode(full, value, &p.Want, "the number of a table")
		case "priority":
			var n []uint32
			const want = "three numbers"
			if err := jsonc.Decode(full, value, &n, want); err != nil {
				return err
			}
			if len(n) != 3 {
				return fmt.Errorf("%s: want %s, have %d", full, want, len(n))
			}
			p.Priorities = Priorities{n[0], n[1], n[2]}
			return nil
		case "no_network_rule":
			return jsonc.Decode(full, value, &p.NoNetwork, "true or false")
		case "forward":
			return jsonc.Decode(full, value, &p.Forward, "true or false")
		case "routes":
			return jsonc.Decode(full, value, &p.Settings.Routes, "none, move or copy")
		case "on_loss":
			return jsonc.Decode(full, value, &p.Settings.OnLoss, "fallback or block")
		case "specific_first":
			return jsonc.Decode(full, value, &p.Settings.SpecificFirst, "true or false")
		case "nameservers":
			return jsonc.Decode(full, value, &p.Settings.Nameservers, "a list of addresses")
		case "dnsmasq_servers":
			return jsonc.Decode(full, value, &p.Settings.ServersFile, "a path")
		}
		return fmt.Errorf("%s: unknown key", full)
	})
	if err != nil {
		return p, err
	}
	if err := p.validate(); err != nil {
		return p, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

func parseFamilies(key string, value []byte, into *[]wire.Family) error {
	var names []string
	const want = `a list of "inet" and "inet6"`
	if err := jsonc.Decode(key, value, &names, want); err != nil {
		return err
	}
	*into = nil
	for _, name := range names {
		switch name {
		case wire.Inet.String():
			*into = append(*into, wire.Inet)
		case wire.Inet6.String():
			*into = append(*into, wire.Inet6)
		default:
			return fmt.Errorf("%s: want %s, have %q", key, want, name)
		}
	}
	return nil
}

// Validate checks what flags or a file brought.
func (c WatchConfig) Validate() error {
	if _, err := wire.Padded(c.Server); err != nil {
		return fmt.Errorf("socket_path: %w", err)
	}
	if len(c.Profiles) == 0 {
		return errors.New("links: none, so nothing would be served")
	}
	for _, pattern := range c.Exclude {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("exclude %q: %w", pattern, err)
		}
	}
	for _, p := range c.Profiles {
		if err := p.validate(); err != nil {
			return fmt.Errorf("links %q: %w", p.Ifname, err)
		}
	}
	return nil
}

func (p Profile) validate() error {
	if _, err := path.Match(p.Ifname, ""); err != nil || p.Ifname == "" {
		return errors.New("ifname is not a pattern like wan*")
	}
	if err := wire.CheckTag(p.Tag); err != nil {
		return err
	}
	if p.Priorities.Source < 3 || p.Priorities.Network == 0 || p.Priorities.Unbound == 0 || p.Priorities.Source == 1<<32-1 {
		return errors.New("priority: want numbers above 0, and above 2 for the source rule")
	}
	if p.Settings.ServersFile != "" && !filepath.IsAbs(p.Settings.ServersFile) {
		return errors.New("dnsmasq_servers is no absolute path")
	}
	return p.Settings.Validate()
}

// uplinkOf is uplink for an address that is served already.
func (c WatchConfig) uplinkOf(u Uplink, ifname string) (Uplink, bool) {
	told, ok := c.uplink(route.Address{Addr: u.addr()}, ifname)
	told.Network = u.Network
	return told, ok
}

// uplink is what the watch wants for an address of a link, if it wants anything.
func (c WatchConfig) uplink(a route.Address, ifname string) (Uplink, bool) {
	family := wire.Inet6
	if a.Addr.Is4() {
		family = wire.Inet
	}
	if !a.Addr.IsGlobalUnicast() || a.DADFailed() || ifname == "" || len(ifname) > wire.MaxIfname {
		return Uplink{}, false
	}
	matches := func(pattern string) bool {
		ok, err := path.Match(pattern, ifname)
		return err == nil && ok // patterns are checked when they are read
	}
	if slices.ContainsFunc(c.Exclude, matches) {
		return Uplink{}, false
	}
	for _, p := range c.Profiles {
		if !matches(p.Ifname) {
			continue
		}
		if !slices.Contains(p.Families, family) {
			return Uplink{}, false
		}
		settings := p.Settings
		settings.Nameservers = slices.DeleteFunc(slices.Clone(settings.Nameservers), func(n netip.Addr) bool {
			return n.Is4() != a.Addr.Is4()
		})
		return Uplink{
			Key:        wire.Key{Family: family, Ifname: ifname, Address: a.Addr.String()},
			Network:    a.Network(),
			Tag:        p.Tag,
			Want:       p.Want,
			Priorities: p.Priorities,
			NoNetwork:  p.NoNetwork,
			Forward:    p.Forward,
			Settings:   settings,
		}, true
	}
	return Uplink{}, false
}
