package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/probe"
	"github.com/table-allocator/table-allocator/internal/uplinks"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const uplinksUsage = `Usage: table-allocator-client uplinks [IFNAME | use IFNAME|auto | probe IFNAME]
                                     [options]

Shows which uplinks work, which one traffic uses that is bound to none, and
why, as the watch has it. use has that traffic use one link, whatever its
state, until auto or until the link is gone. probe asks targets through one
link now; without --target those of the watch, or the name servers of its
network. --run probes and chooses for clients where no watch runs. The exit
code is 0, 1 if nothing answers, 2 for wrong usage. Needs root.

      --follow              print a line of JSON for each change from now on
      --wait SECONDS        wait until an uplink works; exit code 1 if none does
  -i, --ifname IFNAME       show this link only, also as argument
      --kind KIND           icmp, dns or tcp:PORT (repeatable)
      --target ADDR         address to ask (repeatable)
      --run                 probe and choose, until a signal
  -c, --config FILE         with --run: what a watch has; SIGHUP reads it again
      --clean               with --run: choose nothing at the end
  -4 | -6                   IPv4 only, or IPv6 only
      --json                print JSON
`

type uplinksFlags struct {
	*flags
	family  func() (wire.Family, error)
	only    wire.Family
	ifname  string // "": all
	follow  bool
	asJSON  bool
	wait    time.Duration
	kinds   []probe.Kind
	targets []netip.Addr
	run     bool
	file    string // the configuration of run; "": none
	clean   bool
}

func showUplinks(f *flags) action {
	u := &uplinksFlags{flags: f, family: f.family()}
	f.link(&u.ifname)
	f.BoolVar(&u.follow, "follow", false, "")
	f.BoolVar(&u.asJSON, "json", false, "")
	value(f, &u.wait, "wait", "", parseSeconds)
	values(f, &u.kinds, "kind", probe.ParseKind)
	values(f, &u.targets, "target", parseUnmapped)
	f.BoolVar(&u.run, "run", false, "")
	f.BoolVar(&u.clean, "clean", false, "")
	value(f, &u.file, "config", "c", parsePath)
	return func(args []string) (err error) {
		if u.only, err = u.family(); err != nil {
			return wrongUsage(err)
		}
		if len(args) == 1 && !u.run && !slices.Contains([]string{"use", "probe", "auto"}, args[0]) {
			if args, err = f.takeLink(&u.ifname, args); err != nil {
				return err
			}
		}
		switch {
		case u.run && (f.Changed("inet") || f.Changed("inet6") || f.Changed("ifname") || u.follow || u.asJSON || f.Changed("wait") || f.Changed("kind") || f.Changed("target")):
			return wrongUsage(errors.New("--run takes --config and --clean alone"))
		case u.run && len(args) == 0:
			return u.choose()
		case u.clean || u.file != "":
			return wrongUsage(errors.New("--config and --clean belong to --run"))
		case len(args) == 2 && args[0] == "use":
			return u.use(args[1])
		case len(args) == 2 && args[0] == "probe":
			return u.probe(args[1])
		case len(args) > 0:
			return wrongUsage(fmt.Errorf("unexpected argument %q: want IFNAME, use IFNAME|auto, probe IFNAME or none", args[len(args)-1]))
		case u.follow:
			return asked(uplinks.Follow(func(line []byte) error {
				_, err := fmt.Println(message(string(line)))
				return err
			}))
		case f.Changed("wait"):
			return u.waitForOne()
		}
		report, err := uplinks.Ask(uplinks.Request{})
		if err != nil {
			return asked(err)
		}
		return u.show(report)
	}
}

// choose does what a watch does for unbound traffic.
func (u *uplinksFlags) choose() error {
	cfg, err := u.chooseConfig()
	if err != nil {
		return exitWith(exitConfig, err)
	}
	u.log.Command = "table-allocator-uplinks"
	log, err := cli.NewLogger(u.log)
	if err != nil {
		return err
	}
	cfg.Ready = func() {
		if err := cli.NotifyReady(); err != nil {
			log.Warn("systemd does not hear that the choice is made here", "err", err)
		}
	}
	ctx, stop := cli.UntilSignal()
	defer stop()
	return client.Choose(ctx, cfg, cli.Reloads(ctx, func() client.Reload {
		cfg, err := u.chooseConfig()
		return client.Reload{Config: cfg, Err: err}
	}), u.clean, log)
}

// chooseConfig is the configuration of choose: that of the file, or one that probes as an empty "probe" says.
func (u *uplinksFlags) chooseConfig() (cfg client.WatchConfig, err error) {
	if cfg.Server, cfg.ServerUIDs = u.server, u.uids; u.file == "" {
		probes := client.DefaultProbes()
		cfg.Probes = &probes
		return cfg, nil
	}
	cfg, err = client.LoadWatchConfig(u.file, cfg)
	if err == nil && cfg.Probes == nil {
		err = fmt.Errorf("configuration %s has no \"probe\": an empty object will do", u.file)
	}
	return cfg, err
}

// ofFamily reports whether a family is wanted, by its name.
func (u *uplinksFlags) ofFamily(name string) bool {
	return u.only == wire.Unspec || u.only.String() == name
}

func (u *uplinksFlags) show(report uplinks.Report) error {
	if u.ifname != "" && report.Probing && !slices.ContainsFunc(report.Uplinks, func(l uplinks.Uplink) bool { return l.Ifname == u.ifname }) {
		return notInService(u.ifname)
	}
	report.Uplinks = slices.DeleteFunc(report.Uplinks, func(l uplinks.Uplink) bool { return !u.ofFamily(l.Family) || u.ifname != "" && l.Ifname != u.ifname })
	report.Unbound = slices.DeleteFunc(report.Unbound, func(c uplinks.Choice) bool { return !u.ofFamily(c.Family) })
	report = printable(report)
	if u.asJSON {
		return json.NewEncoder(os.Stdout).Encode(report)
	}
	return printUplinks(os.Stdout, report, width(os.Stdout))
}

func notInService(ifname string) error {
	return fmt.Errorf("no address of %s is in service: see table-allocator-client status", ifname)
}

func (u *uplinksFlags) use(ifname string) error {
	report, err := uplinks.Ask(uplinks.Request{Use: ifname, Family: u.only})
	if err != nil {
		return asked(err)
	}
	return u.show(report)
}

// waitForOne waits until an uplink works.
func (u *uplinksFlags) waitForOne() error {
	const pause = 200 * time.Millisecond
	for until := time.Now().Add(u.wait); ; time.Sleep(pause) {
		report, err := uplinks.Ask(uplinks.Request{})
		if err != nil && !errors.Is(err, uplinks.ErrNoWatch) { // it may come
			return asked(err)
		}
		for _, l := range report.Uplinks {
			if report.Probing && u.ofFamily(l.Family) && (l.State == "alive" || l.State == "degraded" || l.State == "off") {
				return nil
			}
		}
		switch {
		case time.Now().Before(until):
		case err != nil:
			return err
		case !report.Probing:
			return errors.New(`the watch does not probe: its configuration has no "probe"`)
		default:
			return errors.New("no uplink works: see table-allocator-client uplinks")
		}
	}
}

// probeTimeout is how long one target has to answer.
const probeTimeout = 3 * time.Second

// probe asks targets through the addresses of a link.
func (u *uplinksFlags) probe(ifname string) error {
	report, err := uplinks.Ask(uplinks.Request{})
	if err != nil {
		return asked(err)
	}
	plan := probe.Plan{Targets: u.targets, Kinds: u.kinds}
	for _, text := range report.Targets {
		if addr, err := netip.ParseAddr(text); err == nil && len(u.targets) == 0 {
			plan.Targets = append(plan.Targets, addr)
		}
	}
	for _, text := range report.Kinds {
		if kind, err := probe.ParseKind(text); err == nil && len(u.kinds) == 0 {
			plan.Kinds = append(plan.Kinds, kind)
		}
	}
	if len(plan.Kinds) == 0 {
		plan.Kinds = probe.DefaultKinds
	}
	var answers []probe.Answer
	found := false
	for _, l := range report.Uplinks {
		if l.Ifname != ifname || !u.ofFamily(l.Family) {
			continue
		}
		found = true
		of := probe.Uplink{Ifname: ifname}
		if of.Address, err = netip.ParseAddr(l.Address); err != nil {
			return err
		}
		for _, text := range l.Nameservers {
			if addr, err := netip.ParseAddr(text); err == nil {
				of.Nameservers = append(of.Nameservers, addr)
			}
		}
		answers = append(answers, askAll(of, plan.Of(of))...)
	}
	switch {
	case !found:
		return notInService(ifname)
	case len(answers) == 0:
		return errors.New(`nobody to ask: give --target, or "targets" in the configuration of the watch`)
	}
	return u.printAnswers(answers)
}

func askAll(of probe.Uplink, plan probe.Plan) (answers []probe.Answer) {
	for _, target := range plan.Targets {
		for _, kind := range plan.Kinds {
			ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
			answers = append(answers, probe.Ask(ctx, of, kind, target))
			cancel()
		}
	}
	return answers
}

func (u *uplinksFlags) printAnswers(answers []probe.Answer) error {
	type row struct {
		Kind   string  `json:"kind"`
		Target string  `json:"target"`
		RTT    float64 `json:"rtt_ms"`
		Bytes  int     `json:"bytes"`
		Error  string  `json:"error"`
	}
	rows := make([]row, len(answers))
	some := false
	for i, a := range answers {
		rows[i] = row{Kind: a.Kind.String(), Target: a.Target.String(), RTT: float64(a.RTT.Microseconds()) / 1000, Bytes: a.Bytes}
		if a.Err != nil {
			rows[i].RTT, rows[i].Error = 0, a.Err.Error()
			if errors.Is(a.Err, os.ErrDeadlineExceeded) {
				rows[i].Error = "no answer"
			}
		}
		some = some || a.Err == nil
	}
	var err error
	rows = printable(rows)
	if u.asJSON {
		err = json.NewEncoder(os.Stdout).Encode(map[string]any{"version": uplinks.Version, "answers": rows})
	} else {
		for _, r := range rows {
			text := fmt.Sprintf("%.1f ms", r.RTT)
			if r.Error != "" {
				text = r.Error
			}
			fmt.Printf("%-8s  %s  %s\n", r.Kind, r.Target, text)
		}
	}
	if err == nil && !some {
		err = errMissing
	}
	return err
}
