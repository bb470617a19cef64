package e2e

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// reload gives the service another configuration.
func (v *visited) reload(text string) {
	v.t.Helper()
	v.sh("cat >/etc/table-allocator/netns.json <<'end'\n" + text + "\nend")
	v.must("netns", "check")
	if err := v.service.cmd.Process.Signal(unix.SIGHUP); err != nil {
		v.t.Fatal(err)
	}
}

// waitPS waits until the programs in namespaces, as ps shows them, are those: a part of the command line of each.
func (v *visited) waitPS(want ...string) {
	v.t.Helper()
	eventually(v.t, fmt.Sprintf("programs in namespaces are %q", want), func() error {
		text := v.must("netns", "ps")
		if strings.Count(text, "\n") != len(want)+1 || slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(text, w) }) {
			return errors.New(text)
		}
		return nil
	})
}

// TestNetnsRun: the service keeps programs of its configuration running in a namespace, as another user, and the next service
// finds them.
func TestNetnsRun(t *testing.T) {
	v := newVisited(t)
	v.reload(`{"group": "leasers", "namespaces": [{"name": "work", "ifname": "wan1", "resolv": "192.0.2.53", "run_as": "bert",
		"run": [["/bin/sh", "-c", "echo begun >>/run/begun/$(id -un); exec sleep 4711 >/dev/null 2>&1"], ["/nonexistent"]]}]}`)
	v.sh("mkdir -m 777 -p /run/begun")
	v.waitPS("sleep 4711")
	rows := v.namespaces()
	at := slices.IndexFunc(rows, func(r namespaceRow) bool { return r.Name == "work" })
	if program := rows[at].Programs[0]; program.UID != uidBert {
		t.Errorf("it runs as %d", program.UID)
	}
	// Killed, it comes back.
	before := rows[at].Programs[0].PID
	v.sh(fmt.Sprintf("kill -9 %d", before))
	eventually(t, "it runs again", func() error {
		text := v.must("netns", "ps", "work")
		shell := strings.Contains(text, "echo begun") // which has not written yet
		if !strings.Contains(text, "sleep 4711") || shell || strings.Contains(text, fmt.Sprintf(" %d ", before)) {
			return errors.New(text)
		}
		return nil
	})
	begun := v.sh("cat /run/begun/bert")
	// The service killed, the program stays, and the next service does not start another one.
	v.service.kill()
	v.service = v.start(v.here(bin(t, clientBin), "netns", "serve"))
	v.service.waitLog("cannot run a program in a namespace") // that which there is not: it has looked at both
	v.waitPS("sleep 4711")
	if now := v.sh("cat /run/begun/bert"); now != begun {
		t.Errorf("started %q times, before %q", now, begun)
	}
	v.sh(`cat /proc/$(pidof sleep | tr ' ' '\n' | while read p; do tr '\0' ' ' </proc/$p/cmdline | grep -q 4711 && echo $p; done)/status | grep -q 'Groups:.*22001'`)
	// As another user it is another program, and what the configuration no longer has is ended, with what it started.
	v.reload(`{"group": "leasers", "namespaces": [{"name": "work", "ifname": "wan1", "resolv": "192.0.2.53", "run_as": "carl",
		"run": [["/bin/sh", "-c", "echo begun >>/run/begun/$(id -un); exec sleep 4711 >/dev/null 2>&1"]]}]}`)
	eventually(t, "it runs as carl alone", func() error {
		rows := v.namespaces()
		at := slices.IndexFunc(rows, func(r namespaceRow) bool { return r.Name == "work" })
		if programs := rows[at].Programs; len(programs) != 1 || programs[0].UID != uidCarl {
			return fmt.Errorf("%+v", programs)
		}
		return nil
	})
	v.reload(`{"group": "leasers", "namespaces": [{"name": "work", "ifname": "wan1", "resolv": "192.0.2.53", "run": [["/bin/sh", "-c", "exec >/dev/null 2>&1; sleep 4712; :"]]}]}`)
	v.waitPS("/bin/sh -c exec", "sleep 4712")
	// Without the service, as a package leaves it, del --all ends its programs, and nothing of others.
	v.service.kill()
	visitor := v.start(v.here(bin(t, clientBin), "netns", "exec", "work", "sleep", "4713"))
	v.waitPS("/bin/sh -c exec", "sleep 4712", "sleep 4713")
	if r := v.do("netns", "del", "--all"); r.code != 1 || !strings.Contains(r.stdout, "sleep 4713") || strings.Contains(r.stdout, "sleep 4712") {
		t.Errorf("del --all beside a program of somebody: %+v", r)
	}
	v.waitPS("sleep 4713")
	visitor.kill()
	v.waitPS()
	v.service = v.start(v.here(bin(t, clientBin), "netns", "serve"))
	v.waitPS("/bin/sh -c exec", "sleep 4712")
	v.service.kill()
	v.must("netns", "del", "--all")
	if left := v.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// TestNetnsStart: namespaces that are made on demand, or by hand, from the configuration.
func TestNetnsStart(t *testing.T) {
	v := newVisited(t)
	v.must("netns", "del", "boss")
	v.must("netns", "del", "work")
	v.reload(`{"group": "leasers", "pool4": "10.99.0.0/23", "namespaces": [
		{"name": "demand", "ifname": "wan1", "resolv": "192.0.2.53", "start": "on-demand", "host_access": ["tcp:7"], "mask": ["nscd"]},
		{"name": "secret", "ifname": "wan1", "resolv": "192.0.2.53", "start": "on-demand", "allow": ["carl"]},
		{"name": "hand", "ifname": "wan0", "resolv": "192.0.2.54", "start": "manual"}]}`)
	v.service.waitLog("configuration read again")
	eventually(t, "the namespaces before are deleted", func() error {
		for _, name := range []string{"work", "boss"} { // the configuration before may have added them once more
			if r := v.do("netns", "del", name); r.code == 0 {
				return errors.New(name)
			}
		}
		return nil
	})
	if r := v.enter(uidBert, true, "secret", "true"); r.code != 125 || len(v.namespaces()) != 0 {
		t.Errorf("a namespace of another user is made: %+v", r)
	}
	if r := v.enter(uidBert, true, "demand", "cat", "/etc/resolv.conf"); r.stdout != "nameserver 192.0.2.53\n" {
		t.Errorf("on demand by a user: %+v", r)
	}
	if r := v.enter(uidBert, true, "hand", "true"); r.code != 125 || !strings.Contains(r.stderr, "no namespace") {
		t.Errorf("by hand: %+v", r)
	}
	v.must("netns", "add", "hand")
	v.must("netns", "exec", "secret", "true") // on demand by root
	v.waitNamespaces(3)
	for _, r := range v.namespaces() {
		if !strings.HasPrefix(r.Addresses[0], "10.99.0.") {
			t.Errorf("address of another pool: %+v", r)
		}
	}
	if r := v.do("netns", "add", "hand2"); r.code != 2 || !strings.Contains(r.stderr, "--ifname IFNAME is needed") {
		t.Errorf("add of a name that is not there: %+v", r)
	}
	// What the one reaches, and the other one does not.
	v.ns.Do(func() { serveWho(t, "0.0.0.0:7"); serveWho(t, "0.0.0.0:8") })
	host := strings.Split(strings.Fields(v.ns.IP(t, "-4 -o address show dev tav1"))[3], "/")[0]
	p, q := v.inNamespace("demand"), v.inNamespace("hand")
	p.want("ok", "new s tcp4\nstart s %s:7", host)
	for _, other := range []struct {
		p    *probing
		port string
	}{{p, "8"}, {q, "7"}} {
		other.p.do("new s tcp4")
		if got := other.p.do("start s %s:%s", host, other.port); got == "ok" {
			t.Errorf("port %s of the host is reached", other.port)
		}
	}
	v.sh("mkdir -p /run/nscd /run/avahi-daemon && touch /run/nscd/socket /run/avahi-daemon/socket")
	if seen := v.must("netns", "exec", "demand", "ls", "/run/nscd", "/run/avahi-daemon"); seen != "/run/avahi-daemon:\nsocket\n\n/run/nscd:\n" {
		t.Errorf("masked: %q", seen)
	}
	text := v.must("netns", "unit", "demand")
	for _, want := range []string{"NetworkNamespacePath=/run/netns/demand\n", ".demand.resolv:/etc/resolv.conf\n", "TemporaryFileSystem=/run/nscd:ro\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("unit lacks %s:\n%s", want, text)
		}
	}
	// Another mask counts for the namespace that is there.
	v.reload(`{"group": "leasers", "namespaces": [{"name": "demand", "ifname": "wan1", "resolv": "192.0.2.53", "mask": ["avahi"]}]}`)
	eventually(t, "another directory is masked", func() error {
		if seen := v.must("netns", "exec", "demand", "ls", "/run/nscd", "/run/avahi-daemon"); seen != "/run/avahi-daemon:\n\n/run/nscd:\nsocket\n" {
			return errors.New(seen)
		}
		return nil
	})
	v.service.waitLog("stays the pool of addresses")
}

// TestNetnsMine: a user sees the namespaces that the user may enter, and the user's own programs, and ends only those.
func TestNetnsMine(t *testing.T) {
	v := newVisited(t)
	as := func(uid int, args ...string) result {
		cmd := v.command(uid, true, append([]string{"/run/sbin/table-allocator-client", "netns"}, args...)...)
		return v.run(cmd.Args[0], cmd.Args[1:]...)
	}
	v.must("netns", "exec", "work", "--detach", "sleep", "4001")
	if r := v.enter(uidBert, true, "work", "--detach", "sleep", "4002"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if r := v.enter(uidCarl, true, "work", "--detach", "sleep", "4003"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	v.waitPS("sleep 4001", "sleep 4002", "sleep 4003")
	if r := as(uidBert, "list"); r.code != 0 || !strings.Contains(r.stdout, "work") || strings.Contains(r.stdout, "boss") {
		t.Errorf("list: %+v", r)
	}
	if r := as(uidCarl, "list", "--json"); r.code != 0 || !strings.Contains(r.stdout, `"boss"`) || !strings.Contains(r.stdout, "sleep 4003") || strings.Contains(r.stdout, "sleep 4002") {
		t.Errorf("list: %+v", r)
	}
	if r := as(uidBert, "ps"); r.code != 0 || strings.Count(r.stdout, "\n") != 2 || !strings.Contains(r.stdout, "sleep 4002") {
		t.Errorf("ps: %+v", r)
	}
	for _, args := range [][]string{{"ps", "boss"}, {"stop", "boss"}, {"ps", "nowhere"}} {
		if r := as(uidBert, args...); r.code != 1 || !strings.Contains(r.stderr, "there is no namespace of this name") {
			t.Errorf("%q: %+v", args, r)
		}
	}
	if r := as(uidBert, "stop", "work"); r.code != 0 {
		t.Errorf("stop: %+v", r)
	}
	v.waitPS("sleep 4001", "sleep 4003")
	anna := v.command(uidAnna, false, "/run/sbin/table-allocator-client", "netns", "list")
	if r := v.run(anna.Args[0], anna.Args[1:]...); r.code != 1 || !strings.Contains(r.stderr, "permission denied") {
		t.Errorf("who is not in the group: %+v", r)
	}
	if r := as(uidBert, "add", "x", "-i", "wan1"); r.code != 1 || !strings.Contains(r.stderr, "needs root") {
		t.Errorf("add: %+v", r)
	}
	v.must("netns", "stop", "work")
}

// TestNetnsFirewall: a chain of another program with policy drop is named, and passed only if the user says so; the rules come
// back while the service runs, and go with the namespace.
func TestNetnsFirewall(t *testing.T) {
	c := newNamespaces(t)
	other := `nft 'add table inet other; add chain inet other pass { type filter hook forward priority 0; policy drop; }; add rule inet other pass meta mark 77 accept'`
	c.sh(other)
	if r := c.do("netns", "add", "named", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 0 || !strings.Contains(r.stderr, "inet other pass has policy drop (--firewall accept") {
		t.Errorf("add: %+v", r)
	}
	if r := c.do("netns", "list", "--json"); r.code != 1 || !strings.Contains(r.stdout, "inet other pass has policy drop") {
		t.Errorf("list: %+v", r)
	}
	if r := c.do("doctor"); !strings.Contains(r.stdout, "inet other pass has policy drop") {
		t.Errorf("doctor: %+v", r)
	}
	c.sh(`nft add rule inet other pass meta mark 78 iifname "tav1" accept`) // the administrator has seen to it
	if r := c.do("netns", "list", "--json"); r.code != 0 || strings.Contains(r.stdout, "policy drop") {
		t.Errorf("list: %+v", r)
	}
	c.sh("nft flush chain inet other pass; nft add rule inet other pass meta mark 77 accept")
	if text := c.sh("ifconfig_local=10.9.0.2 " + bin(t, clientBin) + " netns tunnel named 2>&1 || :"); !strings.Contains(text, "it has no VPN") {
		t.Errorf("tunnel of a namespace without a VPN: %s", text)
	}
	p := c.inNamespace("named")
	c.nothing(func() { t.Log("through a chain that drops:", startProbes(p)) })
	if r := c.do("netns", "add", "passing", "--ifname", "wan1", "--resolv", "192.0.2.53", "--firewall", "accept"); r.code != 0 || r.stderr != "" {
		t.Errorf("add: %+v", r)
	}
	q := c.inNamespace("passing")
	c.only(1, func() { fourProbes(q, 1) })
	if text := c.sh("nft list chain inet other pass"); strings.Count(text, `comment "table-allocator"`) != 2 || strings.Contains(text, "tav1") {
		t.Errorf("rules:\n%s", text)
	}
	service := c.start(c.here(bin(t, clientBin), "netns", "serve"))
	service.waitLog("serving namespaces")
	c.sh("nft delete table inet other; " + other)
	eventually(t, "the rules are back", func() error {
		if text := c.sh("nft list chain inet other pass"); strings.Count(text, `comment "table-allocator"`) != 2 {
			return errors.New(text)
		}
		return nil
	})
	c.only(1, func() { fourProbes(q, 1) })
	// Without accept in the configuration they go.
	c.sh(`mkdir -p /etc/table-allocator; echo '{"namespaces": [{"name": "passing", "ifname": "wan1", "resolv": "192.0.2.53"}]}' >/etc/table-allocator/netns.json`)
	if err := service.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the rules are taken back", func() error {
		if text := c.sh("nft list chain inet other pass"); strings.Contains(text, "table-allocator") {
			return errors.New(text)
		}
		return nil
	})
	service.kill()
	c.sh("rm /etc/table-allocator/netns.json")
	c.must("netns", "del", "--all", "--kill", "5")
	if text := c.sh("nft list chain inet other pass"); strings.Contains(text, "table-allocator") || !strings.Contains(text, "0x0000004d") {
		t.Errorf("left:\n%s", text)
	}
	c.sh("nft delete table inet other")
	// A table of firewalld, which does not answer: the namespace is made, but for a user who insists.
	c.sh(`nft 'add table inet firewalld; add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }'`)
	if r := c.do("netns", "add", "walled", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 0 || !strings.Contains(r.stderr, "firewalld is not told of tav") {
		t.Errorf("add: %+v", r)
	}
	if r := c.do("netns", "add", "insisting", "--ifname", "wan1", "--resolv", "192.0.2.53", "--firewall", "accept"); r.code != 1 || !strings.Contains(r.stderr, "firewalld is not told of tav") {
		t.Errorf("add: %+v", r)
	}
	c.must("netns", "del", "walled")
	c.sh("nft delete table inet firewalld")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
	if r := c.do("netns", "add", "work", "--ifname", "wan1", "--firewall", "open"); r.code != 2 || !strings.Contains(r.stderr, "want accept or none") {
		t.Errorf("another word: %+v", r)
	}
}

// TestNetnsMany: as many namespaces as the configuration allows, at full size more than by default, have each addresses of their own,
// and nothing is left of them.
func TestNetnsMany(t *testing.T) {
	c := newNamespaces(t)
	many := 9
	if fullSize() {
		many = 64 // the default limit is 32
	}
	var list []string
	for n := range many {
		list = append(list, fmt.Sprintf(`{"name": "n%d", "ifname": "wan%d", "resolv": "192.0.2.53"}`, n, n%2))
	}
	c.sh("mkdir -p /etc/table-allocator; echo '{\"max\": " + strconv.Itoa(many) + ", \"namespaces\": [" + strings.Join(list, ",") + "]}' >/etc/table-allocator/netns.json")
	service := c.start(c.here(bin(t, clientBin), "netns", "serve"))
	eventually(t, "all namespaces are there", func() error {
		rows := c.namespaces()
		if len(rows) != many || slices.ContainsFunc(rows, func(r namespaceRow) bool { return r.Missing != "" }) {
			return fmt.Errorf("%d: %+v", len(rows), rows)
		}
		return nil
	})
	seen := make(map[string]bool)
	for _, r := range c.namespaces() {
		for _, a := range r.Addresses {
			if seen[a] {
				t.Errorf("%s has the address %s of another one", r.Name, a)
			}
			seen[a] = true
		}
	}
	for _, n := range []int{0, many / 2, many - 1} {
		p := c.inNamespace(fmt.Sprint("n", n))
		c.only(n%2, func() { fourProbes(p, n%2) })
	}
	if r := c.do("netns", "add", "onemore", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 1 || !strings.Contains(r.stderr, `"max"`) {
		t.Errorf("one more than the limit: %+v", r)
	}
	service.kill()
	c.must("netns", "del", "--all", "--kill", "5")
	if left := c.namespaceTraces(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// TestNetnsServiceKilled: a service that is killed at any step of making a namespace is replaced by one that finishes it.
func TestNetnsServiceKilled(t *testing.T) {
	c := newNamespaces(t)
	c.sh(`mkdir -p /etc/table-allocator; echo '{"namespaces": [{"name": "work", "ifname": "wan1", "resolv": "192.0.2.53"}]}' >/etc/table-allocator/netns.json`)
	const steps = 14 // of an add and of the look after it
	for step := 1; step <= steps; step++ {
		c.sh(`mkfifo -m 600 /run/steps; ` + bin(t, clientBin) + ` netns serve --debug >/run/steps 2>&1 & pid=$!
			n=0; while read -r line; do case $line in *" netns: "*) n=$((n + 1));; esac; [ $n -lt ` + fmt.Sprint(step) + ` ] || { kill -9 $pid; break; }; done </run/steps
			wait $pid || :; rm /run/steps`)
		service := c.start(c.here(bin(t, clientBin), "netns", "serve"))
		eventually(t, fmt.Sprintf("the next service finishes what was killed at step %d", step), func() error {
			if rows := c.namespaces(); len(rows) != 1 || rows[0].Missing != "" {
				return fmt.Errorf("%+v", rows)
			}
			return nil
		})
		service.kill()
		p := c.inNamespace("work")
		c.only(1, func() { fourProbes(p, 1) })
		c.must("netns", "del", "work", "--kill", "5")
		if left := c.namespaceTraces(); left != "" {
			t.Errorf("left of a service that was killed at step %d:\n%s", step, left)
		}
	}
}

// TestNetnsTogether: users enter at once; who is not in the group never does.
func TestNetnsTogether(t *testing.T) {
	v := newVisited(t)
	v.sh("chmod 755 /run/sbin/table-allocator-enter") // so that the service is what refuses
	const times = 8
	var commands []*exec.Cmd
	for range times {
		for uid, member := range map[int]bool{uidBert: true, uidAnna: false} {
			commands = append(commands, v.command(uid, member, "/run/sbin/table-allocator-enter", "work", "/usr/bin/id", "id", "-u"))
		}
	}
	entered, refused := 0, 0
	for _, r := range v.together(commands) {
		switch text := strings.TrimSpace(fmt.Sprint(r.code, " ", r.stdout, r.stderr)); {
		case text == fmt.Sprint("0 ", uidBert):
			entered++
		case strings.HasPrefix(text, "125 ") && strings.Contains(text, "permission denied"):
			refused++
		default:
			t.Errorf("got %q", text)
		}
	}
	if entered != times || refused != times {
		t.Errorf("%d entered, %d were refused", entered, refused)
	}
}
