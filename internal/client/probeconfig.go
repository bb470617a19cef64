package client

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/onchange"
	"github.com/table-allocator/table-allocator/internal/probe"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// ProbeConfig says how uplinks are probed, and what is done with the choice.
type ProbeConfig struct {
	probe.Plan
	choice.Numbers
	Unbound  Unbound
	Reset    Reset
	OnChange string // the path of a program that is executed for each change; "": none
}

// Unbound says what leads unbound traffic to the chosen uplink.
type Unbound string

// The values of Unbound.
const (
	UnboundAuto Unbound = "auto" // the rule, and a route in main if that keeps a default route
	UnboundRule Unbound = "rule" // the rule only
	UnboundMain Unbound = "main" // the route only
	UnboundOff  Unbound = "off"  // nothing
)

// Reset says which connections are cut when unbound traffic leaves an uplink.
type Reset string

// The values of Reset.
const (
	ResetNever Reset = "never"
	ResetDead  Reset = "dead" // those of an uplink that is dead or has no carrier, if the new one works
)

// DefaultProbes is what an empty "probe" means.
func DefaultProbes() ProbeConfig {
	return ProbeConfig{Plan: probe.Plan{Kinds: probe.DefaultKinds}, Numbers: choice.Default(), Unbound: UnboundAuto, Reset: ResetNever}
}

// maxTargets bounds the list of targets.
const maxTargets = 16

func parseProbes(name string, text []byte) (*ProbeConfig, error) {
	c := DefaultProbes()
	seconds := map[string]*time.Duration{
		"interval": &c.Interval, "standby": &c.Standby, "metered": &c.Metered, "suspect": &c.Suspect, "timeout": &c.Timeout,
		"hold": &c.Hold, "hold_max": &c.HoldMax, "portal_every": &c.PortalEvery,
	}
	counts := map[string]*int{"down": &c.Down, "up": &c.Up, "degraded_at": &c.DegradedAt, "cleared_at": &c.ClearedAt}
	others := map[string]func(key string, value []byte) error{
		"targets":    c.parseTargets,
		"kinds":      c.parseKinds,
		"portal_url": c.parsePage,
		"unbound":    c.parseUnbound,
		"reset":      c.parseReset,
		"on_change":  c.parseOnChange,
	}
	err := jsonc.Each(text, func(key string, value []byte) error {
		full := name + "." + key
		if into := seconds[key]; into != nil {
			return parseSeconds(full, value, into)
		}
		if into := counts[key]; into != nil {
			return parseCount(full, value, into)
		}
		if parse := others[key]; parse != nil {
			return parse(full, value)
		}
		known := slices.Sorted(maps.Keys(seconds))
		known = slices.AppendSeq(slices.AppendSeq(known, maps.Keys(counts)), maps.Keys(others))
		slices.Sort(known)
		return fmt.Errorf("%s: unknown key (there are %s)", full, strings.Join(known, ", "))
	})
	if err != nil {
		return nil, err
	}
	if c.ClearedAt > c.DegradedAt {
		return nil, fmt.Errorf("%s.cleared_at: want at most degraded_at, which is %d", name, c.DegradedAt)
	}
	return &c, nil
}

func parseSeconds(key string, value []byte, into *time.Duration) error {
	const want = "seconds, from 0.1 to 86400"
	var seconds float64
	if err := jsonc.Decode(key, value, &seconds, want); err != nil {
		return err
	}
	if math.IsNaN(seconds) || seconds < 0.1 || seconds > 86400 {
		return fmt.Errorf("%s: want %s", key, want)
	}
	*into = time.Duration(seconds * float64(time.Second))
	return nil
}

func parseCount(key string, value []byte, into *int) error {
	const want = "a number from 1 to 100"
	var n uint32
	if err := jsonc.Decode(key, value, &n, want); err != nil {
		return err
	}
	if n < 1 || n > 100 {
		return fmt.Errorf("%s: want %s", key, want)
	}
	*into = int(n)
	return nil
}

func (c *ProbeConfig) parseTargets(key string, value []byte) error {
	if err := jsonc.Decode(key, value, &c.Targets, "a list of addresses"); err != nil {
		return err
	}
	if at := slices.IndexFunc(c.Targets, netip.Addr.Is4In6); at >= 0 {
		return fmt.Errorf("%s: %s: %s", key, c.Targets[at], wire.Mapped(c.Targets[at]))
	}
	bad := slices.ContainsFunc(c.Targets, func(a netip.Addr) bool { return !a.IsGlobalUnicast() || a.Zone() != "" })
	if bad || len(c.Targets) > maxTargets {
		return fmt.Errorf("%s: want at most %d addresses of other hosts", key, maxTargets)
	}
	return nil
}

func (c *ProbeConfig) parseKinds(key string, value []byte) error {
	var names []string
	if err := jsonc.Decode(key, value, &names, `a list of "icmp", "dns" and "tcp:PORT"`); err != nil {
		return err
	}
	c.Kinds = nil
	for _, name := range names {
		k, err := probe.ParseKind(name)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		c.Kinds = append(c.Kinds, k)
	}
	if len(c.Kinds) == 0 || len(c.Kinds) > 4 {
		return fmt.Errorf("%s: want 1 to 4 kinds", key)
	}
	return nil
}

func (c *ProbeConfig) parsePage(key string, value []byte) error {
	var url string
	if err := jsonc.Decode(key, value, &url, "a string"); err != nil {
		return err
	}
	page, err := probe.ParsePage(url)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	c.Page = &page
	return nil
}

func (c *ProbeConfig) parseUnbound(key string, value []byte) error {
	const want = "auto, rule, main or off"
	if err := jsonc.Decode(key, value, &c.Unbound, want); err != nil {
		return err
	}
	if !slices.Contains([]Unbound{UnboundAuto, UnboundRule, UnboundMain, UnboundOff}, c.Unbound) {
		return fmt.Errorf("%s: want %s", key, want)
	}
	return nil
}

func (c *ProbeConfig) parseReset(key string, value []byte) error {
	const want = "never or dead"
	if err := jsonc.Decode(key, value, &c.Reset, want); err != nil {
		return err
	}
	if c.Reset != ResetNever && c.Reset != ResetDead {
		return fmt.Errorf("%s: want %s", key, want)
	}
	return nil
}

func (c *ProbeConfig) parseOnChange(key string, value []byte) error {
	if err := jsonc.Decode(key, value, &c.OnChange, "a string"); err != nil {
		return err
	}
	if err := onchange.CheckPath(c.OnChange); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}
