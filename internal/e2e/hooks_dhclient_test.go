package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// given are the addresses that dnsmasq gives out at each provider.
var given = []string{"192.168.1.20", "192.168.1.150", "10.64.2.20"}

// Three uplinks, two of which look the same from here, come up, are renewed, and go.
func TestDhclientUplinks(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	uplinks := make(map[string]int)
	for n, isp := range s.isps {
		s.dnsmasqAt(n)
		s.dhclient(isp.ifname)
		s.waitFilled(given[n], "default via "+isp.gateway, isp.network)
		s.waitMain(isp.ifname)
		uplinks[given[n]] = n
	}
	for addr, n := range uplinks {
		s.waitUplink(n, addr)
	}
	s.waitServers("server=192.168.1.1@192.168.1.20", "server=192.168.1.1@192.168.1.150", "server=10.64.2.1@10.64.2.20")
	tables := []string{s.tableOf(given[0]), s.tableOf(given[1]), s.tableOf(given[2])}

	stop := s.traffic(uplinks)
	for _, isp := range s.isps {
		s.waitReason(isp.ifname, "RENEW", 0)
		s.waitReason(isp.ifname, "RENEW", len(s.reasons(isp.ifname)))
	}
	stop()
	for n, addr := range given {
		if got := s.tableOf(addr); got != tables[n] {
			t.Errorf("table of %s after renewals: got %s, want %s", addr, got, tables[n])
		}
	}

	s.dhclient("wan0", "-r")
	s.waitReason("wan0", "RELEASE", 0)
	s.waitGone(given[0])
	s.waitUplink(1, given[1])
	s.waitUplink(2, given[2])
	s.dhclient("wan1", "-x")
	s.waitReason("wan1", "STOP", 0)
	s.waitGone(given[1])
	s.waitUplink(2, given[2])
	// Right after a renewal: a client that one calls when the link goes waits a minute for the address.
	s.waitReason("wan2", "RENEW", len(s.reasons("wan2")))
	s.ns.IP(t, "link del wan2")
	s.waitClean()
	s.waitServers()
}

// From the moment an address appears until it is gone, its packets leave by its own uplink,
// or not at all.
func TestDhclientFirstPacket(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"move", "copy"} {
		t.Run(mode, func(t *testing.T) {
			s := newSite(t, "ROUTES="+mode)
			s.prepareDhclient()
			s.serve()
			uplinks := make(map[string]int)
			for n := range s.isps {
				s.dnsmasqAt(n, noRenewals...) // one that runs while dhclient -r does may bring the address back
				uplinks[given[n]] = n
			}
			stop := s.traffic(uplinks)
			for range 2 {
				for n, isp := range s.isps {
					s.dhclient(isp.ifname)
					s.waitFilled(given[n], "default via "+isp.gateway, isp.network)
				}
				for n, isp := range s.isps {
					s.dhclient(isp.ifname, "-r")
					s.waitGone(given[n])
				}
			}
			stop()
		})
	}
}

// With copy, main has what it has without us.
func TestDhclientCopy(t *testing.T) {
	s := newSite(t, "ROUTES=copy", "DNSMASQ_SERVERS=")
	s.prepareDhclient()
	s.serve()
	for n, isp := range s.isps {
		s.dnsmasqAt(n)
		s.dhclient(isp.ifname, "-e", fmt.Sprintf("IF_METRIC=%d", 10+n))
		s.waitMain(isp.ifname, fmt.Sprintf("default via %s dev %s metric %d", isp.gateway, isp.ifname, 10+n), isp.network)
	}
	for n, isp := range s.isps {
		s.waitFilled(given[n], fmt.Sprintf("default via %s dev %s proto 116 src %s metric %d", isp.gateway, isp.ifname, given[n], 10+n), isp.network)
		s.waitUplink(n, given[n])
	}
	if got := s.read("/run/table-allocator/dnsmasq.servers"); got != "" {
		t.Errorf("resolver lines although none are wanted:\n%s", got)
	}
}

// What a server may say of routes: several routers, option 121, a network of one address.
func TestDhclientRoutes(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	s.isps[0].ns.IP(t, "address add 192.168.1.2/24 dev lan")
	s.isps[1].ns.IP(t, "address add 192.168.1.254/24 dev lan")
	s.dhcpdAt(0, `option routers 192.168.1.1, 192.168.1.2; option subnet-mask 255.255.255.0; default-lease-time 600;`)
	s.dhcpdAt(1, `option routers 192.168.1.99; option subnet-mask 255.255.255.0; default-lease-time 600;
		option rfc3442-classless-static-routes 16,10,99,192,168,1,254, 24,203,0,113,0,0,0,0, 0,192,168,1,1;`)
	s.dhcpdAt(2, `option routers 10.64.2.1; option subnet-mask 255.255.255.255; default-lease-time 600;`)
	for _, isp := range s.isps {
		s.dhclient(isp.ifname)
	}
	s.waitFilled(given[0], "default via 192.168.1.1 dev wan0 proto 116 src 192.168.1.20 metric 1",
		"default via 192.168.1.2 dev wan0 proto 116 src 192.168.1.20 metric 2", "192.168.1.0/24")
	s.waitFilled(given[1], "default via 192.168.1.1", "10.99.0.0/16 via 192.168.1.254", "203.0.113.0/24 dev wan1", "192.168.1.0/24")
	for n, isp := range s.isps {
		s.waitMain(isp.ifname)
		s.waitUplink(n, given[n])
	}
	for _, line := range s.routes(s.tableOf(given[2])) {
		if !strings.Contains(line, "src 10.64.2.20") {
			t.Errorf("route without the source: %s", line)
		}
	}

	// A metric as ifupdown gives it counts for all of them.
	s.dhclient("wan0", "-r")
	s.waitGone(given[0])
	s.dhclient("wan0", "-e", "IF_METRIC=50")
	s.waitFilled(given[0], "default via 192.168.1.1 dev wan0 proto 116 src 192.168.1.20 metric 50",
		"default via 192.168.1.2 dev wan0 proto 116 src 192.168.1.20 metric 51", "192.168.1.0/24")
}

// A server that changes its mind: another address inside a renewal, another gateway, a NAK.
func TestDhclientChanges(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	s.isps[2].ns.IP(t, "address add 10.64.2.2/24 dev lan")
	lease := dhcpLease{addr: "10.64.2.30", mask: "255.255.255.0", router: "10.64.2.1", seconds: 600, renew: 1}
	server := s.dhcp(2, lease)
	s.dhclient("wan2")
	s.waitUplink(2, "10.64.2.30")

	lease.addr = "10.64.2.31"
	server.set(func(d *dhcpServer) { d.lease = lease })
	s.waitReason("wan2", "RENEW 10.64.2.30 10.64.2.31", 0)
	s.waitGone("10.64.2.30")
	s.waitFilled("10.64.2.31", "default via 10.64.2.1", "10.64.2.0/24")
	s.waitUplink(2, "10.64.2.31")

	lease.router = "10.64.2.2"
	server.set(func(d *dhcpServer) { d.lease = lease })
	s.waitFilled("10.64.2.31", "default via 10.64.2.2", "10.64.2.0/24")
	s.waitUplink(2, "10.64.2.31")
	s.waitServers("server=10.64.2.1@10.64.2.31")

	lease.addr = "10.64.2.32"
	server.set(func(d *dhcpServer) { d.lease, d.deny = lease, true })
	s.waitReason("wan2", "EXPIRE", 0)
	server.set(func(d *dhcpServer) { d.deny = false })
	s.waitReason("wan2", "BOUND", 2)
	s.waitGone("10.64.2.31")
	s.waitFilled("10.64.2.32", "default via 10.64.2.2", "10.64.2.0/24")
	s.waitUplink(2, "10.64.2.32")
	s.waitServers("server=10.64.2.1@10.64.2.32")
	s.quietDhclient("/run/dhclient.wan2.pid") // a renewal would start a holder anew
	s.ns.IP(t, "link del wan2")
	s.waitClean()
}

// A dhclient that is killed and started again keeps the table, with the server of leases
// and without it; and when the provider is gone, nothing stays.
func TestDhclientRestart(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	server := s.dnsmasqAt(0)
	s.dhclient("wan0")
	s.waitUplink(0, given[0])
	table := s.tableOf(given[0])

	s.killDhclient("wan0")
	before := len(s.reasons("wan0"))
	s.dhclient("wan0")
	s.waitReason("wan0", "REBOOT", before)
	s.waitUplink(0, given[0])
	if got := s.tableOf(given[0]); got != table {
		t.Errorf("table after REBOOT: got %s, want %s", got, table)
	}

	server.kill()
	s.killDhclient("wan0")
	s.ns.IP(t, "address flush dev wan0") // as a reboot does
	s.waitGone(given[0])
	before = len(s.reasons("wan0"))
	s.dhclient("wan0") // the router answers
	s.waitReason("wan0", "TIMEOUT", before)
	s.waitFilled(given[0], "default via 192.168.1.1", "192.168.1.0/24")
	s.waitUplink(0, given[0])

	s.killDhclient("wan0")
	s.ns.IP(t, "address flush dev wan0")
	s.isps[0].ns.IP(t, "address flush dev lan") // it does not
	before = len(s.reasons("wan0"))
	s.try(`dhclient -4 -1 -pf /run/dhclient.wan0.pid -lf /var/lib/dhcp/dhclient.wan0.leases wan0`)
	s.waitReason("wan0", "TIMEOUT", before)
	s.waitReason("wan0", "FAIL", before)
	s.waitGone(given[0])
	s.waitServers()
}

// A lease ends because nobody renews it.
func TestDhclientExpire(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	server := s.dhcpdAt(2, `option routers 10.64.2.1; option subnet-mask 255.255.255.0;
		default-lease-time 5; max-lease-time 5; min-lease-time 5;`)
	s.dhclient("wan2")
	s.waitUplink(2, given[2])
	server.kill()
	s.waitReason("wan2", "EXPIRE", 0)
	s.waitClean()
	s.waitServers()
}

// The client of ISC never says REBIND, whatever happens: the environment is replayed.
func TestDhclientRebind(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	s.isps[0].ns.IP(t, "address add 192.168.1.2/24 dev lan")
	s.dnsmasqAt(0)
	s.dhclient("wan0")
	s.waitUplink(0, given[0])
	s.killDhclient("wan0")
	s.sh(`env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin reason=REBIND interface=wan0 \
		old_ip_address=192.168.1.20 new_ip_address=192.168.1.21 new_subnet_mask=255.255.255.0 \
		new_routers=192.168.1.2 new_domain_name_servers=192.168.1.2 new_dhcp_lease_time=600 /sbin/dhclient-script`)
	s.waitGone(given[0])
	s.waitFilled("192.168.1.21", "default via 192.168.1.2", "192.168.1.0/24")
	s.waitUplink(0, "192.168.1.21")
	s.waitServers("server=192.168.1.2@192.168.1.21")
}

// Holders that were killed leave what they had to the next call.
func TestDhclientHolderKilled(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	s.dnsmasqAt(0)
	s.dhclient("wan0")
	s.waitUplink(0, given[0])
	table := s.tableOf(given[0])
	for _, pid := range s.pids(clientBin) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a renewal brings a new one", func() error {
		if pids := s.pids(clientBin); len(pids) != 1 {
			return fmt.Errorf("there are %d", len(pids))
		}
		return nil
	})
	s.waitUplink(0, given[0])
	if got := s.tableOf(given[0]); got != table {
		t.Errorf("table: got %s, want %s", got, table)
	}
	for _, pid := range s.pids(clientBin) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	s.dhclient("wan0", "-r")
	s.waitClean()
	s.waitServers()
}

// Without the server of tables a link works as it would without us, and gets its table when
// the server comes.
func TestDhclientNoServer(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	for n, isp := range s.isps {
		s.dnsmasqAt(n)
		s.dhclient(isp.ifname)
		if rules := s.rules(); len(rules) > 0 {
			t.Errorf("rules without a lease: %q", rules)
		}
		// Each has a default in main, whose metric keeps it apart.
		index := strings.TrimSuffix(strings.Fields(s.ns.IP(t, "-o link show "+isp.ifname))[0], ":")
		eventually(t, "main has the default of "+isp.ifname, func() error {
			for _, r := range s.routes("main") {
				if strings.HasPrefix(r, "default via "+isp.gateway+" dev "+isp.ifname) && (n == 0 || strings.Contains(r, "metric "+index)) {
					return nil
				}
			}
			return fmt.Errorf("main is %q", s.routes("main"))
		})
		if n == 0 {
			s.waitUplink(0, given[0])
		}
	}
	s.serve()
	for n, isp := range s.isps {
		s.waitFilled(given[n], "default via "+isp.gateway, isp.network)
		s.waitMain(isp.ifname)
		s.waitUplink(n, given[n])
	}
}

// Ten links at once, with the server of tables, and without it until they are up.
func TestDhclientTenLinks(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late server %v", late), func(t *testing.T) { tenLinks(t, late) })
	}
}

func tenLinks(t *testing.T, late bool) {
	s := newSite(t)
	if !late {
		s.serve()
	}
	s.prepareDhclient()
	modems := nettest.New(t, "modems")
	sysctl(t, modems, "net/ipv4/ip_forward", "1")
	nettest.Veth(t, modems, "net", s.internet.Namespace, "modems")
	modems.IP(t, "address add 100.64.9.2/30 dev net")
	modems.IP(t, "route add "+internet+" via 100.64.9.1")
	s.internet.IP(t, "address add 100.64.9.1/30 dev modems")
	args := []string{"--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root", "--pid-file=", "--log-facility=-",
		"--no-ping", "--dhcp-authoritative", "--dhcp-leasefile=" + filepath.Join(s.dir, "modems.leases")}
	var links, addrs, pairs []string
	for n := range 10 {
		link, addr := fmt.Sprintf("modem%d", n), fmt.Sprintf("10.99.%d.2", n)
		nettest.Veth(t, s.ns, link, modems, link)
		modems.IP(t, fmt.Sprintf("address add 10.99.%d.1/24 dev %s", n, link))
		args = append(args, "--interface="+link, "--dhcp-range="+addr+","+addr+",255.255.255.0,1h")
		links, addrs = append(links, link), append(addrs, addr)
		pairs = append(pairs, link+" . "+addr)
	}
	s.write(filepath.Join(s.dir, "modems.nft"), `table ip modems {
		counter foreign {}
		set customers { type ifname . ipv4_addr; elements = { `+strings.Join(pairs, ", ")+` } }
		chain raw {
			type filter hook prerouting priority raw
			iifname net accept
			iifname . ip saddr @customers accept
			ip saddr 0.0.0.0 accept
			counter name foreign drop
		}
		chain out { type nat hook postrouting priority srcnat; oifname net masquerade; }
	}`)
	modems.Run(t, "nft", "-f", filepath.Join(s.dir, "modems.nft"))
	s.inNamespace(modems, "dnsmasq", args...).waitLog("DHCP, IP range")

	all := `for if; do dhclient -4 -pf "/run/dhclient.$if.pid" -lf "/var/lib/dhcp/dhclient.$if.leases" "$if" >&2 & done; wait`
	s.sh(all, links...)
	for _, link := range links {
		s.waitReason(link, "BOUND", 0)
	}
	if late {
		if rules := s.rules(); len(rules) > 0 {
			t.Errorf("rules without a lease: %q", rules)
		}
		s.serve()
	}
	for n, addr := range addrs {
		s.waitFilled(addr, fmt.Sprintf("default via 10.99.%d.1", n), fmt.Sprintf("10.99.%d.0/24", n))
		for _, from := range [][2]string{{addr, ""}, {"", links[n]}} {
			eventually(t, fmt.Sprintf("packets from %q pass", from), func() error {
				_, err := s.seen(packet{source: from[0], device: from[1]})
				return err
			})
		}
	}
	if out := modems.Run(t, "nft", "list", "counter", "ip", "modems", "foreign"); !strings.Contains(out, "packets 0 ") {
		t.Errorf("packets with a foreign source: %s", out)
	}
	s.sh(`for if; do ip link del "$if" & done; wait`, links...)
	s.waitClean()
	s.sh(`pkill -F /run/dhclient.modem0.pid || true`)
}

// A link that goes down and comes up finds its table filled again, and while it is down
// nothing of its address leaves elsewhere, if that is what the administrator wants.
func TestDhclientFlap(t *testing.T) {
	s := newSite(t, `CLIENT_OPTIONS="$CLIENT_OPTIONS --on-loss block"`)
	s.prepareDhclient()
	s.serve()
	uplinks := make(map[string]int)
	for n, isp := range s.isps {
		s.dnsmasqAt(n)
		s.dhclient(isp.ifname)
		s.waitUplink(n, given[n])
		uplinks[given[n]] = n
	}
	stop := s.traffic(uplinks)
	for range 3 {
		s.ns.IP(t, "link set wan1 down")
		s.waitSilent(given[1])
		s.ns.IP(t, "link set wan1 up")
		s.waitUplink(1, given[1])
		s.isps[0].ns.IP(t, "link set lan down") // loss of carrier
		s.waitSilent(given[0])
		s.isps[0].ns.IP(t, "link set lan up")
		s.waitUplink(0, given[0])
	}
	s.quietDhclient("/run/dhclient.wan0.pid", "/run/dhclient.wan2.pid") // a renewal would start anew
	s.ns.IP(t, "address del 192.168.1.20/24 dev wan0")
	s.waitAwaited(given[0])
	s.ns.IP(t, "link del wan2")
	s.waitGone(given[2])
	s.waitUplink(1, given[1])
	stop()
}

// Whatever is wrong with us, an address comes up as it does without us.
func TestDhclientWithoutUs(t *testing.T) {
	for name, settings := range map[string]string{
		"no client":          "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
		"left alone":         "LEAVE_ALONE='tun* wan?'",
		"broken settings":    "if then fi (",
		"client that fails":  "CLIENT_OPTIONS=--no-such-option",
		"wrong routes":       "ROUTES=elsewhere",
		"client that hangs":  "timeout() { command timeout 1 sleep 100; }",
		"settings that exit": "exit 7",
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, settings)
			s.prepareDhclient()
			s.serve()
			s.dnsmasqAt(0)
			s.dhclient("wan0")
			s.waitReason("wan0", "BOUND", 0)
			s.waitMain("wan0", "default via 192.168.1.1", "192.168.1.0/24")
			s.waitUplink(0, given[0])
			s.write("/etc/network/interfaces", "iface wan2 inet static\n address 10.64.2.9/24\n gateway 10.64.2.1\n metric 5\n")
			s.sh("ifup wan2")
			s.waitMain("wan2", "default via 10.64.2.1", "10.64.2.0/24")
			if rules := s.rules(); len(rules) > 0 {
				t.Errorf("rules: %q", rules)
			}
			if leases := s.leases(); len(leases) > 0 {
				t.Errorf("leases: %q", leases)
			}
		})
	}
}

// The hook is sourced: it has to leave the script that does so as it was.
func TestDhclientHookLeavesNothing(t *testing.T) {
	s := newSite(t)
	s.serve()
	s.link("lan0", "192.0.2.7/24")
	const script = `set -eu
		export interface=lan0 reason=$1 new_ip_address=192.0.2.7 new_subnet_mask=255.255.255.0 new_routers='192.0.2.1 192.0.2.2' IF_METRIC=
		old_ip_address= new_rfc3442_classless_static_routes= new_ms_classless_static_routes= new_domain_name_servers=
		set | grep -v '^_=' >/run/before
		. /etc/dhcp/dhclient-enter-hooks.d/table-allocator
		set | grep -v '^_=' >/run/after
		cmp /run/before /run/after
		echo "$-" */`
	for _, reason := range []string{"PREINIT", "BOUND", "RENEW", "MEDIUM", "BOUND6", "STOP"} {
		r := s.try(script, reason)
		if flags := strings.Fields(r.stdout); r.code != 0 || len(flags) < 2 || !strings.Contains(flags[0], "e") || strings.Contains(flags[0], "f") {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", reason, r.code, r.stdout, r.stderr)
		}
	}
	if diff := unordered(s.leases(), []string{"10000|inet|lan0|192.0.2.7|dhclient|0"}); diff != "" {
		t.Error(errors.New(diff))
	}
}
