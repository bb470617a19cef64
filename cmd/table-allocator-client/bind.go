package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const bindUsage = `Usage: table-allocator-client bind|unbind IFNAME WHAT [options]
       table-allocator-client unbind --all

Binds the traffic of a user, to a port or of a cgroup to a link. The rules for
it stay until unbind or the next boot. Needs root.

  -i, --ifname IFNAME       the link; it may get its lease later
      --uid USER[-USER]     traffic of a user, or of a range of users
      --proto PROTOCOL      traffic of tcp, udp, sctp, ... (with --dport)
      --dport PORT[-PORT]   traffic to a port, or to a range of ports
      --cgroup              print a cgroup: processes that enter it are bound
      --pin                 print lines BPFProgram=... for a unit of systemd
      --on-loss WHAT        while the link has no route: block (default: nothing
                            leaves by another link) or fallback
      --local               reach containers, too (default), or --local=false
      --force               bind to a name that no link has yet
      --all                 (unbind) everything that is bound
`

// bindFlags are the options of the commands that bind something to a link.
type bindFlags struct {
	*flags
	config bind.Config
	fresh  []bind.Bound // what bind has bound first
	force  bool         // the link may come later
}

func newBindFlags(f *flags) *bindFlags {
	b := &bindFlags{flags: f, config: bind.Config{OnLoss: uplink.Block}}
	f.BoolVar(&b.force, "force", false, "")
	f.link(&b.config.Ifname)
	f.onLoss(&b.config.OnLoss)
	f.BoolVar(&b.config.Local, "local", true, "")
	return b
}

func (b *bindFlags) check() error {
	if b.config.Ifname == "" {
		return wrongUsage(errors.New("a link is needed: IFNAME, or --ifname IFNAME"))
	}
	return b.needsRoot()
}

func (f *flags) needsRoot() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root, for BPF programs in the kernel, cgroups and rules", f.Name())
	}
	return nil
}

// bind installs the rules for the traffic. A process is bound by a cgroup of the uplink whose sockets get
// the mark.
func (b *bindFlags) bind() (cgroup.Uplink, cgroup.Mark, error) {
	if err := b.checkLink(); err != nil {
		return cgroup.Uplink{}, cgroup.Mark{}, err
	}
	b.config.Server, b.config.ServerUIDs = b.server, b.uids
	done, err := bind.Bind(context.Background(), b.config)
	b.fresh = done.Fresh
	b.debug("mark %#x/%#x, tables %v", done.Mark(), done.Marking.Mask, done.Tables)
	for _, why := range done.Unanswered {
		warn(why)
	}
	for _, missing := range []string{done.InFront, done.Subflows} {
		if missing != "" {
			warn(fmt.Sprintf("%s misses %s", done.Ifname, missing))
		}
	}
	if done.Unkept && err == nil {
		warn(fmt.Sprintf("no client serves an address of %[1]s now: if %[1]s is plugged in again, it stays closed for bound programs until the next run, or until a client or a watch is started", done.Ifname))
	}
	if len(done.Overlapping) > 0 {
		warn(fmt.Sprintf("rules of other programs use the bits %#x of marks, too, for example %q: set another bind_mark_mask in the server's configuration",
			done.Marking.Mask, done.Overlapping[0]))
	}
	return cgroup.Uplink{Ifname: done.Ifname, Fallback: done.OnLoss == uplink.Fallback},
		cgroup.Mark{Value: done.Mark(), Mask: done.Marking.Mask}, err
}

// undo unbinds what was bound first by a command that failed, unless something else is bound by now.
func (b *bindFlags) undo(failed error) error {
	if failed == nil || len(b.fresh) == 0 {
		return failed
	}
	return errors.Join(failed, bind.UnbindUnused(b.config.Ifname, b.fresh))
}

// watchFile is the configuration of the watch that is installed.
const watchFile = "/etc/table-allocator/watch.json"

// checkLink refuses a name that no link has: a typo would cut off the programs that are bound.
func (b *bindFlags) checkLink() error {
	name := b.config.Ifname
	if _, err := (wire.Key{Ifname: name, Address: "any"}).Canonical(); err != nil {
		return wrongUsage(fmt.Errorf("%s: the server refuses this name of a link: %w", name, err))
	}
	if b.force {
		return nil
	}
	kernel, err := route.Dial()
	if err != nil {
		return err
	}
	defer kernel.Close()
	if _, found, err := kernel.LinkByName(name); err != nil || found {
		return err
	}
	holders, err := peer.HolderNames()
	if err != nil || slices.ContainsFunc(holders, func(holder string) bool { return strings.HasPrefix(holder, name+"-") }) {
		return err
	}
	if cfg, err := client.LoadWatchConfig(watchFile, client.WatchConfig{Server: b.server}); err == nil && cfg.Names(name) {
		return nil
	}
	bound, err := bind.List(b.server, b.uids, name)
	if err != nil || slices.ContainsFunc(bound, func(x bind.Bound) bool { return x.Ifname == name }) {
		return err
	}
	return wrongUsage(fmt.Errorf("no link has the name %s: programs that are bound to it could send nothing; --force binds before the link exists", name))
}

// warnMissing says which BPF programs the kernel does not take.
func warnMissing(missing []cgroup.Missing) {
	for _, m := range missing {
		warn(fmt.Sprintf("BPF program %s is not in place, so %s: %v", m.Program, m.Lost, m.Err))
	}
}

// trafficFlags are the options of bind and unbind.
type trafficFlags struct {
	*bindFlags
	traffic     route.Traffic
	cgroup, pin *bool
}

func newTrafficFlags(f *flags) *trafficFlags {
	t := &trafficFlags{bindFlags: newBindFlags(f), cgroup: f.Bool("cgroup", false, ""), pin: f.Bool("pin", false, "")}
	value(f, &t.traffic.UIDs, "uid", "", parseUIDs)
	value(f, &t.traffic.IPProto, "proto", "", parseProtocol)
	value(f, &t.traffic.Dports, "dport", "", parsePorts)
	return t
}

// check returns an error unless the command line names a link and one thing to bind to it.
func (t *trafficFlags) check(args []string) error {
	args, err := t.takeLink(&t.config.Ifname, args)
	if err != nil {
		return err
	}
	if t.traffic.Dports != (route.Ports{}) && t.traffic.IPProto == 0 {
		return wrongUsage(errors.New("--dport needs --proto, as in --proto tcp"))
	}
	if err := t.traffic.Check(); err != nil {
		return wrongUsage(err)
	}
	if t.things() != 1 || len(args) > 0 {
		return wrongUsage(errors.New("one of --uid, --proto, --cgroup and --pin is needed, and nothing else"))
	}
	if t.traffic != (route.Traffic{}) {
		t.config.Traffic = []route.Traffic{t.traffic}
	}
	return t.bindFlags.check()
}

// things returns how many things the command line names.
func (t *trafficFlags) things() (n int) {
	for _, given := range []bool{t.traffic != route.Traffic{}, *t.cgroup, *t.pin} {
		if given {
			n++
		}
	}
	return n
}

func parseUIDs(text string) (u route.UIDs, err error) {
	u.First, u.Last, err = parseRange(text, parseUser)
	u.Set = true
	return u, err
}

func parsePorts(text string) (p route.Ports, err error) {
	p.First, p.Last, err = parseRange(text, func(text string) (uint16, error) {
		port, err := strconv.ParseUint(text, 10, 16)
		return uint16(port), err
	})
	if err != nil || p.First == 0 {
		err = errors.New("want a port, or two as in 8000-8099")
	}
	return p, err
}

// parseProtocol reads the name or number of a protocol that has a rule of its own.
func parseProtocol(name string) (uint8, error) {
	names := map[string]uint8{
		"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP, "dccp": unix.IPPROTO_DCCP,
		"udplite": unix.IPPROTO_UDPLITE, "icmp": unix.IPPROTO_ICMP, "icmp6": unix.IPPROTO_ICMPV6,
	}
	if number, ok := names[name]; ok {
		return number, nil
	}
	number, err := strconv.ParseUint(name, 10, 8)
	if err != nil || number == 0 {
		return 0, errors.New("want tcp, udp, sctp, dccp, udplite, icmp, icmp6 or a number from 1 to 255")
	}
	return uint8(number), nil
}

func bindTraffic(f *flags) action {
	t := newTrafficFlags(f)
	return func(args []string) error {
		if err := t.check(args); err != nil {
			return err
		}
		target, mark, err := t.bind()
		if errors.Is(err, bind.ErrNoLease) {
			warn(fmt.Errorf("%w yet", err)) // a lease may come later
		} else if err != nil {
			return err
		}
		if t.traffic.UIDs.Set {
			warn("a rule sees the owner of a socket: what setuid programs of the user send, and further subflows of MPTCP, are root's and leave by any uplink; run holds those")
		}
		if t.traffic != (route.Traffic{}) && t.config.OnLoss == uplink.Block {
			warn("a socket of this traffic with another uplink's address, as a server has that is asked there, leaves by that uplink in IPv4, and does not leave in IPv6: --on-loss fallback lets it leave in both")
			warn("no lock holds this traffic: a socket that is bound to another link leaves by that in IPv4, and multicast of IPv6 by the first link; run holds those")
		}
		var missing []cgroup.Missing
		switch {
		case *t.cgroup:
			missing, err = makeCgroup(target, mark)
		case *t.pin:
			var values []string
			values, missing, err = cgroup.Pin(target, mark)
			for _, v := range values {
				fmt.Println("BPFProgram=" + quoted(v))
			}
		default:
			return nil
		}
		warnMissing(missing)
		return err
	}
}

// makeCgroup makes the cgroup of an interface and prints where it is.
func makeCgroup(target cgroup.Uplink, mark cgroup.Mark) ([]cgroup.Missing, error) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	defer cgroups.Close()
	dir, missing, err := cgroups.Interface(target, mark)
	if err == nil {
		fmt.Println(quoted(dir))
	}
	return missing, err
}

func unbindTraffic(f *flags) action {
	t := newTrafficFlags(f)
	all := f.Bool("all", false, "")
	return func(args []string) error {
		if *all {
			if t.things() > 0 || t.config.Ifname != "" || len(args) > 0 {
				return wrongUsage(errors.New("--all unbinds everything, and takes no link and nothing to unbind from it"))
			}
			if err := f.needsRoot(); err != nil {
				return err
			}
			return bind.UnbindAll(f.server, f.uids)
		}
		if err := t.check(args); err != nil {
			return err
		}
		return t.unbind()
	}
}

func (t *trafficFlags) unbind() error {
	t.debug("%s, %v", t.config.Ifname, t.config.Traffic)
	target := cgroup.Uplink{Ifname: t.config.Ifname, Fallback: t.config.OnLoss == uplink.Fallback}
	switch {
	case *t.cgroup:
		cgroups, err := cgroup.Open()
		if err != nil {
			return err
		}
		defer cgroups.Close()
		return cgroups.RemoveInterface(target)
	case *t.pin:
		return cgroup.Unpin(target)
	}
	t.config.Server, t.config.ServerUIDs = t.server, t.uids
	return bind.Remove(t.config)
}
