package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestDoctorServer: what the server says of itself.
func TestDoctorServer(t *testing.T) {
	t.Run("pool", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
		h.serve(`"num_tables":5`)
		h.watch()
		h.ns.Batch(t, "address add 10.77.0.3/24 dev wan0", "address add 10.77.0.4/24 dev wan0", "address add 10.77.0.5/24 dev wan0")
		h.waitLeaseCount(4)
		h.waitDiagnosis("")
		h.ns.IP(t, "address add 10.77.0.6/24 dev wan0")
		h.waitLeaseCount(5)
		h.waitDiagnosis("", "pool")
		if r := h.run(bin(t, clientBin), "doctor"); r.code != 1 || !strings.Contains(r.stdout, "the next address gets none") ||
			!strings.Contains(r.stdout, "restart the service table-allocator-server") { // a reload refuses another num_tables
			t.Errorf("%+v", r)
		}
		h.ns.IP(t, "address del 10.77.0.6/24 dev wan0")
		h.waitDiagnosis("")
	})
	for name, tt := range map[string]struct{ address, route, families string }{
		"database":       {"10.77.0.2/24", "route add default via 10.77.0.1 dev wan0", `{"inet":true}`},
		"database inet6": {"2001:db8:77::2/64", "-6 route add default via fe80::1 dev wan0", `{"inet":false,"inet6":true,"unspec":false}`},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", tt.address)
			h.ns.IP(t, tt.route)
			server := h.serve(`"table_timeout":10`, `"addr_families":`+tt.families) // renewals are what it cannot write
			h.watch()
			h.waitLeaseCount(1)
			h.waitDiagnosis("")
			mend := noDirectory(h, server)
			h.waitDiagnosis("", "database")
			mend()
			h.waitDiagnosis("")
		})
	}
}

// waitLeaseCount waits until the server has so many leases.
func (h *host) waitLeaseCount(n int) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("%d leases", n), func() error {
		if got := h.sqlite("select count(*) from leases"); strings.TrimSpace(got) != fmt.Sprint(n) {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
}

// TestDoctorKernel: what the kernel lacks, which strace plays.
func TestDoctorKernel(t *testing.T) {
	h := newHost(t)
	doctor := func(inject ...string) result {
		args := append([]string{"-f", "-qq", "-o", "/dev/null"}, inject...)
		return h.run("strace", append(args, staticBin(t, clientBin), "doctor", "--only", "kernel-features")...)
	}
	for _, tt := range []struct {
		name, calls, fault, want string
		code                     int
	}{
		{"all is there", "bpf", "", "1 checks found nothing", 0},
		{"no programs", "bpf", "error=EINVAL", "note     kernel-features", 0},
		{"no right", "bpf", "error=EPERM", "unseen   kernel-features", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inject := []string{"-e", "trace=" + tt.calls}
			if tt.fault != "" {
				inject = append(inject, "-e", "inject="+tt.calls+":"+tt.fault)
			}
			if r := doctor(inject...); r.code != tt.code || !strings.Contains(r.stdout, tt.want) {
				t.Errorf("want %q: %+v", tt.want, r)
			}
		})
	}
}

// TestDoctorTranslation: an address on two links behind address translation, and a published port whose answers find back
// by marks.
func TestDoctorTranslation(t *testing.T) {
	t.Run("conntrack-zones", func(t *testing.T) {
		h := twoUplinks(t)
		h.ns.Run(t, "sh", "-ec", "nft add table ip nat; nft 'add chain ip nat out { type nat hook postrouting priority 100; }'; nft add rule ip nat out masquerade")
		// What else is wrong with such a host is not of interest here: the first rule from the address takes all of it.
		find := func(want bool) {
			t.Helper()
			eventually(t, fmt.Sprintf("conntrack-zones: %v", want), func() error {
				if r := h.run(bin(t, clientBin), "doctor", "--only", "conntrack-zones"); r.code != 0 || strings.Contains(r.stdout, "conntrack-zones") != want {
					return fmt.Errorf("%+v", r)
				}
				return nil
			})
		}
		h.waitDiagnosis("")
		h.ns.IP(t, "address add 10.77.0.2/24 dev wan1")
		find(true)
		h.ns.Run(t, "sh", "-ec", "nft add table ip zones; nft 'add chain ip zones pre { type filter hook prerouting priority raw; }'; nft add rule ip zones pre iifname wan1 ct zone set 1")
		find(false)
		h.ns.IP(t, "address del 10.77.0.2/24 dev wan1")
		h.waitDiagnosis("")
	})
	t.Run("published-port", func(t *testing.T) {
		h := twoUplinks(t)
		h.ns.Run(t, "sh", "-ec", "ip link add docker0 type veth peer name veth0; ip link set docker0 up; ip link set veth0 up; ip address add 10.99.0.1/24 dev docker0; sysctl -qw net.ipv4.ip_forward=1")
		h.ns.Run(t, "sh", "-ec", "nft add table ip nat; nft 'add chain ip nat pre { type nat hook prerouting priority -100; }'; nft add rule ip nat pre tcp dport 8080 dnat to 10.99.0.2:80")
		h.waitDiagnosis("", "published-port")
		// The cure by marks: each connection has that of its uplink, and its answers get it back before they are routed.
		h.ns.Run(t, "sh", "-ec", "nft add table ip marks; nft 'add chain ip marks pre { type filter hook prerouting priority -150; }'; nft add rule ip marks pre iifname wan1 ct mark set 7; nft add rule ip marks pre iifname docker0 meta mark set ct mark")
		h.waitDiagnosis("", "published-port")
		h.ns.IP(t, "rule add pref 8000 fwmark 7 lookup "+h.tableOf("10.78.0.2"))
		h.waitDiagnosis("", "table-shared")
	})
}

// TestDoctorMTU: a router that drops large packets and says nothing.
func TestDoctorMTU(t *testing.T) {
	u := newHost(t).behind(routed(0), routed(1))
	u.ns.Sysctl(t, "net/ipv4/ping_group_range", "0 0")
	u.serve()
	u.watch()
	for n, isp := range u.isps {
		u.ns.Batch(t, fmt.Sprintf("address add 10.%d.0.2/24 dev %s", n+1, isp.ifname), fmt.Sprintf("route add default via %s dev %s metric %d", isp.gateway, isp.ifname, 100+n))
	}
	u.waitStatus("10.1.0.2", "ok", "")
	u.waitStatus("10.2.0.2", "ok", "")
	wait := func(code int, want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("doctor says %q", want), func() error {
			r := u.run(bin(t, clientBin), "doctor", "--only", "mtu", "--target", internet)
			for _, text := range want {
				if r.code != code || !strings.Contains(r.stdout, text) {
					return fmt.Errorf("%+v", r)
				}
			}
			return nil
		})
	}
	wait(0, "1 checks found nothing")
	u.isps[1].ns.Run(t, "nft", "add rule inet provider raw meta length > 1400 drop")
	u.isps[1].ns.Run(t, "nft", "insert rule inet provider raw iifname lan meta length > 1400 drop")
	wait(1, "warning  mtu", "by wan1 are lost", "ip link set wan1 mtu 1400")
	if r := u.run(bin(t, clientBin), "doctor"); strings.Contains(r.stdout, "mtu") {
		t.Errorf("a check that sends packets runs though nobody named it: %+v", r)
	}
	u.ns.IP(t, "link set wan1 mtu 1400")
	wait(0, "1 checks found nothing")
	if r := u.run(bin(t, clientBin), "doctor", "--only", "mtu"); r.code != 0 || !strings.Contains(r.stdout, "unseen   mtu") || !strings.Contains(r.stdout, "--target") {
		t.Errorf("without a target: %+v", r)
	}
	if r := u.run(bin(t, clientBin), "doctor", "--only", "mtu", "--target", "example.org"); r.code != 2 || r.stdout != "" {
		t.Errorf("a target that is no address: %+v", r)
	}
}
