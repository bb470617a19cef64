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
  dhcpcd                    dhcpcd-run-hooks(8): both, and router advertisements
  ifupdown                  interfaces(5): if-up.d and if-post-down.d
  networkmanager IFNAME ACTION    NetworkManager-dispatcher(8)
  pppd                      pppd(8): ip-up.d
  udev                      a link was removed
  udhcpc ACTION             udhcpc's script: bound or renew
  await                     IPv6 addresses that come within a minute; dhclient's
                            hook starts this
  await-ipv4                IPv4 addresses that come within 10 s; the hook of
                            NetworkManager starts this

  -i, --ifname IFNAME       the link, for await and await-ipv4
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
			Warn: func(text string) { // a script's standard error may lead nowhere
				warn(text)
				log().Warn(text)
				cli.Flush() // a release may have another logger
			},
			Client: hook.Client{
				Hold:       holdBehind,
				Release:    releaser(),
				Behind:     func(args []string) (pid int, err error) { return start(args, "/", nil) },
				CheckWatch: checkWatch,
				Watch:      watchFor,
			},
		}
		switch args[0] {
		case hook.AwaitProgram:
			return r.Await(*ifname)
		case hook.AwaitPresentProgram:
			return r.AwaitPresent(*ifname)
		}
		calls, warnings, err := hook.Calls(args[0], args[1:], env)
		if err != nil {
			return wrongUsage(err)
		}
		r.Tell(warnings)
		return r.Run(calls)
	}
}

// given returns the options that every command has and that were given to the hook, for the client.
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

// logOf returns a logger for warnings, opened by the first one: where the options of the administrator
// want it, or else syslog.
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

// releaser returns a function that does what --release does, also if the administrator's options are wrong.
func releaser() func(args, options []string) error {
	var open sync.Once
	var log *slog.Logger
	var logErr error
	return func(args, options []string) error {
		h, err := parseHold(slices.Concat(args, options))
		if err != nil {
			h, err = parseHold(args)
		}
		if err != nil {
			return err
		}
		open.Do(func() { log, logErr = cli.NewLogger(h.log) })
		if logErr != nil {
			return logErr
		}
		if err := client.Release(h.config, log); !errors.Is(err, peer.ErrNoServer) {
			return err
		}
		return nil // the lease ends by itself
	}
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
