package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
)

// newNamespaces makes a crossing whose /run, and with it the pins of namespaces, is its own.
func newNamespaces(t *testing.T) *crossing {
	t.Helper()
	c := newCrossingAlone(t)
	if _, err := os.Stat("/proc/sys/net/ipv6/conf/all/force_forwarding"); err != nil {
		sysctl(t, c.ns, "net/ipv6/conf/all/forwarding", "1") // before Linux 6.17 a host forwards IPv6 for all of its links or for none
	}
	c.privateRun()
	c.serve()
	c.watch("--routes", "copy", "--exclude", "lo,plain*")
	for n := range c.isps {
		c.waitTables(n)
	}
	return c
}

// privateRun gives the mount namespace of a crossing a /run and an /etc of its own.
func (c *crossing) privateRun() {
	c.t.Helper()
	c.sh("mount -t tmpfs run /run && mkdir /run/etc && mount -t tmpfs etc /run/etc && cp -a /etc/. /run/etc && mount --move /run/etc /etc && mkdir -p /etc/netns && [ -e /etc/resolv.conf ] || echo '# none' >/etc/resolv.conf")
}

// sh runs a script on the host, in its mount namespace, and returns what it prints.
func (c *crossing) sh(script string) string {
	c.t.Helper()
	cmd := c.here("sh", "-ec", script)
	r := c.run(cmd.Args[0], cmd.Args[1:]...)
	if r.code != 0 {
		c.t.Fatalf("%s: %+v", script, r)
	}
	return r.stdout
}

// inNamespace starts a prober in a namespace of ours.
func (c *crossing) inNamespace(name string) *probing {
	c.t.Helper()
	return c.prober(bin(c.t, clientBin), "netns", "exec", name, "--")
}

// namespaceRow is a namespace in the JSON of netns list.
type namespaceRow struct {
	Name, Ifname, Pattern, State, Resolv, Missing string
	IPv6, Wiring                                  string
	OnLoss                                        string `json:"on_loss"`
	Tables                                        []uint32
	Addresses                                     []string
	Programs                                      []struct {
		PID     int
		UID     uint32
		Command string
	}
}

func (c *crossing) namespaces() []namespaceRow {
	c.t.Helper()
	r := c.do("netns", "list", "--json")
	var list struct{ Namespaces []namespaceRow }
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil {
		c.t.Fatalf("netns list --json: %v\n%+v", err, r)
	}
	return list.Namespaces
}

// namespaceTraces is all that namespaces have on the host, "" if nothing is left of any.
func (c *crossing) namespaceTraces() string {
	c.t.Helper()
	return c.sh(`
		ip -o link show | grep -o 'tav[0-9]*' || :
		ip rule | grep -e tav -e suppress_prefixlength.30 || :
		ip -6 rule | grep -e tav -e suppress_prefixlength.126 || :
		nft list ruleset
		ls /run/netns /run/table-allocator/netns/*/.mnt 2>/dev/null | grep -v -e : -e '^$' || :
		ls -d /run/table-allocator/netns/*/[a-z]* /run/table-allocator/netns/*/.*.resolv 2>/dev/null || :
		grep -e ' /run/netns/' -e '/.mnt/' /proc/self/mountinfo || :
		ip -6 neigh show proxy
		for f in /proc/sys/net/ipv4/conf/wan*/forwarding /proc/sys/net/ipv6/conf/wan*/force_forwarding /proc/sys/net/ipv6/conf/wan*/proxy_ndp /proc/sys/net/ipv6/conf/wan*/forwarding; do
			[ -e /proc/sys/net/ipv6/conf/all/force_forwarding ] || case $f in */ipv6/*/forwarding) continue;; esac
			[ ! -e $f ] || [ $(cat $f) = 0 ] || echo $f
		done`)
}

// fourProbes sends TCP and UDP, IPv4 and IPv6, from a prober to the internet. want is the answer to each, with the
// address that the internet sees for "inet" and "inet6".
func fourProbes(p *probing, n int) {
	p.t.Helper()
	inet, inet6 := at(n)
	p.want(inet, "new s tcp4\nconnect s %s\nask s", far4)
	p.want(inet, "new s udp4\nask s %s", far4)
	p.want(inet6, "new s tcp6\nconnect s %s\nask s", far6)
	p.want(inet6, "new s udp6\nask s %s", far6)
}

// startProbes sends the same, without waiting for an answer. It returns what each of them said.
func startProbes(p *probing) string {
	p.t.Helper()
	var answers []string
	for kind, to := range map[string]string{"tcp4": far4, "tcp6": far6} {
		p.do("new s %s", kind)
		answers = append(answers, fmt.Sprint(kind, " ", p.do("start s %s", to)))
	}
	for kind, to := range map[string]string{"udp4": far4, "udp6": far6} {
		p.do("new s %s", kind)
		answers = append(answers, fmt.Sprint(kind, " ", p.do("try s %s", to)))
	}
	return strings.Join(answers, ", ")
}
