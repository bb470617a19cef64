package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerStrangers: who is not permitted gets nothing and takes nothing away.
func TestServerStrangers(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	for _, uid := range []int{uidNobodyKnows, 1} {
		wantRefusal(t, p.askAs(uid, 0, acquire(2)), wire.Denied, fmt.Sprintf("uid %d is not permitted", uid))
		wantRefusal(t, p.askAs(uid, 0, acquire(1)), wire.Denied, "not permitted")
		wantRefusal(t, p.askAs(uid, 0, release(1)), wire.Denied, "not permitted")
	}
	wantRefusal(t, p.askAs(65534, 65534, acquire(2)), wire.Denied, "another user namespace")
	h.wantLeases("10000|inet|eth0|10.9.0.1||0")
	server.waitLog(`msg="lease refused" ifname=eth0 addr=10.9.0.2 family=inet uid=21999 pid=`)
}

// TestServerPermits: users and groups of the configuration, and what they own.
func TestServerPermits(t *testing.T) {
	h := newHost(t)
	if err := addUsers(); err != nil {
		t.Fatal(err)
	}
	h.serve(`"allowed_users":["anna", 21003]`, fmt.Sprintf(`"allowed_groups":["leasers", %d]`, gidStaff))
	p := h.cPeer("peer")
	for i, tt := range []struct {
		name     string
		uid, gid int
		want     bool
	}{
		{"user by name", uidAnna, uidAnna, true},
		{"user by number", uidCarl, uidCarl, true},
		{"user whom /etc/group lists", uidBert, uidBert, true},
		{"user without a name, with the gid of the group", uidNobodyKnows, gidLeasers, true},
		{"group by number", uidNobodyKnows, gidStaff, true},
		{"user without a name", uidNobodyKnows, uidNobodyKnows, false},
		{"user with root's group", uidNobodyKnows, 0, false},
		{"overflow uid with the gid of the group", 65534, gidLeasers, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reply := p.askAs(tt.uid, tt.gid, acquire(i+1))
			if !tt.want {
				wantRefusal(t, reply, wire.Denied, "")
				return
			}
			wantTable(t, reply, uint32(10000+i))
		})
	}
	leases := []string{"10000|inet|eth0|10.9.0.1||21001", "10001|inet|eth0|10.9.0.2||21003", "10002|inet|eth0|10.9.0.3||21002",
		"10003|inet|eth0|10.9.0.4||21999", "10004|inet|eth0|10.9.0.5||21999"}
	h.wantLeases(leases...)

	wantRefusal(t, p.askAs(uidCarl, uidCarl, acquire(1)), wire.Denied, "belongs to another user")
	wantRefusal(t, p.askAs(uidCarl, uidCarl, release(1)), wire.Denied, "belongs to another user")
	h.wantLeases(leases...)
	wantTable(t, p.askAs(uidAnna, uidAnna, acquire(1)), 10000)
	if got := p.askAs(uidAnna, uidAnna, release(1)); got != released {
		t.Errorf("release by the owner: got %s", got)
	}
	if got := p.ask(release(2)); got != released {
		t.Errorf("release by root: got %s", got)
	}
	wantTable(t, p.ask(acquire(9)), 10005)
	wantRefusal(t, p.askAs(uidAnna, uidAnna, release(9)), wire.Denied, "belongs to another user")
	h.wantLeases(append(leases[2:], "10005|inet|eth0|10.9.0.9||0")...)
}

// TestServerOfAnotherUser: a server that is not root's serves its own user and root.
func TestServerOfAnotherUser(t *testing.T) {
	h := newHost(t)
	const self = 21500
	home := filepath.Join(h.dir, "home")
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chown(home, self, self), os.Chmod(filepath.Dir(h.dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, env, db string }{
		{"home", "XDG_STATE_HOME=", "home/.local/state/table-allocator/leases.db"},
		{"XDG_STATE_HOME", "XDG_STATE_HOME=" + home + "/state", "home/state/table-allocator/leases.db"},
		{"STATE_DIRECTORY", "STATE_DIRECTORY=" + home, "home/leases.db"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := h.serverAs(self)
			cmd.Env = append(os.Environ(), "HOME="+home, tt.env)
			server := h.start(cmd)
			server.waitLog("msg=serving")
			h.db = filepath.Join(h.dir, tt.db)
			p := h.cPeer("peer" + tt.name)
			wantTable(t, p.askAs(self, self, acquire(1)), 10000)
			wantTable(t, p.ask(acquire(2)), 10001)
			wantRefusal(t, p.askAs(uidNobodyKnows, self, acquire(3)), wire.Denied, "not permitted")
			wantRefusal(t, p.askAs(self, self, release(2)), wire.Denied, "belongs to another user")
			h.wantLeases("10000|inet|eth0|10.9.0.1||21500", "10001|inet|eth0|10.9.0.2||0")
			if code := server.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
		})
	}
}

// TestServerOfAnotherUserRefused: a directory that its user cannot write to is named with
// the cure.
func TestServerOfAnotherUserRefused(t *testing.T) {
	h := newHost(t)
	if err := os.Chmod(filepath.Dir(h.dir), 0o755); err != nil {
		t.Fatal(err)
	}
	config := h.config()
	h.refuse(h.serverAs(21500, "-c", config), h.db, "the file and its directory must be writable for uid 21500")
	h.sqlite(originalSchema)
	h.refuse(h.serverAs(21500, "-c", config), h.db, "must be writable for uid 21500")
}

// pythonPeer asks like any Python program: with names of exactly their length.
const pythonPeer = `
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.settimeout(30)
s.bind("\0python-%s" % sys.argv[1])
s.sendto(sys.argv[2].encode(), "\0tas_socket")
print(s.recv(254).decode())
`

// TestServerUserNamespaces: uid 0 of another user namespace is who it is outside, or
// nobody where that is not mapped.
func TestServerUserNamespaces(t *testing.T) {
	python := func(h *host, name string, before ...string) string {
		h.t.Helper()
		argv := append(before, "python3", "-c", pythonPeer, name, acquire(2))
		r := h.run(argv[0], argv[1:]...)
		if r.code != 0 {
			h.t.Fatalf("python: %s", r.stderr)
		}
		return strings.TrimSpace(r.stdout)
	}
	t.Run("of the peer", func(t *testing.T) {
		h := newHost(t)
		h.serve()
		wantTable(t, python(h, "a"), 10000)
		reply := python(h, "b", "setpriv", "--reuid=21999", "--regid=21999", "--clear-groups",
			"unshare", "--user", "--map-root-user")
		wantRefusal(t, reply, wire.Denied, "uid 21999 is not permitted")
	})
	t.Run("of the server", func(t *testing.T) {
		h := newHost(t)
		server := h.start(exec.Command("unshare", "--user", "--map-root-user", bin(t, serverBin), "-c", h.config()))
		server.waitLog("msg=serving")
		p := h.cPeer("peer")
		wantTable(t, p.ask(acquire(1)), 10000)
		wantRefusal(t, p.askAs(uidNobodyKnows, uidNobodyKnows, acquire(2)), wire.Denied, "another user namespace")
		wantRefusal(t, p.askAs(uidNobodyKnows, uidNobodyKnows, release(1)), wire.Denied, "another user namespace")
		h.wantLeases("10000|inet|eth0|10.9.0.1||0")
	})
}

// TestServerWithoutCapabilities: it needs none.
func TestServerWithoutCapabilities(t *testing.T) {
	h := newHost(t)
	h.ns.IP(t, "rule add from 10.1.1.1 lookup 10000 priority 5000")
	server := h.start(exec.Command("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all",
		bin(t, serverBin), "-c", h.config()))
	server.waitLog("msg=serving")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", server.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd", "CapInh"} {
		if !strings.Contains(string(status), set+":\t0000000000000000\n") {
			t.Fatalf("the server has capabilities:\n%s", status)
		}
	}
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10001)
	wantRefusal(t, p.askAs(uidNobodyKnows, uidNobodyKnows, acquire(2)), wire.Denied, "not permitted")
	if got := p.ask(release(1)); got != released {
		t.Errorf("release: got %s", got)
	}
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}

// TestClientCapability: the right to change the network is all that a client needs, of root's
// or of any user who may lease.
func TestClientCapability(t *testing.T) {
	const only = "--bounding-set -all,+net_admin --inh-caps -all,+net_admin --no-new-privs"
	for _, tt := range []struct{ name, setpriv string }{
		{"root", only},
		{"another user", "--reuid 4711 --regid 4711 --clear-groups --inh-caps -all,+net_admin --ambient-caps -all,+net_admin " +
			"--bounding-set -all,+net_admin --no-new-privs"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
			h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
			server := h.start(exec.Command("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all",
				bin(t, serverBin), "--debug", "-c", h.config(fmt.Sprintf(`"allowed_users":[%d]`, stranger), `"table_timeout":4`)))
			server.waitLog("msg=serving")
			if r := h.clientWith(tt.setpriv, "-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "10000\n" {
				t.Fatalf("got %+v", r)
			}
			caps := strings.Repeat("0", 12) + "1000" // CAP_NET_ADMIN
			if set := status(t, h.onlyClient(), "CapEff"); set[0] != caps {
				t.Errorf("it has the capabilities %s", set[0])
			}
			if set := status(t, server.cmd.Process.Pid, "CapEff"); set[0] != strings.Repeat("0", 16) {
				t.Errorf("the server has the capabilities %s", set[0])
			}
			if r := h.clientWith(tt.setpriv, "-4", "-a", "10.77.0.3", "-i", "wan0", "--routes", "copy", "--on-loss", "block", "--specific-first"); r.stdout != "10001\n" {
				t.Fatalf("with routes: got %+v", r)
			}
			h.waitRoutes("10001", "10.77.0.0/24 dev wan0 proto 116 scope link src 10.77.0.3", "default via 10.77.0.1 dev wan0 proto 116 src 10.77.0.3")
			eventually(t, "both renew", func() error {
				for _, addr := range []string{"10.77.0.2", "10.77.0.3"} {
					if !strings.Contains(server.log.String(), `msg="lease renewed" ifname=wan0 addr=`+addr) {
						return errors.New(addr + " did not")
					}
				}
				return nil
			})
			h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
			if r := h.clientWith(tt.setpriv, "-r", "-4", "-a", "10.77.0.3", "-i", "wan0"); r.code != 0 {
				t.Errorf("-r: got %+v", r)
			}
			h.waitClean()
			h.waitRoutes("10001")
		})
	}
}

// passedSocket is a socket as a service manager makes it, without SO_PASSCRED.
func (h *host) passedSocket(kind int, addr sockaddr) *os.File {
	h.t.Helper()
	var fd int
	var err error
	h.ns.Do(func() { fd, err = unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0) })
	if err != nil {
		h.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "passed")
	h.t.Cleanup(func() { f.Close() })
	if err := bindRaw(fd, addr); err != nil {
		h.t.Fatal(err)
	}
	return f
}

// passing is the command line of the server that is handed these sockets as systemd does.
func (h *host) passing(config string, files ...*os.File) *exec.Cmd {
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`LISTEN_PID=$$ LISTEN_FDS=%d exec "$0" "$@"`, len(files)),
		bin(h.t, serverBin), "-c", config)
	cmd.ExtraFiles = files
	return cmd
}

// TestServerSocketsPassed: either form of the name comes from the service manager, and
// the server binds the other one.
func TestServerSocketsPassed(t *testing.T) {
	both := []sockaddr{paddedName("tas_socket"), exactName("tas_socket")}
	for _, tt := range []struct {
		name  string
		addrs []sockaddr
	}{{"padded", both[:1]}, {"exact", both[1:]}, {"both", both}} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			var files []*os.File
			for _, addr := range tt.addrs {
				files = append(files, h.passedSocket(unix.SOCK_DGRAM, addr))
			}
			// What is queued by now has no credentials. It is dropped, not refused, so that
			// its sender, who is root, tries again.
			p := h.cPeer("peer")
			p.to = tt.addrs[0]
			p.send(acquire(7))
			server := h.start(h.passing(h.config(), files...))
			server.waitLog("msg=serving")
			server.waitLog("without credentials")
			for n, to := range both {
				p.to = to
				wantTable(t, p.ask(acquire(n+1)), uint32(10000+n))
			}
			p.nothing()
			h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.2||0")
		})
	}
	t.Run("refused", func(t *testing.T) {
		h := newHost(t)
		h.refuse(h.passing(h.config(), h.passedSocket(unix.SOCK_DGRAM, paddedName("other"))), "@other", "@tas_socket")
		h.refuse(h.passing(h.config(), h.passedSocket(unix.SOCK_STREAM, exactName("tas_socket"))), "not a unix datagram socket")
		if _, err := os.Stat(h.db); !os.IsNotExist(err) {
			t.Errorf("database: got %v, want none", err)
		}
	})
}

// TestServerNamesTaken: it holds both forms or does not start, and says who has the
// other one.
func TestServerNamesTaken(t *testing.T) {
	for _, tt := range []struct{ name, python string }{
		{"padded", `"\0tas_socket" + "\0" * 97`},
		{"exact", `"\0tas_socket"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			squatter := h.start(exec.Command("python3", "-u", "-c", `
import socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(`+tt.python+`)
print("bound")
time.sleep(1000)`))
			squatter.waitLog("bound")
			h.refuse(exec.Command(bin(t, serverBin), "-c", h.config()), "tas_socket",
				fmt.Sprintf("pid %d (python3", squatter.cmd.Process.Pid))
			squatter.kill()
			p := h.cPeer("peer")
			h.serve()
			for _, to := range []sockaddr{paddedName("tas_socket"), exactName("tas_socket")} {
				p.to = to
				wantTable(t, p.ask(acquire(1)), 10000)
			}
		})
	}
	t.Run("by another server", func(t *testing.T) {
		h := newHost(t)
		first := h.serve()
		h.refuse(exec.Command(bin(t, serverBin), "-c", h.config(`"db_path":"`+h.dir+`/other.db"`)),
			fmt.Sprintf("pid %d (ta-server", first.cmd.Process.Pid))
		if _, err := os.Stat(h.dir + "/other.db"); !os.IsNotExist(err) {
			t.Errorf("database of the second: got %v, want none", err)
		}
		wantTable(t, h.cPeer("peer").ask(acquire(1)), 10000)
	})
}
