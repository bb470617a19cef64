// Package hook reads the environment in which dhclient, dhcpcd, udhcpc, pppd, ifupdown, NetworkManager and udev
// run their scripts, and calls the client for the addresses in it. Calls is a pure function from the environment
// to the calls; a Runner makes the calls, and reads what they need from the kernel and from the files of
// earlier hooks. The package hides the variables of the programs. It checks each value from a
// network by itself: a value that cannot be right is left out, and the address gets its table.
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

// Programs are the programs that Calls knows.
var Programs = []string{"dhclient", "dhcpcd", "ifupdown", "networkmanager", "pppd", "udev", "udhcpc"}

// Values beyond these limits are left out.
const (
	maxValue     = 16 << 10 // bytes of a variable
	maxAddresses = 64       // of a link; each has a process
	maxGateways  = 16
	maxServers   = 16
	maxRoutes    = 256
	maxWarnings  = 20
	shown        = 60 // bytes of a value in a warning
)

// Environment are the variables that a program has set.
type Environment map[string]string

// ParseEnvironment parses the result of os.Environ. If a name is there twice the first one counts, as
// for getenv(3).
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

// Calls returns the calls for an event of a program, in order, and a warning for each value that is left
// out. args are the arguments of the program's script. The administrator's settings are variables, too:
// ROUTES, RESOLVER, DNSMASQ_SERVERS, LEAVE_ALONE, CLIENT_OPTIONS.
func Calls(program string, args []string, env Environment) ([]Call, []Warning, error) {
	e := event{env: env, settings: settingsOf(env)}
	switch program {
	case "dhclient":
		e.dhclient()
	case "dhcpcd":
		e.dhcpcd()
	case "ifupdown":
		e.ifupdown()
	case "networkmanager":
		args = append(args, "", "")
		e.networkManager(args[0], args[1])
	case "pppd":
		e.pppd()
	case "udev":
		e.udev()
	case "udhcpc":
		e.udhcpc(append(args, "")[0])
	default:
		return nil, nil, fmt.Errorf("hook %q: want %s", program, strings.Join(Programs, ", "))
	}
	if more := len(e.warnings) - maxWarnings; more > 0 {
		e.warnings = e.warnings[:maxWarnings]
		e.warn(fmt.Sprintf("%d more values are left out", more))
	}
	return e.calls, e.warnings, nil
}

// settings are the administrator's.
type settings struct {
	routes      uplink.RoutesMode
	serversFile string // "": name servers are ignored
	resolver    uplink.Resolver
	leaveAlone  []string
	options     []string
}

func settingsOf(env Environment) settings {
	s := settings{routes: uplink.MoveRoutes, serversFile: uplink.DefaultServersFile, resolver: uplink.Resolver(env["RESOLVER"])}
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

// event is one run of a program's script: its environment, and the calls so far.
type event struct {
	env      Environment
	settings settings
	ifname   string
	calls    []Call
	warnings []Warning
}

// Warning says what of an event is left out, and why.
type Warning struct {
	Ifname string // "" if no link can have the name
	Text   string
}

func (w Warning) String() string {
	if w.Ifname == "" {
		return w.Text
	}
	return fmt.Sprintf("%q: %s", w.Ifname, w.Text)
}

func (e *event) call(c Call) { e.calls = append(e.calls, c) }

// leaveOut adds a warning, once, that the value of a variable is not used.
func (e *event) leaveOut(name, value, why string) {
	if len(value) > shown {
		value = value[:shown] + "..."
	}
	e.warn(fmt.Sprintf("%s %q is left out: %s", name, value, why))
}

// cut adds a warning, once, that only the first values of a variable are used.
func (e *event) cut(name string, most int) {
	e.warn(fmt.Sprintf("%s: only the first %d count", name, most))
}

func (e *event) warn(text string) {
	w := Warning{e.ifname, text}
	if !slices.Contains(e.warnings, w) {
		e.warnings = append(e.warnings, w)
	}
}

// get returns the value of a variable; "" if it is not set or too long.
func (e *event) get(name string) string {
	value := e.env[name]
	if len(value) > maxValue {
		e.leaveOut(name, value, fmt.Sprintf("it is longer than %d bytes", maxValue))
		return ""
	}
	return value
}

// link sets the link of the event, and reports whether the client serves it.
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

// isLinkName reports whether a link, and the key of a lease, can have the name.
func isLinkName(name string) bool {
	if name == "" || len(name) > wire.MaxIfname || name == "." || name == ".." || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool {
		return r == '/' || r == ':' || unicode.IsSpace(r) || unicode.IsControl(r)
	})
}

// matches reports whether a name matches a pattern as in a case of the shell, which writes [!...] for
// [^...]. A malformed pattern matches itself.
func matches(pattern, name string) bool {
	ok, err := path.Match(strings.ReplaceAll(pattern, "[!", "[^"), name)
	return ok || err != nil && pattern == name
}

func (e *event) release(addr netip.Addr) Release {
	return Release{Ifname: e.ifname, Addr: addr, Options: e.settings.options}
}

// lease returns the options that every call has.
func (e *event) lease(tag string) Lease {
	return Lease{Ifname: e.ifname, Tag: tag, Routes: e.settings.routes, Options: e.settings.options}
}
