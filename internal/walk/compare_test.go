package walk

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// TestKernel compares Walk with the kernel on random sets of rules and routes: with RTM_GETROUTE for what the host
// sends and what it forwards, and with sockets. WALK_SETS and WALK_SEED make it longer, or another.
func TestKernel(t *testing.T) {
	sets, seed := setting("WALK_SETS", 200), setting("WALK_SEED", 1)
	l := newLab(t)
	flows, vrf := 0, 0
	// Where a kernel lacks VRFs, sets have only the rule for them, which is for no other packet.
	_, err := l.ns.Output("ip", "link", "add", "v0", "type", "vrf", "table", "100")
	for n := range sets {
		s := newSet(rand.New(rand.NewPCG(uint64(seed), uint64(n))), []int{unix.AF_INET, unix.AF_INET6}[n%2])
		if n%4 == 0 {
			vrf++
			s.rules = append(s.rules, fmt.Sprintf("rule add pref %d l3mdev", 1000+n))
		}
		l.carrier(n%8 < 6)
		if wrong := l.check(s); wrong != "" {
			s = l.shrink(s)
			t.Fatalf("set %d of seed %d: %s\nshrunk:\n%s\n%s", n, seed, wrong, strings.Join(s.lines(), "\n"), l.check(s))
		}
		flows += len(s.flows)
	}
	t.Logf("%d flows of %d sets: no difference; the rule of VRFs is in %d sets, a link of that kind in %d; rules by DSCP, flow label and bits of ports: %d", flows, sets, vrf, map[bool]int{true: sets}[err == nil], l.raw)
}

func setting(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

// lab is a host with three links, whose MTUs say by which a socket sends.
type lab struct {
	t     *testing.T
	ns    *nettest.Namespace
	isp   *nettest.Namespace
	links map[int]route.Link
	index map[string]int
	down  bool
	raw   int // rules of addRaw that the kernel has taken
}

// addRaw adds a rule from "raw PRIORITY TABLE TYPE=BYTES...", with attributes by their numbers. Older kernels refuse some.
func addRaw(family int, line string) error {
	words := strings.Fields(line)
	message := nl.NewNetlinkRequest(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	header := nl.NewRtMsg()
	header.Family, header.Type, header.Table, header.Protocol, header.Scope = uint8(family), nl.FR_ACT_TO_TBL, 0, 0, 0
	message.AddData(header)
	for _, attr := range slices.Concat([]string{fmt.Sprint(unix.FRA_PRIORITY, "=", native32(words[1])), fmt.Sprint(unix.FRA_TABLE, "=", native32(words[2]))}, words[3:]) {
		typ, text, _ := strings.Cut(attr, "=")
		value, err := hex.DecodeString(text)
		number, numberErr := strconv.Atoi(typ)
		if err := errors.Join(err, numberErr); err != nil {
			return err
		}
		message.AddData(nl.NewRtAttr(number, value))
	}
	_, err := message.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func native32(text string) string {
	n, _ := strconv.ParseUint(text, 10, 32) // of the generator
	return hex.EncodeToString(binary.NativeEndian.AppendUint32(nil, uint32(n)))
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t, ns: nettest.New(t, "host"), isp: nettest.New(t, "isp"), index: make(map[string]int)}
	for i := range 3 {
		name := fmt.Sprintf("c%d", i)
		nettest.Veth(t, l.ns, name, l.isp, name)
		l.ns.Batch(t, fmt.Sprintf("link set %s mtu %d group %d", name, 1400+i, i),
			fmt.Sprintf("address add 10.0.%d.2/24 dev %s", i+1, name),
			fmt.Sprintf("address add fd00:%d::2/64 dev %s nodad", i+1, name))
		l.ns.Sysctl(t, "net/ipv4/conf/"+name+"/rp_filter", "0")
	}
	l.ns.Sysctl(t, "net/ipv4/conf/all/rp_filter", "0")
	l.ns.Sysctl(t, "net/ipv4/ip_forward", "1")
	l.ns.Sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	for _, family := range []string{"ipv4", "ipv6"} {
		l.ns.Sysctl(t, "net/"+family+"/conf/c2/ignore_routes_with_linkdown", "1")
	}
	l.look()
	return l
}

// carrier gives c2 a carrier or takes it.
func (l *lab) carrier(has bool) {
	if l.down == !has {
		return
	}
	l.down = !has
	l.isp.IP(l.t, "link set c2 "+map[bool]string{true: "up", false: "down"}[has])
	for l.look(); l.links[l.index["c2"]].Carrier != has; l.look() { // the kernel needs a moment
	}
}

func (l *lab) look() {
	l.ns.Do(func() {
		c := dial(l.t)
		defer c.Close()
		all, err := c.Links()
		if err != nil {
			l.t.Fatal(err)
		}
		l.links = make(map[int]route.Link)
		for _, link := range all {
			l.links[link.Index], l.index[link.Name] = link, link.Index
		}
	})
}

func dial(t *testing.T) *route.Conn {
	c, err := route.Dial()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// install makes the rules and routes those of a set. The kernel refuses some lines, which is no matter.
func (l *lab) install(s set) {
	file := l.t.TempDir() + "/batch"
	lines := s.lines()
	raw := slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return !strings.HasPrefix(line, "raw ") })
	lines = slices.DeleteFunc(lines, func(line string) bool { return strings.HasPrefix(line, "raw ") })
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		l.t.Fatal(err)
	}
	_, _ = l.ns.Output("ip", map[int]string{unix.AF_INET: "-4", unix.AF_INET6: "-6"}[s.family], "-force", "-batch", file)
	for _, line := range raw {
		var err error
		if l.ns.Do(func() { err = addRaw(s.family, line) }); err == nil {
			l.raw++
		}
	}
}

// check installs a set and asks about its flows. It returns the first difference.
func (l *lab) check(s set) (wrong string) {
	l.install(s)
	l.ns.Do(func() {
		c := dial(l.t)
		defer c.Close()
		w := World{Tables: make(map[uint32][]route.Route), Links: l.links, IgnoreLinkdown: map[int]bool{l.index["c2"]: true}}
		var err error
		if w.Rules, err = c.Rules(s.family); err != nil {
			l.t.Fatal(err)
		}
		for _, r := range w.Rules {
			if _, known := w.Tables[r.Table]; known || r.Action != route.Lookup {
				continue
			}
			if w.Tables[r.Table], err = c.Routes(s.family, r.Table); err != nil {
				l.t.Fatal(err)
			}
		}
		for _, f := range s.flows {
			if wrong = l.compare(c, w, f.packet(l.index)); wrong != "" {
				return
			}
		}
	})
	return wrong
}

// compare asks about one packet, in the namespace.
func (l *lab) compare(c *route.Conn, w World, p Packet) string {
	if p.Dst.Is4() || p.Oif == 0 || !p.Src.IsValid() { // else RTM_GETROUTE asks for less than a socket does
		a := w.Walk(p)
		got, err := c.Match(p.Question)
		if !a.Agrees(got, err) {
			return fmt.Sprintf("%+v: walk says %q %v, on the link %v, the kernel %q %v\nsteps %v", p, a.Route, a.Err, a.OnLink, got, err, a.Steps)
		}
		if a.OnLink {
			if got, err = c.Resolve(p.Question); err != nil || got.Index != p.Oif || got.Gateway.IsValid() {
				return fmt.Sprintf("%+v: walk says on the link, the kernel %v %v", p, got, err)
			}
		}
	}
	if p.Iif != 0 || p.IPProto != unix.IPPROTO_UDP {
		return ""
	}
	return l.compareSocket(c, w, p)
}

func (l *lab) compareSocket(c *route.Conn, w World, p Packet) string {
	p.Bound, p.Dport = p.Oif != 0, max(p.Dport, 1)
	s := connect(p)
	if s.err == unix.EADDRINUSE || s.err == unix.EADDRNOTAVAIL {
		return ""
	}
	source := s.src
	if !source.IsValid() {
		r, err := c.Resolve(p.Question)
		if err == nil {
			source = r.Src
		}
	}
	p.Sport = s.sport
	answers := w.Connect(p, source)
	a := answers[len(answers)-1]
	if a.Err != s.err && !(s.err != 0 && a.Err != 0 && len(answers) == 1 && p.Dst.Is6()) {
		return fmt.Sprintf("socket %+v: walk says %q %v, the kernel %v %v\nsteps %v", p, a.Route, a.Err, s.src, s.err, a.Steps)
	}
	if a.Err != 0 {
		return ""
	}
	links := a.Route.Links()
	if a.OnLink {
		links = []int{p.Oif}
	}
	if a.Route.Type == unix.RTN_LOCAL {
		links = []int{loopbackIndex}
	}
	if !slices.ContainsFunc(links, func(i int) bool { return l.links[i].MTU == s.mtu || i == loopbackIndex && s.mtu > 1500 }) {
		return fmt.Sprintf("socket %+v: walk says %q, the kernel a link with MTU %d, source %v\nsteps %v", p, a.Route, s.mtu, s.src, a.Steps)
	}
	return ""
}

func errno(err error) syscall.Errno {
	var e syscall.Errno
	errors.As(err, &e)
	return e
}

// socket is what the kernel says of a UDP socket that was connected, which sends nothing.
type socket struct {
	src   netip.Addr
	sport uint16
	mtu   int
	err   syscall.Errno
}

func connect(p Packet) (s socket) {
	_, _, _ = syscall.RawSyscall(unix.SYS_SETFSUID, uintptr(p.UID), 0, 0) // of this thread; the socket is the user's
	fd, err := unix.Socket(p.Family(), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	_, _, _ = syscall.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
	if err != nil {
		return socket{err: errno(err)}
	}
	defer unix.Close(fd)
	level, tos, mtu, device := unix.IPPROTO_IP, unix.IP_TOS, unix.IP_MTU, p.Oif
	if p.Dst.Is6() {
		level, tos, mtu = unix.IPPROTO_IPV6, unix.IPV6_TCLASS, unix.IPV6_MTU
	}
	errs := []error{unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(p.Mark)), unix.SetsockoptInt(fd, level, tos, int(p.TOS))}
	if device != 0 {
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, device))
	}
	if p.Src.IsValid() || p.Sport != 0 {
		src := p.Src
		if !src.IsValid() {
			src = map[bool]netip.Addr{true: netip.IPv4Unspecified(), false: netip.IPv6Unspecified()}[p.Dst.Is4()]
		}
		errs = append(errs, unix.Bind(fd, sockaddr(src, p.Sport)))
	}
	if err := errors.Join(errs...); err != nil {
		return socket{err: errno(err)}
	}
	if err := unix.Connect(fd, sockaddr(p.Dst, p.Dport)); err != nil {
		s.err = errno(err)
	}
	if name, err := unix.Getsockname(fd); err == nil {
		switch a := name.(type) {
		case *unix.SockaddrInet4:
			s.src, s.sport = netip.AddrFrom4(a.Addr), uint16(a.Port)
		case *unix.SockaddrInet6:
			s.src, s.sport = netip.AddrFrom16(a.Addr), uint16(a.Port)
		}
		if s.src.IsUnspecified() {
			s.src = netip.Addr{}
		}
	}
	s.mtu, _ = unix.GetsockoptInt(fd, level, mtu) // only of one that is connected
	return s
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

// shrink leaves out rules, routes and flows as long as there is a difference.
func (l *lab) shrink(s set) set {
	for _, part := range []func(*set) *[]string{func(s *set) *[]string { return &s.rules }, func(s *set) *[]string { return &s.routes }} {
		for i := 0; i < len(*part(&s)); {
			smaller := s
			list := part(&smaller)
			*list = slices.Delete(slices.Clone(*list), i, i+1)
			if l.check(smaller) != "" {
				s = smaller
			} else {
				i++
			}
		}
	}
	return s
}
