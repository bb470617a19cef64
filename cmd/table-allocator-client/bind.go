package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

const bindUsage = `Usage: table-allocator-client bind|unbind --ifname IFNAME WHAT [options]
       table-allocator-client unbind --all

Binds a user, a port or a cgroup to a link, until it is unbound or, but for the
cgroup's processes, the next boot. Needs root.

      --ifname IFNAME     the link; unlike with run, it may have no lease yet
      --uid USER[-USER]   what processes of a user, or of a range, send
      --proto PROTOCOL    what is sent by tcp, udp, sctp, ... (with --dport)
      --dport PORT[-PORT]   to these ports
      --cgroup            print a cgroup: who is put into it is bound, too
      --pin               print lines BPFProgram=... for a unit of systemd
      --on-loss WHAT      without a route there: block (default) or fallback
  -d, --destination NAME  socket of the server (tas_socket)
      --server-user USER  believe a server of this user, too (repeatable)
      --all               (unbind) everything that is bound
  -h, --help              print this and exit
`

// bindOptions are those of run, attach, detach, bind and unbind.
type bindOptions struct {
	flags       *pflag.FlagSet
	command     string
	config      bind.Config
	users       []string
	onLoss      string
	wait        uint
	tree, reset bool
	uids, proto string
	dports      string
	cgroup, pin bool
	all         bool
}

func newBindOptions(command string) *bindOptions {
	o := &bindOptions{flags: pflag.NewFlagSet(command, pflag.ContinueOnError), command: command}
	f := o.flags
	f.Usage = func() {}
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	if command == "attach" || command == "detach" {
		f.BoolVar(&o.tree, "tree", false, "")
	}
	if command == "detach" {
		return o
	}
	f.StringVar(&o.config.Ifname, "ifname", "", "")
	f.StringVar(&o.onLoss, "on-loss", string(uplink.Block), "")
	f.StringVarP(&o.config.Server, "destination", "d", defaultServer, "")
	f.StringArrayVar(&o.users, "server-user", nil, "")
	switch command {
	case "attach":
		f.BoolVar(&o.reset, "reset", false, "")
		fallthrough
	case "run":
		f.UintVar(&o.wait, "wait", 0, "")
	default:
		f.StringVar(&o.uids, "uid", "", "")
		f.StringVar(&o.proto, "proto", "", "")
		f.StringVar(&o.dports, "dport", "", "")
		f.BoolVar(&o.cgroup, "cgroup", false, "")
		f.BoolVar(&o.pin, "pin", false, "")
	}
	if command == "unbind" {
		f.BoolVar(&o.all, "all", false, "")
	}
	return o
}

// parse reads the command line; what is left are the arguments.
func (o *bindOptions) parse(args []string) error {
	if err := o.flags.Parse(args); err != nil {
		return err
	}
	if o.command == "detach" || o.all {
		return needsRoot(o.command)
	}
	if o.config.Ifname == "" {
		return errors.New("--ifname IFNAME is needed")
	}
	switch o.config.OnLoss = uplink.OnLoss(o.onLoss); o.config.OnLoss {
	case uplink.Block, uplink.Fallback:
	default:
		return fmt.Errorf("--on-loss %s: want block or fallback", o.onLoss)
	}
	if err := (cgroup.Uplink{Ifname: o.config.Ifname}).Check(); err != nil {
		return fmt.Errorf("--ifname: %w", err)
	}
	for _, name := range o.users {
		uid, err := parseUser(name)
		if err != nil {
			return fmt.Errorf("--server-user %s: %w", name, err)
		}
		o.config.ServerUIDs = append(o.config.ServerUIDs, uid)
	}
	o.config.Wait = time.Duration(o.wait) * time.Second
	if err := o.parseTraffic(); err != nil {
		return err
	}
	return needsRoot(o.command)
}

// parseTraffic reads what bind and unbind are for, unless it is a cgroup.
func (o *bindOptions) parseTraffic() (err error) {
	var t route.Traffic
	if o.uids != "" {
		first, last, ranged := strings.Cut(o.uids, "-")
		if !ranged {
			last = first
		}
		if t.UIDs.First, err = parseUser(first); err == nil {
			t.UIDs.Last, err = parseUser(last)
		}
		if err != nil {
			return fmt.Errorf("--uid %s: %w", o.uids, err)
		}
		t.UIDs.Set = true
	}
	if o.proto != "" {
		if t.IPProto, err = parseProtocol(o.proto); err != nil {
			return fmt.Errorf("--proto %s: %w", o.proto, err)
		}
	}
	if o.dports != "" {
		first, last, ranged := strings.Cut(o.dports, "-")
		if !ranged {
			last = first
		}
		from, err1 := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("--dport %s: want a port, or two as in 8000-8099", o.dports)
		}
		t.Dports = route.Ports{First: uint16(from), Last: uint16(to)}
		if o.proto == "" {
			return errors.New("--dport needs --proto, as in --proto tcp")
		}
	}
	if t != (route.Traffic{}) {
		o.config.Traffic = []route.Traffic{t}
	}
	return t.Check()
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

func needsRoot(command string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root, for BPF programs in the kernel, cgroups and rules", command)
	}
	return nil
}

// bound installs what binds the traffic, and returns what processes are bound to.
func (o *bindOptions) bound() (cgroup.Uplink, cgroup.Mark, error) {
	b, err := bind.Bind(context.Background(), o.config)
	for _, why := range b.Unanswered {
		fmt.Fprintln(os.Stderr, "table-allocator-client:", why)
	}
	if len(b.Overlapping) > 0 {
		fmt.Fprintf(os.Stderr, "table-allocator-client: rules of other programs look at the bits %#x of marks, too, for example %q: configure another bind_mark_mask\n",
			b.Marking.Mask, b.Overlapping[0])
	}
	return cgroup.Uplink{Ifname: b.Ifname, Fallback: b.OnLoss == uplink.Fallback}, cgroup.Mark{Value: b.Mark(), Mask: b.Marking.Mask}, err
}

func runBind(args []string) int {
	o := newBindOptions("bind")
	if err := o.parse(args); errors.Is(err, pflag.ErrHelp) {
		fmt.Print(bindUsage)
		return cli.ExitOK
	} else if err != nil {
		return failed(fmt.Errorf("%w (see bind --help)", err))
	}
	if err := o.oneThing(); err != nil {
		return failed(err)
	}
	to, mark, err := o.bound()
	if errors.Is(err, bind.ErrNoLease) {
		fmt.Fprintf(os.Stderr, "table-allocator-client: %v yet\n", err) // it may come later
	} else if err != nil {
		return failed(err)
	}
	var missing []cgroup.Missing
	switch {
	case o.cgroup:
		missing, err = makeCgroup(to, mark)
	case o.pin:
		var values []string
		values, missing, err = cgroup.Pin(to, mark)
		for _, v := range values {
			fmt.Println("BPFProgram=" + v)
		}
	default:
		err = nil
	}
	tell(missing)
	if err != nil {
		return failed(err)
	}
	return cli.ExitOK
}

// makeCgroup makes the cgroup of an interface and prints where it is.
func makeCgroup(uplink cgroup.Uplink, mark cgroup.Mark) ([]cgroup.Missing, error) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	defer cgroups.Close()
	dir, missing, err := cgroups.Interface(uplink, mark)
	if err == nil {
		fmt.Println(dir)
	}
	return missing, err
}

func runUnbind(args []string) int {
	o := newBindOptions("unbind")
	if err := o.parse(args); errors.Is(err, pflag.ErrHelp) {
		fmt.Print(bindUsage)
		return cli.ExitOK
	} else if err != nil {
		return failed(fmt.Errorf("%w (see unbind --help)", err))
	}
	if err := o.unbind(); err != nil {
		return failed(err)
	}
	return cli.ExitOK
}

func (o *bindOptions) unbind() error {
	if o.all {
		return bind.UnbindAll(o.config.Server, o.config.ServerUIDs)
	}
	if err := o.oneThing(); err != nil {
		return err
	}
	uplink := cgroup.Uplink{Ifname: o.config.Ifname, Fallback: o.config.OnLoss == uplink.Fallback}
	switch {
	case o.cgroup:
		cgroups, err := cgroup.Open()
		if err != nil {
			return err
		}
		defer cgroups.Close()
		return cgroups.RemoveInterface(uplink)
	case o.pin:
		return cgroup.Unpin(uplink)
	}
	all, err := bind.List(o.config.Server, o.config.ServerUIDs, o.config.Ifname)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(b bind.Bound) bool {
		return b.Ifname != o.config.Ifname || b.OnLoss != o.config.OnLoss || b.Traffic != o.config.Traffic[0]
	})
	if len(all) == 0 {
		return fmt.Errorf("%s is not bound to %s", o.config.Traffic[0], o.config.Ifname)
	}
	return bind.Unbind(all)
}

// oneThing fails unless the command line of bind or unbind says what to bind.
func (o *bindOptions) oneThing() error {
	things := 0
	for _, there := range []bool{o.config.Traffic != nil, o.cgroup, o.pin} {
		if there {
			things++
		}
	}
	if things != 1 || o.flags.NArg() != 0 {
		return fmt.Errorf("one of --uid, --proto, --cgroup and --pin is needed, and nothing else (see %s --help)", o.command)
	}
	return nil
}
