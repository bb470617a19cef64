// Package hook turns what dhclient, ifupdown, NetworkManager and udev say in the environment of
// their scripts into calls of the client, and makes these. What an event means is a pure function
// of the environment, Calls; what a call takes, from the kernel or from an earlier hook, a Runner
// finds out. It hides the four vocabularies, and that values from a network are believed one by
// one: what cannot be right is left out, and the address has its table all the same.
package hook

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Programs are those that Calls knows.
var Programs = []string{"dhclient", "ifupdown", "networkmanager", "udev"}

// What is told above these limits is left out.
const (
	maxValue     = 16 << 10 // bytes of a variable
	maxAddresses = 64       // of a link, each of which has a process
	maxGateways  = 16
	maxServers   = 16
	maxRoutes    = 256
	maxWarnings  = 20
	shown        = 60 // bytes of a value in a warning
)

// Environment are the variables that a program has set.
type Environment map[string]string

// ParseEnvironment reads what os.Environ returns. Of a name that is there twice the first counts,
// as for getenv.
func ParseEnvironment(environ []string) Environment {
	env := make(Environment, len(environ))
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		if _, ok := env[name]; !ok {
			env[name] = value
		}
	}
	return env
}

// Calls returns what there is to do at an event of a program, in order, and warnings, each of which
// names a value that is left out, and why. args are those of the program's script. The settings of
// the administrator are variables, too: ROUTES, DNSMASQ_SERVERS, LEAVE_ALONE, CLIENT_OPTIONS.
func Calls(program string, args []string, env Environment) ([]Call, []string, error) {
	e := event{env: env, settings: settingsOf(env)}
	switch program {
	case "dhclient":
		e.dhclient()
	case "ifupdown":
		e.ifupdown()
	case "networkmanager":
		args = append(args, "", "")
		e.networkManager(args[0], args[1])
	case "udev":
		e.udev()
	default:
		return nil, nil, fmt.Errorf("hook %q: want %s", program, strings.Join(Programs, ", "))
	}
	if len(e.warnings) > maxWarnings {
		e.warnings = append(e.warnings[:maxWarnings], fmt.Sprintf("%d more values are left out", len(e.warnings)-maxWarnings))
	}
	return e.calls, e.warnings, nil
}

// settings are those of the administrator.
type settings struct {
	routes      uplink.RoutesMode
	serversFile string // "": nobody wants name servers
	leaveAlone  []string
	options     []string
}

func settingsOf(env Environment) settings {
	s := settings{routes: uplink.MoveRoutes, serversFile: uplink.DefaultServersFile}
	if routes, ok := env["ROUTES"]; ok {
		s.routes = uplink.RoutesMode(routes)
	}
	if file, ok := env["DNSMASQ_SERVERS"]; ok {
		s.serversFile = file
	}
	s.leaveAlone = strings.Fields(env["LEAVE_ALONE"])
	s.options = strings.Fields(env["CLIENT_OPTIONS"])
	return s
}

// event is what a program says, as far as it is read.
type event struct {
	env      Environment
	settings settings
	ifname   string
	calls    []Call
	warnings []string
}

func (e *event) call(c Call) { e.calls = append(e.calls, c) }

// leaveOut warns once that a value which was told in the variable name cannot be right.
func (e *event) leaveOut(name, value, why string) {
	if len(value) > shown {
		value = value[:shown] + "..."
	}
	warning := fmt.Sprintf("%s %q is left out: %s", name, value, why)
	if e.ifname != "" {
		warning = fmt.Sprintf("%q: %s", e.ifname, warning)
	}
	if !slices.Contains(e.warnings, warning) {
		e.warnings = append(e.warnings, warning)
	}
}

// get is the value of a variable; "" if it is not set or too long to be right.
func (e *event) get(name string) string {
	value := e.env[name]
	if len(value) > maxValue {
		e.leaveOut(name, value, fmt.Sprintf("it is longer than %d bytes", maxValue))
		return ""
	}
	return value
}

// link sets the link that the event is about. It reports whether the client is to care for it.
func (e *event) link(name string) bool {
	e.ifname = name
	if name == "" || name == "lo" {
		return false
	}
	if !isLinkName(name) {
		e.ifname = ""
		e.leaveOut("event of the link", name, "no link can have this name")
		return false
	}
	for _, pattern := range e.settings.leaveAlone {
		if matches(pattern, name) {
			return false
		}
	}
	return true
}

// isLinkName reports whether the kernel lets a link have the name, and a key may hold it.
func isLinkName(name string) bool {
	if name == "" || len(name) > wire.MaxIfname || name == "." || name == ".." || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool {
		return r == '/' || r == ':' || unicode.IsSpace(r) || unicode.IsControl(r)
	})
}

// matches is a pattern of the shell's case, which spells a negation with an exclamation mark. What
// is no pattern stands for itself.
func matches(pattern, name string) bool {
	ok, err := path.Match(strings.ReplaceAll(pattern, "[!", "[^"), name)
	return ok || err != nil && pattern == name
}

func (e *event) release(addr netip.Addr) Release {
	return Release{Ifname: e.ifname, Addr: addr, Options: e.settings.options}
}

// lease is what any call says about an address of the link.
func (e *event) lease(tag string) Lease {
	return Lease{Ifname: e.ifname, Tag: tag, Routes: e.settings.routes, Options: e.settings.options}
}
