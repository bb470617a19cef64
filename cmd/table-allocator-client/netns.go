package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/netns"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

const netnsUsage = `Usage: table-allocator-client netns VERB [NAME] [options] [--] [COMMAND...]
VERB: add, set, del, list, exec, ps, stop, unit, serve, check or import. Network
namespaces on one link, and programs in them: see table-allocator-netns(8).
  -i, --ifname IFNAME    (add, set) the link, or wwan*; without it netns.json's
      --on-loss WHAT     (add) without a route: block (default) or fallback
      --resolv SERVERS   (add) uplink (default), vpn, ADDRESS,... or FILE
      --ipv6 WAY         (add) auto, nat, prefix, proxy, npt, off; or --no-ipv6
      --wiring WIRING    (add) nat (default), macvlan or pasta
      --vpn FILE         (add) OpenVPN or WireGuard is the only way out
      --firewall WHAT    (add) accept or none: rules in filters of others
      --allow WHO,...    (add) users and @groups who may enter
      --all or --kill SECONDS  (del) all; end programs, SIGKILL after SECONDS
      --json             (list, ps) print JSON
      --user USER        (exec) run COMMAND as USER
      --pty or --detach  (exec) on a terminal of its own, or in the background
      --log FILE         (exec --detach) where COMMAND prints to
      --wait SECONDS     (exec) how long to wait for a lease or VPN (0)
      --signal SIGNAL or --timeout SECONDS  (stop) TERM; SIGKILL after 5 s
  -c, --config FILE      (serve) configuration (/etc/table-allocator/netns.json)
  -s, --syslog or -l, --log-path FILE: (serve) where to log to
`

// netnsFlags are the options of the netns commands.
type netnsFlags struct {
	*flags
	config                             netns.Config
	kill, wait, timeout                time.Duration
	all, asJSON, pty, detach, onlyInet bool
	user                               *netns.User
	configPath                         string
	log, way                           string
	signal                             unix.Signal
}

// A netnsVerb is the word behind netns.
type netnsVerb struct {
	name    string
	options []string // those that it has, beside those of every command
	do      func(n *netnsFlags, h *netns.Host, args []string) error
}

var netnsVerbs = []netnsVerb{
	{"add", []string{"ifname", "on-loss", "resolv", "wiring", "ipv6", "no-ipv6", "allow", "vpn", "firewall"}, (*netnsFlags).add},
	{"set", []string{"ifname"}, (*netnsFlags).set},
	{"del", []string{"kill", "all"}, (*netnsFlags).del},
	{"list", []string{"json"}, (*netnsFlags).list},
	{"exec", []string{"user", "pty", "detach", "log", "wait"}, (*netnsFlags).exec},
	{"ps", []string{"json"}, (*netnsFlags).ps},
	{"stop", []string{"signal", "timeout"}, (*netnsFlags).stop},
	{"serve", []string{"config", "syslog", "log-path"}, (*netnsFlags).serve},
	{"tunnel", nil, (*netnsFlags).tunnel}, // OpenVPN calls it
	{"lease", nil, (*netnsFlags).lease},   // the service calls it
	{"pasta", nil, (*netnsFlags).pasta},   // and this, bound to an uplink
	{"unit", nil, (*netnsFlags).unit},
	{"check", nil, nil},
	{"import", nil, nil},
}

func netnsCommand(f *flags) action {
	n := &netnsFlags{flags: f, config: netns.Config{OnLoss: uplink.Block, Resolv: netns.Uplink}, timeout: 5 * time.Second, way: netns.WayAuto, signal: unix.SIGTERM, configPath: netns.ConfigPath}
	f.link(&n.config.Ifname)
	f.onLoss(&n.config.OnLoss)
	value(f, &n.config.Resolv, "resolv", "", parseServers)
	value(f, &n.config.Allow, "allow", "", parseAllow)
	value(f, &n.config.Firewall, "firewall", "", parseFirewall)
	value(f, &n.config.Wiring, "wiring", "", parseWiring)
	value(f, &n.way, "ipv6", "", parseWay)
	value(f, &n.config.VPN, "vpn", "", filepath.Abs)
	value(f, &n.configPath, "config", "c", parsePath)
	value(f, &n.kill, "kill", "", parseSeconds)
	value(f, &n.wait, "wait", "", parseSeconds)
	value(f, &n.timeout, "timeout", "", parseSeconds)
	value(f, &n.user, "user", "", netns.Account)
	value(f, &n.log, "log", "", parsePath)
	value(f, &n.signal, "signal", "", parseSignal)
	for name, into := range map[string]*bool{"all": &n.all, "json": &n.asJSON, "pty": &n.pty, "detach": &n.detach, "no-ipv6": &n.onlyInet} {
		f.BoolVar(into, name, false, "")
	}
	n.logging()
	f.SetInterspersed(false)
	return n.run
}

// run finds the verb and calls it.
func (n *netnsFlags) run(args []string) error {
	if len(args) == 0 {
		return wrongUsage(errors.New("add, set, del, list, exec, ps, stop, unit, serve, check or import is needed"))
	}
	at := slices.IndexFunc(netnsVerbs, func(v netnsVerb) bool { return v.name == args[0] })
	if at < 0 {
		return wrongUsage(fmt.Errorf("%q is none of add, set, del, list, exec, ps, stop, unit, serve, check and import", args[0]))
	}
	verb := netnsVerbs[at]
	err := n.call(verb, args[1:])
	usage, coded := usageError{}, exitError{}
	if verb.name == "exec" && err != nil && !errors.As(err, &coded) {
		if errors.As(err, &usage) {
			err = fmt.Errorf("%w (see netns --help)", err)
		}
		return exitWith(exitFailed, err)
	}
	return err
}

func (n *netnsFlags) call(verb netnsVerb, args []string) error {
	n.SetInterspersed(verb.name != "exec")
	err := n.parse(args)
	if args = n.Args(); err == nil && verb.name == "exec" && len(args) > 0 && n.ArgsLenAtDash() < 0 {
		err = n.parse(args[1:]) // options may follow the name
		args = append(args[:1:1], n.Args()...)
	}
	if errors.Is(err, pflag.ErrHelp) {
		fmt.Print(netnsUsage + sharedUsage)
		return nil
	}
	if err != nil {
		return wrongUsage(err)
	}
	n.VisitAll(func(o *pflag.Flag) {
		common := slices.Contains([]string{"destination", "server-user", "debug"}, o.Name)
		if o.Changed && !common && !slices.Contains(verb.options, o.Name) && err == nil {
			err = wrongUsage(fmt.Errorf("netns %s has no option --%s", verb.name, o.Name))
		}
	})
	if err != nil {
		return err
	}
	switch verb.name {
	case "check":
		return n.check(args)
	case "import":
		return importFile(args)
	}
	if slices.Contains([]string{"exec", "list", "ps", "stop"}, verb.name) && os.Geteuid() != 0 {
		return verb.do(n, nil, args) // by the service
	}
	if os.Geteuid() != 0 && verb.name == "serve" {
		return exitWith(exitConfig, errors.New("netns serve needs root, for namespaces, links and rules: a User= of the unit is in the way (systemctl edit table-allocator-netns)"))
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("netns %s needs root, for namespaces, links and rules", verb.name)
	}
	h, err := netns.Open(n.server, n.uids)
	if err != nil {
		return err
	}
	defer h.Close()
	h.Step = func(what string) { n.debug("%s", what) }
	return verb.do(n, h, args)
}

// name takes the name of a namespace, the first argument.
func (n *netnsFlags) name(args []string) (name string, rest []string, err error) {
	if len(args) == 0 {
		return "", nil, wrongUsage(errors.New("the NAME of a namespace is needed"))
	}
	if err := netns.CheckName(args[0]); err != nil {
		return "", nil, wrongUsage(err)
	}
	return args[0], args[1:], nil
}

func (n *netnsFlags) onlyName(args []string) (string, error) {
	name, rest, err := n.name(args)
	if err == nil {
		err = noArguments(rest)
	}
	return name, err
}

func (n *netnsFlags) add(h *netns.Host, args []string) error {
	name, err := n.onlyName(args)
	if err != nil {
		return err
	}
	file, err := netns.Load(netns.ConfigPath)
	if err != nil {
		return err
	}
	h.Max, h.Pool4 = file.Max, file.Pool4
	n.config.Name = name
	if n.onlyInet {
		n.way = netns.WayOff
	}
	if err := n.config.SetWay(n.way); err != nil {
		return wrongUsage(err)
	}
	if n.config.VPN != "" && !n.Changed("resolv") {
		n.config.Resolv = netns.VPN
	}
	if n.config.Ifname == "" {
		if n.config, err = n.configured(file, name); err != nil {
			return err
		}
	} else if n.config.SetLink(linkName(n.config.Ifname)); n.config.Check() != nil {
		return wrongUsage(n.config.Check())
	}
	lacking, err := h.Add(context.Background(), n.config)
	for _, what := range lacking {
		warn(what)
	}
	return err
}

// configured is the namespace of a name in the configuration, which add takes without --ifname.
func (n *netnsFlags) configured(file netns.File, name string) (netns.Config, error) {
	c, found := file.Named(name)
	for _, option := range []string{"on-loss", "resolv", "wiring", "ipv6", "no-ipv6", "allow", "vpn", "firewall"} {
		found = found && !n.Changed(option)
	}
	if !found {
		return c, wrongUsage(fmt.Errorf("--ifname IFNAME is needed, for a namespace that %s does not name, and beside other options", netns.ConfigPath))
	}
	return c, nil
}

// tunnel leads the link of OpenVPN into a namespace. OpenVPN calls it with arguments of its own.
func (n *netnsFlags) tunnel(h *netns.Host, args []string) error {
	name, _, err := n.name(args)
	if err != nil {
		return err
	}
	return h.Tunnel(name, os.Getenv)
}

// lease keeps the network namespace that it is in with an address of DHCP.
func (n *netnsFlags) lease(_ *netns.Host, args []string) error {
	if err := noArguments(args); err != nil {
		return err
	}
	log, err := cli.NewLogger(n.flags.log)
	if err != nil {
		return err
	}
	ctx, stop := cli.UntilSignal()
	defer stop()
	if err := netns.Lease(ctx, log); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// pasta executes the program of a namespace with that wiring, in place of this process. More arguments tell processes apart.
func (n *netnsFlags) pasta(h *netns.Host, args []string) error {
	name, _, err := n.name(args)
	if err != nil {
		return err
	}
	return h.Pasta(name)
}

// unit prints a drop-in for a unit of systemd, whose programs then are in the namespace.
func (n *netnsFlags) unit(h *netns.Host, args []string) error {
	name, err := n.onlyName(args)
	if err != nil {
		return err
	}
	text, err := h.Unit(name)
	if err == nil {
		_, err = fmt.Print(text)
	}
	return err
}

func (n *netnsFlags) set(h *netns.Host, args []string) error {
	name, err := n.onlyName(args)
	if err == nil && n.config.Ifname == "" {
		err = wrongUsage(errors.New("--ifname IFNAME is needed"))
	}
	if err != nil {
		return err
	}
	lacking, err := h.Set(context.Background(), name, n.config.Ifname)
	for _, what := range lacking {
		warn(what)
	}
	return err
}

func (n *netnsFlags) del(h *netns.Host, args []string) error {
	var names []string
	if n.all {
		if err := noArguments(args); err != nil {
			return err
		}
		rows, err := h.List()
		if err != nil {
			return err
		}
		for _, r := range rows {
			names = append(names, r.Name)
		}
	} else {
		name, err := n.onlyName(args)
		if err != nil {
			return err
		}
		names = []string{name}
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, n.delOne(h, name))
	}
	return errors.Join(errs...)
}

// delOne deletes a namespace unless programs are in it, or ends those. With --all those of the service do not count: it may
// have ended before them, as when a package is removed.
func (n *netnsFlags) delOne(h *netns.Host, name string) error {
	in := h.Occupants
	if n.all {
		in = h.Visitors
	}
	programs, err := in(name)
	if errors.Is(err, netns.ErrUnknown) { // it may be half of one
		programs, err = nil, nil
	}
	if err != nil {
		return err
	}
	if len(programs) > 0 && !n.Changed("kill") {
		if n.all {
			if err := h.EndJobs(name); err != nil {
				return err
			}
		}
		_ = printPrograms(programs) // the error below counts
		return fmt.Errorf("namespace %s: programs run in it: netns stop %s ends them, and --kill SECONDS does before it deletes", name, name)
	}
	if len(programs) > 0 {
		if _, err := h.Stop(context.Background(), name, unix.SIGTERM, n.kill, nil); err != nil {
			return err
		}
	}
	left, err := h.Delete(name)
	if err == nil && left != "" {
		warn(left)
	}
	return err
}

func (n *netnsFlags) stop(h *netns.Host, args []string) error {
	name, rest, err := n.name(args)
	if err != nil {
		return err
	}
	var pids []int
	if len(rest) > 0 {
		if pids, err = parsePIDs(rest); err != nil {
			return err
		}
	}
	list := func() ([]netns.Program, error) { return n.programs(h, name) }
	_, err = netns.Stop(context.Background(), list, n.signal, n.timeout, pids)
	return err
}

// serve keeps the namespaces as they should be until a signal ends it.
func (n *netnsFlags) serve(h *netns.Host, args []string) error {
	if err := noArguments(args); err != nil {
		return err
	}
	log, err := cli.NewLogger(n.flags.log)
	if err != nil {
		return err
	}
	file, err := netns.Load(n.configPath)
	if err != nil {
		return exitWith(exitConfig, err)
	}
	ctx, stop := cli.UntilSignal()
	defer stop()
	last := file
	return h.Serve(ctx, file, cli.Reloads(ctx, func() netns.File {
		next, err := netns.Load(n.configPath)
		if err != nil {
			log.Error("cannot read the configuration; the one before stays in force", "err", err)
			return last
		}
		last = next
		return next
	}), func() {
		if err := cli.NotifyReady(); err != nil {
			log.Warn("systemd does not hear that the service is up", "err", err)
		}
	}, log)
}

// check reads a configuration, or asks the name servers of a namespace, and says what is wrong.
func (n *netnsFlags) check(args []string) error {
	if len(args) == 1 && netns.CheckName(args[0]) == nil && os.Geteuid() == 0 {
		h, err := netns.Open(n.server, n.uids)
		if err != nil {
			return err
		}
		defer h.Close()
		if _, err := os.Stat(args[0]); h.Has(args[0]) || err != nil { // else it is a file
			return h.AskServers(context.Background(), args[0])
		}
	}
	path := netns.ConfigPath
	if len(args) > 0 {
		path = args[0]
		if err := noArguments(args[1:]); err != nil {
			return err
		}
	}
	if _, err := os.Stat(path); err != nil {
		return err
	}
	_, err := netns.Load(path)
	return err
}

// importFile prints a configuration of RUNNS as one of the service. What that leaves out goes to standard error.
func importFile(args []string) error {
	if len(args) != 1 {
		return wrongUsage(errors.New("the path of a runns.conf is needed"))
	}
	text, left, err := netns.Import(args[0])
	if err != nil {
		return err
	}
	for _, what := range left {
		warn("left out: " + what)
	}
	_, err = os.Stdout.Write(text)
	return err
}

func parseAllow(text string) ([]string, error) {
	list := strings.Split(text, ",")
	return list, (netns.Config{Name: "any", Ifname: "any", Resolv: netns.Uplink, Allow: list}).Check()
}

// parseFirewall reads the value of --firewall.
func parseFirewall(text string) (string, error) {
	if text != netns.FirewallAccept && text != netns.FirewallNone {
		return "", errors.New("want accept or none")
	}
	return text, nil
}

// parseWiring reads the value of --wiring.
func parseWiring(text string) (string, error) {
	if text != netns.WiringNAT && text != netns.WiringMacvlan && text != netns.WiringPasta {
		return "", errors.New("want nat, macvlan or pasta")
	}
	return text, nil
}

// parseWay reads the value of --ipv6.
func parseWay(text string) (string, error) { return text, new(netns.Config).SetWay(text) }

// parseServers reads the value of --resolv.
func parseServers(text string) (string, error) {
	if strings.ContainsRune(text, '/') {
		return filepath.Abs(text)
	}
	return text, (netns.Config{Name: "any", Ifname: "any", Resolv: text}).Check()
}

// parseSignal reads the name or number of a signal.
func parseSignal(text string) (unix.Signal, error) {
	if s := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG")); s != 0 {
		return s, nil
	}
	var number int
	if _, err := fmt.Sscanf(text, "%d", &number); err != nil || number < 1 || number > 64 {
		return 0, errors.New("want a signal, as TERM or 15")
	}
	return unix.Signal(number), nil
}
