package bind

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Row is one cgroup, or one kind of traffic, that is bound.
type Row struct {
	Ifname    string        `json:"ifname"`
	OnLoss    uplink.OnLoss `json:"on_loss"`
	Tables    []uint32      `json:"tables"` // of both families, which it is sent to; none: it is blocked, or may leave by any interface
	Cgroup    string        `json:"cgroup"`
	Processes []Process     `json:"processes"`
	Traffic   string        `json:"traffic"` // of no cgroup, as ip rule writes it
	Missing   string        `json:"missing"` // empty: all is as it should be
}

// Process is a process that is bound.
type Process struct {
	PID  int    `json:"pid"`
	Name string `json:"name"`
	Bits int    `json:"bits"` // of a word of its program, 32 or 64; 0: not known
}

// Is32Bit reports whether the program of a process has shorter words than the kernel, which then does not show its
// setsockopt to the programs of its cgroup.
func (p Process) Is32Bit() bool { return p.Bits != 0 && p.Bits < strconv.IntSize }

// bitsOf returns the word size of the program of a process.
func bitsOf(pid int) int {
	path := fmt.Sprintf("/proc/%d/exe", pid)
	bits, err := outside.Ask(path, outside.Limit, func() (int, error) {
		f, err := os.Open(path)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		var header [5]byte // the magic number, and the class
		if _, err := io.ReadFull(f, header[:]); err != nil || string(header[:4]) != "\x7fELF" {
			return 0, err
		}
		return 32 * int(header[4]), nil
	})
	if err != nil {
		return 0 // it has ended, say
	}
	return bits
}

// Rows lists bound traffic and processes of this network namespace, by cgroups and by rules.
func Rows(server string, uids []uint32) ([]Row, error) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	defer cgroups.Close()
	processes, err := cgroups.BoundHere()
	if err != nil {
		return nil, err
	}
	var ifnames []string // of processes; the links may be gone
	for _, p := range processes {
		if p.Ifname != "" && !slices.Contains(ifnames, p.Ifname) {
			ifnames = append(ifnames, p.Ifname)
		}
	}
	rules, err := List(server, uids, ifnames...)
	if err != nil {
		return nil, err
	}
	rows := []Row{}
	for _, p := range processes {
		row := Row{Ifname: p.Ifname, OnLoss: uplink.Block, Tables: []uint32{}, Cgroup: p.Cgroup, Processes: []Process{}}
		at := slices.IndexFunc(rules, func(b Bound) bool {
			return b.Traffic.Mark == p.Value && b.Traffic.Mask == p.Mask
		})
		if p.Fallback {
			row.OnLoss = uplink.Fallback
		}
		if at >= 0 {
			row.take(rules[at])
		} else {
			row.Missing = "the rules of its mark " + p.Mark.String()
		}
		if row.Missing == "" {
			row.Missing = p.Unlocked
		}
		for _, pid := range p.PIDs {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			if err == nil { // else it has ended
				row.Processes = append(row.Processes, Process{pid, strings.TrimSuffix(string(name), "\n"), bitsOf(pid)})
			}
		}
		rows = append(rows, row)
	}
	for _, b := range rules {
		if b.Traffic.Mask == 0 {
			row := Row{Tables: []uint32{}, Processes: []Process{}, Traffic: b.Traffic.String()}
			row.take(b)
			rows = append(rows, row)
		}
	}
	slices.SortStableFunc(rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.Ifname, b.Ifname), cmp.Compare(a.OnLoss, b.OnLoss))
	})
	return rows, nil
}

// take fills in what the rules of b say.
func (r *Row) take(b Bound) {
	if r.Ifname == "" {
		r.Ifname = b.Ifname
	}
	r.OnLoss = b.OnLoss
	for _, family := range []wire.Family{wire.Inet, wire.Inet6} {
		for _, table := range b.Tables[family] {
			if !slices.Contains(r.Tables, table) {
				r.Tables = append(r.Tables, table)
			}
		}
	}
	switch {
	case len(b.Guarded) == 0:
		r.Missing = "its guards"
	case len(r.Tables) == 0:
		r.Missing = "a lease"
	case b.NoRoute && b.Front == (Front{}):
		r.Missing = "a route (blocked: no route)"
	default:
		r.Missing = cmp.Or(b.Front.missing(b.Traffic, b.OnLoss), b.Subflows)
	}
}

// Bound is one kind of traffic that rules bind.
type Bound struct {
	Traffic  route.Traffic
	OnLoss   uplink.OnLoss
	Ifname   string                   // empty: the interface is not known
	Priority uint32                   // of the lookups; the guard is one behind
	Guarded  []wire.Family            // that have the guard
	Tables   map[wire.Family][]uint32 // of the lookups, in order
	NoRoute  bool                     // it has lookups, and finds no route in any family that has
	Front    Front                    // that takes the traffic before
	Subflows string                   // where the kernel takes subflows of MPTCP that leave by another uplink; empty: nowhere
}

// List lists what rules bind on this host. It finds the interfaces by the marks that the server gave to those of the
// host and to more, else by the addresses of their tables.
func List(server string, uids []uint32, more ...string) ([]Bound, error) {
	kernel, err := route.Dial()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	all, sources, err := boundIn(kernel)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	links, addresses, err := kernel.HostAddresses()
	if err != nil {
		return nil, err
	}
	ifnames := slices.Clone(more)
	for _, link := range links {
		ifnames = append(ifnames, link.Name)
	}
	asked, err := peer.NewServer(server, uids)
	if err != nil {
		return nil, err
	}
	marked, err := asked.MarkedInterfaces(context.Background(), ifnames)
	if err != nil && !errors.Is(err, peer.ErrNoServer) && !errors.Is(err, peer.ErrNoMarks) {
		return nil, err
	}
	for i := range all {
		b := &all[i]
		if b.Front, err = inFront(kernel, *b); err != nil {
			return nil, err
		}
		b.NoRoute = b.OnLoss == uplink.Block && blocked(kernel, *b)
		if b.Ifname = marked[b.Priority]; b.Ifname != "" {
			continue
		}
		for _, a := range addresses {
			if table := sources[a.Addr]; table != 0 && slices.Contains(b.Tables[familyOf(a)], table) {
				b.Ifname = links[a.Index].Name
			}
		}
		if b.Ifname == "" { // its link is gone
			if b.Ifname, err = asked.InterfaceAt(context.Background(), b.Priority); err != nil && !errors.Is(err, peer.ErrNoServer) && !errors.Is(err, peer.ErrNoMarks) {
				return nil, err
			}
		}
	}
	for i := range all {
		if b := &all[i]; b.locked() {
			if b.Subflows, err = subflows(kernel, b.Ifname); err != nil {
				return nil, err
			}
		}
	}
	slices.SortFunc(all, func(x, y Bound) int {
		return cmp.Or(cmp.Compare(x.Ifname, y.Ifname), cmp.Compare(x.Priority, y.Priority), cmp.Compare(x.Traffic.String(), y.Traffic.String()))
	})
	return all, nil
}

// locked reports whether the traffic is that of programs which leave as the lock allows.
func (b Bound) locked() bool {
	return b.OnLoss == uplink.Block && b.Traffic.Mask != 0 && b.Traffic.Iif == ""
}

func familyOf(a route.Address) wire.Family {
	if a.Addr.Is4() {
		return wire.Inet
	}
	return wire.Inet6
}

// boundIn reads the guards and lookups of both families, and which tables the rules from addresses lead to.
func boundIn(kernel *route.Conn) (all []Bound, sources map[netip.Addr]uint32, err error) {
	type id struct {
		traffic  route.Traffic
		priority uint32
	}
	at := make(map[id]int)
	find := func(t route.Traffic, priority uint32) *Bound {
		key := id{t, priority}
		if _, ok := at[key]; !ok {
			at[key] = len(all)
			all = append(all, Bound{Traffic: t, Priority: priority, OnLoss: uplink.Block, Tables: make(map[wire.Family][]uint32)})
		}
		return &all[at[key]]
	}
	sources = make(map[netip.Addr]uint32)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := kernel.Rules(family)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range rules {
			switch {
			case uplink.IsGuard(r):
				b := find(r.Traffic, r.Priority-1)
				b.Guarded = append(b.Guarded, wire.Family(family))
				if r.Action == route.Nop {
					b.OnLoss = uplink.Fallback
				}
			case uplink.IsLookup(r):
				b := find(r.Traffic, r.Priority)
				b.Tables[wire.Family(family)] = append(b.Tables[wire.Family(family)], r.Table)
			case uplink.IsOwnLookup(r):
			case uplink.IsHost(r) && !uplink.LeavesTable(r) && r.Flags == 0:
				sources[r.Src.Addr()] = r.Table
			}
		}
	}
	return all, sources, nil
}

// Remove unbinds the traffic that Bind has bound with the same cfg.
func Remove(cfg Config) error {
	all, err := List(cfg.Server, cfg.ServerUIDs, cfg.Ifname)
	if err != nil {
		return err
	}
	for _, t := range cfg.Traffic {
		bound := slices.DeleteFunc(slices.Clone(all), func(b Bound) bool {
			return b.Ifname != cfg.Ifname || b.OnLoss != cfg.OnLoss || b.Traffic != t
		})
		if len(bound) == 0 {
			return fmt.Errorf("%s is not bound to %s", t, cfg.Ifname)
		}
		if err := Unbind(bound); err != nil {
			return err
		}
	}
	return nil
}

// Unbind deletes the rules of what List has listed: guards first, since holders restore lookups while there are guards.
// What comes from a network namespace stays bound: its guard goes with the namespace, and without it packets could leave by
// any uplink.
func Unbind(bound []Bound) error {
	bound = slices.DeleteFunc(slices.Clone(bound), func(b Bound) bool { return b.Traffic.Iif != "" })
	kernel, err := route.Dial()
	if err != nil {
		return err
	}
	defer kernel.Close()
	var errs []error
	for _, what := range []func(route.Rule) bool{uplink.IsGuard, uplink.IsLookup, uplink.IsOwnLookup, uplink.IsLocal, uplink.IsForeign} {
		ours := func(r route.Rule) bool {
			return what(r) && slices.ContainsFunc(bound, func(b Bound) bool {
				return r.Traffic == b.Traffic && b.owns(r)
			})
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			if _, _, err := kernel.SyncRules(family, ours, nil); err != nil {
				errs = append(errs, fmt.Errorf("unbind: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// owns reports whether a rule for the traffic of b was made for b.
func (b Bound) owns(r route.Rule) bool {
	switch {
	case uplink.IsLookup(r):
		return r.Priority == b.Priority
	case uplink.IsGuard(r):
		return r.Priority == b.Priority+1
	case uplink.IsForeign(r):
		return r.Priority == b.Priority-1
	}
	return b.OnLoss == uplink.Block // own lookups, and rules to local networks
}

// UnbindAll detaches every process and removes every rule of a binding.
func UnbindAll(server string, uids []uint32) error {
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	errs := []error{cgroups.Free()}
	pinned, err := cgroup.Pinned()
	errs = append(errs, err)
	for _, uplink := range pinned {
		errs = append(errs, cgroup.Unpin(uplink))
	}
	all, err := List(server, uids)
	return errors.Join(append(errs, err, Unbind(all), cgroup.RemoveLock())...)
}
