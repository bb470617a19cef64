package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const usage = `Usage: table-allocator-client -4 -a ADDR [-n MASK] -i IFNAME [options]
Leases a routing table for ADDR, installs the rules that lead to it, prints the
table's number (0: none) and stays in the background until ADDR goes.
  -4 | -6                 ADDR is IPv4 | IPv6 (else any identifier, no rules)
  -a, --address ADDR      the address
  -n, --netmask MASK      255.255.255.0 or 24; not needed if ADDR is on IFNAME
  -i, --ifname IFNAME     the link that has, or will have, the address
  -t, --tag TAG           kept with the lease; --table N  ask for this table
  -r, --release           end the holder, take all back
  -f, --foreground        do not go to the background
  -d, --destination NAME  server's socket; --server-user USER  believe USER's
  -s, --syslog  -l, --log-path FILE  --debug      where log lines go, and which
      --priority S,N,U    of the rules from, to, iif lo (10000,20000,91000)
      --no-network-rule  --forward  --prefix P
                          no rule "to NETWORK"; more: "from NETWORK", "from P"
      --specific-first    what is more specific in main precedes ADDR's default
      --on-loss WHAT      no route in the table: fallback (use others) or block
      --routes MODE       ADDR's routes in main: none (leave them), move or copy
      --gateway A  --metric N  --route DST[,via A]  --classless-routes "OCTETS"
                          routes for the table (OCTETS of DHCP option 121)
      --nameserver A  --dnsmasq-servers FILE  --dnsmasq-pid FILE  resolver lines
  -h, --help, --version   print this, or the version, and exit
Or: table-allocator-client watch | status | run | attach | detach | bound | bind
`

// options are what the command line says.
type options struct {
	config     client.Config
	release    bool
	foreground bool
	version    bool
	syslog     bool
	logPath    string
	debug      bool
}

func (o options) logging(background bool) cli.LogConfig {
	return cli.LogConfig{
		Command: "table-allocator-client",
		Syslog:  o.syslog || background,
		Path:    o.logPath,
		Debug:   o.debug,
	}
}

func parse(args []string) (options, error) {
	var (
		o                   options
		inet, inet6         bool
		netmask, priorities string
		users               []string
		u                   = &o.config.Uplink
		flags               = pflag.NewFlagSet("table-allocator-client", pflag.ContinueOnError)
	)
	flags.Usage = func() {}
	flags.SortFlags = false
	// The original spells its options with underscores.
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	flags.BoolVarP(&inet, "inet", "4", false, "")
	flags.BoolVarP(&inet6, "inet6", "6", false, "")
	flags.StringVarP(&u.Key.Address, "address", "a", "", "")
	flags.StringVarP(&netmask, "netmask", "n", "", "")
	flags.StringVarP(&u.Key.Ifname, "ifname", "i", "", "")
	flags.StringVarP(&u.Tag, "tag", "t", "", "")
	flags.Uint32Var(&u.Want, "table", 0, "")
	flags.BoolVarP(&o.release, "release", "r", false, "")
	flags.BoolVarP(&o.foreground, "foreground", "f", false, "")
	flags.StringVarP(&o.config.Server, "destination", "d", defaultServer, "")
	flags.StringArrayVar(&users, "server-user", nil, "")
	flags.StringVar(&priorities, "priority", "10000,20000,91000", "")
	flags.BoolVar(&u.NoNetwork, "no-network-rule", false, "")
	flags.BoolVar(&u.Forward, "forward", false, "")
	flags.BoolVarP(&o.syslog, "syslog", "s", false, "")
	flags.StringVarP(&o.logPath, "log-path", "l", "", "")
	flags.BoolVar(&o.debug, "debug", false, "")
	flags.BoolVar(&o.version, "version", false, "")
	var told told
	flags.StringVar(&told.routes, "routes", string(uplink.NoRoutes), "")
	flags.StringArrayVar(&told.gateways, "gateway", nil, "")
	flags.Uint32Var(&u.Settings.Metric, "metric", 0, "")
	flags.StringArrayVar(&told.static, "route", nil, "")
	flags.StringVar(&told.classless, "classless-routes", "", "")
	flags.StringVar(&told.prefix, "prefix", "", "")
	flags.StringVar(&told.onLoss, "on-loss", string(uplink.Fallback), "")
	flags.BoolVar(&u.Settings.SpecificFirst, "specific-first", false, "")
	flags.StringArrayVar(&told.nameservers, "nameserver", nil, "")
	flags.StringVar(&u.Settings.ServersFile, "dnsmasq-servers", uplink.DefaultServersFile, "")
	flags.StringVar(&u.Settings.PIDFile, "dnsmasq-pid", "", "")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return o, err
		}
		return o, fmt.Errorf("%w (see --help)", err)
	}
	if o.version {
		return o, nil
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q (see --help)", flags.Arg(0))
	}
	if u.Key.Address == "" || u.Key.Ifname == "" {
		return o, errors.New("-a ADDRESS and -i IFNAME are needed (see --help)")
	}
	switch {
	case inet && inet6:
		return o, errors.New("-4 and -6 exclude each other")
	case inet:
		u.Key.Family = wire.Inet
	case inet6:
		u.Key.Family = wire.Inet6
	}
	if err := o.complete(netmask, priorities, users); err != nil {
		return o, err
	}
	return o, told.settle(u)
}

// told is what the network said, as the command line has it.
type told struct {
	routes, onLoss                string
	prefix, classless             string
	gateways, static, nameservers []string
}

// settle turns it into the settings of the uplink.
func (t told) settle(u *uplink.Uplink) (err error) {
	s := &u.Settings
	s.Routes, s.OnLoss = uplink.RoutesMode(t.routes), uplink.OnLoss(t.onLoss)
	if u.Key.Family == wire.Unspec && (s.Routes != uplink.NoRoutes || len(t.nameservers) > 0) {
		return errors.New("--routes and --nameserver need -4 or -6")
	}
	family4 := u.Key.Family == wire.Inet
	if s.Gateways, err = addresses("--gateway", t.gateways, family4); err != nil {
		return err
	}
	for i, gateway := range s.Gateways {
		s.Gateways[i] = gateway.WithZone("") // it is on the link of the address
	}
	if s.Nameservers, err = addresses("--nameserver", t.nameservers, family4); err != nil {
		return err
	}
	for _, text := range t.static {
		r, err := uplink.ParseRoute(text, family4)
		if err != nil {
			return fmt.Errorf("--route %s: %w", text, err)
		}
		s.Static = append(s.Static, r)
	}
	if t.prefix != "" {
		s.Prefix, err = netip.ParsePrefix(t.prefix)
		if err != nil || s.Prefix.Addr().Is4() != family4 || s.Prefix.Bits() == 0 || s.Prefix.IsSingleIP() || u.Key.Family == wire.Unspec {
			return fmt.Errorf("--prefix %s: not a prefix of this family", t.prefix)
		}
	}
	classless, err := uplink.ParseClasslessRoutes(t.classless)
	if err != nil {
		return fmt.Errorf("--classless-routes %q: %w", t.classless, err)
	}
	if len(classless) > 0 { // RFC 3442: the router option is ignored then
		s.Gateways, s.Static = nil, append(s.Static, classless...)
	}
	if s.Prefix.IsValid() && u.Priorities.Source < 2 {
		return errors.New("--prefix: no room for a rule before the priority of the source rule")
	}
	if s.SpecificFirst && u.Priorities.Source < 3 {
		return errors.New("--specific-first: no room for two rules before the priority of the source rule")
	}
	if s.OnLoss == uplink.Block && u.Priorities.Source == 1<<32-1 {
		return errors.New("--on-loss block: no room for a rule behind the source rule")
	}
	if s.ServersFile, err = filepath.Abs(s.ServersFile); err != nil {
		return fmt.Errorf("--dnsmasq-servers: %w", err)
	}
	if s.PIDFile != "" {
		if s.PIDFile, err = filepath.Abs(s.PIDFile); err != nil {
			return fmt.Errorf("--dnsmasq-pid: %w", err)
		}
	}
	return s.Validate()
}

func addresses(flag string, texts []string, family4 bool) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Is4() != family4 {
			return nil, fmt.Errorf("%s %s: not an address of this family", flag, text)
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// complete checks what was given together and works out what was left out.
func (o *options) complete(netmask, priorities string, users []string) (err error) {
	uplink := &o.config.Uplink
	if uplink.Key, err = uplink.Key.Canonical(); err != nil {
		return err
	}
	if err := wire.CheckTag(uplink.Tag); err != nil {
		return err
	}
	if _, err := wire.Padded(o.config.Server); err != nil {
		return fmt.Errorf("--destination: %w", err)
	}
	if o.logPath != "" { // the background process has / as its directory
		if o.logPath, err = filepath.Abs(o.logPath); err != nil {
			return fmt.Errorf("--log-path: %w", err)
		}
	}
	if uplink.Priorities, err = parsePriorities(priorities); err != nil {
		return fmt.Errorf("--priority %s: %w", priorities, err)
	}
	for _, name := range users {
		uid, err := parseUser(name)
		if err != nil {
			return fmt.Errorf("--server-user %s: %w", name, err)
		}
		o.config.ServerUIDs = append(o.config.ServerUIDs, uid)
	}
	if uplink.Key.Family != wire.Unspec {
		uplink.Network, err = network(uplink.Key, netmask, o.release)
	}
	return err
}

// network is the address with its prefix length, which the host knows if the address is
// there already.
func network(key wire.Key, netmask string, release bool) (netip.Prefix, error) {
	addr := netip.MustParseAddr(key.Address) // canonical
	if addr.IsUnspecified() || addr.IsMulticast() || addr.IsLoopback() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return netip.Prefix{}, fmt.Errorf("-a %s: no host has this address on a link", addr)
	}
	if addr.Is6() && addr.IsLinkLocalUnicast() {
		return netip.Prefix{}, fmt.Errorf("-a %s: a link-local address needs no table", addr)
	}
	if netmask != "" {
		length, err := parseNetmask(netmask, addr)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("-n %s: %w", netmask, err)
		}
		return netip.PrefixFrom(addr, length), nil
	}
	if release {
		return netip.PrefixFrom(addr, addr.BitLen()), nil // no rule is made of it
	}
	found, err := lookUp(key, addr)
	if err == nil && !found.IsValid() {
		if addr.Is4() {
			return found, fmt.Errorf("-n MASK is needed, since %s is not on %s yet", addr, key.Ifname)
		}
		found = netip.PrefixFrom(addr, addr.BitLen()) // as DHCPv6 leases it
	}
	return found, err
}

// lookUp returns the zero Prefix if the address is not there.
func lookUp(key wire.Key, addr netip.Addr) (netip.Prefix, error) {
	conn, err := route.Dial()
	if err != nil {
		return netip.Prefix{}, err
	}
	defer conn.Close()
	link, found, err := conn.LinkByName(key.Ifname)
	if err != nil {
		return netip.Prefix{}, err
	}
	if found {
		addresses, err := conn.AddressesOn(int(key.Family), link.Index)
		if err != nil {
			return netip.Prefix{}, err
		}
		for _, a := range addresses {
			if a.Addr == addr {
				return netip.PrefixFrom(addr, a.Bits), nil
			}
		}
	}
	return netip.Prefix{}, nil
}

func parseNetmask(text string, addr netip.Addr) (int, error) {
	if length, err := strconv.Atoi(text); err == nil {
		if length < 1 || length > addr.BitLen() {
			return 0, fmt.Errorf("want a prefix length from 1 to %d", addr.BitLen())
		}
		return length, nil
	}
	mask, err := netip.ParseAddr(text)
	if err != nil || !mask.Is4() || !addr.Is4() {
		return 0, errors.New("neither a mask like 255.255.255.0 nor a prefix length like 24")
	}
	b := mask.As4()
	ones := bits.LeadingZeros32(^(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])))
	if whole := netip.PrefixFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), ones).Masked().Addr(); ones == 0 || whole != mask {
		return 0, errors.New("not a network mask: it has to be ones, then zeros, and not only zeros")
	}
	return ones, nil
}

func parsePriorities(text string) (uplink.Priorities, error) {
	var p uplink.Priorities
	fields := strings.Split(text, ",")
	into := []*uint32{&p.Source, &p.Network, &p.Unbound}
	if len(fields) != len(into) {
		return p, errors.New("want three numbers: SOURCE,NETWORK,UNBOUND")
	}
	for i, field := range fields {
		// 0 is the kernel's rule for local addresses, which nothing may stand before.
		n, err := strconv.ParseUint(field, 10, 32)
		if err != nil || n == 0 {
			return p, fmt.Errorf("%q: want a number from 1 to 4294967295", field)
		}
		*into[i] = uint32(n)
	}
	return p, nil
}

// hold keeps the lease until its address goes or a signal comes.
func hold(opts options, report client.Report, log *slog.Logger) int {
	ctx, stop := cli.UntilSignal()
	defer stop()
	reported := false
	err := client.Run(ctx, opts.config, func(table uint32, why string) {
		reported = true
		report(table, why)
	}, log)
	if err == nil {
		return cli.ExitOK
	}
	log.Error("cannot hold a lease", "err", err)
	if !reported {
		report(0, err.Error())
	}
	return cli.ExitError
}

// release is the whole of -r: what it prints is the table that is in force afterwards.
func release(opts options) int {
	log, err := cli.NewLogger(opts.logging(false))
	if err != nil {
		return fail(err)
	}
	err = client.Release(opts.config, log)
	reportToStdout(0, "")
	if err != nil {
		fmt.Fprintln(os.Stderr, "table-allocator-client:", err)
	}
	if err != nil && !errors.Is(err, peer.ErrNoServer) {
		return cli.ExitError
	}
	return cli.ExitOK
}

func reportToStdout(table uint32, why string) {
	if why != "" {
		fmt.Fprintln(os.Stderr, "table-allocator-client: no table:", why)
	}
	fmt.Println(table)
}
