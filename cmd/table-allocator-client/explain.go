package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/inspect"
)

const explainUsage = `Usage: table-allocator-client explain [DST] [options]

Says which rule and which route decide where packets to DST, an address or a
name, leave, from which source, what would change that, and whether replies are
accepted. Nothing is sent. The exit code is 0 if there is a route, 1 if there is
none, 2 for wrong usage, 3 if the kernel disagrees, which is a bug.

      --from ADDR           from this address
  -i, --ifname or --oif IFNAME  of a socket that is bound to this link
      --iif or --forwarded-from IFNAME  arriving by this link
      --mark M              of a socket with this mark
      --uid USER            of a socket of this user (the caller)
      --pid PID             as this process, or without DST each of its sockets
      --socket LOCAL-REMOTE  of the socket with these ends, each ADDR:PORT
      --proto PROTOCOL      tcp, udp, icmp, ... (udp)
      --sport N, --dport N  from this port, to this port
      --tos N               with this TOS
      --all                 show rules for other packets, too
      --json                print JSON
      --redact              shorten public addresses, for a report
`

// Exit codes of explain beside 0 and 2.
const (
	exitNoRoute   = 1
	exitDisagrees = 3
)

// explainFlags are the options of explain.
type explainFlags struct {
	*flags
	packet      inspect.Packet
	pid         int
	ends        [2]netip.AddrPort // of a socket; zero: none is asked for
	all, asJSON bool
	redact      bool
}

func newExplainFlags(f *flags) *explainFlags {
	x := &explainFlags{flags: f}
	x.packet.UID = uint32(os.Geteuid())
	value(f, &x.packet.Src, "from", "", parseUnmapped)
	value(f, &x.packet.Oif, "oif", "", parseLink)
	value(f, &x.packet.Oif, "ifname", "i", parseLink)
	value(f, &x.packet.Iif, "iif", "", parseLink)
	value(f, &x.packet.Iif, "forwarded-from", "", parseLink)
	value(f, &x.packet.Mark, "mark", "", parseMark)
	value(f, &x.packet.UID, "uid", "", parseUser)
	f.IntVar(&x.pid, "pid", 0, "")
	value(f, &x.ends, "socket", "", parseEnds)
	value(f, &x.packet.IPProto, "proto", "", parseProtocol)
	value(f, &x.packet.Sport, "sport", "", parsePort)
	value(f, &x.packet.Dport, "dport", "", parsePort)
	value(f, &x.packet.TOS, "tos", "", parseTOS)
	f.BoolVar(&x.all, "all", false, "")
	f.BoolVar(&x.asJSON, "json", false, "")
	f.BoolVar(&x.redact, "redact", false, "")
	return x
}

func parseLink(text string) (string, error) { return linkName(text), nil }

// parseMark reads a mark, or a mark and the mask for its bits.
func parseMark(text string) (uint32, error) {
	text, maskText, masked := strings.Cut(text, "/")
	mark, err := strconv.ParseUint(text, 0, 32)
	mask := uint64(1<<32 - 1)
	if err == nil && masked {
		mask, err = strconv.ParseUint(maskText, 0, 32)
	}
	if err != nil {
		return 0, errors.New("want a number like 0x2000000")
	}
	return uint32(mark & mask), nil
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, errors.New("want a port from 0 to 65535")
	}
	return uint16(port), nil
}

func parseTOS(text string) (uint8, error) {
	tos, err := strconv.ParseUint(text, 0, 8)
	if err != nil {
		return 0, errors.New("want a TOS from 0 to 0xff")
	}
	return uint8(tos), nil
}

// parseUnmapped reads an address. Programs that know IPv6 alone write those of IPv4 as ::ffff:192.0.2.2.
func parseUnmapped(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	return addr.Unmap(), err
}

// parseEnds reads both ends of a socket, as in 192.0.2.2:51034-203.0.113.9:443, or as ss shows them of a socket that is both of IPv4
// and IPv6.
func parseEnds(text string) (ends [2]netip.AddrPort, err error) {
	local, remote, ok := strings.Cut(text, "-")
	if ok {
		ends[0], err = netip.ParseAddrPort(local)
	}
	if ok && err == nil {
		ends[1], err = netip.ParseAddrPort(remote)
	}
	if !ok || err != nil {
		return ends, errors.New("want both ends, as in 192.0.2.2:51034-203.0.113.9:443 or [2001:db8::2]:51034-[2001:db8::9]:443")
	}
	for i, end := range ends {
		ends[i] = netip.AddrPortFrom(end.Addr().Unmap(), end.Port())
	}
	return ends, nil
}

func explain(f *flags) action {
	x := newExplainFlags(f)
	return func(args []string) error {
		packets, err := x.packets(args)
		if err != nil {
			return err
		}
		code := 0
		for i, p := range packets {
			e, err := inspect.Explain(p)
			if errors.Is(err, inspect.ErrNoLink) {
				return wrongUsage(err)
			}
			if err != nil {
				return err
			}
			if i > 0 && !x.asJSON {
				fmt.Println()
			}
			if err := x.print(e); err != nil {
				return err
			}
			if e.Result.Error != "" {
				code = max(code, exitNoRoute)
			}
			if !e.Kernel.Agrees {
				code = exitDisagrees
			}
		}
		if code != 0 {
			return exitError{code}
		}
		return nil
	}
}

// packets are what is asked for: one for each address of the destination, or for each socket.
func (x *explainFlags) packets(args []string) (packets []inspect.Packet, err error) {
	ofSocket := x.Changed("socket")
	switch {
	case ofSocket && (len(args) > 0 || x.pid != 0):
		return nil, wrongUsage(errors.New("--socket says where packets go: no destination and no --pid"))
	case ofSocket:
		s, err := inspect.SocketOf(x.ends[0], x.ends[1])
		if errors.Is(err, inspect.ErrNoSocket) {
			return nil, wrongUsage(err)
		}
		return []inspect.Packet{{Question: s.Question()}}, err
	case len(args) == 0 && x.pid != 0:
		sockets, err := inspect.SocketsOf(x.pid)
		if err == nil && len(sockets) == 0 {
			err = fmt.Errorf("process %d has no socket with a far end: name a destination", x.pid)
		}
		if err != nil {
			return nil, wrongUsage(err)
		}
		for _, s := range sockets {
			packets = append(packets, inspect.Packet{Question: s.Question()})
		}
		return packets, nil
	case len(args) != 1:
		return nil, wrongUsage(errors.New("one destination is needed, or --pid or --socket"))
	}
	if err := x.check(); err != nil {
		return nil, err
	}
	addrs, err := destinations(args[0], x.packet)
	if err != nil {
		return nil, wrongUsage(err)
	}
	for _, addr := range addrs {
		p := x.packet
		p.Dst = addr.WithZone("")
		zone := linkOfZone(addr.Zone())
		if p.Oif == "" && p.Iif == "" {
			p.Oif = zone
		}
		switch {
		case zone != "" && zone != p.Oif:
			return nil, wrongUsage(fmt.Errorf("%s is on the link %s, and other packets are asked for: leave out --oif and --iif", addr, zone))
		case p.Dst.IsUnspecified():
			return nil, wrongUsage(fmt.Errorf("%s is no destination", p.Dst))
		case p.Dst.Is6() && p.Oif == "" && p.Iif == "" && (p.Dst.IsLinkLocalUnicast() || p.Dst.IsLinkLocalMulticast()):
			return nil, wrongUsage(fmt.Errorf("%s is on every link: name one, as in %s%%wan0 or --oif wan0", p.Dst, p.Dst))
		}
		packets = append(packets, p)
	}
	return packets, nil
}

// linkOfZone is the name of the link that the zone of an address means, which may be a number.
func linkOfZone(zone string) string {
	if index, err := strconv.Atoi(zone); err == nil {
		if link, err := net.InterfaceByIndex(index); err == nil {
			return link.Name
		}
	}
	return zone
}

// check fills in what a process sends with, and checks what was given together.
func (x *explainFlags) check() error {
	if x.packet.Iif != "" {
		x.packet.UID = 0 // what is forwarded has no owner
		if !x.packet.Src.IsValid() {
			return wrongUsage(errors.New("--iif needs --from, the source of the packets"))
		}
		if x.packet.Oif != "" || x.pid != 0 {
			return wrongUsage(errors.New("--iif is for what this host forwards: no --oif and no --pid"))
		}
	}
	if x.pid == 0 {
		return nil
	}
	uid, err := inspect.UserOf(x.pid)
	if err != nil {
		return wrongUsage(err)
	}
	x.packet.UID = uid
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	mark, err := cgroups.MarkOf(x.pid)
	if err == nil && x.packet.Mark == 0 && !x.Changed("mark") {
		x.packet.Mark = mark.Value
	}
	return err
}

// destinations are the addresses of a name, of the family that the packet has otherwise.
func destinations(name string, p inspect.Packet) (addrs []netip.Addr, err error) {
	if addr, err := netip.ParseAddr(name); err == nil {
		addrs = []netip.Addr{addr.Unmap()}
	} else {
		ips, err := net.LookupIP(name)
		if err != nil {
			return nil, err
		}
		for _, ip := range ips {
			if addr, ok := netip.AddrFromSlice(ip); ok {
				addrs = append(addrs, addr.Unmap())
			}
		}
	}
	var fitting []netip.Addr
	for _, a := range addrs {
		if !p.Src.IsValid() || p.Src.Is4() == a.Is4() {
			fitting = append(fitting, a)
		}
	}
	if len(fitting) == 0 {
		return nil, fmt.Errorf("%s and %s are of different families", name, p.Src)
	}
	return fitting, nil
}

func (x *explainFlags) print(e inspect.Explanation) error {
	e = printable(redacted(e, x.redact))
	if x.asJSON {
		return json.NewEncoder(os.Stdout).Encode(e)
	}
	w := bufio.NewWriter(os.Stdout)
	printExplanation(w, e, x.all)
	return w.Flush()
}

func printExplanation(w io.Writer, e inspect.Explanation, all bool) {
	fmt.Fprintln(w, questionText(e.Question))
	printSteps(w, e.Steps, all)
	if len(e.Second) > 0 {
		fmt.Fprintf(w, "source %s, then looked up again from it:\n", e.Result.Source)
		printSteps(w, e.Second, all)
	}
	r := e.Result
	switch {
	case r.Error != "":
		fmt.Fprintf(w, "no route: %s\n", r.Error)
	case r.Link == "lo":
		fmt.Fprintln(w, "delivered to this host")
	default:
		text := "leaves by " + r.Link
		if r.Source != "" {
			text += " with " + r.Source
		}
		if r.Gateway != "" {
			text += " through " + r.Gateway
		}
		fmt.Fprintf(w, "%s, MTU %d (%s)\n", text, r.MTU, r.MTUFrom)
	}
	for _, text := range e.Warnings {
		fmt.Fprintln(w, "warning: "+text)
	}
	for _, x := range e.Without {
		fmt.Fprintf(w, "without %s: %s\n", x.What, orDefault(x.Link, "no route: "+x.Error))
	}
	if v := e.Reverse; v != nil {
		fmt.Fprintf(w, "replies: arrive on %s, rp_filter %d: %s\n", v.Link, v.RPFilter, v.Verdict)
	}
	switch {
	case e.Kernel.GetRoute == "not asked":
	case e.Kernel.Agrees:
		fmt.Fprintf(w, "kernel agrees (socket: %s)\n", e.Kernel.Socket)
	default:
		fmt.Fprintf(w, "THE KERNEL DISAGREES, please report this with the output of ip rule: route get: %s; socket: %s\n", e.Kernel.GetRoute, e.Kernel.Socket)
	}
}

func questionText(q inspect.Asked) string {
	words := []string{"to " + q.To}
	if q.Iif != "" {
		words = append(words, "from "+q.From+" arriving by "+q.Iif)
		return strings.Join(words, " ")
	}
	words[0] += " from this host"
	words = append(words, "source "+orDefault(q.From, "none"))
	if q.Oif != "" {
		words = append(words, "bound to "+q.Oif)
	}
	words = append(words, fmt.Sprintf("mark %#x", q.Mark), fmt.Sprintf("uid %d", q.UID))
	if q.Proto != 0 && q.Proto != unix.IPPROTO_UDP {
		words = append(words, fmt.Sprintf("protocol %d", q.Proto))
	}
	return strings.Join(words, ", ")
}

// printSteps prints a line for each rule, and marks the one that decides.
func printSteps(w io.Writer, steps []inspect.Step, all bool) {
	hidden, wide := 0, 0
	for _, s := range steps {
		if all || !s.Hides() {
			wide = max(wide, min(len(s.Rule), 64))
		}
	}
	for _, s := range steps {
		if s.Hides() && !all {
			hidden++
			continue
		}
		sign, why := " ", s.Why
		if s.Decides {
			sign, why = ">", s.Route
		}
		if s.Owner != "" {
			why = strings.TrimSpace("(" + s.Owner + ") " + why)
		}
		fmt.Fprintf(w, "  %-6d %-*s %s %s\n", s.Priority, wide, s.Rule, sign, why)
	}
	if hidden > 0 {
		fmt.Fprintf(w, "  (rules for other packets: %d, see --all)\n", hidden)
	}
}
