package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestChoiceStill: a watch that stood still for longer than rounds may take has learned nothing from them.
func TestChoiceStill(t *testing.T) {
	c := newChooser(t, copyLinks)
	c.waitUsed("wan0")
	before := c.switches()
	for _, still := range []time.Duration{time.Second, 4 * time.Second} { // a round may take 0.8 s
		for _, signal := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
			if err := c.watch.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			if signal == syscall.SIGSTOP {
				<-time.After(still) // which is what happens to it
			}
		}
		c.waitAsked("wan0", 10)
	}
	if n := c.switches(); n != before {
		t.Errorf("%d switches", n-before)
	}
	if strings.Contains(c.watch.log.String(), ": uplink is dead") {
		t.Errorf("an uplink is called dead:\n%s", c.watch.log.String())
	}
	c.wantUnbound(4, 0)
	c.wantUnbound(6, 0)
	c.wantOwnOnly()
}

// TestChoiceUnable: where nobody may ping and the targets are asked by ICMP alone, no uplink is dead for that, and doctor says so.
func TestChoiceUnable(t *testing.T) {
	c := newChooserHost(t, routed(0), routed(1))
	for n := range c.isps {
		c.address(n)
	}
	c.ns.Sysctl(t, "net/ipv4/ping_group_range", "1 0") // the kernel's default
	c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(copyLinks, `"kinds": ["icmp"]`)))
	for _, ifname := range []string{"wan0", "wan1"} {
		for _, family := range []string{"inet", "inet6"} {
			c.waitState(ifname, family, "off")
		}
	}
	c.waitDiagnosis("", "probes")
	c.waitUnbound(0)
	if strings.Contains(c.watch.log.String(), "uplink is dead") {
		t.Errorf("an uplink is called dead:\n%s", c.watch.log.String())
	}
	if r := c.run(bin(t, clientBin), "uplinks"); !strings.Contains(r.stdout, "off (not probed: this process cannot ask: socket: permission denied)") {
		t.Errorf("uplinks: %+v", r)
	}
	c.ns.Sysctl(t, "net/ipv4/ping_group_range", "0 0")
	c.waitUsed("wan0")
	c.waitDiagnosis("")
	c.fault(0, noInternet)
	c.waitUnbound(1)
	// While an uplink is dead, it is forbidden again. Nobody can learn then that it works.
	c.ns.Sysctl(t, "net/ipv4/ping_group_range", "1 0")
	for _, family := range []string{"inet", "inet6"} {
		c.waitState("wan1", family, "off")
		c.waitState("wan0", family, "dead")
	}
	c.waitDiagnosis("", "uplink-dead", "probes")
	c.wantUnbound(4, 1)
	c.wantUnbound(6, 1)
	c.wantOwnOnly()
}

// TestChoiceOneNetwork: targets that may all fail together, while the uplinks work, are a note of doctor.
func TestChoiceOneNetwork(t *testing.T) {
	near := netip.MustParseAddr(internet).Next().String()
	c := newChooser(t, copyLinks, fmt.Sprintf(`"targets": [%q, %q, %q, %q]`, internet, near, internet6, second6))
	c.waitUsed("wan0")
	c.waitDiagnosis("", "probes")
}
