package e2e

import (
	"net"
	"strings"
	"testing"
)

// TestChoiceInPlace: a router without the Internet that resets connections, refuses DNS and drops the rest is dead.
func TestChoiceInPlace(t *testing.T) {
	c := newChooser(t, copyLinks)
	c.internet.Do(func() {
		for _, far := range []string{internet, internet6} {
			serveAnswer(t, net.JoinHostPort(far, "53"), nameAnswer)
		}
	})
	c.isps[0].ns.Do(func() { serveAnswer(t, ":5353", refusal) })
	c.waitUsed("wan0")
	c.waitUnbound(0)
	c.fault(0, `chain f { type filter hook forward priority 0; meta l4proto tcp reject with tcp reset; drop; }
		chain n { type nat hook prerouting priority dstnat; udp dport 53 redirect to :5353; }`)
	c.waitState("wan0", "inet", "dead")
	c.waitState("wan0", "inet6", "dead")
	c.waitUnbound(1)
	c.mend(0)
	c.waitUnbound(0)
	c.wantOwnOnly()
}

// refusal answers a DNS question as a resolver does that has nobody to ask.
func refusal(question []byte) []byte {
	const flags, refused = 3, 5
	b := nameAnswer(question)
	if len(b) > flags {
		b[flags] |= refused
	}
	return b
}

// TestChoiceGatewayAlone: where neither the configuration nor the network names anybody to ask, the gateway on the link is asked.
func TestChoiceGatewayAlone(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links, `"targets": []`)
		c.waitUsed("wan0")
		for _, u := range c.report().Uplinks {
			if !strings.Contains(u.Reason, "only its gateway is asked") || u.Bytes == 0 {
				t.Errorf("%+v", u)
			}
		}
		c.fault(0, noGateway)
		c.waitState("wan0", "inet", "dead")
		c.waitState("wan0", "inet6", "dead")
		c.waitUnbound(1)
		c.mend(0)
		c.waitUnbound(0)
		c.wantOwnOnly()
	})
}
