package nettest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"golang.org/x/sys/unix"
)

// endEnv makes the test binary, in its sandbox, end in a given way instead of
// running tests. outsideEnv tells it what the host saw of that.
const (
	endEnv     = "NETTEST_TEST_END"
	outsideEnv = "NETTEST_TEST_OUTSIDE"
)

func TestMain(m *testing.M) {
	how := os.Getenv(endEnv)
	switch {
	case how != "" && nettest.InSandbox():
		end(how)
	case how == "" && !nettest.InSandbox() && os.Geteuid() == 0:
		// What only the host can see has to be looked at from there.
		if err := outside(); err != nil {
			os.Setenv(outsideEnv, err.Error())
		}
	}
	nettest.Main(m, "sqlite3", "network-manager")
}

// end leaves a file in /etc and a daemon behind, and ends as how says: with an
// exit status, by a signal, or not at all.
func end(how string) {
	mark := os.Getenv("NETTEST_TEST_MARK")
	if err := os.WriteFile("/etc/"+mark, nil, 0o644); err != nil {
		panic(err)
	}
	daemon := exec.Command("setsid", "sh", "-c", "sleep 1000; : "+mark)
	daemon.Stdout = os.Stdout
	if err := daemon.Start(); err != nil {
		panic(err)
	}
	switch n, err := strconv.Atoi(how); {
	case err == nil:
		os.Exit(n)
	case how == "names":
		out, err := exec.Command("sh", "-c", "ip rule add pref 7 lookup 77 protocol 116 && ip rule show pref 7").CombinedOutput()
		fmt.Printf("%s%v\n", out, err)
		os.Exit(0)
	case how == "killed":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL) // does not return
	}
	fmt.Println("waiting")
	time.Sleep(time.Minute)
}

// outside starts sandboxes from the host and reports what is wrong with how
// they end.
func outside() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	mark := fmt.Sprintf("nettest-outside-%d", os.Getpid())
	var errs []error
	for _, tt := range []struct {
		how    string
		signal unix.Signal // to the process that "go test" would see
		want   int         // exit status, -1 for the signal itself
		text   string      // in the output
		host   string      // shell commands that change the host, as the sandbox sees it
	}{
		{how: "0", want: 0},
		{how: "7", want: 7},
		{how: "killed", want: 128 + 9},
		{how: "wait", signal: unix.SIGQUIT, want: 2, text: "goroutine "},
		{how: "wait", signal: unix.SIGTERM, want: 128 + 15},
		{how: "wait", signal: unix.SIGKILL, want: -1},
		{how: "names", text: "lookup 77 proto 116\n<nil>", host: `
			dir=$(mktemp -d) && mount -t tmpfs etc "$dir" && cp -a /etc/. "$dir" && mount --move "$dir" /etc && rmdir "$dir" &&
			echo 77 table >>/etc/iproute2/rt_tables && install -D ../../packaging/rt_protos.conf /etc/iproute2/rt_protos.d/table-allocator.conf`},
	} {
		var out bytes.Buffer
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		args := []string{exe, "-test.run=^$"}
		if tt.host != "" {
			args = append([]string{"unshare", "--mount", "sh", "-c", "{ " + tt.host + "; } && exec \"$@\"", "sh"}, args...)
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), endEnv+"="+tt.how, "NETTEST_TEST_MARK="+mark)
		cmd.Stdout, cmd.Stderr = w, w
		if err := cmd.Start(); err != nil {
			return err
		}
		w.Close()
		buf := make([]byte, 4096)
		for signalled := false; ; {
			// Ends when the last process with the pipe is gone, the daemon included.
			n, err := r.Read(buf)
			out.Write(buf[:n])
			if tt.signal != 0 && !signalled && strings.Contains(out.String(), "waiting\n") {
				signalled = true
				if err := cmd.Process.Signal(tt.signal); err != nil {
					return err
				}
			}
			if err != nil {
				break
			}
		}
		r.Close()
		_ = cmd.Wait() // the state has it all
		if got := cmd.ProcessState.ExitCode(); got != tt.want {
			errs = append(errs, fmt.Errorf("%s, signal %v: exit status %d, want %d:\n%s", tt.how, tt.signal, got, tt.want, &out))
		}
		if !strings.Contains(out.String(), tt.text) {
			errs = append(errs, fmt.Errorf("%s, signal %v: no %q in the output:\n%s", tt.how, tt.signal, tt.text, &out))
		}
		if _, err := os.Stat("/etc/" + mark); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s, signal %v: the file in /etc is on the host: %v", tt.how, tt.signal, err))
		}
		if left := processes(mark); len(left) != 0 {
			errs = append(errs, fmt.Errorf("%s, signal %v: processes left: %q", tt.how, tt.signal, left))
		}
	}
	return errors.Join(errs...)
}

// processes returns the command lines of running processes that contain text.
func processes(text string) []string {
	var found []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is a good one
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), text) {
			found = append(found, string(b))
		}
	}
	return found
}

// TestSandboxOutside reports what TestMain saw on the host: exit status and
// signals pass through, files and daemons are gone with the sandbox.
func TestSandboxOutside(t *testing.T) {
	if got := os.Getenv(outsideEnv); got != "" {
		t.Error(got)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestSandboxNamespaces(t *testing.T) {
	if !nettest.InSandbox() {
		t.Fatal("InSandbox() = false")
	}
	if got := run(t, "hostname"); got != "sandbox" {
		t.Errorf("hostname is %q", got)
	}
	if got := run(t, "ip", "-oneline", "link"); strings.Count(got, "\n") != 0 || !strings.Contains(got, "lo: <LOOPBACK,UP") {
		t.Errorf("links are not just a lo that is up:\n%s", got)
	}
	// Process 1 is this same program, and nothing of the host is visible.
	if got := run(t, "ps", "-e", "-o", "pid="); len(strings.Fields(got)) > 3 {
		t.Errorf("processes besides init, the tests and ps:\n%s", got)
	}
	if os.Getppid() != 1 {
		t.Errorf("parent is process %d", os.Getppid())
	}
	for path, want := range map[string]string{
		"/etc/resolv.conf": "nameserver 127.0.0.1\n",
		"/etc/hostname":    "sandbox\n",
	} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s is %q, %v", path, got, err)
		}
	}
}

// The file systems that take writes are the sandbox's own: overlays and
// tmpfs, and the few paths shared on purpose.
func TestSandboxRoot(t *testing.T) {
	module, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	shared := []string{module, filepath.Dir(exe), run(t, "go", "env", "GOCACHE")}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		// mount id, parent, device, root, mount point, options, ..., "-", type
		before, after, _ := strings.Cut(line, " - ")
		f := strings.Fields(before)
		point, options, fstype := f[4], f[5], strings.Fields(after)[0]
		switch {
		case fstype == "overlay", fstype == "tmpfs", fstype == "devpts":
		case strings.HasPrefix(options, "ro"):
		case point == "/proc" || point == "/proc/sys/net":
		case fstype == "cgroup2" && f[3] == "/": // see TestSandboxCgroup
		default:
			named := slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasSuffix(a, "="+point) })
			if !named && !slices.Contains(shared, point) {
				t.Errorf("writable and not private: %s", line)
			}
		}
	}
	for _, dir := range []string{"/", "/etc", "/usr/bin", "/var/lib", "/tmp", "/run", "/root", "/dev"} {
		path := filepath.Join(dir, "nettest-"+strconv.Itoa(os.Getpid()))
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Error(err)
		}
	}
	if err := os.WriteFile("/proc/sys/kernel/panic", []byte("0"), 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to the host's sysctl: got %v, want %v", err, unix.EROFS)
	}
}

// Sysctls of the network can be set and belong to the namespace of whoever
// sets them.
func TestSandboxNetworkSysctls(t *testing.T) {
	run(t, "ip", "netns", "add", "other")
	defer run(t, "ip", "netns", "delete", "other")
	run(t, "ip", "netns", "exec", "other", "sysctl", "-w", "net.ipv4.ip_forward=1")
	if got := run(t, "ip", "netns", "exec", "other", "sysctl", "-n", "net.ipv4.ip_forward"); got != "1" {
		t.Errorf("there: net.ipv4.ip_forward = %s, want 1", got)
	}
	if got := run(t, "sysctl", "-n", "net.ipv4.ip_forward"); got != "0" {
		t.Errorf("here: net.ipv4.ip_forward = %s, want 0", got)
	}
	run(t, "sysctl", "-w", "net.ipv4.conf.lo.rp_filter=1")
}

// What a test sees of cgroups begins with the sandbox's own.
func TestSandboxCgroup(t *testing.T) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || !strings.Contains("\n"+string(own), "\n0::/\n") {
		t.Errorf("own cgroup: %q, %v", own, err)
	}
	// Only the root of all cgroups has no such file.
	if events, err := os.ReadFile("/sys/fs/cgroup/cgroup.events"); err != nil || !strings.Contains(string(events), "populated 1") {
		t.Errorf("events of the sandbox's cgroup: %q, %v", events, err)
	}
	if pids, err := os.ReadFile("/sys/fs/cgroup/cgroup.procs"); err != nil || slices.Contains(strings.Fields(string(pids)), "0") {
		t.Errorf("processes in the sandbox's cgroup, with 0 for those outside: %q, %v", pids, err)
	}
	if err := os.MkdirAll("/sys/fs/cgroup/left/behind", 0o755); err != nil {
		t.Error(err)
	}
}

func TestSandboxPackages(t *testing.T) {
	for _, args := range [][]string{
		{"sqlite3", "--version"}, {"NetworkManager", "--version"}, {"dhclient", "--version"},
		{"dnsmasq", "--version"}, {"ifup", "--version"}, {"nft", "--version"}, {"socat", "-V"},
		{"udevadm", "--version"}, {"which", "radvd", "dhcpd", "ip"}, {"tcpdump", "--version"}, {"strace", "--version"},
		{"dbus-daemon", "--version"}, {"curl", "--version"}, {"ping", "-c1", "127.0.0.1"}, {"python3", "--version"},
	} {
		run(t, args[0], args[1:]...)
	}
	// The package database is of one piece with the files.
	run(t, "dpkg", "--verify", "network-manager", "sqlite3")
}

func TestSandboxReapsOrphans(t *testing.T) {
	var pids []string
	for range 20 {
		// The subshell ends first, so its child becomes process 1's.
		pids = append(pids, run(t, "sh", "-c", "(setsid sleep 0.2 >/dev/null 2>&1 & echo $!)"))
	}
	for _, pid := range pids {
		if stat, err := os.ReadFile("/proc/" + pid + "/stat"); err == nil && strings.Fields(string(stat))[3] != "1" {
			t.Errorf("parent of the orphan: %s", stat)
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, pid := range pids {
		for {
			_, err := os.Stat("/proc/" + pid)
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("process %s was not reaped", pid)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func TestRebootCommand(t *testing.T) {
	const id = "01234567-89ab-cdef-0123-456789abcdef"
	now := func(cmd *exec.Cmd) (mono float64, boot string) {
		t.Helper()
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if _, err := fmt.Sscan(string(out), &mono, &boot); err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		return mono, boot
	}
	const script = `import time; print(time.monotonic(), open("/proc/sys/kernel/random/boot_id").read())`
	before, host := now(exec.CommandContext(t.Context(), "python3", "-c", script))
	for _, offset := range []time.Duration{10 * 24 * time.Hour, -time.Duration(before/2) * time.Second} {
		mono, boot := now(nettest.RebootCommand(t.Context(), offset, id, "python3", "-c", script))
		if d := mono - before - offset.Seconds(); d < 0 || d > 30 {
			t.Errorf("offset %v: monotonic clock went from %.1f to %.1f", offset, before, mono)
		}
		if boot != id {
			t.Errorf("boot id is %q, want %q", boot, id)
		}
	}
	if _, boot := now(exec.CommandContext(t.Context(), "python3", "-c", script)); boot != host {
		t.Errorf("boot id outside is %q, was %q", boot, host)
	}

	// Signals reach the program itself.
	cmd := nettest.RebootCommand(t.Context(), time.Hour, id, "sh", "-c", `trap "exit 5" TERM; echo $$; while :; do sleep 0.01; done`)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil || pid != cmd.Process.Pid {
		t.Errorf("process is %d, %v, want %d", pid, err, cmd.Process.Pid)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the state has it all
	if got := cmd.ProcessState.ExitCode(); got != 5 {
		t.Errorf("exit status %d, want 5", got)
	}
}
