package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const watchUsage = `Usage: table-allocator-client watch [options]

Gives every address of the host a routing table of its own. Lease, rules and
routes stay as long as the address does, also when watch ends.

  -i, --ifname PATTERN...   links to serve, like 'wan*,wwan*' (*)
      --exclude PATTERN...  links to leave alone (lo)
  -c, --config FILE         a profile for each pattern; SIGHUP reads it again
      --check FILE          say whether FILE is right, and exit
      --clean               at the end delete rules and routes, release leases
  -s, --syslog  -l, --log-path FILE   log to syslog, or to a file
for all links, unless there is a FILE:
      --routes MODE         none, copy (default) or move
      --on-loss WHAT        fallback (default) or block
      --specific-first      routes of main come first, except its default
      --mptcp               an MPTCP endpoint, for further subflows
      --resolver WHO        of name servers: dnsmasq (default), resolved or none
  -t, --tag TAG             text that the server keeps with the leases
  -4 | -6                   IPv4 only, or IPv6 only
in general:
`

// hostFlags are the options that select addresses of the host.
type hostFlags struct {
	*flags
	ifnames []string
	base    client.WatchConfig // without Profiles
	profile uplink.Profile     // for each of ifnames
	file    string
}

func newHostFlags(f *flags) *hostFlags {
	h := &hostFlags{flags: f, profile: uplink.DefaultProfile()}
	h.ifnames, h.base.Exclude = []string{h.profile.Ifname}, uplink.DefaultExclude
	f.links(&h.ifnames, &h.base.Exclude)
	value(f, &h.file, "config", "c", parsePath)
	return h
}

// complete makes the configuration that the command line describes.
func (h *hostFlags) complete() error {
	h.base.Server, h.base.ServerUIDs = h.server, h.uids
	for _, pattern := range h.ifnames {
		p := h.profile
		p.Ifname = pattern
		h.base.Profiles = append(h.base.Profiles, p)
	}
	if err := h.base.Validate(); err != nil {
		return wrongUsage(err)
	}
	return nil
}

// load returns the configuration: that of the file as it is now, or that of the command line.
func (h *hostFlags) load() (client.WatchConfig, error) {
	if h.file != "" {
		return client.LoadWatchConfig(h.file, h.base)
	}
	return h.base, nil
}

type watchFlags struct {
	*hostFlags
	config client.WatchConfig // once it is complete
	clean  bool
	check  string
	family func() (wire.Family, error)
}

func newWatchFlags(f *flags) *watchFlags {
	w := &watchFlags{hostFlags: newHostFlags(f), family: f.family()}
	f.BoolVar(&w.clean, "clean", false, "")
	value(f, &w.check, "check", "", parsePath)
	f.settings(&w.profile.Settings, &w.profile.Tag)
	f.logging()
	f.log.Command = "table-allocator-watch"
	return w
}

// complete checks what was given together.
func (w *watchFlags) complete(args []string) error {
	only, err := w.family()
	if only != wire.Unspec {
		w.profile.Families = []wire.Family{only}
	}
	if err := errors.Join(err, noArguments(args)); err != nil {
		return wrongUsage(err)
	}
	if err := w.hostFlags.complete(); err != nil {
		return err
	}
	if w.config, err = w.load(); err != nil {
		return exitWith(exitConfig, err)
	}
	return nil
}

// exitConfig is EX_CONFIG of sysexits.h: a restart does not help.
const exitConfig = 78

func watch(f *flags) action {
	w := newWatchFlags(f)
	return func(args []string) error {
		if w.check != "" {
			w.file = w.check
		}
		if err := w.complete(args); err != nil {
			return err
		}
		if w.check != "" {
			fmt.Println(w.check + ": right")
			return nil
		}
		ctx, stop := cli.UntilSignal()
		defer stop()
		return w.serve(ctx)
	}
}

func (w *watchFlags) serve(ctx context.Context) error {
	log, err := cli.NewLogger(w.log)
	if err != nil {
		return err
	}
	w.config.Ready = func() {
		if err := cli.NotifyReady(); err != nil {
			log.Warn("systemd does not hear that the watch is ready", "err", err)
		}
	}
	period, err := cli.WatchdogPeriod()
	if err != nil {
		return err
	}
	if period > 0 {
		w.config.AlivePeriod, w.config.Alive = period/2, func() {
			if err := cli.NotifyAlive(); err != nil {
				log.Warn("systemd does not hear that the watch works", "err", err)
			}
		}
	}
	if err := client.Watch(ctx, w.config, cli.Reloads(ctx, w.reload), w.clean, log); err != nil {
		log.Error("cannot watch", "err", err)
		return exitError{cli.ExitError}
	}
	return nil
}

// reload reads the configuration again.
func (w *watchFlags) reload() client.Reload {
	cfg, err := w.load()
	return client.Reload{Config: cfg, Err: err}
}
