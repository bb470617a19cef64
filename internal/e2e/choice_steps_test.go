package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// TestChoiceKilledAtSteps: a watch that is killed at any step of a switch leaves one that the next watch makes whole: one rule
// of each kind, one route in main, both to the same uplink.
func TestChoiceKilledAtSteps(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUsed("wan0")
		rules, routes := strings.Count(c.choiceRules(), "lookup"), strings.Count(c.mainRoutes(), "default")
		const steps = 6 // a route and two rules in each family, or four rules
		for step := range steps {
			to := (step + 1) % 2
			before := choiceSteps(c.watch)
			use := c.start(exec.Command(bin(t, clientBin), "uplinks", "use", fmt.Sprint("wan", to)))
			eventually(t, fmt.Sprintf("the switch is at step %d", step), func() error {
				if n := choiceSteps(c.watch) - before; n < step {
					return fmt.Errorf("at %d", n)
				}
				return nil
			})
			c.watch.kill()
			use.wait() // whether the watch has answered or not
			c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links)))
			eventually(t, "the next watch is told, too", func() error { // the one before may not have heard of it
				if r := c.run(bin(t, clientBin), "uplinks", "use", fmt.Sprint("wan", to)); r.code != 0 {
					return fmt.Errorf("%+v", r)
				}
				for _, one := range c.report().Unbound {
					if !one.Pinned || one.Ifname != fmt.Sprint("wan", to) {
						return fmt.Errorf("%+v", one)
					}
				}
				return nil
			})
			c.waitUsed(fmt.Sprint("wan", to))
			c.waitUnbound(to)
			eventually(t, "the choice is whole", func() error {
				haveRules, haveRoutes := c.choiceRules(), c.mainRoutes()
				if strings.Count(haveRules, "lookup") != rules || strings.Count(haveRoutes, "default") != routes || strings.Count(haveRoutes, fmt.Sprint("dev wan", to)) != routes {
					return fmt.Errorf("killed at step %d: rules %q, main has %q", step, haveRules, haveRoutes)
				}
				return nil
			})
		}
		c.wantOwnOnly()
	})
}

// choiceSteps is how many changes of rules and routes of the choice a watch has logged.
func choiceSteps(p *process) (n int) {
	for line := range strings.Lines(p.log.String()) {
		if strings.Contains(line, `rule="9000`) || strings.Contains(line, "route of the cho") {
			n++
		}
	}
	return n
}
