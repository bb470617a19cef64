package netns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// Program is a process in a namespace.
type Program struct {
	Namespace string `json:"namespace"`
	PID       int    `json:"pid"`
	UID       uint32 `json:"uid"`
	Started   int64  `json:"started"` // seconds since 1970
	Command   string `json:"command"`
}

// Row is a namespace, as list shows it.
type Row struct {
	Name      string        `json:"name"`
	Ifname    string        `json:"ifname"`
	OnLoss    uplink.OnLoss `json:"on_loss"`
	State     string        `json:"state"` // Up, or what became of a command that was killed
	Tables    []uint32      `json:"tables"`
	Addresses []string      `json:"addresses"`
	Resolv    string        `json:"resolv"`
	Allow     []string      `json:"allow"` // users and @groups; none: all of the group
	Programs  []Program     `json:"programs"`
	VPN       string        `json:"vpn"`           // VPNUp, VPNDown; empty: it has none
	Handshake int64         `json:"vpn_handshake"` // of WireGuard, seconds since 1970; 0: none
	Pattern   string        `json:"pattern"`       // of links, of which ifname is one; empty: none
	IPv6      string        `json:"ipv6"`          // how IPv6 leaves: nat, prefix, proxy, npt, macvlan, pasta, vpn or off
	Wiring    string        `json:"wiring"`        // nat, macvlan or pasta; vpn
	Missing   string        `json:"missing"`       // empty: all is as it should be
	Unsure    string        `json:"-"`             // what it may miss where nobody can tell
}

// How the VPN of a namespace is.
const (
	VPNUp   = "up" // its link is in the namespace
	VPNDown = "down"
)

// Names are the names of namespaces by their traffic, as rules select it: "iif tav1".
func Names() (map[string]string, error) {
	m, err := openMemory()
	if err != nil {
		return nil, err
	}
	states, err := m.all()
	names := make(map[string]string)
	for _, s := range states {
		names[route.Traffic{Iif: linkOf(s.Number)}.String()] = s.Name
	}
	return names, err
}

// List returns all namespaces, by name.
func (h *Host) List() ([]Row, error) {
	states, err := h.memory.all()
	if err != nil || len(states) == 0 {
		return []Row{}, err
	}
	programs, err := h.Programs("")
	if err != nil {
		return nil, err
	}
	rows := []Row{}
	for _, s := range states {
		row, err := h.row(s, programs)
		if err != nil {
			return nil, err
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// row is a namespace as list shows it, with those of the programs that are in it.
func (h *Host) row(s State, programs []Program) (Row, error) {
	pools, err := h.memory.pools()
	if err != nil {
		return Row{}, err
	}
	p := s.plan(pools)
	row := Row{Name: s.Name, Ifname: s.Ifname, Pattern: s.Pattern, OnLoss: s.OnLoss, State: s.Phase, Tables: []uint32{}, Resolv: s.Resolv,
		Addresses: []string{p.ours.inet.Addr().String()}, Allow: append([]string{}, s.Allow...), Programs: []Program{}, Wiring: cmp.Or(s.Wiring, WiringNAT)}
	if s.VPN != "" {
		return h.vpnRow(row, s, p, programs)
	}
	if row.IPv6 = WayOff; s.IPv6 {
		if row.IPv6 = cmp.Or(s.Inet6.Way, WayNAT); !s.routed() {
			row.IPv6 = s.Wiring
		}
		row.Addresses = append(row.Addresses, p.ours.inet6.Addr().String())
	}
	row.take(programs)
	switch s.Wiring {
	case WiringPasta:
		return h.pastaRow(row, s)
	case WiringMacvlan:
		return h.macvlanRow(row, s)
	}
	return row, h.inspect(&row, s, p)
}

// Leads reports whether there is a way out: a lease, or a VPN that is up.
func (r Row) Leads() bool {
	return len(r.Tables) > 0 || r.VPN == VPNUp || r.Wiring == WiringMacvlan && len(r.Addresses) > 0 || r.Wiring == WiringPasta && r.Missing == ""
}

// take adds the programs that are in the namespace.
func (r *Row) take(programs []Program) {
	for _, p := range programs {
		if p.Namespace == r.Name {
			r.Programs = append(r.Programs, p)
		}
	}
}

// vpnRow is row for a namespace with a VPN, which has no rules.
func (h *Host) vpnRow(row Row, s State, p plan, programs []Program) (Row, error) {
	row.take(programs)
	row.Addresses, row.VPN, row.IPv6, row.Wiring = []string{}, VPNDown, VPN, VPN
	if row.Missing = h.unmade(s); row.Missing != "" {
		return row, nil
	}
	up, err := isUpInside(s.Name, p.link)
	if err != nil || !up {
		row.Missing = "its VPN"
		return row, err
	}
	var t tunnel
	if err := h.memory.dir.Read(tunnelFile(s.Name), &t); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return row, err
	}
	for _, a := range t.Addresses {
		row.Addresses = append(row.Addresses, a.Addr().String())
	}
	row.VPN, row.Handshake = VPNUp, handshake(p.link)
	return row, nil
}

// unmade is what is missing before anything is to be looked for in the namespace; "": nothing.
func (h *Host) unmade(s State) string {
	switch {
	case s.Phase != Up:
		return "the end of a command that was killed: add or delete it again"
	case !isPinned(netPin(s.Name)) || !isPinned(h.memory.mountPin(s.Name)):
		return "its namespaces"
	}
	return ""
}

// inspect finds the tables of a namespace, and what is missing.
func (h *Host) inspect(row *Row, s State, p plan) error {
	_, linked, err := h.kernel.LinkByName(p.link)
	if err != nil {
		return err
	}
	guards := 0
	for _, family := range families {
		rules, err := h.kernel.RulesWhere(family, func(r *route.Rule) bool { return p.ofNamespace(*r) })
		if err != nil {
			return err
		}
		for _, r := range rules {
			if uplink.IsGuard(r) {
				guards++
			}
			if uplink.IsLookup(r) && !slices.Contains(row.Tables, r.Table) {
				row.Tables = append(row.Tables, r.Table)
			}
		}
	}
	row.Missing = h.unmade(s)
	switch {
	case row.Missing != "":
	case !linked:
		row.Missing = "its link " + p.link
	case guards == 0:
		row.Missing = "its guards"
	case len(row.Tables) == 0:
		row.Missing = "a lease"
	case s.Firewall != FirewallNone:
		all, err := nat.Foreigners()
		if err != nil {
			return err
		}
		row.Missing, err = h.dropping(s, p.link, all)
		row.Unsure = unsureOf(s)
		return err
	}
	return nil
}

// Programs lists the processes in a namespace, or with "" in all of them, however they came there.
func (h *Host) Programs(name string) ([]Program, error) {
	states, err := h.memory.all()
	if err != nil {
		return nil, err
	}
	names := make(map[unix.Stat_t]string)
	for _, s := range states {
		if id, ok := identity(netPin(s.Name)); ok && isPinned(netPin(s.Name)) && (name == "" || name == s.Name) {
			names[id] = s.Name
		}
	}
	if name != "" && len(names) == 0 {
		return nil, named(name, ErrUnknown)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	programs := []Program{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		id, ok := identity(fmt.Sprintf("/proc/%d/ns/net", pid))
		if of := names[id]; ok && of != "" {
			if p, ok := programOf(pid); ok {
				p.Namespace = of
				programs = append(programs, p)
			}
		}
	}
	return programs, nil
}

// identity is what tells the file of a namespace from others.
func identity(path string) (id unix.Stat_t, ok bool) {
	var stat unix.Stat_t
	if unix.Stat(path, &stat) != nil {
		return id, false
	}
	id.Dev, id.Ino = stat.Dev, stat.Ino
	return id, true
}

// userHZ is the unit of times in /proc, a second.
const userHZ = 100

// programOf reads what /proc says of a process; not ok: it has ended.
func programOf(pid int) (p Program, ok bool) {
	dir := fmt.Sprintf("/proc/%d", pid)
	info, err := os.Stat(dir)
	if err != nil {
		return p, false
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, false
	}
	p.PID = pid
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		p.UID = owner.Uid
	}
	text := string(stat)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const state, start = 0, 19 // fields 3 and 22 of proc_pid_stat(5)
	if len(fields) <= start || fields[state] == "Z" {
		return p, false
	}
	ticks, err := strconv.ParseInt(fields[start], 10, 64)
	var up unix.Timespec
	if err == nil && unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) == nil {
		p.Started = time.Now().Unix() - int64(up.Sec) + ticks/userHZ
	}
	line, err := outside.ReadFile(filepath.Join(dir, "cmdline"))
	if errors.Is(err, outside.ErrSilent) {
		line = []byte("?")
	} else if err != nil {
		return p, false
	}
	p.Command = printable(strings.TrimRight(strings.ReplaceAll(string(line), "\x00", " "), " "))
	return p, true
}

// printable is a text without characters that would change a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, text)
}

// killPatience is how long Stop waits after SIGKILL, which a process that waits for a disk, say, does not see.
const killPatience = 5 * time.Second

// Stop ends programs of a namespace: see Stop.
func (h *Host) Stop(ctx context.Context, name string, signal unix.Signal, timeout time.Duration, pids []int) (int, error) {
	return Stop(ctx, func() ([]Program, error) { return h.Programs(name) }, signal, timeout, pids)
}

// Stop ends programs: with a signal first, and those that are there after the timeout with SIGKILL. It reports how many it
// ended, and in the error which ones do not end. list lists those of a namespace; pids are those to end, none: all.
func Stop(ctx context.Context, list func() ([]Program, error), signal unix.Signal, timeout time.Duration, pids []int) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	ended, all := make(map[int]bool), len(pids) == 0
	for limit := (<-chan time.Time)(nil); ; {
		programs, err := list()
		if err != nil {
			return len(ended), err
		}
		programs = slices.DeleteFunc(programs, func(p Program) bool { return !all && !slices.Contains(pids, p.PID) })
		if len(programs) == 0 {
			return len(ended), notThere(pids, ended)
		}
		with := signal
		if ctx.Err() != nil {
			with = unix.SIGKILL
			if limit == nil {
				limit = time.After(killPatience)
			}
		}
		var untold []int
		for _, p := range programs {
			if !ended[p.PID] || with != signal {
				untold = append(untold, p.PID)
			}
			ended[p.PID] = true
		}
		if err := signalThose(list, untold, with); err != nil {
			return len(ended), err
		}
		select {
		case <-tick.C:
		case <-limit:
			return len(ended), fmt.Errorf("programs are there %s after SIGKILL: they wait in the kernel, or something starts them again: process %d (%s)",
				killPatience, programs[0].PID, programs[0].Command)
		}
	}
}

func notThere(pids []int, ended map[int]bool) error {
	for _, pid := range pids {
		if !ended[pid] {
			return fmt.Errorf("process %d is not in the namespace", pid)
		}
	}
	return nil
}

// signalThose sends a signal to processes that the list still has once they are held: a number may be another process's.
func signalThose(list func() ([]Program, error), pids []int, signal unix.Signal) error {
	if len(pids) == 0 {
		return nil
	}
	held := make(map[int]int)
	defer func() {
		for _, fd := range held {
			_ = unix.Close(fd) // it was only signalled
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open process %d: %w", pid, err)
		}
		held[pid] = fd
	}
	programs, err := list()
	if err != nil {
		return err
	}
	for _, p := range programs {
		if fd, ok := held[p.PID]; ok {
			if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("signal process %d: %w", p.PID, err)
			}
		}
	}
	return nil
}
