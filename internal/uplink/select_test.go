package uplink

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestSelects(t *testing.T) {
	cfg := Selection{Exclude: append([]string{"wan9"}, DefaultExclude...), Profiles: []Profile{
		{Ifname: "wan?", Families: []wire.Family{wire.Inet}, Tag: "first",
			Settings: Settings{Nameservers: []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")}}},
		{Ifname: "*", Families: []wire.Family{wire.Inet, wire.Inet6}, Tag: "second"},
	}}
	for _, tt := range []struct{ ifname, addr, want string }{
		{"wan0", "192.0.2.5", "wan0-192.0.2.5-2 first [192.0.2.53]"},
		{"wan0", "2001:db8::5", ""}, // the first profile counts
		{"wan10", "2001:db8::5", "wan10-2001:db8::5-10 second []"},
		{"wan9", "192.0.2.5", ""},
		{"lan0", "fd00::5", "lan0-fd00::5-10 second []"},
		{"lan0", "fe80::5", ""},
		{"lan0", "ff02::5", ""},
		{"lan0", "::1", ""},
		{"lan0", "127.0.0.2", ""},
		{"lan0", "169.254.1.1", "lan0-169.254.1.1-2 second []"}, // if main leads it to other networks, see TestLeaves
		{"lan0", "224.0.0.1", ""},
		{"lo", "192.0.2.5", ""},
		{"br0", "192.0.2.5", "br0-192.0.2.5-2 second []"},
		{"", "192.0.2.5", ""}, // its link went meanwhile
	} {
		got := ""
		u, ok := cfg.Uplink(route.Address{Addr: netip.MustParseAddr(tt.addr), Bits: 24}, tt.ifname)
		if ok {
			got = fmt.Sprintf("%s %s %v", u.Key, u.Tag, u.Settings.Nameservers)
		}
		if got != tt.want {
			t.Errorf("%s on %q: got %q, want %q", tt.addr, tt.ifname, got, tt.want)
		}
	}
}

// TestLinksInVRF: a link in a VRF, and no port of a bridge, is left to that, unless main has a default route over it.
func TestLinksInVRF(t *testing.T) {
	links := Links(map[int]route.Link{
		1: {Index: 1, Name: "red", Kind: "vrf", Up: true},
		2: {Index: 2, Name: "eth1", Master: 1, Up: true},
		3: {Index: 3, Name: "eth2", Master: 1, Up: true},
		4: {Index: 4, Name: "br0", Kind: "bridge", Up: true},
		5: {Index: 5, Name: "eth3", Master: 4, Up: true},
	}, map[int]bool{3: true})
	all := Selection{Profiles: []Profile{{Ifname: "*"}}}
	for index, want := range map[int]bool{1: false, 2: true, 3: false, 4: false, 5: false} {
		if got := links[index].LeftToVRF(); got != want {
			t.Errorf("%s is left to a VRF: %v, want %v", links[index].Name, got, want)
		}
	}
	if all.Wants(links[2]) || !all.Wants(links[3]) {
		t.Errorf("wants %s: %v, %s: %v", links[2].Name, all.Wants(links[2]), links[3].Name, all.Wants(links[3]))
	}
}

func TestWants(t *testing.T) {
	port := func(kind string) []route.Link { return []route.Link{{Name: "port", Kind: kind}} }
	all := Selection{Profiles: []Profile{{Ifname: "vpn?"}, {Ifname: "*"}}}
	for _, tt := range []struct {
		name string
		link Link
		want bool
	}{
		{"hardware", Link{Link: route.Link{Name: "eth0", Up: true}}, true},
		{"down", Link{Link: route.Link{Name: "eth0"}, Default: true}, false},
		{"no carrier", Link{Link: route.Link{Name: "eth0", Up: true}}, true},
		{"a modem", Link{Link: route.Link{Name: "ppp0", Up: true, Kind: "ppp"}}, true},
		{"a bridge of hardware", Link{Link: route.Link{Name: "br0", Up: true, Kind: "bridge"}, Ports: port("")}, true},
		{"a bridge of hardware with the name of docker's", Link{Link: route.Link{Name: "br-0123456789ab", Up: true, Kind: "bridge"}, Ports: port("")}, true},
		{"a bridge of containers", Link{Link: route.Link{Name: "lan", Up: true, Kind: "bridge"}, Ports: port("veth")}, false},
		{"with a default route", Link{Link: route.Link{Name: "lan", Up: true, Kind: "bridge"}, Ports: port("veth"), Default: true}, true},
		{"a bridge without ports", Link{Link: route.Link{Name: "vmbr1", Up: true, Kind: "bridge"}}, false},
		{"a bridge without ports that has a default route", Link{Link: route.Link{Name: "vmbr1", Up: true, Kind: "bridge"}, Default: true}, true},
		{"a bridge without ports that the configuration names", Link{Link: route.Link{Name: "vpn1", Up: true, Kind: "bridge"}}, true},
		{"a bridge of virtual machines on other hosts", Link{Link: route.Link{Name: "vnet1", Up: true, Kind: "bridge"}, Ports: append(port("vxlan"), port("tun")...)}, false},
		{"a bridge of hardware and virtual machines", Link{Link: route.Link{Name: "vmbr0", Up: true, Kind: "bridge"}, Ports: append(port("tun"), port("")...)}, true},
		{"docker's, without containers", Link{Link: route.Link{Name: "br-0123456789ab", Up: true, Kind: "bridge"}}, false},
		{"not docker's", Link{Link: route.Link{Name: "br-ex", Up: true, Kind: "openvswitch"}}, true},
		{"services", Link{Link: route.Link{Name: "kube-ipvs0", Up: true, Kind: "dummy"}}, false},
		{"a cable to a container", Link{Link: route.Link{Name: "veth12ab", Up: true, Kind: "veth"}}, false},
		{"a cable", Link{Link: route.Link{Name: "wan0", Up: true, Kind: "veth"}}, true},
		{"a port of a VRF", Link{Link: route.Link{Name: "eth1", Up: true}, VRF: true}, false},
		{"a port of a VRF with a default route in main", Link{Link: route.Link{Name: "eth1", Up: true}, VRF: true, Default: true}, true},
		{"a port of a VRF that the configuration names", Link{Link: route.Link{Name: "vpn1", Up: true}, VRF: true}, false},
		{"a VRF", Link{Link: route.Link{Name: "red", Up: true, Kind: "vrf"}}, false},
		{"a tunnel", Link{Link: route.Link{Name: "wg0", Up: true, Kind: "wireguard"}}, false},
		{"a tunnel with a default route", Link{Link: route.Link{Name: "wg0", Up: true, Kind: "wireguard"}, Default: true}, true},
		{"a tunnel that the configuration names", Link{Link: route.Link{Name: "vpn0", Up: true, Kind: "tun"}}, true},
	} {
		if got := all.Wants(tt.link); got != tt.want {
			t.Errorf("%s: got %v", tt.name, got)
		}
	}
}

// TestOtherNames: a configuration may have any name of a link, exactly or by a pattern.
func TestOtherNames(t *testing.T) {
	cfg := Selection{Exclude: []string{"enp9*"}, Profiles: []Profile{
		{Ifname: "enp0s3", Families: []wire.Family{wire.Inet}, Tag: "exact", Cgroup: true, Traits: Traits{Rank: 5}},
		{Ifname: "enx*", Families: []wire.Family{wire.Inet}, Tag: "pattern"},
		{Ifname: "*", Families: []wire.Family{wire.Inet}, Tag: "any"},
	}}
	cfg.Others = OthersOf(map[int]route.Link{
		2: {Index: 2, Name: "wan0", Other: []string{"enp0s3", "enx001122334455"}},
		3: {Index: 3, Name: "wan1", Other: []string{"wlx0", "enx001122334466-of-the-second-provider"}},
		4: {Index: 4, Name: "wan2", Other: []string{"enp9s0"}},
		5: {Index: 5, Name: "wan3"},
	})
	for ifname, want := range map[string]string{"wan0": "exact", "wan1": "pattern", "wan2": "", "wan3": "any", "enp0s3": "exact"} {
		u, ok := cfg.Uplink(route.Address{Addr: netip.MustParseAddr("192.0.2.5"), Bits: 24}, ifname)
		if ok != (want != "") || u.Tag != want || ok && u.Key.Ifname != ifname {
			t.Errorf("%s: got %+v, want %q", ifname, u, want)
		}
	}
	if !cfg.HasCgroup("wan0") || cfg.HasCgroup("wan1") || cfg.Traits("wan0", wire.Inet).Rank != 5 || !cfg.Names("wan1") || cfg.Names("wan3") {
		t.Errorf("of other names: %v, %v, %v", cfg.HasCgroup("wan0"), cfg.Traits("wan0", wire.Inet), cfg.Names("wan1"))
	}
}
