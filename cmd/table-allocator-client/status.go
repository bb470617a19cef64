package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/table-allocator/table-allocator/internal/inspect"
)

const statusUsage = `Usage: table-allocator-client status [options] [IFNAME...]

Shows the server, where unbound traffic leaves, and table, lease, holder and
state of each address of the host. The kernel is asked where packets from each
address leave. The exit code is 0 if all is well, 1 if something is wrong, 2
for wrong usage or without rights. Needs root.

  -i, --ifname PATTERN...   links to show (*), also as arguments
      --exclude PATTERN...  links to leave out (lo)
  -4 | -6                   IPv4 only, or IPv6 only
  -c, --config FILE         the configuration of the watch
      --no-legend           neither titles nor the lines about the server
      --json                print JSON
`

func status(f *flags) action {
	h := newHostFlags(f)
	family := f.family()
	asJSON := f.Bool("json", false, "")
	noLegend := f.Bool("no-legend", false, "")
	return func(args []string) error {
		q := inspect.Question{Ifnames: h.ifnames, Server: f.server, UIDs: f.uids}
		if len(args) > 0 {
			q.Ifnames, h.ifnames = args, args
		}
		var err error
		if q.Family, err = family(); err != nil {
			return wrongUsage(err)
		}
		if err := h.complete(); err != nil {
			return err
		}
		cfg, err := h.load()
		if err != nil {
			return err
		}
		q.Selection = cfg.Selection
		report, err := inspect.Status(context.Background(), q)
		if errors.Is(err, inspect.ErrNoLink) || errors.Is(err, inspect.ErrNotAsked) {
			err = exitWith(2, err)
		}
		if err != nil {
			return err
		}
		f.debug("%d addresses", len(report.Uplinks))
		if *asJSON {
			err = json.NewEncoder(os.Stdout).Encode(report)
		} else {
			err = printStatus(os.Stdout, report, !*noLegend, width(os.Stdout))
		}
		if err == nil && report.IsFault() {
			err = errMissing
		}
		return err
	}
}
