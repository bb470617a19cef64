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
	for _, tt := range []struct {
		name          string
		watch         string
		provoke, cure string // scripts; $T1 is the table of 10.78.0.2
		files         string // a script that changes files for doctor alone
	}{
		{name: "rule-before-ours", provoke: "ip route add default via 10.77.0.1 dev wan0 table 200; ip rule add pref 5270 lookup 200", cure: "ip rule del pref 5270"},
		{name: "rule-before-ours", provoke: "ip route add 203.0.113.0/24 via 10.77.0.1 dev wan0 table 200; ip rule add pref 5270 to 203.0.113.0/24 lookup 200", cure: "ip rule del pref 5270"},
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
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := twoUplinks(t, strings.Fields(tt.watch)...)
			replace := strings.NewReplacer("$T1", h.tableOf("10.78.0.2"))
			h.waitDiagnosis("")
			if tt.provoke != "" {
				h.ns.Run(t, "sh", "-ec", replace.Replace(tt.provoke))
			}
			h.waitDiagnosis(replace.Replace(tt.files), tt.name)
			if tt.cure != "" {
				h.ns.Run(t, "sh", "-ec", replace.Replace(tt.cure))
			}
			h.waitDiagnosis("")
		})
	}
}

// TestDoctorLinks: what needs the far end, another link or another holder.
func TestDoctorLinks(t *testing.T) {
	t.Run("carrier", func(t *testing.T) {
		h := twoUplinks(t)
		h.isp.IP(t, "link set wan1 down")
		h.waitDiagnosis("", "carrier")
		h.isp.IP(t, "link set wan1 up")
		h.waitDiagnosis("")
	})
	t.Run("dad", func(t *testing.T) {
		h := twoUplinks(t)
		h.isp.IP(t, "address add 2001:db8:79::2/64 dev wan1 nodad")
		h.ns.IP(t, "address add 2001:db8:79::2/64 dev wan1")
		h.waitDiagnosis("", "dad")
		h.ns.IP(t, "address del 2001:db8:79::2/64 dev wan1")
		h.waitDiagnosis("")
	})
	t.Run("rp-filter", func(t *testing.T) {
		h := newHost(t) // not served: the source rule would let packets in
		h.link("wan0", "10.77.0.2/24")
		h.link("wan1", "10.78.0.2/24")
		h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
		h.waitDiagnosis("")
		h.ns.Sysctl(t, "net/ipv4/conf/wan1/rp_filter", "1")
		h.waitDiagnosis("", "rp-filter")
		h.ns.Sysctl(t, "net/ipv4/conf/wan1/rp_filter", "2")
		h.waitDiagnosis("")
	})
	t.Run("server-stopped", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
		server := h.serve()
		h.watch()
		h.waitDiagnosis("")
		server.kill()
		h.waitDiagnosis("", "server-stopped")
		h.restart()
		h.waitDiagnosis("")
	})
	t.Run("hook-without-server", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		hook := "mount -t tmpfs none /etc/network; mkdir /etc/network/if-up.d; touch /etc/network/if-up.d/table-allocator"
		h.waitDiagnosis("")
		h.waitDiagnosis(hook, "hook-without-server")
		h.serve()
		h.waitDiagnosis(hook)
	})
	t.Run("main-default-back", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		server := h.serve()
		p := h.watch("--routes", "move")
		h.served("10.77.0.2")
		server.kill()
		h.ns.Run(t, "ip", "link", "add", "wan1", "type", "veth", "peer", "name", "far1")
		h.ns.Batch(t, "link set far1 up", "link set wan1 up", "address add 10.78.0.2/24 dev wan1", "route add default via 10.78.0.1 dev wan1")
		eventually(t, "the default route of the new link is named", func() error {
			names, text := h.diagnosis("")
			if !slices.Contains(names, "main-default-back") {
				return fmt.Errorf("%s\n%s", text, p.log.String())
			}
			return nil
		})
		h.restart()
		eventually(t, "it has moved", func() error {
			if names, text := h.diagnosis(""); slices.Contains(names, "main-default-back") {
				return fmt.Errorf("%s", text)
			}
			return nil
		})
	})
	t.Run("excluded", func(t *testing.T) {
		h := newHost(t)
		h.link("wan0", "10.77.0.2/24")
		h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
		if r := h.run(bin(t, clientBin), "doctor", "--exclude", "wan0", "--only", "excluded,dad"); r.code != 3 || !strings.Contains(r.stdout, "excluded") {
			t.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		h.waitDiagnosis("")
	})
	t.Run("networks", func(t *testing.T) {
		h := twoUplinks(t)
		h.ns.Sysctl(t, "net/ipv4/conf/all/arp_ignore", "1")
		h.ns.IP(t, "address add 10.78.0.66/24 dev wan0")
		h.waitDiagnosis("", "same-subnet")
		h.ns.Sysctl(t, "net/ipv4/conf/all/arp_ignore", "0")
		h.waitDiagnosis("", "arp-flux")
		h.ns.IP(t, "address del 10.78.0.66/24 dev wan0")
		h.waitDiagnosis("")
		h.ns.IP(t, "address add 10.78.0.66/16 dev wan0")
		h.waitDiagnosis("", "overlap")
		h.ns.IP(t, "address del 10.78.0.66/16 dev wan0")
		h.waitDiagnosis("")
	})
	t.Run("tables that the caller fills", func(t *testing.T) {
		h := newHost(t)
		h.link("wan1", "10.78.0.2/24")
		h.ns.IP(t, "route add default via 10.78.0.1 dev wan1")
		h.serve()
		h.lease("10.78.0.2", "wan1")
		h.waitDiagnosis("")
		h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 table 10000")
		h.waitDiagnosis("", "table-gateway")
		h.ns.IP(t, "route add 10.78.0.0/24 dev wan1 table 10000")
		h.waitDiagnosis("")
		deleting := h.start(h.sh("while :; do ip rule del pref 20000 2>/dev/null; done"))
		h.waitDiagnosis("", "rule-missing")
		deleting.kill()
		h.waitDiagnosis("")
	})
	t.Run("leases", func(t *testing.T) {
		h := newHost(t)
		h.link("wan1", "10.78.0.2/24")
		h.ns.IP(t, "route add default via 10.78.0.1 dev wan1")
		h.serve()
		text, err := os.ReadFile(bin(t, clientBin))
		if err != nil {
			t.Fatal(err)
		}
		old := filepath.Join(h.dir, clientBin)
		if err := os.WriteFile(old, text, 0o755); err != nil {
			t.Fatal(err)
		}
		p := h.start(exec.Command(old, "watch", "--clean"))
		h.served("10.78.0.2")
		h.waitDiagnosis("")
		if err := os.Remove(old); err != nil {
			t.Fatal(err)
		}
		h.waitDiagnosis("", "leases")
		p.stop()
		h.watch()
		h.waitDiagnosis("")
	})
	t.Run("udp-any", func(t *testing.T) {
		h := twoUplinks(t)
		p := h.start(exec.Command("socat", "UDP4-LISTEN:5300", "STDOUT"))
		h.waitDiagnosis("", "udp-any")
		p.kill()
		h.waitDiagnosis("")
	})
	t.Run("marks", func(t *testing.T) {
		h := twoUplinks(t)
		h.ns.Batch(t, "rule add pref 9003 fwmark 0x2000000/0xff000000 unreachable protocol 116", "rule add pref 30000 fwmark 0x1000000/0x3000000 lookup main")
		h.waitDiagnosis("", "marks")
		h.ns.IP(t, "rule del pref 30000")
		h.waitDiagnosis("")
	})
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
warning rule-before-ours
warning rule-in-front
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
warning choice-shadowed
note choice-unprobed
note same-subnet
note rule-detached
note table-name
note src-valid-mark
note udp-any
note ifupdown2`
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
