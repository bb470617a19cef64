package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestHolderRootOfContainers: uid 0 without CAP_NET_ADMIN on the host changes nothing of a holder, and no datagram says
// what file is written.
func TestHolderRootOfContainers(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	servers, victim := filepath.Join(h.dir, "servers"), filepath.Join(h.dir, "shadow")
	if err := os.WriteFile(victim, []byte("root:secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1", "--nameserver", "10.77.0.53", "--dnsmasq-servers", servers)
	h.waitFile(servers, "server=10.77.0.53@10.77.0.2\n")
	holder := "wan0-10.77.0.2-2"
	change := strings.Replace(request(2, "wan0", "10.77.0.2", 18), "}", fmt.Sprintf(
		`,"settings":{"routes":"copy","on_loss":"fallback","gateways":["10.77.0.66"],"nameservers":["10.77.0.66"],"servers_file":%q,"pid_file":%q}}`, victim, victim), 1)
	for name, before := range h.impostors() {
		t.Run(name, func(t *testing.T) {
			for _, datagram := range []string{change, request(2, "wan0", "10.77.0.2", 17), request(2, "wan0", "10.77.0.2", 19)} {
				wantRefusal(t, h.tells(before, "x", holder, datagram), wire.Denied, "only root with CAP_NET_ADMIN and the holder's own user may ask it")
			}
		})
	}
	h.waitRoutes("10000", ourNetwork, ourDefault)
	h.waitFile(servers, "server=10.77.0.53@10.77.0.2\n")
	// Root may, but for the files.
	if got := h.tells(container, "x", holder, change); !strings.Contains(got, `"table":10000,`) {
		t.Errorf("root of the host: %s", got)
	}
	h.waitRoutes("10000", ourNetwork, "default via 10.77.0.66 dev wan0 proto 116 src 10.77.0.2")
	h.waitFile(servers, "server=10.77.0.66@10.77.0.2\n")
	info, err := os.Stat(victim)
	if err != nil || info.Mode().Perm() != 0o600 || readFile(t, victim) != "root:secret\n" {
		t.Errorf("the file of the datagram was written: %v, %v", info, err)
	}
	h.waitClientLog(1, "a call names another file for resolver lines")
}

// withPID runs its other arguments in a process that has the pid of the first argument.
const withPID = `
import ctypes, errno, os, struct, sys, time
libc, want = ctypes.CDLL(None, use_errno=True), ctypes.c_int(int(sys.argv[1]))
args = ctypes.create_string_buffer(struct.pack("11Q", 0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(want), 1, 0)) # SIGCHLD, set_tid
while True:
    pid = libc.syscall(435, args, 88) # clone3
    if pid == 0:
        libc.prctl(1, 9) # it is killed when this process ends
        os.execvp(sys.argv[2], sys.argv[2:])
    if pid > 0: break
    if ctypes.get_errno() != errno.EEXIST: sys.exit("clone3: " + os.strerror(ctypes.get_errno()))
    time.sleep(.01) # another process has it for a moment
print("runs as", pid, flush=True)
os.waitpid(pid, 0)
`

// TestHolderPIDUsedAgain: a process without rights asks a holder that is busy, and ends; then a process of root's gets its pid.
func TestHolderPIDUsedAgain(t *testing.T) {
	if wire.ProcessOf(int32(os.Getpid())) == 0 {
		t.Log("this kernel has no pidfs, by which processes are told apart")
		return
	}
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	table := h.lease("10.77.0.2", "wan0")
	holder := h.onlyClient()
	h.freeze(holder)
	script := filepath.Join(h.dir, "tell.py")
	if err := os.WriteFile(script, []byte(tell+"\nimport os; print(os.getpid())"), 0o644); err != nil {
		t.Fatal(err)
	}
	sender := h.run("sh", "-c", "exec "+powerless+`python3 "$0" x wan0-10.77.0.2-2 "$1" end`, script, request(2, "wan0", "10.77.0.2", int(wire.End)))
	if sender.code != 0 {
		t.Fatal(sender.stderr)
	}
	pid := strings.TrimSpace(sender.stdout)
	h.start(exec.Command("python3", "-c", withPID, pid, "sleep", "1000")).waitLog("runs as " + pid)
	if err := syscall.Kill(holder, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	h.waitClientLog(1, "request refused, since its sender is neither root with CAP_NET_ADMIN nor this user")
	if got := h.lease("10.77.0.2", "wan0"); got != table || h.onlyClient() != holder {
		t.Errorf("table %d, before %d; holder %d, before %d", got, table, h.onlyClient(), holder)
	}
}

// TestServerOfContainersIsNotBelieved: root of a container that has taken the name of the server leases nothing.
func TestServerOfContainersIsNotBelieved(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	script := filepath.Join(h.dir, "server.py")
	if err := os.WriteFile(script, []byte(fakeServerProgram), 0o644); err != nil {
		t.Fatal(err)
	}
	fake := h.start(h.sh("exec " + container + powerless + "python3 " + script))
	t.Cleanup(func() { h.run("python3", "-c", tell, "x", "tas_socket", "end", "-") }) // no signal gets into the container
	fake.waitLog("serving")
	r := h.client("-4", "-a", "10.77.0.2", "-i", "wan0")
	if r.stdout != "0\n" || !strings.Contains(r.stderr, "who is not trusted to lease tables") {
		t.Errorf("got %+v", r)
	}
	h.waitRules()
	// Without a pid namespace of its own it may be the server of the host, which has no capability.
	h.start(h.sh("exec " + powerless + "python3 " + script + " other_socket")).waitLog("serving")
	if r := h.client("-4", "-a", "10.77.0.2", "-i", "wan0", "-d", "other_socket"); r.stdout != "10007\n" {
		t.Errorf("got %+v", r)
	}
}

// fakeServerProgram leases 10007 to everybody.
const fakeServerProgram = `
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(b"\0" + (sys.argv[1:] or ["tas_socket"])[0].encode().ljust(107, b"\0"))
print("serving", flush=True)
while True:
    data, to = s.recvfrom(512)
    if data == b"end": break
    s.sendto(b'{"version":1,"cmd":2,"table":10007,"lease_expires":4000000}', to)
`

// TestWatchStandsIn: a watch serves an address whose holder's name a stranger has, and says who that is. It leaves the
// address to a client that stands in already.
func TestWatchStandsIn(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24", "10.77.0.4/24")
	h.serve()
	h.bound(stranger, padded(t, "wan0-10.77.0.2-2"))
	h.bound(stranger, padded(t, "wan0-10.77.0.3-2"))
	client := h.lease("10.77.0.3", "wan0", "--routes", "copy", "--gateway", "10.77.0.1")
	script := filepath.Join(h.dir, "squat.py")
	if err := os.WriteFile(script, []byte(fakeServerProgram), 0o644); err != nil {
		t.Fatal(err)
	}
	container := h.start(h.sh("exec " + container + powerless + "python3 " + script + " wan0-10.77.0.4-2"))
	t.Cleanup(func() { h.run("python3", "-c", tell, "x", "wan0-10.77.0.4-2", "end", "-") })
	container.waitLog("serving")

	p := h.watch()
	for _, addr := range []string{"10.77.0.2", "10.77.0.4"} {
		p.waitLog(`msg="a process that is not trusted has the holder's name of this address; serving the address from another name" ifname=wan0 addr=` + addr)
		h.served(addr)
	}
	p.waitLog(owner(stranger))
	p.waitLog(`msg="another client serves this address" ifname=wan0 addr=10.77.0.3`)
	if got := h.tableNumber("10.77.0.3"); got != client {
		t.Errorf("table of the client: %d, want %d", got, client)
	}
	// Calls find the watch behind its other name.
	if got := fmt.Sprint(h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1")); got != h.tableOf("10.77.0.2") {
		t.Errorf("a call got table %s, want %s", got, h.tableOf("10.77.0.2"))
	}
	eventually(t, "status knows all holders", func() error { // it does not wait long for their answers
		for _, row := range h.statusRows() {
			if row.PID == 0 || row.Table == 0 {
				return fmt.Errorf("%+v", row)
			}
		}
		return nil
	})
	if pids := h.pids(clientBin); len(pids) != 2 {
		t.Errorf("processes: %d", pids)
	}
}

// TestWatchOfAnotherUser: a watch of a user with CAP_NET_ADMIN leaves addresses to holders of root and of its own user, and stands in
// for those of others.
func TestWatchOfAnotherUser(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24", "10.77.0.4/24", "10.77.0.5/24")
	h.serve(fmt.Sprintf(`"allowed_users":[%d]`, stranger))
	const as = "--reuid 4711 --regid 4711 --clear-groups --inh-caps -all,+net_admin --ambient-caps -all,+net_admin --bounding-set -all,+net_admin"
	own := strings.TrimSpace(h.clientWith(as, "-4", "-a", "10.77.0.2", "-i", "wan0").stdout)
	roots := fmt.Sprint(h.lease("10.77.0.3", "wan0"))
	h.bound(stranger+1, padded(t, "wan0-10.77.0.4-2"))
	p := h.start(exec.Command("setpriv", append(strings.Fields(as), publicBin(t, clientBin), "watch", "--exclude", "lo")...))
	for addr, table := range map[string]string{"10.77.0.2": own, "10.77.0.3": roots} {
		p.waitLog(`msg="another client serves this address" ifname=wan0 addr=` + addr)
		if got := h.served(addr); got != table {
			t.Errorf("table of %s: %s, want %s", addr, got, table)
		}
	}
	p.waitLog(`msg="a process that is not trusted has the holder's name of this address; serving the address from another name" ifname=wan0 addr=10.77.0.4`)
	p.waitLog(fmt.Sprintf("owner=\"uid %d\"", stranger+1))
	h.served("10.77.0.4")
	h.served("10.77.0.5")
}
