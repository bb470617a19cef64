package twin

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// made are the steps that the host has been through, and undone those of them that were taken
// back since.
type history struct {
	made, undone []step
	names        map[string]string // of links that were renamed, by their first names
}

// life draws the phases of the host's life and the changes in them.
func (g *generator) life(phases []string) {
	if g.h.phases = phases; len(phases) == 0 {
		g.h.phases = g.drawPhases()
	}
	g.past = history{made: slices.Clone(g.h.build), names: make(map[string]string)}
	for _, phase := range []struct {
		name     string
		min, max int
	}{{eachChange, 3, 5}, {inStorm, 8, 14}, {afterKill, 2, 4}} {
		if !slices.Contains(g.h.phases, phase.name) {
			continue
		}
		for range phase.min + g.IntN(phase.max-phase.min+1) {
			s := g.change()
			s.phase = phase.name
			if len(s.commands) > 0 {
				g.h.changes = append(g.h.changes, s)
			}
		}
	}
}

// drawPhases draws one or two phases: of hosts whose seeds follow each other one in three has each.
func (g *generator) drawPhases() []string {
	n := int(g.h.seed % uint64(len(allPhases)*len(allPhases)))
	first, second := n%len(allPhases), n/len(allPhases)
	var drawn []string
	for i, phase := range allPhases {
		if i == first || i == second {
			drawn = append(drawn, phase)
		}
	}
	return drawn
}

// change draws a change of what the host has by now.
func (g *generator) change() step {
	switch n := g.IntN(100); {
	case n < 25:
		return g.undo()
	case n < 40:
		return g.redo()
	case n < 60:
		return g.newPiece()
	case n < 70:
		return g.replaceRoute()
	case n < 75:
		return g.moveDefault()
	case n < 80:
		return g.otherMask()
	case n < 85:
		return g.replaceNexthop()
	case n < 90:
		return g.flap()
	case n < 94:
		return g.recreate()
	case n < 97:
		return g.rename()
	}
	return g.intoBridge()
}

// isMove reports whether a default that the host gets later must not come into the place of
// another one: what was moved out of main is not in its way there.
func (g *generator) isMove() bool { return g.h.watch.Routes == "move" }

// newPiece adds something that a host may have from its start, too.
func (g *generator) newPiece() step {
	before := len(g.h.build)
	pieces := []func(){g.lan, g.bridge, g.vpn, g.service, g.statics, g.statics, g.errorRoute, g.multipath, g.group,
		g.othersRule, g.localRoute, g.sourceSpecific, g.tos, g.secondDefault,
		func() {
			if l := pick(g, g.uplinks()...); len(l.nets) > 0 {
				g.secondAddress(l, 1)
			}
		},
		func() {
			i := len(g.links)
			g.uplink(i)
			l := g.links[len(g.links)-1]
			for _, is4 := range []bool{true, false} {
				for _, n := range g.networks(is4, l) {
					g.oneDefault(l, n, is4, false)
				}
			}
		}}
	pick(g, pieces...)()
	s := step{name: "more"}
	for _, built := range g.h.build[before:] {
		s.name += ", " + built.name
		s.commands = append(s.commands, g.renamed(built.commands)...)
	}
	g.h.build = g.h.build[:before]
	g.past.made = append(g.past.made, s)
	return s
}

// renamed are commands with the names that links have by now.
func (g *generator) renamed(commands []string) (now []string) {
	for _, c := range commands {
		words := strings.Fields(c)
		for i, word := range words {
			for name := g.past.names[word]; name != ""; name = g.past.names[name] {
				words[i] = name
			}
		}
		now = append(now, strings.Join(words, " "))
	}
	return now
}

// undo takes a step back.
func (g *generator) undo() step {
	if len(g.past.made) == 0 {
		return step{}
	}
	i := g.IntN(len(g.past.made))
	s := g.past.made[i]
	if strings.HasPrefix(s.name, "link wan") && !g.chance(20) {
		return step{} // hosts do not lose uplinks all the time
	}
	g.past.made = slices.Delete(slices.Clone(g.past.made), i, i+1)
	g.past.undone = append(g.past.undone, s)
	undone := step{name: "undo " + s.name}
	for _, c := range slices.Backward(g.renamed(s.commands)) {
		if inverse := inverseOf(c); inverse != "" {
			undone.commands = append(undone.commands, inverse)
		}
	}
	return undone
}

// inverseOf is the command that takes another one back, if there is one.
func inverseOf(command string) string {
	words := strings.Fields(command)
	join := func(words ...string) string { return strings.Join(words, " ") }
	switch {
	case len(words) < 4 || words[0] != "ip":
	case words[1] == "route":
		return join(append([]string{"ip", "route", "del"}, words[3:]...)...)
	case words[1] == "rule":
		return join(append([]string{"ip", "rule", "del"}, words[3:]...)...)
	case words[1] == "address":
		dev := slices.Index(words, "dev")
		return join(append([]string{"ip", "address", "del"}, words[3:dev+2]...)...)
	case words[1] == "nexthop":
		return join("ip", "nexthop", "del", "id", words[4])
	case words[1] == "link" && words[2] == "add" && words[3] == "link": // ip link add link LOWER name NAME
		return join("ip", "link", "del", words[6])
	case words[1] == "link" && words[2] == "add":
		return join("ip", "link", "del", words[3])
	case words[1] == "tuntap":
		return join("ip", "link", "del", words[4])
	}
	return ""
}

// redo makes again what was undone.
func (g *generator) redo() step {
	if len(g.past.undone) == 0 {
		return step{}
	}
	i := g.IntN(len(g.past.undone))
	s := g.past.undone[i]
	g.past.undone = slices.Delete(slices.Clone(g.past.undone), i, i+1)
	again := step{name: "again " + s.name, commands: g.renamed(s.commands)}
	for _, c := range again.commands {
		again.commands = append(again.commands, g.afterAddress(c)...)
	}
	g.past.made = append(g.past.made, s)
	return again
}

// afterAddress are the commands that follow when an address is put back: with the last one of a
// link the kernel deletes its routes, and the product keeps them for whoever puts them back.
func (g *generator) afterAddress(command string) []string {
	words := strings.Fields(command)
	if i := slices.Index(words, "dev"); i > 0 && (words[1] == "address" || strings.HasPrefix(command, "ip route add local ")) {
		return g.restore(words[i+1])
	}
	return nil
}

// routes are the commands that make routes in main by a gateway, with the places of their words.
func (g *generator) routeCommands() (all [][]string) {
	for _, s := range g.past.made {
		for _, c := range g.renamed(s.commands) {
			words := strings.Fields(c)
			if strings.HasPrefix(c, "ip route ") && strings.Contains(c, " dev ") && !strings.Contains(c, " nexthop ") && !strings.Contains(c, " table ") {
				all = append(all, words)
			}
		}
	}
	return all
}

func isDefault(words []string) bool {
	return len(words) > 3 && (words[3] == "0.0.0.0/0" || words[3] == "::/0")
}

// replaceRoute puts a route by another router, or over another link, into the place of one.
func (g *generator) replaceRoute() step {
	all := g.routeCommands()
	if len(all) == 0 {
		return step{}
	}
	words := pick(g, all...)
	is4 := strings.Contains(words[3], ".")
	l := pick(g, g.links...)
	if g.isMove() && isDefault(words) {
		if words[2] == "append" {
			return step{}
		}
		name := words[slices.Index(words, "dev")+1]
		l = g.links[max(0, slices.IndexFunc(g.links, func(l *link) bool { return l.name == name }))]
		if l.name != name {
			return step{}
		}
	}
	nets := g.networks(is4, l)
	if len(nets) == 0 || !nets[0].gateway.IsValid() {
		return step{}
	}
	gateway := nets[0].gateway
	if nets[0].addr.Bits() < nets[0].addr.Addr().BitLen()-2 && g.chance(50) {
		gateway = g.within(nets[0].addr, false)
	}
	c := fmt.Sprintf("ip route replace %s %s dev %s", words[3], gatewayWords(is4, gateway), l.name)
	for _, word := range []string{"metric", "tos"} {
		if i := slices.Index(words, word); i > 0 {
			c += " " + word + " " + words[i+1]
		}
	}
	if g.chance(20) {
		c = fmt.Sprintf("%s src %s", c, nets[0].addr.Addr())
	}
	s := step{name: "replace " + words[3], commands: []string{c}}
	g.past.made = append(g.past.made, s)
	return s
}

// moveDefault gives a default another metric, as NetworkManager does.
func (g *generator) moveDefault() step {
	all := slices.DeleteFunc(g.routeCommands(), func(words []string) bool { return !isDefault(words) || !slices.Contains(words, "metric") })
	if len(all) == 0 {
		return step{}
	}
	words := pick(g, all...)
	if g.isMove() && words[slices.Index(words, "metric")+1] == "0" {
		return step{} // a delete without a metric would mean the other one, if this one was moved
	}
	g.metric += 1 + g.IntN(50)
	other := slices.Clone(words)
	other[2], other[slices.Index(other, "metric")+1] = "add", fmt.Sprint(g.metric)
	commands := []string{strings.Join(other, " "), inverseOf(strings.Join(words, " "))}
	if g.chance(50) {
		slices.Reverse(commands)
	}
	s := step{name: "another metric", commands: commands}
	g.past.made = append(g.past.made, step{name: s.name, commands: []string{strings.Join(other, " ")}})
	return s
}

// otherMask gives an address another length, as DHCP servers and typists do.
func (g *generator) otherMask() step {
	l := pick(g, g.links...)
	if len(l.nets) == 0 {
		return step{}
	}
	i := g.IntN(len(l.nets))
	n := l.nets[i]
	other := netip.PrefixFrom(n.addr.Addr(), max(8, min(n.addr.Addr().BitLen(), n.addr.Bits()+pick(g, -4, -1, 1, 2))))
	if other == n.addr {
		return step{}
	}
	l.nets[i].addr = other
	s := g.step("another mask", "%s\naddress del %s dev %s", giveCommand(l, network{addr: other}, ""), n.addr, l.name)
	first := g.chance(50)
	if first {
		slices.Reverse(s.commands)
	}
	if first || g.isUndone(n.addr) {
		s.commands = append(s.commands, g.restore(l.name)...)
	}
	return s
}

// isUndone reports whether an address was deleted: what comes now may be the first one of its link again.
func (g *generator) isUndone(addr netip.Prefix) bool {
	return slices.ContainsFunc(g.past.undone, func(s step) bool {
		return slices.ContainsFunc(s.commands, func(c string) bool { return strings.HasPrefix(c, "ip address add "+addr.String()+" ") })
	})
}

// replaceNexthop gives a nexthop object another router.
func (g *generator) replaceNexthop() step {
	var ids []string
	for _, s := range g.past.made {
		for _, c := range s.commands {
			if words := strings.Fields(c); words[1] == "nexthop" && slices.Contains(words, "via") {
				ids = append(ids, words[4])
			}
		}
	}
	l := pick(g, g.links...)
	if len(ids) == 0 || len(l.nets) == 0 || !l.nets[0].gateway.IsValid() {
		return step{}
	}
	return g.step("replace nexthop", "nexthop replace id %s via %s dev %s", pick(g, ids...), l.nets[0].gateway, l.name)
}

// restore are the commands that a manager gives when a link is there again. With move, defaults that
// were to be deleted may be there still, see applyMoved, and those that are appended come last and at once: one that comes
// when the watch has taken the other, in a later batch (see endsBatch), looks like one that replaces it.
func (g *generator) restore(name string) (commands []string) {
	made := g.past.made
	for _, s := range g.past.undone {
		if g.isMove() && strings.Contains(s.name, "default") {
			made = append(slices.Clone(made), s)
		}
	}
	for _, s := range made {
		for _, c := range g.renamed(s.commands) {
			words := strings.Fields(c)
			if words[1] == "link" || words[1] == "tuntap" || words[1] == "rule" {
				continue
			}
			ours := strings.Contains(c+" ", " dev "+name+" ") || strings.Contains(c, "."+name+".") || words[1] == "nexthop" || slices.Contains(words, "nhid")
			if ours {
				commands = append(commands, c)
			}
		}
	}
	if g.isMove() {
		last := func(c string) int { return strings.Count(c, "ip route append 0.0.0.0/0 ") }
		slices.SortStableFunc(commands, func(a, b string) int { return last(a) - last(b) })
	}
	return commands
}

// flap sets a link down and up again.
func (g *generator) flap() step {
	l := pick(g, g.links...)
	s := g.step("flap of "+l.name, "link set %s down\nlink set %s up", l.name, l.name)
	s.commands = append(s.commands, g.restore(l.name)...)
	return s
}

// recreate unplugs a link and plugs it in again.
func (g *generator) recreate() step {
	l := pick(g, g.uplinks()...)
	if l.index == 0 {
		return step{} // of a kind that is made in another way
	}
	s := g.step("another "+l.name, "link del %s\n%s", l.name, g.linkCommands(l))
	s.commands = append(s.commands, g.restore(l.name)...)
	return s
}

// newName is a name that no link of the host has ever had.
func (g *generator) newName(kind string) string {
	g.named++
	return fmt.Sprintf("%s%d", kind, 100+g.named)
}

// rename gives a link another name, which the configuration may select or not.
func (g *generator) rename() step {
	l := pick(g, g.uplinks()...)
	name := g.newName(pick(g, "wan", "wan", "eth"))
	s := g.step("another name for "+l.name, "link set %s name %s", l.name, name)
	g.past.names[l.name] = name
	l.name = name
	return s
}

// intoBridge makes a bridge of an uplink, as hosts of virtual machines do.
func (g *generator) intoBridge() step {
	l := pick(g, g.uplinks()...)
	name := g.newName(pick(g, "wan", "vmbr"))
	s := g.step("bridge of "+l.name, `link add %[1]s index %[2]d address 02:00:00:00:00:%02[2]x type bridge
		link set %[1]s addrgenmode eui64
		link set %[1]s up
		link set %[3]s down
		link set %[3]s master %[1]s
		link set %[3]s up
		address flush dev %[3]s`, name, g.next, l.name)
	g.next++
	port := l.name
	commands := g.restore(port)
	g.past.names[port] = name
	s.commands = append(s.commands, g.renamed(commands)...)
	delete(g.past.names, port)
	// From here on the bridge is what the link was.
	for _, steps := range [][]step{g.past.made, g.past.undone} {
		for i := range steps {
			if !strings.HasPrefix(steps[i].name, "link ") {
				g.past.names[port] = name
				steps[i].commands = g.renamed(steps[i].commands)
				delete(g.past.names, port)
			}
		}
	}
	l.name = name
	return s
}
