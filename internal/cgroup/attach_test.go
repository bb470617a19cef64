package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAttachDetach(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	if err := os.Mkdir(c.file("/unit"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file("/unit"))
	pid := p.cmd.Process.Pid
	for name, commands := range map[string][]string{
		"idle": {"socket tcp4"}, "udp": {"socket udp6", "set 0x77"}, "raw": {"socket raw4"},
		"bound": {"socket udp4", "bind 192.0.2.1:0"}, "connected": {"socket udp4", "connect 192.0.2.9:9"},
		"listening": {"socket tcp6", "listen"}, "local": {"socket udp4", "bind 127.0.0.1:0"},
		"multicast": {"socket udp4", "bind 224.0.0.251:0"}, "mptcp": {"socket mptcp4"},
	} {
		for _, command := range commands {
			p.do("%s %s", name, command)
		}
	}
	marks := func(want map[string]string) {
		t.Helper()
		for name, mark := range want {
			p.want(mark, "%s mark", name)
		}
	}
	const m, none = "0x2000000", "0x0"

	report, err := c.Attach(pid, wan0, testMark, false)
	if err != nil {
		t.Fatal(err)
	}
	if report.Cgroup != "/unit/ta-wan0" || report.Name == "" {
		t.Errorf("report: %+v", report)
	}
	var said []string
	for _, s := range report.Sockets {
		said = append(said, s.Kind+" "+s.Done)
	}
	slices.Sort(said)
	wantSaid := []string{
		"mptcp bound", "raw icmp bound", "tcp bound", "tcp left alone: listening", "udp bound", "udp bound", "udp bound",
		"udp left alone: bound to an address", "udp left alone: connected",
	}
	if !slices.Equal(said, wantSaid) {
		t.Errorf("sockets:\n%s\nwant:\n%s", strings.Join(said, "\n"), strings.Join(wantSaid, "\n"))
	}
	marks(map[string]string{
		"idle": m, "udp": "0x2000077", "raw": m, "local": m, "multicast": m, "mptcp": m,
		"bound": none, "connected": none, "listening": none,
	})
	p.want(m, "new socket tcp4")

	// To another one: what was made in the first cgroup follows, too.
	if report, err = c.Attach(pid, wan1, otherMark, false); err != nil || report.Cgroup != "/unit/ta-wan1" {
		t.Fatal(report, err)
	}
	marks(map[string]string{"idle": "0x6000000", "new": "0x6000000", "udp": "0x6000077"})
	p.want("0x6000000", "newer socket udp4")
	if _, err := os.Stat(c.file("/unit/ta-wan0")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the first cgroup is left: %v", err)
	}

	if report, err = c.Detach(pid); err != nil || report.Cgroup != "/unit" {
		t.Fatal(report, err)
	}
	// Free, also of the programs of the cgroup that they were made in.
	marks(map[string]string{"idle": "0x1000000", "new": "0x1000000", "udp": "0x1000077", "newer": "0x1000000", "bound": "0x1000000", "connected": none})
	p.want("0x1000000", "newer connect 192.0.2.9:9")
	p.want(none, "newest socket tcp4")
	if entries, err := filepath.Glob(c.file("/unit") + "/ta-*"); err != nil || len(entries) != 0 {
		t.Errorf("cgroups left: %q, %v", entries, err)
	}
	if report, err := c.Detach(pid); err != nil || report.Sockets != nil {
		t.Errorf("detached twice: %+v, %v", report, err)
	}
	// And back.
	if _, err := c.Attach(pid, wan0, testMark, false); err != nil {
		t.Fatal(err)
	}
	marks(map[string]string{"idle": m, "new": m, "connected": none})
}

func TestAttachNobody(t *testing.T) {
	c := testCgroups(t)
	gone := exec.Command("/bin/true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[int]error{gone.Process.Pid: unix.ESRCH, -1: unix.EINVAL} {
		if _, err := c.Attach(pid, wan0, testMark, false); !errors.Is(err, want) {
			t.Errorf("attach %d: got %v, want %v", pid, err, want)
		}
		if _, err := c.Detach(pid); !errors.Is(err, want) {
			t.Errorf("detach %d: got %v, want %v", pid, err, want)
		}
	}
	elsewhere := exec.Command("unshare", "--net", "sleep", "60")
	if err := elsewhere.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = elsewhere.Process.Kill() // it has not ended
		_ = elsewhere.Wait()
	}()
	for {
		own, err1 := os.Readlink("/proc/thread-self/ns/net")
		its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", elsewhere.Process.Pid))
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if own != its {
			break
		}
	}
	if _, err := c.Attach(elsewhere.Process.Pid, wan0, testMark, false); err == nil || !strings.Contains(err.Error(), "another network namespace") {
		t.Errorf("attach in another network namespace: %v", err)
	}
}

func TestBound(t *testing.T) {
	c := testCgroups(t)
	bound := func() (lines []string) {
		t.Helper()
		all, err := c.Bound()
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range all {
			lines = append(lines, fmt.Sprintf("%s %s %s %d", b.Cgroup, b.Uplink, b.Mark, b.PIDs))
		}
		return lines
	}
	want := func(want ...string) {
		t.Helper()
		if got := bound(); !slices.Equal(got, want) {
			t.Errorf("bound:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	want()
	for cgroup, m := range map[string]Mark{
		"/a/b/ta-wan0": testMark, "/a/ta-wan1:fallback": {0x05000000, 0xff000000}, "/ta-wan9": testMark, "/table-allocator/wan1": otherMark,
	} {
		if _, err := c.place(-1, cgroup, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"/a/ta-mine", "/a/b/ta-wan0/deep/er", "/a/b/ta-wan0/ta-wan7"} { // without our programs
		if err := os.MkdirAll(c.file(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	first := startIn(t, c.file("/a/b/ta-wan0")).cmd.Process.Pid
	second := startIn(t, c.file("/a/b/ta-wan0/deep/er")).cmd.Process.Pid
	third := startIn(t, c.file("/a/ta-wan1:fallback")).cmd.Process.Pid
	both := []int{first, second}
	slices.Sort(both)
	want(
		fmt.Sprintf("/a/b/ta-wan0 wan0 0x2000000/0xff000000 %d", both),
		fmt.Sprintf("/a/ta-wan1:fallback wan1:fallback 0x5000000/0xff000000 %d", []int{third}),
		"/table-allocator/wan1 wan1 0x6000000/0xff000000 []",
	)
	for dir, there := range map[string]bool{"/ta-wan9": false, "/a/ta-mine": true, "/table-allocator/wan1": true} {
		if _, err := os.Stat(c.file(dir)); errors.Is(err, os.ErrNotExist) == there {
			t.Errorf("%s: %v", dir, err)
		}
	}

	inside := startIn(t, c.file("/table-allocator/wan1"))
	if err := c.RemoveInterface(wan1); err != nil {
		t.Fatal(err)
	}
	if cgroup, err := c.of(inside.cmd.Process.Pid); err != nil || cgroup != "/" {
		t.Errorf("who was in the interface's cgroup is in %q, %v", cgroup, err)
	}
	if _, err := os.Stat(c.file(rootName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", rootName, err)
	}
	if err := c.RemoveInterface(wan1); err != nil {
		t.Errorf("removed twice: %v", err)
	}
}

// Many that come and go at once in one cgroup: each is bound, and nothing is left.
func TestTogether(t *testing.T) {
	c := testCgroups(t)
	const runs = 40
	cgroup, err := os.Open(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	errs := make(chan error, runs)
	for range runs {
		go func() {
			cmd := exec.Command("sleep", "60")
			cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
			err := cmd.Start()
			if err == nil {
				_, err = c.Attach(cmd.Process.Pid, wan0, testMark, false)
				_ = cmd.Process.Kill() // it has not ended
				_ = cmd.Wait()
			}
			c.sweepIn("/")
			errs <- err
		}()
	}
	for range runs {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	dir := path.Join(c.dir, "ta-wan0")
	var parallel []chan error
	for range runs {
		done := make(chan error)
		parallel = append(parallel, done)
		go func() {
			_, err := c.place(-1, "/ta-wan0", testMark)
			c.sweepIn("/")
			done <- err
		}()
	}
	for _, done := range parallel {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	c.sweepIn("/")
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", dir, err)
	}
}

// A process that cannot be moved is not said to be where it would have gone, and the message says what stands in the way.
func TestAttachRefused(t *testing.T) {
	c := testCgroups(t)
	for _, dir := range []string{"/threads", "/threads/one", "/full"} {
		if err := os.Mkdir(c.file(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for file, text := range map[string]string{"/threads/one/cgroup.type": "threaded", "/full/cgroup.max.descendants": "0"} {
		if err := os.WriteFile(c.file(file), []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	for dir, why := range map[string]string{"/threads": "cgroup.type", "/full": "cgroup.max.descendants"} {
		p, err := c.Attach(startIn(t, c.file(dir)).cmd.Process.Pid, wan1, testMark, false)
		if err == nil || !strings.Contains(err.Error(), why) || p.Cgroup != "" {
			t.Errorf("%s: %+v, %v; want %q", dir, p, err, why)
		}
	}
}

// What another thread starts has our open files until it executes something; a cgroup is not in use
// for that.
func TestSweepBesideFork(t *testing.T) {
	c := testCgroups(t)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
				_ = exec.Command("/bin/true").Run() // that it starts is enough
			}
		}
	}()
	defer func() { close(stop); <-ended }()
	for round := range 100 {
		if _, err := c.place(-1, "/ta-wan0", testMark); err != nil {
			t.Fatal(err)
		}
		c.sweepIn("/")
		if _, err := os.Stat(c.file("/ta-wan0")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("round %d: the cgroup is left: %v", round, err)
		}
	}
}
