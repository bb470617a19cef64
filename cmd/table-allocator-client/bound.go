package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cli"
)

const boundUsage = `Usage: table-allocator-client bound [--json] [options]

Shows the processes, users and ports that are bound to a link, and whether the
link has a lease for them. Exit code 1 if one has not. Needs root.

      --json              for programs
  -d, --destination NAME  socket of the server (tas_socket)
      --server-user USER  believe a server of this user, too (repeatable)
  -h, --help              print this and exit
`

func runBound(args []string) int {
	var (
		flags  = pflag.NewFlagSet("bound", pflag.ContinueOnError)
		server string
		users  []string
		asJSON bool
	)
	flags.Usage = func() {}
	flags.BoolVar(&asJSON, "json", false, "")
	flags.StringVarP(&server, "destination", "d", defaultServer, "")
	flags.StringArrayVar(&users, "server-user", nil, "")
	err := flags.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		fmt.Print(boundUsage)
		return cli.ExitOK
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	var uids []uint32
	for _, name := range users {
		uid, parseErr := parseUser(name)
		if parseErr != nil {
			err = errors.Join(err, fmt.Errorf("--server-user %s: %w", name, parseErr))
		}
		uids = append(uids, uid)
	}
	if err != nil {
		return failed(fmt.Errorf("%w (see bound --help)", err))
	}
	if err := needsRoot("bound"); err != nil {
		return failed(err)
	}
	rows, err := bind.Rows(server, uids)
	if err != nil {
		return failed(err)
	}
	if asJSON {
		err = json.NewEncoder(os.Stdout).Encode(rows)
	} else {
		err = printBound(os.Stdout, rows, isTerminal(os.Stdout))
	}
	if err != nil {
		return failed(err)
	}
	for _, row := range rows {
		if row.Missing != "" {
			return cli.ExitError
		}
	}
	return cli.ExitOK
}
