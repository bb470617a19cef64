package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// A crossing is a host with two uplinks to one internet, both with IPv4 and IPv6, whose table main
// prefers the first one. It has a hierarchy of cgroups of its own.
//
//	wan0  10.1.0.2 fd01::2  via 10.1.0.1 fd01::1
//	wan1  10.2.0.2 fd02::2  via 10.2.0.1 fd02::1
//
// There is no NAT: who answers tells what address it saw. A provider drops packets with a source that
// it has not given out, as real ones do, and counts them.
type crossing struct {
	*host
	isps     [2]*nettest.Namespace
	internet *nettest.Namespace
	cgroup   string // the root of its cgroups, as the test sees it
	inner    string // of process that holds its namespaces
}

const (
	far4 = internet + ":7"
	far6 = "[2001:db8:ffff::1]:7"
)

// at are the addresses of the host on uplink n, by family.
func at(n int) (inet, inet6 string) {
	return fmt.Sprintf("10.%d.0.2", n+1), fmt.Sprintf("fd0%d::2", n+1)
}

// newCrossing makes one with a server, and a watch that fills the tables of all four addresses.
func newCrossing(t *testing.T, watch ...string) *crossing {
	t.Helper()
	c := newCrossingAlone(t)
	c.serve()
	c.watch(append([]string{"--routes", "copy"}, watch...)...)
	for n := range c.isps {
		c.waitTables(n)
	}
	return c
}

// newCrossingAlone makes one where nothing of ours runs.
func newCrossingAlone(t *testing.T) *crossing {
	t.Helper()
	c := &crossing{host: newHost(t), internet: nettest.New(t, "internet")}
	for _, ns := range []*nettest.Namespace{c.ns, c.internet} {
		sysctl(t, ns, "net/ipv6/conf/default/accept_dad", "0")
	}
	sysctl(t, c.ns, "net/ipv4/ping_group_range", "0 2147483647")
	sysctl(t, c.internet, "net/ipv4/ip_forward", "1")
	sysctl(t, c.internet, "net/ipv6/conf/all/forwarding", "1")
	c.internet.IP(t, "address add 198.51.100.1/32 dev lo")
	c.internet.IP(t, "address add 2001:db8:ffff::1/128 dev lo")
	for n := range c.isps {
		c.isps[n] = nettest.New(t, fmt.Sprintf("isp%d", n))
		c.connect(n)
	}
	c.internet.Do(func() {
		for _, addr := range []string{far4, far6} {
			serveWho(t, addr)
		}
	})
	c.enclose()
	return c
}

// connect makes uplink n and the provider at its other end.
func (c *crossing) connect(n int) {
	t, isp, ifname, net := c.t, c.isps[n], fmt.Sprintf("wan%d", n), n+1
	t.Helper()
	sysctl(t, isp, "net/ipv6/conf/default/accept_dad", "0")
	sysctl(t, isp, "net/ipv4/ip_forward", "1")
	sysctl(t, isp, "net/ipv6/conf/all/forwarding", "1")
	nettest.Veth(t, c.ns, ifname, isp, "lan")
	nettest.Veth(t, isp, "net", c.internet, ifname)
	for _, args := range []string{"10.%d.0.1/24", "fd0%d::1/64"} {
		isp.IP(t, "address add "+fmt.Sprintf(args, net)+" dev lan")
	}
	isp.IP(t, fmt.Sprintf("address add 100.64.%d.2/24 dev net", net))
	isp.IP(t, fmt.Sprintf("address add fd64:%d::2/64 dev net", net))
	isp.IP(t, fmt.Sprintf("route add default via 100.64.%d.1", net))
	isp.IP(t, fmt.Sprintf("-6 route add default via fd64:%d::1", net))
	c.internet.IP(t, fmt.Sprintf("address add 100.64.%d.1/24 dev %s", net, ifname))
	c.internet.IP(t, fmt.Sprintf("address add fd64:%d::1/64 dev %s", net, ifname))
	c.internet.IP(t, fmt.Sprintf("route add 10.%d.0.0/24 via 100.64.%d.2", net, net))
	c.internet.IP(t, fmt.Sprintf("-6 route add fd0%d::/64 via fd64:%d::2", net, net))
	rules := filepath.Join(c.dir, ifname+".nft")
	text := fmt.Sprintf(`table inet provider {
		counter foreign {}
		counter customers {}
		counter customers6 {}
		chain raw {
			type filter hook prerouting priority raw
			iifname != lan accept
			icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept
			ip saddr 10.%[1]d.0.0/24 tcp flags == ack accept comment "may come late"
			ip6 saddr fd0%[1]d::/64 tcp flags == ack accept
			ip saddr 10.%[1]d.0.0/24 counter name customers accept
			ip6 saddr fd0%[1]d::/64 counter name customers6 accept
			ip6 saddr { fe80::/10, ::/128 } accept
			counter name foreign drop
		}
	}`, net)
	if err := os.WriteFile(rules, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	isp.Run(t, "nft", "-f", rules)
	c.address(n)
}

// address gives the host its addresses and routes of uplink n.
func (c *crossing) address(n int) {
	c.t.Helper()
	ifname := fmt.Sprintf("wan%d", n)
	inet, inet6 := at(n)
	for _, args := range []string{
		"address replace " + inet + "/24 dev " + ifname,
		"address replace " + inet6 + "/64 dev " + ifname + " nodad",
		fmt.Sprintf("route replace default via 10.%d.0.1 dev %s metric %d", n+1, ifname, 100*(n+1)),
		fmt.Sprintf("-6 route replace default via fd0%d::1 dev %s metric %d", n+1, ifname, 100*(n+1)),
	} {
		c.ns.IP(c.t, args)
	}
}

// serveWho answers each datagram and each piece of a stream with the address that it came from.
func serveWho(t *testing.T, addr string) {
	t.Helper()
	datagrams, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	streams, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	var conns sync.Map
	who := func(from net.Addr) []byte {
		host, _, err := net.SplitHostPort(from.String())
		if err != nil {
			return []byte(err.Error() + "\n")
		}
		return []byte(host + "\n")
	}
	all.Go(func() {
		buf := make([]byte, 64)
		for {
			_, from, err := datagrams.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = datagrams.WriteTo(who(from), from) // who asked sees that
			}
		}
	})
	all.Go(func() {
		for {
			conn, err := streams.Accept()
			if err != nil {
				return
			}
			conns.Store(conn, nil)
			all.Go(func() {
				defer conn.Close()
				for buf := make([]byte, 64); ; {
					if _, err := conn.Read(buf); err != nil {
						return
					}
					_, _ = conn.Write(who(conn.RemoteAddr())) // as above
				}
			})
		}
	})
	t.Cleanup(func() {
		datagrams.Close()
		streams.Close()
		conns.Range(func(conn, _ any) bool { conn.(net.Conn).Close(); return true })
		all.Wait()
	})
}

// enclose gives the host its cgroups.
func (c *crossing) enclose() {
	c.t.Helper()
	var err error
	if c.cgroup, err = os.MkdirTemp("/sys/fs/cgroup", "crossing"); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		eventually(c.t, "the cgroups of the test are removed", func() error {
			_ = os.WriteFile(filepath.Join(c.cgroup, "cgroup.kill"), []byte("1"), 0) // none may be left
			return errors.Join(removeTree(c.cgroup))
		})
	})
	const script = `echo 0 >"$0/cgroup.procs"
		exec unshare --cgroup --mount --propagation private sh -c '
			umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount -t bpf bpf /sys/fs/bpf &&
			mkdir /sys/fs/cgroup/user && echo ready && exec sleep infinity'`
	p := c.start(exec.Command("sh", "-ec", script, c.cgroup))
	p.waitLog("ready")
	c.inner = fmt.Sprint(p.cmd.Process.Pid)
}

func removeTree(dir string) (err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, os.Remove(dir))
}

// here is a command of the host, in cgroup /user.
func (c *crossing) here(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target=" + c.inner, "--mount", "--cgroup", "sh", "-c",
		`echo 0 >/sys/fs/cgroup/user/cgroup.procs && exec "$@"`, "sh", name}, args...)...)
}

// do runs our client to its end.
func (c *crossing) do(args ...string) result {
	c.t.Helper()
	cmd := c.here(bin(c.t, clientBin), args...)
	return c.run(cmd.Args[0], cmd.Args[1:]...)
}

// must is do for what has to succeed, and returns what it wrote.
func (c *crossing) must(args ...string) string {
	c.t.Helper()
	r := c.do(args...)
	if r.code != 0 {
		c.t.Fatalf("client %q: exit code %d\nstdout: %s\nstderr: %s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// waitTables waits until what is sent from either address of uplink n gets there.
func (c *crossing) waitTables(n int) {
	c.t.Helper()
	inet, inet6 := at(n)
	for _, addr := range []string{inet, inet6} {
		table := c.served(addr)
		eventually(c.t, "table "+table+" is filled", func() error {
			for _, family := range []string{"-4", "-6"} {
				out, _ := c.ns.Output("ip", family, "route", "show", "default", "table", table) // no table, no routes
				if strings.Contains(out, fmt.Sprintf("dev wan%d", n)) {
					return nil
				}
			}
			return errors.New("no default route")
		})
	}
}

// A prober is a program that makes sockets as it is told.
type probing struct {
	t   *testing.T
	p   *process
	in  io.WriteCloser
	out *bufio.Reader
}

// prober starts one behind the words of a command: none, or run and its options.
func (c *crossing) prober(before ...string) *probing {
	c.t.Helper()
	self, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	words := append(before, self)
	cmd := c.here(words[0], words[1:]...)
	cmd.Env = append(os.Environ(), probeVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		c.t.Fatal(err)
	}
	defer w.Close()
	cmd.Stdout = w
	p := &probing{t: c.t, p: c.start(cmd), in: in, out: bufio.NewReader(r)}
	c.t.Cleanup(func() {
		in.Close() // ends it, where a shell is between us, too
		r.Close()
	})
	return p
}

// bound is a prober that runs bound to a link.
func (c *crossing) bound(ifname string, options ...string) *probing {
	c.t.Helper()
	return c.prober(append(append([]string{bin(c.t, clientBin), "run", "--ifname", ifname}, options...), "--")...)
}

// do returns the answer to a command.
func (p *probing) do(format string, args ...any) string {
	p.t.Helper()
	line := fmt.Sprintf(format, args...)
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		p.t.Fatalf("%s: %v; it wrote:\n%s", line, err, p.p.log)
	}
	timer := time.AfterFunc(patience, p.p.kill)
	defer timer.Stop()
	answer, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("%s: no answer: %v; it wrote:\n%s", line, err, p.p.log)
	}
	return strings.TrimSpace(answer)
}

// want fails the test unless the answer to the last of some commands, one in a line, is this one; the
// others have to succeed.
func (p *probing) want(want, commands string, args ...any) {
	p.t.Helper()
	lines := strings.Split(fmt.Sprintf(commands, args...), "\n")
	for i, line := range lines {
		got := p.do("%s", line)
		switch {
		case i < len(lines)-1 && got == "ok":
		case i < len(lines)-1:
			p.t.Errorf("%s: %s", line, got)
			return
		case got != want:
			p.t.Errorf("%s: got %q, want %q", strings.Join(lines, "; "), got, want)
		}
	}
}

// counts are packets that a provider got, without acknowledgements that carry nothing else.
type counts struct{ Inet, Inet6, Foreign int }

func (c *crossing) counts() (all [2]counts) {
	c.t.Helper()
	for n, isp := range c.isps {
		var reply struct {
			Nftables []struct {
				Counter *struct {
					Name    string
					Packets int
				}
			}
		}
		out := isp.Run(c.t, "nft", "-j", "list", "counters")
		if err := json.Unmarshal([]byte(out), &reply); err != nil {
			c.t.Fatalf("counters of provider %d: %v\n%s", n, err, out)
		}
		for _, o := range reply.Nftables {
			if o.Counter != nil {
				*map[string]*int{"customers": &all[n].Inet, "customers6": &all[n].Inet6, "foreign": &all[n].Foreign}[o.Counter.Name] = o.Counter.Packets
			}
		}
	}
	return all
}

// only fails the test unless what f sends leaves by uplink n alone, and with its addresses.
func (c *crossing) only(n int, f func()) {
	c.t.Helper()
	before := c.counts()
	f()
	after := c.counts()
	if after[1-n] != before[1-n] || after[n].Foreign != before[n].Foreign {
		c.t.Errorf("packets of what is bound to wan%d went astray: before %+v, after %+v", n, before, after)
	}
	if after[n] == before[n] {
		c.t.Errorf("no packet left by wan%d: %+v", n, after)
	}
}

// nothing fails the test if anything leaves by any uplink while f runs.
func (c *crossing) nothing(f func()) {
	c.t.Helper()
	before := c.counts()
	f()
	if after := c.counts(); after != before {
		c.t.Errorf("packets left: before %+v, after %+v", before, after)
	}
}
