//go:build integration

package integration

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
)

// TestEC2: the real amazon-ec2-net-utils has networkd put the default route of the second link into a table of its own, which has a
// number that our server leases unless it is told otherwise, and adds rules and further addresses. Packets of all addresses of both
// links pass; status and doctor name the tables that both have, and the cure.
func TestEC2(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			ec2(t, suite)
		})
	}
}

func ec2(t *testing.T, suite string) {
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, debian(suite, clouds))
	i := m.behind(2)
	i.dhcp()
	m.install(files[0])
	m.metadata()
	m.sh(`sed -i 's/^Driver=.*/Driver=veth/; /^MTUBytes/d' "$(readlink -f /usr/lib/systemd/network/80-ec2.network)"; systemctl enable --now table-allocator-watch; systemctl start systemd-networkd`)
	i.waitUplinks()
	// Until the server has other tables, packets leave right only if wan1 happens to have the number that the scripts give it.
	m.sh(`systemctl start policy-routes@wan1 policy-routes@wan2`)
	m.wait("the further addresses", `ip address | grep 10.1.0.77 && ip address | grep 10.2.0.77`)
	m.wait("doctor names the table, and the cure", `table-allocator-client doctor | grep -A2 "table-shared .*table 10001" | grep "do  *give the server other tables: table_offset in server.json, such as 20000, then restart server and watch"`)
	m.sh(`sed -i '0,/^{/s//{ "table_offset": 20000,/' /etc/table-allocator/server.json; systemctl restart table-allocator-server table-allocator-watch`)
	for _, script := range []string{`true`, `systemctl restart systemd-networkd`, `networkctl reconfigure wan2`, `systemctl restart table-allocator-watch`, `systemctl restart refresh-policy-routes@wan2`} {
		m.sh(script)
		m.wait("its rules and routes", `ip route show table 10001 | grep "default via 10[.]2[.]0[.]1 .*proto dhcp"; ip rule | grep "^10001:.*from 10[.]2[.]0[.][0-9]* lookup 10001 proto static"`)
		i.waitUplinks("10.1.0.77", "10.2.0.77", "10.1.0.", "10.2.0.", "fd01:", "fd02:")
		m.wait("status finds no fault", `table-allocator-client status`)
	}
	m.want(`systemctl --failed --plain --no-legend`)
}

// metadata answers what a machine of EC2 asks about its links, of which wan1 is the first: each has the address that DHCP gives
// it, and a further one.
func (m *machine) metadata() {
	m.t.Helper()
	m.ns.IP(m.t, "address add 169.254.169.254/32 dev lo")
	mac := func(n int) string {
		return strings.TrimSpace(m.sh(`cat "/sys/class/net/wan$1/address"`, fmt.Sprint(n)))
	}
	text := map[string]func() string{"/latest/api/token": func() string { return "token" }, "/latest/meta-data/mac": func() string { return mac(1) }}
	for n := 1; n <= 2; n++ {
		about := "/latest/meta-data/network/interfaces/macs/" + mac(n) + "/"
		addresses := func(family, further string) func() string {
			return func() string {
				out, _ := m.try(`ip "$1" -o address show dev "wan$2" scope global | awk '{ print $4 }' | cut -d/ -f1 | grep -v "[.]77$" || :`, family, fmt.Sprint(n))
				return out + further
			}
		}
		text[about+"device-number"] = func() string { return fmt.Sprint(n - 1) }
		text[about+"interface-id"] = func() string { return fmt.Sprintf("eni-%08d", n) }
		text[about+"local-ipv4s"] = addresses("-4", fmt.Sprintf("10.%d.0.77\n", n))
		text[about+"ipv6s"] = addresses("-6", "")
	}
	m.ns.Do(func() {
		l, err := net.Listen("tcp", "169.254.169.254:80")
		if err != nil {
			m.t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answer := text[r.URL.Path]
			if answer == nil {
				http.NotFound(w, r)
				return
			}
			_, _ = w.Write([]byte(answer())) // the client may have gone
		})}
		go server.Serve(l) // until Close
		m.t.Cleanup(func() { _ = server.Close() })
	})
}
