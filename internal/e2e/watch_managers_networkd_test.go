package e2e

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// networkd starts systemd-networkd, without systemd, for configurations of links.
func (h *home) networkd(links map[string]string) *process {
	h.t.Helper()
	for ifname, text := range links {
		h.write("/etc/systemd/network/"+ifname+".network", "[Match]\nName="+ifname+"\n"+text)
	}
	h.sh(`dbus-uuidgen --ensure=/etc/machine-id
		mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
		chown -R systemd-network: /run/systemd/netif`)
	h.daemon("dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog")
	eventually(h.t, "the bus is there", func() error {
		if h.try("test -S /run/dbus/system_bus_socket").code != 0 {
			return errors.New("no socket")
		}
		return nil
	})
	return h.startNetworkd()
}

func (h *home) startNetworkd() *process {
	h.t.Helper()
	p := h.daemon("/lib/systemd/systemd-networkd")
	eventually(h.t, "networkd answers", func() error {
		if r := h.try("networkctl --no-pager list"); r.code != 0 {
			return errors.New(r.stderr)
		}
		return nil
	})
	return p
}

// uplinksOfNetworkd are two: one static, one by DHCP and router advertisements.
var uplinksOfNetworkd = map[string]string{
	"wan0": "[Network]\nAddress=192.168.1.20/24\nGateway=192.168.1.1\nAddress=2001:db8:1000::20/64\nGateway=fe80::1\nIPv6AcceptRA=no\n",
	"wan1": "[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\nIPv6PrivacyExtensions=no\n",
}

// networkdHome is a home whose two links are up by networkd and served; addrs has provider
// numbers by address.
func networkdHome(t *testing.T, dropIn string) (h *home, networkd *process, addrs map[string]int) {
	t.Helper()
	h = newHome(t, 2)
	h.watched()
	h.dnsmasqAt(1)
	// Instead of the one that other tests install for all.
	h.write("/etc/systemd/networkd.conf.d/table-allocator.conf", dropIn)
	networkd = h.networkd(uplinksOfNetworkd)
	h.waitQuiet("wan1") // networkd listens to routers instead of the kernel
	h.advertise(1, "AdvDefaultLifetime 30; "+prefixOption(prefix6(1, 0), 600, 300))
	auto := h.waitAddress("wan1", prefix6(1, 0), slaac)
	leased := h.waitAddress("wan1", "192.168.1.0/24", anyAddress)
	addrs = map[string]int{given[0]: 0, "2001:db8:1000::20": 0, leased: 1, auto: 1}
	h.waitServedByNetworkd(addrs)
	return h, networkd, addrs
}

// waitServedByNetworkd waits until the addresses, and nothing else, have all that they need.
func (h *home) waitServedByNetworkd(addrs map[string]int) {
	h.t.Helper()
	eventually(h.t, "networkd has configured the links", func() error {
		for _, isp := range h.isps {
			if out := h.sh("networkctl --no-pager status " + isp.ifname); !strings.Contains(out, "(configured)") {
				return errors.New(out)
			}
		}
		return nil
	})
	for addr, n := range addrs {
		dev := " dev " + h.isps[n].ifname
		if strings.Contains(addr, ":") {
			h.waitServed(n, addr, prefix6(n, 0)+dev, "default via "+router6+dev)
		} else if n == 1 { // networkd has routes to what the server itself is, too
			h.waitServed(n, addr, "192.168.1.0/24"+dev, "192.168.1.1"+dev, "default via 192.168.1.1"+dev)
		} else {
			h.waitServed(n, addr, "192.168.1.0/24"+dev, "default via 192.168.1.1"+dev)
		}
	}
	h.waitExactly(slices.Collect(maps.Keys(addrs))...)
	h.waitHealthy()
}

const blame = "ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no"

// networkd takes away what is not its own when it configures a link anew, or is restarted:
// all of it is back at once, and the log says once what to change.
func TestWatchManagersNetworkd(t *testing.T) {
	h, networkd, addrs := networkdHome(t, "")
	heard := []func() []string{h.hear("4"), h.hear("6")}
	// Of wan0 the address itself goes, and with it what is ours.
	eventually(t, "networkd has deleted the rules of the other link three times", func() error {
		h.sh("networkctl reconfigure wan0")
		h.waitServedByNetworkd(addrs)
		lines := slices.Concat(heard[0](), heard[1]())
		for addr, n := range addrs {
			deleted := func(line string) bool { return strings.HasPrefix(line, "Deleted 10000: from "+addr+" ") }
			if times := len(slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return !deleted(line) })); n == 1 && times < 3 {
				return fmt.Errorf("that from %s %d times", addr, times)
			}
		}
		return nil
	})
	dropIn := func(want string) {
		t.Helper()
		eventually(t, "doctor says "+want, func() error {
			if r := h.try(bin(t, clientBin) + " doctor --only networkd-dropin"); !strings.Contains(r.stdout, want) {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	}
	dropIn("no networkd.conf has ManageForeignRoutingPolicyRules=no")
	networkd.stop()
	networkd = h.startNetworkd() // versions differ in what that deletes
	h.waitServedByNetworkd(addrs)
	h.watch.waitLog(blame)
	if n := strings.Count(h.watch.log.String(), blame); n != 1 {
		t.Errorf("the log names what to change %d times, want once", n)
	}
	// The file of a package is as old as the package: networkd itself knows whether it has read it.
	const file = "/etc/systemd/networkd.conf.d/table-allocator.conf"
	h.write(file, readFile(t, "../../packaging/systemd/networkd.conf"))
	h.sh("touch -d @1 " + file)
	dropIn("lists rules of others among those that it manages")
	networkd.stop()
	h.startNetworkd()
	h.waitServedByNetworkd(addrs)
	dropIn("1 checks found nothing")
	h.write(file, readFile(t, "../../packaging/systemd/networkd.conf")) // as an upgrade does
	if r := h.try(bin(t, clientBin) + " doctor --only networkd-dropin"); !strings.Contains(r.stdout, "1 checks found nothing") {
		t.Errorf("after the same text was written again: %+v", r)
	}
}

// With the file of packaging/ networkd takes nothing away, and no packet goes astray.
func TestWatchManagersNetworkdDropIn(t *testing.T) {
	h, networkd, addrs := networkdHome(t, readFile(t, "../../packaging/systemd/networkd.conf"))
	heard := []func() []string{h.hear("4"), h.hear("6")}
	stop := h.flows(map[string]int{given[0]: 0, "2001:db8:1000::20": 0})
	h.sh("networkctl reconfigure wan1")
	h.waitServedByNetworkd(addrs)
	networkd.stop()
	h.startNetworkd()
	h.waitServedByNetworkd(addrs)
	stop()
	h.wantOwnOnly()
	for _, line := range slices.Concat(heard[0](), heard[1]()) {
		if strings.HasPrefix(line, "Deleted ") && strings.Contains(line, "from "+given[0]) || strings.Contains(line, "from 2001:db8:1000::20") {
			t.Errorf("%s, although the file says not to", line)
		}
	}
	if strings.Contains(h.watch.log.String(), blame) {
		t.Error("rules were deleted although the file says not to")
	}
}
