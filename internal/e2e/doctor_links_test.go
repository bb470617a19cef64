package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestDoctorLinks: what needs the far end, another link or another holder.
func TestDoctorLinks(t *testing.T) {
	for _, c := range []struct {
		name  string
		check func(*testing.T)
	}{
		{"carrier", doctorCarrier},
		{"dad", doctorDad},
		{"rp-filter", doctorRPFilter},
		{"server-stopped", doctorServerStopped},
		{"rule-orphan of a watch that was killed", doctorRuleOfKilled},
		{"rule-orphan of an address on two links, one of which is served", doctorRuleOfTwins},
		{"hook-without-server", doctorHookWithoutServer},
		{"main-default-back", doctorMainDefaultBack},
		{"excluded", doctorExcluded},
		{"networks", doctorNetworks},
		{"networks, main first", doctorMainFirst},
		{"tables that the caller fills", doctorCallersTables},
		{"leases", doctorLeases},
		{"leases of another version", doctorLeasesOfOther},
		{"no-lease", doctorNoLease},
		{"left-out", doctorLeftOut},
		{"device-bound-guard", doctorDeviceBoundGuard},
		{"dnsmasq", doctorDnsmasq},
		{"udp-any", doctorUDPAny},
		{"marks", doctorMarks},
	} {
		t.Run(c.name, c.check)
	}
}

func doctorCarrier(t *testing.T) {
	h := twoUplinks(t)
	h.isp.IP(t, "link set wan1 down")
	h.waitDiagnosis("", "carrier")
	h.isp.IP(t, "link set wan1 up")
	h.waitDiagnosis("")
	h.ns.IP(t, "link set wan1 down")
	h.waitStatus("10.78.0.2", "link-down", "link down")
	if names, text := h.diagnosis(""); !slices.Contains(names, "carrier") {
		t.Errorf("of a link that is down: %s", text)
	}
	h.ns.Batch(t, "link set wan1 up", "address replace 2001:db8:78::2/64 dev wan1 nodad", "route replace default via 10.78.0.1 dev wan1 metric 200",
		"route replace default via 2001:db8:78::1 dev wan1 metric 200")
	h.waitDiagnosis("")
}

func doctorDad(t *testing.T) {
	h := twoUplinks(t)
	h.isp.IP(t, "address add 2001:db8:79::2/64 dev wan1 nodad")
	h.ns.IP(t, "address add 2001:db8:79::2/64 dev wan1")
	h.waitDiagnosis("", "dad")
	h.ns.IP(t, "address del 2001:db8:79::2/64 dev wan1")
	h.waitDiagnosis("")
}

func doctorRPFilter(t *testing.T) {
	h := newHost(t) // not served: the source rule would let packets in
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.waitDiagnosis("")
	h.ns.Sysctl(t, "net/ipv4/conf/wan1/rp_filter", "1")
	h.waitDiagnosis("", "rp-filter")
	h.ns.Sysctl(t, "net/ipv4/conf/wan1/rp_filter", "2")
	h.waitDiagnosis("")
}

func doctorServerStopped(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	server := h.serve()
	h.watch()
	h.waitDiagnosis("")
	server.kill()
	h.waitDiagnosis("", "server-stopped")
	for dir, cure := range map[string]string{
		"/run": "start the service table-allocator-server; the log of table-allocator-server", "/run/openrc": "rc-service table-allocator-server start",
		"/run/systemd/system": "systemctl start table-allocator-server; journalctl -u table-allocator-server",
	} {
		if _, text := h.diagnosis("mount -t tmpfs run /run; mkdir -p " + dir); !strings.Contains(text, cure) {
			t.Errorf("the cure is not %q where there is %s:\n%s", cure, dir, text)
		}
	}
	h.restart()
	h.waitDiagnosis("")
}

func doctorRuleOfKilled(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.serve()
	watch := h.watch()
	h.served("10.77.0.2")
	watch.kill()
	h.waitDiagnosis("", "rule-orphan")
	h.watch()
	h.waitDiagnosis("")
}

func doctorRuleOfTwins(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0")
	if r := h.run(bin(t, clientBin), "doctor", "--only", "rule-orphan"); r.code != 0 {
		t.Errorf("%+v", r)
	}
}

func doctorHookWithoutServer(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	installed := func(dir string) string {
		return fmt.Sprintf("mkdir -p %[1]s; mount -t tmpfs none %[1]s; touch %[1]s/table-allocator", dir)
	}
	h.waitDiagnosis("")
	h.waitDiagnosis(installed("/etc/network/if-up.d"), "hook-without-server")
	h.waitDiagnosis(installed("/usr/lib/NetworkManager/dispatcher.d"), "hook-without-server") // where packages have it
	h.serve()
	h.waitDiagnosis(installed("/etc/network/if-up.d"))
}

func doctorMainDefaultBack(t *testing.T) {
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
}

func doctorExcluded(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	if r := h.run(bin(t, clientBin), "doctor", "--exclude", "wan0", "--only", "excluded,dad"); r.code != 3 || !strings.Contains(r.stdout, "excluded") {
		t.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	h.waitDiagnosis("")
}

func doctorNetworks(t *testing.T) {
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
}

func doctorMainFirst(t *testing.T) {
	h := twoUplinks(t, "--specific-first") // as doctor says: packets to wan1's network leave by wan1 then, whatever their source
	h.ns.IP(t, "address add 10.78.0.66/16 dev wan0")
	h.served("10.78.0.66")
	h.waitDiagnosis("")
}

func doctorCallersTables(t *testing.T) {
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
}

func doctorLeases(t *testing.T) {
	h := newHost(t)
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1")
	h.serve()
	text, err := os.ReadFile(bin(t, clientBin))
	if err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(h.dir, clientBin)
	if err := nettest.WriteExecutable(old, text); err != nil {
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
}

func doctorLeasesOfOther(t *testing.T) {
	h := newHost(t)
	h.link("wan1", "10.78.0.2/24")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1")
	h.serve()
	other := filepath.Join(h.dir, clientBin)
	// By another process: a descriptor to write it would be inherited by what runs beside, and the file be busy.
	h.ns.Run(t, "sh", "-ec", `cp "$1" "$2" && printf '\0' >>"$2"`, "sh", bin(t, clientBin), other)
	p := h.start(exec.Command(other, "watch", "--clean"))
	h.served("10.78.0.2")
	h.waitDiagnosis("", "leases")
	p.stop()
	h.watch()
	h.waitDiagnosis("")
}

func doctorNoLease(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.serve(`"num_tables":1`)
	h.watch()
	h.waitDiagnosis("", "pool")
	h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
	h.waitDiagnosis("", "no-lease", "pool")
	h.ns.IP(t, "address del 10.77.0.3/24 dev wan0")
	h.waitDiagnosis("", "pool")
}

func doctorLeftOut(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	file := func(pattern string) string { return h.watchFile(`{"links": [{"ifname": "` + pattern + `"}]}`) }
	if r := h.run(bin(t, clientBin), "doctor", "-c", file("wwan*")); r.code != 0 || !strings.Contains(r.stdout, "note     left-out") {
		t.Errorf("%+v", r)
	}
	if r := h.run(bin(t, clientBin), "doctor", "-c", file("wan*")); r.code != 0 || strings.Contains(r.stdout, "left-out") {
		t.Errorf("%+v", r)
	}
}

func doctorDeviceBoundGuard(t *testing.T) {
	h := twoUplinks(t, "--on-loss", "block")
	p := h.start(exec.Command("socat", "-u", "UDP4-RECV:5300,bind=10.78.0.2,so-bindtodevice=wan1", "OPEN:/dev/null,wronly"))
	h.waitDiagnosis("")
	h.ns.IP(t, "route del default via 10.78.0.1")
	h.waitDiagnosis("", "table-empty", "device-bound-guard")
	p.kill()
	h.waitDiagnosis("", "table-empty")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 200")
	h.waitDiagnosis("")
}

func doctorDnsmasq(t *testing.T) {
	h := twoUplinks(t)
	const file = "/run/table-allocator/dnsmasq.servers"
	files := "mount -t tmpfs none /run; mkdir /run/table-allocator; touch " + file
	h.waitDiagnosis(files)
	dnsmasq := []string{"dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=5399", "--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file="}
	p := h.start(exec.Command(dnsmasq[0], dnsmasq[1:]...))
	h.waitDiagnosis(files, "dns")
	p.kill()
	h.start(exec.Command(dnsmasq[0], append(dnsmasq[1:], "--servers-file="+file)...))
	h.waitDiagnosis(files)
}

func doctorUDPAny(t *testing.T) {
	h := twoUplinks(t)
	p := h.start(exec.Command("socat", "UDP4-LISTEN:5300", "STDOUT"))
	h.waitDiagnosis("", "udp-any")
	p.kill()
	h.waitDiagnosis("")
}

func doctorMarks(t *testing.T) {
	h := twoUplinks(t)
	h.ns.Batch(t, "rule add pref 9003 fwmark 0x2000000/0xff000000 unreachable protocol 116", "rule add pref 30000 fwmark 0x1000000/0x3000000 lookup main")
	h.waitDiagnosis("", "marks")
	h.ns.IP(t, "rule del pref 30000")
	h.waitDiagnosis("")
}
