package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
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

const statusUsage = `Usage: table-allocator-client status [--json] [options]

Shows table, lease, gateway and holder of each address of the host, and what is
missing. Exit code 1 if something is.

      --json                for programs
      --ifname PATTERN...   links to show (*)
      --exclude PATTERN...  links to leave out (lo, docker*, br-*, veth*, ...)
  -c, --config FILE         the configuration of the watch
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
	profile           client.Profile
	clean, json       bool
}

func newHostOptions(command string) *hostOptions {
	o := &hostOptions{flags: pflag.NewFlagSet(command, pflag.ContinueOnError), profile: client.DefaultProfile()}
	f := o.flags
	f.Usage = func() {}
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	f.StringSliceVar(&o.ifnames, "ifname", []string{o.profile.Ifname}, "")
	f.StringSliceVar(&o.excludes, "exclude", client.DefaultExclude, "")
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
	o.profile.Settings.Routes = client.RoutesMode(orDefault(o.routes, string(o.profile.Settings.Routes)))
	o.profile.Settings.OnLoss = client.OnLoss(orDefault(o.onLoss, string(o.profile.Settings.OnLoss)))
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

func orDefault(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
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

func runStatus(args []string) int {
	o := newHostOptions("status")
	if err := o.parse(args); errors.Is(err, pflag.ErrHelp) {
		fmt.Print(statusUsage)
		return cli.ExitOK
	} else if err != nil {
		return fail(fmt.Errorf("%w (see status --help)", err))
	}
	cfg, err := o.load()
	if err != nil {
		return fail(err)
	}
	rows, err := client.Status(context.Background(), cfg)
	if err != nil {
		return fail(err)
	}
	if o.json {
		err = json.NewEncoder(os.Stdout).Encode(rows)
	} else {
		err = printRows(os.Stdout, rows, isTerminal(os.Stdout))
	}
	if err != nil {
		return fail(err)
	}
	for _, row := range rows {
		if row.Missing != "" {
			return cli.ExitError
		}
	}
	return cli.ExitOK
}

// screen is how wide a line may be.
const screen = 80

// printRows prints a line for each address if all have room for it, and more lines else.
func printRows(out io.Writer, rows []client.Row, colour bool) error {
	table := [][]string{{"IFNAME", "ADDRESS", "TABLE", "LEFT", "MODE", "PID", "GATEWAY"}}
	for _, r := range rows {
		line := []string{r.Ifname, r.Address, "-", "-", orDefault(r.Mode, "-"), "-", orDefault(r.Gateway, "-")}
		if r.Table != 0 {
			line[2], line[3] = fmt.Sprint(r.Table), leaseLeft(r.LeaseLeft)
		}
		if r.PID != 0 {
			line[5] = fmt.Sprint(r.PID)
		}
		table = append(table, line)
	}
	w := bufio.NewWriter(out)
	widths := make([]int, len(table[0]))
	total := -2
	for c := range widths {
		for _, line := range table {
			widths[c] = max(widths[c], len(line[c]))
		}
		total += widths[c] + 2
	}
	// What has no room goes to a line of its own: the gateway first, then all but the address.
	first := len(widths)
	if total > screen {
		first--
		total -= widths[first] + 2
	}
	if total > screen {
		first = 2
	}
	for i, line := range table {
		text := ""
		for c := range first {
			text += fmt.Sprintf("%-*s  ", widths[c], line[c])
		}
		fmt.Fprintln(w, strings.TrimRight(text, " "))
		if i == 0 {
			continue
		}
		var rest []string
		for c := first; c < len(line); c++ {
			if line[c] != "-" {
				rest = append(rest, strings.ToLower(table[0][c])+" "+line[c])
			}
		}
		for len(rest) > 0 {
			line := "    " + rest[0]
			for rest = rest[1:]; len(rest) > 0 && len(line)+2+len(rest[0]) <= screen; rest = rest[1:] {
				line += "  " + rest[0]
			}
			fmt.Fprintln(w, line)
		}
		if missing := rows[i-1].Missing; missing != "" {
			printMissing(w, missing, colour)
		}
	}
	return w.Flush()
}

func printMissing(w io.Writer, missing string, colour bool) {
	const red, plain, indent = "\x1b[31m", "\x1b[0m", "    "
	line := indent + "misses"
	flush := func() {
		if colour {
			line = red + line + plain
		}
		fmt.Fprintln(w, line)
	}
	for _, word := range strings.Fields(missing) {
		if len(line)+1+len(word) > screen {
			flush()
			line = indent + " "
		}
		line += " " + word
	}
	flush()
}

// leaseLeft is a duration in its two largest units.
func leaseLeft(seconds int64) string {
	const minute, hour, day = 60, 60 * 60, 24 * 60 * 60
	switch {
	case seconds >= day:
		return fmt.Sprintf("%dd%02dh", seconds/day, seconds%day/hour)
	case seconds >= hour:
		return fmt.Sprintf("%dh%02dm", seconds/hour, seconds%hour/minute)
	}
	return fmt.Sprintf("%dm%02ds", seconds/minute, seconds%minute)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
