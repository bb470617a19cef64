package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestBindRunIsTheCommand: run is executed in place by the command, with everything that it had.
func TestBindRunIsTheCommand(t *testing.T) {
	c := newCrossing(t)
	client := bin(t, clientBin)
	dir := t.TempDir()
	if err := nettest.WriteExecutable(filepath.Join(dir, "script"), []byte("echo no first line: $0 $*")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "data"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		args []string
		code int
		out  string // of standard output
		err  string // a part of standard error
	}{
		{"exit code", []string{"sh", "-c", "exit 42"}, 42, "", ""},
		{"arguments", []string{"printf", "%s.", "--wait", "a b", "", "-h"}, 0, "--wait.a b..-h.", ""},
		{"signal", []string{"sh", "-c", "kill -TERM $$"}, -1, "", ""},
		{"standard error", []string{"sh", "-c", "echo out; echo err >&2"}, 0, "out\n", "err\n"},
		{"no such command", []string{"no-such-command"}, 127, "", "no-such-command"},
		{"no such file", []string{dir + "/none"}, 127, "", "/none"},
		{"not executable", []string{dir + "/data"}, 126, "", "permission denied"},
		{"a directory", []string{dir}, 126, "", dir},
		{"a script without an interpreter", []string{dir + "/script", "x"}, 0, "no first line: " + dir + "/script x\n", ""},
		{"no command", nil, 125, "", "COMMAND"},
	} {
		r := c.do(append([]string{"run", "--ifname", "wan1", "--"}, tt.args...)...)
		if r.code != tt.code || r.stdout != tt.out || !strings.Contains(r.stderr, tt.err) || tt.err == "" && r.stderr != "" {
			t.Errorf("%s: got %+v, want %d %q %q", tt.name, r, tt.code, tt.out, tt.err)
		}
	}

	// The process, its directory, environment, descriptors, terminal and what it ignores.
	script := `cd "$2" && export X=y && exec 7<data && umask 027 && ulimit -n 100 && trap "" HUP INT && echo $$ && exec "$1" run --ifname=wan1 sh -c \
		'echo $$; pwd; echo $X; readlink /proc/self/fd/7; umask; ulimit -n; grep SigIgn /proc/self/status; ls /proc/self/fd | wc -w; cat /proc/self/cgroup'`
	plain := strings.Replace(script, `"$1" run --ifname=wan1 `, "", 1)
	lines := func(script string) []string {
		cmd := c.here("sh", "-c", script, "sh", client, dir)
		r := c.run(cmd.Args[0], cmd.Args[1:]...)
		if r.code != 0 || r.stderr != "" {
			t.Fatalf("%+v", r)
		}
		return strings.Split(strings.TrimSpace(r.stdout), "\n")
	}
	got, want := lines(script), lines(plain)
	if got[0] != got[1] {
		t.Errorf("process %s became %s", got[0], got[1])
	}
	if last := len(got) - 1; !strings.HasSuffix(got[last], "/ta-wan1") || !slices.Equal(got[2:last-1], want[2:len(want)-1]) && !slices.Equal(got[2:last], want[2:len(want)-1]) {
		t.Errorf("bound: %q\nplain: %q", got, want)
	}
	cmd := c.here("script", "-qec", client+" run --ifname wan1 sh -c 'tty && test -t 0 -a -t 1 -a -t 2 && exit 3'", "/dev/null")
	if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.code != 3 || !strings.Contains(r.stdout, "/dev/pts/") {
		t.Errorf("at a terminal: %+v", r)
	}
	// The end of the parent is told to the thread that asked for it.
	cmd = c.here("sh", "-c", `setpriv --pdeathsig TERM "$0" run --ifname wan1 python3 -c '
import ctypes
n = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(n))
print(n.value)'`, client)
	if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.stdout != "15\n" {
		t.Errorf("signal at the end of the parent: %+v", r)
	}
}

// TestBindRefusals: what keeps run from binding keeps it from running, and it says why.
func TestBindRefusals(t *testing.T) {
	c := newCrossing(t)
	path := publicBin(t, clientBin)
	for _, args := range [][]string{
		{"run", "--ifname", "wan1", "echo", "it runs"}, {"attach", "--ifname", "wan1", "1"}, {"detach", "1"}, {"bound"},
		{"bind", "--ifname", "wan1", "--uid", "0"}, {"unbind", "--all"},
	} {
		r := c.run("setpriv", append(append(strings.Fields(asStranger), path), args...)...)
		code := 1
		if args[0] == "run" {
			code = 125
		}
		if r.code != code || r.stdout != "" || !strings.Contains(r.stderr, args[0]+" needs root") {
			t.Errorf("%q as a user: %+v", args, r)
		}
	}
	for _, tt := range []struct {
		name string
		args []string
		code int
		say  string
	}{
		{"no link", []string{"run"}, 125, "a link and a COMMAND"},
		{"a typo", []string{"run", "wna1", "true"}, 125, "no link has the name wna1"},
		{"a typo of bind", []string{"bind", "--ifname", "wna1", "--uid", "4711"}, 2, "--force"},
		{"a typo of attach", []string{"attach", "wna1", "1"}, 2, "no link has the name wna1"},
		{"an unknown option", []string{"run", "--ifname", "wan1", "--no-such-thing", "true"}, 125, "no-such-thing"},
		{"no such link", []string{"run", "--ifname", "wan7", "echo"}, 125, "wan7"},
		{"without a lease", []string{"run", "-i", "lo", "echo"}, 125, "lo"},
		{"no process", []string{"attach", "--ifname", "wan1"}, 2, "PID"},
		{"a process that has ended", []string{"attach", "--ifname", "wan1", "4194303"}, 1, "4194303"},
		{"not bound to the link", []string{"detach", "--ifname", "wan1", "1"}, 1, "process 1 is not bound to wan1\n"},
		{"nothing to bind", []string{"bind", "--ifname", "wan1"}, 2, "--uid"},
		{"not bound", []string{"unbind", "--ifname", "wan1", "--uid", "4711"}, 1, "4711"},
		{"an argument too much", []string{"bound", "wan1", "wan2"}, 2, "wan2"},
	} {
		if r := c.do(tt.args...); r.code != tt.code || r.stdout != "" || !strings.Contains(r.stderr, tt.say) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
	// Without the right to load programs it does not pretend.
	cmd := c.here("setpriv", "--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-bpf,-sys_admin", bin(t, clientBin), "run", "--ifname", "wan1", "echo", "it runs")
	if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, "not permitted") {
		t.Errorf("without the right to load programs: %+v", r)
	}
}

// TestBindWait: run waits for a lease, and for the server, as long as it is told.
func TestBindWait(t *testing.T) {
	c := newCrossingAlone(t)
	inet1, _ := at(1)
	if r := c.do("run", "--ifname", "wan1", "--wait", "1", "echo"); r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, "server") {
		t.Errorf("without a server: %+v", r)
	}
	c.serve()
	if r := c.do("run", "--ifname", "wan1", "--wait", "1", "echo"); r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, "lease") {
		t.Errorf("without a lease: %+v", r)
	}
	p := c.bound("wan1", "--wait", fmt.Sprint(int(patience/time.Second)))
	c.watch("--routes", "copy")
	c.only(1, func() { p.want(inet1, "new s tcp4\nconnect s %s\nask s", far4) })
}

// TestBindTraffic: users and ports, which no program can leave; and unbind.
func TestBindTraffic(t *testing.T) {
	c := newCrossing(t)
	before := c.allRules()
	self, err := userProbe()
	if err != nil {
		t.Fatal(err)
	}
	as := func(uid string) *probing {
		return c.prober("setpriv", "--reuid="+uid, "--regid="+uid, "--clear-groups", "--ambient-caps=-all", self)
	}
	user, root := as("4711"), c.prober()
	c.leaves(user, 0)
	c.must("bind", "--ifname", "wan1", "--uid", "4711")
	c.leaves(user, 1)
	c.leaves(root, 0)
	c.must("bind", "--ifname", "wan1", "--uid", "4711") // twice is once
	c.must("bind", "--ifname", "wan1", "--proto", "tcp", "--dport", "7")
	inet0, inet60 := at(0)
	inet1, inet61 := at(1)
	c.only(1, func() {
		root.want(inet1, "new s tcp4\nconnect s %s\nask s", far4)
		root.want(inet61, "new s tcp6\nconnect s %s\nask s", far6)
	})
	c.only(0, func() {
		root.want(inet0, "new s udp4\nask s %s", far4)
		root.want(inet60, "new s udp6\nask s %s", far6)
	})
	c.must("bind", "--ifname", "wan1", "--proto", "udp", "--dport", "1-6")
	c.only(0, func() { root.want(inet0, "new s udp4\nask s %s", far4) })

	var list struct {
		Version int
		Bound   []struct {
			Ifname, Traffic string
			OnLoss          string `json:"on_loss"`
			Tables          []int
		}
	}
	if err := json.Unmarshal([]byte(c.must("bound", "--json")), &list); err != nil || list.Version != 1 {
		t.Fatal(list.Version, err)
	}
	var said []string
	for _, r := range list.Bound {
		said = append(said, fmt.Sprint(r.Ifname, " ", r.OnLoss, " ", r.Traffic, " ", len(r.Tables)))
	}
	if diff := unordered(said, []string{
		"wan1 block uidrange 4711-4711 1", "wan1 block ipproto tcp dport 7 1", "wan1 block ipproto udp dport 1-6 1",
	}); diff != "" {
		t.Errorf("bound: %s", diff)
	}

	// Without a lease it is blocked, and that is said.
	c.ns.IP(t, "link set wan1 down")
	eventually(t, "the user is blocked", func() error {
		user.want("ok", "new w udp4")
		if answer := user.do("connect w %s", far4); answer != "ENETUNREACH" {
			return errors.New(answer)
		}
		return nil
	})
	c.nothing(func() {
		for _, far := range [][2]string{{"4", far4}, {"6", far6}} {
			user.want("ENETUNREACH", "new s udp%s\nask s %s", far[0], far[1])
			user.want("ENETUNREACH", "new s tcp%s\nconnect s %s", far[0], far[1])
			root.want("ENETUNREACH", "new s tcp%s\nconnect s %s", far[0], far[1])
		}
	})
	c.ns.IP(t, "link set wan1 up")
	c.address(1)
	c.waitLeaves(user, 1)

	c.must("unbind", "--ifname", "wan1", "--uid", "4711")
	c.only(0, func() { user.want(inet0, "new s udp4\nask s %s", far4) })
	c.only(1, func() { user.want(inet1, "new s tcp4\nconnect s %s\nask s", far4) }) // by its port
	c.must("unbind", "--ifname", "wan1", "--proto", "tcp", "--dport", "7")
	c.leaves(user, 0)
	c.must("unbind", "--all")
	eventually(t, "the rules are as before", func() error {
		if diff := unordered(c.allRules(), before); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// userProbe is the prober where any user may run it.
func userProbe() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "userprobe")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("sh", "-c", `chmod 755 "$1" && cp "$0" "$1/probe" && chmod 755 "$1/probe"`, self, dir).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return filepath.Join(dir, "probe"), nil
}

// TestBindCgroup: the cgroup of an interface, for whoever is put into it; and bound, which shows it all.
func TestBindCgroup(t *testing.T) {
	c := newCrossing(t)
	if out := c.must("bound"); strings.Count(out, "\n") != 1 {
		t.Errorf("bound says, of nothing:\n%s", out)
	}
	dir := strings.TrimSpace(c.must("bind", "--ifname", "wan1", "--cgroup"))
	if again := strings.TrimSpace(c.must("bind", "--ifname", "wan1", "--cgroup")); dir != "/sys/fs/cgroup/table-allocator/wan1" || again != dir {
		t.Errorf("cgroups %q, %q", dir, again)
	}
	p := c.prober("sh", "-c", `echo $$ >"$0"/cgroup.procs && exec "$1"`, dir)
	c.leaves(p, 1)
	soft := c.bound("wan0", "--on-loss", "fallback")
	c.leaves(soft, 0)
	nested := c.prober("sh", "-c", `echo $$ >"$0"/cgroup.procs && exec "$1" run --ifname wan0 "$2"`, dir, bin(t, clientBin))
	c.leaves(nested, 0)

	pid := func(p *probing) string { return strconv.Itoa(p.p.cmd.Process.Pid) }
	out := c.must("bound")
	for _, want := range []string{
		"wan1            block    10001        " + pid(p) + " (",
		"wan0            block    10000        " + pid(nested) + " (",
		"wan0            fallback 10000        " + pid(soft) + " (",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("bound does not say %q:\n%s", want, out)
		}
	}
	type row struct {
		Ifname, Cgroup, Missing string
		OnLoss                  string `json:"on_loss"`
		Tables                  []int
		Processes               []struct {
			PID  int
			Name string
		}
	}
	var list struct{ Bound []row }
	if err := json.Unmarshal([]byte(c.must("bound", "--json")), &list); err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, r := range list.Bound {
		for _, process := range r.Processes {
			said = append(said, fmt.Sprint(r.Ifname, " ", r.OnLoss, " ", r.Tables, " ", r.Cgroup, " ", process.PID, " ", process.Name != "", " ", r.Missing))
		}
	}
	if diff := unordered(said, []string{
		"wan1 block [10001] /table-allocator/wan1 " + pid(p) + " true ",
		"wan0 block [10000] /table-allocator/wan1/ta-wan0 " + pid(nested) + " true ",
		"wan0 fallback [10000] /user/ta-wan0:fallback " + pid(soft) + " true ",
	}); diff != "" {
		t.Errorf("bound --json: %s", diff)
	}
	c.ns.IP(t, "address flush dev wan0 scope global")
	eventually(t, "bound says what is missing", func() error {
		r := c.do("bound")
		if r.code != 1 || !strings.Contains(r.stdout, "misses a lease") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})

	// Out of everything, and nothing is left.
	c.address(0)
	c.waitLeaves(nested, 0)
	c.must("unbind", "--all")
	for _, p := range []*probing{p, soft, nested} {
		c.leaves(p, 0)
	}
	if left := c.ours(); len(left) != 0 {
		t.Errorf("left: %q", left)
	}
	if out := c.must("bound"); strings.Count(out, "\n") != 1 {
		t.Errorf("bound says, of nothing:\n%s", out)
	}
}

// TestBindPrivateMount: where nothing is mounted below /sys, as after `ip netns exec`.
func TestBindPrivateMount(t *testing.T) {
	c := newCrossing(t)
	inet1, _ := at(1)
	p := c.prober("unshare", "--mount", "--propagation", "private", "sh", "-c",
		`umount /sys/fs/cgroup && "$0" run --ifname wan1 "$1"; exit`, bin(t, clientBin))
	c.only(1, func() { p.want(inet1, "new s tcp4\nconnect s %s\nask s", far4) })
	cmd := c.here("unshare", "--mount", "--propagation", "private", "sh", "-c", `umount /sys/fs/cgroup && "$0" bind --ifname wan1 --cgroup`, bin(t, clientBin))
	if r := c.run(cmd.Args[0], cmd.Args[1:]...); r.code != 1 || !strings.Contains(r.stderr, "mount -t cgroup2") {
		t.Errorf("a cgroup that nobody could see: %+v", r)
	}
}

// TestBindForeign: nothing of what others have is touched.
func TestBindForeign(t *testing.T) {
	c := newCrossing(t)
	c.must("run", "--ifname", "wan1", "true")
	c.ns.IP(t, "rule add pref 9003 fwmark 0x99/0xff unreachable")
	c.ns.IP(t, "rule add pref 9500 fwmark 0x5000000/0xff000000 lookup 77")
	if err := os.MkdirAll(filepath.Join(c.cgroup, "user/ta-mine"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := c.do("run", "--ifname", "wan1", "true")
	if r.code != 0 || !strings.Contains(r.stderr, "0x5000000/0xff000000") || !strings.Contains(r.stderr, "bind_mark_mask") {
		t.Errorf("a rule for the same bits: %+v", r)
	}
	c.must("unbind", "--all")
	rules := strings.Join(c.rules(), "\n")
	for _, want := range []string{"9003: from all fwmark 0x99/0xff unreachable", "9500: from all fwmark 0x5000000/0xff000000 lookup 77"} {
		if !strings.Contains(rules, want) {
			t.Errorf("there is no %q in\n%s", want, rules)
		}
	}
	if _, err := os.Stat(filepath.Join(c.cgroup, "user/ta-mine")); err != nil {
		t.Error(err)
	}
}
