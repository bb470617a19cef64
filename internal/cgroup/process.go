package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// A Process is what Attach or Detach did to one.
type Process struct {
	PID     int
	Name    string // of the program, as the kernel has it
	Cgroup  string // that it is in now
	Sockets []Socket
	Unseen  []string  // what holds sockets that could not be looked at, and stay as they are
	Missing []Missing // what the kernel lacks, told once for a cgroup
}

// Attach binds a process that runs: new sockets by its cgroup, those that are idle one by one. A
// socket with a connection or an address of its own is left alone, it goes on through the uplink it
// has; with reset such connections are cut, so that the program makes new ones.
func (c *Cgroups) Attach(pid int, u Uplink, m Mark, reset bool) (Process, error) {
	if err := u.Check(); err != nil {
		return Process{PID: pid}, err
	}
	p, pidfd, err := open(pid)
	if err != nil {
		return p, err
	}
	defer unix.Close(pidfd)
	before, err := c.of(pid)
	if err != nil {
		return p, err
	}
	inside := childOf(before, u)
	// First this, so that no socket is made unseen between the two.
	if p.Missing, err = c.placeFrom(pid, inside, m, true); err != nil {
		return p, err
	}
	p.Cgroup = inside
	own, err := addressesOf(u.Ifname)
	if err != nil {
		return p, err
	}
	p.Sockets, p.Unseen, err = eachSocket(pid, pidfd, func(s *Socket) { s.attach(m, own, reset) })
	c.sweepIn(outside(before))
	return p, err
}

// addressesOf returns the addresses of a link, which need not be there.
func addressesOf(ifname string) ([]netip.Addr, error) {
	link, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, nil // it may come later, without a socket bound to it
	}
	all, err := link.Addrs()
	var addrs []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			addrs = append(addrs, p.Addr())
		}
	}
	return addrs, err
}

// Detach undoes Attach: the process goes where it would be without us, its idle sockets too. A process
// that is not bound is left as it is.
func (c *Cgroups) Detach(pid int) (Process, error) {
	p, pidfd, err := open(pid)
	if err != nil {
		return p, err
	}
	defer unix.Close(pidfd)
	before, err := c.of(pid)
	if err != nil {
		return p, err
	}
	mark, bound, err := c.markOf(before)
	if err != nil || !bound {
		p.Cgroup = before
		return p, err
	}
	p.Cgroup = outside(before)
	if _, still, err := c.markOf(p.Cgroup); err != nil {
		return p, err
	} else if still {
		return p, fmt.Errorf("process %d: cgroup %s is bound itself, by BPFProgram= of its unit", pid, p.Cgroup)
	}
	if err := move(pid, c.file(p.Cgroup)); err != nil {
		return p, err
	}
	p.Sockets, p.Unseen, err = eachSocket(pid, pidfd, func(s *Socket) { s.detach(mark) })
	c.sweepIn(p.Cgroup)
	return p, err
}

// open returns the process with a descriptor of it. Only those of our network namespace can be bound:
// the rules are here.
func open(pid int) (p Process, pidfd int, err error) {
	p.PID = pid
	if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
		return p, -1, fmt.Errorf("process %d: %w", pid, err)
	}
	defer func() {
		if err != nil {
			unix.Close(pidfd)
		}
	}()
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return p, -1, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	if err != nil {
		return p, -1, err
	}
	p.Name = strings.TrimSuffix(string(name), "\n")
	var own, theirs unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		return p, -1, fmt.Errorf("own network namespace: %w", err)
	}
	if err := statNamespace(pid, &theirs); err != nil {
		return p, -1, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	if own.Dev != theirs.Dev || own.Ino != theirs.Ino {
		return p, -1, fmt.Errorf("process %d is in another network namespace, which has its own uplinks: run this there, with nsenter --net=/proc/%d/ns/net", pid, pid)
	}
	return p, pidfd, nil
}

// statNamespace looks at the network namespace of a process, whose main thread may have ended.
func statNamespace(pid int, stat *unix.Stat_t) (err error) {
	if err = unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), stat); err == nil {
		return nil
	}
	tids, _ := numbersIn(fmt.Sprintf("/proc/%d/task", pid)) // the error above is the one to tell
	for _, tid := range tids {
		if unix.Stat(fmt.Sprintf("/proc/%d/task/%d/ns/net", pid, tid), stat) == nil {
			return nil
		}
	}
	return err
}

// Tree calls f with each pid and all that descend from them, also those that appear meanwhile,
// parents first. What has ended is left out.
func Tree(pids []int, f func(pid int)) error {
	seen := make(map[int]bool)
	for _, pid := range pids {
		seen[pid] = true
		f(pid)
	}
	// A child born after its parent was done is where its parent is: the first look without news is
	// the last.
	for news := true; news; {
		news = false
		parents, err := parentOf()
		if err != nil {
			return err
		}
		var order []int
		for pid := range parents {
			order = append(order, pid)
		}
		slices.Sort(order)
		for _, pid := range order {
			if !seen[pid] && seen[parents[pid]] {
				seen[pid], news = true, true
				f(pid)
			}
		}
	}
	return nil
}

// parentOf returns the parent of each process.
func parentOf() (map[int]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	parents := make(map[int]int)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // has ended
		}
		// The name, in parentheses, may have anything in it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 2 {
			continue
		}
		if parents[pid], err = strconv.Atoi(fields[1]); err != nil {
			return nil, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
	}
	return parents, nil
}

// A Bound is a cgroup that is bound, and who is in it.
type Bound struct {
	Uplink // the zero one for a unit with BPFProgram=, whose name says nothing
	Mark
	Cgroup string
	PIDs   []int // sorted; may be none in a cgroup that is not made for a process
	// Unlocked is why not all that leaves by another uplink is dropped, or why the uplink is not found again after it
	// was gone; empty: neither is so, or other uplinks may be used.
	Unlocked string
	// RulesOnly says that nothing drops anything: an older version bound it.
	RulesOnly bool
}

// Bound looks at all cgroups, removes our empty ones and returns the others, sorted. What counts is
// what the kernel has.
func (c *Cgroups) Bound() ([]Bound, error) {
	var all []Bound
	err := c.walk("/", nil, &all)
	if err != nil {
		return nil, err
	}
	var bound []Bound
	for _, b := range all {
		if len(b.PIDs) == 0 && strings.HasPrefix(path.Base(b.Cgroup), childPrefix) && !stands(c.file(b.Cgroup)) {
			sweep(c.file(b.Cgroup))
			continue
		}
		slices.Sort(b.PIDs)
		bound = append(bound, b)
	}
	return bound, nil
}

// BoundHere is Bound without processes of other network namespaces, as containers have, and without cgroups that hold only
// such processes: the rules for them, and the lock, are there.
func (c *Cgroups) BoundHere() (here []Bound, err error) {
	all, err := c.Bound()
	for _, b := range all {
		empty := len(b.PIDs) == 0
		b.PIDs = slices.DeleteFunc(b.PIDs, func(pid int) bool { return !InNamespace(pid) })
		if empty || len(b.PIDs) > 0 {
			here = append(here, b)
		}
	}
	return here, err
}

// BoundTo reports whether a process is in a cgroup that is bound to the interface.
func (c *Cgroups) BoundTo(pid int, ifname string) (bool, error) {
	all, err := c.Bound()
	return slices.ContainsFunc(all, func(b Bound) bool { return b.Ifname == ifname && slices.Contains(b.PIDs, pid) }), err
}

// walk adds the bound processes of a cgroup and of those below it; its processes count for the nearest cgroup above
// them that is bound, all[*in].
func (c *Cgroups) walk(cgroup string, in *int, all *[]Bound) error {
	dir := c.file(cgroup)
	mark, ok, err := programsMark(dir)
	if errors.Is(err, fs.ErrPermission) { // it is another user's, and this one is root in namespaces of its own alone
		return nil
	}
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", cgroup, err)
	}
	if ok {
		u, _ := uplinkOf(cgroup)
		unlocked, err := unlocked(dir, mark)
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", cgroup, err)
		}
		*all = append(*all, Bound{Uplink: u, Mark: mark, Cgroup: cgroup, Unlocked: unlocked, RulesOnly: unlocked == boundByOlder})
		at := len(*all) - 1
		in = &at
	}
	if in != nil {
		pids, err := processes(dir)
		if err != nil {
			return err
		}
		(*all)[*in].PIDs = append((*all)[*in].PIDs, pids...)
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil // removed meanwhile
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := c.walk(path.Join(cgroup, e.Name()), in, all); err != nil {
				return err
			}
		}
	}
	return nil
}

// markOf is the mark that sockets get which a process of the cgroup makes.
func (c *Cgroups) markOf(cgroup string) (Mark, bool, error) {
	for ; ; cgroup = path.Dir(cgroup) {
		if mark, ok, err := programsMark(c.file(cgroup)); ok || err != nil {
			return mark, ok, err
		}
		if cgroup == "/" {
			return Mark{}, false, nil
		}
	}
}

// programsMark reads the mark of the programs of a cgroup itself, out of their code.
func programsMark(dir string) (mark Mark, ok bool, err error) {
	file, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return mark, false, nil
	}
	if err != nil {
		return mark, false, err
	}
	defer file.Close()
	have, err := attached(int(file.Fd()), ebpf.AttachCGroupInetSockCreate, createName)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return mark, false, nil // removed meanwhile
	}
	if err != nil {
		return mark, false, err
	}
	defer have.close()
	if len(have) == 0 {
		return mark, false, nil
	}
	code, err := have[0].info.Instructions()
	if err != nil {
		return mark, false, fmt.Errorf("read BPF program %s: %w", createName, err)
	}
	for _, instruction := range code {
		switch instruction.OpCode {
		case asm.And.Op32(asm.ImmSource):
			mark.Mask = uint32(instruction.Constant)
		case asm.Or.Op32(asm.ImmSource):
			mark.Value = uint32(instruction.Constant)
		}
	}
	if err := mark.check(); err != nil {
		return mark, false, fmt.Errorf("BPF program %s: %w", createName, err)
	}
	return mark, true, nil
}

const boundByOlder = "the lock: an older version bound it"

// unlocked is Bound.Unlocked of a cgroup with the programs for a mark.
func unlocked(dir string, m Mark) (string, error) {
	if m.fallback() {
		return "", nil
	}
	file, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer file.Close()
	have, err := attached(int(file.Fd()), ebpf.AttachCGroupInetEgress, egressName)
	if err != nil {
		return "", err
	}
	defer have.close()
	if len(have) == 0 {
		return boundByOlder, nil
	}
	lock, err := OpenLock()
	if err != nil {
		return "the lock, as doctor says", nil // once for all cgroups
	}
	defer lock.Close()
	if h := (hook{lock: lock.id()}); !h.reads(have[0].info) {
		return "the lock: its programs read one that was removed", nil
	}
	answers, err := attached(int(file.Fd()), ebpf.AttachCGroupInetIngress, ingressName)
	if err != nil {
		return "", err
	}
	defer answers.close()
	if len(answers) == 0 {
		return "what keeps the kernel from answering for other uplinks: an older version bound it, or another program is in the way", nil
	}
	return "", nil
}

// numbersIn returns what is in a directory of /proc by number.
func numbersIn(dir string) ([]int, error) {
	entries, err := os.ReadDir(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

// Free detaches every process that is bound by a cgroup of ours and removes those cgroups. Units with
// BPFProgram= stay as they are.
func (c *Cgroups) Free() error {
	return c.free(func(Uplink, int) bool { return true })
}

// FreeFallback is Free for the interfaces that covers names, and for processes of this network namespace that may use other
// uplinks. The others stay in their cgroups.
func (c *Cgroups) FreeFallback(covers func(ifname string) bool) error {
	return c.free(func(u Uplink, pid int) bool { return covers(u.Ifname) && u.Fallback && InNamespace(pid) })
}

// InNamespace reports whether a process is in the network namespace of the caller.
func InNamespace(pid int) bool {
	var own, theirs unix.Stat_t
	return unix.Stat("/proc/thread-self/ns/net", &own) == nil && statNamespace(pid, &theirs) == nil && own.Ino == theirs.Ino
}

// free detaches the processes that which names, and removes the cgroup of an interface if that leaves none in it.
func (c *Cgroups) free(which func(u Uplink, pid int) bool) error {
	bound, err := c.Bound()
	if err != nil {
		return err
	}
	var errs []error
	others := make(map[Uplink]bool) // that have a process which stays
	for _, b := range bound {
		if b.Uplink == (Uplink{}) {
			continue
		}
		for _, pid := range b.PIDs {
			if !which(b.Uplink, pid) {
				others[b.Uplink] = true
				continue
			}
			if _, err := c.Detach(pid); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, err)
			}
		}
	}
	interfaces, err := c.Interfaces()
	errs = append(errs, err)
	for _, u := range interfaces {
		if !others[u] && which(u, os.Getpid()) {
			errs = append(errs, c.RemoveInterface(u))
		}
	}
	for _, u := range c.AllStanding() {
		if !others[u] && which(u, os.Getpid()) {
			_, err := c.RemoveStanding(u)
			errs = append(errs, err)
		}
	}
	_, err = c.Bound() // sweeps
	return errors.Join(append(errs, err)...)
}

// MarkOf returns the mark that sockets of a process get, zero if it is not bound.
func (c *Cgroups) MarkOf(pid int) (Mark, error) {
	cgroup, err := c.of(pid)
	if err != nil {
		return Mark{}, err
	}
	mark, _, err := c.markOf(cgroup)
	return mark, err
}
