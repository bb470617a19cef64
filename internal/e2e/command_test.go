package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCommandNames: the names of the program, what an address says itself, and what -r says.
func TestCommandNames(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.serve()
	named := func(name string) string {
		path := filepath.Join(h.dir, name)
		if err := os.Symlink(bin(t, clientBin), path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tactl, original := named("tactl"), named("table_allocator_client")
	if r := h.run(tactl); r.code != 0 || !strings.Contains(r.stdout, "10.77.0.2") {
		t.Errorf("tactl: %+v", r)
	}
	if r := h.run(tactl, "-iwan0", "--no-legend"); r.code != 0 || !strings.HasPrefix(r.stdout, "wan0 ") {
		t.Errorf("tactl with a name behind its letter: %+v", r)
	}
	if r := h.run(tactl, "--json", "-4", "-i", "wan0"); r.code != 0 || !strings.Contains(r.stdout, `"uplinks":[{"ifname":"wan0"`) {
		t.Errorf("tactl with options of status: %+v", r)
	}
	for _, name := range []string{original, bin(t, clientBin)} {
		if r := h.run(name); r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "tactl, or status") {
			t.Errorf("%s alone: %+v", name, r)
		}
	}
	if r := h.run(original, "-a", "10.77.0.2", "-i", "wan0"); r.code != 0 || r.stdout == "0\n" {
		t.Errorf("of the original: %+v", r)
	}
	h.wantRules() // it is any text
	if r := h.run(original, "-r", "-a", "10.77.0.2", "-i", "wan0"); r.code != 0 || r.stdout != "0\n" || r.stderr != "" {
		t.Errorf("of the original, -r: %+v", r)
	}
	if r := h.client("-a", "10.77.0.2", "-i", "wan0"); r.code != 0 || r.stdout != "10000\n" {
		t.Errorf("guessed: %+v", r)
	}
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	if r := h.client("-r", "-a", "10.77.0.2", "-i", "wan0"); r.code != 0 || r.stdout != "0\n" || !strings.Contains(r.stderr, "10.77.0.2 on wan0: its holder (pid ") {
		t.Errorf("-r: %+v", r)
	}
	h.wantRules()
	table := h.client("-a", "10.77.0.3/25", "-i", "wan0").stdout
	h.wantRules(clientRules("10.77.0.3", "10.77.0.0/25", h.tableNumber("10.77.0.3"))...)
	if table == "0\n" {
		t.Error("no table")
	}
	h.client("-r", "-a", "10.77.0.3", "-i", "wan0")
	h.client("--unspec", "-a", "10.77.0.3", "-i", "wan0")
	h.wantRules()
	if r := h.client("-r", "-a", "10.77.0.3", "-i", "wan0"); !strings.Contains(r.stderr, "its holder (pid ") { // of any family
		t.Errorf("-r of any family: %+v", r)
	}
	h.waitClean()
}

// TestCommandCheck: a wrong configuration ends a watch with 78, and the error names the line and the keys.
func TestCommandCheck(t *testing.T) {
	h := newHost(t)
	file := h.watchFile("{\n  // all\n  \"links\": [\n    {\"ifname\": \"wan*\"},\n    {\"ifname\": \"*\",\n     \"rotues\": \"copy\"},\n  ],\n}\n")
	for _, args := range [][]string{{"watch", "--check", file}, {"watch", "-c", file}} {
		r := h.run(bin(t, clientBin), args...)
		if r.code != 78 || r.stdout != "" || !strings.Contains(r.stderr, "line 6: links[1].rotues: unknown key (there are cgroup, dnsmasq_servers, ") {
			t.Errorf("%q: %+v", args, r)
		}
	}
	if r := h.run(bin(t, clientBin), "watch", "--check", "../../packaging/watch.json"); r.code != 0 || !strings.Contains(r.stdout, "right") {
		t.Errorf("what is installed: %+v", r)
	}
}

// TestCommandLinks: the link is the first word behind the command, and options may follow it.
func TestCommandLinks(t *testing.T) {
	c := newCrossing(t)
	for _, args := range []string{"run wan1 echo yes", "run wan1 -- echo yes", "run wan1 --on-loss fallback echo yes", "run -i wan1 echo yes", "run --on-loss block wan1 echo yes"} {
		if r := c.do(strings.Fields(args)...); r.code != 0 || r.stdout != "yes\n" {
			t.Errorf("%s: %+v", args, r)
		}
	}
	if r := c.do("run", "wan1", "sh", "-c", "echo $0 $1", "--wait", "-i"); r.stdout != "--wait -i\n" {
		t.Errorf("options of the command: %+v", r)
	}
	for _, args := range []string{"bind wan1 --uid 4711", "bound wan1", "unbind wan1 --uid 4711", "bind wwan7 --uid 4711 --force", "unbind wwan7 --uid 4711"} {
		if r := c.do(strings.Fields(args)...); r.code > 1 || args == "bound wan1" && !strings.Contains(r.stdout, "4711") {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

// TestCommandBound: what is bound to a link that has a lease and no route is blocked, and bound says so.
func TestCommandBound(t *testing.T) {
	c := newCrossing(t) // has cgroups of its own
	if r := c.do("bind", "wan1", "--uid", "4711"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	says := func(code int, text string) {
		t.Helper()
		eventually(t, "bound says "+text, func() error {
			if r := c.do("bound", "wan1"); r.code != code || !strings.Contains(r.stdout, text) {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	}
	says(0, "--uid 4711")
	c.ns.IP(t, "route del default dev wan1")
	c.ns.IP(t, "-6 route del default dev wan1")
	says(1, "blocked: no route")
	c.ns.IP(t, "route add default via 10.2.0.1 dev wan1 metric 200")
	says(0, "--uid 4711")
	r := c.do("bound", "--json")
	var list struct{ Bound []map[string]any }
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil || len(list.Bound) != 1 {
		t.Fatalf("%v: %s", err, r.stdout)
	}
	if keys := strings.Join(slices.Sorted(maps.Keys(list.Bound[0])), " "); keys != "cgroup ifname missing on_loss processes tables traffic" {
		t.Errorf("keys: %s", keys)
	}
	// What it shows is what one types to undo it.
	shown := strings.Fields(lines(c.do("bound").stdout)[1])
	if r := c.do(append([]string{"unbind", shown[0]}, shown[3:]...)...); r.code != 0 {
		t.Errorf("unbind by the words of bound, %q: %+v", shown, r)
	}
}

// TestCommandExplainPID: explain knows the mark and the user of a process that is bound, and refuses one of another
// network namespace.
func TestCommandExplainPID(t *testing.T) {
	c := newCrossing(t)
	p := c.start(c.here(bin(t, clientBin), "run", "wan1", "sleep", "1000"))
	eventually(t, "explain says that it leaves by wan1", func() error {
		r := c.do("explain", internet, "--pid", fmt.Sprint(p.cmd.Process.Pid))
		if r.code != 0 || !strings.Contains(r.stdout, "leaves by wan1") || !strings.Contains(r.stdout, "mark 0x2000000") && !strings.Contains(r.stdout, "mark 0x4000000") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if r := c.do("explain", internet, "--pid", fmt.Sprint(os.Getpid())); r.code != 2 || !strings.Contains(r.stderr, "another network namespace") {
		t.Errorf("of another namespace: %+v", r)
	}
}

// TestCommandExplainSocket: explain finds a socket by its ends, and those of a process, with what they are bound to.
func TestCommandExplainSocket(t *testing.T) {
	c := newCrossing(t)
	for _, tt := range []struct{ name, target, option string }{
		{"mark", "UDP4:" + internet + ":9", ""},
		{"mark, IPv6", "UDP6:[" + internet6 + "]:9", ""},
		{"device", "UDP4:" + internet + ":10,so-bindtodevice=wan1", "bound to wan1"},
	} {
		command := []string{"socat", "-u", tt.target, "OPEN:/dev/null,wronly"}
		if tt.option == "" {
			command = append([]string{bin(t, clientBin), "run", "wan1"}, command...)
		}
		p := c.start(c.here(command[0], command[1:]...))
		var asked struct {
			Question struct {
				From, To     string
				Sport, Dport uint16
				Mark         uint32
			}
			Result struct{ Link string }
		}
		eventually(t, "explain knows the socket of the process", func() error {
			r := c.do("explain", "--pid", fmt.Sprint(p.cmd.Process.Pid), "--json")
			if r.code != 0 {
				return fmt.Errorf("%+v", r)
			}
			return json.Unmarshal([]byte(r.stdout), &asked)
		})
		q := asked.Question
		if asked.Result.Link != "wan1" || tt.option == "" && q.Mark == 0 {
			t.Errorf("%s: %+v", tt.name, asked)
		}
		from, to := netip.MustParseAddr(q.From), netip.MustParseAddr(q.To)
		ends := netip.AddrPortFrom(from, q.Sport).String() + "-" + netip.AddrPortFrom(to, q.Dport).String()
		if r := c.do("explain", "--socket", ends); r.code != 0 || !strings.Contains(r.stdout, "leaves by wan1") || !strings.Contains(r.stdout, tt.option) {
			t.Errorf("%s, --socket %s: %+v", tt.name, ends, r)
		}
		if from.Is4() {
			mapped := func(a netip.Addr, port uint16) string { return fmt.Sprintf("[::ffff:%s]:%d", a, port) }
			r := c.do("explain", "--socket", mapped(from, q.Sport)+"-"+mapped(to, q.Dport))
			if r.code != 0 || !strings.Contains(r.stdout, "leaves by wan1") {
				t.Errorf("%s, --socket as ss shows it of a socket of IPv6: %+v", tt.name, r)
			}
			if r := c.do("explain", "::ffff:"+to.String(), "--from", "::ffff:"+from.String()); r.code != 0 || !strings.Contains(r.stdout, "leaves by wan1") {
				t.Errorf("%s, mapped addresses: %+v", tt.name, r)
			}
		}
		p.kill()
	}
	for _, args := range []string{"--socket 192.0.2.9:1-192.0.2.10:2", "--socket 192.0.2.9:1", "--socket 192.0.2.9:1-192.0.2.10:2 9.9.9.9", "--pid 4194304"} {
		if r := c.do(append([]string{"explain"}, strings.Fields(args)...)...); r.code != 2 || r.stdout != "" {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

// TestCommandCompletion: bash offers what a command takes, links and addresses among it, and commands behind the link of run.
func TestCommandCompletion(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	const script = `. ../../packaging/completion/bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)) COMP_LINE="$*"; _table_allocator; echo "${COMPREPLY[@]}"`
	for _, tt := range []struct{ line, want string }{
		{"tactl stat", "status"},
		{"tactl help hist", "history"},
		{"tactl run wan", "wan0 wan1"},
		{"tactl run --on-loss block wan", "wan0 wan1"},
		{"tactl run wan1 true --ver", ""},
		{"tactl attach wan", "wan0 wan1"}, {"tactl bind wan", "wan0 wan1"}, {"tactl unbind wan", "wan0 wan1"}, {"tactl bound wan", "wan0 wan1"},
		{"tactl status wan", "wan0 wan1"}, {"tactl status 10.7", "10.77.0.2 10.78.0.2"}, {"tactl doctor wan", "wan0 wan1"}, {"tactl uplinks wan", "wan0 wan1"}, {"tactl reexec wan", "wan0 wan1"},
		{"tactl release 10.7", "10.77.0.2 10.78.0.2"}, {"tactl history 10.78", "10.78.0.2"},
		{"tactl explain 192.0.2.1 --from 10.77", "10.77.0.2"}, {"tactl explain 192.0.2.1 --oif wan", "wan0 wan1"},
		{"tactl explain 192.0.2.1 --sp", "--sport"}, {"tactl watch --sport", ""}, {"tactl watch --routes=mo", "move"}, {"tactl history --cl", ""},
	} {
		r := h.run("bash", append([]string{"-c", script, "bash"}, strings.Split(tt.line, " ")...)...)
		if got := strings.TrimSpace(r.stdout); r.code != 0 || got != tt.want {
			t.Errorf("%s: %q, want %q\n%s", tt.line, got, tt.want, r.stderr)
		}
	}
	r := h.run("bash", "-c", script, "bash", "tactl", "run", "wan1", "sle")
	if !slices.Contains(strings.Fields(r.stdout), "sleep") {
		t.Errorf("a command on a link: %+v", r)
	}
	// Names of files are text.
	file := filepath.Join(h.dir, "a$(touch ran)")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r = h.run("bash", "-c", `here=$PWD; cd "$1"; shift; `+strings.Replace(script, "../../", "$here/../../", 1), "bash", h.dir, "tactl", "watch", "--check", file[:len(file)-12])
	if _, err := os.Lstat(filepath.Join(h.dir, "ran")); err == nil || strings.TrimSpace(r.stdout) != file {
		t.Errorf("a file's name was executed (%v), or is not offered: %+v", err, r)
	}
}
