package main

import (
	"context"
	"slices"

	"github.com/table-allocator/table-allocator/internal/inspect"
)

const statusUsage = `Usage: table-allocator-client status [options]

Shows table, lease, gateway and holder of each address of the host, and what is
missing. The exit code is 1 if something is missing. Needs root.

  -i, --ifname PATTERN...   links to show (*)
      --exclude PATTERN...  links to leave out (lo, docker*, br-*, veth*, ...)
  -c, --config FILE         the configuration of the watch
      --json                print JSON
`

func status(f *flags) action {
	h := newHostFlags(f)
	asJSON := f.Bool("json", false, "")
	return func(args []string) error {
		if err := noArguments(args); err != nil {
			return err
		}
		if err := h.complete(); err != nil {
			return err
		}
		cfg, err := h.load()
		if err != nil {
			return err
		}
		rows, err := inspect.Status(context.Background(), cfg.Selection)
		if err != nil {
			return err
		}
		f.debug("%d addresses", len(rows))
		missing := slices.ContainsFunc(rows, func(r inspect.Row) bool { return r.Missing != "" })
		return show(rows, *asJSON, missing, printRows)
	}
}
