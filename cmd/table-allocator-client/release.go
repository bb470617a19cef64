package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const releaseUsage = `Usage: table-allocator-client release IFNAME|ADDR... [options]
       table-allocator-client release --all [options]

Ends the holders of the leases of links or addresses, deletes their rules,
routes and resolver lines, and releases the leases. With --all those of this
network namespace; a watch gets SIGTERM, and one that systemd would start again
has to be stopped first. While programs are bound to a link that loses its last
lease, they are listed, and nothing is released. Needs root.

  -i, --ifname IFNAME...    links, also as arguments
      --all                 everything in this network namespace
      --force               unbind programs, too; those that were bound with
                            block can send nothing until they end
`

// releaseFlags are the options of release, and what it finds.
type releaseFlags struct {
	*flags
	names      []string // links and addresses
	all, force bool
	log        *slog.Logger
	held       []peer.Holder // that are to be released
	kept       []peer.Holder // the others
	watches    []peer.Watch
	rules      []bind.Bound // bound traffic and processes
}

func release(f *flags) action {
	r := &releaseFlags{flags: f}
	f.StringSliceVarP(&r.names, "ifname", "i", nil, "")
	f.BoolVar(&r.all, "all", false, "")
	f.BoolVar(&r.force, "force", false, "")
	return func(args []string) error {
		r.names = withLinkNames(append(r.names, args...))
		if err := r.check(); err != nil {
			return wrongUsage(err)
		}
		if os.Geteuid() != 0 {
			return exitWith(2, errors.New("release needs root"))
		}
		var err error
		if r.log, err = cli.NewLogger(f.log); err != nil {
			return err
		}
		return asked(r.release())
	}
}

func (r *releaseFlags) check() error {
	if r.all != (len(r.names) == 0) {
		return errors.New("links or addresses are needed, or --all alone")
	}
	for i, name := range r.names {
		if addr, err := netip.ParseAddr(name); err == nil {
			r.names[i] = addr.Unmap().String()
		} else if err := (cgroup.Uplink{Ifname: linkName(name)}).Check(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// named reports whether a key is to be released.
func (r *releaseFlags) named(key wire.Key) bool {
	return r.all || slices.Contains(r.names, key.Ifname) || slices.Contains(r.names, key.Address)
}

func (r *releaseFlags) release() error {
	if err := r.find(); err != nil {
		return err
	}
	if err := r.checkNames(); err != nil {
		return exitWith(2, err)
	}
	if err := r.checkUnits(); err != nil {
		return err
	}
	if err := r.checkBound(); err != nil {
		return err
	}
	errs := []error{r.endHolders()}
	if r.all {
		errs = append(errs, r.endWatches())
	}
	errs = append(errs, bind.Release(r.loses, r.rules))
	if r.all {
		errs = append(errs, client.Collect(r.server, r.uids, r.log), cgroup.RemoveLock())
	}
	if len(r.held) == 0 {
		fmt.Println("no lease was held; what was left of one is deleted")
	}
	return errors.Join(errs...)
}

// find finds holders, leftovers of holders that were killed, watches, and bound traffic.
func (r *releaseFlags) find() error {
	holders, err := peer.Holders(context.Background())
	if err != nil {
		return err
	}
	leftovers, err := client.Leftovers()
	if err != nil {
		return err
	}
	for _, key := range leftovers {
		if !slices.ContainsFunc(holders, func(h peer.Holder) bool { return h.Key == key }) {
			holders = append(holders, peer.Holder{Key: key})
		}
	}
	for _, h := range holders {
		if r.named(h.Key) {
			r.held = append(r.held, h)
		} else {
			r.kept = append(r.kept, h)
		}
	}
	if r.watches, err = peer.Watches(); err != nil {
		return err
	}
	r.rules, err = bind.List(r.server, r.uids, r.names...)
	return err
}

// checkNames refuses a name that no link has, and an address that no link and no holder has.
func (r *releaseFlags) checkNames() error {
	links, addresses, err := route.HostAddresses()
	if err != nil {
		return err
	}
	for _, name := range r.names {
		known := linkName(name) != name || slices.ContainsFunc(r.held, func(h peer.Holder) bool { return h.Key.Ifname == name || h.Key.Address == name }) ||
			slices.ContainsFunc(r.rules, func(b bind.Bound) bool { return b.Ifname == name })
		for _, link := range links {
			known = known || link.Name == name
		}
		for _, a := range addresses {
			known = known || a.Addr.String() == name
		}
		if !known {
			return fmt.Errorf("%s: no link, no address and no lease has this name", name)
		}
	}
	return nil
}

// checkUnits refuses to end a watch that would be started again.
func (r *releaseFlags) checkUnits() error {
	for _, w := range r.watches {
		if r.all && w.Unit != "" {
			return fmt.Errorf("the watch (pid %d) is a unit of systemd, which would start it again: systemctl disable --now %s", w.PID, w.Unit)
		}
	}
	return nil
}

// loses reports whether a link has no lease any more afterwards.
func (r *releaseFlags) loses(ifname string) bool {
	if r.all {
		return true
	}
	on := func(h peer.Holder) bool { return h.Key.Ifname == ifname }
	return !slices.ContainsFunc(r.kept, on) && (slices.ContainsFunc(r.held, on) || slices.Contains(r.names, ifname))
}

// checkBound lists programs and traffic that are bound to links that lose their last lease.
func (r *releaseFlags) checkBound() error {
	rows, err := bind.Rows(r.server, r.uids)
	if err != nil {
		return err
	}
	rows = slices.DeleteFunc(rows, func(row bind.Row) bool {
		return !r.loses(row.Ifname) || row.Traffic == "" && len(row.Processes) == 0
	})
	if len(rows) == 0 || r.force {
		return nil
	}
	if err := errors.Join(nameNamespaces(r.flags, rows), printBound(os.Stdout, rows, false)); err != nil {
		return err
	}
	return exitWith(1, errors.New("nothing is released, since these programs and rules are bound to links that would have no lease any more: detach, unbind or end them, delete namespaces by netns del, or --force"))
}

// endHolders ends holders, and deletes what those left that were killed.
func (r *releaseFlags) endHolders() error {
	var errs []error
	watched := make(map[int]bool) // pids of watches that go on
	for _, h := range r.held {
		u := uplink.Uplink{Key: h.Key, Priorities: uplink.OriginalPriorities, Settings: uplink.Settings{Routes: uplink.NoRoutes,
			OnLoss: uplink.Fallback, ServersFile: uplink.DefaultServersFile}}
		if u.IsAddress() {
			u.Network = u.Host()
		}
		err := client.Release(client.Config{Uplink: u, Server: r.server, ServerUIDs: r.uids}, r.log)
		if errors.Is(err, peer.ErrNoServer) { // the lease ends by itself, and nobody can lease its table before
			err = nil
		}
		what := fmt.Sprintf("%s on %s: ", h.Key.Address, h.Key.Ifname)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s%w", what, err))
			continue
		case h.Silent:
			errs = append(errs, fmt.Errorf("%sits holder does not answer, and may restore its rules: end that process", what))
			continue
		case h.Reply.PID == 0:
			what += "what was left of it is deleted"
		case slices.ContainsFunc(r.watches, func(w peer.Watch) bool { return w.PID == h.Reply.PID }):
			what += fmt.Sprintf("the watch (pid %d) serves it no more", h.Reply.PID)
			watched[h.Reply.PID] = !r.all
		default:
			what += fmt.Sprintf("its holder (pid %d) ended", h.Reply.PID)
		}
		if h.Reply.Table != 0 {
			what += fmt.Sprintf(", table %d is released", h.Reply.Table)
		}
		fmt.Println(quoted(what))
	}
	for pid, goesOn := range watched {
		if goesOn {
			warn(fmt.Sprintf("the watch (pid %d) goes on, and serves these addresses again when they are added again, or at its next start; to prevent that name the link in \"exclude\" of its configuration", pid))
		}
	}
	return errors.Join(errs...)
}

// endWatches ends the watches, and waits for their end.
func (r *releaseFlags) endWatches() error {
	const patience, every = 10 * time.Second, 20 * time.Millisecond
	for _, w := range r.watches {
		if w.PID == 0 {
			return errors.New("a watch runs whose process cannot be seen: end it yourself")
		}
		if err := syscall.Kill(w.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end the watch (pid %d): %w", w.PID, err)
		}
		fmt.Printf("the watch (pid %d) is ended\n", w.PID)
	}
	for until := time.Now().Add(patience); len(r.watches) > 0; time.Sleep(every) {
		left, err := peer.Watches()
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(until) {
			var pids []string
			for _, w := range left {
				pids = append(pids, fmt.Sprint(w.PID))
			}
			return fmt.Errorf("these watches do not end: %s", strings.Join(pids, " "))
		}
	}
	return nil
}
