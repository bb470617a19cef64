package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestChoiceRun: without a watch `uplinks --run` probes what clients serve, and keeps unbound traffic on an uplink that works. One
// process does that: another one is refused, and a watch that begins later chooses when it has ended, also for what clients serve.
func TestChoiceRun(t *testing.T) {
	t.Parallel()
	for mode, links := range map[string]string{"copy": copyLinks, "move": moveLinks} {
		t.Run(mode, func(t *testing.T) {
			c := newChooserHost(t, routed(0), routed(1))
			file := c.watchFile(strings.Replace(chooserConfig(links), "{", `{"reconcile_seconds": 1, `, 1))
			choose := func(more ...string) *process {
				p := c.start(c.command(append([]string{"uplinks", "--run", "--debug", "--config", file}, more...)...))
				p.waitLog("choosing the uplink of unbound traffic")
				return p
			}
			c.watch = choose()
			for n := range c.isps {
				c.address(n)
				inet, inet6 := at(n)
				c.lease(inet, fmt.Sprint("wan", n), "--routes", mode)
				c.lease6(inet6, fmt.Sprint("wan", n), "--routes", mode)
			}
			c.waitUsed("wan0")
			c.waitUnbound(0)
			c.fault(0, noInternet)
			c.waitUnbound(1)
			if inMain := c.mainRoutes() != ""; inMain != (mode == "copy") {
				t.Errorf("main has %q", c.mainRoutes())
			}
			if r := c.run(bin(t, clientBin), "uplinks", "--run"); r.code != 1 || !strings.Contains(r.stderr, fmt.Sprintf("process %d chooses", c.watch.cmd.Process.Pid)) {
				t.Errorf("a second one: %+v", r)
			}
			c.mend(0)
			c.waitUnbound(0)
			if r := c.client("-4", "-a", "10.1.0.2", "-i", "wan0", "-r"); r.code != 0 {
				t.Fatalf("release: %+v", r)
			}
			c.waitUnboundOf(4, 1)
			c.wantUnbound(6, 0)
			if r := c.run(bin(t, clientBin), "status"); strings.Contains(r.stdout, "by the watch that runs") {
				t.Errorf("it is taken for a watch: %+v", r)
			}
			c.address(0)
			c.lease("10.1.0.2", "wan0", "--routes", mode)
			c.waitUnbound(0)

			run := c.watch
			c.watch = c.uplinks.watch("--config", file)
			c.watch.waitLog(fmt.Sprintf("process %d chooses", run.cmd.Process.Pid))
			c.waitUnbound(0)
			if code := run.stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			c.watch.waitLog("the process that chose the uplink of unbound traffic has ended")
			c.fault(0, noInternet)
			c.waitUnbound(1)
			c.mend(0)
			c.waitUnbound(0)
			if code := c.watch.stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			c.watch = choose("--clean")
			c.waitUsed("wan0")
			if code := c.watch.stop(); code != 0 || c.mainRoutes()+c.choiceRules() != "" {
				t.Errorf("--clean: exit code %d, %q and %q are left", code, c.mainRoutes(), c.choiceRules())
			}
			c.wantOwnOnly()
		})
	}
}
