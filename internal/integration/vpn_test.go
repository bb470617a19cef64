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
	m, i := vpnMachine(t, suite, nextUp)
	m.sh(`systemctl enable --now table-allocator-watch`)
	i.waitUplinks()
	i.openVPN("/etc/openvpn/host.conf")
	for range 2 {
		m.sh(`systemd-run --quiet --unit=vpn openvpn --config /etc/openvpn/host.conf`)
		i.waitVPN(`10\.97\.0\.`, `fd97::`)
		i.waitUplinks("10.97.0.", "fd97:")
		m.want(`table-allocator-client status --no-legend | awk '{ print $1 }' | sort | uniq -c`, "2 tun0", "2 wan1", "2 wan2")
		m.sh(`systemctl stop vpn`)
		i.waitVPN(`10\.1\.0\.2$`, `fd01::2$`)
	}
	m.want(`systemctl --failed --plain --no-legend`)
}

// TestWgQuick: beside the real wg-quick, whose rules take what is not its own, before the watch has any, it is as beside OpenVPN.
// Rules that it adds later come before those of the watch, and status and doctor say so.
func TestWgQuick(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			m, i := vpnMachine(t, suite, managers)
			i.wireGuard("/etc/wireguard/wg0.conf")
			const up, down = `WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick up wg0 2>&1`, `wg-quick down wg0 2>&1`
			m.sh(up)
			m.sh(`systemctl enable --now table-allocator-watch`)
			i.waitVPN(`10\.98\.0\.2$`, `fd98::2$`)
			m.sh(down)
			i.waitVPN(`10\.1\.0\.2$`, `fd01::2$`)
			m.sh(up)
			m.wait("status names the rule", `! table-allocator-client status >/run/status; grep "10.2.0.2 .* shadowed by rule .*51820" /run/status; table-allocator-client doctor | grep "rule-before-ours.*51820"`)
			m.sh(down)
			i.waitVPN(`10\.1\.0\.2$`, `fd01::2$`)
			m.want(`systemctl --failed --plain --no-legend`)
		})
	}
}

// vpnMachine is a machine with both uplinks and the package. It has a web server, as one of the internet has at beyond.
func vpnMachine(t *testing.T, suite string, packages []string) (*machine, *internet) {
	t.Helper()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, debian(suite, packages))
	i := m.behind(2)
	i.IP(t, "address add "+beyond+"/32 dev lo")
	m.web(i.Namespace, beyond)
	m.web(m.ns, "")
	m.install(files[0])
	m.uplink(1)
	m.uplink(2)
	return m, i
}

// waitVPN waits until what main sends has addresses that begin so. Packets of the uplinks' addresses leave by them, and who
// connects to one gets its answers.
func (i *internet) waitVPN(begin4, begin6 string) {
	i.m.t.Helper()
	i.m.wait("main leads there", `curl --silent --max-time 3 http://`+beyond+`/ | grep "^$1"; curl --silent --globoff --max-time 3 'http://[`+nettest.Far6+`]/' | grep "^$2"`, begin4, begin6)
	i.waitUplinks()
	i.m.wait("status finds no fault", `table-allocator-client status`)
	for n := 1; n <= 2; n++ {
		for far, addr := range map[string]string{nettest.Far4: fmt.Sprintf("10.%d.0.2", n), nettest.Far6: fmt.Sprintf("[fd0%d::2]", n)} {
			i.Run(i.m.t, "curl", "--silent", "--show-error", "--globoff", "--max-time", "20", "--interface", far, "http://"+addr+"/")
		}
	}
}

// wireGuard runs a server of WireGuard in the internet, and writes the configuration of a client, which takes all traffic of the machine.
func (i *internet) wireGuard(client string) {
	i.m.t.Helper()
	i.m.sh(`umask 077; wg genkey >/run/server.key; key=$(wg genkey); echo "$key" | wg pubkey >/run/client.pub
		printf '%s\n' "[Interface]" "PrivateKey = $key" "Address = 10.98.0.2/32, fd98::2/128" \
			"[Peer]" "PublicKey = $(wg pubkey </run/server.key)" "Endpoint = `+nettest.Far4+`:51820" "AllowedIPs = 0.0.0.0/0, ::/0" >"$1"`, client)
	i.serve(`wireguard-go --foreground wgserver >/run/server.log 2>&1 &
		until wg set wgserver listen-port 51820 private-key /run/server.key peer "$(cat /run/client.pub)" allowed-ips 10.98.0.2/32,fd98::2/128; do sleep 0.1; done 2>/dev/null
		ip address add 10.98.0.1/24 dev wgserver; ip address add fd98::1/64 nodad dev wgserver; ip link set wgserver up; wait`)
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
