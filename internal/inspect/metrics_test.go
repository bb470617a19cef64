package inspect

import (
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/events"
)

func TestMetrics(t *testing.T) {
	r := Report{
		Server:  Server{State: Running, Since: 1790000000},
		Unbound: []Unbound{{Family: "inet", Ifname: "wan0", Gateway: "192.0.2.1"}},
		Uplinks: []Row{
			{Ifname: "wan0", Address: "192.0.2.2", Family: "inet", Table: 10000, LeaseLeft: 3500, Gateway: "192.0.2.1", Mode: "copy"},
			{Ifname: "a\"\\\n\xff", Address: "2001:db8::2", Family: "inet6", Table: 10001, LeaseLeft: 7, Mode: "move", Findings: []Finding{{Name: "no-route", Severity: Error}}},
			{Ifname: "wan1", Address: "203.0.113.2", Family: "inet", Findings: []Finding{{Name: "not-served", Severity: Note}}},
		},
	}
	now := time.Now()
	r.pools = []pool{{"inet", 3, 997}, {"inet6", 0, 1000}}
	r.countRestored([]events.Event{
		{Time: now.Add(-2 * time.Hour), What: events.RulesLost, Ifname: "wan0", Address: "192.0.2.2"},
		{Time: now.Add(-time.Minute), What: events.RulesLost, Ifname: "wan0", Address: "192.0.2.2"},
		{Time: now, What: events.RulesLost, Ifname: "wan0", Address: "192.0.2.2"},
		{Time: now, What: events.RulesLost, Ifname: "wan1", Address: "192.0.2.2"},
		{Time: now, What: events.RouteLost, Ifname: "wan1", Address: "203.0.113.2"},
	}, now.Add(-restoredWithin))
	const want = `# HELP table_allocator_server_up Whether the server runs, or systemd starts it with the first request.
# TYPE table_allocator_server_up gauge
table_allocator_server_up 1
# HELP table_allocator_server_start_time_seconds When the server was started, in seconds since 1970.
# TYPE table_allocator_server_start_time_seconds gauge
table_allocator_server_start_time_seconds 1790000000
# HELP table_allocator_unbound_info The link and gateway by which traffic leaves that is bound to no uplink.
# TYPE table_allocator_unbound_info gauge
table_allocator_unbound_info{family="inet",ifname="wan0",gateway="192.0.2.1"} 1
# HELP table_allocator_uplink_up Whether nothing is wrong with the table, rules and routes of an address.
# TYPE table_allocator_uplink_up gauge
table_allocator_uplink_up{ifname="wan0",address="192.0.2.2",family="inet"} 1
table_allocator_uplink_up{ifname="a\"\\\n?",address="2001:db8::2",family="inet6"} 0
table_allocator_uplink_up{ifname="wan1",address="203.0.113.2",family="inet"} 0
# HELP table_allocator_uplink_state_info The state of an address: ok, or the name of a finding, see table-allocator-status(8).
# TYPE table_allocator_uplink_state_info gauge
table_allocator_uplink_state_info{ifname="wan0",address="192.0.2.2",family="inet",state="ok"} 1
table_allocator_uplink_state_info{ifname="a\"\\\n?",address="2001:db8::2",family="inet6",state="no-route"} 1
table_allocator_uplink_state_info{ifname="wan1",address="203.0.113.2",family="inet",state="not-served"} 1
# HELP table_allocator_uplink_info The table of an address, what becomes of its routes, and its gateway.
# TYPE table_allocator_uplink_info gauge
table_allocator_uplink_info{ifname="wan0",address="192.0.2.2",family="inet",table="10000",mode="copy",gateway="192.0.2.1"} 1
table_allocator_uplink_info{ifname="a\"\\\n?",address="2001:db8::2",family="inet6",table="10001",mode="move",gateway=""} 1
# HELP table_allocator_lease_remaining_seconds How long the lease of an address lasts unless it is renewed.
# TYPE table_allocator_lease_remaining_seconds gauge
table_allocator_lease_remaining_seconds{ifname="wan0",address="192.0.2.2",family="inet"} 3500
table_allocator_lease_remaining_seconds{ifname="a\"\\\n?",address="2001:db8::2",family="inet6"} 7
# HELP table_allocator_rule_restorations How often rules of an address that another program deleted were restored in the last hour.
# TYPE table_allocator_rule_restorations gauge
table_allocator_rule_restorations{ifname="wan0",address="192.0.2.2",family="inet"} 2
table_allocator_rule_restorations{ifname="a\"\\\n?",address="2001:db8::2",family="inet6"} 0
table_allocator_rule_restorations{ifname="wan1",address="203.0.113.2",family="inet"} 0
# HELP table_allocator_leases How many addresses have a lease.
# TYPE table_allocator_leases gauge
table_allocator_leases{family="inet"} 1
table_allocator_leases{family="inet6"} 1
# HELP table_allocator_pool_leased_tables How many tables of the server's pool are leased, by all programs.
# TYPE table_allocator_pool_leased_tables gauge
table_allocator_pool_leased_tables{family="inet"} 3
table_allocator_pool_leased_tables{family="inet6"} 0
# HELP table_allocator_pool_free_tables How many tables of the server's pool are free.
# TYPE table_allocator_pool_free_tables gauge
table_allocator_pool_free_tables{family="inet"} 997
table_allocator_pool_free_tables{family="inet6"} 1000
`
	if got := string(r.Metrics()); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	r.Server.State = Stopped // since then
	if got := string(r.Metrics()); strings.Contains(got, "server_start_time") {
		t.Errorf("a server that is stopped has the time of a start:\n%s", got)
	}
}
