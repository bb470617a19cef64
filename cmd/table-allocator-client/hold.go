package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const holdUsage = `Usage: table-allocator-client -4 -a ADDR [-n MASK] -i IFNAME [options]

Leases a routing table for ADDR, installs the rules that lead to the table,
prints its number (0: no table) and stays in the background until ADDR goes.

  -4 | -6 | --unspec        ADDR is IPv4, IPv6, or any text, which gets no
                            rules; without one of them ADDR says it itself
  -a, --address ADDR[/LEN]  the address, and the length of its network
  -n, --netmask MASK        255.255.255.0 or 24; not needed if ADDR is on IFNAME
  -i, --ifname IFNAME       the link that has the address, or will have it
  -t, --tag TAG             text that the server keeps with the lease
      --table N             ask for this table
  -r, --release             end the holder, delete its rules and routes, and
                            release the lease
  -f, --foreground          do not go to the background
      --priority S,N,U      of the rules from ADDR, to NETWORK and iif lo
                            (10000,20000,91000)
      --no-network-rule     no rule "to NETWORK"
      --forward             one more rule "from NETWORK"
      --prefix PREFIX       one more rule "from PREFIX"
      --specific-first      routes of main come first, except its default
      --mptcp               an MPTCP endpoint, for further subflows
      --on-loss WHAT        while the table has no route: fallback (default: use
                            other links) or block
      --routes MODE         of ADDR in main: none (default: leave them), move or
                            copy
      --gateway A  --metric N  --route DST[,via A]  --classless-routes "OCTETS"
                            routes of the table (OCTETS of DHCP option 121)
      --nameserver A  --dnsmasq-servers FILE  --dnsmasq-pid FILE
                            resolver lines for dnsmasq
      --resolver WHO        who is told of them: dnsmasq (default), resolved
                            (systemd-resolved) or none
  -s, --syslog              log to syslog
  -l, --log-path FILE       log to a file
      --version             print the version and exit
`

// holdFlags are the options of the command line that has no command word: those of the C original, and
// those that this program adds.
type holdFlags struct {
	*flags
	config                       client.Config
	release, foreground, version bool
	unspec                       bool // ADDR is any text
	guessed                      bool // the family is that of ADDR
	family                       func() (wire.Family, error)
	netmask                      string
	static                       []string // routes; they are parsed when the family is known
	classless                    []uplink.StaticRoute
	left                         []uplink.LeftOut // values that cannot be right
	from                         *handover        // of a holder that executed this program; nil: there is none
}

// parseClassless takes the routes that can be read.
func (h *holdFlags) parseClassless(text string) ([]uplink.StaticRoute, error) {
	routes, err := uplink.ParseClasslessRoutes(text)
	if err != nil {
		h.left = append(h.left, uplink.LeftOut{Key: "classless-routes", Value: text, Why: err.Error()})
	}
	return routes, nil
}

func newHoldFlags(f *flags) *holdFlags {
	h := &holdFlags{flags: f, family: f.family()}
	u := &h.config.Uplink
	u.Priorities = uplink.OriginalPriorities
	u.Settings = uplink.Settings{Routes: uplink.NoRoutes, OnLoss: uplink.Fallback, ServersFile: uplink.DefaultServersFile}
	f.StringVarP(&u.Key.Address, "address", "a", "", "")
	f.StringVarP(&u.Key.Ifname, "ifname", "i", "", "")
	f.StringVarP(&h.netmask, "netmask", "n", "", "")
	f.Uint32Var(&u.Want, "table", 0, "")
	f.BoolVarP(&h.release, "release", "r", false, "")
	f.BoolVarP(&h.foreground, "foreground", "f", false, "")
	f.BoolVar(&h.version, "version", false, "")
	f.BoolVar(&h.unspec, "unspec", false, "")
	value(f, &u.Priorities, "priority", "", parsePriorities)
	f.BoolVar(&u.NoNetwork, "no-network-rule", false, "")
	f.BoolVar(&u.Forward, "forward", false, "")
	f.logging()
	s := &u.Settings
	f.settings(s, &u.Tag)
	values(f, &s.Gateways, "gateway", netip.ParseAddr)
	f.Uint32Var(&s.Metric, "metric", 0, "")
	f.StringArrayVar(&h.static, "route", nil, "")
	value(f, &h.classless, "classless-routes", "", h.parseClassless)
	value(f, &s.Prefix, "prefix", "", netip.ParsePrefix)
	values(f, &s.Nameservers, "nameserver", netip.ParseAddr)
	value(f, &s.ServersFile, "dnsmasq-servers", "", parsePath)
	value(f, &s.PIDFile, "dnsmasq-pid", "", parsePath)
	return h
}

func hold(f *flags) action {
	h := newHoldFlags(f)
	return func(args []string) error {
		if h.version {
			fmt.Println(cli.Version())
			return nil
		}
		var err error
		if h.from, err = handedOver(); err != nil {
			return err
		}
		if err := h.complete(args); err != nil {
			return wrongUsage(err)
		}
		if h.release {
			return h.releaseLease()
		}
		switch {
		case h.from != nil && h.from.Check:
			return h.check()
		case h.from != nil:
			return h.goOn()
		}
		startDir, _ = os.Getwd() // which may be gone
		if h.foreground {
			log, err := cli.NewLogger(f.log)
			if err != nil {
				return err
			}
			return h.holdLease(reportTo(cli.Stdout), log) // not os.Stdout: its reader may stop reading
		}
		if parent := parentPipe(); parent != nil {
			return h.background(parent)
		}
		return foreground()
	}
}

// complete checks options that depend on each other, and fills in the network.
func (h *holdFlags) complete(args []string) (err error) {
	if err := noArguments(args); err != nil {
		return err
	}
	h.config.Server, h.config.ServerUIDs = h.server, h.uids
	u := &h.config.Uplink
	if u.Key.Address == "" && u.Key.Ifname == "" && h.NFlag() == 0 {
		return errors.New("nothing to do: -a ADDRESS and -i IFNAME are needed, or a command; tactl, or status, shows how addresses stand")
	}
	if u.Key.Address == "" || u.Key.Ifname == "" {
		return errors.New("-a ADDRESS and -i IFNAME are needed")
	}
	if u.Key.Family, err = h.family(); err != nil {
		return err
	}
	if h.program != originalName && !h.unspec && h.from == nil {
		u.Key.Ifname = linkName(u.Key.Ifname)
	}
	if h.program != originalName {
		if err := h.guess(); err != nil {
			return err
		}
	}
	if u.Key, err = u.Key.Canonical(); err != nil {
		return err
	}
	s := &u.Settings
	for i, gateway := range s.Gateways {
		s.Gateways[i] = gateway.WithZone("") // a gateway is on the link of the address
	}
	for _, text := range h.static {
		r, err := uplink.ParseRoute(text, u.Key.Family == wire.Inet)
		if err != nil {
			return fmt.Errorf("--route %s: %w", text, err)
		}
		s.Static = append(s.Static, r)
	}
	if len(h.classless) > 0 { // RFC 3442: the router option is ignored then
		s.Gateways, s.Static = nil, append(s.Static, h.classless...)
	}
	if !u.IsAddress() {
		return u.Validate()
	}
	h.left = append(h.left, u.TakeValues()...)
	if err := u.Validate(); err != nil {
		return err
	}
	if u.Network, err = h.network(u.Addr()); err == nil {
		h.left = append(h.left, u.TakeValues()...) // the network this time
	}
	return err
}

// guess fills in what an address says itself: its family, and its network if it is ADDR/LEN.
func (h *holdFlags) guess() error {
	key := &h.config.Uplink.Key
	text, length, long := strings.Cut(key.Address, "/")
	addr, err := netip.ParseAddr(text)
	if err != nil || h.unspec {
		if h.unspec && key.Family != wire.Unspec {
			return errors.New("--unspec excludes -4 and -6")
		}
		return nil
	}
	if long {
		if h.netmask != "" && h.netmask != length {
			return fmt.Errorf("-a %s and -n %s are two prefix lengths", key.Address, h.netmask)
		}
		key.Address, h.netmask = text, length
	}
	h.guessed = key.Family == wire.Unspec
	if h.guessed && addr.Is4() {
		key.Family = wire.Inet
	} else if h.guessed {
		key.Family = wire.Inet6
	}
	return nil
}

// network returns the address with its prefix length: that of -n, or that of the address on the link. The network of a
// point-to-point link is its peer; with -n as the link has it, too.
func (h *holdFlags) network(addr netip.Addr) (netip.Prefix, error) {
	said := netip.PrefixFrom(addr, addr.BitLen())
	if h.netmask != "" {
		length, err := parseNetmask(h.netmask, addr)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("-n %s: %w", h.netmask, err)
		}
		said = netip.PrefixFrom(addr, length)
	}
	if h.release || h.from != nil {
		return said, nil // a release installs no rule, and the holder before hands over its network
	}
	a, found, err := onLink(h.config.Uplink.Key.Ifname, addr)
	switch {
	case h.netmask != "" && (err != nil || !found || a.Bits != said.Bits()):
		return said, nil
	case err != nil:
		return said, err
	case found:
		return a.Network(), nil
	case addr.Is4():
		return said, fmt.Errorf("-n MASK is needed, since %s is not on %s yet", addr, h.config.Uplink.Key.Ifname)
	}
	return said, nil // as DHCPv6 leases it
}

// onLink returns the address as the link has it, and whether it is there.
func onLink(ifname string, addr netip.Addr) (route.Address, bool, error) {
	kernel, err := route.Dial()
	if err != nil {
		return route.Address{}, false, err
	}
	defer kernel.Close()
	return kernel.AddressOn(ifname, addr)
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
		// The kernel's rule for local addresses has 0, and no rule may come before it.
		n, err := strconv.ParseUint(field, 10, 32)
		if err != nil || n == 0 {
			return p, fmt.Errorf("%q: want a number from 1 to 4294967295", field)
		}
		*into[i] = uint32(n)
	}
	return p, nil
}

// holdLease holds the lease until the address or its link is deleted, or a signal comes.
func (h *holdFlags) holdLease(report client.Report, log *slog.Logger) error {
	ctx, stop := cli.UntilSignal()
	defer stop()
	h.tellLeft(log)
	reported := false
	h.config.Successor = checkOwnProgram
	h.config.Tells = h.Changed("routes") || h.Changed("prefix") || h.Changed("nameserver")
	err := client.Run(ctx, h.config, func(table uint32, why string) {
		reported = true
		report(table, why)
	}, log)
	if err == nil {
		return nil
	}
	if to := (client.Handover{}); errors.As(err, &to) {
		return h.keepOn(to, executeOwnProgram(to), log)
	}
	log.Error("cannot hold a lease", "err", err)
	if !reported {
		report(0, err.Error())
	}
	return exitError{cli.ExitError}
}

// tellLeft warns of what cannot be right; in the background once until the release, since callers tell it at each renewal.
func (h *holdFlags) tellLeft(log *slog.Logger) {
	key := h.config.Uplink.Key
	texts := make([]string, len(h.left))
	for i, v := range h.left {
		texts[i] = fmt.Sprintf("%s: --%s %q: %s", key, v.Key, v.Value, v.Why)
	}
	news := texts
	if !h.foreground && len(texts) > 0 {
		dir, _ := remember.OfLink(key.Ifname) // without one it is said again
		news = dir.News(remember.Said, texts)
	}
	for i, v := range h.left {
		if slices.Contains(news, texts[i]) {
			log.Warn("a value is left out, since it cannot be right", "option", "--"+v.Key, "value", v.Value, "why", v.Why,
				"ifname", key.Ifname, "addr", key.Address)
		}
	}
}

// keepOn goes on with what was to be handed over.
func (h *holdFlags) keepOn(to client.Handover, why error, log *slog.Logger) error {
	log.Error("cannot execute the installed program; this one goes on", "err", why)
	if err := to.Answer(0, why.Error()); err != nil {
		log.Debug("nobody waits for the answer", "err", err)
	}
	u, err := to.Accept(h.config.Uplink)
	if err != nil { // never: it is what this program wrote
		log.Error("cannot read the settings of the lease; going on with those of the command line", "err", err)
	} else {
		h.config.Uplink = u
	}
	to.Asker = wire.Addr{}
	h.config.From = &to
	return h.holdLease(func(uint32, string) {}, log)
}

// releaseLease is -r. It prints 0, the table after the release.
func (h *holdFlags) releaseLease() error {
	log, err := cli.NewLogger(h.log)
	if err != nil {
		return err
	}
	err = h.releaseKey(log)
	if h.guessed { // a lease of the same text that is no address may be meant
		h.config.Uplink.Key.Family = wire.Unspec
		if moreErr := h.releaseKey(log); err == nil {
			err = moreErr
		}
	}
	reportTo(os.Stdout)(0, "")
	if errors.Is(err, peer.ErrNoServer) {
		warn(err)
		return nil
	}
	return err
}

// releaseKey releases one lease, and says on standard error what it did.
func (h *holdFlags) releaseKey(log *slog.Logger) error {
	key := h.config.Uplink.Key
	held, err := holderOf(key)
	if err != nil {
		return err
	}
	err = client.Release(h.config, log)
	switch {
	case err != nil || h.program == originalName:
	case held.PID != 0:
		warn(fmt.Sprintf("%s on %s: its holder (pid %d) ended, table %d is released", key.Address, key.Ifname, held.PID, held.Table))
	case key.Family != wire.Unspec || !h.guessed:
		warn(fmt.Sprintf("%s on %s: no process held it; what was left of it is deleted", key.Address, key.Ifname))
	}
	return err
}

// holderOf asks the holder of a key; a reply without PID says that there is none.
func holderOf(key wire.Key) (wire.Reply, error) {
	conn, err := peer.Open(key, peer.AsAsker)
	if err != nil {
		return wire.Reply{}, err
	}
	defer conn.Close()
	reply, err := peer.Ask(context.Background(), conn, wire.Request{Key: key, Cmd: wire.Query}, peer.HolderPatience)
	if err != nil {
		return wire.Reply{}, nil // whoever has its name is no holder, and Release says so
	}
	return reply, nil
}

func reportTo(stdout io.Writer) client.Report {
	return func(table uint32, why string) {
		if why != "" {
			warn("no table: " + why)
		}
		fmt.Fprintln(stdout, table)
	}
}
