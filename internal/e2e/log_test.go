package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fullPipe is a pipe without room. Its file descriptions wait, as those of a shell do.
func fullPipe(t *testing.T) (from, to *os.File) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	var err error
	for err == nil {
		_, err = unix.Write(fds[1], line)
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], false); err != nil {
		t.Fatal(err)
	}
	from, to = os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "writer")
	t.Cleanup(func() { from.Close(); to.Close() })
	return from, to
}

// fullSocket makes a socket at a path that nobody reads from, and that has no room left.
func fullSocket(t *testing.T, network, path string) {
	t.Helper()
	kind := unix.SOCK_DGRAM
	if network == "unix" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if network == "unix" {
		if err := unix.Listen(fd, 0); err != nil { // one connection is enough
			t.Fatal(err)
		}
	}
	conn, err := net.Dial(network, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for err == nil {
		if err := conn.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err = conn.Write(line)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

// fullSyslog is a /dev, but for its null, with a syslog that does not read, and has no room left.
func fullSyslog(t *testing.T, network string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "null"), nil, 0o666); err != nil {
		t.Fatal(err)
	}
	fullSocket(t, network, filepath.Join(dir, "log"))
	return dir
}

// TestLogNobodyReads: a log that nobody reads costs its lines and nothing else: leases are granted
// and renewed, rules come and go, commands end.
func TestLogNobodyReads(t *testing.T) {
	for _, tt := range []struct {
		name   string
		syslog string // the network of the socket that the log goes to, instead of standard error
		closed bool   // standard error has no reader at all
	}{
		{name: "stderr"},
		{name: "stderr without a reader", closed: true},
		{name: "syslog", syslog: "unixgram"},
		{name: "syslog of a stream", syslog: "unix"},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "192.0.2.2/24", "192.0.2.3/24")
			h.link("wan1", "198.51.100.2/24")
			from, to := fullPipe(t)
			if tt.closed {
				from.Close()
			}
			var dev string
			if tt.syslog != "" {
				dev = fullSyslog(t, tt.syslog)
			}
			command := func(name string, args ...string) *exec.Cmd {
				if dev != "" {
					return exec.Command("unshare", append([]string{"-m", "sh", "-c", `mount --bind /dev/null "$0/null" && mount --rbind "$0" /dev && exec "$@"`,
						dev, bin(t, name)}, args...)...)
				}
				cmd := exec.Command(bin(t, name), args...)
				cmd.Stderr = to
				return cmd
			}
			var flags []string
			if dev != "" {
				flags = []string{"--syslog"}
			}
			config := h.config(`"table_timeout":4`, fmt.Sprintf(`"do_syslog":%t`, dev != ""))
			server := h.start(command(serverBin, "--debug", "-c", config))
			// What a hook does: it waits for the table, and for the end of -r.
			call := func(args ...string) string {
				t.Helper()
				cmd := command(clientBin, append(append([]string{"--debug", "-4", "-i", "wan0"}, flags...), args...)...)
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				defer w.Close()
				cmd.Stdout = w
				p := h.start(cmd)
				if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
					t.Fatal(err)
				}
				line, err := bufio.NewReader(r).ReadString('\n')
				if err != nil {
					t.Fatalf("%s: %v", cmd, err)
				}
				if code := p.wait(); code != 0 {
					t.Errorf("%s: exit code %d", cmd, code)
				}
				return strings.TrimSpace(line)
			}
			eventually(t, "the server is there", func() error {
				if got := call("-a", "192.0.2.3"); got == "0" {
					return errors.New("no table")
				}
				return nil
			})
			front := command(clientBin, append(flags, "-f", "--debug", "-4", "-i", "wan0", "-a", "192.0.2.2")...)
			front.Stdout = to // nobody reads the table either
			client := h.start(front)
			watch := h.start(command(clientBin, append([]string{"watch", "--debug", "--clean", "--ifname", "wan1"}, flags...)...))
			for _, addr := range []string{"192.0.2.2", "192.0.2.3", "198.51.100.2"} {
				h.served(addr)
			}
			expires := func() (least int) {
				t.Helper()
				least, err := strconv.Atoi(strings.TrimSpace(h.sqlite("select min(LeaseExpires) from RtTables")))
				if err != nil {
					t.Fatal(err)
				}
				return least
			}
			first := expires()
			eventually(t, "all leases are renewed twice", func() error {
				if n := len(h.leases()); n != 3 {
					t.Fatalf("%d leases", n)
				}
				if now := expires(); now <= first+4 {
					return fmt.Errorf("the first ends at %d", now)
				}
				return nil
			})
			h.ns.IP(t, "address add 198.51.100.3/24 dev wan1")
			h.served("198.51.100.3")
			h.ns.IP(t, "address del 198.51.100.3/24 dev wan1")
			h.waitNotServed("198.51.100.3")
			if flags, err := unix.FcntlInt(to.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
				t.Errorf("standard error, which other programs share, has flags %#x: %v", flags, err)
			}
			if got := call("-r", "-a", "192.0.2.3"); got != "0" {
				t.Errorf("-r prints %q", got)
			}
			h.waitNotServed("192.0.2.3")
			for _, p := range []*process{client, watch, server} {
				if code := p.stop(); code != 0 {
					t.Errorf("%s: exit code %d", p.cmd, code)
				}
			}
			h.wantRules()
		})
	}
}

// TestLogReadLate: who reads a log late has what came before.
func TestLogReadLate(t *testing.T) {
	h := newHost(t)
	from, to := fullPipe(t)
	cmd := exec.Command(bin(t, serverBin), "--debug", "-c", h.config())
	cmd.Stderr = to
	server := h.start(cmd)
	peer := h.exactPeer("peer")
	eventually(t, "the server is there", func() error { return peer.trySend(acquire(1)) })
	peer.receive()
	to.Close()
	if err := from.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(from)
	for lines.Scan() {
		if strings.Contains(lines.Text(), `msg="lease granted"`) {
			break
		}
	}
	if lines.Err() != nil {
		t.Error(lines.Err())
	}
	if err := server.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	last := ""
	for lines.Scan() {
		last = lines.Text()
	}
	if !strings.Contains(last, "msg=stopped") {
		t.Errorf("last line %q", last)
	}
	if code := server.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestManagerNobodyReads: a service manager that does not read holds nothing up either.
func TestManagerNobodyReads(t *testing.T) {
	h := newHost(t)
	path := filepath.Join(h.dir, "notify")
	fullSocket(t, "unixgram", path)
	cmd := exec.Command(bin(t, serverBin), "--debug", "-c", h.config())
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=200000")
	server := h.start(cmd)
	server.waitLog("msg=serving")
	wantTable(t, h.exactPeer("peer").ask(acquire(1)), 10000)
	server.waitLog("cannot tell the service manager")
	if code := server.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
