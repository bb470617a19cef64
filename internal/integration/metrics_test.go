//go:build integration

package integration

import (
	"testing"
)

// TestMetrics: the timer's unit, in its sandbox, writes what Prometheus reads.
func TestMetrics(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			m := boot(t, debian(suite, managers))
			m.behind(2)
			m.install(files[0])
			m.sh(`systemctl enable --now table-allocator-watch`)
			m.uplink(1)
			m.sh(`
				mkdir -p /var/lib/prometheus/node-exporter; chown prometheus: /var/lib/prometheus/node-exporter
				echo kept >/root/other; ln -s /root/other /var/lib/prometheus/node-exporter/.table-allocator.prom.new
				systemctl enable --now table-allocator-metrics.timer`)
			const file = "/var/lib/prometheus/node-exporter/table-allocator.prom"
			for _, line := range []string{
				`table_allocator_server_up 1`,
				`table_allocator_uplink_up{ifname="wan1",address="10.1.0.2",family="inet"} 1`,
				`table_allocator_uplink_up{ifname="wan1",address="fd01::2",family="inet6"} 1`,
				`table_allocator_leases{family="inet"} 1`,
				`table_allocator_pool_leased_tables{family="inet"} 1`,
				`table_allocator_pool_free_tables{family="inet6"} 39`,
				`table_allocator_rule_restorations{ifname="wan1",address="10.1.0.2",family="inet"} 0`,
				`table_allocator_unbound_info{family="inet",ifname="wan1",gateway="10.1.0.1"} 1`,
			} {
				m.wait(line, `grep --fixed-strings --line-regexp "$1" `+file, line)
			}
			m.sh(`ip rule delete priority 10000 from 10.1.0.2`)
			m.wait("a rule that was restored", `grep 'rule_restorations.*10.1.0.2.* 1$' `+file)
			m.want(`promtool check metrics <`+file+`; stat -c %a `+file+`; cat /root/other; ls -A /var/lib/prometheus/node-exporter`,
				"644", "kept", "table-allocator.prom")

			// What is wrong is in the file, and the unit has not failed.
			m.sh(`systemctl stop table-allocator-server.socket table-allocator-server; ip route delete default dev wan1`)
			m.wait("a stopped server", `grep "^table_allocator_server_up 0" `+file)
			m.wait("an uplink without a route", `grep 'uplink_up.*10.1.0.2.* 0' `+file)
			m.want(`promtool check metrics <`+file+`; systemctl --failed --plain --no-legend; systemctl is-active table-allocator-metrics.timer`, "active")
		})
	}
}
