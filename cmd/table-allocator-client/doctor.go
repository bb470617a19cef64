package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/inspect"
	"github.com/table-allocator/table-allocator/internal/netns"
	"github.com/table-allocator/table-allocator/internal/outside"
)

const doctorUsage = `Usage: table-allocator-client doctor [options] [IFNAME|ADDR...]

Looks for what is wrong with this host, and changes nothing. A line for each
finding says how bad it is, its name, and what was found; lines below say why
and what to do. Last come the checks that could not look. The exit code is 0 if
all is fine or there are notes only, 1 for warnings, 3 for errors, 2 for wrong
usage or without rights. Needs root.

      --only NAME,...       these checks only
      --list                print names and severities of all checks
      --target ADDR,...     hosts that the check mtu asks, which runs only if it
                            is named (the targets of the watch's probes)
      --verbose             print the names of checks that found nothing, too
      --json                print JSON
      --redact              shorten public addresses, for a report
  -i, --ifname PATTERN...   addresses of these links only (*), also as arguments
      --exclude PATTERN...  links to leave out (lo)
  -c, --config FILE         the configuration of the watch
`

func doctor(f *flags) action {
	h := newHostFlags(f)
	only := f.StringSlice("only", nil, "")
	list := f.Bool("list", false, "")
	asJSON := f.Bool("json", false, "")
	redact := f.Bool("redact", false, "")
	targets := f.StringSlice("target", nil, "")
	verbose := f.Bool("verbose", false, "")
	return func(args []string) error {
		if *list {
			for _, c := range inspect.Checks {
				fmt.Printf("%-8s %s\n", c.Severity, c.Name)
			}
			return nil
		}
		q, err := h.question(args)
		if err != nil {
			return err
		}
		for _, text := range *targets {
			target, err := parseUnmapped(text)
			if err != nil {
				return wrongUsage(fmt.Errorf("--target %s: not an address", text))
			}
			q.Targets = append(q.Targets, target)
		}
		q.Namespaces = func() []inspect.Namespace { return namespaces(f) }
		d, err := inspect.Doctor(context.Background(), q, *only)
		if errors.Is(err, inspect.ErrNoCheck) {
			return wrongUsage(err)
		}
		if err != nil {
			return asked(err)
		}
		d = printable(redacted(d, *redact))
		if *asJSON {
			err = json.NewEncoder(os.Stdout).Encode(d)
		} else {
			err = printDiagnosis(d, *verbose)
		}
		if code := d.Code(); err == nil && code != 0 {
			err = exitError{code}
		}
		return err
	}
}

// namespaces are the network namespaces on uplinks. Who may not list them sees none, nor does anybody while their files below
// /run do not answer.
func namespaces(f *flags) []inspect.Namespace {
	const limit = 3 * time.Second
	all, err := outside.Ask("the files of network namespaces", limit, func() ([]inspect.Namespace, error) { return listNamespaces(f), nil })
	if err != nil {
		warn(err)
	}
	return all
}

func listNamespaces(f *flags) (all []inspect.Namespace) {
	host, err := netns.Open(f.server, f.uids)
	if err != nil {
		f.debug("cannot list network namespaces: %v", err)
		return nil
	}
	defer host.Close()
	rows, err := host.List()
	if errors.Is(err, outside.ErrSilent) {
		warn(fmt.Errorf("network namespaces are not known: %w", err))
	} else if err != nil {
		f.debug("cannot list network namespaces: %v", err)
	}
	for _, r := range rows {
		all = append(all, inspect.Namespace{Name: r.Name, Ifname: r.Ifname, OnLoss: string(r.OnLoss), Tables: r.Tables, Addresses: r.Addresses, Resolv: r.Resolv,
			VPN: r.VPN, Programs: len(r.Programs), Missing: r.Missing, Unsure: r.Unsure, Cure: cureOf(r)})
	}
	return all
}

// cureOf is what to do about what a namespace misses.
func cureOf(r netns.Row) string {
	switch {
	case r.VPN != "":
		return outside.Service("enable --now", "table-allocator-netns") + ", which runs the VPN; " + outside.Journal("table-allocator-netns") + " says why it is down"
	case strings.Contains(r.Missing, "--firewall"):
		return fmt.Sprintf("table-allocator-client netns del %s, and add it with --firewall accept; or have the other program accept what arrives by tav*", r.Name)
	}
	return outside.Service("enable --now", "table-allocator-netns") + ", and a lease for " + r.Ifname
}

func printDiagnosis(d inspect.Diagnosis, verbose bool) error {
	var b strings.Builder
	for _, f := range d.Findings {
		fmt.Fprintf(&b, "%-8s %-18s %s\n         why                %s\n         do                 %s\n", f.Severity, f.Name, f.What, f.Evidence, f.Cure)
	}
	for _, u := range d.Unseen {
		fmt.Fprintf(&b, "unseen   %-18s %s\n", u.Name, u.Why)
	}
	for _, name := range d.Silent {
		if verbose {
			fmt.Fprintf(&b, "fine     %s\n", name)
		}
	}
	fmt.Fprintf(&b, "%d checks found nothing\n", d.Fine)
	if d.Code() != 0 {
		b.WriteString("for a report: table-allocator-client status --json; table-allocator-client doctor --json; table-allocator-client explain DST --json (--redact shortens addresses)\n")
	}
	_, err := os.Stdout.WriteString(b.String())
	return err
}
