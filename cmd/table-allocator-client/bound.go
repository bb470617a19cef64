package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/netns"
	"github.com/table-allocator/table-allocator/internal/outside"
)

const boundUsage = `Usage: table-allocator-client bound [IFNAME] [options]
       table-allocator-client bound --check PID...

Shows which processes, users and ports are bound to which link, and the tables
that their traffic uses. The exit code is 1 if something is missing. Needs root.

  -i, --ifname IFNAME       show this link only
      --json                print JSON
      --check               what holds processes, and all that descend from them
`

func bound(f *flags) action {
	var ifname string
	f.link(&ifname)
	asJSON := f.Bool("json", false, "")
	check := f.Bool("check", false, "")
	return func(args []string) error {
		if *check {
			return checkBound(f, args)
		}
		args, err := f.takeLink(&ifname, args)
		if err != nil {
			return err
		}
		if err := noArguments(args); err != nil {
			return err
		}
		if err := f.needsRoot(); err != nil {
			return err
		}
		rows, err := bind.Rows(f.server, f.uids)
		if err != nil {
			return err
		}
		rows = slices.DeleteFunc(rows, func(r bind.Row) bool { return ifname != "" && r.Ifname != ifname })
		if err := nameNamespaces(f, rows); err != nil {
			return err
		}
		f.debug("%d cgroups and kinds of traffic", len(rows))
		missing := slices.ContainsFunc(rows, func(r bind.Row) bool { return r.Missing != "" })
		return show(rows, *asJSON, missing, printBound)
	}
}

// nameNamespaces says of links to namespaces whose they are, and which processes are in these.
func nameNamespaces(f *flags, rows []bind.Row) error {
	names, err := netns.Names()
	if errors.Is(err, outside.ErrSilent) {
		warn(fmt.Errorf("network namespaces are not known: %w", err))
		return nil
	}
	if err != nil || len(names) == 0 {
		return err
	}
	host, err := netns.Open(f.server, f.uids)
	if err != nil {
		return err
	}
	defer host.Close()
	programs, err := host.Programs("")
	for i := range rows {
		name := names[rows[i].Traffic]
		if name == "" {
			continue
		}
		rows[i].Traffic += " (namespace " + name + ")"
		for _, p := range programs {
			if p.Namespace == name {
				rows[i].Processes = append(rows[i].Processes, bind.Process{PID: p.PID, Name: p.Command})
			}
		}
	}
	return err
}

// checkBound prints what holds processes. The exit code is 1 if one of them is not held.
func checkBound(f *flags, args []string) error {
	pids, err := parsePIDs(args)
	if err != nil {
		return err
	}
	if err := f.needsRoot(); err != nil {
		return err
	}
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	all, err := cgroups.Check(pids)
	missing := false
	for _, h := range all {
		link := h.Ifname
		switch {
		case link == "" && h.Why == "":
			link = "bound by its unit"
		case h.Fallback:
			link += " fallback"
		case link != "":
			link += " block"
		}
		fmt.Printf("%d (%s): %s\n", h.PID, quoted(h.Name), quoted(joinWords(link, h.Why)))
		missing = missing || h.Why != ""
	}
	if err == nil && missing {
		return errMissing
	}
	return err
}

// joinWords puts a comma between two texts, of which one may be empty.
func joinWords(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + ", " + b
}
