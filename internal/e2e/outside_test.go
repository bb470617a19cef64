package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// A retreat is a mount namespace with a /run and an /etc of its own, for commands that meet files of others there.
type retreat struct {
	*host
	pid    string // of a process in it
	silent []*os.File
	flags  []string // of the clients of holdUp
	noProc bool     // no program of Go begins: its runtime reads /proc first
}

func (h *host) retreat() *retreat {
	h.t.Helper()
	// It has cgroups of its own: others have programs of other tests.
	p := h.start(exec.Command("sh", "-ec", `echo 0 >"$0/cgroup.procs"; exec unshare --cgroup --mount --propagation private sh -ec "$1"`, makeCgroup(h.t), `
		umount /sys/fs/cgroup
		mount -t cgroup2 cgroup2 /sys/fs/cgroup
		mount -t tmpfs run /run
		mkdir /run/etc /run/table-allocator
		mount -t tmpfs etc /run/etc
		cp -a /etc/passwd /etc/group /etc/nsswitch.conf /run/etc
		mount --move /run/etc /etc
		echo ready
		exec sleep infinity`))
	p.waitLog("ready")
	return &retreat{host: h, pid: fmt.Sprint(p.cmd.Process.Pid)}
}

// in is a command line in the retreat.
func (r *retreat) in(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target=" + r.pid, "--mount", "--cgroup", "--wd=/"}, args...)...)
}

// sh runs a script in the retreat.
func (r *retreat) sh(script string) string {
	r.t.Helper()
	cmd := r.in("sh", "-ec", script)
	out := r.run(cmd.Path, cmd.Args[1:]...)
	if out.code != 0 {
		r.t.Fatalf("%s: %+v", script, out)
	}
	return out.stdout
}

// call runs the client in the retreat.
func (r *retreat) call(args ...string) result {
	r.t.Helper()
	cmd := r.in(append([]string{bin(r.t, clientBin), "-l", filepath.Join(r.dir, "client.log"), "--debug"}, args...)...)
	return r.run(cmd.Path, cmd.Args[1:]...)
}

// hang mounts a file system at dir that answers nothing: nobody reads its requests.
func (r *retreat) hang(dir string) {
	r.t.Helper()
	r.sh("[ -e /etc/fuse ] || mknod /etc/fuse c 10 229")
	f, err := os.OpenFile("/proc/"+r.pid+"/root/etc/fuse", os.O_RDWR, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	r.silent = append(r.silent, f)
	r.t.Cleanup(r.letGo)
	cmd := r.in("mount", "-i", "-t", "fuse", "-o", "fd=3,rootmode=40000,user_id=0,group_id=0", "silent", dir)
	cmd.ExtraFiles = []*os.File{f}
	p := r.start(cmd)
	if code := p.wait(); code != 0 {
		r.t.Fatalf("%s: %s", cmd, p.log.String())
	}
}

// letGo ends the file systems of hang. Until then the kernel may keep a process from its end: of two that look for one name,
// the second one waits uninterruptibly for the first.
func (r *retreat) letGo() {
	for _, f := range r.silent {
		_ = f.Close() // it may have been closed before
	}
}

// TestHeldUp: what does not answer holds nothing up: leases are renewed, addresses come and go, commands and the watch end.
func TestHeldUp(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before func(r *retreat) (after func()) // before anything starts
		hold   func(r *retreat)
	}{
		{name: "run", hold: func(r *retreat) { r.hang("/run/table-allocator") }},
		{name: "all of run", hold: func(r *retreat) { r.hang("/run") }},
		{name: "NetworkManager", hold: func(r *retreat) { r.sh("mkdir /run/NetworkManager"); r.hang("/run/NetworkManager") }},
		{name: "file of dnsmasq", hold: func(r *retreat) { r.sh("mkdir /run/dnsmasq"); r.hang("/run/dnsmasq") }},
		{name: "FIFOs", hold: func(r *retreat) {
			r.sh("mkdir -p /run/dnsmasq /run/NetworkManager/devices; rm -f /run/table-allocator/dnsmasq.servers; mkfifo /run/dnsmasq.pid /run/dnsmasq/dnsmasq.pid /run/table-allocator/dnsmasq.servers; for n in $(seq 40); do mkfifo /run/NetworkManager/devices/$n; done")
		}},
		{name: "stopped dnsmasq", before: func(r *retreat) func() {
			program := filepath.Join(r.dir, "dnsmasq")
			r.sh("cp $(command -v sleep) " + program)
			p := r.start(exec.Command(program, "infinity"))
			r.freeze(p.cmd.Process.Pid)
			r.sh(fmt.Sprintf("echo %d >/run/dnsmasq.pid", p.cmd.Process.Pid))
			return func() {
				eventually(r.t, "SIGHUP waits for dnsmasq", func() error {
					if pending := status(r.t, p.cmd.Process.Pid, "ShdPnd"); len(pending) != 1 || !strings.HasSuffix(pending[0], "1") {
						return fmt.Errorf("pending signals are %q", pending)
					}
					return nil
				})
			}
		}},
		{name: "pid of another", before: func(r *retreat) func() {
			p := r.start(exec.Command("sleep", "infinity"))
			r.sh(fmt.Sprintf("echo %d >/run/dnsmasq.pid", p.cmd.Process.Pid))
			return func() {
				select {
				case <-p.done:
					r.t.Error("the process whose pid the file of dnsmasq names was ended")
				default:
				}
			}
		}},
		{name: "proc", hold: func(r *retreat) { r.hang("/proc"); r.noProc = true }},
		{name: "resolved", before: func(r *retreat) func() { // as resolvectl does while its bus does not answer
			r.flags = []string{"--resolver", "resolved"}
			r.sh(`mkdir -p /run/systemd/resolve; mount -t tmpfs bin /usr/local/bin
				printf '#!/bin/sh\necho asked >>/run/asked\nexec sleep infinity\n' >/usr/local/bin/resolvectl
				chmod 755 /usr/local/bin/resolvectl`)
			r.start(r.in("socat", "UNIX-LISTEN:/run/systemd/resolve/io.systemd.Resolve,fork", "EXEC:sleep infinity"))
			eventually(r.t, "the socket of systemd-resolved is open", func() error {
				if !strings.Contains(r.sh("cat /proc/net/unix"), "io.systemd.Resolve") {
					return errors.New("it is not")
				}
				return nil
			})
			return func() {
				if text := r.sh("cat /run/asked"); strings.Count(text, "asked") < 2 {
					r.t.Errorf("resolvectl was asked: %q", text)
				}
			}
		}},
		{name: "names", hold: func(r *retreat) { r.sh("rm /etc/passwd /etc/group; mkfifo /etc/passwd /etc/group") }},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			r := newHost(t).retreat()
			after := func() {}
			if tt.before != nil {
				after = tt.before(r)
			}
			r.holdUp(tt.hold)
			after()
		})
	}
}

// TestCommandsHeldUp: while /run does not answer, each command ends, with what it found out or with what is silent.
func TestCommandsHeldUp(t *testing.T) {
	r := newHost(t).retreat()
	r.link("wan0", "192.0.2.2/24", "192.0.2.4/24")
	r.ns.IP(t, "route add default via 192.0.2.1")
	server := r.start(r.in(bin(t, serverBin), "--debug", "-c", r.config()))
	server.waitLog("msg=serving")
	watch := r.start(r.in(bin(t, clientBin), "watch", "--debug", "--clean", "--ifname", "wan0"))
	r.served("192.0.2.2")
	r.served("192.0.2.4")
	r.hang("/run/table-allocator")
	const silent = "no answer within"
	for _, tt := range []struct {
		args string
		code int
		want string // on either output
	}{
		{"status", 0, "network namespaces are not known"},
		{"status --json", 0, `"address":"192.0.2.4"`},
		{"status --prometheus", 0, "table_allocator_server_up 1"},
		{"uplinks", 0, "not probing"},
		{"explain 198.51.100.1", 0, "wan0"},
		{"history", 1, silent},
		{"bound", 0, "network namespaces are not known"},
		{"doctor --only rule-missing", 0, "found nothing"},
		{"netns list", 1, silent},
		{"netns ps", 1, silent},
		{"netns del none", 1, silent},
		{"netns exec none true", 125, silent},
		{"release 192.0.2.2", 1, silent},
		{"-r -4 -i wan0 -a 192.0.2.4", 1, silent},
	} {
		cmd := r.in(append([]string{bin(t, clientBin)}, strings.Fields(tt.args)...)...)
		if out := r.run(cmd.Path, cmd.Args[1:]...); out.code != tt.code || !strings.Contains(out.stdout+out.stderr, tt.want) {
			t.Errorf("%s: %+v\nwant exit code %d and %q", tt.args, out, tt.code, tt.want)
		}
	}
	if code := watch.stop(); code != 0 {
		t.Errorf("watch: exit code %d", code)
	}
	r.letGo()
	r.waitClean()
}

// holdUp has a server, a watch and clients work while something is held up.
func (r *retreat) holdUp(hold func(r *retreat)) {
	t := r.t
	t.Helper()
	r.link("wan0", "192.0.2.2/24", "192.0.2.4/24")
	r.link("wan1", "198.51.100.2/24", "198.51.100.4/24")
	r.ns.IP(t, "route add default via 192.0.2.1")
	config := r.config(`"table_timeout":4`, fmt.Sprintf(`"allowed_groups":[%d]`, gidStaff))
	server := r.start(r.in(bin(t, serverBin), "--debug", "-c", config))
	server.waitLog("msg=serving")
	watch := r.start(r.in(bin(t, clientBin), "watch", "--debug", "--clean", "--mptcp", "--ifname", "wan0"))
	watch.waitLog("msg=watching")
	r.served("192.0.2.2")
	r.served("192.0.2.4")
	lease := func(addr string) {
		t.Helper()
		out := r.call(append(r.flags, "-4", "-i", "wan1", "-a", addr, "--mptcp", "--nameserver", "198.51.100.53")...)
		if out.code != 0 || out.stdout == "0\n" {
			t.Errorf("client for %s: %+v", addr, out)
		}
		r.served(addr)
	}
	lease("198.51.100.2")
	lease("198.51.100.4")
	if hold != nil {
		hold(r)
	}
	renewals := func(addr string) int {
		return strings.Count(server.log.String(), `msg="lease renewed" ifname=wan`+addr)
	}
	had := make(map[string]int)
	held := []string{"0 addr=192.0.2.2", "0 addr=192.0.2.4", "1 addr=198.51.100.2", "1 addr=198.51.100.4"}
	for _, addr := range held {
		had[addr] = renewals(addr)
	}
	// Who is no root is asked for in the names of the host.
	p := r.cPeer("peer")
	user := p.askAs(uidNobodyKnows, uidNobodyKnows, acquire(1))
	if reply, err := wire.ParseReply([]byte(user)); err != nil || reply.Table != 0 {
		t.Errorf("a stranger: %s", user)
	}
	r.ns.Batch(t, "address add 192.0.2.3/24 dev wan0", "address add 198.51.100.3/24 dev wan1", "address del 192.0.2.4/24 dev wan0", "address del 198.51.100.4/24 dev wan1")
	r.served("192.0.2.3")
	ends := []string{"198.51.100.2"}
	if !r.noProc {
		lease("198.51.100.3")
		ends = append(ends, "198.51.100.3")
	}
	for _, addr := range []string{"192.0.2.4", "198.51.100.4"} {
		eventually(t, addr+" left nothing", func() error { return r.left(addr) })
	}
	eventually(t, "the leases are renewed twice", func() error {
		for _, addr := range held {
			if n := renewals(addr); n < had[addr]+2 && !strings.HasSuffix(addr, ".4") {
				return fmt.Errorf("%s: %d renewals, %d before", addr, n, had[addr])
			}
		}
		return nil
	})
	var ending []*process
	for _, addr := range ends {
		if r.noProc {
			r.ns.IP(t, "address del "+addr+"/24 dev wan1")
		} else {
			ending = append(ending, r.start(r.in(bin(t, clientBin), "-r", "-4", "-i", "wan1", "-a", addr)))
		}
		eventually(t, addr+" left nothing", func() error { return r.left(addr) })
	}
	if err := watch.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"192.0.2.2", "192.0.2.3"} {
		eventually(t, addr+" left nothing", func() error { return r.left(addr) })
	}
	r.letGo()
	for _, p := range ending { // which says whether the resolver lines are gone
		if code := p.wait(); code > 1 {
			t.Errorf("%s: exit code %d", p.cmd, code)
		}
	}
	if code := watch.wait(); code != 0 {
		t.Errorf("watch: exit code %d", code)
	}
	if code := server.stop(); code != 0 {
		t.Errorf("server: exit code %d", code)
	}
	r.waitClean()
}

// TestNamesComeLate: what a name service does not answer now, the server does not answer for good either: a known user
// goes on, an unknown one is told to ask later, and both are served when the name service is back.
func TestNamesComeLate(t *testing.T) {
	r := newHost(t).retreat()
	r.sh("echo bert:x:21002:21002::/:/bin/sh >>/etc/passwd; echo leasers:x:22001:bert >>/etc/group; echo carl:x:21003:21003::/:/bin/sh >>/etc/passwd; sed -i 's/:bert$/:bert,carl/' /etc/group")
	server := r.start(r.in(bin(t, serverBin), "--debug", "-c", r.config(fmt.Sprintf(`"allowed_groups":[%d]`, gidLeasers))))
	server.waitLog("msg=serving")
	p := r.cPeer("peer")
	wantTable(t, p.askAs(uidBert, uidBert, acquire(1)), 10000)
	r.sh("mkdir /run/kept; cp -a /etc/passwd /etc/group /run/kept; rm /etc/passwd /etc/group; mkfifo /etc/passwd /etc/group")
	reply := p.askAs(uidCarl, uidCarl, acquire(2))
	wantRefusal(t, reply, wire.Storage, "the groups of the sender cannot be looked up")
	eventually(t, "bert is served by what was known, after a look-up failed", func() error {
		wantTable(t, p.askAs(uidBert, uidBert, acquire(1)), 10000)
		if !strings.Contains(server.log.String(), "cannot look up the groups of a user; what was known of them counts until that succeeds\" uid=21002") {
			return errors.New("no look-up of bert failed yet")
		}
		return nil
	})
	wantTable(t, p.ask(acquire(3)), 10001)
	// The reader of the FIFOs gets an empty file, and then there are files again.
	r.sh("mv /etc/passwd /etc/p; mv /etc/group /etc/g; cp -a /run/kept/* /etc; for f in /etc/p /etc/g; do timeout 1 sh -c \": >$f\" || :; done")
	eventually(t, "carl is served", func() error {
		reply, err := wire.ParseReply([]byte(p.askAs(uidCarl, uidCarl, acquire(2))))
		if err == nil && reply.Table == 0 {
			err = errors.New(reply.Error)
		}
		return err
	})
}

// TestWithoutProc: where /proc is not mounted, clients and a watch serve, and give everything back.
func TestWithoutProc(t *testing.T) {
	r := newHost(t).retreat()
	r.link("wan0", "192.0.2.2/24", "192.0.2.3/24")
	r.ns.IP(t, "route add default via 192.0.2.1 dev wan0")
	before := r.ns.IP(t, "route")
	r.serve()
	r.sh("mount -t tmpfs none /proc")
	out := r.call("-4", "-i", "wan0", "-a", "192.0.2.2", "--routes", "move", "--gateway", "192.0.2.1")
	if out.code != 0 || out.stdout != r.served("192.0.2.2")+"\n" {
		t.Errorf("client: %+v", out)
	}
	if main := r.ns.IP(t, "route"); strings.Contains(main, "default") {
		t.Errorf("move left a default in main:\n%s", main)
	}
	watch := r.start(r.in(bin(t, clientBin), "watch", "--debug", "--clean", "--routes", "none"))
	r.served("192.0.2.3")
	if code := watch.stop(); code != 0 {
		t.Errorf("watch: exit code %d", code)
	}
	if out := r.call("-r", "-4", "-i", "wan0", "-a", "192.0.2.2"); out.code != 0 {
		t.Errorf("release: %+v", out)
	}
	r.waitClean()
	if after := r.ns.IP(t, "route"); after != before {
		t.Errorf("main has %s\nwant %s", after, before)
	}
}
