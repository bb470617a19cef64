//go:build integration

package integration

import (
	"fmt"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// beyond is an address of the internet to which no host has a route of its own, as hosts of a VPN have to its server.
const beyond = "203.0.113.7"

// TestOpenVPN: a real OpenVPN of the host takes what main sends. Packets from the address of an uplink still leave by it, so that
// it answers who connects there; and so do those from the address of the tunnel.
func TestOpenVPN(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			openVPN(t, suite)
		})
	}
}

func openVPN(t *testing.T, suite string) {
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, debian(suite, nextUp))
	i := m.behind(2)
	i.IP(t, "address add "+beyond+"/32 dev lo")
	m.web(i.Namespace, beyond)
	m.web(m.ns, "") // of the host
	m.install(files[0])
	m.uplink(1)
	m.uplink(2)
	m.sh(`systemctl enable --now table-allocator-watch`)
	i.waitUplinks()

	i.openVPN("/etc/openvpn/host.conf")
	const vpn, unbound = `systemd-run --quiet --unit=vpn openvpn --config /etc/openvpn/host.conf`, `curl --silent --globoff --max-time 3 `
	const unbound4, unbound6 = unbound + `http://` + beyond + `/ | grep `, unbound + `'http://[` + nettest.Far6 + `]/' | grep `
	for range 2 {
		m.sh(vpn)
		m.wait("main leads into the tunnel", unbound4+`'^10\.97\.0\.'`)
		m.wait("and its IPv6", unbound6+`'^fd97::'`)
		i.waitUplinks("10.1.0.", "10.2.0.", "fd01:", "fd02:", "10.97.0.", "fd97:")
		m.wait("status finds no fault", `table-allocator-client status`)
		m.want(`table-allocator-client status --no-legend | awk '{ print $1 }' | sort | uniq -c`, "2 tun0", "2 wan1", "2 wan2")
		for n := 1; n <= 2; n++ {
			for _, addr := range []string{fmt.Sprintf("10.%d.0.2", n), fmt.Sprintf("[fd0%d::2]", n)} {
				i.Run(t, "curl", "--silent", "--show-error", "--globoff", "--max-time", "20", "http://"+addr+"/")
			}
		}
		m.sh(`systemctl stop vpn`)
		m.wait("main leads to the first uplink", unbound4+`-x 10.1.0.2; `+unbound6+`-x fd01::2`)
		i.waitUplinks()
		m.wait("status finds no fault", `table-allocator-client status`)
	}
	m.want(`systemctl --failed --plain --no-legend`)
}

// openVPN runs a server of OpenVPN in the internet, and writes the configuration of a client, which takes all traffic of the machine.
func (i *internet) openVPN(client string) {
	i.m.t.Helper()
	i.m.sh(`cd /etc/openvpn; for who in server client; do
			openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=$who -keyout $who.key -out $who.crt 2>&1
		done
		fingerprint() { openssl x509 -noout -fingerprint -sha256 -in $1.crt | cut -d= -f2; }
		printf '%s\n' "dev tunserver" "dev-type tun" "topology subnet" "server 10.97.0.0 255.255.255.0" "server-ipv6 fd97::/64" "dh none" "cert server.crt" "key server.key" \
			"peer-fingerprint $(fingerprint client)" "keepalive 1 4" "local `+nettest.Far4+`" >server.conf
		printf '%s\n' "client" "dev tun0" "remote `+nettest.Far4+`" "nobind" "cert /etc/openvpn/client.crt" "key /etc/openvpn/client.key" "peer-fingerprint $(fingerprint server)" \
			"connect-retry 1 1" "redirect-gateway def1 ipv6" allow-recursive-routing >"$1"; chmod 600 "$1" *.key`, client)
	i.serve(`cd /etc/openvpn; exec openvpn --config server.conf >/run/server.log 2>&1`)
}
