//go:build integration

package integration

import (
	"fmt"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestChoiceUnit: by the unit, as systemd restricts it, a watch probes, chooses and executes the program of on_change. After
// kill -9 systemd starts it again, and no rule changes. A stop takes the route out of main, and the removal of the package all.
func TestChoiceUnit(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range plain {
		t.Run(d.Suite, func(t *testing.T) { choiceUnit(t, boot(t, d), files[0]) })
	}
}

// probing is a configuration of a watch that probes by one kind, in short times.
func probing(kind string) string {
	return fmt.Sprintf(`{"links": [{"ifname": "wan*"}], "probe": {"targets": [%q, %q], "kinds": [%q], "on_change": "/etc/table-allocator/changed",
		"interval": 0.5, "standby": 0.5, "suspect": 0.2, "down": 3, "up": 2, "hold": 1, "hold_max": 2}}`, nettest.Far4, nettest.Far6, kind)
}

func choiceUnit(t *testing.T, m *machine, deb string) {
	i := m.behind(2)
	m.install(deb)
	m.uplink(1)
	m.uplink(2)
	m.sh(`sysctl -qw "net.ipv4.ping_group_range=0 0"`) // as systemd sets it on most hosts; else the other kinds answer
	m.write("/etc/table-allocator/changed", "#!/bin/sh\n"+`echo "$TA_EVENT $TA_FAMILY $TA_TO" >>/run/table-allocator/changed`+"\n", 0o755)
	const alive = `[ "$(table-allocator-client uplinks | grep -c ' alive (')" = 4 ]`
	for _, kind := range []string{"icmp", "tcp:80"} {
		m.write("/etc/table-allocator/watch.json", probing(kind), 0o644)
		m.sh(`systemctl enable table-allocator-watch; systemctl restart table-allocator-watch`)
		m.wait("all uplinks work by "+kind, alive)
	}
	m.want(`systemctl show -P RestrictAddressFamilies table-allocator-watch | tr ' ' '\n' | sort; systemctl show -P CapabilityBoundingSet table-allocator-watch | tr ' ' '\n' | sort
		grep CapEff "/proc/$(systemctl show -P MainPID table-allocator-watch)/status" | grep -o '[0-9a-f]*$'`,
		"AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX", "cap_bpf", "cap_net_admin", "0000008000001000")
	unbound := func(n int) {
		t.Helper()
		m.wait(fmt.Sprintf("unbound IPv4 leaves by wan%d", n), fmt.Sprintf(`curl --silent --max-time 5 http://%s/ | grep -x 10.%d.0.2`, nettest.Far4, n))
		m.wait(fmt.Sprintf("unbound IPv6 leaves by wan%d", n), fmt.Sprintf(`curl --silent --max-time 5 --globoff 'http://[%s]/' | grep -x fd0%d::2`, nettest.Far6, n))
	}
	unbound(1)
	i.Providers[0].Run(t, "nft", "add table inet fault; add chain inet fault f { type filter hook forward priority -300; policy drop; }")
	unbound(2)
	m.wait("the program was executed", `grep -x "unbound inet wan2" /run/table-allocator/changed; grep -x "unbound inet6 wan2" /run/table-allocator/changed`)

	changes := m.ruleEvents()
	m.sh(`kill -9 "$(systemctl show -P MainPID table-allocator-watch)"`)
	m.wait("systemd has started it again", `[ "$(systemctl show -P NRestarts table-allocator-watch)" -ge 1 ]; table-allocator-client uplinks | grep "^. wan1 .* dead ("`)
	unbound(2)
	if changes := changes(); len(changes) > 0 {
		t.Errorf("a restart after kill -9 changed rules: %q", changes)
	}
	i.Providers[0].Run(t, "nft", "delete table inet fault")
	unbound(1)

	m.sh(`systemctl stop table-allocator-watch`)
	m.want(`ip -N route show table main proto 116; ip -N -6 route show table main proto 116; ip -N rule show priority 90000 | grep -c "iif lo"; ip -N -6 rule show priority 90000 | grep -c "iif lo"`, "1", "1")
	m.sh(`systemctl start table-allocator-watch`)
	m.wait("it chooses again", `ip -N route show table main proto 116 | grep "metric 1"; ip -N -6 route show table main proto 116 | grep "metric 1"`)
	m.sh(`dpkg -r table-allocator 2>&1`)
	m.want(`ip -N rule | grep "proto 116" || :; ip -N -6 rule | grep "proto 116" || :; ip -N route show table all proto 116; ip -N -6 route show table all proto 116
		systemctl --failed --plain --no-legend`)
}
