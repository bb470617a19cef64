package probe

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
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
	conn, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { conn.Close(); <-done })
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			select {
			case h.dns <- from.(*net.UDPAddr).AddrPort():
			default:
			}
			answer := reply(buf[:n], record(typeA, 198, 51, 100, 1), record(typeAAAA, netip.MustParseAddr(nettest.Far6).AsSlice()...))
			_, _ = conn.WriteTo(answer, from) // the asker reports a lost one
		}
	}()
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
			{Kind{tcp, 81}, 100, 140}, // refused
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
