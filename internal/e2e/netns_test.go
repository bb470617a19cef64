package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNetns: a namespace's packets leave by its uplink with its address, though main prefers the other one; nothing is
// left of it.
func TestNetns(t *testing.T) {
	c := newNamespaces(t)
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53,2001:db8::53")
	p := c.inNamespace("work")
	c.only(1, func() { fourProbes(p, 1) })
	c.only(1, func() {
		p.want("reply", "new s ping4\nask s "+far4)
		p.want("reply", "new s ping6\nask s "+far6)
	})
	if text := c.must("netns", "exec", "work", "cat", "/etc/resolv.conf"); !strings.HasPrefix(text, "nameserver 192.0.2.53\nnameserver 2001:db8::53\n") {
		t.Errorf("resolv.conf: %s", text)
	}
	if links := c.must("netns", "exec", "work", "ls", "/sys/class/net"); links != "eth0\nlo\n" {
		t.Errorf("links in /sys: %q", links)
	}
	rows := c.namespaces()
	if len(rows) != 1 || rows[0].Name != "work" || rows[0].Ifname != "wan1" || rows[0].OnLoss != "block" || rows[0].State != "up" || rows[0].Missing != "" ||
		len(rows[0].Tables) == 0 || len(rows[0].Addresses) != 2 || len(rows[0].Programs) != 1 || rows[0].Programs[0].PID != p.p.cmd.Process.Pid {
		t.Errorf("list: %+v", rows)
	}
	if r := c.do("netns", "del", "work"); r.code != 1 || !strings.Contains(r.stderr, "programs run in it") {
		t.Errorf("del with a program in it: %+v", r)
	}
	c.must("netns", "add", "other", "--ifname", "wan0", "--resolv", "192.0.2.53")
	q := c.inNamespace("other")
	c.only(0, func() { fourProbes(q, 0) })
	c.must("netns", "set", "work", "--ifname", "wan0")
	c.only(0, func() { fourProbes(p, 0) })
	c.must("netns", "set", "work", "--ifname", "wan1")
	c.only(1, func() { fourProbes(p, 1) })
	if r := c.do("bound"); !strings.Contains(r.stdout, "iif tav1 (namespace work)") {
		t.Errorf("bound: %+v", r)
	}
	if r := c.do("bound"); !strings.Contains(r.stdout, fmt.Sprintf("%d (", p.p.cmd.Process.Pid)) {
		t.Errorf("bound lacks the program: %+v", r)
	}
	if text := c.must("status"); !strings.Contains(text, "namespace work on wan1, block, tables 10001, 1 programs\n") || !strings.Contains(text, "namespace other on wan0") {
		t.Errorf("status:\n%s", text)
	}
	if text := c.must("status", "wan1", "--json"); !strings.Contains(text, `"namespaces":[{"name":"work","ifname":"wan1","on_loss":"block","tables":[10001],"addresses":["172.24.0.3"`) || strings.Contains(text, "other") && strings.Contains(text, `"name":"other"`) {
		t.Errorf("status --json: %s", text)
	}
	c.must("unbind", "--all") // a namespace without its guard could leave by any uplink
	if r := c.do("release", "--all"); r.code != 1 || !strings.Contains(r.stderr, "netns del") {
		t.Errorf("release: %+v", r)
	}
	c.only(1, func() { fourProbes(p, 1) })
	c.must("netns", "del", "--all", "--kill", "5")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// TestNetnsLoss: with block nothing leaves by the other uplink, whatever its own loses; with fallback it does.
func TestNetnsLoss(t *testing.T) {
	c := newNamespaces(t)
	c.must("netns", "add", "strict", "--ifname", "wan1", "--resolv", "192.0.2.53")
	c.must("netns", "add", "loose", "--ifname", "wan1", "--on-loss", "fallback", "--resolv", "192.0.2.53")
	// Both gateways answer for all addresses, so that main needs none on the way by the other uplink.
	for _, isp := range c.isps {
		sysctl(t, isp.ns, "net/ipv4/conf/lan/proxy_arp", "1")
	}
	c.ns.IP(t, "route add default dev wan0 metric 50")
	strict, loose := c.inNamespace("strict"), c.inNamespace("loose")
	c.only(1, func() { fourProbes(strict, 1) })
	c.only(1, func() { fourProbes(loose, 1) })
	inet, inet6 := at(1)
	for _, loss := range []struct{ lose, back string }{
		{"link set wan1 down", "link set wan1 up"},
		{"address flush dev wan1", ""},
	} {
		// Until the watch has seen it, packets have no address of the uplink: they must not have one of another.
		c.signal("watch", unix.SIGSTOP)
		c.ns.IP(t, loss.lose)
		c.nothing(func() { t.Log(loss.lose, startProbes(strict)) })
		c.signal("watch", unix.SIGCONT)
		c.nothing(func() { t.Log(loss.lose, startProbes(strict)) })
		eventually(t, "the watch has seen it", func() error {
			if rules := c.ns.IP(t, "rule"); strings.Contains(rules, "from "+inet+" lookup") && loss.back == "" {
				return fmt.Errorf("rules:\n%s", rules)
			}
			return nil
		})
		c.only(0, func() { fourProbes(loose, 0) })
		if loss.back != "" {
			c.ns.IP(t, loss.back)
		}
		c.address(1)
		c.waitTables(1)
		c.only(1, func() { fourProbes(strict, 1) })
		c.only(1, func() { fourProbes(loose, 1) })
	}
	// Another address, and with it another table.
	c.ns.IP(t, "address del "+inet+"/24 dev wan1")
	c.ns.IP(t, "-6 address del "+inet6+"/64 dev wan1")
	c.ns.IP(t, "address add 10.2.0.9/24 dev wan1")
	c.ns.IP(t, "route replace default via 10.2.0.1 dev wan1 metric 200")
	c.served("10.2.0.9")
	eventually(t, "the namespace has the new address", func() error {
		strict.do("new s udp4")
		if got := strict.do("try s %s", far4); got != "10.2.0.9" {
			return fmt.Errorf("it has %s", got)
		}
		return nil
	})
	// Its watch killed: nothing changes. What the other namespace may still have to say leaves by wan0.
	c.must("netns", "del", "loose", "--kill", "5")
	c.address(1)
	c.waitTables(1)
	c.signal("watch", unix.SIGKILL)
	c.nothing(func() { c.ns.IP(t, "link set wan1 down"); startProbes(strict) })
}

// TestNetnsFilter: a namespace reaches neither this host nor another namespace nor the networks of other uplinks, and
// neither the uplink's network nor the internet reaches it.
func TestNetnsFilter(t *testing.T) {
	c := newNamespaces(t)
	c.must("netns", "add", "a", "--ifname", "wan1", "--resolv", "192.0.2.53")
	c.must("netns", "add", "b", "--ifname", "wan0", "--resolv", "192.0.2.53")
	p := c.inNamespace("a")
	rows := c.namespaces()
	if len(rows) != 2 {
		t.Fatalf("%+v", rows)
	}
	c.ns.Do(func() { serveWho(t, "0.0.0.0:7"); serveWho(t, "[::]:8") })
	inet0, _ := at(0)
	inet1, inet61 := at(1)
	host := strings.Fields(c.ns.IP(t, "-4 -o address show dev tav1"))[3]
	for _, to := range []string{inet0, inet1, strings.Split(host, "/")[0]} {
		p.do("new s tcp4")
		if got := p.do("start s %s:7", to); got == "ok" {
			t.Errorf("the namespace reaches this host at %s", to)
		}
	}
	p.do("new s tcp6")
	if got := p.do("start s [%s]:8", inet61); got == "ok" {
		t.Errorf("the namespace reaches this host at %s", inet61)
	}
	q := c.inNamespace("b")
	q.want("ok", "new l tcp4\nbind l 0.0.0.0:9\nnew m tcp6\nbind m [::]:10")
	q.do("listen l")
	q.do("listen m")
	p.do("new s tcp4")
	if got := p.do("start s %s:9", rows[1].Addresses[0]); got == "ok" {
		t.Error("a namespace reaches the other one")
	}
	c.ns.Do(func() {
		for kind, to := range map[string]string{"tcp4": rows[1].Addresses[0] + ":9", "tcp6": "[" + rows[1].Addresses[1] + "]:10"} {
			s := prober{make(map[string]int)}
			if err := s.open("s", kind); err != nil {
				t.Fatal(err)
			}
			if _, err := s.do("start", "s", to); err == nil {
				t.Errorf("this host reaches %s in the namespace", to)
			}
		}
	})
	isp := c.isps[0].ns
	isp.IP(t, "route add "+rows[1].Addresses[0]+"/32 via "+inet0)
	isp.IP(t, "route add "+rows[1].Addresses[1]+"/128 via fd01::2")
	isp.Do(func() {
		for _, probe := range []struct{ kind, to string }{{"tcp4", rows[1].Addresses[0] + ":9"}, {"tcp6", "[" + rows[1].Addresses[1] + "]:10"}} {
			s := prober{make(map[string]int)}
			if err := s.open("s", probe.kind); err != nil {
				t.Fatal(err)
			}
			if _, err := s.do("start", "s", probe.to); err == nil {
				t.Errorf("the network of the uplink reaches %s in the namespace", probe.to)
			}
		}
	})
	// Forwarding is for namespaces alone: the network of one uplink does not reach that of the other through this host.
	isp.IP(t, "route add 10.2.0.0/24 via "+inet0)
	c.nothing(func() {
		isp.Do(func() {
			s := prober{make(map[string]int)}
			if err := s.open("s", "udp4"); err != nil {
				t.Fatal(err)
			}
			if _, err := s.do("send", "s", "10.2.0.1:7"); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// TestNetnsKilled: a command that is killed at any step leaves nothing that the next one does not cure.
func TestNetnsKilled(t *testing.T) {
	c := newNamespaces(t)
	add := []string{"netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53", "--debug"}
	del := []string{"netns", "del", "work", "--debug"}
	steps := func(args []string) int {
		r := c.do(args...)
		if r.code != 0 {
			t.Fatalf("%q: %+v", args, r)
		}
		return strings.Count(r.stderr, "netns: ")
	}
	ofAdd, ofDel := steps(add), steps(del)
	if ofAdd < 5 || ofDel < 5 {
		t.Fatalf("steps: %d and %d", ofAdd, ofDel)
	}
	// killed runs a command and kills it once it has told a step, or several times as it tells them.
	killed := func(args []string, step int) {
		t.Helper()
		cmd := c.here("sh", append([]string{"-c", `"$@" 2>&1 | { n=0; while read -r line; do case $line in *" netns: "*) n=$((n + 1));; esac; [ $n -lt ` +
			fmt.Sprint(step) + ` ] || { kill -9 $(cat /run/pid) 2>/dev/null; break; }; done; cat >/dev/null; }`, "sh", "sh", "-c", `echo $$ >/run/pid; exec "$@"`, "sh", bin(t, clientBin)}, args...)...)
		c.run(cmd.Args[0], cmd.Args[1:]...)
	}
	for step := 1; step <= ofAdd; step++ {
		killed(add, step)
		if r := c.do("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 0 && !strings.Contains(r.stderr, "already") {
			t.Errorf("add, which was killed at step %d, again: %+v", step, r)
		}
		if rows := c.namespaces(); len(rows) != 1 || rows[0].Missing != "" {
			t.Errorf("killed at step %d of add: %+v", step, rows)
		}
		p := c.inNamespace("work")
		c.only(1, func() { fourProbes(p, 1) })
		c.must("netns", "del", "work", "--kill", "5")
		killed(add, step)
		if r := c.do("netns", "del", "work"); r.code != 0 && !strings.Contains(r.stderr, "no namespace") {
			t.Errorf("del of an add that was killed at step %d: %+v", step, r)
		}
		if left := c.namespaceTraces(); left != "" {
			t.Errorf("left of an add that was killed at step %d:\n%s", step, left)
		}
	}
	for step := 1; step <= ofDel; step++ {
		c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
		killed(del, step)
		if r := c.do("netns", "del", "work"); r.code != 0 && !strings.Contains(r.stderr, "no namespace") {
			t.Errorf("del, which was killed at step %d, again: %+v", step, r)
		}
		if left := c.namespaceTraces(); left != "" {
			t.Errorf("left of a del that was killed at step %d:\n%s", step, left)
		}
	}
}

// TestNetnsExec: what a program has in a namespace, how it ends, and what is refused.
func TestNetnsExec(t *testing.T) {
	c := newNamespaces(t)
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	in := func(options string, command ...string) result {
		t.Helper()
		return c.do(slices.Concat([]string{"netns", "exec", "work"}, strings.Fields(options), []string{"--"}, command)...)
	}
	for _, tt := range []struct {
		name, options string
		command       []string
		code          int
		out           string
	}{
		{"exit code", "", []string{"sh", "-c", "exit 42"}, 42, ""},
		{"a signal", "", []string{"sh", "-c", "kill -TERM $$"}, -1, ""},
		{"not found", "", []string{"/nonexistent"}, 127, "execute /nonexistent"},
		{"not executable", "", []string{"/etc/passwd"}, 126, "execute /etc/passwd"},
		{"options of the command", "", []string{"echo", "--pty", "-h"}, 0, "--pty -h\n"},
		{"a user", "--user nobody", []string{"sh", "-c", "id -un; id -Gn; cat /etc/resolv.conf"}, 0, "nobody\nnogroup\nnameserver 192.0.2.53\n"},
		{"no user", "--user nobody4711", []string{"true"}, 125, "no such user"},
		{"a terminal", "--pty", []string{"sh", "-c", "tty; exit 7"}, 7, "/dev/pts/"},
		{"a terminal of a user", "--pty --user nobody", []string{"sh", "-c", "id -un; : >/dev/tty && echo mine"}, 0, "mine"},
		{"an option of another verb", "--kill 5", []string{"true"}, 125, "netns exec has no option --kill"},
		{"two ways", "--pty --detach", []string{"true"}, 125, "exclude each other"},
		{"a lease that is there", "--wait 5", []string{"echo", "yes"}, 0, "yes\n"},
	} {
		if r := in(tt.options, tt.command...); r.code != tt.code || !strings.Contains(r.stdout+r.stderr, tt.out) {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
	for _, name := range []string{"nowhere", "../../x", "-h4", "a\x1b[31m", "x\ny"} {
		if r := c.do("netns", "exec", "--", name, "true"); r.code != 125 || strings.ContainsAny(r.stderr, "\x1b") {
			t.Errorf("name %q: %+v", name, r)
		}
	}
	// A directory that is another one in there would lead out.
	c.sh("mkdir -p /etc/netns/shadowed /etc/hidden && echo in >/etc/netns/shadowed/hidden-file && echo out >/etc/hidden-file")
	c.must("netns", "add", "shadowed", "--ifname", "wan1", "--resolv", "192.0.2.53")
	if r := c.do("netns", "exec", "shadowed", "cat", "/etc/hidden-file"); r.stdout != "in\n" {
		t.Errorf("a file of /etc/netns: %+v", r)
	}
	pid := strings.TrimSpace(c.must("netns", "exec", "work", "--detach", "--log", "/run/log", "--", "sh", "-c", "echo begun; exec sleep 1000"))
	eventually(t, "ps shows the program", func() error {
		if text := c.must("netns", "ps", "work"); !strings.Contains(text, pid) || !strings.Contains(text, "sleep 1000") {
			return errors.New(text)
		}
		return nil
	})
	// Others who look see it, and it keeps the leases.
	for _, command := range []string{"status", "bound", "release --all"} {
		r := c.do(strings.Fields(command)...)
		if text := r.stdout + r.stderr; !strings.Contains(text, "work") || command != "status" && !strings.Contains(text, pid) {
			t.Errorf("%s: %+v", command, r)
		}
		if command == "release --all" && (r.code != 1 || !strings.Contains(r.stderr, "netns del")) {
			t.Errorf("it releases what a program in a namespace needs: %+v", r)
		}
	}
	if log := c.sh("cat /run/log"); log != "begun\n" {
		t.Errorf("log: %q", log)
	}
	if r := c.do("netns", "stop", "work", "1"); r.code != 1 || !strings.Contains(r.stderr, "not in the namespace") {
		t.Errorf("stop of another program: %+v", r)
	}
	c.must("netns", "stop", "work", pid)
	// What ignores the signal is killed.
	c.must("netns", "exec", "work", "--detach", "--", "sh", "-c", `trap "" TERM; while :; do sleep 1; done`)
	c.must("netns", "stop", "work", "--timeout", "1")
	if text := c.must("netns", "ps"); strings.Count(text, "\n") != 1 {
		t.Errorf("left:\n%s", text)
	}
	c.must("netns", "del", "--all")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// TestNetnsRefused: what netns refuses leaves nothing.
func TestNetnsRefused(t *testing.T) {
	c := newNamespaces(t)
	c.sh("mkdir -p /run/netns && touch /run/netns/foreign && echo nameserver 192.0.2.9 >/run/resolv && chmod 666 /run/resolv")
	for _, tt := range []struct {
		code       int
		args, want string
	}{
		{2, "add", "NAME of a namespace is needed"},
		{2, "add work", "--ifname IFNAME is needed"},
		{2, "add ../../x --ifname wan1", "no name of a namespace"},
		{2, "add work --ifname wan1 --json", "netns add has no option --json"},
		{2, "add work --ifname wan1 --resolv 127.0.0.53", "loopback"},
		{2, "unknown", "is none of add"},
		{2, "serve x", "unexpected argument"},
		{1, "add foreign --ifname wan1 --resolv 192.0.2.53", "another program made /run/netns/foreign"},
		{1, "add work --ifname wan1", "nobody said which name servers it has"},
		{1, "add work --ifname wan1 --resolv /run/resolv", "/run/resolv is writable for others: root alone must be able to write it"},
		{1, "set work --ifname wan1", "there is no namespace of this name"},
		{1, "del work", "there is no namespace of this name"},
		{1, "ps work", "there is no namespace of this name"},
	} {
		if r := c.do(append([]string{"netns"}, strings.Fields(tt.args)...)...); r.code != tt.code || !strings.Contains(r.stderr, tt.want) {
			t.Errorf("%s: %+v", tt.args, r)
		}
	}
	c.sh("rm /run/netns/foreign && mv /etc/resolv.conf /etc/away")
	if r := c.do("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 1 || !strings.Contains(r.stderr, "this host has no /etc/resolv.conf") {
		t.Errorf("without /etc/resolv.conf: %+v", r)
	}
	c.sh("mv /etc/away /etc/resolv.conf")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	if r := c.do("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 1 || !strings.Contains(r.stderr, "already") {
		t.Errorf("again: %+v", r)
	}
	if r := c.do("netns", "add", "later", "--ifname", "wwan7"); r.code != 0 || !strings.Contains(r.stderr, "no lease now") || !strings.Contains(r.stderr, "no name resolves") {
		t.Errorf("a link that may come: %+v", r)
	}
}

// TestSoakNetns: namespaces come and go, and nothing is left.
func TestSoakNetns(t *testing.T) {
	c := newNamespaces(t)
	times := 3
	if fullSize() {
		times = 1000
	}
	for range times {
		c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
		c.must("netns", "exec", "work", "true")
		c.must("netns", "del", "work")
	}
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}
