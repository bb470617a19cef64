package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestChoiceSeen: status, uplinks, explain and doctor say which uplink is used and why, and what stands against that.
func TestChoiceSeen(t *testing.T) {
	c := newChooser(t, `{"ifname": "wan0", "rank": 1}, {"ifname": "wan1", "rank": 2}`)
	client := func(args ...string) result { return c.run(bin(t, clientBin), args...) }
	c.waitUsed("wan0")
	c.waitDiagnosis("")
	row := func(addr string) string {
		for _, line := range lines(client("status").stdout) {
			if f := strings.Fields(line); len(f) > 1 && f[1] == addr {
				return strings.Join(f, " ")
			}
		}
		return ""
	}
	if r := client("status"); r.code != 0 || !slices.ContainsFunc(lines(r.stdout), func(l string) bool {
		return strings.Join(strings.Fields(l), " ") == "IFNAME ADDRESS TABLE LEFT MODE PID PROBE RTT LOSS SINCE STATE GATEWAY"
	}) {
		t.Errorf("status: %+v", r)
	}
	for addr, want := range map[string]string{"10.1.0.2": " alive* ", "10.2.0.2": " alive ", "fd01::2": " alive* "} {
		if got := row(addr); !strings.Contains(got, want) || !strings.Contains(got, "ms ") {
			t.Errorf("status of %s is %q, want%q", addr, got, want)
		}
	}
	if r := client("uplinks"); !strings.Contains(r.stdout, "not used: rank 2, wan0 has 1") {
		t.Errorf("uplinks: %+v", r)
	}
	if r := client("explain", internet); r.code != 0 || !strings.Contains(r.stdout, "(ours, the chosen uplink)") {
		t.Errorf("explain: %+v", r)
	}
	c.fault(1, noInternet)
	c.waitState("wan1", "inet", "dead")
	c.waitDiagnosis("", "uplink-dead")
	if got := row("10.2.0.2"); !strings.Contains(got, " dead - 100% ") {
		t.Errorf("status is %q", got)
	}
	c.mend(1)
	c.waitDiagnosis("")
	c.ns.IP(t, "route add default via 10.2.0.1 dev wan1")
	c.waitDiagnosis("", "choice-shadowed")
	c.ns.IP(t, "route del default via 10.2.0.1 dev wan1 metric 0")
	c.waitDiagnosis("")
	c.ns.Sysctl(t, "net/ipv4/ping_group_range", "1 0") // the kernel's default
	c.waitDiagnosis("", "probes")
	c.ns.Sysctl(t, "net/ipv4/ping_group_range", "0 0")
	c.waitDiagnosis("")
	// The events have the choices.
	c.fault(0, noInternet)
	eventually(t, "history has the choice", func() error {
		r := client("history")
		for _, want := range []string{"unbound traffic of inet leaves by wan1, not wan0: the only one that works", "uplink is dead, before alive"} {
			if !strings.Contains(r.stdout, want) {
				return fmt.Errorf("%+v", r)
			}
		}
		return nil
	})
}

// TestChoiceUnprobed: a link that a user wants is used whether it works or not, which doctor says.
func TestChoiceUnprobed(t *testing.T) {
	h := twoUplinks(t)
	h.waitDiagnosis("")
	if r := h.run(bin(t, clientBin), "uplinks", "use", "wan1", "-4"); r.code != 0 {
		t.Fatalf("uplinks use: %+v", r)
	}
	h.waitDiagnosis("", "choice-unprobed")
	var report struct {
		Unbound []struct{ Family, Chosen, Why string }
		Uplinks []struct{ Probe *struct{} }
	}
	r := h.run(bin(t, clientBin), "status", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.Unbound) != 2 || report.Unbound[0].Chosen != "wan1" || report.Unbound[1].Chosen != "" {
		t.Errorf("status: %+v (%v)", r, err)
	}
	for _, u := range report.Uplinks {
		if u.Probe != nil {
			t.Errorf("nothing is probed, and status says %s", r.stdout)
		}
	}
	if r := h.run(bin(t, clientBin), "uplinks", "use", "auto"); r.code != 0 {
		t.Fatalf("uplinks use auto: %+v", r)
	}
	h.waitDiagnosis("")
}

// TestChoiceReload: a configuration that is wrong changes nothing, and one that is right loses no state.
func TestChoiceReload(t *testing.T) {
	c := newChooserHost(t, routed(0), routed(1))
	for n := range c.isps {
		c.address(n)
	}
	config := chooserConfig(copyLinks, `"hold": 1000`, `"hold_max": 2000`)
	file := c.watchFile(config)
	c.watch = c.uplinks.watch("--config", file)
	c.waitUsed("wan0")
	before, known := c.switches(), strings.Count(c.watch.log.String(), ": uplink is ")
	for _, tt := range []struct{ config, log string }{
		{strings.Replace(config, `"up": 3`, `"up": 0`, 1), "cannot read the configuration"},
		{strings.Replace(config, `"down": 4`, `"down": 5`, 1), "configuration read again"},
	} {
		if err := os.WriteFile(file, []byte(tt.config), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := c.watch.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		c.watch.waitLog(tt.log)
		c.waitAsked("wan0", 2)
		if at, n := c.used(), c.switches(); at != "inet wan0, inet6 wan0" || n != before {
			t.Errorf("after %q unbound traffic uses %q, %d switches", tt.log, at, n-before)
		}
	}
	if n := strings.Count(c.watch.log.String(), ": uplink is "); n != known {
		t.Errorf("the states have changed %d times", n-known)
	}
}
