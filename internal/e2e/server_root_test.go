package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// tell is a program that sends one datagram from a bound socket, and prints the answer, unless it is to end at once.
const tell = `
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(b"\0" + sys.argv[1].encode())
s.settimeout(20)
s.sendto(sys.argv[3].encode(), (b"\0" + sys.argv[2].encode()).ljust(108, b"\0"))
if len(sys.argv) < 5: print(s.recv(254).decode())
`

// Words before a command that make it root of a container with the network of the host.
const (
	container      = "unshare --mount --pid --uts --ipc --cgroup --fork --kill-child --mount-proc "
	powerless      = "setpriv --bounding-set -all --inh-caps -all --ambient-caps -all --no-new-privs "
	likeDockersOwn = "setpriv --bounding-set -all,+setuid,+setgid,+setfcap,+sys_chroot,+chown,+dac_override --inh-caps -all --ambient-caps -all "
)

// tells runs tell with words in front of it.
func (h *host) tells(before, name, to, datagram string, more ...string) string {
	h.t.Helper()
	argv := append(strings.Fields(before), "python3", "-c", tell, name, to, datagram)
	r := h.run(argv[0], append(argv[1:], more...)...)
	if r.code != 0 {
		h.t.Fatalf("%q: %s", argv, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

// fullMap runs its arguments in a user namespace of its own that has the uid_map of the host.
const fullMap = `
import ctypes, os, sys
ready, told = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    ctypes.CDLL(None).unshare(0x10000000) # CLONE_NEWUSER
    os.write(ready[1], b"x"); os.read(told[0], 1)
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(ready[0], 1)
for kind in "uid", "gid":
    with open(f"/proc/{pid}/{kind}_map", "w") as f: f.write("0 0 4294967295")
os.write(told[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
`

// impostors are words before a command that give it uid 0 without the power of root over the network of the host.
func (h *host) impostors() map[string]string {
	h.t.Helper()
	file := filepath.Join(h.dir, "fullmap.py")
	if err := os.WriteFile(file, []byte(fullMap), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return map[string]string{
		"without any capability":                         powerless,
		"of a container":                                 container + powerless,
		"of a user namespace":                            container + likeDockersOwn + "unshare --user --map-root-user ",
		"of a user namespace with the map of the host's": container + likeDockersOwn + "python3 " + file + " ",
	}
}

// TestServerRootOfContainers: uid 0 that has no CAP_NET_ADMIN on the host is an ordinary user to the server, whether that may look
// into user namespaces or not.
func TestServerRootOfContainers(t *testing.T) {
	for name, before := range map[string][]string{"a server without capabilities": {"setpriv", "--bounding-set=-all", "--inh-caps=-all"}, "a server with all": {"env"}} {
		t.Run(name, func(t *testing.T) { rootOfContainers(t, before) })
	}
}

func rootOfContainers(t *testing.T, before []string) {
	h := newHost(t)
	server := h.start(exec.Command(before[0], append(before[1:], bin(t, serverBin), "-c", h.config())...))
	server.waitLog("msg=serving")
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	for name, before := range h.impostors() {
		t.Run(name, func(t *testing.T) {
			for _, datagram := range []string{acquire(1), acquire(2), release(1)} {
				wantRefusal(t, h.tells(before, "x", "tas_socket", datagram), wire.Denied, "uid 0 without CAP_NET_ADMIN, as in a container, is an ordinary user: see allowed_users")
			}
			wantRefusal(t, h.tells(before, "x", "tas_socket", `{"ifname":"eth0","cmd":16,"version":1}`), wire.Denied, "only root")
			h.wantLeases("10000|inet|eth0|10.9.0.1||0")
		})
	}
	wantTable(t, h.tells(container, "x", "tas_socket", acquire(1)), 10000) // with all capabilities
}

// TestServerRootOfContainersMay: who is in allowed_users has leases of his own.
func TestServerRootOfContainersMay(t *testing.T) {
	h := newHost(t)
	h.serve(`"allowed_users":[0]`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	ask := func(datagram string) string { return h.tells(container+powerless, "x", "tas_socket", datagram) }
	wantTable(t, ask(acquire(2)), 10001)
	wantTable(t, ask(acquire(2)), 10001)
	wantRefusal(t, ask(acquire(1)), wire.Denied, "another user")
	wantRefusal(t, ask(release(1)), wire.Denied, "another user")
	h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.2||65534")
	if got := ask(release(2)); got != released {
		t.Errorf("release of the own lease: %s", got)
	}
}

// TestServerSendersThatEnded: a client that does not wait for the answer, as the original's, may give its own lease
// back, and nothing else.
func TestServerSendersThatEnded(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	wantTable(t, h.tells("", "holder2", "tas_socket", acquire(2)), 10001)
	server.cmd.Process.Signal(syscall.SIGSTOP)
	h.tells("", "stranger", "tas_socket", release(1), "-")
	h.tells("", "holder2", "tas_socket", release(2), "-")
	h.tells("", "stranger", "tas_socket", acquire(3), "-")
	server.cmd.Process.Signal(syscall.SIGCONT)
	h.waitLeases("10000|inet|eth0|10.9.0.1||0")
	wantTable(t, p.ask(acquire(1)), 10000) // behind all of them
	h.wantLeases("10000|inet|eth0|10.9.0.1||0")
	server.waitLog("err=\"the sender has ended, so it can release only what it leased itself\"")
}

// lastWords leases a table, stops the server, releases two leases, its own one from a socket without a name, and ends.
const lastWords = `
import os, signal, socket, sys, time
name = (b"\0" + sys.argv[1].encode()).ljust(108, b"\0")
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(b"\0holder")
s.settimeout(20)
s.sendto(sys.argv[3].encode(), name)
print(s.recv(254).decode())
s.close()
os.kill(int(sys.argv[2]), signal.SIGSTOP)
tasks = f"/proc/{sys.argv[2]}/task"
while any(") T " not in open(f"{tasks}/{t}/stat").read() for t in os.listdir(tasks)): time.sleep(0.01)
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for datagram in sys.argv[4:]: s.sendto(datagram.encode(), name)
`

// TestServerSenderThatEndedByPID: a C client releases what it leased as it ends, from whatever socket. Its uid and pid are those
// that leased it.
func TestServerSenderThatEndedByPID(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	r := h.run("python3", "-c", lastWords, "tas_socket", fmt.Sprint(server.cmd.Process.Pid), acquire(2), release(1), release(2))
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	wantTable(t, strings.TrimSpace(r.stdout), 10001)
	time.Sleep(200 * time.Millisecond) // for so long the server may remember that the process was root
	if err := server.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	h.waitLeases("10000|inet|eth0|10.9.0.1||0")
	wantTable(t, p.ask(acquire(1)), 10000)
	h.wantLeases("10000|inet|eth0|10.9.0.1||0")
}

// TestServerHiddenProcesses: where /proc hides processes uid 0 counts, with one warning.
func TestServerHiddenProcesses(t *testing.T) {
	h := newHost(t)
	script := fmt.Sprintf("mount -t proc -o hidepid=2 proc /proc && exec setpriv --bounding-set=-all --inh-caps=-all --reuid 21500 --regid 21500 --clear-groups %s -c %s",
		publicBin(t, serverBin), h.config())
	if err := os.Chmod(filepath.Dir(h.dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(h.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	server := h.start(exec.Command("unshare", "--mount", "sh", "-c", script))
	server.waitLog("msg=serving")
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	wantTable(t, h.tells(container+powerless, "x", "tas_socket", acquire(2)), 10001)
	server.waitLog("/proc does not show the processes that ask")
	if n := strings.Count(server.log.String(), "/proc does not show"); n != 1 {
		t.Errorf("%d warnings", n)
	}
}

// TestServerRootTakesOver: root's request ends the lease of a user.
func TestServerRootTakesOver(t *testing.T) {
	h := newHost(t)
	h.serve(`"allowed_users":[4711]`)
	p := h.cPeer("peer")
	for n := range 2 {
		wantTable(t, p.askAs(stranger, stranger, acquire(n+1)), uint32(10000+n))
	}
	h.ns.IP(t, "rule add from 10.9.0.1 lookup 10000")
	wantTable(t, p.ask(acquire(1)), 10002) // a rule leads to the user's table
	wantTable(t, p.ask(acquire(2)), 10001)
	for n := range 2 {
		wantRefusal(t, p.askAs(stranger, stranger, acquire(n+1)), wire.Denied, "another user")
		wantRefusal(t, p.askAs(stranger, stranger, release(n+1)), wire.Denied, "another user")
	}
	h.waitLeases("10001|inet|eth0|10.9.0.2||0", "10002|inet|eth0|10.9.0.1||0")
}

// TestServerShareOfRoot: users cannot lease all tables, and renew what they have.
func TestServerShareOfRoot(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"allowed_users":[4711,4712]`, `"num_tables":5`)
	p := h.cPeer("peer")
	ask := func(uid int, datagram string) string { return p.askAs(uid, uid, datagram) }
	for n := range 3 {
		wantTable(t, ask(stranger, acquire(n)), uint32(10000+n))
	}
	wantRefusal(t, ask(stranger, acquire(3)), wire.Exhausted, "no table is free for users: 2 of 5 are kept for root (root_tables)")
	wantTable(t, p.ask(acquire(3)), 10003)
	wantTable(t, p.ask(acquire(4)), 10004)
	server.stop()
	h.serve(`"allowed_users":[4711,4712]`, `"num_tables":5`, `"root_tables":1`, `"user_tables":2`)
	for n := range 3 {
		wantTable(t, ask(stranger, acquire(n)), uint32(10000+n)) // from before
	}
	p.ask(release(4))
	wantRefusal(t, ask(stranger, acquire(5)), wire.Exhausted, "no table is free for uid 4711, which holds 3 (user_tables)")
	wantTable(t, ask(stranger+1, acquire(5)), 10004)
}

// TestServerFewDescriptors: a server that cannot open a file believes nobody for that, goes on serving those whom it knows, and ends.
func TestServerFewDescriptors(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	pid := server.cmd.Process.Pid
	limit := uint64(0) // the lowest descriptor that is free
	for ; ; limit++ {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, limit)); err != nil {
			break
		}
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
		t.Fatal(err)
	}
	for _, datagram := range []string{acquire(1), acquire(2), release(1)} {
		reply := h.tells(powerless, "x", "tas_socket", datagram)
		if !strings.Contains(reply, "whether the sender is root of this host is not known: ask later") {
			t.Errorf("uid 0 without rights: got %s", reply)
		}
	}
	wantTable(t, p.ask(acquire(1)), 10000)
	h.wantLeases("10000|inet|eth0|10.9.0.1||0")
	if code := server.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
