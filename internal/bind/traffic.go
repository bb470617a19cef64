// Package bind binds traffic to an interface: what processes, users or ports send leaves by that interface alone.
// It hides which rules that takes, and how the holders of the interface's leases are asked to place theirs.
package bind

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/lock"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Config says what is to be bound to which interface.
type Config struct {
	Ifname     string
	OnLoss     uplink.OnLoss   // Block: traffic never leaves by another uplink; Fallback: it does if there is no route
	Traffic    []route.Traffic // none: what has the interface's mark
	Local      bool            // what has the mark reaches networks of the host that are behind no uplink
	Wait       time.Duration   // for the server and for a lease
	Marking    wire.Marking    // of the interface, if it is known already: the server is not asked
	Server     string
	ServerUIDs []uint32
}

// Binding is how traffic is bound to an interface.
type Binding struct {
	Ifname      string
	OnLoss      uplink.OnLoss
	Marking     wire.Marking
	Traffic     []route.Traffic
	Tables      map[wire.Family][]uint32 // that all of the traffic is sent to, in order
	Overlapping []route.Rule             // rules of other programs that look at the mask's bits
	Unanswered  []string                 // addresses whose holders do not serve it, and why
	InFront     string                   // that a rule of another program takes the traffic before, and which; empty: none does
	Subflows    string                   // where the kernel takes subflows of MPTCP that leave by another uplink; empty: nowhere
	Fresh       []Bound                  // what was bound by no guard before
	Unkept      bool                     // no client runs that would open the lock for a link that is plugged in again
}

// Mark is the mark, within Marking.Mask, of sockets that are bound.
func (b Binding) Mark() uint32 { return uplink.MarkFor(b.Marking, b.OnLoss) }

// ErrNoLease says that no address of the interface has a lease now. What is bound stays bound: with Block it is blocked
// until there is a lease.
var ErrNoLease = errors.New("no address of it has a lease")

const (
	again         = 250 * time.Millisecond // between looks for a lease without an event
	patience      = 2 * time.Second        // for all holders together
	servePatience = time.Second            // for one holder, which may have a thousand rules to add
	swarm         = 20 * time.Millisecond  // in which events that belong together come
)

// Bind binds traffic to an interface. It adds guards in both families, then the holders of the interface's leases add
// lookups. It is safe to repeat. After ErrNoLease the Binding lacks only its tables.
func Bind(ctx context.Context, cfg Config) (Binding, error) {
	b, err := once(ctx, cfg)
	if cfg.Wait > 0 && mayCome(err) {
		fresh := b.Fresh
		b, err = await(ctx, cfg)
		b.Fresh = append(fresh, b.Fresh...)
	}
	if err != nil {
		return b, fmt.Errorf("bind to %s: %w", cfg.Ifname, err)
	}
	return b, nil
}

// await tries again after each event that may come with a lease, and every 250 ms.
func await(ctx context.Context, cfg Config) (Binding, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.Wait)
	defer cancel()
	w, err := route.Watch(route.Links | route.Addresses4 | route.Addresses6 | route.Rules4 | route.Rules6)
	if err != nil {
		return Binding{}, err
	}
	defer w.Close()
	for {
		b, err := once(ctx, cfg)
		if !mayCome(err) || ctx.Err() != nil {
			return b, err
		}
		if err := awaitEvents(w); err != nil {
			return b, err
		}
	}
}

// mayCome reports whether what Bind lacks may come.
func mayCome(err error) bool { return errors.Is(err, ErrNoLease) || errors.Is(err, peer.ErrNoServer) }

// awaitEvents waits for an event, for 250 ms at most, and then for others, since several come together, also of what
// a try changes.
func awaitEvents(w *route.Watcher) error {
	err := w.SetDeadline(time.Now().Add(again))
	for heard := false; err == nil; heard = true {
		if _, err = w.Next(); err == nil && !heard {
			err = w.SetDeadline(time.Now().Add(swarm))
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

func once(ctx context.Context, cfg Config) (b Binding, err error) {
	kernel, err := route.Dial()
	if err != nil {
		return b, err
	}
	defer kernel.Close()
	if err := kernel.KeepRules(); err != nil {
		return b, err
	}
	link, found, err := kernel.LinkByName(cfg.Ifname)
	if err != nil {
		return b, err
	}
	b = Binding{Ifname: cfg.Ifname, OnLoss: cfg.OnLoss, Traffic: cfg.Traffic, Tables: make(map[wire.Family][]uint32)}
	if found { // cfg may have an alternative name
		b.Ifname = link.Name
	}
	conn, err := peer.Open(wire.Key{Ifname: b.Ifname, Address: "bind"}, peer.AsAsker)
	if err != nil {
		return b, err
	}
	defer conn.Close()
	if b.Marking = cfg.Marking; b.Marking == (wire.Marking{}) {
		if b.Marking, err = marking(ctx, conn, cfg, b.Ifname); err != nil {
			return b, err
		}
	}
	if len(b.Traffic) == 0 {
		b.Traffic = []route.Traffic{{Mark: b.Mark(), Mask: b.Marking.Mask}}
	}
	if err := b.lock(kernel, cfg.Local); err != nil {
		return b, err
	}
	if err := b.placeGuards(kernel); err != nil {
		return b, errors.Join(err, Unbind(b.Fresh))
	}
	if found {
		if err := b.askHolders(ctx, kernel, conn, link); err != nil {
			return b, err
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		if err := lock.KeepForeign(kernel, family, b.Marking, b.Ifname); err != nil {
			return b, err
		}
	}
	if b.Unkept, err = b.unkept(); err != nil {
		return b, err
	}
	if err := b.findTables(kernel); err != nil {
		return b, err
	}
	for _, t := range b.Traffic {
		front, err := inFront(kernel, Bound{Traffic: t, Tables: b.Tables, Priority: uplink.GuardOf(b.Marking, t, b.OnLoss).Priority - 1})
		if err != nil {
			return b, err
		}
		b.InFront = cmp.Or(b.InFront, front.missing(t, b.OnLoss))
	}
	if b.locked() {
		if b.Subflows, err = subflows(kernel, b.Ifname); err != nil {
			return b, err
		}
	}
	if len(b.Tables) == 0 && !found {
		return b, fmt.Errorf("%w: there is no such interface", ErrNoLease)
	}
	if len(b.Tables) == 0 {
		return b, ErrNoLease
	}
	return b, nil
}

// MarkingOf asks the server for the marking of the interface of a Config, for its Marking. Without that Bind asks.
func MarkingOf(ctx context.Context, cfg Config) (wire.Marking, error) {
	conn, err := peer.Open(wire.Key{Ifname: cfg.Ifname, Address: "bind"}, peer.AsAsker)
	if err != nil {
		return wire.Marking{}, err
	}
	defer conn.Close()
	return marking(ctx, conn, cfg, cfg.Ifname)
}

func marking(ctx context.Context, conn *wire.Conn, cfg Config, ifname string) (wire.Marking, error) {
	server, err := peer.NewServer(cfg.Server, cfg.ServerUIDs)
	if err != nil {
		return wire.Marking{}, err
	}
	return server.Mark(ctx, conn, ifname, false)
}

// unkept reports whether traffic is bound that needs a holder to open the lock, and the interface has none.
func (b Binding) unkept() (bool, error) {
	if !b.locked() {
		return false, nil
	}
	names, err := peer.HolderNames()
	return !slices.ContainsFunc(names, func(name string) bool {
		rest, ours := strings.CutPrefix(name, b.Ifname+"-")
		addr, _, _ := strings.Cut(rest, "-")
		_, noAddress := netip.ParseAddr(addr) // an asker's name has something else there
		return ours && noAddress == nil
	}), err
}

// locked reports whether traffic is bound that leaves as the lock allows.
func (b Binding) locked() bool {
	return b.OnLoss == uplink.Block && slices.ContainsFunc(b.Traffic, func(t route.Traffic) bool { return t.Mask != 0 })
}

// lock lets sockets with the mark leave by the link, with its addresses, before anything is bound to it.
func (b Binding) lock(kernel *route.Conn, local bool) error {
	if !b.locked() {
		return nil
	}
	return lock.Make(kernel, b.Marking, b.Ifname, local)
}

// placeGuards adds the guards. A kernel without IPv6 needs none for it.
func (b *Binding) placeGuards(kernel *route.Conn) error {
	if slices.Contains(b.Traffic, route.Traffic{}) {
		return errors.New("all traffic cannot be bound")
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		added, _, err := kernel.SyncRules(family, noRule, b.guards())
		for _, guard := range added {
			b.Fresh = append(b.Fresh, Bound{Traffic: guard.Traffic, OnLoss: b.OnLoss, Priority: guard.Priority - 1})
		}
		if err != nil && !(family == unix.AF_INET6 && errors.Is(err, unix.EAFNOSUPPORT)) {
			return err
		}
	}
	return nil
}

func (b Binding) guards() (guards []route.Rule) {
	for _, t := range b.Traffic {
		guards = append(guards, uplink.GuardOf(b.Marking, t, b.OnLoss))
	}
	return guards
}

func noRule(route.Rule) bool { return false }

// askHolders has the holders of the link's addresses add lookups that are missing, and adds those of holders that
// cannot.
func (b *Binding) askHolders(ctx context.Context, kernel *route.Conn, conn *wire.Conn, link route.Link) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	addresses, err := kernel.AddressesOn(unix.AF_UNSPEC, link.Index)
	if err != nil {
		return err
	}
	asked, lookAt := 0, 0
	var lookups func(uplink.Uplink) ([]route.Rule, bool)
	every := uplink.Selection{Profiles: []uplink.Profile{uplink.DefaultProfile()}}
	for _, a := range addresses {
		u, ok := every.Uplink(a, link.Name)
		if !ok {
			continue
		}
		if asked == lookAt { // a watch that was asked for one address serves the others, too
			if lookups, err = b.lookups(kernel); err != nil {
				return err
			}
			lookAt = max(1, 2*asked)
		}
		missing, leased := lookups(u)
		if leased && len(missing) == 0 {
			continue
		}
		asked++
		serves, err := b.askHolder(ctx, conn, u, leased)
		if err == nil && !serves {
			_, _, err = kernel.SyncRules(u.Family(), noRule, missing)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// askHolder asks the holder of an address to serve bound traffic. It reports false if the holder cannot, and
// the address has a lease.
func (b *Binding) askHolder(ctx context.Context, conn *wire.Conn, u uplink.Uplink, leased bool) (serves bool, err error) {
	reply, err := peer.Ask(ctx, conn, wire.Request{Key: u.Key, Cmd: wire.Query, Marking: b.Marking}, servePatience)
	// Else a version that knows no bindings, the original, or somebody who took the name.
	why := "its client knows no bindings, so its lookups are not kept"
	switch {
	case errors.Is(err, syscall.ECONNREFUSED): // there is no holder
		return true, nil
	case err == nil && reply.Marking == b.Marking:
		if why = reply.Missing; why == "" {
			return true, nil
		}
	case err == nil && reply.Code == wire.Denied:
		return false, peer.ErrNotAsked
	case err == nil && reply.Code != "", !leased: // the holder ends, or there is nothing to serve yet
		return true, nil
	case err != nil:
		why = err.Error()
	}
	b.Unanswered = append(b.Unanswered, fmt.Sprintf("%s: %s", u, why))
	return reply.Marking == b.Marking, nil
}

// lookups returns a function that says which lookups are missing for an address, and whether the address has a rule to
// a table, which those have to lead to.
func (b *Binding) lookups(kernel *route.Conn) (func(uplink.Uplink) (missing []route.Rule, leased bool), error) {
	all, sources, err := boundIn(kernel)
	if err != nil {
		return nil, err
	}
	return func(u uplink.Uplink) (missing []route.Rule, leased bool) {
		table, leased := sources[u.Addr()]
		for _, t := range b.Traffic {
			lookup := uplink.LookupOf(uplink.GuardOf(b.Marking, t, b.OnLoss), table)
			there := func(o Bound) bool {
				return o.Traffic == t && o.Priority == lookup.Priority && slices.Contains(o.Tables[u.Key.Family], table)
			}
			if leased && !slices.ContainsFunc(all, there) {
				missing = append(missing, lookup)
			}
		}
		return missing, leased
	}, nil
}

// findTables finds the tables that all of the traffic is sent to.
func (b *Binding) findTables(kernel *route.Conn) error {
	b.Overlapping = nil
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := kernel.Rules(family)
		if err != nil {
			return err
		}
		b.Overlapping = append(b.Overlapping, route.Overlapping(rules, b.Marking.Mask)...)
		guard := uplink.GuardOf(b.Marking, b.Traffic[0], b.OnLoss)
		for _, r := range rules {
			missing := func(t route.Traffic) bool {
				return !slices.Contains(rules, uplink.LookupOf(uplink.GuardOf(b.Marking, t, b.OnLoss), r.Table))
			}
			if r == uplink.LookupOf(guard, r.Table) && !slices.ContainsFunc(b.Traffic, missing) {
				b.Tables[wire.Family(family)] = append(b.Tables[wire.Family(family)], r.Table)
			}
		}
	}
	return nil
}
