package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A packet is what a host sends to the internet, to learn from which address that sees it come.
// The zero value is a UDP packet of IPv4 with the source that the kernel chooses.
type packet struct {
	family int    // 4 or 6; 0: that of to or source
	to     string // an address that answers; "": the internet
	port   int    // 0: echoPort
	tcp    bool
	source string // an address; "": the kernel chooses
	device string // of SO_BINDTODEVICE
	mark   uint32
	uid    int
	wait   time.Duration // for the answer; 0: answers
	tries  int           // 0: one
}

// answers is how long a packet may take to the internet and back before it counts as lost.
const answers = 500 * time.Millisecond

// seen sends a packet and returns the address that it was seen to come from.
func (u *uplinks) seen(p packet) (seen string, err error) {
	u.t.Helper()
	if p.uid == 0 {
		u.ns.Do(func() { seen, err = p.send() })
		return seen, err
	}
	done := make(chan struct{})
	u.as(p.uid, func(ready func()) {
		defer ready()
		defer close(done)
		seen, err = p.send()
	})
	<-done
	return seen, err
}

// remote is where it goes.
func (p packet) remote() (domain int, to unix.Sockaddr) {
	target := p.to
	if target == "" {
		target = internet
		if p.family == 6 || strings.Contains(p.source, ":") {
			target = internet6
		}
	}
	port := p.port
	if port == 0 {
		port = echoPort
	}
	addr := netip.MustParseAddr(target)
	if addr.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: addr.As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: addr.As16()}
}

func (p packet) send() (seen string, err error) {
	domain, to := p.remote()
	kind := unix.SOCK_DGRAM
	if p.tcp {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if err := p.prepare(fd); err != nil {
		return "", err
	}
	if err := unix.Connect(fd, to); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	for try := range max(p.tries, 1) {
		if try == 0 || !p.tcp {
			if _, err := unix.Write(fd, []byte("?")); err != nil {
				return "", err
			}
		}
		n, readErr := unix.Read(fd, buf)
		for errors.Is(readErr, unix.EINTR) {
			n, readErr = unix.Read(fd, buf)
		}
		if err = readErr; err == nil {
			return strings.TrimSpace(string(buf[:n])), nil
		}
	}
	return "", err
}

// prepare makes a socket what the packet asks for.
func (p packet) prepare(fd int) error {
	if p.mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(p.mark)); err != nil {
			return err
		}
	}
	if p.device != "" {
		if err := unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, p.device); err != nil {
			return err
		}
	}
	if p.source != "" {
		addr := netip.MustParseAddr(p.source)
		source := unix.Sockaddr(&unix.SockaddrInet6{Addr: addr.As16()})
		if addr.Is4() {
			source = &unix.SockaddrInet4{Addr: addr.As4()}
		}
		if err := unix.Bind(fd, source); err != nil {
			return err
		}
	}
	wait := p.wait
	if wait == 0 {
		wait = answers
	}
	limit := unix.NsecToTimeval(wait.Nanoseconds())
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
}

// arrives sends a packet, and fails if no answer comes in time or it was seen to come from
// another address than from.
func (u *uplinks) arrives(p packet, from string) error {
	u.t.Helper()
	seen, err := u.seen(p)
	if err == nil && seen != from {
		err = fmt.Errorf("it was seen to come from %s, want %s", seen, from)
	}
	return err
}

// publicly is the address that the internet sees packets from addr come from, if they pass
// provider n.
func (u *uplinks) publicly(n int, addr string) string {
	if u.isps[n].nat && !strings.Contains(addr, ":") {
		return seenAs(n).String()
	}
	return addr
}

// pass sends a packet from an address of the host to the internet, and fails if no answer
// comes in time or it did not pass provider n.
func (u *uplinks) pass(n int, addr string, wait time.Duration) error {
	u.t.Helper()
	return u.arrives(packet{source: addr, wait: wait}, u.publicly(n, addr))
}

// waitUplink waits until packets from addr, and those of sockets bound to its link, reach the
// internet through provider n, and fails the test when one got to another provider.
func (u *uplinks) waitUplink(n int, addr string) {
	u.t.Helper()
	ifname := u.isps[n].ifname
	for _, p := range []packet{{source: addr}, {device: ifname}, {source: addr, device: ifname}} {
		eventually(u.t, fmt.Sprintf("packets from %q on %q pass", p.source, p.device), func() error {
			return u.arrives(p, u.publicly(n, addr))
		})
	}
	u.wantOwnOnly()
}

// waitSilent waits until packets from addr reach nobody.
func (u *uplinks) waitSilent(addr string) {
	u.t.Helper()
	eventually(u.t, "packets from "+addr+" reach nobody", func() error {
		if seen, err := u.seen(packet{source: addr}); err == nil {
			return fmt.Errorf("the internet saw them come from %s", seen)
		}
		return nil
	})
}

// traffic sends packets from each address all the time, until the test ends or stop is
// called. One may be lost while something changes; that one leaves by the uplink of
// another fails the test. uplinks has provider numbers by address.
func (u *uplinks) traffic(uplinks map[string]int) (stop func()) {
	u.t.Helper()
	return u.always(uplinks, func(addr string, n int) (time.Duration, error) {
		seen, err := u.seen(packet{source: addr})
		if err != nil {
			return time.Millisecond, nil // the address may be gone for a moment
		}
		if want := u.publicly(n, addr); seen != want {
			return 0, fmt.Errorf("it was seen to come from %s, want %s", seen, want)
		}
		return 0, nil
	})
}

// flows is traffic of which no packet may be lost.
func (u *uplinks) flows(uplinks map[string]int) (stop func()) {
	u.t.Helper()
	return u.always(uplinks, func(addr string, n int) (time.Duration, error) {
		return 5 * time.Millisecond, u.pass(n, addr, patience)
	})
}

// always calls send for each address again and again, with a pause of the length that send
// returns, until the test ends or stop is called. An error fails the test.
func (u *uplinks) always(uplinks map[string]int, send func(addr string, n int) (time.Duration, error)) (stop func()) {
	u.t.Helper()
	done := make(chan struct{})
	var running sync.WaitGroup
	for addr, n := range uplinks {
		running.Go(func() {
			for {
				pause, err := send(addr, n)
				if err != nil {
					u.t.Errorf("a packet from %s: %v", addr, err)
					return
				}
				select {
				case <-done:
					return
				case <-time.After(pause):
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		close(done)
		running.Wait()
		u.wantOwnOnly()
	})
	u.t.Cleanup(stop)
	return stop
}

// wantOwnOnly fails the test if a provider got packets with a source that is not its own.
func (u *uplinks) wantOwnOnly() {
	u.t.Helper()
	for n, got := range u.counts() {
		if got.Foreign > 0 {
			u.t.Errorf("provider %d got packets with a foreign source: %s", n, u.isps[n].ns.Run(u.t, "nft", "list", "sets", "table", "inet", "provider"))
		}
	}
}

// counts are packets that a provider got, without acknowledgements that carry nothing else.
type counts struct{ Inet, Inet6, Foreign int }

// counts are those of each provider.
func (u *uplinks) counts() []counts {
	u.t.Helper()
	all := make([]counts, len(u.isps))
	for n, isp := range u.isps {
		var reply struct {
			Nftables []struct {
				Counter *struct {
					Name    string
					Packets int
				}
			}
		}
		out := isp.ns.Run(u.t, "nft", "-j", "list", "counters", "table", "inet", "provider")
		if err := json.Unmarshal([]byte(out), &reply); err != nil {
			u.t.Fatalf("counters of provider %d: %v\n%s", n, err, out)
		}
		for _, o := range reply.Nftables {
			if o.Counter != nil {
				*map[string]*int{"customers": &all[n].Inet, "customers6": &all[n].Inet6, "foreign": &all[n].Foreign}[o.Counter.Name] = o.Counter.Packets
			}
		}
	}
	return all
}

// only fails the test unless what f sends leaves by uplink n alone, and with its addresses.
func (u *uplinks) only(n int, f func()) {
	u.t.Helper()
	before := u.counts()
	f()
	after := u.counts()
	for other := range u.isps {
		if other != n && after[other] != before[other] || after[other].Foreign != before[other].Foreign {
			u.t.Errorf("packets of what is bound to %s went astray: before %+v, after %+v", u.isps[n].ifname, before, after)
			break
		}
	}
	if after[n] == before[n] {
		u.t.Errorf("no packet left by %s: %+v", u.isps[n].ifname, after)
	}
}

// nothing fails the test if anything leaves by any uplink while f runs.
func (u *uplinks) nothing(f func()) {
	u.t.Helper()
	before := u.counts()
	f()
	if after := u.counts(); !slices.Equal(after, before) {
		u.t.Errorf("packets left: before %+v, after %+v", before, after)
	}
}
