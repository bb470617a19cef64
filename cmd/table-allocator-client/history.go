package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/inspect"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

const historyUsage = `Usage: table-allocator-client history [IFNAME|ADDR...] [options]

Shows what happened to the addresses of this host since its boot, and how they
stand now: which got a table, lost their route and got it back, whose rules
were deleted, when the server was away. Holders and watches note that in
/run/table-allocator/events, which keeps some 4,000 events. Needs root.

  -i, --ifname IFNAME...    links to show, also as arguments
      --json                print one JSON object for each event
`

func history(f *flags) action {
	var names []string
	f.StringSliceVarP(&names, "ifname", "i", nil, "")
	asJSON := f.Bool("json", false, "")
	return func(args []string) error {
		names = withLinkNames(append(names, args...))
		for i, name := range names {
			names[i] = asHeld(name)
		}
		const limit = 5 * time.Second
		all, err := outside.Ask("history", limit, events.Read)
		if errors.Is(err, fs.ErrPermission) {
			return exitWith(2, fmt.Errorf("history needs root: %w", err))
		}
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(e events.Event) bool { return !concerns(e, names) })
		unknown := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return isKnown(name, all, nil) })
		if *asJSON && len(unknown) == 0 {
			return printEvents(os.Stdout, all)
		}
		q := inspect.Question{Selection: everyLink(), Ifnames: []string{"*"}, Server: f.server, UIDs: f.uids}
		report, err := inspect.Status(context.Background(), q)
		if err != nil {
			return asked(err)
		}
		rows := slices.Concat(report.Uplinks, report.Others)
		for _, name := range unknown {
			if !isKnown(name, all, rows) {
				return exitWith(2, fmt.Errorf("%s: no link, no address, no lease and no event has this name", name))
			}
		}
		if *asJSON {
			return printEvents(os.Stdout, all)
		}
		rows = slices.DeleteFunc(rows, func(r inspect.Row) bool {
			return r.Table == 0 && len(r.Findings) == 0 || !concerns(events.Event{Ifname: r.Ifname, Address: r.Address}, names)
		})
		return printHistory(os.Stdout, all, rows)
	}
}

// isKnown reports whether something has a name: a link, an address of the host, a row of status, or an event.
func isKnown(name string, all []events.Event, rows []inspect.Row) bool {
	_, err := net.InterfaceByName(name)
	return err == nil || linkName(name) != name || isOwnAddress(name) || slices.ContainsFunc(all, func(e events.Event) bool { return e.Ifname == name || e.Address == name }) ||
		slices.ContainsFunc(rows, func(r inspect.Row) bool { return r.Ifname == name || r.Address == name })
}

func isOwnAddress(name string) bool {
	addrs, _ := net.InterfaceAddrs() // without them, links and events are what is known
	return slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.String() == name
	})
}

// concerns reports whether an event is about one of names, or about all addresses; without names every event is.
func concerns(e events.Event, names []string) bool {
	return len(names) == 0 || e.Ifname == "" || slices.Contains(names, e.Ifname) || slices.Contains(names, e.Address)
}

func printEvents(out io.Writer, all []events.Event) error {
	encoder := json.NewEncoder(out)
	for _, e := range all {
		if err := encoder.Encode(printable(e)); err != nil {
			return err
		}
	}
	return nil
}

const moment = "2006-01-02 15:04:05"

// printHistory prints a line for each event, and one for each address as it stands now.
func printHistory(out io.Writer, all []events.Event, rows []inspect.Row) error {
	w := bufio.NewWriter(out)
	for _, e := range all {
		printEvent(w, e)
	}
	for _, r := range printable(rows) {
		text := r.Text()
		if r.Table != 0 {
			until := time.Now().Add(time.Duration(r.LeaseLeft) * time.Second)
			text = fmt.Sprintf("table %d, %s, lease until %s", r.Table, text, until.Format("15:04:05"))
		}
		fmt.Fprintf(w, "%-19s  %-8s  %s\n", "now", r.Ifname, r.Address+": "+text)
	}
	if len(all)+len(rows) == 0 {
		fmt.Fprintln(w, "no events, and no address is served")
	}
	return w.Flush()
}

func printEvent(w io.Writer, e events.Event) {
	e = printable(e)
	at := e.Time.Local().Format(moment)
	if e.Dropped > 0 {
		fmt.Fprintf(w, "%s  %-8s  %d events were dropped, since they could not be written in time\n", at, "-", e.Dropped)
	}
	text := e.Text
	if e.Address != "" {
		text = e.Address + ": " + text
	}
	fmt.Fprintf(w, "%s  %-8s  %s\n", at, orDefault(e.Ifname, "-"), text)
}

// followEvents prints each event from now on.
func followEvents(ctx context.Context, names []string, asJSON bool) error {
	err := events.Follow(ctx, func(e events.Event) error {
		if !concerns(e, names) {
			return nil
		}
		if asJSON {
			return printEvents(os.Stdout, []events.Event{e})
		}
		printEvent(os.Stdout, e)
		return nil
	}, func(err error) {
		warn(fmt.Errorf("%w; changes are printed when it answers", err))
	})
	if errors.Is(err, fs.ErrPermission) {
		return exitWith(2, fmt.Errorf("status --follow needs root: %w", err))
	}
	return err
}

// everyLink selects every link that may have a lease.
func everyLink() uplink.Selection {
	return uplink.Selection{Profiles: []uplink.Profile{uplink.DefaultProfile()}, Exclude: uplink.DefaultExclude}
}
