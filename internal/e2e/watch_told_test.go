package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// toldFiles are the names of the files in which watches of this host keep what hooks told.
func (h *host) toldFiles() (names []string) {
	h.t.Helper()
	var stat syscall.Stat_t
	if err := syscall.Stat(h.ns.Path(), &stat); err != nil {
		h.t.Fatal(err)
	}
	dir := filepath.Join("/run/table-allocator/told", fmt.Sprint(stat.Ino))
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, os.ErrNotExist) { // written anew, or removed, while the folder was read
			continue
		}
		if err != nil {
			h.t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			h.t.Errorf("%s: mode %v", e.Name(), info.Mode())
		}
		names = append(names, filepath.Join(dir, e.Name()))
	}
	return names
}

// TestWatchRemembers: what a hook told a watch is in force after kill -9 and a start, while
// the address is the one that it was told about.
func TestWatchRemembers(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "address add 2001:db8::2/64 dev wan0 nodad")
	h.isp.IP(t, "address add 10.77.0.1/24 dev wan0")
	h.isp.IP(t, "address add 100.64.0.1/32 dev lo")
	h.serve()
	servers := filepath.Join(h.dir, "servers")
	profile := func(more string) string {
		return h.watchFile(`{"links":[{"ifname":"wan*","tag":"cable","dnsmasq_servers":"` + servers + `"` + more + `}]}`)
	}
	file := profile("")
	p := h.watch("-c", file)
	table, table6 := h.served("10.77.0.2"), h.served("2001:db8::2")
	h.lease("10.77.0.2", "wan0", "-t", "hook", "--routes", "copy", "--on-loss", "block", "--gateway", "10.77.0.1", "--metric", "7",
		"--route", "10.99.0.0/16,10.77.0.9", "--nameserver", "10.77.0.53", "--dnsmasq-servers", servers)
	h.lease6("2001:db8::2", "wan0", "-t", "hook", "--routes", "copy", "--prefix", "2001:db8:1::/56", "--gateway", "fe80::1")
	routes := []string{"10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.2",
		"default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.2 metric 7",
		"10.99.0.0/16 via 10.77.0.9 dev wan0 proto 116 src 10.77.0.2 metric 7"}
	rules := append(copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2")), awaited("10.77.0.2"))
	leases := []string{table + "|inet|wan0|10.77.0.2|hook|0", table6 + "|inet6|wan0|2001:db8::2|hook|0"}
	told := func() {
		t.Helper()
		h.waitRoutes(table, routes...)
		h.waitRules(rules...)
		h.waitLeases(leases...)
		eventually(t, "the rest is there", func() error {
			if !strings.Contains(strings.Join(h.rules6(), "\n"), "10003: from 2001:db8:1::/56 lookup "+table6) {
				return fmt.Errorf("%q", h.rules6())
			}
			if text, _ := os.ReadFile(servers); string(text) != "server=10.77.0.53@10.77.0.2\n" {
				return fmt.Errorf("%q", text)
			}
			return nil
		})
	}
	settled := func() {
		t.Helper()
		eventually(t, "the watch holds all", func() error {
			// Without what was told there is no default route, which is a fault of its own.
			r := h.run(bin(t, clientBin), "status")
			if strings.Count(r.stdout, fmt.Sprintf("  %d  ", p.cmd.Process.Pid)) != 2 || strings.Contains(r.stdout, "misses") {
				return errors.New(r.stdout + r.stderr)
			}
			return nil
		})
	}
	restart := func() {
		t.Helper()
		p.kill()
		p = h.watch("-c", file)
		settled()
	}
	told()
	stop4, stop6 := h.hear("4"), h.hear("6")
	done := h.flow("10.77.0.2:7000", "100.64.0.1:7000")
	for range 3 {
		restart()
		told()
		if code := p.stop(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		p = h.watch("-c", file)
		settled()
		told()
	}
	if sent, came := done(); sent != came {
		t.Errorf("%d packets of %d came", came, sent)
	}
	for _, stop := range []func() []string{stop4, stop6} {
		if heard := stop(); len(heard) > 0 {
			t.Errorf("rules changed: %q", heard)
		}
	}
	if files := h.toldFiles(); len(files) != 2 {
		t.Errorf("files: %q", files)
	}

	// Another profile meanwhile: what a hook said of the network stays.
	p.kill()
	profile(`,"specific_first":true`)
	p = h.watch("-c", file)
	rules = append(copyRules("10.77.0.2", "10.77.0.0/24", h.tableNumber("10.77.0.2")),
		"9998: from 10.77.0.2 lookup main suppress_prefixlength 7 proto 116")
	leases = []string{table + "|inet|wan0|10.77.0.2|cable|0", table6 + "|inet6|wan0|2001:db8::2|cable|0"}
	told()
	// Damaged, or of an address that came later, it is dropped; the address is served all the same.
	p.kill()
	for _, name := range h.toldFiles() {
		if strings.Contains(name, "2001:") {
			if err := os.WriteFile(name, []byte(`{"link":1}x`), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan0")
	p = h.watch("-c", file)
	settled()
	h.waitRoutes(table, routes[0])
	h.waitRules(rules...)
	eventually(t, "nothing is left of what was told", func() error {
		if text, _ := os.ReadFile(servers); len(text) > 0 {
			return fmt.Errorf("%q", text)
		}
		if rules := strings.Join(h.rules6(), "\n"); strings.Contains(rules, "2001:db8:1::/56") {
			return errors.New(rules)
		}
		if files := h.toldFiles(); len(files) > 0 {
			return fmt.Errorf("%q", files)
		}
		return nil
	})
	// Told again, and gone while nobody looks.
	h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1", "--nameserver", "10.77.0.53", "--dnsmasq-servers", servers)
	eventually(t, "it is kept", func() error {
		if files := h.toldFiles(); len(files) != 1 {
			return fmt.Errorf("%q", files)
		}
		return nil
	})
	p.kill()
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	p = h.watch("-c", file)
	h.waitRules()
	eventually(t, "nothing is left", func() error {
		if text, _ := os.ReadFile(servers); len(text) > 0 || len(h.toldFiles()) > 0 {
			return fmt.Errorf("%q %q", text, h.toldFiles())
		}
		return nil
	})
	p.stop()
}
