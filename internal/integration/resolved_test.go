//go:build integration

package integration

import (
	"fmt"
	"testing"
)

// TestResolved: systemd-resolved is told the name servers of an address only when that is asked for, asks them by the
// link, and forgets them with the address.
func TestResolved(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			m := boot(t, debian(suite, managers))
			i := m.behind(2)
			m.sh(`sysctl -qw net.ipv6.conf.wan1.accept_ra=0 net.ipv6.conf.wan2.accept_ra=0`)
			i.dhcp()
			m.install(files[0])
			resolvedByWatch(m, i)
			resolvedByHooks(m)
			resolvedManaged(m)
			m.want(`systemctl --failed --plain --no-legend`)
		})
	}
}

// waitServers waits until systemd-resolved has name servers of a link, and no others.
func (m *machine) waitServers(ifname, servers string) {
	m.t.Helper()
	m.wait(fmt.Sprintf("systemd-resolved asks %q on %s", servers, ifname),
		`got=$(resolvectl dns "$1" | sed "s/^[^:]*:[ ]*//"); [ "$(echo $got)" = "$2" ] || { echo "$got"; false; }`, ifname, servers)
}

// wantAnswer waits for the answer of provider n to a query by wanN.
func (m *machine) wantAnswer(n int) {
	m.t.Helper()
	m.wait(fmt.Sprint("queries leave by wan", n), `resolvectl --cache=no --legend=no --interface="wan$1" query who.test | grep -F "198.18.0.$1"`, fmt.Sprint(n))
}

// resolvedByWatch has the unit of the watch tell, in its sandbox.
func resolvedByWatch(m *machine, i *internet) {
	const profiles = `{"links": [
		{"ifname": "wan1", "nameservers": ["10.1.0.1", "fd01::1"], "resolver": "WHO"},
		{"ifname": "wan2", "nameservers": ["10.2.0.1", "fd02::1"], "resolver": "WHO"}], "reconcile_seconds": 1}`
	m.sh(`echo "$1" | sed "s/WHO/dnsmasq/" >/etc/table-allocator/watch.json; systemctl enable --now table-allocator-watch`, profiles)
	m.uplink(1)
	m.uplink(2)
	i.waitUplinks()
	m.wait("dnsmasq's file", `[ "$(grep -c . /run/table-allocator/dnsmasq.servers)" = 4 ]`)
	m.want(`ls /run/table-allocator/resolved 2>/dev/null || :`)
	m.sh(`echo "$1" | sed "s/WHO/resolved/" >/etc/table-allocator/watch.json; systemctl reload table-allocator-watch`, profiles)
	m.wait("the watch says that nothing runs that could be told", `journalctl -u table-allocator-watch | grep "it does not run in this network namespace"`)
	i.waitUplinks()
	m.sh(`systemctl start systemd-resolved`)
	for n := 1; n <= 2; n++ {
		m.waitServers(fmt.Sprint("wan", n), fmt.Sprintf("10.%d.0.1 fd0%[1]d::1", n))
		m.wantAnswer(n)
	}
	m.wait("dnsmasq's file has no lines any more", `! grep . /run/table-allocator/dnsmasq.servers`)

	// One family leaves, then the other one; the answer in between comes over IPv6.
	m.sh(`ip address delete 10.1.0.2/24 dev wan1`)
	m.waitServers("wan1", "fd01::1")
	m.wantAnswer(1)
	m.sh(`ip address delete fd01::2/64 dev wan1`)
	m.waitServers("wan1", "")
	m.waitServers("wan2", "10.2.0.1 fd02::1")

	// What others do to it is mended, and a restart of either side changes nothing.
	m.sh(`resolvectl revert wan2`)
	m.waitServers("wan2", "10.2.0.1 fd02::1")
	m.sh(`systemctl restart systemd-resolved table-allocator-watch`)
	m.waitServers("wan2", "10.2.0.1 fd02::1")
	m.wantAnswer(2)
	// A watch that was killed while the address went.
	m.sh(`systemctl stop table-allocator-watch; ip address flush dev wan2 scope global; systemctl start table-allocator-watch`)
	m.waitServers("wan2", "")
	m.sh(`ip address add 10.2.0.2/24 dev wan2; ip route replace default via 10.2.0.1 dev wan2 metric 200`)
	m.waitServers("wan2", "10.2.0.1")
	m.sh(`systemctl disable --now table-allocator-watch; table-allocator-client release --all`)
	m.waitServers("wan2", "")
	m.wait("no file is left", `! ls /run/table-allocator/resolved | grep .`)
	m.sh(`ip address flush dev wan1 scope global; ip address flush dev wan2 scope global; ip -6 route flush default`)
}

// resolvedByHooks has holders tell, one process for each address.
func resolvedByHooks(m *machine) {
	m.sh(`echo RESOLVER=resolved >>/etc/default/table-allocator`)
	m.uplink(1)
	m.sh(`export IFACE=wan1 MODE=start METHOD=static
		ADDRFAM=inet IF_ADDRESS=10.1.0.2 IF_GATEWAY=10.1.0.1 IF_DNS_NAMESERVERS=10.1.0.1 /etc/network/if-up.d/table-allocator
		ADDRFAM=inet6 IF_ADDRESS=fd01::2 IF_GATEWAY=fd01::1 IF_DNS_NAMESERVERS="fd01::1 fe80::1" /etc/network/if-up.d/table-allocator`)
	m.wait("both families", `resolvectl dns wan1 | grep 10.1.0.1 | grep fd01::1 | grep fe80::1`)
	m.wantAnswer(1)
	// The link is renamed, and loses its IPv6 address.
	m.sh(`ip link set wan1 down; ip link set wan1 name dsl; ip link set dsl up`)
	m.waitServers("dsl", "10.1.0.1")
	m.sh(`table-allocator-client release --all`)
	m.waitServers("dsl", "")
	m.sh(`ip address flush dev dsl scope global; ip link set dsl down; ip link set dsl name wan1; ip link set wan1 up`)
	// none: nobody is told.
	m.sh(`echo RESOLVER=none >>/etc/default/table-allocator
		ip address add 10.1.0.3/24 dev wan1; IFACE=wan1 MODE=start ADDRFAM=inet METHOD=static IF_ADDRESS=10.1.0.3 IF_DNS_NAMESERVERS=10.1.0.1 /etc/network/if-up.d/table-allocator`)
	m.want(`resolvectl dns wan1 | grep -c 10.1.0.1 || :; cat /run/table-allocator/dnsmasq.servers; ip rule | grep -c 'from 10.1.0.3 lookup'`, "0", "1")
	m.sh(`table-allocator-client release --all; ip address flush dev wan1 scope global`)
}

// resolvedManaged: systemd-networkd and udhcpc tell it themselves, and what another program has told stays.
func resolvedManaged(m *machine) {
	m.sh(`resolvectl dns wan1 192.0.2.53; ip address add 10.1.0.2/24 dev wan1
		table-allocator-client -4 -a 10.1.0.2 -i wan1 --resolver resolved --nameserver 10.1.0.1; table-allocator-client release --all`)
	m.waitServers("wan1", "192.0.2.53")
	m.sh(`resolvectl revert wan1; ip address flush dev wan1 scope global`)
	for path, text := range networkd {
		m.write(expand(path, "2"), expand(text, "2"), 0o644)
	}
	m.sh(`systemctl start systemd-networkd`)
	m.wait("networkd's name servers", `resolvectl dns wan2 | grep 10.2.0.1; ip -4 address show wan2 | grep 10.2.0`)
	m.sh(`addr=$(ip -4 -o address show wan2 | awk '{ print $4 }' | cut -d/ -f1)
		table-allocator-client -4 -a "$addr" -i wan2 --resolver resolved --nameserver 192.0.2.53 --routes copy`)
	m.wantAnswer(2)
	m.want(`resolvectl dns wan2 | grep -c 192.0.2.53 || :; ls /run/table-allocator/resolved`, "0")
	m.sh(`table-allocator-client release --all`)
	m.wantAnswer(2)
	m.sh(`systemd-run --quiet --unit=udhcpc udhcpc -f -i wan1 -s /usr/lib/table-allocator/udhcpc`)
	m.waitServers("wan1", "10.1.0.1") // its script tells them before it calls the client
	m.wait("the client that udhcpc calls serves its address", `table-allocator-client status wan1 | grep -w ok`)
	m.sh(`table-allocator-client release --all`)
	m.wantAnswer(1)
}
