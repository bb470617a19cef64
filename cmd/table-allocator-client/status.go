package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/inspect"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

const statusUsage = `Usage: table-allocator-client status [options] [IFNAME|ADDR...]

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
      --redact              shorten public addresses, for a report
      --prometheus          print metrics, or with --output FILE put them into
                            FILE; the exit code is 0 whatever they say
      --follow              print a line for each change from now on
`

func status(f *flags) action {
	h := newHostFlags(f)
	family := f.family()
	asJSON := f.Bool("json", false, "")
	redact := f.Bool("redact", false, "")
	noLegend := f.Bool("no-legend", false, "")
	follow := f.Bool("follow", false, "")
	metrics := f.Bool("prometheus", false, "")
	var output string
	value(f, &output, "output", "", parsePath)
	return func(args []string) error {
		if output != "" && !*metrics || *metrics && (*asJSON || *follow) {
			return wrongUsage(errors.New("--output goes with --prometheus, which excludes --json and --follow"))
		}
		if *follow {
			if !h.Changed("ifname") {
				h.ifnames = nil
			}
			ctx, stop := cli.UntilSignal()
			defer stop()
			return followEvents(ctx, withLinkNames(append(h.ifnames, args...)), *asJSON)
		}
		q, err := h.question(args)
		if err != nil {
			return err
		}
		if q.Family, err = family(); err != nil {
			return wrongUsage(err)
		}
		if os.Geteuid() == 0 {
			q.Namespaces = func() []inspect.Namespace { return namespaces(f) }
		}
		report, err := inspect.Status(context.Background(), q)
		if err != nil {
			return asked(err)
		}
		f.debug("%d addresses", len(report.Uplinks))
		if *metrics {
			report.Measure(context.Background(), q)
		}
		report = printable(redacted(report, *redact))
		if *metrics {
			return writeMetrics(output, report.Metrics())
		}
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

// writeMetrics prints metrics, or lets whoever reads the file see the old ones or the new ones, whole.
func writeMetrics(file string, text []byte) error {
	if file == "" {
		_, err := os.Stdout.Write(text)
		return err
	}
	const everybody = 0o644 // node_exporter is not root
	if err := remember.ReplaceFile(file, text, everybody); err != nil {
		return fmt.Errorf("write the metrics: %w", err)
	}
	return nil
}

// question is what a command asks that takes names of links as arguments.
func (h *hostFlags) question(args []string) (inspect.Question, error) {
	links, addresses := splitNames(args)
	if len(args) > 0 {
		h.ifnames = links
	}
	for i, name := range h.ifnames {
		h.ifnames[i] = linkName(name)
	}
	q := inspect.Question{Ifnames: h.ifnames, Addresses: addresses, Server: h.server, UIDs: h.uids}
	if len(addresses) > 0 { // on any link
		h.ifnames = []string{"*"}
	}
	q.Load = func(file string) (uplink.Selection, error) {
		base := client.WatchConfig{Selection: uplink.Selection{Profiles: []uplink.Profile{uplink.DefaultProfile()}, Exclude: uplink.DefaultExclude}, Server: h.server}
		cfg, err := client.LoadWatchConfig(file, base)
		return cfg.Selection, err
	}
	q.Options = func(args []string) (uplink.Selection, error) {
		w, err := parseWatch(args)
		if err != nil {
			return uplink.Selection{}, err
		}
		return w.config.Selection, nil
	}
	if err := h.complete(); err != nil {
		return q, err
	}
	cfg, err := h.load()
	q.Selection = cfg.Selection
	return q, err
}

// splitNames separates links from addresses, which may have the length of their network.
func splitNames(args []string) (links, addresses []string) {
	for _, arg := range args {
		text, _, _ := strings.Cut(arg, "/")
		if addr, err := netip.ParseAddr(text); err == nil {
			addresses = append(addresses, addr.Unmap().String())
		} else {
			links = append(links, arg)
		}
	}
	return links, addresses
}

// asked is an error of a question as the command ends with it: the exit code is 2 where the caller asked for what does not
// exist, or may not ask.
func asked(err error) error {
	if errors.Is(err, inspect.ErrNoLink) || errors.Is(err, inspect.ErrNoAddress) || errors.Is(err, inspect.ErrNotAsked) {
		return exitWith(2, err)
	}
	return err
}
