package twin

import (
	"maps"
	"slices"
	"strings"
)

// applyMoved carries a step out where main has other defaults than on the plain host: one that was
// taken out cannot be deleted, and one can come into its place. The plain host follows the real
// one: what was not deleted there is not deleted here, and what came in its place there replaces it
// here.
func (w *world) applyMoved(s step) error {
	if s.commands = w.knowable(s.commands); len(s.commands) == 0 {
		return nil
	}
	refused, err := w.real.run(s.commands)
	if err != nil {
		return err
	}
	var commands, undo []string
	var taken []bool // by the real host
	for i, c := range s.commands {
		failed := slices.Contains(refused, i)
		if failed && strings.HasPrefix(c, "ip route del") {
			if !isDefault(strings.Fields(c)) { // else it was moved
				w.goneBefore(s, c)
			}
			continue
		}
		undo = append(undo, inverseOf(c))
		if failed || !strings.HasPrefix(c, "ip route add ") && !strings.HasPrefix(c, "ip route append ") {
			undo[len(undo)-1] = ""
		}
		if to, ok := strings.CutPrefix(c, "ip route add "); ok && !failed && isDefault(strings.Fields(c)) && !strings.Contains(c, " table ") {
			c = "ip route replace " + to
		}
		commands, taken = append(commands, c), append(taken, !failed)
	}
	failed, err := w.follow(commands, taken)
	for _, i := range slices.Sorted(maps.Keys(failed)) {
		later := commands[i+1:]
		switch c := commands[i]; {
		case err != nil:
		case strings.HasSuffix(failed[i], exists) && isDefault(strings.Fields(c)):
			// Of IPv6 routes that share the traffic one outlives that its link is down, and is dead if that has no carrier.
			// Meanwhile its gateway may be in no network of the link any more.
			if taken[i] && strings.Contains(c, "::/0") {
				var gone []int
				if gone, err = w.plain.run([]string{inverseOf(c), c}); err == nil && slices.Contains(gone, 1) {
					_, err = w.plain.run([]string{c + " onlink"})
				}
			}
		case taken[i] && mayBeForced(c):
		case undo[i] != "" && !slices.Contains(later, c): // else both have it at last
			var kept []int
			kept, err = w.real.run([]string{renamedBy(later, undo[i])})
			if err == nil && len(kept) > 0 && isDefault(strings.Fields(c)) && strings.Count(c, " via ") == 1 && !strings.Contains(c, " nexthop ") { // it was moved by then
				_, err = w.plain.run([]string{renamedBy(later, c) + " onlink"})
			}
		}
		switch c := renamedBy(later, commands[i]); {
		case strings.Contains(c, " del "):
		case isDefault(strings.Fields(c)):
			w.giveUp(c)
		default:
			w.again = append(w.again, c)
		}
	}
	return err
}

// follow runs commands on the plain host. What the real one has taken, since the gateway was still in a table, which follows main
// a moment later, is forced here at once: what comes behind may take it away from both.
func (w *world) follow(commands []string, taken []bool) (failed map[int]string, err error) {
	failed = make(map[int]string)
	for from := 0; from < len(commands) && err == nil; {
		to := from
		for to < len(commands) && !(taken[to] && mayBeForced(commands[to])) {
			to++
		}
		last := min(to+1, len(commands))
		var reasons map[int]string
		reasons, err = w.plain.runAll(commands[from:last])
		for i, why := range reasons {
			failed[from+i] = why
		}
		if failed[to] != "" && err == nil && !(strings.HasSuffix(failed[to], exists) && isDefault(strings.Fields(commands[to]))) {
			_, err = w.plain.run([]string{commands[to] + " onlink"})
		}
		from = last
	}
	return failed, err
}

// renamedBy is a command with the names that links have after others.
func renamedBy(later []string, c string) string {
	words := strings.Fields(c)
	for _, l := range later {
		if rename := strings.Fields(l); len(rename) == 6 && rename[4] == "name" && strings.HasPrefix(l, "ip link set ") {
			for i, word := range words {
				if word == rename[3] && words[i-1] == "dev" {
					words[i] = rename[5]
				}
			}
		}
	}
	return strings.Join(words, " ")
}

// mayBeForced reports whether a command gives a route or a nexthop one gateway, which can be on the link by force.
func mayBeForced(c string) bool {
	return strings.Contains(c, " replace ") && strings.Contains(c, " via ") && !strings.Contains(c, " nexthop via ")
}

// knowable leaves out of commands what takes a default back that came while the watch was dead. It may have replaced one that
// was moved, and that nothing tells afterwards: main is as the watch left it. Of an IPv6 route by several routers the kernel
// deletes what main has, and fails, so that it is not what the plain host has.
func (w *world) knowable(commands []string) (kept []string) {
	for _, c := range commands {
		words := strings.Fields(c)
		if strings.HasPrefix(c, "ip route del ") && strings.Contains(words[3], ":") && strings.Count(c, " nexthop via ") > 1 {
			continue
		}
		if w.unwatched == nil || words[1] != "route" || !isDefault(words) {
			kept = append(kept, c)
			continue
		}
		place := words[3]
		for _, word := range []string{"metric", "tos"} {
			if i := slices.Index(words, word); i > 0 && words[i+1] != "0" {
				place += " " + word + " " + words[i+1]
			}
		}
		if words[2] == "del" && w.unwatched[place] {
			continue
		}
		w.unwatched[place] = true
		kept = append(kept, c)
	}
	return kept
}
