package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// The tests of this file have strace kill a process, or fail one call of it, at each call that it makes of some kinds.
// No error ends a process. After a kill -r, or another process of its kind, leaves nothing wrong.

// sweepHost is a host with an uplink for each name, in both families.
func sweepHost(t *testing.T, names ...string) *host {
	t.Helper()
	h := newHost(t)
	for i, name := range names {
		h.link(name, fmt.Sprintf("10.7%d.0.2/24", i))
		h.ns.IP(t, fmt.Sprintf("address add 2001:db8:%d::2/64 dev %s nodad", i, name))
		h.ns.IP(t, fmt.Sprintf("route add default via 10.7%d.0.1 dev %s metric %d", i, name, 10+i))
		h.ns.IP(t, fmt.Sprintf("-6 route add default via 2001:db8:%d::1 dev %s metric %d", i, name, 10+i))
	}
	return h
}

// seeded is a source of draws whose seed the test logs; SEED sets it. A short run has always the same, so that it fails by
// what was changed.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(1)
	if fullSize() {
		seed = uint64(time.Now().UnixNano())
	}
	if text := os.Getenv("SEED"); text != "" {
		if _, err := fmt.Sscan(text, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// TestSoakSweepClient: a client for one address.
func TestSoakSweepClient(t *testing.T) {
	for _, family := range []struct{ option, addr, gateway string }{
		{"-4", "10.70.0.2", "10.70.0.1"}, {"-6", "2001:db8:0::2", "2001:db8:0::1"},
	} {
		for name, more := range map[string][]string{
			"none":  nil,
			"move":  {"--routes", "move", "--gateway", family.gateway, "--nameserver", family.gateway, "--dnsmasq-servers", "SERVERS"},
			"block": {"--routes", "copy", "--on-loss", "block", "--prefix", "PREFIX"},
		} {
			t.Run(family.option+" "+name, func(t *testing.T) {
				h := sweepHost(t, "wan0", "wan1")
				servers := filepath.Join(h.dir, "servers")
				if err := os.WriteFile(servers, nil, 0o644); err != nil {
					t.Fatal(err)
				}
				args := []string{family.option, "-a", family.addr, "-i", "wan0"}
				for _, arg := range more {
					arg = strings.Replace(arg, "SERVERS", servers, 1)
					if arg == "PREFIX" {
						arg = map[string]string{"-4": "10.99.0.0/24", "-6": "2001:db8:99::/48"}[family.option]
					}
					args = append(args, arg)
				}
				h.serve()
				before := h.picture(servers)
				var inForce []string
				try := func(s spot) (bool, error) { return h.trySingle(s, args, servers, before, &inForce) }
				if _, err := try(spot{"sendto", "error=EINTR", 1 << 15}); err != nil {
					t.Fatal(err)
				}
				sweep(t, kinds("sendto", "recvfrom", "sendmmsg", "recvmmsg", "write", "renameat", "openat"), 60, 3, seeded(t), try)
			})
		}
	}
}

// trySingle leads a client from its start to its end. The first time it notes what is in force.
func (h *host) trySingle(s spot, args []string, file string, before []string, inForce *[]string) (hit bool, err error) {
	h.t.Helper()
	m := h.meddle(s, clientBin, append([]string{"-f"}, args...)...)
	if *inForce == nil {
		eventually(h.t, "the lease is in force", func() error {
			if !strings.Contains(m.wrote.String(), "has table") {
				return errors.New(m.wrote.String())
			}
			return nil
		})
		*inForce = h.picture(file)
	}
	err = m.soon(func() error { return unorderedError(h.picture(file), *inForce) })
	switch {
	case !m.ended():
		err = errors.Join(err, m.end())
	case !s.kills():
		err = fmt.Errorf("the client ended with code %d", m.cmd.ProcessState.ExitCode())
	}
	hit = m.hit()
	if killed := hit && s.kills() || m.impossible(); killed {
		err = nil
		if r := h.client(append([]string{"-r"}, args...)...); r.code != 0 || r.stdout != "0\n" {
			err = errors.Join(err, fmt.Errorf("-r: %+v", r))
		}
	}
	if left := (*meddled)(nil).soon(func() error { return unorderedError(h.picture(file), before) }); left != nil {
		err = errors.Join(err, fmt.Errorf("afterwards: %w", left))
	}
	if err != nil {
		err = fmt.Errorf("%w\nit wrote:\n%s", err, m.wrote.String())
	}
	return hit, err
}

// TestSoakSweepWatch: a watch, while addresses and routes come and go.
func TestSoakSweepWatch(t *testing.T) {
	for name, more := range map[string][]string{"copy": nil, "move": {"--routes", "move", "--on-loss", "block"}} {
		t.Run(name, func(t *testing.T) {
			h := sweepHost(t, "wan0", "wan1")
			h.serve()
			l := &life{host: h, args: append([]string{"watch", "--clean", "--debug"}, more...), before: h.picture()}
			if _, err := l.try(spot{"sendto", "error=EINTR", 1 << 15}); err != nil {
				t.Fatal(err)
			}
			sweep(t, kinds("sendto", "recvfrom", "sendmmsg", "recvmmsg", "write", "renameat", "openat"), 100, 2, seeded(t), l.try)
		})
	}
}

// life is what a watch goes through: pictures of the host after each step.
type life struct {
	*host
	args   []string
	before []string
	after  [][]string
}

// lifeStep is what happens to the host while the watch runs, and what the host is like afterwards.
type lifeStep struct {
	ip   []string
	like int      // as after that step before; -1: as after none
	has  []string // else these lines show that the watch has done all, whatever the table
}

var lifeSteps = []lifeStep{
	{nil, -1, []string{"-4 rule 20000: from all to 10.70.0.0/24", "-4 rule 20000: from all to 10.71.0.0/24",
		"-6 rule 20000: from all to 2001:db8::/64", "-6 rule 20000: from all to 2001:db8:1::/64",
		"-4 rule 91000: ", "-6 rule 91000: ", "-4 route default via 10.70.0.1 dev wan0 table 1", "-4 route default via 10.71.0.1 dev wan1 table 1",
		"-6 route default via 2001:db8::1 dev wan0 table 1", "-6 route default via 2001:db8:1::1 dev wan1 table 1"}},
	{[]string{"address add 10.70.0.9/24 dev wan0"}, -1, []string{"-4 rule 10000: from 10.70.0.9 ", " src 10.70.0.9 metric 10"}},
	{[]string{"route replace default via 10.71.0.3 dev wan1 metric 11"}, -1, []string{"-4 route default via 10.71.0.3 dev wan1 table 1"}},
	{[]string{"rule flush protocol 116"}, 2, nil},
	{[]string{"link set wan1 down", "link set wan1 up", "route add default via 10.71.0.1 dev wan1 metric 11",
		"address add 2001:db8:1::2/64 dev wan1 nodad", "-6 route add default via 2001:db8:1::1 dev wan1 metric 11"}, 1, nil},
	{[]string{"address del 10.70.0.9/24 dev wan0"}, 0, nil},
}

// learn waits until the host has what a step leads to, and returns its picture once that no longer changes.
func (l *life) learn(step lifeStep) (last []string) {
	l.t.Helper()
	var since time.Time
	eventually(l.t, "the watch has followed", func() error {
		now := l.picture()
		if unordered(now, last) != "" {
			last, since = now, time.Now()
		}
		for _, want := range step.has {
			if !slices.ContainsFunc(now, func(line string) bool { return strings.Contains(line, want) }) {
				return fmt.Errorf("no %q in\n%s", want, strings.Join(now, "\n"))
			}
		}
		if time.Since(since) < 2*time.Second {
			return errors.New("it still changes")
		}
		return nil
	})
	return last
}

// change does a step of life. iproute2 stops flushing at a rule that the watch, which moves rules, has deleted meanwhile.
func (l *life) change(arg string) {
	l.t.Helper()
	if !strings.Contains(arg, "flush") {
		l.ns.IP(l.t, arg)
		return
	}
	eventually(l.t, "ip "+arg, func() error {
		_, err := l.ns.Output("ip", strings.Fields(arg)...)
		return err
	})
}

// again starts the next watch after one that was killed. Before it listens a signal would end it without a trace.
func (l *life) again() *meddled {
	l.t.Helper()
	m := l.meddle(spot{"sendto", "error=EINTR", 1 << 15}, clientBin, l.args...)
	eventually(l.t, "it listens", func() error {
		if !strings.Contains(m.wrote.String(), "msg=watching") {
			return errors.New(m.wrote.String())
		}
		return nil
	})
	return m
}

// releaseGone releases the address that went, once the host is like want but for its lease: a watch that is killed between
// the rules of an address and its release leaves the lease, which ends by its time.
func (l *life) releaseGone(m *meddled, want []string) {
	l.t.Helper()
	gone := func(line string) bool {
		return strings.HasPrefix(line, "lease ") && strings.Contains(line, "|10.70.0.9|")
	}
	if m.soon(func() error { return unorderedError(slices.DeleteFunc(l.picture(), gone), want) }) == nil {
		l.client("-r", "-4", "-a", "10.70.0.9", "-i", "wan0")
	}
}

func (l *life) try(s spot) (hit bool, err error) {
	l.t.Helper()
	m := l.meddle(s, clientBin, l.args...)
	first := m
	for i, step := range lifeSteps {
		for _, arg := range step.ip {
			l.change(arg)
		}
		if len(l.after) == i && step.like < 0 {
			l.after = append(l.after, l.learn(step))
			continue
		}
		if len(l.after) == i {
			l.after = append(l.after, l.after[step.like])
		}
		check := func() error { return unorderedError(l.picture(), l.after[i]) }
		err := m.soon(check)
		if m == first && m.ended() {
			if !s.kills() && !m.impossible() {
				return true, fmt.Errorf("the watch ended with code %d:\n%s", m.cmd.ProcessState.ExitCode(), m.wrote.String())
			}
			m = l.again()
			if i == len(lifeSteps)-1 {
				l.releaseGone(m, l.after[i])
			}
			err = m.soon(check)
		}
		if err != nil {
			_ = m.end() // the error above is the one to tell
			return true, fmt.Errorf("after step %d: %w\nthe watch wrote:\n%s", i, err, m.wrote.String())
		}
	}
	err = m.end()
	hit = first.hit()
	if m == first && (s.kills() && hit || m.impossible()) { // at its end
		m = l.again()
		err = m.soon(func() error { return unorderedError(l.picture(), l.after[len(l.after)-1]) })
		err = errors.Join(err, m.end())
	}
	if left := (*meddled)(nil).soon(func() error { return unorderedError(l.picture(), l.before) }); left != nil {
		err = errors.Join(err, fmt.Errorf("afterwards: %w", left))
	}
	if err != nil {
		err = fmt.Errorf("%w\nthe watch wrote:\n%s", err, m.wrote.String())
	}
	return hit, err
}

// TestSoakSweepServer: a server, while leases are granted, renewed and released. Whoever was told of a lease has it
// afterwards.
func TestSoakSweepServer(t *testing.T) {
	h := sweepHost(t, "wan0")
	h.config()
	if _, err := h.tryServer(spot{"sendto", "error=EINTR", 1 << 15}); err != nil {
		t.Fatal(err)
	}
	sweep(t, kinds("sendto", "recvfrom", "sendmmsg", "recvmmsg", "pwrite64", "write", "ftruncate", "flock", "openat", "unlinkat"), 60, 4, seeded(t), h.tryServer)
}

// askOnce sends a datagram from a socket of its own, so that no answer is for an earlier request, and returns the answer;
// "" if none comes soon.
func (h *host) askOnce(datagram string) (answer string) {
	h.t.Helper()
	p := h.peer(fmt.Sprint("asker-", rand.Uint64()), false)
	defer p.conn.Close() // now: there may be thousands
	if p.conn.Send(wire.Message{Data: []byte(datagram), To: padded(h.t, "tas_socket")}) == nil {
		answer, _ = p.receive(300 * time.Millisecond) // what is no answer is none
	} else {
		time.Sleep(10 * time.Millisecond)
	}
	return answer
}

// tryServer leads a server from its start to its end. One that is killed is started again.
func (h *host) tryServer(s spot) (hit bool, err error) {
	h.t.Helper()
	if s.n%2 == 0 { // else there is a database
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			if err := os.Remove(h.db + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				h.t.Fatal(err)
			}
		}
	}
	args := []string{"--debug", "-c", filepath.Join(h.dir, "server.json")}
	first := h.meddle(s, serverBin, args...)
	m := first
	alive := func() error {
		if m != first || !m.ended() {
			return nil
		}
		// A disk that fails while the server starts ends it, with a reason. The service manager starts it again.
		unopened := strings.Contains(m.wrote.String(), "cannot serve") && strings.Contains(m.wrote.String(), "open database") ||
			strings.HasPrefix(m.wrote.String(), serverBin+": read configuration: ")
		if hit = m.hit(); hit && s.kills() || unopened || m.impossible() {
			m = h.meddle(spot{"sendto", "error=EINTR", 1 << 15}, serverBin, args...)
			return nil
		}
		return fmt.Errorf("the server ended with code %d", m.cmd.ProcessState.ExitCode())
	}
	ask := func(datagram string, right func(wire.Reply) bool) error {
		for begin := time.Now(); ; {
			if err := alive(); err != nil {
				return err
			}
			answer := h.askOnce(datagram)
			reply, err := wire.ParseReply([]byte(answer))
			if err == nil && right(reply) {
				return nil
			}
			if time.Since(begin) > patience {
				return fmt.Errorf("%s: %q", datagram, answer)
			}
		}
	}
	var tables [3]uint32
	granted := func(n int) func(wire.Reply) bool {
		return func(r wire.Reply) bool {
			if tables[n] == 0 {
				tables[n] = r.Table
			}
			return r.Table != 0 && tables[n] == r.Table
		}
	}
	gone := func(r wire.Reply) bool { return r.Table == 0 && r.Error == "" }
	err = errors.Join(
		ask(acquire(1), granted(1)), ask(acquire(2), granted(2)), ask(acquire(1), granted(1)), ask(release(2), gone))
	if err == nil && tables[1] == tables[2] {
		err = fmt.Errorf("table %d has two holders", tables[1])
	}
	if !m.ended() {
		err = errors.Join(err, m.end())
	}
	hit = first.hit()
	m = h.meddle(spot{"sendto", "error=EINTR", 1 << 15}, serverBin, args...)
	err = errors.Join(err, ask(acquire(1), granted(1)))
	if diff := unordered(h.leases(), []string{fmt.Sprintf("%d|inet|eth0|10.9.0.1||0", tables[1])}); diff != "" {
		err = errors.Join(err, fmt.Errorf("leases: %s", diff))
	}
	err = errors.Join(err, ask(release(1), gone), m.end())
	if err != nil {
		err = fmt.Errorf("%w\nthe server wrote:\n%s%s", err, first.wrote.String(), m.wrote.String())
	}
	return hit, err
}
