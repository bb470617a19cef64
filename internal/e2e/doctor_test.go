package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// diagnosis runs doctor in a shell, after a script, and returns the names of what it found, once each. The script may
// change files: it has mounts of its own.
func (h *host) diagnosis(script string) (names []string, text string) {
	h.t.Helper()
	r := h.run("unshare", "-m", "sh", "-ec", script+"\nexec "+bin(h.t, clientBin)+" doctor --json")
	var d struct {
		Fine     int
		Findings []struct{ Name, Severity, What, Evidence, Cure string }
	}
	if err := json.Unmarshal([]byte(r.stdout), &d); err != nil {
		h.t.Fatalf("doctor: exit code %d, %v\n%s%s", r.code, err, r.stdout, r.stderr)
	}
	code := 0
	for _, f := range d.Findings {
		code = max(code, map[string]int{"error": 3, "warning": 1}[f.Severity])
		if f.What == "" || f.Evidence == "" || f.Cure == "" {
			h.t.Errorf("%+v", f)
		}
		if !slices.Contains(names, f.Name) {
			names = append(names, f.Name)
		}
	}
	if r.code != code {
		h.t.Errorf("exit code %d, want %d:\n%s", r.code, code, r.stdout)
	}
	return names, r.stdout
}

// cures are what doctor says to do, if all of that is commands, as somebody would paste them.
func (h *host) cures() (cures []string) {
	h.t.Helper()
	for _, line := range lines(h.run(bin(h.t, clientBin), "doctor").stdout) {
		do, found := strings.CutPrefix(strings.TrimSpace(line), "do ")
		switch do = strings.TrimSpace(do); {
		case !found || slices.Contains(cures, do):
		case strings.HasPrefix(do, "ip "), strings.HasPrefix(do, "sysctl -w "):
			cures = append(cures, do)
		default:
			return nil
		}
	}
	return cures
}

// waitDiagnosis waits until doctor finds exactly what has these names.
func (h *host) waitDiagnosis(script string, want ...string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("doctor finds %q", want), func() error {
		names, text := h.diagnosis(script)
		if fmt.Sprint(names) != fmt.Sprint(want) {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
}

// TestDoctor: silent on a host where all is well; after each provocation it finds this and nothing else, and after the cure
// nothing.
func TestDoctor(t *testing.T) {
	// A link to containers, which a watch leaves alone.
	const inside = "ip link add docker0 type veth peer name veth0; ip link set docker0 up; ip link set veth0 up; "
	for _, tt := range []struct {
		name          string
		watch         string
		provoke, cure string // scripts; $T1 is the table of 10.78.0.2
		files         string // a script that changes files for doctor alone
	}{
		{name: "rule-before-ours", provoke: "ip route add default via 10.77.0.1 dev wan0 table 200; ip rule add pref 5270 lookup 200", cure: "ip rule del pref 5270"},
		{name: "rule-before-ours", provoke: "ip route add 203.0.113.0/24 via 10.77.0.1 dev wan0 table 200; ip rule add pref 5270 to 203.0.113.0/24 lookup 200", cure: "ip rule del pref 5270"},
		{name: "rule-before-ours", provoke: "ip route add default via 10.77.0.1 dev wan0 table 200; ip rule add pref 5270 fwmark 7 lookup 200; nft add table ip t; nft 'add chain ip t out { type route hook output priority -150; }'; nft add rule ip t out tcp dport 443 meta mark set 7", cure: "nft delete table ip t"},
		{name: "rule-before-ours", provoke: "ip route add default via 10.77.0.1 dev wan0 table 200; ip rule add pref 5270 fwmark 0x40000/0xff0000 lookup 200; nft add table ip t; nft 'add chain ip t marks'; nft 'add chain ip t out { type route hook output priority -150; }'; nft add rule ip t out jump marks; nft add rule ip t marks tcp dport 443 meta mark set mark and 0xff00ffff or 0x40000", cure: "nft delete table ip t"},
		{name: "rule-before-ours", provoke: "ip route add 203.0.113.0/24 via 10.77.0.1 dev wan0; ip rule add pref 5270 lookup main suppress_prefixlength 0", cure: "ip rule del pref 5270"},
		{name: "filter", provoke: "nft add table inet t; nft 'add chain inet t out { type filter hook output priority 0; policy drop; }'; nft add rule inet t out oifname '{ lo, wan0 }' accept; nft add rule inet t out ct state established,related accept; nft add table netdev t; nft 'add chain netdev t out { type filter hook egress device wan1 priority 0; policy drop; }'", cure: "nft add rule inet t out oifname wan1 accept; nft delete table netdev t"},
		{name: "filter", provoke: "nft add table inet t; nft 'add chain inet t in { type filter hook input priority 0; }'; nft add rule inet t in iifname wan1 counter drop; nft 'add chain inet t out { type filter hook output priority 0; }'; nft add rule inet t out ip saddr 10.78.0.2 reject", cure: "nft delete table inet t"},
		{name: "bridge-port", provoke: "ip link add br0 type bridge; ip link set br0 up; ip link set wan1 master br0", cure: "ip link set wan1 nomaster"},
		{name: "delegated-prefix", provoke: "ip -6 route add unreachable 2001:db8:78:f0::/60 proto dhcp", cure: "ip -6 route del unreachable 2001:db8:78:f0::/60"},
		{name: "table-local", provoke: "ip rule add pref 32765 lookup local; ip rule del pref 0", cure: "ip rule add priority 0 lookup local"},
		{name: "table-local", provoke: "ip -6 route del local 2001:db8:78::2 dev wan1 table local", cure: "ip -6 route add local 2001:db8:78::2 dev wan1 table local"},
		{name: "rule-main", provoke: "ip rule del pref 32766", cure: "ip rule add priority 32766 lookup main"},
		{name: "table-empty", provoke: "ip route del default dev wan1", cure: "ip route add default via 10.78.0.1 dev wan1 metric 200"},
		{name: "table-empty", watch: "--on-loss block", provoke: "ip -6 route del default dev wan1", cure: "ip -6 route add default via 2001:db8:78::1 dev wan1 metric 200"},
		{name: "table-shared", provoke: "ip route add 203.0.113.0/24 via 10.78.0.1 dev wan1 table $T1", cure: "ip route del 203.0.113.0/24 table $T1"},
		{name: "table-shared", provoke: "ip rule add pref 30000 fwmark 1 lookup $T1", cure: "ip rule del pref 30000"},
		{name: "rule-uid0", provoke: "sysctl -qw net.ipv4.ip_forward=1; ip rule add pref 30000 uidrange 0-0 lookup main", cure: "ip rule del pref 30000"},
		{name: "rule-sport", provoke: "ip rule add pref 30000 ipproto tcp sport 8080 lookup main", cure: "ip rule del pref 30000"},
		{name: "rule-detached", provoke: "ip rule add pref 30000 iif nope0 lookup main protocol 116", cure: "ip rule del pref 30000"},
		{name: "rule-orphan", provoke: "ip rule add pref 10000 from 10.99.0.1 lookup 10039 protocol 116", cure: "ip rule del pref 10000 from 10.99.0.1"},
		{name: "rules-many", provoke: "for i in $(seq 1001 1501); do echo rule add pref $i from 203.0.113.7 lookup main; done | ip -batch -", cure: "for i in $(seq 1001 1501); do echo rule del pref $i; done | ip -batch -"},
		{name: "src-valid-mark", provoke: "sysctl -qw net.ipv4.conf.all.src_valid_mark=1; ip rule add pref 30000 fwmark 1 lookup main", cure: "sysctl -qw net.ipv4.conf.all.src_valid_mark=0"},
		{name: "duplicate", provoke: "ip address add 10.66.0.1/32 dev wan0 scope host; ip address add 10.66.0.1/32 dev lo", cure: "ip address del 10.66.0.1/32 dev wan0; ip address del 10.66.0.1/32 dev lo"},
		{name: "snat-fixed", provoke: "nft add table ip nat; nft 'add chain ip nat out { type nat hook postrouting priority 100; }'; nft add rule ip nat out oifname wan1 snat to 10.78.0.2", cure: "nft delete table ip nat"},
		{name: "table-name", files: "mount -t tmpfs none /etc/iproute2 || { mkdir -p /etc/iproute2; mount -t tmpfs none /etc/iproute2; }; echo \"$T1 mullvad\" >/etc/iproute2/rt_tables"},
		{name: "ifupdown2", files: "mount -t tmpfs none /usr/share; mkdir /usr/share/ifupdown2; mount -t tmpfs none /etc/network; mkdir /etc/network/if-up.d; touch /etc/network/if-up.d/table-allocator"},
		{name: "accept-ra", provoke: "ip address add 2001:db8:79::2/64 dev wan1 nodad valid_lft 1000 preferred_lft 1000; sysctl -qw net.ipv6.conf.wan1.forwarding=1 net.ipv6.conf.wan1.accept_ra=1", cure: "sysctl -qw net.ipv6.conf.wan1.accept_ra=2"},
		{name: "unbound-shadowed", watch: "--routes move", provoke: inside + "ip route add default dev docker0 metric 50", cure: "ip route del default dev docker0"},
		{name: "unbound-shadowed", watch: "--routes move", provoke: inside + "ip -6 route add default dev docker0 metric 50"},
		{name: "main-default-kept", watch: "--routes move", provoke: "ip route add unreachable default metric 4000"},
		{name: "main-default-kept", watch: "--routes move", provoke: "ip -6 route add blackhole default metric 4000"},
		{name: "mark-nowhere", watch: "--routes move", provoke: "ip rule add pref 32800 unreachable", cure: "ip rule del pref 32800"},
		{name: "mark-nowhere", watch: "--routes move", provoke: "ip route add unreachable default table default metric 4096", cure: "ip route del unreachable default table default metric 4096"},
		{name: "mark-nowhere", watch: "--routes move", provoke: "ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main; ip rule add pref 5250 fwmark 0x80000/0xff0000 unreachable",
			cure: "ip rule del pref 5250"}, // as Tailscale has it
		{name: "rp-filter-forward", provoke: inside + "ip address add 10.99.0.1/24 dev docker0; sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.wan1.rp_filter=1", cure: "sysctl -qw net.ipv4.conf.wan1.rp_filter=2"},
		{name: "forward", provoke: inside + "ip address add 10.99.0.1/24 dev docker0; sysctl -qw net.ipv4.ip_forward=1; nft add table ip f; nft 'add chain ip f drops { type filter hook forward priority 0; policy drop; }'; nft add rule ip f drops oifname wan0 accept",
			cure: "nft add rule ip f drops oifname wan1 accept"},
		{name: "published-port", provoke: inside + "ip address add 10.99.0.1/24 dev docker0; sysctl -qw net.ipv4.ip_forward=1; nft add table ip nat; nft 'add chain ip nat pre { type nat hook prerouting priority -100; }'; nft add rule ip nat pre tcp dport 8080 dnat to 10.99.0.2:80",
			cure: "nft delete table ip nat"},
		{name: "mptcp-endpoints", provoke: inside + "ip mptcp endpoint add 10.99.0.1 dev docker0 subflow", cure: "ip mptcp endpoint flush"},
		{name: "dns", files: "mount -t tmpfs none /run; mkdir /run/table-allocator; echo server=203.0.113.53@10.78.0.2 >/run/table-allocator/dnsmasq.servers; echo nameserver 203.0.113.53 >/run/resolv.conf; [ -e /etc/resolv.conf ] || touch /etc/resolv.conf; mount --bind /run/resolv.conf /etc/resolv.conf"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := twoUplinks(t, strings.Fields(tt.watch)...)
			replace := strings.NewReplacer("$T1", h.tableOf("10.78.0.2"), "$CLIENT", bin(t, clientBin))
			h.waitDiagnosis("")
			if tt.provoke != "" {
				h.ns.Run(t, "sh", "-ec", replace.Replace(tt.provoke))
			}
			h.waitDiagnosis(replace.Replace(tt.files), tt.name)
			if cures := h.cures(); len(cures) > 0 {
				h.ns.Run(t, "sh", "-ec", strings.Join(cures, "\n"))
			} else if tt.cure != "" {
				h.ns.Run(t, "sh", "-ec", replace.Replace(tt.cure))
			}
			h.waitDiagnosis("")
		})
	}
}

// TestDoctorMarks: marks that packets of this host do not get, and those of single sockets, are no reason for a finding.
func TestDoctorMarks(t *testing.T) {
	h := twoUplinks(t)
	h.ns.Run(t, "sh", "-ec", `ip route add default via 10.77.0.1 dev wan0 table 52
		ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main; ip rule add pref 5230 fwmark 0x80000/0xff0000 lookup default
		ip rule add pref 5250 fwmark 0x80000/0xff0000 unreachable
		nft add table ip filter; nft 'add chain ip filter ts-forward'; nft 'add chain ip filter FORWARD { type filter hook forward priority 0; }'
		nft add rule ip filter FORWARD jump ts-forward; nft add rule ip filter ts-forward iifname tailscale0 meta mark set mark and 0xff00ffff xor 0x40000
		nft 'add chain ip filter OUTPUT { type route hook output priority -150; }'; nft add rule ip filter OUTPUT meta mark set ct mark
		ip rule add pref 100 fwmark 1 lookup 100; ip route add local default dev lo table 100
		nft 'add chain ip filter PREROUTING { type filter hook prerouting priority -150; }'; nft add rule ip filter PREROUTING tcp dport 80 meta mark set 1
		nft 'add chain ip filter KUBE-OUTPUT { type nat hook output priority -100; }'; nft add rule ip filter KUBE-OUTPUT meta mark set mark or 0x4000
		ip rule add pref 110 fwmark 0x4000/0x4000 lookup 52`)
	h.waitDiagnosis("")
}

// TestDoctorBound: what is bound to a link that cannot be bound as a whole, and network namespaces that miss something.
func TestDoctorBound(t *testing.T) {
	c := newNamespaces(t)
	find := func(want bool, name string) {
		t.Helper()
		eventually(t, fmt.Sprintf("doctor finds %s: %v", name, want), func() error {
			if r := c.do("doctor", "--only", name); strings.Contains(r.stdout, " "+name+" ") != want {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	}
	find(false, "namespaces")
	c.sh(bin(t, clientBin) + " netns add work --ifname wan1 --resolv 192.0.2.53")
	find(false, "namespaces")
	c.sh("ip link del $(ip -o link | grep -o 'tav[0-9]*' | head -1)")
	find(true, "namespaces")
	c.sh(bin(t, clientBin) + " netns del work")
	find(false, "namespaces")

	program := filepath.Join(c.dir, "sleeper")
	source := program + ".go"
	if err := os.WriteFile(source, []byte("package main\n\nimport \"time\"\n\nfunc main() { time.Sleep(time.Hour) }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", program, source)
	build.Env = append(os.Environ(), "GOARCH=386", "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	find(false, "program-32bit")
	p := c.start(c.here(bin(t, clientBin), "run", "wan1", program))
	find(true, "program-32bit")
	if r := c.do("bound"); !strings.Contains(r.stdout, "(sleeper) 32-bit: options that it sets are not seen") {
		t.Errorf("bound: %+v", r)
	}
	if r := c.do("bound", "--json"); !strings.Contains(r.stdout, `"name":"sleeper","bits":32}`) {
		t.Errorf("bound --json: %+v", r)
	}
	p.kill()
	find(false, "program-32bit")
}

// TestDoctorList: names and severities are frozen, each check is in the manual page, and each but those of the list below
// is provoked by a test.
func TestDoctorList(t *testing.T) {
	h := newHost(t)
	frozen := `
error server-stopped
error hook-without-server
error main-default-back
error table-empty
error table-gateway
error rule-missing
error rp-filter
error networkd-dropin
error dad
error accept-ra
error excluded
error no-lease
error namespaces
error bridge-port
error table-local
warning gateway-silent
warning filter
warning rule-before-ours
warning rule-main
warning rule-in-front
warning lock-missing
warning overlap
warning arp-flux
warning table-shared
warning rule-orphan
warning rule-uid0
warning rule-sport
warning carrier
warning duplicate
warning snat-fixed
warning marks
warning leases
warning rules-many
warning uplink-dead
warning mark-nowhere
warning choice-shadowed
note main-default-kept
note choice-unprobed
note probes
warning rp-filter-forward
warning forward
warning dns
warning delegated-prefix
note same-subnet
note rule-detached
note table-name
note src-valid-mark
note udp-any
note ifupdown2
note unbound-shadowed
note published-port
note device-bound-guard
note mptcp-endpoints
note program-32bit
note left-out
note namespace-unsure
warning pool
error database
note conntrack-zones
note kernel-features
warning mtu`
	got := lines(h.run(bin(t, clientBin), "doctor", "--list").stdout)
	if diff := unordered(got, lines(frozen)); diff != "" {
		t.Errorf("checks: %s", diff)
	}
	page := strings.ReplaceAll(readFile(t, "../../packaging/man/table-allocator-explain.8"), `\-`, "-")
	for _, line := range got {
		if _, name, _ := strings.Cut(line, " "); !strings.Contains(page, "\n"+name+"|") {
			t.Errorf("the manual page does not tell of %s", name)
		}
	}
	for _, args := range [][]string{{"--only", "rp-filters"}, {"wna0"}} {
		if r := h.run(bin(t, clientBin), append([]string{"doctor"}, args...)...); r.code != 2 || r.stdout != "" {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q", args, r.code, r.stdout, r.stderr)
		}
	}
	user := h.clientWith(asStranger, "doctor")
	if user.code > 1 {
		t.Errorf("as a user: exit code %d, stdout %q, stderr %q", user.code, user.stdout, user.stderr)
	}
}
