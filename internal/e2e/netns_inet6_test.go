package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestNetnsInet6: the ways by which IPv6 leaves a namespace. The far end sees an address that is the namespace's own, of a
// prefix that is delegated to the uplink, of the uplink's network, or translated; and that of the link while there is none.
func TestNetnsInet6(t *testing.T) {
	c := newNamespaces(t)
	const delegated = "fd02:0:0:ff00::/56"
	_, inet6 := at(1)
	c.isps[1].ns.IP(t, "-6 route add "+delegated+" via "+inet6)
	delegate := func(args ...string) {
		t.Helper()
		c.must(append([]string{"-6", "-a", inet6, "-i", "wan1", "--routes", "copy"}, args...)...)
	}
	c.must("netns", "add", "auto", "--ifname", "wan1", "--resolv", "192.0.2.53")
	c.must("netns", "add", "npt", "--ifname", "wan1", "--resolv", "192.0.2.53", "--ipv6", "npt")
	c.must("netns", "add", "proxy", "--ifname", "wan1", "--resolv", "192.0.2.53", "--ipv6", "proxy")
	c.must("netns", "add", "none", "--ifname", "wan1", "--resolv", "192.0.2.53", "--ipv6", "off")
	if r := c.do("netns", "add", "x", "--ifname", "wan1", "--resolv", "192.0.2.53", "--ipv6", "prefix", "--on-loss", "fallback"); r.code != 2 || !strings.Contains(r.stderr, "one uplink") {
		t.Errorf("an address of one uplink by another one: %+v", r)
	}
	p := c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
	p.waitLog("serving namespaces")
	probers := make(map[string]*probing)
	for _, name := range []string{"auto", "npt", "proxy", "none"} {
		probers[name] = c.inNamespace(name)
	}
	of := func(name string) netip.Addr {
		t.Helper()
		for _, row := range c.namespaces() {
			if row.Name == name && len(row.Addresses) == 2 {
				return netip.MustParseAddr(row.Addresses[1])
			}
		}
		t.Fatalf("no addresses of %s: %+v", name, c.namespaces())
		return netip.Addr{}
	}
	// seen waits until IPv6 leaves in this way, with an address as it should be, and nothing by another uplink meanwhile.
	seen := func(name, way string, right func(seen, inside netip.Addr) bool) {
		t.Helper()
		p := probers[name]
		leaves := func() error {
			for _, row := range c.namespaces() {
				if row.Name == name && row.IPv6 != way {
					return fmt.Errorf("it leaves by %s", row.IPv6)
				}
			}
			p.do("new s tcp6")
			if got := p.do("start s %s", far6); got != "ok" {
				return fmt.Errorf("tcp6: %s", got)
			}
			p.do("new s udp6")
			got := p.do("try s %s", far6)
			addr, err := netip.ParseAddr(got)
			if err != nil || !right(addr, of(name)) {
				return fmt.Errorf("the internet sees %s, and it has %s", got, of(name))
			}
			return nil
		}
		c.only(1, func() { eventually(t, "IPv6 leaves "+name+" by "+way, leaves) })
	}
	uplinks := func(seen, inside netip.Addr) bool { return seen.String() == inet6 }
	own := func(seen, inside netip.Addr) bool {
		return seen == inside && netip.MustParsePrefix(delegated).Contains(seen)
	}
	translated := func(seen, inside netip.Addr) bool {
		out, in := seen.As16(), inside.As16()
		return [8]byte(out[8:]) == [8]byte(in[8:]) && netip.MustParsePrefix(delegated).Contains(seen) && !netip.MustParsePrefix("fd02::/48").Contains(inside)
	}
	ofLink := func(seen, inside netip.Addr) bool {
		return seen == inside && seen.String() != inet6 && netip.MustParsePrefix("fd02::/64").Contains(seen)
	}
	seen("auto", "nat", uplinks)
	seen("npt", "nat", uplinks)
	prefixed := func() {
		t.Helper()
		delegate("--prefix", delegated)
		seen("auto", "prefix", own)
		seen("npt", "npt", translated)
		seen("proxy", "proxy", ofLink)
	}
	prefixed()
	// keeps waits until the service has looked at what f does, which changes no address of a namespace for so long. It reports
	// whether it came to see that in time: what is so later says nothing.
	keeps := func(what string, within time.Duration, f func()) (inTime bool) {
		t.Helper()
		before, began := c.namespaces(), time.Now()
		f()
		for n := range 2 { // it may be at the first one now
			looks := strings.Count(p.log.String(), "choose ways of IPv6")
			c.ns.IP(t, fmt.Sprintf("link set lo alias x%d", looks+n))
			eventually(t, "the service looks after "+what, func() error {
				if now := strings.Count(p.log.String(), "choose ways of IPv6"); now < looks+len(before) {
					return fmt.Errorf("%d times, and before %d", now, looks)
				}
				return nil
			})
		}
		after := c.namespaces()
		if time.Since(began) > within {
			return false
		}
		for i, now := range after {
			if was := before[i]; now.IPv6 != was.IPv6 || fmt.Sprint(now.Addresses) != fmt.Sprint(was.Addresses) {
				t.Errorf("after %s %s has %s %s, and before %s %s", what, now.Name, now.IPv6, now.Addresses, was.IPv6, was.Addresses)
			}
		}
		return true
	}
	eventually(t, "the service and this test look before IPv6 leaves otherwise", func() error {
		const within = 8 * time.Second // of the ten for which a link may be without a prefix
		inTime := keeps("a loss of the prefix", within, func() { delegate() })
		prefixed()
		if !inTime {
			return fmt.Errorf("that took more than %v", within)
		}
		return nil
	})
	// The link is unplugged, for however long.
	keeps("a loss of the link", patience, func() {
		c.ns.IP(t, "link set wan1 down")
		c.nothing(func() { startProbes(probers["proxy"]); startProbes(probers["auto"]) })
	})
	c.ns.IP(t, "link set wan1 up")
	c.address(1)
	c.waitTables(1)
	delegate() // for good now
	seen("proxy", "proxy", ofLink)
	// Nobody reaches it from outside, and a source that is not its own does not leave.
	q := c.inNamespace("proxy")
	q.want("ok", "new m tcp6\nbind m [::]:10")
	q.do("listen m")
	inside := of("proxy")
	c.isps[1].ns.Do(func() {
		s := prober{make(map[string]int)}
		if err := s.open("s", "tcp6"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.do("start", "s", fmt.Sprintf("[%s]:10", inside)); err == nil {
			t.Error("the network of the uplink reaches the namespace")
		}
	})
	c.must("netns", "exec", "proxy", "ip", "-6", "address", "add", "fd01::99/128", "dev", "eth0", "nodad")
	c.only(1, func() { q.want("ok", "new s udp6\nbind s [fd01::99]:0"); q.do("try s %s", far6) })
	if got := probers["none"].do("new s udp6"); got != "ok" {
		t.Fatal(got)
	}
	if got := probers["none"].do("try s %s", far6); got != "ENETUNREACH" && got != "EADDRNOTAVAIL" {
		t.Errorf("IPv6 that is off: %s", got)
	}
	seen("auto", "nat", uplinks)
	seen("npt", "nat", uplinks)
	c.must("netns", "del", "--all", "--kill", "5")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}
