package inspect

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// pool is how many tables of a family are leased, by all programs, and how many are free.
type pool struct {
	family       string
	leased, free int64
}

// restoredWithin is the time for which Metrics counts how often rules were restored.
const restoredWithin = time.Hour

// Measure adds what only metrics say: the pools of the server, if it tells them, and how often rules were restored.
func (r *Report) Measure(ctx context.Context, q Question) {
	if server, err := peer.NewServer(q.Server, q.UIDs); err == nil && r.Server.State == Running {
		for _, family := range []wire.Family{wire.Inet, wire.Inet6} {
			if health, err := server.Health(ctx, family); err == nil && health.Tables > 0 {
				r.pools = append(r.pools, pool{family.String(), health.Leased, health.Tables - health.Leased})
			}
		}
	}
	history := history()
	r.countRestored(history, time.Now().Add(-restoredWithin))
}

func (r *Report) countRestored(history []events.Event, after time.Time) {
	for i := range r.Uplinks {
		row := &r.Uplinks[i]
		for _, e := range history {
			if e.What == events.RulesLost && e.Ifname == row.Ifname && e.Address == row.Address && e.Time.After(after) {
				row.restored++
			}
		}
	}
}

// metric is a metric family of a Report, in the words of Prometheus. All are gauges.
type metric struct {
	name, help string
	samples    []sample
}

type sample struct {
	labels string
	value  int64
}

// labels are the names and values of a sample, in the exposition format of Prometheus.
func labels(pairs ...string) string {
	escape := strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`).Replace
	var all []string
	for i := 0; i+1 < len(pairs); i += 2 {
		all = append(all, pairs[i]+`="`+escape(strings.ToValidUTF8(pairs[i+1], "?"))+`"`)
	}
	return "{" + strings.Join(all, ",") + "}"
}

// Metrics is the report for Prometheus, as the textfile collector of node_exporter reads it.
func (r Report) Metrics() []byte {
	one := func(is bool) int64 {
		if is {
			return 1
		}
		return 0
	}
	server := metric{"table_allocator_server_up", "Whether the server runs, or systemd starts it with the first request.",
		[]sample{{"", one(r.Server.State == Running || r.Server.State == Waiting)}}}
	start := metric{name: "table_allocator_server_start_time_seconds", help: "When the server was started, in seconds since 1970."}
	if r.Server.State == Running && r.Server.Since != 0 {
		start.samples = []sample{{"", r.Server.Since}}
	}
	unbound := metric{name: "table_allocator_unbound_info", help: "The link and gateway by which traffic leaves that is bound to no uplink."}
	for _, u := range r.Unbound {
		unbound.samples = append(unbound.samples, sample{labels("family", u.Family, "ifname", u.Ifname, "gateway", u.Gateway), 1})
	}
	up := metric{name: "table_allocator_uplink_up", help: "Whether nothing is wrong with the table, rules and routes of an address."}
	state := metric{name: "table_allocator_uplink_state_info", help: "The state of an address: ok, or the name of a finding, see table-allocator-status(8)."}
	info := metric{name: "table_allocator_uplink_info", help: "The table of an address, what becomes of its routes, and its gateway."}
	left := metric{name: "table_allocator_lease_remaining_seconds", help: "How long the lease of an address lasts unless it is renewed."}
	held := metric{name: "table_allocator_leases", help: "How many addresses have a lease."}
	restored := metric{name: "table_allocator_rule_restorations", help: "How often rules of an address that another program deleted were restored in the last hour."}
	leased := metric{name: "table_allocator_pool_leased_tables", help: "How many tables of the server's pool are leased, by all programs."}
	free := metric{name: "table_allocator_pool_free_tables", help: "How many tables of the server's pool are free."}
	for _, p := range r.pools {
		leased.samples = append(leased.samples, sample{labels("family", p.family), p.leased})
		free.samples = append(free.samples, sample{labels("family", p.family), p.free})
	}
	count := make(map[string]int64)
	for _, row := range slices.Concat(r.Uplinks, r.Others) {
		who := []string{"ifname", row.Ifname, "address", row.Address, "family", row.Family}
		name := ok
		if len(row.Findings) > 0 {
			name = row.Findings[0].Name
		}
		up.samples = append(up.samples, sample{labels(who...), one(row.Table != 0 && !row.IsFault())})
		restored.samples = append(restored.samples, sample{labels(who...), row.restored})
		state.samples = append(state.samples, sample{labels(append(who, "state", name)...), 1})
		if row.Table != 0 {
			count[row.Family]++
			info.samples = append(info.samples, sample{labels(append(who, "table", fmt.Sprint(row.Table), "mode", row.Mode, "gateway", row.Gateway)...), 1})
			left.samples = append(left.samples, sample{labels(who...), row.LeaseLeft})
		}
	}
	for _, family := range []string{"inet", "inet6"} {
		held.samples = append(held.samples, sample{labels("family", family), count[family]})
	}
	var text bytes.Buffer
	for _, m := range []metric{server, start, unbound, up, state, info, left, restored, held, leased, free} {
		if len(m.samples) == 0 {
			continue
		}
		fmt.Fprintf(&text, "# HELP %s %s\n# TYPE %[1]s gauge\n", m.name, m.help)
		for _, s := range m.samples {
			fmt.Fprintf(&text, "%s%s %d\n", m.name, s.labels, s.value)
		}
	}
	return text.Bytes()
}
