package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
)

// What the project wants of a watch whose main table is large, or whose links do odd things.
const (
	wantFollowed   = 32.0  // MiB
	wantFollowing  = 0.25  // of a processor
	wantStatus     = 0.2   // seconds
	wantInternet   = 256.0 // MiB
	wantAdvertised = 64.0  // MiB
	wantAfter      = 0.2   // of a processor
	wantRefused    = 0.01  // of a processor
	wantRenamed    = 1.0   // second
	bird           = 12    // the protocol of the routing daemon bird
	mainsLate      = 3 * time.Minute
	shortLease     = 20 // seconds: shorter than what a watch does here may take
)

// mains is how much measureMains does.
type mains struct {
	followed   int // routes of main whose changes are followed
	moved      int // the same, with copy and with move
	internet   int // routes of a routing daemon
	packets    int // router advertisements, of prefixes each
	prefixes   int
	refused    int // addresses, most of which get no table
	renames    int
	changing   time.Duration // at 1,000 changes a second
	settled    time.Duration // after a burst, before processor time is measured
	measuredAt time.Duration // for how long it is measured then
}

// A site is a host with two uplinks, a server and a watch.
type site struct {
	software
	ns     *nettest.Namespace
	server *process
	watch  *exec.Cmd
	log    *bytes.Buffer
	kernel *route.Conn
	pid    int
}

func measureMains(session *nettest.Session, o options, dir string, r *report) error {
	for _, one := range []struct {
		name    string
		tables  int
		measure func(options, *site, *report) error
	}{{"followed", 0, measureFollowed}, {"moved", 0, measureMoved}, {"internet", 0, measureInternet}, {"advertised", 0, measureAdvertised}, {"refused", 40, measureRefused}, {"renamed", 40, measureRenamed}} {
		s := &site{software: ours, ns: nettest.New(session, one.name), log: new(bytes.Buffer)}
		if one.tables > 0 {
			s.tables = one.tables
		} else {
			s.timeout = shortLease
		}
		var err error
		s.ns.Do(func() {
			err = s.visit(filepath.Join(dir, one.name), func() error { return errors.Join(one.measure(o, s, r), s.lost(one.name, r)) })
		})
		if err != nil {
			return fmt.Errorf("%s: %w", one.name, err)
		}
	}
	return nil
}

// lost counts leases that expired though the watch lives.
func (s *site) lost(name string, r *report) error {
	text, err := os.ReadFile(s.server.log)
	for range strings.Count(string(text), `msg="lease expired"`) {
		r.Faults.add(&r.Faults.Lost, "%s: a lease expired, whose holder lives", name)
	}
	return err
}

// visit starts the server, calls f, and ends what runs.
func (s *site) visit(dir string, f func() error) (err error) {
	if s.server, err = s.start(dir, ""); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.server.stop()) }()
	if s.kernel, err = route.Dial(); err != nil {
		return err
	}
	defer s.kernel.Close()
	if err := ip("link add wan0 type veth peer name far0\nlink add wan1 type veth peer name far1\nlink set wan0 up\nlink set wan1 up\n" +
		"link set far0 up\nlink set far1 up\naddress add 10.0.0.2/24 dev wan0\naddress add 10.0.1.2/24 dev wan1\n" +
		"route add default via 10.0.0.1 dev wan0 metric 10\nroute add default via 10.0.1.1 dev wan1 metric 20"); err != nil {
		return err
	}
	defer s.end()
	return f()
}

// begin starts the watch.
func (s *site) begin(options ...string) error {
	s.watch = exec.Command(s.client, append([]string{"watch", "-d", filepath.Base(filepath.Dir(s.server.log)), "--ifname", "*", "--exclude", "lo,far*"}, options...)...)
	s.watch.Stderr = s.log
	if err := s.watch.Start(); err != nil {
		return err
	}
	s.pid = s.watch.Process.Pid
	return nil
}

func (s *site) end() {
	if s.watch != nil {
		_ = s.watch.Process.Kill() // it may have ended
		_ = s.watch.Wait()         // the error is that it was killed
	}
}

// until waits until check reports true. A site where that takes too long is a fault.
func (s *site) until(r *report, what string, check func() (bool, error)) error {
	for late := time.Now().Add(mainsLate); ; time.Sleep(20 * time.Millisecond) {
		done, err := check()
		if done || err != nil {
			return err
		}
		if time.Now().After(late) {
			r.Faults.add(&r.Faults.Lost, "%s: not within %v", what, mainsLate)
			return nil
		}
	}
}

// table returns the table of an address, 0 if there is none.
func (s *site) table(addr string) (uint32, error) {
	parsed := netip.MustParseAddr(addr)
	family, from := unix.AF_INET, netip.PrefixFrom(parsed, parsed.BitLen())
	if parsed.Is6() {
		family = unix.AF_INET6
	}
	rules, err := s.kernel.RulesWhere(family, func(r *route.Rule) bool { return r.Src == from && r.Table != 0 })
	if err != nil || len(rules) == 0 {
		return 0, err
	}
	return rules[0].Table, nil
}

// filled waits until the tables of both addresses have want routes or more, and returns one of them.
func (s *site) filled(r *report, want int) (table uint32, err error) {
	for _, addr := range []string{"10.0.0.2", "10.0.1.2"} {
		err = s.until(r, "routes in the table of "+addr, func() (bool, error) {
			if table, err = s.table(addr); err != nil || table == 0 {
				return false, err
			}
			have := 0
			err = s.kernel.EachOfOurs(unix.AF_INET, table, func(route.Route) { have++ })
			return have >= want, err
		})
		if err != nil {
			return 0, err
		}
	}
	return table, nil
}

// daemon adds routes of a routing daemon, half over each uplink.
func daemon(n int) error {
	const batch = 50_000
	for first := 0; first < n; first += batch {
		var lines strings.Builder
		for i := first; i < min(first+batch, n); i++ {
			fmt.Fprintf(&lines, "route add %s via 10.0.%d.1 dev wan%d proto %d\n", destination(i), i%2, i%2, bird)
		}
		if err := ip("%s", lines.String()); err != nil {
			return err
		}
	}
	return nil
}

func destination(i int) string {
	return fmt.Sprintf("%d.%d.%d.0/24", 20+i>>16, i>>8&255, i&255)
}

// share is how much of a processor the watch uses while f runs.
func (s *site) share(f func() error) (float64, error) {
	before, err := processor(s.pid)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := f(); err != nil {
		return 0, err
	}
	after, err := processor(s.pid)
	return (after - before).Seconds() / time.Since(begin).Seconds(), err
}

func (s *site) idle(d time.Duration) (float64, error) {
	return s.share(func() error { time.Sleep(d); return nil })
}

// measureFollowed has a watch follow a large main.
func measureFollowed(o options, s *site, r *report) error {
	if err := daemon(o.followed); err != nil {
		return err
	}
	begin := time.Now()
	if err := s.begin(); err != nil {
		return err
	}
	table, err := s.filled(r, o.followed/2)
	if err != nil {
		return err
	}
	r.add(seconds, time.Since(begin).Seconds(), "watch: %d routes of main are in both tables, from its start on", o.followed)
	busy, err := s.share(func() error { return change(o.followed, o.changing) })
	if err != nil {
		return err
	}
	r.add(ratio, busy, "watch: of a processor, at 1,000 changes a second of them").atMost(wantFollowing)
	time.Sleep(o.atRest)
	used, err := memory(s.pid)
	if err != nil {
		return err
	}
	r.add(octets, used, "watch: memory (PSS) with %d routes followed", o.followed).atMost(wantFollowed * (1 << 20))
	var asked, dumped []float64
	for range 5 {
		took, _, err := call(s.client, "status", "-d", filepath.Base(filepath.Dir(s.server.log)))
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
			return err
		}
		asked = append(asked, took.Seconds())
		begin := time.Now()
		for _, t := range []uint32{unix.RT_TABLE_MAIN, table} {
			if _, err := s.kernel.Routes(unix.AF_INET, t); err != nil {
				return err
			}
		}
		dumped = append(dumped, time.Since(begin).Seconds())
	}
	r.add(seconds, median(dumped), "watch: a dump of main and of one table")
	r.add(seconds, median(asked), "watch: status").atMost(max(wantStatus, 1.5*median(dumped)))
	return nil
}

// measureMoved has a watch follow a large main with copy, and another one with move.
func measureMoved(o options, s *site, r *report) error {
	if err := daemon(o.moved); err != nil {
		return err
	}
	for _, mode := range []string{"copy", "move"} {
		if err := s.begin("--clean", "--routes", mode); err != nil {
			return err
		}
		if _, err := s.filled(r, o.moved/2); err != nil {
			return err
		}
		busy, err := s.share(func() error { return change(o.moved, o.changing) })
		if err != nil {
			return err
		}
		r.add(ratio, busy, "watch: of a processor, at 1,000 changes a second of %d routes, with %s", o.moved, mode).atMost(wantFollowing)
		if err := s.watch.Process.Signal(unix.SIGTERM); err != nil {
			return err
		}
		if err := s.watch.Wait(); err != nil {
			return fmt.Errorf("the watch with %s: %w", mode, err)
		}
		s.watch = nil
	}
	return nil
}

// change replaces routes of a large main for a while, 1,000 times a second.
func change(routes int, during time.Duration) error {
	const each = 20 * time.Millisecond
	n := 0
	for begin := time.Now(); time.Since(begin) < during; {
		next := begin.Add(time.Duration(n/20+1) * each)
		var lines strings.Builder
		for range 10 {
			i := n / 2 % routes
			fmt.Fprintf(&lines, "route del %s proto %d\nroute add %s via 10.0.%d.1 dev wan%d proto %d\n", destination(i), bird, destination(i), i%2, i%2, bird)
			n += 2
		}
		if err := ip("%s", lines.String()); err != nil {
			return err
		}
		time.Sleep(time.Until(next))
	}
	return nil
}

// measureInternet has a watch carry over what it has to of the routes of the whole Internet.
func measureInternet(o options, s *site, r *report) error {
	if err := daemon(o.internet); err != nil {
		return err
	}
	if err := ip("route add 198.18.0.0/16 via 10.0.1.7 dev wan1 proto static"); err != nil {
		return err
	}
	begin := time.Now()
	if err := s.begin(); err != nil {
		return err
	}
	most := min(o.internet, 200_000)
	if _, err := s.filled(r, most/2-1); err != nil {
		return err
	}
	r.add(seconds, time.Since(begin).Seconds(), "watch: of %d routes of a routing daemon, those up to max_routes are in both tables", o.internet)
	err := s.until(r, "the static route", func() (bool, error) {
		out, err := exec.Command("ip", "route", "get", "198.18.0.9", "from", "10.0.1.2").CombinedOutput()
		return strings.Contains(string(out), "10.0.1.7"), err
	})
	if err != nil {
		return err
	}
	time.Sleep(o.atRest)
	used, err := memory(s.pid)
	if err != nil {
		return err
	}
	r.add(octets, used, "watch: memory (PSS) with %d routes", o.internet).atMost(wantInternet * (1 << 20))
	return nil
}

// measureAdvertised has the router of an uplink advertise many prefixes as being on the link.
func measureAdvertised(o options, s *site, r *report) error {
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/wan0/accept_ra", []byte("2"), 0); err != nil {
		return err
	}
	if err := s.begin(); err != nil {
		return err
	}
	if _, err := s.filled(r, 1); err != nil {
		return err
	}
	const addr6 = "2001:db8:ffff::2" // whose table gets all these networks
	if err := ip("address add %s/64 dev wan0 nodad", addr6); err != nil {
		return err
	}
	if err := s.until(r, "a table of "+addr6, func() (bool, error) { table, err := s.table(addr6); return table != 0, err }); err != nil {
		return err
	}
	begin := time.Now()
	if err := advertise(o.packets, o.prefixes); err != nil {
		return err
	}
	before, err := processor(s.pid)
	if err != nil {
		return err
	}
	r.add(seconds, time.Since(begin).Seconds(), "watch: %d routers' advertisements of %d prefixes are sent within", o.packets, o.prefixes)
	time.Sleep(o.settled)
	after, err := processor(s.pid)
	if err != nil {
		return err
	}
	r.add(seconds, (after - before).Seconds(), "watch: processor time of the %v after them", o.settled)
	busy, err := s.idle(o.measuredAt)
	if err != nil {
		return err
	}
	r.add(ratio, busy, "watch: of a processor, then").atMost(wantAfter)
	used, err := memory(s.pid)
	if err != nil {
		return err
	}
	r.add(octets, used, "watch: memory (PSS) then").atMost(wantAdvertised * (1 << 20))
	for _, addr := range []string{"10.0.0.2", "10.0.1.2", addr6} {
		if table, err := s.table(addr); err != nil {
			return err
		} else if table == 0 {
			r.Faults.add(&r.Faults.Lost, "after router advertisements %s has no table", addr)
		}
	}
	return nil
}

// advertise sends router advertisements from far0.
func advertise(packets, prefixes int) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	index, err := interfaceIndex("far0")
	if err != nil {
		return err
	}
	const allHops = 255 // RFC 4861: others are ignored
	if err := errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, allHops),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, index)); err != nil {
		return err
	}
	to := &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(index)}
	for p := range packets {
		packet := []byte{134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} // no default router
		for n := range prefixes {
			id := p*prefixes + n
			option := []byte{3, 4, 64, 0x80, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0, 0x20, 0x01, 0x0d, 0xb8, byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id)}
			packet = append(packet, append(option, make([]byte, 8)...)...)
		}
		err := unix.Sendto(fd, packet, 0, to)
		for late := time.Now().Add(silence); errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.EADDRNOTAVAIL); { // the link-local address is tentative at first
			if time.Now().After(late) {
				break
			}
			time.Sleep(10 * time.Millisecond)
			err = unix.Sendto(fd, packet, 0, to)
		}
		if err != nil {
			return fmt.Errorf("send a router advertisement: %w", err)
		}
	}
	return nil
}

func interfaceIndex(name string) (int, error) {
	kernel, err := route.Dial()
	if err != nil {
		return 0, err
	}
	defer kernel.Close()
	link, found, err := kernel.LinkByName(name)
	if err == nil && !found {
		err = fmt.Errorf("there is no link %s", name)
	}
	return link.Index, err
}

// measureRefused gives a watch more addresses than there are tables.
func measureRefused(o options, s *site, r *report) error {
	var lines strings.Builder
	for n := range o.refused {
		fmt.Fprintf(&lines, "address add 10.%d.%d.2/24 dev wan%d\n", 1+n/250, n%250, n%2)
	}
	if err := ip("%s", lines.String()); err != nil {
		return err
	}
	if err := s.begin(); err != nil {
		return err
	}
	err := s.until(r, "all tables are leased", func() (bool, error) {
		rules, err := s.kernel.RulesWhere(unix.AF_INET, func(r *route.Rule) bool { return r.Priority == unboundRule })
		return len(rules) >= min(s.tables, o.refused), err
	})
	if err != nil {
		return err
	}
	time.Sleep(o.settled)
	busy, err := s.idle(o.settled) // a minute: that is how often a watch compares everything
	if err != nil {
		return err
	}
	r.add(ratio, busy, "watch: of a processor, %v after %d addresses met %d tables", o.settled, o.refused, s.tables).atMost(wantRefused)
	return nil
}

// measureRenamed renames a link many times in a row.
func measureRenamed(o options, s *site, r *report) error {
	if err := s.begin(); err != nil {
		return err
	}
	if _, err := s.filled(r, 1); err != nil {
		return err
	}
	was, err := s.table("10.0.0.2")
	if err != nil {
		return err
	}
	had, err := s.ours()
	if err != nil {
		return err
	}
	var lines strings.Builder
	last := "wan0"
	for n := range o.renames {
		next := fmt.Sprint("w", n)
		fmt.Fprintf(&lines, "link set dev %s name %s\n", last, next)
		last = next
	}
	if err := ip("%s", lines.String()); err != nil {
		return err
	}
	begin := time.Now()
	err = s.until(r, "one lease and three rules after renames", func() (bool, error) {
		now, err := s.table("10.0.0.2")
		if err != nil || now == was {
			return false, err
		}
		have, err := s.ours()
		return have == had, err
	})
	if err != nil {
		return err
	}
	r.add(seconds, time.Since(begin).Seconds(), "watch: a lease for the last name, and its rules alone, from the last of %d renames on", o.renames).atMost(wantRenamed)
	return nil
}

// ours is how many rules of ours there are.
func (s *site) ours() (int, error) {
	rules, err := s.kernel.RulesWhere(unix.AF_INET, func(r *route.Rule) bool { return r.Protocol == route.Protocol })
	return len(rules), err
}
