package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestClientInShell: command substitution gets the table and nothing else, and returns
// though the client lives on.
func TestClientInShell(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve()
	for i, tt := range []struct{ name, script, want string }{
		{"plain", `t=$(CALL); echo "[$t]"`, "[TABLE]"},
		{"stderr too", `t=$(CALL 2>&1); echo "[$t]"`, "[TABLE]"},
		{"exactly one line", `CALL | od -An -c | tr -d ' '`, `TABLE\n`},
		{"stdin closed", `t=$(CALL <&-); echo "[$t]"`, "[TABLE]"},
		{"stderr closed", `t=$(CALL 2>&-); echo "[$t]"`, "[TABLE]"},
		{"stdin and stderr closed", `t=$(CALL <&- 2>&-); echo "[$t]"`, "[TABLE]"},
		{"everything open on one pipe", `t=$(exec 3>&1 4>&1; CALL 2>&1); echo "[$t]"`, "[TABLE]"},
		{"stdout closed", `CALL >&-; echo "[$?]"`, "[0]"},
		{"exit status", `t=$(CALL); echo "$? [$t]"`, "0 [TABLE]"},
		{"in a pipeline", `CALL | cat`, "TABLE"},
	} {
		addr, table := fmt.Sprintf("10.77.0.%d", 2+i), uint32(10000+i)
		h.ns.IP(t, "address add "+addr+"/24 dev wan0")
		before := h.rules()
		r := h.shell(strings.ReplaceAll(tt.script, "CALL", "$CLIENT -4 -a "+addr+" -n 24 -i wan0"))
		want := strings.ReplaceAll(tt.want, "TABLE", fmt.Sprint(table))
		if got := strings.TrimSuffix(r.stdout, "\n"); got != want || r.code != 0 || r.stderr != "" {
			t.Errorf("%s: got %+v, want %q", tt.name, r, want)
		}
		h.waitRules(append(before, clientRules(addr, "10.77.0.0/24", table)...)...)
	}
}

// TestClientRulesFirst: when the caller has the table, the rules stand.
func TestClientRulesFirst(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	r := h.shell(`read t <<-EOF
		$($CLIENT -4 -a 10.77.0.2 -i wan0; ip -4 rule >"$DIR/rules")
		EOF
		echo "$t"; cat "$DIR/rules"`)
	got := strings.ReplaceAll(r.stdout, "\t", " ")
	for _, want := range []string{"10000\n", "10000: from 10.77.0.2 lookup 10000", "20000: from all to 10.77.0.0/24 lookup 10000",
		"91000: from all iif lo lookup 10000"} {
		if !strings.Contains(got, want) {
			t.Errorf("right after the client there is no %q in\n%s", want, got)
		}
	}
	// The order of the system calls says the same.
	h.ns.IP(t, "address add 10.78.0.2/24 dev wan0")
	trace := filepath.Join(h.dir, "trace")
	tracer := h.start(exec.Command("strace", "-f", "-o", trace, "-e", "trace=write,sendto,sendmsg", "-s", "100",
		bin(t, clientBin), "-f", "-4", "-a", "10.78.0.2", "-i", "wan0"))
	tracer.waitLog("10001\n")
	h.signalClients(syscall.SIGTERM)
	tracer.wait()
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	order := ""
	for line := range strings.Lines(string(text)) {
		for _, what := range []string{"type=RTM_NEWRULE", `write(1, "10001\n"`} { // one call may bring several rules
			order += strings.Repeat(what+" ", strings.Count(line, what))
		}
	}
	if want := `type=RTM_NEWRULE type=RTM_NEWRULE type=RTM_NEWRULE write(1, "10001\n" `; order != want {
		t.Errorf("got %s, want %s", order, want)
	}
}

// TestClientBackground: what stays behind has nothing of its caller's.
func TestClientBackground(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	r := h.shell(`
		exec 9>"$DIR/lock" 8<"$DIR" 7>"$DIR/other"
		flock 9 || exit 1
		trap '' HUP INT TERM PIPE QUIT ALRM USR1 CHLD
		cd "$DIR"
		env --block-signal $CLIENT -4 -a 10.77.0.2 -i wan0`)
	if r.stdout != "10000\n" || r.stderr != "" {
		t.Fatalf("got %q, stderr %q", r.stdout, r.stderr)
	}
	pid := h.onlyClient()
	proc := fmt.Sprintf("/proc/%d/", pid)
	if r := h.run("flock", "-n", filepath.Join(h.dir, "lock"), "true"); r.code != 0 {
		t.Error("the caller's lock is still held")
	}
	stat, err := os.ReadFile(proc + "stat")
	if err != nil {
		t.Fatal(err)
	}
	// Behind the name in brackets: state, ppid, process group, session, terminal.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if group, session, tty := fields[2], fields[3], fields[4]; group != fmt.Sprint(pid) || session != group || tty != "0" {
		t.Errorf("process group %s, session %s, terminal %s of pid %d", group, session, tty, pid)
	}
	if cwd, err := os.Readlink(proc + "cwd"); cwd != "/" {
		t.Errorf("directory: %q, %v", cwd, err)
	}
	eventually(t, "the pipe to the caller is closed", func() error {
		fds, err := os.ReadDir(proc + "fd")
		if err != nil {
			return err
		}
		for _, fd := range fds {
			link, err := os.Readlink(proc + "fd/" + fd.Name())
			if err != nil {
				return err
			}
			switch {
			case len(fd.Name()) == 1 && fd.Name() < "3":
				if link != "/dev/null" {
					return fmt.Errorf("descriptor %s: %s", fd.Name(), link)
				}
			case strings.HasPrefix(link, "socket:"), strings.HasPrefix(link, "anon_inode:"):
			case link == filepath.Join(h.dir, "client.log"):
			default:
				return fmt.Errorf("descriptor %s: %s", fd.Name(), link)
			}
		}
		return nil
	})
	for _, value := range status(t, pid, "SigIgn") {
		if strings.Trim(value, "0") != "" {
			t.Errorf("ignored signals: %s", value)
		}
	}
	// But for the one thread that Go's os/signal keeps for itself; others only begin and end so.
	eventually(t, "no signal is blocked", func() error {
		masked := slices.DeleteFunc(status(t, pid, "SigBlk"), func(value string) bool { return strings.Trim(value, "0") == "" })
		if len(masked) > 1 {
			return fmt.Errorf("masks: %q", masked)
		}
		return nil
	})
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	h.waitClean()
}

// TestClientDefaultSignals: a signal that it does not catch for a purpose ends it even if
// the caller had ignored and blocked it.
func TestClientDefaultSignals(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.shell(`trap '' HUP QUIT; env --block-signal $CLIENT -4 -a 10.77.0.2 -i wan0`)
	if err := syscall.Kill(h.onlyClient(), syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	h.waitNoClient()
}

// TestClientHangup: SIGHUP ends a client in front, as it ends other programs, and none in the background.
func TestClientHangup(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.serve()
	front, _ := h.front("-4", "-a", "10.77.0.3", "-i", "wan0")
	h.lease("10.77.0.2", "wan0")
	rules := h.rules()
	h.signalClients(syscall.SIGHUP)
	front.wait()
	h.signalClients(syscall.SIGHUP)
	// It answers, and goes on to follow its address.
	if got := h.lease("10.77.0.2", "wan0"); got != h.tableNumber("10.77.0.2") {
		t.Errorf("table %d", got)
	}
	h.wantRules(rules...)
	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitNoClient()
}

// TestClientSignals: SIGTERM and SIGINT take everything back, in front and behind.
func TestClientSignals(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.serve()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		if got := h.lease("10.77.0.2", "wan0"); got < 10000 {
			t.Errorf("%v: table %d", sig, got)
		}
		p, table := h.front("-4", "-a", "10.77.0.3", "-i", "wan0")
		if table == "0" {
			t.Errorf("%v: no table in front", sig)
		}
		h.signalClients(sig)
		if code := p.wait(); code != 0 {
			t.Errorf("%v: exit code %d, want 0", sig, code)
		}
		h.waitClean()
	}
}

// TestClientSignalTwice: who sends a signal to a process and to its group, as timeout does, wants the end once: nothing stays.
func TestClientSignalTwice(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.serve()
	for range 3 {
		p, _ := h.front("-4", "-a", "10.77.0.2", "-i", "wan0", "--routes", "copy")
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGTERM, syscall.SIGINT} {
			_ = p.cmd.Process.Signal(sig) // it may have ended
			time.Sleep(time.Millisecond)
		}
		if code := p.wait(); code != 0 {
			t.Errorf("exit code %d, want 0", code)
		}
		h.waitClean()
	}
	r := h.run("timeout", "2", bin(t, clientBin), "-f", "-4", "-a", "10.77.0.3", "-i", "wan0")
	if timedOut := 124; r.code != timedOut {
		t.Errorf("got %+v", r)
	}
	h.waitClean()
}

// TestClientFrontKilled: the lease is wanted even if whoever waited for the answer died.
func TestClientFrontKilled(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	front := h.start(h.command("-4", "-a", "10.77.0.2", "-i", "wan0", "-l", filepath.Join(h.dir, "client.log")))
	h.waitHolder()
	front.kill()
	h.serve()
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}

func TestClientOptions(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve(`socket_path:"other_name"`)
	for i, tt := range []struct {
		name string
		args string
		want func(addr string, table int) []string
	}{
		{"short", "-4 -a ADDR -n 255.255.255.0 -i wan0 -t tag -d other_name", nil},
		{"long", "-4 --address ADDR --netmask 255.255.255.0 --ifname wan0 --tag tag --destination other_name", nil},
		{"length", "-4 -a ADDR -n 24 -i wan0 -t tag -d other_name", nil},
		{"mask of the host", "-4 -a ADDR -i wan0 -t tag -d other_name", nil},
		{"syslog", "-4 -a ADDR -i wan0 -s -t tag -d other_name", nil},
		{"--syslog", "-4 -a ADDR -i wan0 --syslog -t tag -d other_name", nil},
		{"--log-path", "-4 -a ADDR -i wan0 --log-path DIR/a.log -t tag -d other_name", nil},
		{"--log_path", "-4 -a ADDR -i wan0 --log_path DIR/b.log -t tag -d other_name", nil},
		{"--priority", "-4 -a ADDR -i wan0 --priority 100,200,300 -t tag -d other_name", func(addr string, table int) []string {
			return []string{
				fmt.Sprintf("100: from %s lookup %d proto 116", addr, table),
				fmt.Sprintf("200: from all to 10.77.0.0/24 lookup %d proto 116", table),
				fmt.Sprintf("300: from all iif lo lookup %d proto 116", table),
			}
		}},
		{"--no-network-rule", "-4 -a ADDR -i wan0 --no-network-rule -t tag -d other_name", func(addr string, table int) []string {
			return []string{
				fmt.Sprintf("10000: from %s lookup %d proto 116", addr, table),
				fmt.Sprintf("91000: from all iif lo lookup %d proto 116", table),
			}
		}},
		{"--forward", "-4 -a ADDR -i wan0 --forward -t tag -d other_name", func(addr string, table int) []string {
			return append(clientRules(addr, "10.77.0.0/24", uint32(table)),
				fmt.Sprintf("10003: from 10.77.0.0/24 lookup %d proto 116", table))
		}},
	} {
		addr, table := fmt.Sprintf("10.77.0.%d", 2+i), 10000+i
		h.ns.IP(t, "address add "+addr+"/24 dev wan0")
		before := h.rules()
		args := strings.NewReplacer("ADDR", addr, "DIR", h.dir).Replace(tt.args)
		r := h.run(bin(t, clientBin), strings.Fields(args)...)
		if r.stdout != fmt.Sprintf("%d\n", table) || r.code != 0 {
			t.Errorf("%s: got %+v, want table %d", tt.name, r, table)
		}
		want := clientRules(addr, "10.77.0.0/24", uint32(table))
		if tt.want != nil {
			want = tt.want(addr, table)
		}
		h.wantRules(append(before, want...)...)
		if lease := fmt.Sprintf("%d|inet|wan0|%s|tag|0", table, addr); !strings.Contains(strings.Join(h.leases(), "\n"), lease) {
			t.Errorf("%s: no lease %s in %q", tt.name, lease, h.leases())
		}
	}
	for _, name := range []string{"a.log", "b.log"} {
		text, err := os.ReadFile(filepath.Join(h.dir, name))
		if err != nil || !strings.Contains(string(text), ": has table ") {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}

// TestClientNetmask: the length of the address that was given decides the network
// rule, and the host's where none was.
func TestClientNetmask(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	for _, tt := range []struct{ mask, network string }{
		{"255.255.0.0", "10.77.0.0/16"}, {"255.255.255.255", "10.77.0.2"}, {"31", "10.77.0.2/31"}, {"", "10.77.0.0/24"},
	} {
		var more []string
		if tt.mask != "" {
			more = []string{"-n", tt.mask}
		}
		table := h.lease("10.77.0.2", "wan0", more...)
		h.wantRules(clientRules("10.77.0.2", tt.network, table)...)
		h.signalClients(syscall.SIGTERM)
		h.waitClean()
	}
}

// TestClientFamilies: IPv6 and identifiers get a table, and no IPv4 rules.
func TestClientFamilies(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "fd00::2/64")
	h.serve()
	h.isp.IP(t, "link set wan0 up")
	// The identifier first: once the address has rules, their table is not leased to another family.
	for _, args := range []string{"-a client/7 -i wan0", "-a client/7 -i wan0 -n 24", "-6 -a fd00::02 -n 64 -i wan0", "-6 -a fd00::2 -i wan0"} {
		if r := h.client(strings.Fields(args)...); r.stdout != "10000\n" || r.code != 0 || r.stderr != "" {
			t.Errorf("%s: got %+v", args, r)
		}
	}
	h.wantRules()
	h.wantLeases("10000|inet6|wan0|fd00::2||0", "10000|unspec|wan0|client/7||0")
	h.waitClients(2) // one for each key
	// An IPv6 address is followed, an identifier cannot be.
	h.ns.IP(t, "address del fd00::2/64 dev wan0")
	eventually(t, "the lease of the address is gone", func() error {
		if leases := h.leases(); len(leases) != 1 {
			return fmt.Errorf("leases: %q", leases)
		}
		return nil
	})
	h.ns.IP(t, "link del wan0")
	h.wantLeases("10000|unspec|wan0|client/7||0")
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}

func TestClientWrongArguments(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	for _, args := range []string{
		"", "-4", "-4 -a 10.77.0.2", "-4 -i wan0", "-4 -6 -a 10.77.0.2 -i wan0", "-4 -a 10.77.0.256 -i wan0", "-4 -a fd00::2 -i wan0",
		"-6 -a 10.77.0.2 -i wan0", "-4 -a 10.77.0.2 -i wan0 dsl", "-4 -a 10.77.0.2 -i wan0 --what", "-4 -a 10.77.0.2 -i wan0 -t",
		"-4 -a 10.77.0.2 -n 0.0.0.0 -i wan0", "-4 -a 10.77.0.2 -n 255.0.255.0 -i wan0", "-4 -a 10.77.0.2 -n 0 -i wan0",
		"-4 -a 10.77.0.2 -n 33 -i wan0", "-4 -a 10.77.0.2 -i a-name-of-16-byte", "-4 -a 10.77.0.2 -i wan0 --priority 1,2",
		"-4 -a 10.77.0.2 -i wan0 --server-user nobody-of-that-name", "-4 -a 10.77.0.3 -i wan0", "-4 -a 10.77.0.2 -i wan1",
	} {
		for _, more := range []string{"", "-f "} {
			r := h.run(bin(t, clientBin), strings.Fields(more+args)...)
			if r.code != 1 || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("%s: got %+v, want exit code 1, one line on stderr, nothing on stdout", more+args, r)
			}
		}
	}
	h.wantRules()
	h.wantLeases()
	for _, args := range []string{"--help", "-h", "-4 -h"} {
		if r := h.run(bin(t, clientBin), strings.Fields(args)...); r.code != 0 || !strings.HasPrefix(r.stdout, "Usage: ") || r.stderr != "" {
			t.Errorf("%s: got %+v", args, r)
		}
	}
	if r := h.run(bin(t, clientBin), "--version"); r.code != 0 || strings.Count(r.stdout, "\n") != 1 || r.stderr != "" {
		t.Errorf("--version: got %+v", r)
	}
	if r := h.run(bin(t, clientBin), "-4", "-a", "10.77.0.2", "-i", "wan0", "-l", "/no/such/directory/log"); r.stdout != "0\n" || !strings.Contains(r.stderr, "/no/such/directory/log") {
		t.Errorf("a log that cannot be opened: got %+v", r)
	}
}
