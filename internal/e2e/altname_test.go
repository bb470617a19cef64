package e2e

import (
	"strings"
	"testing"
)

// TestAlternativeName: each command takes a name that udev gave a link beside its own, also one that is too long to be its own.
func TestAlternativeName(t *testing.T) {
	h := twoUplinks(t)
	const long = "enp0s20f0u3u1c2-of-the-second-provider"
	h.ns.Batch(t, "link property add dev wan1 altname enp0s3 altname "+long, "address add 10.79.0.9/32 dev wan1")
	h.served("10.79.0.9")
	h.waitHistory("wan1", "10.78.0.2: has table 1000")
	for _, name := range []string{"enp0s3", long} {
		for _, c := range []struct{ args, says string }{
			{"status NAME", "10.78.0.2 "},
			{"status -i NAME", "10.78.0.2 "},
			{"doctor NAME", ""},
			{"history NAME", "10.78.0.2: has table 1000"},
			{"explain 203.0.113.9 -i NAME", "leaves by wan1"},
			{"explain 203.0.113.9 --from 203.0.113.8 --iif NAME", "arriving by wan1"},
			{"run NAME sh -c true", ""},
			{"bind NAME --uid 4242", ""},
			{"bound NAME", "wan1"},
			{"unbind NAME --uid 4242", ""},
			{"-a 10.79.0.9 -i NAME", "1000"}, // of the watch
			{"reexec NAME", ""},
		} {
			r := h.run(bin(t, clientBin), strings.Fields(strings.ReplaceAll(c.args, "NAME", name))...)
			if r.code > 1 || !strings.Contains(r.stdout, c.says) {
				t.Errorf("%s: %+v", c.args, r)
			}
		}
	}
	if r := h.run(bin(t, clientBin), "release", long); r.code != 0 || !strings.Contains(r.stdout, "10.78.0.2 on wan1") {
		t.Errorf("release: %+v", r)
	}
}
