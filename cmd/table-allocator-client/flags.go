package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// flags are the options of one command. newFlags declares the ones that every command has.
type flags struct {
	*pflag.FlagSet
	program string   // the name that this program was called by
	server  string   // text of the server's abstract name
	uids    []uint32 // users whose servers are trusted, beside root
	log     cli.LogConfig
}

func newFlags(name string) *flags {
	f := &flags{FlagSet: pflag.NewFlagSet(name, pflag.ContinueOnError), server: "tas_socket"}
	f.log.Command = "table-allocator-client"
	f.Usage = func() {}
	// The original spells its options with underscores.
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	value(f, &f.server, "destination", "d", parseServer)
	values(f, &f.uids, "server-user", parseUser)
	f.BoolVar(&f.log.Debug, "debug", false, "")
	return f
}

// value declares an option; parse makes its text a T.
func value[T any](f *flags, into *T, name, short string, parse func(text string) (T, error)) {
	f.FuncP(name, short, "", func(text string) (err error) {
		*into, err = parse(text)
		return err
	})
}

// values declares an option that may be given several times.
func values[T any](f *flags, into *[]T, name string, parse func(text string) (T, error)) {
	f.Func(name, "", func(text string) error {
		v, err := parse(text)
		*into = append(*into, v)
		return err
	})
}

// parse reads the command line. An error names the option as the usage text does.
func (f *flags) parse(args []string) error {
	err := f.Parse(args)
	if wrong := new(pflag.InvalidValueError); errors.As(err, &wrong) {
		err = fmt.Errorf("--%s %s: %w", wrong.GetFlag().Name, wrong.GetValue(), errors.Unwrap(wrong))
	}
	return err
}

// debug prints what a command finds on standard error, if --debug is given. A command that keeps running
// has a logger for that.
func (f *flags) debug(format string, args ...any) {
	if f.log.Debug {
		warn(fmt.Sprintf(f.Name()+": "+format, args...))
	}
}

// family declares -4 and -6. The function that it returns is called after parsing, and returns Unspec if
// neither was given.
func (f *flags) family() func() (wire.Family, error) {
	inet := f.BoolP("inet", "4", false, "")
	inet6 := f.BoolP("inet6", "6", false, "")
	return func() (wire.Family, error) {
		switch {
		case *inet && *inet6:
			return wire.Unspec, errors.New("-4 and -6 exclude each other")
		case *inet:
			return wire.Inet, nil
		case *inet6:
			return wire.Inet6, nil
		}
		return wire.Unspec, nil
	}
}

// settings declares the options of a lease that hold and watch share.
func (f *flags) settings(s *uplink.Settings, tag *string) {
	value(f, &s.Routes, "routes", "", oneOf(uplink.NoRoutes, uplink.MoveRoutes, uplink.CopyRoutes))
	f.onLoss(&s.OnLoss)
	f.BoolVar(&s.SpecificFirst, "specific-first", false, "")
	f.BoolVar(&s.MPTCP, "mptcp", false, "")
	value(f, &s.Resolver, "resolver", "", oneOf(uplink.Dnsmasq, uplink.Resolved, uplink.NoResolver))
	value(f, tag, "tag", "t", func(text string) (string, error) { return text, wire.CheckTag(text) })
}

func (f *flags) onLoss(into *uplink.OnLoss) {
	value(f, into, "on-loss", "", oneOf(uplink.Fallback, uplink.Block))
}

// logging declares the destinations of log lines.
func (f *flags) logging() {
	f.BoolVarP(&f.log.Syslog, "syslog", "s", false, "")
	value(f, &f.log.Path, "log-path", "l", parsePath)
}

// link declares the name of one link.
func (f *flags) link(into *string) {
	value(f, into, "ifname", "i", func(text string) (string, error) {
		name := linkName(text)
		err := (cgroup.Uplink{Ifname: name}).Check()
		if _, notAddress := netip.ParseAddr(name); err != nil && notAddress == nil {
			err = errors.New("this is an address: give the name of its link")
		}
		return name, err
	})
}

// linkName is the name of the link that has an alternative name, as udev gives some. Any other text stays: it may be the name of a
// link that is gone or is to come, an address or a pattern.
func linkName(text string) string {
	kernel, err := route.Dial()
	if err != nil {
		return text // whoever uses the name needs the kernel, too
	}
	defer kernel.Close()
	if link, found, err := kernel.LinkByName(text); err == nil && found {
		return link.Name
	}
	return text
}

// asHeld is a name as holders have it: an address in the form in which the kernel shows it, any other text as it is.
func asHeld(name string) string {
	if addr, err := netip.ParseAddr(name); err == nil {
		return addr.Unmap().String()
	}
	return name
}

// withLinkNames adds the names of links to alternative ones, which links may have had before they were renamed.
func withLinkNames(names []string) []string {
	for _, text := range names {
		if name := linkName(text); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// takeLink returns the arguments without the name of the link, which is the first one where -i is absent and into is
// empty. That a number is no name is for commands that take processes.
func (f *flags) takeLink(into *string, args []string) ([]string, error) {
	if f.Changed("ifname") || *into != "" || len(args) == 0 || isNumber(args[0]) {
		return args, nil
	}
	if err := f.Set("ifname", args[0]); err != nil {
		if wrong := new(pflag.InvalidValueError); errors.As(err, &wrong) { // which speaks of -i
			err = errors.Unwrap(wrong)
		}
		return args, wrongUsage(fmt.Errorf("link %s: %w", args[0], err))
	}
	return args[1:], nil
}

func isNumber(text string) bool {
	_, err := strconv.ParseUint(text, 10, 64)
	return err == nil
}

// links declares the patterns of links to serve or show, and of those to leave alone.
func (f *flags) links(ifnames, exclude *[]string) {
	f.StringSliceVarP(ifnames, "ifname", "i", *ifnames, "")
	f.StringSliceVar(exclude, "exclude", *exclude, "")
}

// noArguments returns an error if there are arguments, for commands that have options only.
func noArguments(args []string) error {
	if len(args) > 0 {
		return wrongUsage(fmt.Errorf("unexpected argument %q", args[0]))
	}
	return nil
}

func oneOf[T ~string](choices ...T) func(text string) (T, error) {
	return func(text string) (T, error) {
		if slices.Contains(choices, T(text)) {
			return T(text), nil
		}
		var others []string
		last := len(choices) - 1
		for _, c := range choices[:last] {
			others = append(others, string(c))
		}
		return "", fmt.Errorf("want %s or %s", strings.Join(others, ", "), choices[last])
	}
}

func parseServer(name string) (string, error) {
	_, err := wire.Padded(name)
	return name, err
}

func parseUser(name string) (uint32, error) {
	const limit = 5 * time.Second // for a name service
	u, err := outside.Ask("name services", limit, func() (*user.User, error) { return user.Lookup(name) })
	if errors.Is(err, outside.ErrSilent) {
		return 0, err
	}
	if err == nil {
		name = u.Uid
	}
	uid, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, errors.New("no such user")
	}
	if uint32(uid) == wire.OverflowID() {
		return 0, errors.New("this uid stands for every user of other user namespaces, and is never trusted")
	}
	return uint32(uid), nil
}

// parsePath makes a path absolute, since the process in the background leaves its directory.
func parsePath(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

func parseSeconds(text string) (time.Duration, error) {
	seconds, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, errors.New("want a number of seconds")
	}
	return time.Duration(seconds) * time.Second, nil
}

// parseRange reads "FIRST-LAST", or one value that is both ends. Names of users may contain dashes.
func parseRange[T any](text string, parse func(string) (T, error)) (first, last T, err error) {
	if first, err = parse(text); err == nil {
		return first, first, nil
	}
	for at, c := range text {
		if c != '-' {
			continue
		}
		first, firstErr := parse(text[:at])
		last, lastErr := parse(text[at+1:])
		if firstErr == nil && lastErr == nil {
			return first, last, nil
		}
	}
	return first, last, err
}
