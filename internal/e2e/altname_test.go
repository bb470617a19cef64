package e2e

import (
	"errors"
	"fmt"
	"regexp"
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

// TestWatchAlternativeNames: the configuration of a watch may have the alternative names of links, exactly and as patterns, in profiles
// and in exclude, and on the command line; also those that a link gets, or loses, while it is served.
func TestWatchAlternativeNames(t *testing.T) {
	h := newHost(t)
	for i, name := range []string{"wan0", "wan1", "wan2", "wan3"} {
		h.link(name, fmt.Sprintf("10.7%d.0.2/24", i))
	}
	h.ns.Batch(t, "link property add dev wan0 altname enp0s3", "link property add dev wan1 altname enx-of-the-second-provider",
		"link property add dev wan3 altname enp9s0 altname enp0s9")
	h.serve()
	p := h.watch("--config", h.watchFile(`{"exclude": ["enp9*"], "links": [{"ifname": "enp0s3", "tag": "first"}, {"ifname": "enx*", "tag": "second"}, {"ifname": "enp*", "tag": "third"}]}`))
	tagged := func(ifname, tag string) {
		t.Helper()
		eventually(t, ifname+" has a lease of profile "+tag, func() error {
			leases := strings.Join(h.leases(), "\n")
			if !regexp.MustCompile(`\b` + ifname + `\b.*\b` + tag + `\b`).MatchString(leases) {
				return errors.New(leases)
			}
			return nil
		})
	}
	tagged("wan0", "first")
	tagged("wan1", "second")
	h.notServed("10.72.0.2")
	h.ns.IP(t, "link property add dev wan2 altname enp0s8")
	tagged("wan2", "third")
	h.ns.IP(t, "link set wan2 name uplink2") // which no profile has
	h.served("10.72.0.2")
	tagged("uplink2", "third")
	h.ns.Batch(t, "link property add dev uplink2 altname enx8", "link property del dev wan0 altname enp0s3") // "second" comes before "third"
	tagged("uplink2", "second")
	eventually(t, "wan0 is served no more", func() error {
		if table := h.tableOf("10.70.0.2"); table != "" {
			return errors.New("it has table " + table)
		}
		return nil
	})
	h.notServed("10.73.0.2")
	if code := p.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}

	h.watch("-i", "enp9*", "--exclude", "wan0")
	h.served("10.73.0.2")
	if r := h.run(bin(t, clientBin), "status", "-i", "enp9*"); !strings.Contains(r.stdout, "10.73.0.2 ") || strings.Contains(r.stdout, "10.72.0.2 ") {
		t.Errorf("status: %+v", r)
	}
}
