package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/inspect"
)

const statusUsage = `Usage: table-allocator-client status [--json] [options]

Shows table, lease, gateway and holder of each address of the host, and what is
missing. Exit code 1 if something is.

      --json                for programs
      --ifname PATTERN...   links to show (*)
      --exclude PATTERN...  links to leave out (lo, docker*, br-*, veth*, ...)
  -c, --config FILE         the configuration of the watch
`

func runStatus(args []string) int {
	o := newHostOptions("status")
	if err := o.parse(args); errors.Is(err, pflag.ErrHelp) {
		fmt.Print(statusUsage)
		return cli.ExitOK
	} else if err != nil {
		return fail(fmt.Errorf("%w (see status --help)", err))
	}
	cfg, err := o.load()
	if err != nil {
		return fail(err)
	}
	rows, err := inspect.Status(context.Background(), cfg.Selection)
	if err != nil {
		return fail(err)
	}
	if o.json {
		err = json.NewEncoder(os.Stdout).Encode(rows)
	} else {
		err = printRows(os.Stdout, rows, isTerminal(os.Stdout))
	}
	if err != nil {
		return fail(err)
	}
	for _, row := range rows {
		if row.Missing != "" {
			return cli.ExitError
		}
	}
	return cli.ExitOK
}
