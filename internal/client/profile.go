package client

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// WatchConfig says what a watch serves, and where its server is.
type WatchConfig struct {
	uplink.Selection
	Server     string
	ServerUIDs []uint32

	ReconcileEvery time.Duration // 0: DefaultReconcile
	// MaxRoutes is how many routes of routing daemons are carried over into each table, as read at the start; 0:
	// DefaultMaxRoutes.
	MaxRoutes int

	Probes      *ProbeConfig // nil: nothing is probed
	Ready       func()       // is called once the watch listens to the kernel; nil: nobody waits
	Alive       func()       // is called within each AlivePeriod, as long as the loop comes round; nil: nobody wants to know
	AlivePeriod time.Duration
}

// DefaultMaxRoutes is a fifth of the Internet's IPv4 routes. The table of an address that has its default routes
// needs no more.
const DefaultMaxRoutes = 200_000

// LoadWatchConfig reads a file: "links", a list of profiles, "exclude", "reconcile_seconds",
// "reply_by_uplink" and "socket_path", in the manner of the server's. base is what the file does not say.
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
		c.Profiles = nil
		return jsonc.EachElement(key, value, "a list of objects", func(i int, entry []byte) error {
			p, err := parseProfile(fmt.Sprintf("links[%d]", i), entry)
			c.Profiles = append(c.Profiles, p)
			return err
		})
	case "exclude":
		c.Exclude = nil // not into the array of base, which the next reload begins with
		return jsonc.Decode(key, value, &c.Exclude, "a list of patterns")
	case "reconcile_seconds":
		var seconds uint32
		err := jsonc.Decode(key, value, &seconds, "seconds, at least 1")
		if err == nil && seconds == 0 {
			err = fmt.Errorf("%s: want at least 1", key)
		}
		c.ReconcileEvery = time.Duration(seconds) * time.Second
		return err
	case "max_routes":
		var n uint32
		err := jsonc.Decode(key, value, &n, "a number of routes, at least 1")
		if err == nil && (n == 0 || n > 1<<30) {
			err = fmt.Errorf("%s: want 1 to %d", key, 1<<30)
		}
		c.MaxRoutes = int(n)
		return err
	case "reply_by_uplink":
		return jsonc.Decode(key, value, &c.ReplyByUplink, "true or false")
	case "probe":
		var err error
		c.Probes, err = parseProbes(key, value)
		return err
	case "socket_path":
		return jsonc.Decode(key, value, &c.Server, "a string")
	}
	return fmt.Errorf("%s: unknown key (there are links, exclude, reconcile_seconds, max_routes, probe, reply_by_uplink and socket_path)", key)
}

func parseProfile(name string, text []byte) (uplink.Profile, error) {
	p, unbound, replies := uplink.DefaultProfile(), true, true
	type field struct {
		into any
		want string
	}
	fields := map[string]field{
		"ifname":          {&p.Ifname, "a pattern"},
		"tag":             {&p.Tag, "a string"},
		"table":           {&p.Want, "the number of a table"},
		"no_network_rule": {&p.NoNetwork, "true or false"},
		"forward":         {&p.Forward, "true or false"},
		"routes":          {&p.Settings.Routes, "none, move or copy"},
		"on_loss":         {&p.Settings.OnLoss, "fallback or block"},
		"specific_first":  {&p.Settings.SpecificFirst, "true or false"},
		"own_link_only":   {&p.Settings.OwnLinkOnly, "true or false"},
		"unbound":         {&unbound, "true or false"},
		"reply_by_uplink": {&replies, "true or false"},
		"cgroup":          {&p.Cgroup, "true or false"},
		"mptcp":           {&p.Settings.MPTCP, "true or false"},
		"nameservers":     {&p.Settings.Nameservers, "a list of addresses"},
		"resolver":        {&p.Settings.Resolver, "dnsmasq, resolved or none"},
		"dnsmasq_servers": {&p.Settings.ServersFile, "a path"},
		"rank":            {&p.Traits.Rank, "a number, of which lower is better"},
		"metered":         {&p.Traits.Metered, "true or false"},
	}
	err := jsonc.Each(text, func(key string, value []byte) error {
		full := name + "." + key
		switch f, ok := fields[key]; {
		case ok:
			return jsonc.Decode(full, value, f.into, f.want)
		case key == "probe":
			probed := true
			err := jsonc.Decode(full, value, &probed, "true or false")
			p.Traits.NoProbe = !probed
			return err
		case key == "families":
			return parseFamilies(full, value, &p.Families)
		case key == "priority":
			return parsePriorities(full, value, &p.Priorities)
		}
		known := append(slices.Sorted(maps.Keys(fields)), "families", "priority", "probe")
		return fmt.Errorf("%s: unknown key (there are %s)", full, strings.Join(known, ", "))
	})
	if err != nil {
		return p, err
	}
	p.NoUnbound, p.NoReplies = !unbound, !replies
	if err := p.Validate(); err != nil {
		return p, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

func parsePriorities(key string, value []byte, into *uplink.Priorities) error {
	var n []uint32
	const want = "three numbers"
	if err := jsonc.Decode(key, value, &n, want); err != nil {
		return err
	}
	if len(n) != 3 {
		return fmt.Errorf("%s: want %s, have %d", key, want, len(n))
	}
	*into = uplink.Priorities{Source: n[0], Network: n[1], Unbound: n[2]}
	return nil
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
	return c.Selection.Validate()
}
