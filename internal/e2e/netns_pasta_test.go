package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// TestNetnsPasta: a namespace whose packets pasta carries, by sockets that are bound to the uplink. No filter for what is forwarded
// concerns them. Nothing leaves by the other uplink, whatever happens to its own, to pasta and to the service.
func TestNetnsPasta(t *testing.T) {
	c := newNamespaces(t)
	add := []string{"netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53", "--wiring", "pasta"}
	for _, options := range []string{"--ipv6 nat", "--vpn /etc/hosts"} {
		if r := c.do(append(add, strings.Fields(options)...)...); r.code != 2 {
			t.Errorf("pasta with %s: %+v", options, r)
		}
	}
	c.sh("mv /usr/bin/pasta /usr/bin/pasta.away")
	if r := c.do(add...); r.code != 1 || !strings.Contains(r.stderr, "apt install passt") {
		t.Errorf("without pasta: %+v", r)
	}
	c.sh("mv /usr/bin/pasta.away /usr/bin/pasta")
	if r := c.do(add...); r.code != 0 || !strings.Contains(r.stderr, "enable and start the service table-allocator-netns") {
		t.Errorf("add: %+v", r)
	}
	serve := func() *process {
		return c.start(c.here("sh", "-c", `exec "$@" >>/run/serve.log 2>&1`, "sh", bin(t, clientBin), "netns", "serve"))
	}
	service := serve()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.sh("cat /run/serve.log"))
		}
		c.do("netns", "del", "--all", "--kill", "5")
	})
	p := c.inNamespace("work")
	works := func(n int, when string) {
		t.Helper()
		inet, inet6 := at(n)
		farEndSees(t, p, inet, inet6, when)
	}
	running := func() string { return strings.TrimSpace(c.sh("pidof pasta.avx2 pasta || :")) }
	c.only(1, func() { works(1, "at first") })
	if p.do("new s ping4") != "ok" || p.do("try s %s", far4) == "" {
		t.Error("no ping")
	}
	before := running()
	if rights := c.sh("grep -E '^(Uid|CapEff|CapAmb|NoNewPrivs|Seccomp):' /proc/" + before + "/status"); strings.Join(strings.Fields(rights), " ") !=
		"Uid: 65534 65534 65534 65534 CapEff: 0000000000200000 CapAmb: 0000000000000000 NoNewPrivs: 1 Seccomp: 2" {
		t.Errorf("pasta has rights:\n%s", rights)
	}
	if rows := c.namespaces(); len(rows) != 1 || rows[0].Missing != "" || rows[0].Wiring != "pasta" || len(rows[0].Addresses) != 2 || len(rows[0].Programs) != 1 {
		t.Errorf("list: %+v", rows)
	}
	c.sh("nft 'table inet other { chain f { type filter hook forward priority 0; policy drop; }; }'")
	c.only(1, func() { works(1, "with a filter that forwards nothing") })
	c.sh("nft flush ruleset")
	c.only(1, func() { works(1, "without any filter") })
	c.ns.IP(t, "link set wan1 down")
	c.nothing(func() { t.Log("while the uplink is down:", startProbes(p)) })
	c.sh("kill -9 " + before) // the next one begins while the link has no address of IPv6
	c.nothing(func() { t.Log("without pasta:", startProbes(p)) })
	c.ns.IP(t, "link set wan1 up")
	c.address(1)
	c.only(1, func() { works(1, "after the uplink was down") })
	// Without the service pasta goes on. Killed too, nothing leaves at all.
	before = running()
	service.kill()
	c.only(1, func() { works(1, "after the service was killed") })
	service = serve()
	eventually(t, "the next service serves", func() error {
		if text := c.sh("cat /run/serve.log"); strings.Count(text, "serving namespaces") < 2 {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
	if now := running(); now != before {
		t.Errorf("the next service runs another pasta: %s, before %s", now, before)
	}
	c.must("netns", "set", "work", "--ifname", "wan0")
	eventually(t, "the connections of the pasta before are ended", func() error {
		if left := c.sh("ss -tanH exclude time-wait src 10.2.0.2; ss -tanH exclude time-wait src [fd02::2]"); left != "" {
			return fmt.Errorf("%s", left)
		}
		return nil
	})
	c.only(0, func() { works(0, "with another uplink") })
	service.kill()
	counts := c.counts()
	c.sh("kill -9 " + running()) // the kernel ends its connections, which may take packets by their uplink
	if answers := startProbes(p); strings.ContainsAny(answers, ".:") || strings.Contains(answers, " ok") {
		t.Error("without pasta and service:", answers)
	}
	if now := c.counts(); now[1] != counts[1] || now[0].Foreign != counts[0].Foreign {
		t.Errorf("packets left without pasta and service: before %+v, after %+v", counts, now)
	}
	serve()
	c.only(0, func() { works(0, "with both again") })
	c.must("netns", "del", "work", "--kill", "5")
	if left := c.namespaceTraces() + running(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}
