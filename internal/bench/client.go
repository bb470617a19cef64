package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/route"
)

// What the project wants of the client.
const (
	wantTable   = 2.0    // of two starts that do nothing; the server's answer included
	wantGone    = 0.002  // seconds
	wantGone99  = 0.010  // seconds
	wantAlone   = 4.0    // MiB
	wantEach    = 1.5    // MiB
	wantWatch   = 12.0   // MiB
	wantProbes  = 16.0   // MiB more
	wantRouted  = 2.0    // seconds
	unboundRule = 91_000 // priority, one for each address that is served

	watchLate = 30 * time.Second
)

// host is a network namespace whose addresses the clients of one program serve.
type host struct {
	software
	ns     *nettest.Namespace
	server *process
	name   string            // of the server
	holder map[uint64]string // of a table: its address
	faults *faults
}

// do runs f in the namespace.
func (h *host) do(f func() error) (err error) {
	h.ns.Do(func() { err = f() })
	return err
}

func measureClient(session *nettest.Session, o options, dir string, r *report) error {
	var hosts []*host
	for i, s := range o.programs() {
		h := &host{software: s, name: fmt.Sprint("client-", i), holder: make(map[uint64]string), faults: r.faults(i)}
		h.ns = nettest.New(session, h.name)
		if err := h.do(func() error { return h.begin(o, filepath.Join(dir, h.name)) }); err != nil {
			return err
		}
		defer h.server.kill()
		hosts = append(hosts, h)
	}
	for _, measure := range []func(options, []*host, *report) error{measureTable, measureMemory, measureGone} {
		if o.only == "watch" {
			break
		}
		if err := measure(o, hosts, r); err != nil {
			return err
		}
	}
	if err := hosts[0].do(func() error { return measureWatch(o, r) }); err != nil {
		return err
	}
	for _, h := range hosts {
		if err := h.server.stop(); err != nil {
			return err
		}
	}
	return nil
}

// begin starts the server and makes the links.
func (h *host) begin(o options, dir string) (err error) {
	for n := range o.links {
		if err := ip("link add wan%d type veth peer name far%d\nlink set wan%d up\nlink set far%d up", n, n, n, n); err != nil {
			return err
		}
	}
	h.server, err = h.start(dir, "")
	return err
}

// ip runs lines with `ip -batch`.
func ip(lines string, args ...any) error {
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(lines, args...) + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w\n%s", err, out)
	}
	return nil
}

// address is the n-th one, with its link.
func (s sizes) address(n int) (addr, ifname string) {
	return fmt.Sprintf("10.%d.%d.2", 1+n/250, n%250), fmt.Sprint("wan", n%s.links)
}

// call runs a program, and returns its first line and how long that took.
func call(path string, args ...string) (took time.Duration, line string, err error) {
	cmd := exec.Command(path, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, "", err
	}
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	buf := make([]byte, 64)
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, "", err
	}
	n, err := out.Read(buf)
	took = time.Since(begin)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return 0, "", fmt.Errorf("%v: %w\n%s", cmd, err, complaints.String())
	}
	return took, strings.TrimSpace(string(buf[:n])), nil
}

// come adds an address to its link.
func (h *host) come(addr, ifname string) error {
	return h.do(func() error { return ip("address add %s/24 dev %s", addr, ifname) })
}

// lease runs the client for an address, and notes the table.
func (h *host) lease(addr, ifname string) (took time.Duration, err error) {
	var line string
	err = h.do(func() (err error) {
		args := []string{"-4", "-a", addr, "-n", "255.255.255.0", "-i", ifname, "-d", h.name}
		took, line, err = call(h.client, append(args, h.args...)...)
		return err
	})
	if err != nil {
		return 0, err
	}
	table, err := strconv.ParseUint(line, 10, 32)
	if other, taken := h.holder[table]; err != nil || table == 0 {
		h.faults.add(&h.faults.Refused, "the client got no table for %s, but %q", addr, line)
	} else if taken {
		h.faults.add(&h.faults.Violations, "%s and %s both have table %d", addr, other, table)
	}
	h.holder[table] = addr
	return took, nil
}

// leave ends the clients of addresses. The original's -r releases nothing, so its addresses are
// deleted. Ours keep their addresses: deleting them would wake the clients that stay.
func (h *host) leave(o options, first, last int) error {
	err := h.do(func() error {
		for n := first; n < last; n++ {
			addr, ifname := o.address(n)
			maps.DeleteFunc(h.holder, func(_ uint64, holder string) bool { return holder == addr })
			var err error
			if h.releases {
				_, _, err = call(h.client, "-r", "-4", "-a", addr, "-i", ifname, "-d", h.name)
			} else {
				err = ip("address del %s/24 dev %s", addr, ifname)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = h.clients(first)
	return err
}

// clients waits until there are want client processes, and returns their pids.
func (h *host) clients(want int) (pids []int, err error) {
	for until := time.Now().Add(silence); ; time.Sleep(10 * time.Millisecond) {
		pids, err = processes(h.client)
		if err != nil || len(pids) == want {
			return pids, err
		}
		if time.Now().After(until) {
			return nil, fmt.Errorf("%d of %s in the background, want %d", len(pids), h.client, want)
		}
	}
}

// mean returns the mean of a figure over the clients of each host.
func mean(hosts []*host, clients int, of func(pid int) (float64, error)) (means [2][]float64, err error) {
	for i, h := range hosts {
		pids, err := h.clients(clients)
		if err != nil {
			return means, err
		}
		sum := 0.0
		for _, pid := range pids {
			one, err := of(pid)
			if err != nil {
				return means, err
			}
			sum += one
		}
		means[i] = []float64{sum / float64(clients)}
	}
	return means, nil
}

// measureTable starts clients that do nothing and clients that lease a table, in turns.
func measureTable(o options, hosts []*host, r *report) error {
	var nothing []float64
	var table [2][]float64
	for n := range o.addresses {
		for _, h := range hosts {
			if err := h.come(o.address(n)); err != nil {
				return err
			}
		}
		err := hosts[0].do(func() error {
			took, _, err := call(ours.client, "--version")
			nothing = append(nothing, took.Seconds())
			return err
		})
		if err != nil {
			return err
		}
		for next := range hosts {
			i := (n + next) % len(hosts) // a client is still busy when the next one starts, so the first one changes
			took, err := hosts[i].lease(o.address(n))
			if err != nil {
				return err
			}
			table[i] = append(table[i], took.Seconds())
		}
	}
	r.add(seconds, median(nothing), "client: a start that does nothing (--version), to its line")
	r.add(seconds, median(table[0]), "client: from its start to the table on stdout, rules in place").against(table[1])
	// One process starts the other, and that one asks the server, which takes microseconds.
	r.add(ratio, median(table[0])/(2*median(nothing)), "client: the same, of two starts that do nothing").atMost(wantTable)
	return nil
}

// measureMemory measures clients at rest: they have nothing to do until they renew.
func measureMemory(o options, hosts []*host, r *report) error {
	time.Sleep(o.settle)
	before, err := mean(hosts, o.addresses, wakeups)
	if err != nil {
		return err
	}
	time.Sleep(o.idle)
	woke, err := mean(hosts, o.addresses, wakeups)
	if err != nil {
		return err
	}
	for i := range hosts {
		woke[i][0] = (woke[i][0] - before[i][0]) / o.idle.Minutes()
	}
	r.add(perMinute, woke[0][0], "client: wake-ups without an event").against(woke[1]).atMost(0)

	present := o.addresses
	for _, left := range []int{o.together, 1} {
		for _, h := range hosts {
			if err := h.leave(o, left, present); err != nil {
				return err
			}
		}
		present = left
		time.Sleep(o.atRest)
		pss, err := mean(hosts, left, memory)
		if err != nil {
			return err
		}
		if left == 1 {
			r.add(octets, pss[0][0], "client: memory (PSS) of one alone, at rest").against(pss[1]).atMost(wantAlone * (1 << 20))
		} else {
			r.add(octets, pss[0][0], "client: memory (PSS) of each of %d, at rest", left).against(pss[1]).atMost(wantEach * (1 << 20))
		}
	}
	return nil
}

// measureGone deletes addresses one by one, and takes the time between the kernel's events for the
// address and for the last of its rules. Of the original one client is left by now; only the rules
// that stay are counted.
func measureGone(o options, hosts []*host, r *report) error {
	const rules = 3 // of each address
	us := hosts[0]
	for n := 1; n < o.addresses; n++ {
		if _, err := us.lease(o.address(n)); err != nil {
			return err
		}
	}
	gone := make(chan float64)
	failed := make(chan error, 1)
	ready := make(chan struct{})
	go func() { failed <- us.do(func() error { return watchGone(rules, ready, gone) }) }()
	<-ready
	var took []float64
	for n := range o.addresses {
		addr, ifname := o.address(n)
		if err := us.do(func() error { return ip("address del %s/24 dev %s", addr, ifname) }); err != nil {
			return err
		}
		select {
		case d := <-gone:
			took = append(took, d)
		case err := <-failed:
			return err
		case <-time.After(silence):
			r.Faults.add(&r.Faults.Lost, "the rules of %s stay", addr)
			return nil
		}
	}
	r.add(seconds, median(took), "client: rules gone after their address, half of %d within", o.addresses).atMost(wantGone)
	r.add(seconds, quantile(took, 0.99), "client: rules gone after their address, 99 of 100 within").atMost(wantGone99)
	if len(hosts) == 1 {
		return nil
	}
	if err := hosts[1].leave(o, 0, 1); err != nil {
		return err
	}
	var left [2][]float64
	for i, h := range hosts {
		out, err := h.ns.Output("ip", "-4", "rule")
		if err != nil {
			return fmt.Errorf("ip rule: %w\n%s", err, out)
		}
		left[i] = []float64{float64(strings.Count(out, "\n") - 3)} // the kernel has three
	}
	r.add(count, left[0][0], "client: rules that are left of %d addresses which are gone", o.addresses).against(left[1])
	return nil
}

// watchGone sends the seconds between the end of each address and that of the last of its rules. It
// takes the time when it reads an event, so it has a thread of its own, with real-time priority where
// that is permitted.
func watchGone(rules int, ready chan<- struct{}, gone chan<- float64) error {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: uint32(route.Addresses4 | route.Rules4)}); err != nil {
		return err
	}
	close(ready)
	var since time.Time
	left := 0
	for buf := make([]byte, 64<<10); ; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return err
		}
		now := time.Now()
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.RTM_DELADDR:
				since, left = now, rules
			case unix.RTM_DELRULE:
				if left--; left == 0 {
					gone <- now.Sub(since).Seconds()
				}
			}
		}
	}
}

// measureWatch adds many addresses at once to links that a watch serves.
func measureWatch(o options, r *report) error {
	config := filepath.Join(os.TempDir(), "watch.json")
	const links = `"socket_path": "client-0", "links": [{"ifname": "wan*"}]`
	if err := os.WriteFile(config, []byte("{"+links+"}"), 0o600); err != nil {
		return err
	}
	cmd := exec.Command(ours.client, "watch", "-c", config)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGKILL) // it may have ended
		_ = cmd.Wait()                          // the error is that it was killed
	}()
	w, err := route.Watch(route.Rules4)
	if err != nil {
		return err
	}
	defer w.Close()
	var lines strings.Builder
	for n := range o.watched {
		addr, ifname := o.address(n)
		fmt.Fprintf(&lines, "address add %s/24 dev %s\n", addr, ifname)
	}
	time.Sleep(time.Second / 2) // the watch has started by then; an address that it finds at its start counts as well
	begin := time.Now()
	if err := ip("%s", lines.String()); err != nil {
		return err
	}
	added := time.Since(begin)
	done := make(chan error, 1)
	go func() {
		for served := 0; served < o.watched; {
			events, err := w.Next()
			if err != nil {
				done <- err
				return
			}
			for _, e := range events {
				if e.Kind == route.RuleChanged && !e.Deleted && e.Priority == unboundRule {
					served++
				}
			}
		}
		done <- nil
	}()
	select {
	case err := <-done:
		if err != nil {
			return err
		}
	case <-time.After(watchLate):
		r.Faults.add(&r.Faults.Lost, "watch does not serve %d addresses: %s", o.watched, log.String())
		return nil
	}
	r.add(seconds, added.Seconds(), "watch: %d addresses appear within", o.watched)
	r.add(seconds, time.Since(begin).Seconds(), "watch: all of them have their rules, from the first on").atMost(wantRouted)
	busy, err := processor(cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.add(seconds, busy.Seconds(), "watch: processor time of that")
	time.Sleep(o.atRest)
	used, err := memory(cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.add(octets, used, "watch: memory (PSS) with %d addresses, at rest", o.watched).atMost(wantWatch * (1 << 20))
	if err := os.WriteFile(config, []byte("{"+links+`, "probe": {"targets": ["198.51.100.1"]}}`), 0o600); err != nil {
		return err
	}
	return measureProbes(o, r, cmd.Process, used)
}

// measureProbes has a watch probe all its addresses. Nobody answers, which is what costs most: each probe waits to its end.
func measureProbes(o options, r *report, watch *os.Process, before float64) error {
	var lines strings.Builder
	for n := range o.links {
		fmt.Fprintf(&lines, "route add default dev wan%d metric %d\n", n, 100+n)
	}
	if err := ip("%s", lines.String()); err != nil {
		return err
	}
	begin, err := processor(watch.Pid)
	if err != nil {
		return err
	}
	if err := watch.Signal(syscall.SIGHUP); err != nil {
		return err
	}
	time.Sleep(o.probing)
	end, err := processor(watch.Pid)
	if err != nil {
		return err
	}
	used, err := memory(watch.Pid)
	if err != nil {
		return err
	}
	r.add(octets, used, "watch: memory (PSS) while it probes all of them").atMost(before + wantProbes*(1<<20))
	r.add(seconds, (end - begin).Seconds(), "watch: processor time of the first %v of that", o.probing)
	return nil
}
