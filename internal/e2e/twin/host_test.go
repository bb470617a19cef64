package twin

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// step is a part of a host or a change of it, which can be left out: commands that belong together.
type step struct {
	name     string
	commands []string
	phase    string // of a change: when it is made
}

// host is a made-up host: all about it is in here, so that leaving a part out makes another host.
type host struct {
	seed    uint64
	watch   watchSettings
	build   []step
	changes []step
	phases  []string
	second  network   // of the second uplink of a plain-looking host
	nets    []network // of all links at the start
	without []string  // kinds of links that it would have if the kernel had them
	special string    // the kind of its link that not every kernel has, if it has one
	chosen  bool      // a user wants one link for what is bound to none, see chosen_test.go
}

// The phases of a host's life, after each of which it is compared.
const (
	atStart    = "start"   // the product has just come
	eachChange = "changes" // after each of several changes
	inStorm    = "storm"   // after many changes at once
	afterKill  = "kill"    // the watch was killed amid changes and started again
	atEnd      = "end"     // the product has taken everything back
)

var allPhases = []string{atStart, eachChange, inStorm, afterKill, atEnd}

// watchSettings are what the watch of a host is told, as its configuration file names it. Some hosts
// have a client for each address instead, as hooks start them.
type watchSettings struct {
	Ifname        string `json:"ifname"`
	Routes        string `json:"routes"`
	OnLoss        string `json:"on_loss"`
	SpecificFirst bool   `json:"specific_first"`
	exclude       []string
	clients       bool
}

// client is the client for an address, as a command.
func (s watchSettings) client(a netip.Addr, bits int, ifname string) []string {
	family := "-4"
	if a.Is6() {
		family = "-6"
	}
	args := []string{"-f", family, "-a", a.String(), "-n", fmt.Sprint(bits), "-i", ifname, "--routes", s.Routes, "--on-loss", s.OnLoss}
	if s.SpecificFirst {
		args = append(args, "--specific-first")
	}
	return args
}

func (s watchSettings) config() string {
	profile, err := json.Marshal(s)
	if err != nil {
		panic(err) // strings and a bool
	}
	exclude, err := json.Marshal(s.exclude)
	if err != nil {
		panic(err) // strings
	}
	return fmt.Sprintf(`{"links": [%s], "exclude": %s}`, profile, exclude)
}

// selects reports whether the watch was told to serve a link if it is an uplink.
func (s watchSettings) selects(ifname string) bool {
	matches := func(pattern string) bool {
		ok, err := path.Match(pattern, ifname)
		return err == nil && ok
	}
	return matches(s.Ifname) && !slices.ContainsFunc(s.exclude, matches)
}

// clone is a copy of which parts can be left out.
func (h *host) clone() *host {
	c := *h
	c.build, c.changes = slices.Clone(h.build), slices.Clone(h.changes)
	return &c
}

// buildCommands are all that make the host.
func (h *host) buildCommands() (all []string) {
	for _, s := range h.build {
		all = append(all, s.commands...)
	}
	return all
}

// changesIn are the changes of a phase.
func (h *host) changesIn(phase string) []step {
	return slices.DeleteFunc(slices.Clone(h.changes), func(s step) bool { return s.phase != phase })
}

// text is the host as commands to type.
func (h *host) text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, "    "+format+"\n", args...) }
	for _, c := range h.buildCommands() {
		line("%s", c)
	}
	if h.watch.clients {
		line("# for each address: table-allocator-client %s &", strings.Join(h.watch.client(netip.IPv4Unspecified(), 24, "LINK"), " "))
	} else {
		line("echo '%s' >watch.json; table-allocator-client watch --clean -c watch.json &", h.watch.config())
	}
	for _, phase := range h.phases {
		line("# phase %s", phase)
		for _, s := range h.changesIn(phase) {
			line("# %s", s.name)
			for _, c := range s.commands {
				line("%s", c)
			}
		}
	}
	return b.String()
}
