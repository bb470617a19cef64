//go:build integration

package integration

import (
	"bufio"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// A peer is a way to give the second of two uplinks its own routes. Its link goes down and up again and again.
type peer struct {
	name     string
	ours     bool // the package is installed
	watch    bool
	files    map[string]string
	start    string
	down, up string
	original string // the directory with the C original, which is installed
}

const (
	networkdDown, networkdUp             = `networkctl down wan2`, `networkctl up wan2`
	networkManagerDown, networkManagerUp = `nmcli --wait 60 connection down wan2`, `until nmcli --wait 60 connection up wan2; do sleep 1; done`
)

// dispatcherScript is what people write for NetworkManager: twelve ip commands for a link with the table of its number.
const dispatcherScript = `#!/bin/sh
case $1 in wan1) table=101 ;; wan2) table=102 ;; *) exit 0 ;; esac
case $2 in
up)
	addr=${IP4_ADDRESS_0%%/*} net=$(ip -4 route show dev "$1" proto kernel | cut -d' ' -f1)
	ip route flush table $table
	ip rule delete priority $table
	ip rule delete priority 2$table
	ip route add "$net" dev "$1" src "$addr" table $table
	ip route add default via "$IP4_GATEWAY" dev "$1" src "$addr" table $table
	ip rule add priority $table from "$addr" lookup $table
	ip rule add priority 2$table to "$net" lookup $table
	ip route flush cache
	;;
down)
	ip rule delete priority $table
	ip rule delete priority 2$table
	ip route flush table $table
	;;
esac
exit 0
`

var peers = []peer{
	{name: "table-allocator's watch, with networkd", ours: true, watch: true, files: networkd, start: startNetworkd, down: networkdDown, up: networkdUp},
	{name: "networkd with static rules", start: startNetworkd, down: networkdDown, up: networkdUp, files: map[string]string{
		"/run/systemd/network/wan{N}.network": "[Match]\nName=wan{N}\n[Network]\nDHCP=ipv4\n[DHCPv4]\nRouteMetric={N}00\n[Route]\nGateway=_dhcp4\nTable=10{N}\n" +
			"[Route]\nDestination=10.{N}.0.0/24\nScope=link\nTable=10{N}\n[RoutingPolicyRule]\nFrom=10.{N}.0.0/24\nTable=10{N}\nPriority=10{N}\n"}},
	{name: "table-allocator's hook, with NetworkManager", ours: true, files: networkManager, start: startNetworkManager, down: networkManagerDown, up: networkManagerUp},
	{name: "a dispatcher script, with NetworkManager", start: startNetworkManager, down: networkManagerDown, up: networkManagerUp,
		files: withScript(networkManager)},
}

func withScript(files map[string]string) map[string]string {
	all := maps.Clone(files)
	all["/etc/NetworkManager/dispatcher.d/50-tables"] = dispatcherScript
	return all
}

// contest is a peer on a machine of its own.
type contest struct {
	peer
	m       *machine
	addr    string
	took    []time.Duration
	before  int
	left    int
	kib     int
	tooLate int // the first right packet did not come in time
}

// TestPeers measures, for each peer, how long it takes from the address on the link to the first packet that leaves by
// that link, the memory of what is installed for that, and the rules and routes that are left when the link is down at
// the end. The peers take turns. A few flaps show that it works; make bench BENCHFLAGS='-only peers' does 100.
func TestPeers(t *testing.T) {
	flaps := 2
	if n, err := strconv.Atoi(os.Getenv("PEERS_FLAPS")); err == nil {
		flaps = n
	}
	all, peers := []*contest(nil), peers
	if dir := os.Getenv("PEERS_ORIGINAL"); dir != "" {
		peers = append(slices.Clone(peers), withDhclient(dir)...)
	}
	for _, p := range peers {
		all = append(all, p.enter(t))
	}
	for range flaps {
		for _, c := range all {
			c.flap()
		}
	}
	fmt.Printf("| %-45s %9s %9s %7s %9s %8s\n", fmt.Sprintf("%d flaps of an uplink", flaps), "p50", "p99", "failed", "memory", "left")
	for _, c := range all {
		c.sh(c.down)
		c.gone()
		c.left = c.state() - c.before
		c.kib = c.memory()
		slices.Sort(c.took)
		if len(c.took) == 0 {
			t.Errorf("%s: no packet ever left by the link", c.name)
			continue
		}
		quantile := func(q int) time.Duration {
			return c.took[min(len(c.took)-1, len(c.took)*q/100)].Round(10 * time.Microsecond)
		}
		fmt.Printf("| %-45s %9v %9v %7d %5d KiB %8d\n", c.name, quantile(50), quantile(99), c.tooLate, c.kib, c.left)
		if c.ours && (c.left != 0 || c.tooLate != 0) {
			t.Errorf("%s: %d rules and routes are left, %d flaps without a packet", c.name, c.left, c.tooLate)
		}
	}
}

// enter brings both uplinks of a machine up.
func (p peer) enter(t *testing.T) *contest {
	m := boot(t, debian("trixie", managers))
	i := m.behind(2)
	i.dhcp()
	i.echo()
	c := &contest{peer: p, m: m}
	if p.ours {
		files, err := debs()
		if err != nil {
			t.Fatal(err)
		}
		m.install(files[0])
	}
	if p.original != "" {
		m.installOriginal(p.original)
	}
	for path, text := range p.files {
		for _, number := range []string{"1", "2"} {
			mode := os.FileMode(0o644)
			switch {
			case strings.Contains(path, "dispatcher.d"):
				mode = 0o755
			case strings.HasPrefix(path, "/etc/NetworkManager/"):
				mode = 0o600
			}
			m.write(expand(path, number), expand(text, number), mode)
		}
	}
	if p.watch {
		m.sh(`systemctl enable --now table-allocator-watch`)
	}
	m.sh(p.start)
	i.waitUplinks(inet...)
	c.addr = strings.TrimSpace(m.sh(`ip -4 -o address show dev wan2 scope global | awk '{ print $4 }' | cut -d/ -f1 | head -n 1`))
	c.sh(p.down)
	c.gone()
	c.before = c.state()
	c.sh(p.up)
	m.wait("the link is up", c.there()+`there`)
	return c
}

func (c *contest) sh(script string) { c.m.sh(script) }

// has reports whether the host has the address.
func (c *contest) has() bool {
	conn, err := net.ListenPacket("udp4", net.JoinHostPort(c.addr, "0"))
	if err == nil {
		_ = conn.Close() // nothing was sent
	}
	return err == nil
}

// there is a function of the shell that tells whether the host has the address.
func (c *contest) there() string {
	return `there() { ip address show dev wan2 | grep -F "` + c.addr + `/"; }; `
}

// gone waits until the address is gone. networkd 257 takes a link up again that goes down while a router advertisement is on its way.
func (c *contest) gone() {
	c.m.wait("the address is gone", c.there()+`! there || { sleep 1; ! there; } || { `+c.down+` || :; false; }`)
}

// flap takes the link down and up, and measures.
func (c *contest) flap() {
	c.sh(c.down)
	c.gone()
	done := make(chan struct{})
	go func() { c.m.ns.Do(func() { c.measure(); close(done) }) }()
	c.sh(c.up)
	<-done
}

// rightIn is how long a first packet may take. Of ours it fails the test.
func (p peer) rightIn() time.Duration {
	if p.ours {
		return patience
	}
	return 20 * time.Second
}

// measure waits for the address, and sends datagrams from it until one has its answer: the other provider drops them.
func (c *contest) measure() {
	for deadline := time.Now().Add(patience); !c.has(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			c.tooLate++
			return
		}
	}
	conn, err := net.ListenPacket("udp4", net.JoinHostPort(c.addr, "0"))
	if err != nil { // the address has gone again
		c.tooLate++
		return
	}
	defer conn.Close()
	far := &net.UDPAddr{IP: net.ParseIP(nettest.Far4), Port: 7}
	begin := time.Now()
	var sent []time.Duration
	for time.Since(begin) < c.rightIn() {
		sent = append(sent, time.Since(begin))
		_, _ = conn.WriteTo([]byte(strconv.Itoa(len(sent)-1)), far) // without a route there is no answer
		_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))  // of an open socket
		buf := make([]byte, 32)
		n, _, err := conn.ReadFrom(buf)
		if seq, bad := strconv.Atoi(string(buf[:n])); err == nil && bad == nil && seq < len(sent) {
			c.took = append(c.took, sent[seq])
			return
		}
	}
	c.tooLate++
}

// echo answers datagrams in the internet.
func (i *internet) echo() {
	i.Do(func() {
		conn, err := net.ListenPacket("udp4", net.JoinHostPort(nettest.Far4, "7"))
		if err != nil {
			i.m.t.Fatal(err)
		}
		i.m.t.Cleanup(func() { _ = conn.Close() })
		go func() {
			buf := make([]byte, 32)
			for {
				n, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = conn.WriteTo(buf[:n], from) // the host may have gone
			}
		}()
	})
}

// state counts rules and routes, but for those of the kernel's table local and of main, when ours have gone with the address and
// nothing has changed for a second.
func (c *contest) state() int {
	if c.ours {
		c.m.wait("the rules of the address are gone", `! ip rule | grep -F "from `+c.addr+` "`)
	}
	const count = `{ ip -4 rule; ip -4 route show table all | grep " table " | grep -v "table local"; } | wc -l; `
	c.m.wait("nothing changes", `a=$(`+count+`); sleep 1; b=$(`+count+`); [ "$a" = "$b" ]`)
	n, err := strconv.Atoi(strings.TrimSpace(c.m.sh(count)))
	if err != nil {
		c.m.t.Fatal(err)
	}
	return n
}

// memory is the proportional share of memory of our processes or of the original's. Other peers have none beside their manager.
func (c *contest) memory() (kib int) {
	for lines := bufio.NewScanner(strings.NewReader(c.m.sh(`for p in $(pidof table-allocator-server table-allocator-client table_allocator_server table_allocator_client || :); do grep ^Pss: /proc/$p/smaps_rollup; done`))); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) == 3 {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				c.m.t.Fatal(err)
			}
			kib += n
		}
	}
	return kib
}
