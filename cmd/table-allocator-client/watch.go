package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const watchUsage = `Usage: table-allocator-client watch [options]

Gives every address of the host a table of its own, and keeps lease, rules and
routes of each for as long as it exists. At the end it leaves them in place.

      --ifname PATTERN...   links to serve, like 'wan*,wwan*' (*)
      --exclude PATTERN...  links to leave alone (lo, docker*, br-*, veth*, ...)
  -c, --config FILE         a profile for each pattern; read again at SIGHUP
      --clean               take everything back at the end
  -h, --help                print this and exit
 for all links, unless there is a FILE
      --routes MODE         none, copy (default) or move
      --on-loss WHAT        fallback (default) or block
      --specific-first      what is more specific in main precedes the default
  -t, --tag TAG             text that is kept with the leases
  -4 | -6                   one family only
 in general
  -d, --destination NAME    socket of the server (tas_socket)
      --server-user USER    believe a server of this user, too (repeatable)
  -s, --syslog, -l, --log-path FILE, --debug    where log lines go, and which
`

// hostOptions are those of watch and status.
type hostOptions struct {
	flags             *pflag.FlagSet
	ifnames, excludes []string
	file              string
	base              client.WatchConfig
	logging           cli.LogConfig
	users             []string
	inet, inet6       bool
	routes, onLoss    string
	profile           uplink.Profile
	clean, json       bool
}

func newHostOptions(command string) *hostOptions {
	o := &hostOptions{flags: pflag.NewFlagSet(command, pflag.ContinueOnError), profile: uplink.DefaultProfile()}
	f := o.flags
	f.Usage = func() {}
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	f.StringSliceVar(&o.ifnames, "ifname", []string{o.profile.Ifname}, "")
	f.StringSliceVar(&o.excludes, "exclude", uplink.DefaultExclude, "")
	f.StringVarP(&o.file, "config", "c", "", "")
	if command == "status" {
		f.BoolVar(&o.json, "json", false, "")
		o.base.Server = defaultServer
		return o
	}
	o.logging.Command = "table-allocator-watch"
	f.BoolVar(&o.clean, "clean", false, "")
	f.StringVar(&o.routes, "routes", string(o.profile.Settings.Routes), "")
	f.StringVar(&o.onLoss, "on-loss", string(o.profile.Settings.OnLoss), "")
	f.BoolVar(&o.profile.Settings.SpecificFirst, "specific-first", false, "")
	f.StringVarP(&o.profile.Tag, "tag", "t", "", "")
	f.BoolVarP(&o.inet, "inet", "4", false, "")
	f.BoolVarP(&o.inet6, "inet6", "6", false, "")
	f.StringVarP(&o.base.Server, "destination", "d", defaultServer, "")
	f.StringArrayVar(&o.users, "server-user", nil, "")
	f.BoolVarP(&o.logging.Syslog, "syslog", "s", false, "")
	f.StringVarP(&o.logging.Path, "log-path", "l", "", "")
	f.BoolVar(&o.logging.Debug, "debug", false, "")
	return o
}

// parse reads the command line into a configuration without the file.
func (o *hostOptions) parse(args []string) (err error) {
	if err := o.flags.Parse(args); err != nil {
		return err
	}
	if o.flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", o.flags.Arg(0))
	}
	o.profile.Settings.Routes = uplink.RoutesMode(orDefault(o.routes, string(o.profile.Settings.Routes)))
	o.profile.Settings.OnLoss = uplink.OnLoss(orDefault(o.onLoss, string(o.profile.Settings.OnLoss)))
	switch {
	case o.inet && o.inet6:
		return errors.New("-4 and -6 exclude each other")
	case o.inet:
		o.profile.Families = []wire.Family{wire.Inet}
	case o.inet6:
		o.profile.Families = []wire.Family{wire.Inet6}
	}
	for _, name := range o.users {
		uid, err := parseUser(name)
		if err != nil {
			return fmt.Errorf("--server-user %s: %w", name, err)
		}
		o.base.ServerUIDs = append(o.base.ServerUIDs, uid)
	}
	for _, pattern := range o.ifnames {
		p := o.profile
		p.Ifname = pattern
		o.base.Profiles = append(o.base.Profiles, p)
	}
	o.base.Exclude = o.excludes
	if o.file != "" {
		if o.file, err = filepath.Abs(o.file); err != nil {
			return fmt.Errorf("--config: %w", err)
		}
	}
	_, err = o.load()
	return err
}

// load is the configuration as it is now.
func (o *hostOptions) load() (client.WatchConfig, error) {
	if o.file != "" {
		return client.LoadWatchConfig(o.file, o.base)
	}
	return o.base, o.base.Validate()
}

func runWatch(args []string) int {
	o := newHostOptions("watch")
	if err := o.parse(args); errors.Is(err, pflag.ErrHelp) {
		fmt.Print(watchUsage)
		return cli.ExitOK
	} else if err != nil {
		return fail(fmt.Errorf("%w (see watch --help)", err))
	}
	log, err := cli.NewLogger(o.logging)
	if err != nil {
		return fail(err)
	}
	ctx, stop := cli.UntilSignal()
	defer stop()
	if err := client.Watch(ctx, o.load, hangups(ctx), o.clean, log); err != nil {
		log.Error("cannot watch", "err", err)
		return cli.ExitError
	}
	return cli.ExitOK
}

// hangups receives a value for each SIGHUP, or for several that came together.
func hangups(ctx context.Context) <-chan struct{} {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP)
	reload := make(chan struct{})
	go func() {
		for {
			select {
			case <-signals:
			case <-ctx.Done():
				return
			}
			select {
			case reload <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return reload
}
