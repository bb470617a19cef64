package probe

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// host has two uplinks to an internet that answers DNS, and HTTP with status 204 for /204 and another for other paths.
type host struct {
	*nettest.Namespace
	*nettest.Internet
	dns chan netip.AddrPort // the sources of DNS questions
}

var uplinks = []Uplink{
	{Ifname: "wan0", Address: netip.MustParseAddr("10.1.0.2")},
	{Ifname: "wan0", Address: netip.MustParseAddr("fd01::2")},
	{Ifname: "wan1", Address: netip.MustParseAddr("10.2.0.2")},
	{Ifname: "wan1", Address: netip.MustParseAddr("fd02::2")},
}

func newHost(t *testing.T) host {
	h := host{Namespace: nettest.New(t, "host"), dns: make(chan netip.AddrPort, 1)}
	h.Internet = nettest.NewInternet(t, h.Namespace,
		&nettest.Provider{Ifname: "wan0", Routers: []string{"10.1.0.1/24", "fd01::1/64"}, Routed: []string{"10.1.0.0/24", "fd01::/64"}},
		&nettest.Provider{Ifname: "wan1", Routers: []string{"10.2.0.1/24", "fd02::1/64"}, Routed: []string{"10.2.0.0/24", "fd02::/64"}})
	h.Namespace.Sysctl(t, "net/ipv4/ping_group_range", "0 0")
	h.Namespace.Batch(t,
		"address add 10.1.0.2/24 dev wan0", "address add fd01::2/64 dev wan0 nodad",
		"address add 10.2.0.2/24 dev wan1", "address add fd02::2/64 dev wan1 nodad",
		"route add default via 10.1.0.1 dev wan0", "route add default via fd01::1 dev wan0",
		"rule add priority 10000 from 10.2.0.2 lookup 102",
		"route add default via 10.2.0.1 dev wan1 table 102", "route add default via fd02::1 dev wan1 table 102")
	h.Namespace.IP(t, "-6 rule add priority 10000 from fd02::2 lookup 102")
	h.Internet.Do(func() {
		for _, far := range []string{nettest.Far4, nettest.Far6} {
			h.serveDNS(t, net.JoinHostPort(far, "53"))
			serveHTTP(t, net.JoinHostPort(far, "80"))
		}
	})
	return h
}

func (h host) serveDNS(t *testing.T, at string) {
	t.Helper()
	nettest.ServeDatagrams(t, at, func(conn net.PacketConn, question []byte, from net.Addr) {
		select {
		case h.dns <- from.(*net.UDPAddr).AddrPort():
		default:
		}
		answer := reply(question, record(typeA, 198, 51, 100, 1), record(typeAAAA, netip.MustParseAddr(nettest.Far6).AsSlice()...))
		_, _ = conn.WriteTo(answer, from)
	})
}

func serveHTTP(t *testing.T, at string) {
	t.Helper()
	listener, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { listener.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, len("GET /204"))
			_, _ = io.ReadFull(conn, buf) // less is another path
			status := "302 Found"
			if string(buf) == "GET /204" {
				status = "204 No Content"
			}
			_, _ = io.WriteString(conn, "HTTP/1.1 "+status+"\r\n\r\n") // as for DNS
			_ = conn.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()
}

func far(u Uplink) netip.Addr {
	if u.Address.Is4() {
		return netip.MustParseAddr(nettest.Far4)
	}
	return netip.MustParseAddr(nettest.Far6)
}

// ask asks the internet by an uplink. An answer is waited for as long as a busy machine may take; a silence is not.
func (h host) ask(u Uplink, kind Kind, patience time.Duration) (a Answer) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	h.Namespace.Do(func() { a = Ask(ctx, u, kind, far(u)) })
	return a
}

const (
	sure  = time.Minute
	brief = 200 * time.Millisecond
)

func TestAsk(t *testing.T) {
	h := newHost(t)
	for _, u := range uplinks {
		for _, test := range []struct {
			kind        Kind
			inet, inet6 int // bytes
		}{
			{Kind{Name: icmp}, 72, 112},
			{Kind{Name: dns}, 134, 174}, // a question of 17 bytes, and 44 of records in the answer
			{Kind{tcp, 80}, 200, 280},
		} {
			a := h.ask(u, test.kind, sure)
			want := test.inet6
			if u.Address.Is4() {
				want = test.inet
			}
			if a.Err != nil || a.Bytes != want || a.RTT <= 0 {
				t.Errorf("%s by %s: %+v, want %d bytes", test.kind, u.Address, a, want)
			}
			if test.kind.Name == dns {
				if from := <-h.dns; from.Addr() != u.Address {
					t.Errorf("the internet saw %v, want %v", from.Addr(), u.Address)
				}
			}
		}
	}
}

func TestFetch(t *testing.T) {
	h := newHost(t)
	for _, u := range uplinks {
		u.Nameservers = []netip.Addr{far(u)}
		for _, test := range []struct {
			page Page
			want error
		}{
			{Page{far(u).String(), 80, "/204"}, nil},
			{Page{"check.example", 80, "/204"}, nil},
			{Page{"check.example", 80, "/"}, errStatus},
			{Page{"check.example", 81, "/204"}, unix.ECONNREFUSED},
		} {
			ctx, cancel := context.WithTimeout(context.Background(), sure)
			h.Namespace.Do(func() {
				if n, err := fetch(ctx, u, test.page, u.Nameservers); !errors.Is(err, test.want) || n == 0 && err == nil {
					t.Errorf("%+v by %s: %d bytes, %v, want %v", test.page, u.Address, n, err, test.want)
				}
			})
			cancel()
		}
	}
}

// TestOnlyByTheUplink asks by an uplink whose packets the rules of the host would send elsewhere.
func TestOnlyByTheUplink(t *testing.T) {
	kinds := []Kind{{Name: icmp}, {Name: dns}, {tcp, 80}}
	t.Run("its table is empty", func(t *testing.T) {
		h := newHost(t)
		for _, args := range []string{"route flush table 102", "-6 route flush table 102"} {
			h.Namespace.IP(t, args)
		}
		for _, u := range uplinks[2:] {
			for _, kind := range kinds {
				if a := h.ask(u, kind, brief); a.Err == nil {
					t.Errorf("%s by %s is answered", kind, u.Address)
				}
			}
		}
		select {
		case from := <-h.dns:
			t.Errorf("the internet was asked by %v", from)
		default:
		}
	})
	t.Run("the rule of a VPN is the first", func(t *testing.T) {
		h := newHost(t)
		for _, args := range []string{"rule add priority 5270 lookup 52", "-6 rule add priority 5270 lookup 52",
			"route add default via 10.1.0.1 dev wan0 table 52", "-6 route add default via fd01::1 dev wan0 table 52"} {
			h.Namespace.IP(t, args)
		}
		for _, u := range uplinks[2:] {
			for _, kind := range kinds {
				if a := h.ask(u, kind, sure); a.Err != nil {
					t.Errorf("%s by %s: %v", kind, u.Address, a.Err)
				}
			}
			if from := <-h.dns; from.Addr() != u.Address {
				t.Errorf("the internet saw %v, want %v", from.Addr(), u.Address)
			}
		}
	})
}

func TestNotPermitted(t *testing.T) {
	h := newHost(t)
	h.Namespace.Sysctl(t, "net/ipv4/ping_group_range", "1 0")
	if a := h.ask(uplinks[0], Kind{Name: icmp}, sure); !errors.Is(a.Err, unix.EACCES) {
		t.Errorf("%v, want EACCES at once", a.Err)
	}
}

// TestGateway: a gateway on the link answers, whether the kernel knows it or not, and what is not there does not.
func TestGateway(t *testing.T) {
	h := newHost(t)
	ask := func(u Uplink, gateway string, patience time.Duration) (a Answer) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		h.Namespace.Do(func() { a = Ask(ctx, u, Kind{Name: "gateway"}, netip.MustParseAddr(gateway)) })
		return a
	}
	for n, gateway := range []string{"10.1.0.1", "fd01::1", "10.2.0.1", "fd02::1"} {
		for _, state := range []string{"", "stale", "reachable", "failed"} {
			if state != "" {
				h.Namespace.IP(t, "neighbour replace "+gateway+" dev "+uplinks[n].Ifname+" lladdr "+h.lladdr(t, n/2)+" nud "+state)
			}
			if a := ask(uplinks[n], gateway, sure); a.Err != nil || a.Bytes == 0 {
				t.Errorf("%s, which is %s: %+v", gateway, state, a)
			}
		}
		for _, state := range []string{"permanent", "noarp"} { // the kernel asks nobody
			h.Namespace.IP(t, "neighbour replace "+gateway+" dev "+uplinks[n].Ifname+" lladdr "+h.lladdr(t, n/2)+" nud "+state)
			if a := ask(uplinks[n], gateway, sure); !errors.Is(a.Err, ErrUnable) {
				t.Errorf("%s, which is %s: %+v", gateway, state, a)
			}
		}
	}
	for n, nobody := range []string{"10.1.0.77", "fd01::77", "10.2.0.77", "fe80::77"} {
		if a := ask(uplinks[n], nobody, brief); !errors.Is(a.Err, errNoNeighbour) || errors.Is(a.Err, ErrUnable) {
			t.Errorf("%s: %+v, want no answer", nobody, a)
		}
	}
}

// lladdr is the link-layer address of the router of uplink n.
func (h host) lladdr(t *testing.T, n int) string {
	t.Helper()
	_, rest, _ := strings.Cut(h.Providers[n].IP(t, "link show dev lan"), "link/ether ")
	return strings.Fields(rest)[0]
}

// TestRouterAnswers: what a router without the Internet says in place of the target is no answer.
func TestRouterAnswers(t *testing.T) {
	h := newHost(t)
	for _, u := range uplinks {
		if a := h.ask(u, Kind{tcp, 81}, sure); !errors.Is(a.Err, unix.ECONNREFUSED) {
			t.Errorf("tcp:81 by %s, which is refused: %+v", u.Address, a)
		}
	}
	question := dnsQuestion(1, ".", typeNS)
	for code, want := range []bool{true, true, false, true, true, false} { // RFC 1035: none, format, server failure, name error, not implemented, refused
		b := reply(question)
		b[3] |= byte(code)
		if !isDNSAnswer(question, b) || saysSomething(b) != want {
			t.Errorf("an answer with code %d: %v, want %v", code, !want, want)
		}
	}
}

// TestResolverRefuses: a resolver that refuses the first question alone answers, and one that refuses all does not.
func TestResolverRefuses(t *testing.T) {
	for name, longest := range map[string]int{"all": 0, "the long answer": len(dnsQuestion(0, ".", typeNS))} {
		t.Run(name, func(t *testing.T) {
			nettest.ServeDatagrams(t, "127.0.0.1:53", func(conn net.PacketConn, question []byte, from net.Addr) {
				answer := reply(question)
				if n := len(question); n == longest || longest == 0 {
					answer[3] |= 5
				}
				_, _ = conn.WriteTo(answer, from)
			})
			here := netip.MustParseAddr("127.0.0.1")
			ctx, cancel := context.WithTimeout(context.Background(), sure)
			defer cancel()
			a := Ask(ctx, Uplink{Ifname: "lo", Address: here}, Kind{Name: dns}, here)
			if want := longest == 0; errors.Is(a.Err, errRefused) != want || (a.Err == nil) == want {
				t.Errorf("%+v", a)
			}
		})
	}
}

// TestSilent: a round in which this process could ask nothing is told from one without an answer, and the next round asks by all kinds.
func TestSilent(t *testing.T) {
	const at = "127.0.0.1:80" // of the sandbox, in which nobody may ping
	serveHTTP(t, at)
	ping, knock := Kind{Name: icmp}, Kind{tcp, 80}
	round := func(habit Habit, timeout time.Duration, kinds ...Kind) Result {
		here := netip.MustParseAddrPort(at).Addr()
		return Round(context.Background(), Task{Uplink: Uplink{Ifname: "lo", Address: here}, Plan: Plan{Targets: []netip.Addr{here}, Kinds: kinds}, Habit: habit, Timeout: timeout})
	}
	if r := round(Habit{}, sure, ping); r.Answered || !errors.Is(r.Silent, ErrUnable) || !errors.Is(r.Silent, unix.EACCES) {
		t.Errorf("by ICMP alone, which is not permitted: %+v", r)
	}
	for name, u := range map[string]Uplink{
		"an address that is being renewed": {Ifname: "lo", Address: netip.MustParseAddr("192.0.2.9")},
		"a link that is being renamed":     {Ifname: "wan9", Address: netip.MustParseAddr("127.0.0.1")},
	} {
		r := Round(context.Background(), Task{Uplink: u, Plan: Plan{Targets: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Kinds: []Kind{knock}}, Timeout: sure})
		if r.Answered || !errors.Is(r.Silent, errNotAsked) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if r := round(Habit{}, sure, ping, knock); !r.Answered || r.Silent != nil || r.Habit.Kind != knock {
		t.Errorf("by ICMP, which is not permitted, and TCP: %+v", r)
	}
	r := round(Habit{Kind: ping}, sure, ping, knock)
	if r.Answered || r.Silent == nil || errors.Is(r.Silent, ErrUnable) {
		t.Errorf("by ICMP, which is not permitted any more: %+v", r)
	}
	if r = round(r.Habit, sure, ping, knock); !r.Answered {
		t.Errorf("the round after that: %+v", r)
	}
	if r := round(Habit{}, -1, knock); r.Answered || r.Silent == nil {
		t.Errorf("a round that was over before it began: %+v", r)
	}
}

// TestUnasked: what this process may not do is told from what runs out and comes again.
func TestUnasked(t *testing.T) {
	for err, unable := range map[error]bool{unix.EACCES: true, unix.EPERM: true, unix.EAFNOSUPPORT: true, unix.EOPNOTSUPP: true, unix.EMFILE: false, unix.ENFILE: false, unix.ENOBUFS: false} {
		if got := unasked(err); errors.Is(got, ErrUnable) != unable || errors.Is(got, errNotAsked) == unable || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// TestStoodStill: what came while the process stood still, and the time ran out, counts.
func TestStoodStill(t *testing.T) {
	h := newHost(t)
	h.Namespace.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), sure)
		defer cancel()
		f, err := dial(ctx, uplinks[0], unix.SOCK_STREAM, unix.IPPROTO_TCP, netip.AddrPortFrom(far(uplinks[0]), 80))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		raw, err := f.SyscallConn()
		if err == nil {
			err = connected(raw)
		}
		if err == nil {
			err = f.SetDeadline(time.Unix(1, 0))
		}
		if err == nil {
			err = connected(raw)
		}
		if err != nil {
			t.Errorf("a connection that stands: %v", err)
		}
	})
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, other := os.NewFile(uintptr(pair[0]), "pair"), os.NewFile(uintptr(pair[1]), "pair")
	defer f.Close()
	defer other.Close()
	if _, err := other.WriteString("answer"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if err := f.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if n := arrived(f, buf); string(buf[:n]) != "answer" {
		t.Errorf("%q, want the answer", buf[:n])
	}
	if n := arrived(f, buf); n != 0 {
		t.Errorf("%q, want nothing more", buf[:n])
	}
}

func TestDeadline(t *testing.T) {
	h := newHost(t)
	h.Internet.IP(t, "address del "+nettest.Far4+"/32 dev lo")
	h.Internet.IP(t, "route add blackhole "+nettest.Far4)
	for _, kind := range []Kind{{Name: icmp}, {Name: dns}, {tcp, 80}} {
		if a := h.ask(uplinks[0], kind, brief); a.Err == nil {
			t.Errorf("%s is answered", kind)
		}
	}
}
