package main

import (
	"slices"

	"github.com/table-allocator/table-allocator/internal/bind"
)

const boundUsage = `Usage: table-allocator-client bound [IFNAME] [options]

Shows which processes, users and ports are bound to which link, and the tables
that their traffic uses. The exit code is 1 if something is missing. Needs root.

  -i, --ifname IFNAME       show this link only
      --json                print JSON
`

func bound(f *flags) action {
	var ifname string
	f.link(&ifname)
	asJSON := f.Bool("json", false, "")
	return func(args []string) error {
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
		f.debug("%d cgroups and kinds of traffic", len(rows))
		missing := slices.ContainsFunc(rows, func(r bind.Row) bool { return r.Missing != "" })
		return show(rows, *asJSON, missing, printBound)
	}
}
