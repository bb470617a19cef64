package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/hook"
	"github.com/table-allocator/table-allocator/internal/peer"
)

const hookUsage = `Usage: table-allocator-client hook [options] PROGRAM [ARGUMENT...]

Reads the environment in which PROGRAM runs its script, and leases or releases
tables for the addresses that it tells. The installed scripts call this.

  dhclient                  dhclient-script(8): a lease of DHCP or DHCPv6
  ifupdown                  interfaces(5): if-up.d and if-post-down.d
  networkmanager IFNAME ACTION    NetworkManager-dispatcher(8)
  udev                      a link was removed
  await                     IPv6 addresses that come within a minute; dhclient's
                            hook starts this

  -i, --ifname IFNAME       the link, for await
`

func hookEvent(f *flags) action {
	f.SetInterspersed(false)
	ifname := f.StringP("ifname", "i", "", "")
	return func(args []string) error {
		if len(args) == 0 {
			return wrongUsage(errors.New("PROGRAM is needed"))
		}
		env := hook.ParseEnvironment(os.Environ())
		env["CLIENT_OPTIONS"] = strings.Join(append([]string{env["CLIENT_OPTIONS"]}, f.given()...), " ")
		log := logOf(strings.Fields(env["CLIENT_OPTIONS"]))
		r := hook.Runner{
			Warn: func(text string) { // of what a script says on standard error nobody may know
				warn(text)
				log().Warn(text)
			},
			Client: hook.Client{
				Hold:       holdBehind,
				Release:    func(args, options []string) error { return releaseNow(args, options, log()) },
				Behind:     func(args []string) (pid int, err error) { return start(args, "/", nil) },
				CheckWatch: checkWatch,
				Watch:      watchFor,
			},
		}
		if args[0] == hook.AwaitProgram {
			return r.Await(*ifname)
		}
		calls, warnings, err := hook.Calls(args[0], args[1:], env)
		if err != nil {
			return wrongUsage(err)
		}
		for _, text := range warnings {
			r.Warn(text)
		}
		return r.Run(calls)
	}
}

// given are the options that every command has, as they were given, for other calls of this program.
func (f *flags) given() (args []string) {
	if f.Changed("destination") {
		args = append(args, "-d", f.server)
	}
	for _, uid := range f.uids {
		args = append(args, "--server-user", fmt.Sprint(uid))
	}
	if f.log.Debug {
		args = append(args, "--debug")
	}
	return args
}

// logOf returns the one logger of a hook, where the options of the administrator want it, or syslog.
func logOf(options []string) func() *slog.Logger {
	return sync.OnceValue(func() *slog.Logger {
		f := newFlags("")
		newHoldFlags(f)
		_ = f.parse(options) // each call says what is wrong with them
		f.log.Syslog = true
		log, err := cli.NewLogger(f.log)
		if err != nil {
			warn(err)
			log = slog.New(slog.DiscardHandler)
		}
		return log
	})
}

// holdBehind starts the holder of a lease, and waits for its answer.
func holdBehind(args []string, patience time.Duration) error {
	h, err := parseHold(args)
	if err != nil {
		return err
	}
	if h.version || h.release || h.foreground {
		return errors.New("the options of hooks (CLIENT_OPTIONS) cannot have --version, --release or --foreground")
	}
	answers, err := startHolder(args)
	if err != nil {
		return err
	}
	if err := answers.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, why := answer(answers); why != "" {
		return errors.New("no table: " + why)
	}
	return nil
}

func parseHold(args []string) (*holdFlags, error) {
	f := newFlags("")
	h := newHoldFlags(f)
	err := f.parse(args)
	if err == nil {
		err = h.complete(f.Args())
	}
	return h, err
}

// releaseNow is -r, also if the options of the administrator are wrong.
func releaseNow(args, options []string, log *slog.Logger) error {
	h, err := parseHold(slices.Concat(args, options))
	if err != nil {
		h, err = parseHold(args)
	}
	if err != nil {
		return err
	}
	if err := client.Release(h.config, log); !errors.Is(err, peer.ErrNoServer) {
		return err
	}
	return nil // the lease ends by itself
}

func parseWatch(args []string) (*watchFlags, error) {
	f := newFlags("watch")
	w := newWatchFlags(f)
	err := f.parse(args[1:])
	if err == nil {
		err = w.complete(f.Args())
	}
	return w, err
}

func checkWatch(args []string) error {
	_, err := parseWatch(args)
	return err
}

func watchFor(ctx context.Context, args []string) error {
	w, err := parseWatch(args)
	if err != nil {
		return err
	}
	return w.serve(ctx)
}
