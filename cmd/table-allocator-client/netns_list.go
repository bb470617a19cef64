package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/netns"
)

func (n *netnsFlags) list(h *netns.Host, args []string) error {
	if err := noArguments(args); err != nil {
		return err
	}
	rows, err := n.rows(h)
	if err != nil {
		return err
	}
	rows = printable(rows)
	if n.asJSON {
		err = json.NewEncoder(os.Stdout).Encode(map[string]any{"version": 1, "namespaces": rows})
	} else {
		err = printNamespaces(rows)
	}
	if err == nil && slices.ContainsFunc(rows, func(r netns.Row) bool { return r.Missing != "" }) {
		err = errMissing
	}
	return err
}

// rows are the namespaces; those that a user may enter are told by the service.
func (n *netnsFlags) rows(h *netns.Host) ([]netns.Row, error) {
	if h == nil {
		return netns.Mine(context.Background())
	}
	return h.List()
}

// programs are those in a namespace, or with "" in all; a user's own ones are told by the service.
func (n *netnsFlags) programs(h *netns.Host, name string) ([]netns.Program, error) {
	if h == nil {
		return netns.MyPrograms(context.Background(), name)
	}
	return h.Programs(name)
}

func printNamespaces(rows []netns.Row) error {
	const format = "%-15s %-15s %-8s %-12s %-9s %-12s %s\n"
	_, err := fmt.Printf(format, "NAME", "IFNAME", "ON-LOSS", "TABLES", "PROGRAMS", "RESOLV", "ADDRESSES")
	for _, r := range rows {
		link := r.Ifname
		if r.Pattern != "" {
			link += "," + r.Pattern // one word, for awk
		}
		tables := strings.Trim(strings.ReplaceAll(fmt.Sprint(r.Tables), " ", ","), "[]")
		_, lineErr := fmt.Printf(format, r.Name, link, r.OnLoss, orDefault(tables, "-"), fmt.Sprint(len(r.Programs)), r.Resolv, strings.Join(r.Addresses, " "))
		err = errors.Join(err, lineErr)
		if r.Missing != "" {
			printMissing(os.Stdout, r.Missing, isTerminal(os.Stdout))
		}
	}
	return err
}

func (n *netnsFlags) ps(h *netns.Host, args []string) error {
	name := ""
	if len(args) > 0 {
		var err error
		if name, err = n.onlyName(args); err != nil {
			return err
		}
	}
	programs, err := n.programs(h, name)
	if err != nil {
		return err
	}
	programs = printable(programs)
	if n.asJSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"version": 1, "programs": programs})
	}
	return printPrograms(programs)
}

func printPrograms(programs []netns.Program) error {
	const format = "%-15s %8v %8v %-19s %s\n"
	_, err := fmt.Printf(format, "NAMESPACE", "PID", "UID", "STARTED", "COMMAND")
	for _, p := range printable(programs) {
		_, lineErr := fmt.Printf(format, p.Namespace, p.PID, p.UID, time.Unix(p.Started, 0).Format(time.DateTime), p.Command)
		err = errors.Join(err, lineErr)
	}
	return err
}
