package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A crossing is a host with two uplinks, both with IPv4 and IPv6. Table main prefers the first uplink.
// The host has a hierarchy of cgroups of its own.
//
//	wan0  10.1.0.2 fd01::2  via 10.1.0.1 fd01::1
//	wan1  10.2.0.2 fd02::2  via 10.2.0.1 fd02::1
//
// There is no NAT: the internet sees the host's own addresses.
type crossing struct {
	*uplinks
	cgroup string // the root of its cgroups, as the test sees it
	inner  string // the pid of the process that holds its mount and cgroup namespaces
}

const (
	far4 = internet + ":7"
	far6 = "[" + internet6 + "]:7"
)

// newCrossing makes a crossing with a server, and a watch that fills the tables of all four addresses.
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

// newCrossingAlone makes a crossing without a server and a watch.
func newCrossingAlone(t *testing.T) *crossing {
	t.Helper()
	h := newHost(t)
	sysctl(t, h.ns, "net/ipv6/conf/default/accept_dad", "0")
	sysctl(t, h.ns, "net/ipv4/ping_group_range", "0 2147483647")
	c := &crossing{uplinks: h.behind(routed(0), routed(1))}
	for n := range c.isps {
		c.address(n)
	}
	c.enclose()
	return c
}

// makeCgroup makes a cgroup, which ends with the test.
func makeCgroup(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/sys/fs/cgroup", "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, "the cgroups of the test are removed", func() error {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) // removeTree fails as long as a process is left
			return errors.Join(removeTree(dir))
		})
	})
	return dir
}

// enclose gives the host its cgroups.
func (c *crossing) enclose() {
	c.t.Helper()
	c.cgroup = makeCgroup(c.t)
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

// here is a command on the host, in cgroup /user.
func (c *crossing) here(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target=" + c.inner, "--mount", "--cgroup", "sh", "-c",
		`echo 0 >/sys/fs/cgroup/user/cgroup.procs && exec "$@"`, "sh", name}, args...)...)
}

// do runs the client in cgroup /user to its end.
func (c *crossing) do(args ...string) result {
	c.t.Helper()
	cmd := c.here(bin(c.t, clientBin), args...)
	return c.run(cmd.Args[0], cmd.Args[1:]...)
}

// watch starts a watch where the bound programs are: the bpf file system with their lock is mounted there.
func (c *crossing) watch(args ...string) *process {
	c.t.Helper()
	p := c.start(c.here(bin(c.t, clientBin), append([]string{"watch", "--debug"}, args...)...))
	p.waitLog("msg=watching")
	return p
}

// must is do for a client that has to succeed, and returns its stdout.
func (c *crossing) must(args ...string) string {
	c.t.Helper()
	r := c.do(args...)
	if r.code != 0 {
		c.t.Fatalf("client %q: exit code %d\nstdout: %s\nstderr: %s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// waitTables waits until the tables of both addresses of uplink n have a default route.
func (c *crossing) waitTables(n int) {
	c.t.Helper()
	inet, inet6 := at(n)
	for _, addr := range []string{inet, inet6} {
		table := c.served(addr)
		eventually(c.t, "table "+table+" is filled", func() error {
			for _, family := range []string{"-4", "-6"} {
				out, _ := c.ns.Output("ip", family, "route", "show", "default", "table", table) // a table without routes is an error
				if strings.Contains(out, fmt.Sprintf("dev wan%d", n)) {
					return nil
				}
			}
			return errors.New("no default route")
		})
	}
}

// probing is a prober that runs: a program whose sockets the test commands.
type probing struct {
	t   *testing.T
	p   *process
	in  io.WriteCloser
	out *bufio.Reader
}

// prober starts a prober. before is a command in front of it, such as run with its options.
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
		in.Close() // the prober ends at the end of its input, also below a shell
		r.Close()
	})
	return p
}

// bound starts a prober that is bound to a link.
func (c *crossing) bound(ifname string, options ...string) *probing {
	c.t.Helper()
	return c.prober(append(append([]string{bin(c.t, clientBin), "run", "--ifname", ifname}, options...), "--")...)
}

// do sends a command and returns the answer.
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

// want sends commands, one in each line. It fails the test unless the last answer is want and all
// others are "ok".
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
