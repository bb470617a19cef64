package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// probed has a watch probe the internet in short times.
func (h *home) probed() {
	h.t.Helper()
	sysctl(h.t, h.ns, "net/ipv4/ping_group_range", "0 0")
	h.watched("--config", h.watchFile(chooserConfig(copyLinks, fmt.Sprintf(`"targets": [%q]`, internet))))
}

// foreignMain are the IPv4 routes of main that are not ours.
func (h *home) foreignMain() string {
	h.t.Helper()
	var all []string
	for line := range strings.Lines(h.ns.IP(h.t, "route show table main")) {
		if !strings.Contains(line, " proto 116 ") {
			all = append(all, strings.TrimSpace(line))
		}
	}
	return strings.Join(all, "\n")
}

// waitChosen waits until the choice's route in main leads to a gateway.
func (h *home) waitChosen(what, gateway string) {
	h.t.Helper()
	eventually(h.t, "after "+what+" main leads to "+gateway, func() error {
		routes := h.ns.IP(h.t, "route show default")
		if first, _, _ := strings.Cut(routes, "\n"); !strings.HasPrefix(first, "default via "+gateway+" ") || !strings.Contains(first, " proto 116 ") || !strings.Contains(first, " metric 1") {
			return fmt.Errorf("main has\n%s", routes)
		}
		return nil
	})
}

// TestChoiceNetworkManager: what NetworkManager removes of the choice comes back, and its own routes stay.
func TestChoiceNetworkManager(t *testing.T) {
	h := newHome(t, 3)
	h.networkManager()
	h.connection("wan0", "method=manual\naddress1=192.168.1.20/24,192.168.1.1\nroute-metric=100", "method=disabled")
	h.connection("wan2", "method=manual\naddress1=10.64.2.20/24,10.64.2.1\nroute-metric=600", "method=disabled")
	h.probed()
	h.waitChosen("the start", "192.168.1.1")
	h.mainHolds("default via 192.168.1.1 dev wan0", "default via 10.64.2.1 dev wan2")
	main := h.foreignMain()
	for _, command := range []string{
		"ip route del default",
		"nmcli connection reload",
		"nmcli device reapply wan0",
		"nmcli connection modify wan0 +ipv4.routes '10.98.0.0/16 192.168.1.1' && nmcli device reapply wan0",
		"nmcli connection modify wan0 -ipv4.routes '10.98.0.0/16 192.168.1.1' && nmcli device reapply wan0",
		"nmcli --wait 50 connection up wan0",
		"nmcli --wait 50 connection up wan2",
	} {
		h.sh(command)
		h.waitChosen(command, "192.168.1.1")
		if strings.HasPrefix(command, "nmcli connection modify wan0 +") {
			continue
		}
		eventually(t, "after "+command+" main has the routes of NetworkManager", func() error {
			if now := h.foreignMain(); now != main {
				return fmt.Errorf("it has\n%s\nwant\n%s", now, main)
			}
			return nil
		})
	}
	eventually(t, "unbound packets leave by wan0", func() error { return h.arrives(packet{}, seenAs(0).String()) })
	h.isps[0].ns.Run(t, "nft", "add table inet fault; add chain inet fault f { type filter hook forward priority -300; policy drop; }")
	h.waitChosen("wan0 has failed", "10.64.2.1")
	eventually(t, "unbound packets leave by wan2", func() error { return h.arrives(packet{}, seenAs(2).String()) })
	h.sh("nmcli device reapply wan2 && nmcli --wait 50 connection up wan0")
	h.waitChosen("the other connection is up again", "10.64.2.1")
	h.wantOwnOnly()
}

// TestChoiceNetworkd: the same of systemd-networkd.
func TestChoiceNetworkd(t *testing.T) {
	h := newHome(t, 3)
	link := func(address, gateway, metric string) string {
		return "[Network]\nAddress=" + address + "\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n[Route]\nGateway=" + gateway + "\nMetric=" + metric + "\n"
	}
	h.write("/etc/systemd/networkd.conf.d/table-allocator.conf", readFile(t, "../../packaging/systemd/networkd.conf"))
	networkd := h.networkd(map[string]string{"wan0": link("192.168.1.20/24", "192.168.1.1", "100"), "wan2": link("10.64.2.20/24", "10.64.2.1", "600")})
	h.probed()
	h.waitChosen("the start", "192.168.1.1")
	h.mainHolds("default via 192.168.1.1 dev wan0", "default via 10.64.2.1 dev wan2")
	main := h.foreignMain()
	wait := func(what string) {
		t.Helper()
		h.waitChosen(what, "192.168.1.1")
		eventually(t, "after "+what+" main has the routes of networkd", func() error {
			if now := h.foreignMain(); now != main {
				return fmt.Errorf("it has\n%s\nwant\n%s", now, main)
			}
			return nil
		})
	}
	for _, command := range []string{"networkctl reconfigure wan0", "networkctl reconfigure wan2", "networkctl reload", "ip route del default"} {
		h.sh(command)
		wait(command)
	}
	networkd.stop()
	h.startNetworkd()
	wait("a restart")
	h.wantOwnOnly()
}
