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

// A packet is a question that the host sends to the internet, which answers with the source address of
// the packet. The zero value is a UDP packet of IPv4 with the source that the kernel chooses.
type packet struct {
	family int    // 4 or 6; 0: the family of to or source
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

// seen sends a packet, and returns the source address that the receiver saw.
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

// remote is the address to which the packet goes.
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

// prepare sets the options and the source of a socket.
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

// arrives sends a packet. It returns an error if no answer comes in time, or if the receiver saw another
// source than from.
func (u *uplinks) arrives(p packet, from string) error {
	u.t.Helper()
	seen, err := u.seen(p)
	if err == nil && seen != from {
		err = fmt.Errorf("the receiver saw source %s, want %s", seen, from)
	}
	return err
}

// publicly is the source that the internet sees of packets from addr that pass provider n.
func (u *uplinks) publicly(n int, addr string) string {
	if u.isps[n].nat && !strings.Contains(addr, ":") {
		return seenAs(n).String()
	}
	return addr
}

// pass sends a packet from an address of the host to the internet. It returns an error if no answer
// comes in time, or if the packet did not pass provider n.
func (u *uplinks) pass(n int, addr string, wait time.Duration) error {
	u.t.Helper()
	return u.arrives(packet{source: addr, wait: wait}, u.publicly(n, addr))
}

// waitUplink waits until packets from addr, and from sockets bound to its link, reach the internet
// through provider n. It fails the test if one of them reached another provider.
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

// waitSilent waits until packets from addr do not reach the internet.
func (u *uplinks) waitSilent(addr string) {
	u.t.Helper()
	eventually(u.t, "packets from "+addr+" reach nobody", func() error {
		if seen, err := u.seen(packet{source: addr}); err == nil {
			return fmt.Errorf("the internet saw source %s", seen)
		}
		return nil
	})
}

// traffic sends packets from each address all the time, until the test ends or stop is called. uplinks
// has the number of the provider for each address. A packet may be lost while something changes. A
// packet that leaves by another uplink fails the test.
func (u *uplinks) traffic(uplinks map[string]int) (stop func()) {
	u.t.Helper()
	return u.always(uplinks, func(addr string, n int) (time.Duration, error) {
		seen, err := u.seen(packet{source: addr})
		if err != nil {
			return time.Millisecond, nil // the address may be missing for a moment
		}
		if want := u.publicly(n, addr); seen != want {
			return 0, fmt.Errorf("the receiver saw source %s, want %s", seen, want)
		}
		return 0, nil
	})
}

// flows is traffic that fails the test if a packet is lost.
func (u *uplinks) flows(uplinks map[string]int) (stop func()) {
	u.t.Helper()
	return u.always(uplinks, func(addr string, n int) (time.Duration, error) {
		return 5 * time.Millisecond, u.pass(n, addr, patience)
	})
}

// always calls send for each address again and again, until the test ends or stop is called. It pauses
// for as long as send returns. An error of send fails the test.
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

// wantOwnOnly fails the test if a provider received packets with a source that it has not given out.
func (u *uplinks) wantOwnOnly() {
	u.t.Helper()
	for _, got := range u.counts() {
		if got.Foreign > 0 {
			u.t.Errorf("a provider got packets with a foreign source: %s", u.strangers())
			return
		}
	}
}

// strangers are foreign sources and what they sent to, as the providers noted them.
func (u *uplinks) strangers() string {
	var text strings.Builder
	for _, isp := range u.isps {
		fmt.Fprintf(&text, "%s: %s", isp.ifname, isp.ns.Run(u.t, "nft", "list", "sets", "table", "inet", "provider"))
	}
	return text.String()
}

// counts are packets that a provider received, without TCP acknowledgements that carry no data.
type counts struct{ Inet, Inet6, Foreign int }

// counts are the counts of each provider.
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

// only calls f. It fails the test unless packets leave by uplink n, with its addresses, and by no other.
func (u *uplinks) only(n int, f func()) {
	u.t.Helper()
	before := u.counts()
	f()
	after := u.counts()
	for other := range u.isps {
		if other != n && after[other] != before[other] || after[other].Foreign != before[other].Foreign {
			u.t.Errorf("packets left by another uplink than %s, or with a foreign source: before %+v, after %+v\n%s", u.isps[n].ifname, before, after, u.strangers())
			break
		}
	}
	if after[n] == before[n] {
		u.t.Errorf("no packet left by %s: %+v", u.isps[n].ifname, after)
	}
}

// nothing calls f. It fails the test if a packet leaves by any uplink.
func (u *uplinks) nothing(f func()) {
	u.t.Helper()
	before := u.counts()
	f()
	if after := u.counts(); !slices.Equal(after, before) {
		u.t.Errorf("packets left: before %+v, after %+v\n%s", before, after, u.strangers())
	}
}
