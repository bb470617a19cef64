package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const boundUsage = `Usage: table-allocator-client bound [--json] [options]

Shows the processes, users and ports that are bound to a link, and whether the
link has a lease for them. Exit code 1 if one has not. Needs root.

      --json              for programs
  -d, --destination NAME  socket of the server (tas_socket)
      --server-user USER  believe a server of this user, too (repeatable)
  -h, --help              print this and exit
`

// boundRow is one cgroup, or one kind of traffic, that is bound.
type boundRow struct {
	Ifname    string         `json:"ifname"`
	OnLoss    uplink.OnLoss  `json:"on_loss"`
	Tables    []uint32       `json:"tables"` // that it is sent to, of both families; none: blocked, or free to leave anywhere
	Cgroup    string         `json:"cgroup,omitempty"`
	Processes []boundProcess `json:"processes,omitempty"`
	Traffic   string         `json:"traffic,omitempty"` // as ip rule has it, where it is no cgroup's
	Missing   string         `json:"missing,omitempty"` // empty: all is as it should be
}

type boundProcess struct {
	PID  int    `json:"pid"`
	Name string `json:"name"`
}

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
	rows, err := boundRows(server, uids)
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

// boundRows joins what cgroups say to what rules say.
func boundRows(server string, uids []uint32) ([]boundRow, error) {
	cgroups, err := cgroup.Open()
	if err != nil {
		return nil, err
	}
	defer cgroups.Close()
	processes, err := cgroups.Bound()
	if err != nil {
		return nil, err
	}
	var ifnames []string // whose links may be gone
	for _, p := range processes {
		if p.Ifname != "" && !slices.Contains(ifnames, p.Ifname) {
			ifnames = append(ifnames, p.Ifname)
		}
	}
	rules, err := client.Bindings(server, uids, ifnames...)
	if err != nil {
		return nil, err
	}
	rows := []boundRow{}
	for _, p := range processes {
		row := boundRow{Ifname: p.Ifname, OnLoss: uplink.Block, Cgroup: p.Cgroup}
		at := slices.IndexFunc(rules, func(b client.Bound) bool {
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
		for _, pid := range p.PIDs {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			if err == nil { // else it has ended
				row.Processes = append(row.Processes, boundProcess{pid, strings.TrimSuffix(string(name), "\n")})
			}
		}
		rows = append(rows, row)
	}
	for _, b := range rules {
		if b.Traffic.Mask == 0 {
			row := boundRow{Traffic: b.Traffic.String()}
			row.take(b)
			rows = append(rows, row)
		}
	}
	slices.SortStableFunc(rows, func(a, b boundRow) int {
		return cmp.Or(cmp.Compare(a.Ifname, b.Ifname), cmp.Compare(a.OnLoss, b.OnLoss))
	})
	return rows, nil
}

// take fills in what the rules say.
func (r *boundRow) take(b client.Bound) {
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
	}
}
