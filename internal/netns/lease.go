package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// Lease keeps the link of this network namespace with an address of DHCP until ctx ends. While there is no link it waits for one.
func Lease(ctx context.Context, log *slog.Logger) error {
	kernel, err := route.Dial()
	if err != nil {
		return err
	}
	defer kernel.Close()
	for {
		link, err := awaitInner(ctx, kernel)
		if err != nil {
			return err
		}
		c := dhcpClient{kernel: kernel, link: link, log: log}
		err = c.lead(ctx)
		now, found, lookErr := kernel.LinkByName(inner)
		if ctx.Err() != nil || lookErr != nil || found && now.Index == link.Index && !errors.Is(err, errAgain) {
			return errors.Join(err, lookErr)
		}
		log.Info("the namespace asks for an address again", "why", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(firstWait):
		}
	}
}

// errAgain says that a client has to begin again.
var errAgain = errors.New("begin again")

// awaitInner waits until this network namespace has its link.
func awaitInner(ctx context.Context, kernel *route.Conn) (*net.Interface, error) {
	for {
		_, found, err := kernel.LinkByName(inner)
		if err != nil {
			return nil, err
		}
		if found {
			if link, err := net.InterfaceByName(inner); err == nil {
				return link, nil
			} // it is gone again
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lookAgain):
		}
	}
}

// lead keeps the link with an address until it is another link or loses the address, or ctx ends.
func (c *dhcpClient) lead(ctx context.Context) error {
	if err := c.open(); err != nil {
		return err
	}
	defer unix.Close(c.socket)
	if err := c.forget(netip.Prefix{}); err != nil { // what a client before had
		return err
	}
	for {
		if err := c.acquire(ctx); err != nil {
			return err
		}
		if err := c.keep(ctx); err != nil {
			return err
		}
	}
}

type dhcpClient struct {
	kernel *route.Conn
	link   *net.Interface
	socket int
	lease  dhcpLease
	place  place  // where the lease was given, or confirmed last
	warned string // what the lease lacks
	log    *slog.Logger
}

const (
	dhcpServerPort, dhcpClientPort = 67, 68

	firstWait = time.Second      // for an answer; then twice as long each time
	mostWait  = 16 * time.Second // of these
	lookAgain = 2 * time.Second  // at the link while there is a lease
)

// open makes the socket, which sends and receives on the link before that has an address.
func (c *dhcpClient) open() (err error) {
	c.socket, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = errors.Join(unix.BindToDevice(c.socket, c.link.Name), unix.SetsockoptInt(c.socket, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
		unix.SetsockoptInt(c.socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	if err == nil {
		err = unix.Bind(c.socket, &unix.SockaddrInet4{Port: dhcpClientPort})
	}
	if err != nil {
		return errors.Join(fmt.Errorf("ask for an address at port %d: %w", dhcpClientPort, err), unix.Close(c.socket))
	}
	return nil
}

// ask sends a question once, and returns the answer of one of these kinds, or kind 0 if there is none in time.
func (c *dhcpClient) ask(ctx context.Context, x dhcpExchange, question []byte, wait time.Duration, kinds ...byte) (kind byte, l dhcpLease, err error) {
	err = unix.Sendto(c.socket, question, 0, &unix.SockaddrInet4{Port: dhcpServerPort, Addr: [4]byte{255, 255, 255, 255}})
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return 0, l, err
	} // else the link may have no carrier yet
	buf := make([]byte, 2048)
	for deadline := time.Now().Add(wait); time.Now().Before(deadline) && ctx.Err() == nil; {
		const step = 200 // milliseconds: a signal ends the wait, too
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(c.socket), Events: unix.POLLIN}}, step)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, l, err
		}
		if n <= 0 {
			continue
		}
		size, _, err := unix.Recvfrom(c.socket, buf, unix.MSG_DONTWAIT)
		if err != nil {
			continue // an error of the link, which passes
		}
		if kind, l, err = x.answer(buf[:size]); err == nil && slices.Contains(kinds, kind) {
			return kind, l, nil
		} else if err != nil && !errors.Is(err, errNotForUs) {
			c.log.Debug("an answer of DHCP cannot be used", "err", err)
		}
	}
	return 0, l, ctx.Err()
}

// acquire asks until a server gives an address.
func (c *dhcpClient) acquire(ctx context.Context) error {
	for wait := firstWait; ; wait = min(2*wait, mostWait) {
		here, err := c.same(false)
		if err != nil {
			return err
		}
		kind, l, err := c.begin(ctx, wait)
		if err != nil {
			return err
		}
		if kind == dhcpACK {
			c.lease, c.place = l, here
			return c.install()
		}
	}
}

// begin asks once who has an address, and for that one.
func (c *dhcpClient) begin(ctx context.Context, wait time.Duration) (kind byte, l dhcpLease, err error) {
	x := newExchange(c.link.HardwareAddr)
	kind, offer, err := c.ask(ctx, x, x.question(dhcpDiscover, netip.Addr{}, netip.Addr{}, netip.Addr{}), wait, dhcpOffer)
	if err != nil || kind != dhcpOffer {
		return 0, l, err
	}
	return c.ask(ctx, x, x.question(dhcpRequest, netip.Addr{}, offer.addr.Addr(), offer.server), wait, dhcpACK, dhcpNAK)
}

// confirm asks whether the lease holds on a network that may be another one (INIT-REBOOT of RFC 2131, section 4.4.2). Servers
// that do not know it may be silent: then it asks for an address as if it had none. Meanwhile the link keeps the one it has.
func (c *dhcpClient) confirm(ctx context.Context) (kind byte, l dhcpLease, err error) {
	const tries = 3
	x := newExchange(c.link.HardwareAddr)
	for try := range tries {
		kind, l, err = c.ask(ctx, x, x.question(dhcpRequest, netip.Addr{}, c.lease.addr.Addr(), netip.Addr{}), firstWait<<try, dhcpACK, dhcpNAK)
		if err != nil || kind != 0 {
			return kind, l, err
		}
	}
	return c.begin(ctx, firstWait)
}

// keep renews the lease until it ends, and has it confirmed when the link has got its carrier back, or the machine woke up.
func (c *dhcpClient) keep(ctx context.Context) error {
	t, tried := termOf(c.lease.expires, clock(unix.CLOCK_BOOTTIME)), c.place
	for {
		here, err := c.same(true)
		if err != nil {
			return err
		}
		now := clock(unix.CLOCK_BOOTTIME)
		if now >= t.ends {
			c.log.Info("the lease of an address has ended", "addr", c.lease.addr)
			return c.forget(netip.Prefix{})
		}
		kind, l := byte(0), dhcpLease{}
		switch {
		case here.carrier && here.differs(c.place) && (now >= t.doubt || here.differs(tried)):
			c.log.Debug("asks whether the lease holds", "addr", c.lease.addr)
			if kind, l, err = c.confirm(ctx); kind == 0 && err == nil {
				c.log.Debug("nobody says whether the lease holds", "addr", c.lease.addr)
			}
			tried, t.doubt = here, now+mostWait
		case now >= t.next:
			x := newExchange(c.link.HardwareAddr)
			kind, l, err = c.ask(ctx, x, x.question(dhcpRequest, c.lease.addr.Addr(), netip.Addr{}, netip.Addr{}), lookAgain, dhcpACK, dhcpNAK)
			t.next = now + max((t.ends-now)/2, lookAgain) // half of the rest later
		}
		switch {
		case err != nil:
			return err
		case kind == dhcpNAK:
			c.log.Info("the lease of an address does not hold here", "addr", c.lease.addr)
			return c.forget(netip.Prefix{})
		case kind == dhcpACK:
			c.lease, c.place, t = l, here, termOf(l.expires, now)
			if err := c.install(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(lookAgain, max(t.next-clock(unix.CLOCK_BOOTTIME), 0)+time.Millisecond)):
		}
	}
}

// A term says when a lease ends, and from when on what is asked for: times since the boot, of which a machine that sleeps
// misses none.
type term struct{ ends, next, doubt time.Duration }

// termOf is the term of a lease of now.
func termOf(expires, now time.Duration) term { return term{ends: now + expires, next: now + expires/2} }

// clock reads a clock of the kernel.
func clock(which int32) time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(which, &now) // it does not fail for a clock that there is
	return time.Duration(now.Nano())
}

// A place is where a link was at some time, as far as it can tell.
type place struct {
	changes uint32 // of its carrier
	carrier bool
	asleep  time.Duration // how long the machine has slept since the boot
}

// differs reports whether the link may be at another network than then.
func (p place) differs(then place) bool {
	const jitter = time.Second // between two clocks that are read one after the other
	return p.changes != then.changes || p.asleep-then.asleep > jitter
}

// same returns where the link is, and an error if it is another one, or has lost the address of the lease.
func (c *dhcpClient) same(leased bool) (here place, err error) {
	link, found, err := c.kernel.LinkByName(inner)
	if err != nil {
		return here, err
	}
	if !found || link.Index != c.link.Index {
		return here, fmt.Errorf("%w: the link is another one", errAgain)
	}
	here = place{link.Changes, link.Carrier, clock(unix.CLOCK_BOOTTIME) - clock(unix.CLOCK_MONOTONIC)}
	if !leased {
		return here, nil
	}
	have, err := c.kernel.AddressesOn(unix.AF_INET, link.Index)
	if err == nil && !slices.ContainsFunc(have, func(a route.Address) bool { return a.Addr == c.lease.addr.Addr() }) {
		err = fmt.Errorf("%w: the link has lost its address", errAgain)
	}
	return here, err
}

// install gives the link the address of the lease, and the namespace its default routes. Without one it has the address all the same.
func (c *dhcpClient) install() error {
	if err := c.forget(c.lease.addr); err != nil {
		return err
	}
	if err := c.kernel.AddAddress(c.link.Index, c.lease.addr); err != nil {
		return err
	}
	var want []route.Route
	for i, router := range c.lease.routers {
		if router.IsUnspecified() || router == c.lease.addr.Addr() {
			continue
		}
		way := route.NewRoute(unix.RT_TABLE_MAIN, anywhere(unix.AF_INET), router, c.link.Index)
		way.Metric, way.Onlink = uint32(i), !c.lease.addr.Contains(router) // as clouds have it, with a network of one address
		want = append(want, way)
	}
	added, _, err := c.kernel.SyncRoutes(unix.AF_INET, unix.RT_TABLE_MAIN, want)
	lacking := ""
	switch {
	case err != nil:
		lacking = err.Error()
	case len(want) == 0: // also by a server that has routes without classes alone, of RFC 3442
		lacking = "the server of DHCP names no router: set option 3 there"
	}
	if lacking != "" && lacking != c.warned {
		c.log.Warn("the namespace reaches the network of its link alone", "addr", c.lease.addr, "err", lacking)
	}
	c.warned = lacking
	if len(added) > 0 {
		c.log.Info("the namespace has an address by DHCP", "addr", c.lease.addr, "routers", c.lease.routers)
	}
	return nil
}

// forget deletes all IPv4 addresses but one.
func (c *dhcpClient) forget(but netip.Prefix) error {
	have, err := c.kernel.AddressesOn(unix.AF_INET, c.link.Index)
	for _, a := range have {
		if a.Network() != but {
			err = errors.Join(err, c.kernel.DeleteAddress(a))
		}
	}
	return err
}
