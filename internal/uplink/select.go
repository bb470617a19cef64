package uplink

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path"
	"path/filepath"
	"slices"

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
	NoUnbound  bool // nor is the uplink chosen for unbound traffic
	Cgroup     bool // there is a cgroup whose processes are bound to the link
	Forward    bool
	NoReplies  bool // replies leave as main has it, whatever ReplyByUplink says
	Settings   Settings
	Traits     Traits
}

// Traits are what a profile says of its links as uplinks for traffic that is bound to none.
type Traits struct {
	Rank    int  // lower is better
	Metered bool // used if no other works, and probed rarely
	NoProbe bool // taken for one that works
}

// HasCgroup reports whether a link has a cgroup: that of the first profile that names it.
func (c Selection) HasCgroup(ifname string) bool {
	at := slices.IndexFunc(c.Profiles, func(p Profile) bool { return c.Fits(p.Ifname, ifname) })
	return at >= 0 && c.Profiles[at].Cgroup && !c.Excludes(ifname)
}

// Traits returns those of a link.
func (c Selection) Traits(ifname string, family wire.Family) Traits {
	for _, p := range c.Profiles {
		if c.Fits(p.Ifname, ifname) && slices.Contains(p.Families, family) {
			return p.Traits
		}
	}
	return Traits{}
}

// Selection says which addresses of the host are served, and how.
type Selection struct {
	Profiles []Profile  // the first whose pattern a link's name has counts
	Exclude  []string   // patterns of links to leave alone, before any profile
	Others   OtherNames // of the links of this host
	// ReplyByUplink: replies that have no source when their route is chosen leave by the uplink that was asked.
	ReplyByUplink bool
}

// DefaultExclude are patterns of links that are left alone whatever they are.
var DefaultExclude = []string{"lo"}

// DefaultProfile copies routes, which takes nothing from anybody.
func DefaultProfile() Profile {
	return Profile{
		Ifname:     "*",
		Families:   []wire.Family{wire.Inet, wire.Inet6},
		Priorities: OriginalPriorities,
		Settings:   Settings{Routes: CopyRoutes, OnLoss: Fallback, ServersFile: DefaultServersFile},
	}
}

// Validate checks the patterns and the profiles.
func (c Selection) Validate() error {
	if len(c.Profiles) == 0 {
		return errors.New("links: none, so nothing would be served")
	}
	for _, pattern := range c.Exclude {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("exclude %q: %w", pattern, err)
		}
	}
	for _, p := range c.Profiles {
		if err := p.Validate(); err != nil {
			return fmt.Errorf("links %q: %w", p.Ifname, err)
		}
	}
	return nil
}

// Validate checks one profile.
func (p Profile) Validate() error {
	if _, err := path.Match(p.Ifname, ""); err != nil || p.Ifname == "" {
		return errors.New("ifname is not a pattern like wan*")
	}
	if err := wire.CheckTag(p.Tag); err != nil {
		return err
	}
	if p.Priorities.Source < 3 || p.Priorities.Network == 0 || p.Priorities.Unbound == 0 || p.Priorities.Source > math.MaxUint32-behindHosts {
		return errors.New("priority: want numbers above 0, and for the source rule above 2 and below 4294967293")
	}
	if p.Priorities.Unbound >= ChoicePriority-1 && p.Priorities.Unbound <= ChoicePriority+1 {
		return fmt.Errorf("priority: %d to %d are not for unbound rules, since the choice of an uplink has its rules there", ChoicePriority-1, ChoicePriority+1)
	}
	if p.Settings.SpecificFirst && p.Priorities.Source < leastMainFirst {
		return fmt.Errorf("priority: want at least %d for the source rule, since specific_first has rules before it", leastMainFirst)
	}
	if p.Settings.ServersFile != "" && !filepath.IsAbs(p.Settings.ServersFile) {
		return errors.New("dnsmasq_servers is no absolute path")
	}
	return p.Settings.Validate()
}

// Reselect is Uplink for an address that is served already.
func (c Selection) Reselect(u Uplink, ifname string) (Uplink, bool) {
	told, ok := c.Uplink(route.Address{Addr: u.Addr()}, ifname)
	told.Network = u.Network
	return told, ok
}

// Excludes reports whether the selection leaves a link alone by its name.
func (c Selection) Excludes(ifname string) bool {
	return slices.ContainsFunc(c.Exclude, func(pattern string) bool { return c.Fits(pattern, ifname) })
}

// Wants reports whether addresses of a link are worth a first lease. The configuration may name the link. Else the
// link has to be one that can lead to other networks, and in any case it is up and not left to a VRF.
func (c Selection) Wants(l Link) bool {
	return l.Up && !l.LeftToVRF() && (c.Names(l.Name) || l.Default || !l.internal())
}

// Serves reports whether addresses of a link get leases.
func (c Selection) Serves(l Link) bool {
	return !c.Excludes(l.Name) && c.Wants(l) && slices.ContainsFunc(c.Profiles, func(p Profile) bool { return c.Fits(p.Ifname, l.Name) })
}

// Names reports whether a profile is for links of this name, and not for all.
func (c Selection) Names(ifname string) bool {
	return slices.ContainsFunc(c.Profiles, func(p Profile) bool { return p.Ifname != "*" && c.Fits(p.Ifname, ifname) })
}

// Fits reports whether a pattern is one for the name of a link, or for an alternative name of it.
func (c Selection) Fits(pattern, ifname string) bool {
	matches := func(name string) bool {
		ok, err := path.Match(pattern, name)
		return err == nil && ok // patterns are checked when they are read
	}
	return matches(ifname) || slices.ContainsFunc(c.Others[ifname], matches)
}

// Uplink is what the selection wants for an address of a link, if it wants anything. Whether packets from a link-local address of
// IPv4 can leave, Leaves tells.
func (c Selection) Uplink(a route.Address, ifname string) (Uplink, bool) {
	family := wire.Inet6
	if a.Addr.Is4() {
		family = wire.Inet
	}
	if !a.Addr.IsGlobalUnicast() && !IsLinkLocal4(a.Addr) || a.DADFailed() || ifname == "" || len(ifname) > wire.MaxIfname {
		return Uplink{}, false
	}
	if c.Excludes(ifname) {
		return Uplink{}, false
	}
	for _, p := range c.Profiles {
		if !c.Fits(p.Ifname, ifname) {
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
			NoUnbound:  p.NoUnbound,
			Forward:    p.Forward,
			Replies:    c.ReplyByUplink && !p.NoReplies,
			Settings:   settings,
		}, true
	}
	return Uplink{}, false
}
