package main

import (
	"bytes"
	"errors"
	"fmt"

	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
)

// What the project wants of the client.
const (
	wantTable   = 2.0    // of a start that does nothing, twice, and the server's answer
	wantGone    = 0.002  // seconds
	wantGone99  = 0.010  // seconds
	wantAlone   = 4.0    // MiB
	wantEach    = 1.5    // MiB
	wantWatch   = 12.0   // MiB
	wantRouted  = 2.0    // seconds
	unboundRule = 91_000 // priority, one for each address that is served

	addresses = 100 // with a client each
	together  = 20  // clients whose memory is divided
	watched   = 1000
	links     = 100
	settle    = 12 * time.Second
	idle      = 15 * time.Second
	atRest    = 15 * time.Second // after the last that was to do: then they have let go of memory
)

func measureClient(o options, dir string, r *report) error {
	server, err := startServer(filepath.Join(dir, "client"), "")
	if err != nil {
		return err
	}
	defer server.kill()
	for n := range links {
		if err := ip("link add wan%d type veth peer name far%d\nlink set wan%d up\nlink set far%d up", n, n, n, n); err != nil {
			return err
		}
	}
	for _, measure := range []func(options, *report) error{measureTable, measureMemory, measureGone, measureWatch} {
		if err := measure(o, r); err != nil {
			return err
		}
	}
	return server.stop()
}

// ip runs lines of `ip -batch`.
func ip(lines string, args ...any) error {
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(lines, args...) + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w\n%s", err, out)
	}
	return nil
}

// address is the n-th one, with its link.
func address(n int) (addr, ifname string) {
	return fmt.Sprintf("10.%d.%d.2", 1+n/250, n%250), fmt.Sprint("wan", n%links)
}

// call starts the client and returns after how long it wrote its first line, and that.
func call(args ...string) (took time.Duration, line string, err error) {
	cmd := exec.Command(command("client"), args...)
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

// lease has the client get a table for an address.
func lease(addr, ifname string) (took time.Duration, table uint32, err error) {
	took, line, err := call("-4", "-a", addr, "-n", "24", "-i", ifname, "-d", "client")
	if err != nil {
		return 0, 0, err
	}
	n, err := strconv.ParseUint(line, 10, 32)
	return took, uint32(n), err
}

// measureTable starts clients that do nothing and clients that get a table, in turns.
func measureTable(o options, r *report) error {
	var table, nothing []float64
	holder := make(map[uint32]string)
	for n := range addresses {
		addr, ifname := address(n)
		if err := ip("address add %s/24 dev %s", addr, ifname); err != nil {
			return err
		}
		took, _, err := call("--version")
		if err != nil {
			return err
		}
		nothing = append(nothing, took.Seconds())
		took, number, err := lease(addr, ifname)
		if err != nil {
			return err
		}
		table = append(table, took.Seconds())
		if other, taken := holder[number]; taken && number != 0 {
			r.Faults.add(&r.Faults.Violations, "%s and %s both have table %d", addr, other, number)
		}
		if holder[number] = addr; number == 0 {
			r.Faults.add(&r.Faults.Refused, "the client got no table for %s", addr)
		}
	}
	r.add(seconds, median(nothing), "client: a start that does nothing (--version), to its line")
	r.add(seconds, median(table), "client: from its start to the table on stdout, rules in place")
	// One process starts the other, and that one asks the server; which takes microseconds.
	r.atMost(wantTable, ratio, median(table)/(2*median(nothing)), "client: the same, of two starts that do nothing")
	return nil
}

// measureMemory looks at clients that have nothing to do until they renew.
func measureMemory(o options, r *report) error {
	pids, err := clients(addresses)
	if err != nil {
		return err
	}
	// Some ten seconds after a start Go's runtime gives memory back.
	time.Sleep(settle)
	before, err := sum(pids, wakeups)
	if err != nil {
		return err
	}
	time.Sleep(idle)
	after, err := sum(pids, wakeups)
	if err != nil {
		return err
	}
	r.atMost(0, perMinute, float64(after-before)/addresses/idle.Minutes(), "client: wake-ups without an event")

	for _, left := range []int{together, 1} {
		for n := left; n < addresses; n++ {
			addr, ifname := address(n)
			if _, _, err := call("-r", "-4", "-a", addr, "-i", ifname, "-d", "client"); err != nil && left == together {
				return err
			}
		}
		if pids, err = clients(left); err != nil {
			return err
		}
		time.Sleep(atRest)
		pss, err := sum(pids, func(pid int) (int, error) {
			used, err := memory(pid)
			return int(used), err
		})
		if err != nil {
			return err
		}
		if left == 1 {
			r.atMost(wantAlone*(1<<20), octets, float64(pss), "client: memory (PSS) of one alone, at rest")
		} else {
			r.atMost(wantEach*(1<<20), octets, float64(pss)/float64(left), "client: memory (PSS) of each of %d, at rest", left)
		}
	}
	for n := 1; n < addresses; n++ {
		if _, _, err := lease(address(n)); err != nil {
			return err
		}
	}
	return nil
}

// clients waits until there are so many in the background.
func clients(want int) (pids []int, err error) {
	for until := time.Now().Add(silence); ; time.Sleep(10 * time.Millisecond) {
		pids, err = processes("client")
		if err != nil || len(pids) == want {
			return pids, err
		}
		if time.Now().After(until) {
			return nil, fmt.Errorf("%d clients in the background, want %d", len(pids), want)
		}
	}
}

func sum(pids []int, of func(pid int) (int, error)) (n int, err error) {
	for _, pid := range pids {
		one, err := of(pid)
		if err != nil {
			return 0, err
		}
		n += one
	}
	return n, nil
}

// measureGone deletes addresses one by one, and takes the time between the kernel's word
// that one is gone and its word that the last rule of its is.
func measureGone(o options, r *report) error {
	const rules = 3 // of each address
	gone := make(chan float64)
	failed := make(chan error, 1)
	ready := make(chan struct{})
	go func() { failed <- watchGone(rules, ready, gone) }()
	<-ready
	var took []float64
	for n := range addresses {
		addr, ifname := address(n)
		if err := ip("address del %s/24 dev %s", addr, ifname); err != nil {
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
	r.atMost(wantGone, seconds, median(took), "client: rules gone after their address, half of %d within", addresses)
	r.atMost(wantGone99, seconds, quantile(took, 0.99), "client: rules gone after their address, 99 of 100 within")
	return nil
}

// watchGone sends the seconds from each address that goes to the last of its rules. It has
// a thread for itself, which goes first where that is permitted: the time at which it reads
// is the time that counts.
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

// measureWatch has a thousand addresses appear together.
func measureWatch(o options, r *report) error {
	cmd := exec.Command(command("client"), "watch", "--ifname", "wan*", "-d", "client", "--routes", "copy")
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGKILL) // it may have ended
		_ = cmd.Wait()                          // killed is what it says
	}()
	w, err := route.Watch(route.Rules4)
	if err != nil {
		return err
	}
	defer w.Close()
	var lines strings.Builder
	for n := range watched {
		addr, ifname := address(n)
		fmt.Fprintf(&lines, "address add %s/24 dev %s\n", addr, ifname)
	}
	time.Sleep(time.Second / 2) // it has begun; what it finds then would count no less
	begin := time.Now()
	if err := ip("%s", lines.String()); err != nil {
		return err
	}
	added := time.Since(begin)
	done := make(chan error, 1)
	go func() {
		for served := 0; served < watched; {
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
	case <-time.After(stormLate):
		r.Faults.add(&r.Faults.Lost, "watch does not serve %d addresses: %s", watched, log.String())
		return nil
	}
	r.add(seconds, added.Seconds(), "watch: %d addresses appear within", watched)
	r.atMost(wantRouted, seconds, time.Since(begin).Seconds(), "watch: all of them have their rules, from the first on")
	busy, err := processor(cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.add(seconds, busy.Seconds(), "watch: processor time of that")
	time.Sleep(atRest)
	used, err := memory(cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.atMost(wantWatch*(1<<20), octets, used, "watch: memory (PSS) with %d addresses, at rest", watched)
	return nil
}
