package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestManyRenames: a link that is renamed again and again has one lease and the rules of one address afterwards.
func TestManyRenames(t *testing.T) {
	for name, watched := range map[string]bool{"client": false, "watch": true} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.serve()
			if watched {
				h.watch("--ifname", "*", "--exclude", "lo")
				h.served("10.77.0.2")
			} else {
				h.lease("10.77.0.2", "wan0", "--routes", "copy")
			}
			var renames []string
			last := "wan0"
			for i := range 1000 {
				next := fmt.Sprint("w", i)
				renames = append(renames, fmt.Sprintf("link set dev %s name %s", last, next))
				last = next
			}
			h.ns.Batch(t, renames...)
			eventually(t, "one lease is left, with its rules", func() error {
				leases := h.leases()
				if len(leases) != 1 || !strings.Contains(leases[0], "|inet|"+last+"|10.77.0.2|") {
					return fmt.Errorf("leases %q", leases)
				}
				table := h.tableNumber("10.77.0.2")
				if diff := unordered(h.rules(), copyRules("10.77.0.2", "10.77.0.0/24", table)); diff != "" {
					return fmt.Errorf("%s", diff)
				}
				return nil
			})
		})
	}
}

// TestLongCall: a call whose settings are too long for a holder is refused in words, and leaves the holder as it is.
func TestLongCall(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1")
	pid := h.onlyClient()
	rules := h.rules()
	args := []string{"-4", "-a", "10.77.0.2", "-i", "wan0", "--routes", "copy"}
	for i := range 2000 {
		args = append(args, "--route", fmt.Sprintf("10.%d.%d.0/24,10.77.0.1", i/250, i%250))
	}
	if r := h.client(args...); r.stdout != "0\n" || !strings.Contains(r.stderr, "takes 65536 bytes") {
		t.Errorf("%.100s, %.300s, exit code %d", r.stdout, r.stderr, r.code)
	}
	if now := h.onlyClient(); now != pid {
		t.Errorf("holder %d is %d now", pid, now)
	}
	h.wantRules(rules...)
	// Of a program that sends it all the same.
	p := h.peer("asker", false)
	if answer := p.askAt("wan0-10.77.0.2-2", request(2, "wan0", "10.77.0.2", 3)+strings.Repeat(" ", 70000), patience); !strings.Contains(answer, "longer than 65536 bytes") {
		t.Errorf("answer %q", answer)
	}
	h.waitClientLog(1, "longer than 65536 bytes")
}
