package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// waitHistory waits until history has lines with these texts, in this order.
func (h *host) waitHistory(args string, texts ...string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("history %s has %q", args, texts), func() error {
		r := h.run(bin(h.t, clientBin), append([]string{"history"}, strings.Fields(args)...)...)
		if r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return inOrder(r.stdout, texts)
	})
}

// inOrder returns an error unless lines of text have the texts, in this order.
func inOrder(text string, texts []string) error {
	rest := text
	for _, want := range texts {
		at := strings.Index(rest, want)
		if at < 0 {
			return fmt.Errorf("no %q in\n%s", want, text)
		}
		rest = rest[at+len(want):]
	}
	return nil
}

// TestHistoryOfLAN: a link that never had a default route, as one behind this host with a part of a delegated prefix, has not lost it.
func TestHistoryOfLAN(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "2001:db8:77::2/64")
	h.link("lan0", "2001:db8:77:1::1/64")
	h.serve()
	h.watch("-i", "lan0")
	const lan = "2001:db8:77:1::1"
	h.waitHistory("lan0", lan+": ")
	h.ns.IP(t, "route add default via 2001:db8:77::1 dev wan0 metric 200")
	h.waitHistory("lan0", lan+": has no default route, leaves by wan0 through 2001:db8:77::1")
	h.ns.IP(t, "route add default via 2001:db8:77::3 dev wan0 metric 100")
	h.waitHistory("lan0", lan+": has no default route, leaves by wan0 through 2001:db8:77::3")
	h.ns.IP(t, "route add default via 2001:db8:77:1::3 dev lan0 metric 50")
	h.waitHistory("lan0", lan+": leaves by lan0 through 2001:db8:77:1::3")
	h.ns.IP(t, "route del default via 2001:db8:77:1::3 dev lan0")
	h.waitHistory("lan0", lan+": lost its default route, leaves by wan0 through 2001:db8:77::3")
}

// TestHistory: what happens to addresses is told once, in order, by watch and client, over a restart of the watch, and
// ends with how they stand.
func TestHistory(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24", "2001:db8:78::2/64")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0 metric 100", "route add default via 10.78.0.1 dev wan1 metric 200",
		"route add default via 2001:db8:78::1 dev wan1 metric 200")
	follow := h.start(h.command("status", "--follow"))
	jsonLines := h.start(h.command("status", "wan1", "--follow", "--json"))
	h.serve()
	w := h.watch("-i", "wan1")
	const four = "10.78.0.2"
	h.waitHistory("", "a watch started", four+": has table 1000")
	h.waitHistory("wan1", "2001:db8:78::2: ", "leaves by wan1 through 2001:db8:78::1") // with the table, or when the address is usable
	h.lease("10.77.0.2", "wan0", "--routes", "copy")
	h.ns.IP(t, "route del default via 10.78.0.1")
	h.waitHistory("wan1", four+": lost its default route, leaves by wan0 through 10.77.0.1")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 metric 200")
	h.waitHistory(four, "lost its default route", four+": leaves by wan1 through 10.78.0.1 again")
	h.ns.IP(t, "rule flush protocol 116")
	h.waitHistory("", four+": another program deleted ")
	h.waitHistory("wan0", "10.77.0.2: another program deleted ")
	w.stop()
	h.watch("-i", "wan1")
	h.waitHistory("", "the watch ended", "a watch started", four+": has table 1000")
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitHistory("wan0", "10.77.0.2: is served no more: the address is gone")
	h.waitHistory("", "now                  wan1      "+four+": table 1000", ", lease until ")
	if r := h.run(bin(t, clientBin), "history", "wan1"); strings.Contains(r.stdout, "10.77.0.2:") || strings.Contains(r.stdout, "dropped") {
		t.Errorf("history wan1: %s", r.stdout)
	}
	all := []string{"a watch started", four + ": has table", four + ": lost its default", "wan1 through 10.78.0.1 again",
		four + ": another program deleted", "the watch ended", "a watch started", four + ": has table"}
	eventually(t, "status --follow has it all", func() error { return inOrder(follow.log.String(), all) })
	if n := strings.Count(follow.log.String(), "lost its default"); n != 1 {
		t.Errorf("%d losses in\n%s", n, follow.log.String())
	}
	for _, line := range lines(jsonLines.log.String()) {
		var event map[string]any
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if keys := strings.Join(slices.Sorted(maps.Keys(event)), " "); keys != "address dropped family ifname netns pid table text time what" {
			t.Errorf("keys: %s", keys)
		}
		if event["ifname"] == "wan0" {
			t.Errorf("an event of wan0: %s", line)
		}
	}
	if r := h.run("setpriv", "--reuid=4711", "--clear-groups", bin(t, clientBin), "history"); r.code != 2 {
		t.Errorf("without rights: %+v", r)
	}
}

// TestHistoryOfFronts: history tells of rules of other programs that come and go, and not of those that an address with
// another priority comes to stand before or behind.
func TestHistoryOfFronts(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0", "rule add ipproto tcp lookup main pref 10500")
	h.serve()
	config := filepath.Join(t.TempDir(), "watch.json")
	text := `{"links": [{"ifname": "wan0"}, {"ifname": "wan1", "priority": [11000, 21000, 91000]}]}`
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	h.watch("-c", config)
	h.served("10.77.0.2")
	h.ns.IP(t, "address add 10.78.0.2/24 dev wan1")
	h.waitHistory("wan1", "10.78.0.2: has table")
	h.ns.IP(t, "rule add ipproto udp lookup main pref 10600")
	h.waitHistory("", `"10600: `, "comes before the rules of addresses")
	h.ns.IP(t, "rule add ipproto udp lookup main pref 9000")
	h.waitHistory("", `"9000: `, "comes before the rules of addresses")
	h.ns.IP(t, "address del 10.78.0.2/24 dev wan1")
	h.waitNotServed("10.78.0.2")
	h.ns.IP(t, "rule del ipproto udp lookup main pref 9000")
	h.waitHistory("", `"9000: `, `"9000: `, "is gone")
	// Rules change while no address of their family is there.
	h.ns.IP(t, "address add 2001:db8:78::2/64 dev wan1 nodad")
	h.waitHistory("wan1", "2001:db8:78::2: has table")
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitNotServed("10.77.0.2")
	h.ns.IP(t, "rule add ipproto udp lookup main pref 8000")
	h.ns.IP(t, "-6 rule add ipproto udp lookup main pref 8001")
	h.waitHistory("", `"8001: `, "comes before the rules of addresses")
	h.ns.IP(t, "address add 10.77.0.2/24 dev wan0")
	h.waitHistory("wan0", "10.77.0.2: is served no more", "10.77.0.2: has table")
	h.ns.IP(t, "rule add ipproto tcp lookup main pref 5270")
	h.waitHistory("", `"5270: `, "comes before the rules of addresses")
	if r := h.run(bin(t, clientBin), "history"); strings.Contains(r.stdout, `"10500: `) || strings.Count(r.stdout, `"10600: `) != 1 {
		t.Errorf("history tells of rules that neither came nor went:\n%s", r.stdout)
	}
}
