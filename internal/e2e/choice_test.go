package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

const (
	copyLinks = `{"ifname": "*"}`
	moveLinks = `{"ifname": "*", "routes": "move"}`
)

// eachMode calls f for a host whose routes are copied, and for one whose are moved.
func eachMode(t *testing.T, f func(t *testing.T, links string)) {
	t.Helper()
	for name, links := range map[string]string{"copy": copyLinks, "move": moveLinks} {
		t.Run(name, func(t *testing.T) { f(t, links) })
	}
}

// TestChoiceFollows has an uplink fail behind its gateway, and work again.
func TestChoiceFollows(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUnbound(0)
		c.waitState("wan0", "inet", "alive")
		c.fault(0, noInternet)
		c.waitUnbound(1)
		if inMain := c.mainRoutes() != ""; inMain != (links == copyLinks) {
			t.Errorf("main has %q", c.mainRoutes())
		}
		c.mend(0)
		c.waitUnbound(0) // after the hold
		c.wantOwnOnly()
		before := c.switches()
		if code := c.watch.stop(); code != 0 || c.mainRoutes() != "" {
			t.Errorf("exit code %d, main has %q", code, c.mainRoutes())
		}
		if rules := c.choiceRules(); strings.Count(rules, "iif lo lookup") != 2 {
			t.Errorf("the rules of the choice are %q, want one for each family", rules)
		}
		t.Logf("%d switches", before)
	})
}

// TestChoiceNeverUnbound: an uplink that is not for unbound traffic is not chosen, whatever happens to the other one.
func TestChoiceNeverUnbound(t *testing.T) {
	c := newChooser(t, `{"ifname": "wan1", "routes": "move", "unbound": false}, `+moveLinks)
	c.waitUnbound(0)
	c.waitUsed("wan0")
	before := c.switches()
	c.fault(0, noInternet)
	c.waitState("wan0", "inet", "dead")
	if r := c.run(bin(t, clientBin), "uplinks", "use", "wan1"); r.code == 0 || !strings.Contains(r.stderr, "wan1") {
		t.Errorf("uplinks use wan1: %+v", r)
	}
	c.mend(0)
	c.waitState("wan0", "inet", "alive")
	c.waitUnbound(0)
	if n := c.switches() - before; n != 0 {
		t.Errorf("%d switches", n)
	}
}

// TestChoiceFaults: what fails in one family moves that family only, what says nothing of an uplink moves nothing, and
// while no uplink works unbound traffic stays where it is.
func TestChoiceFaults(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUnbound(0)
		c.fault(0, noInternet6)
		c.waitUnboundOf(6, 1)
		c.wantUnbound(4, 0)
		c.mend(0)
		c.waitUnboundOf(6, 0)
		c.waitUsed("wan0")

		before := c.switches()
		c.fault(0, noICMP) // the other kinds of probes answer
		c.waitAsked("wan0", 20)
		c.mend(0)
		c.wantUnbound(4, 0)
		if n := c.switches(); n != before {
			t.Errorf("%d switches while ICMP was filtered", n-before)
		}

		for n := range 2 {
			c.fault(n, noInternet)
		}
		for _, ifname := range []string{"wan0", "wan1"} {
			c.waitState(ifname, "inet", "dead")
			c.waitState(ifname, "inet6", "dead")
		}
		at := c.used()
		c.waitAsked("wan0", 5)
		if now := c.used(); now != at {
			t.Errorf("no uplink works, and unbound traffic moved from %q to %q", at, now)
		}
		for n := range 2 {
			c.mend(n)
		}
		c.waitUnbound(0)
		c.wantOwnOnly()
	})
}

// TestChoiceRestored: rules and routes of the choice that another program deletes come back, and release takes all.
func TestChoiceRestored(t *testing.T) {
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUsed("wan0")
		main, rules := c.mainRoutes(), c.choiceRules()
		for _, line := range []string{"rule flush protocol 116", "-6 rule flush protocol 116", "route flush table main protocol 116", "-6 route flush table main protocol 116"} {
			c.ns.IP(t, line)
		}
		eventually(t, "the choice is restored", func() error {
			if m, r := c.mainRoutes(), c.choiceRules(); m != main || r != rules {
				return fmt.Errorf("main has %q, want %q; rules %q, want %q", m, main, r, rules)
			}
			return nil
		})
		c.waitUnbound(0)
		c.wantOwnOnly()
		if r := c.run(bin(t, clientBin), "release", "--all"); r.code != 0 {
			t.Errorf("release --all: %+v", r)
		}
		if m, r := c.mainRoutes(), c.choiceRules(); m != "" || r != "" {
			t.Errorf("after release --all main has %q, and rules are %q", m, r)
		}
	})
}

// TestChoiceManyRoutes: a default route is found behind thousands of others.
func TestChoiceManyRoutes(t *testing.T) {
	c := newChooser(t, copyLinks)
	c.waitUsed("wan0")
	var lines []string
	for i := range 3000 {
		lines = append(lines, fmt.Sprintf("route add 2001:db8:%x::/64 via fd02::1 dev wan1", 0x8000+i), fmt.Sprintf("route add 100.64.%d.%d/32 via 10.2.0.1 dev wan1", i>>8, i&0xff))
	}
	c.ns.Batch(t, lines...)
	c.fault(0, noInternet)
	c.waitState("wan0", "inet", "dead")
	c.waitState("wan0", "inet6", "dead")
	c.waitUnbound(1)
	c.wantOwnOnly()
}

// uplinkRow is what `uplinks --json` says of an address.
type uplinkRow struct {
	Ifname, Family, Address, State, Reason string
	Table                                  uint32
	Used                                   bool
	Bytes                                  int
	RTT                                    float64 `json:"rtt_ms"`
	Hour                                   []struct{ Loss int }
}

type uplinksReport struct {
	Version int
	Probing bool
	Uplinks []uplinkRow
	Unbound []struct {
		Family, Ifname, Why, Warn string
		By                        []string
		Pinned                    bool
	}
}

func (c *chooser) report() (r uplinksReport) {
	c.t.Helper()
	out := c.run(bin(c.t, clientBin), "uplinks", "--json")
	if err := json.Unmarshal([]byte(out.stdout), &r); err != nil || out.code != 0 || r.Version != 1 {
		c.t.Fatalf("uplinks --json: %+v (%v)", out, err)
	}
	return r
}

// waitUsed waits until all uplinks work and unbound traffic of both families uses a link, and returns what is reported then.
// The first probes may have come before the links of the providers.
func (c *chooser) waitUsed(ifname string) (report uplinksReport) {
	c.t.Helper()
	eventually(c.t, "all uplinks work, and "+ifname+" is used", func() error {
		report = c.report()
		used := 0
		for _, u := range report.Uplinks {
			if u.State != "alive" || u.Used != (u.Ifname == ifname) {
				return fmt.Errorf("%+v", u)
			}
			if u.Used {
				used++
			}
		}
		if used != 2 {
			return fmt.Errorf("%+v", report)
		}
		return nil
	})
	return report
}

// used is the links that unbound traffic uses.
func (c *chooser) used() string {
	c.t.Helper()
	var all []string
	for _, one := range c.report().Unbound {
		all = append(all, one.Family+" "+one.Ifname)
	}
	return strings.Join(all, ", ")
}

// waitAsked waits until probes of both families have sent this many more packets through a link.
func (c *chooser) waitAsked(ifname string, packets int) {
	c.t.Helper()
	const packet = 100 // bytes, about
	bytes := func() map[string]int {
		all := make(map[string]int)
		for _, u := range c.report().Uplinks {
			if u.Ifname == ifname {
				all[u.Family] += u.Bytes
			}
		}
		return all
	}
	before := bytes()
	eventually(c.t, "probes are sent through "+ifname, func() error {
		for family, n := range bytes() {
			if n < before[family]+packets*packet {
				return fmt.Errorf("%d bytes in %s, from %d on", n, family, before[family])
			}
		}
		return nil
	})
}

// TestUplinksCommand shows the uplinks, wants one, and probes.
func TestUplinksCommand(t *testing.T) {
	c := newChooser(t, copyLinks)
	client := func(args ...string) result { return c.run(bin(t, clientBin), append([]string{"uplinks"}, args...)...) }
	if r := client("--wait", "60"); r.code != 0 {
		t.Fatalf("uplinks --wait: %+v", r)
	}
	report := c.waitUsed("wan0")
	if len(report.Uplinks) != 4 || !report.Probing || len(report.Unbound) != 2 {
		t.Fatalf("%+v", report)
	}
	for _, u := range report.Uplinks {
		if u.State != "alive" || u.RTT <= 0 || u.Bytes == 0 || len(u.Hour) != 60 || u.Used != (u.Ifname == "wan0") {
			t.Errorf("%+v", u)
		}
	}
	for _, one := range report.Unbound {
		if one.Ifname != "wan0" || !slices.Equal(one.By, []string{"rule", "main"}) || one.Pinned {
			t.Errorf("%+v", one)
		}
	}
	follow := c.start(c.command("uplinks", "--follow"))
	eventually(t, "a change is followed", func() error {
		for _, ifname := range []string{"wan1", "auto"} {
			if r := client("use", ifname, "-4"); r.code != 0 {
				t.Fatalf("uplinks use %s: %+v", ifname, r)
			}
		}
		if !strings.Contains(follow.log.String(), `"to":"wan1"`) {
			return errors.New(follow.log.String())
		}
		return nil
	})
	if r := client("use", "wan1", "-4"); r.code != 0 || !strings.Contains(r.stdout, "IPv4  unbound traffic uses wan1: the user wants it") {
		t.Errorf("uplinks use: %+v", r)
	}
	c.waitUnboundOf(4, 1)
	c.wantUnbound(6, 0)
	if r := client("use", "wan7"); r.code != 1 || !strings.Contains(r.stderr, "no address of wan7 is in service") {
		t.Errorf("uplinks use of no link: %+v", r)
	}
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"probe", "wan1"}, 0, "icmp      " + internet + "  "},
		{[]string{"probe", "wan1", "--kind", "tcp:7", "--target", internet6}, 0, "tcp:7     " + internet6},
		{[]string{"probe", "wan1", "--kind", "tcp:7", "--target", "10.2.0.77"}, 1, "tcp:7     10.2.0.77  no "},
		{[]string{"probe"}, 2, ""},
		{[]string{"use", "wan0", "-4", "-6"}, 2, ""},
	} {
		if r := client(test.args...); r.code != test.code || !strings.Contains(r.stdout, test.want) {
			t.Errorf("uplinks %v: %+v", test.args, r)
		}
	}
	// The next watch knows of the wish, and its rule stands meanwhile.
	c.watch.kill()
	if routes := c.mainRoutes(); !strings.Contains(routes, "10.2.0.1") {
		t.Errorf("a killed watch leaves %q in main", routes)
	}
	c.wantUnbound(4, 1)
	c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(copyLinks)))
	c.waitState("wan0", "inet", "alive")
	c.wantUnbound(4, 1)
	if r := client("use", "auto"); r.code != 0 {
		t.Errorf("uplinks use auto: %+v", r)
	}
	c.waitUnbound(0)
	c.wantOwnOnly()
	follow.kill()
	// Whoever follows does not keep a watch that is to end.
	last := c.start(c.command("uplinks", "--follow", "--json"))
	eventually(t, "a change is followed", func() error {
		for _, ifname := range []string{"wan1", "auto"} {
			client("use", ifname, "-4")
		}
		if last.log.String() == "" {
			return errors.New("nothing is said")
		}
		return nil
	})
	if code := c.watch.stop(); code != 0 {
		t.Errorf("the watch ended with %d", code)
	}
}

// TestChoiceWithoutProbes has a user choose where nothing is probed.
func TestChoiceWithoutProbes(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := &chooser{uplinks: newHost(t).behind(routed(0), routed(1))}
		for n := range c.isps {
			c.address(n)
		}
		c.serve()
		c.watch = c.uplinks.watch("--clean", "--config", c.watchFile(`{"links": [`+links+`]}`))
		for _, addr := range []string{"10.1.0.2", "10.2.0.2", "fd02::2"} { // before that, packets leave by main
			c.served(addr)
		}
		c.waitUplink(0, "10.1.0.2")
		c.waitUplink(1, "10.2.0.2")
		if rules, routes := c.choiceRules(), c.mainRoutes(); rules != "" || routes != "" {
			t.Errorf("nobody chooses, and there are %q and %q", rules, routes)
		}
		c.use("wan1")
		c.waitUnbound(1)
		c.use("wan0")
		c.waitUnbound(0)
		c.ns.IP(t, "link del wan0")
		c.waitUnbound(1)
		eventually(t, "the wish ends with the link", func() error {
			if rules := c.choiceRules(); rules != "" || c.mainRoutes() != "" {
				return errors.New(rules + c.mainRoutes())
			}
			return nil
		})
		c.use("wan1")
		if code := c.watch.stop(); code != 0 || c.choiceRules() != "" || c.mainRoutes() != "" {
			t.Errorf("--clean: exit code %d, %q and %q are left", code, c.choiceRules(), c.mainRoutes())
		}
		c.wantOwnOnly()
	})
}
