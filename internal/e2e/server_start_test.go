package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerOptions is the command line.
func TestServerOptions(t *testing.T) {
	h := newHost(t)
	server := func(args ...string) result { return h.run(bin(t, serverBin), args...) }

	help := server("--help")
	if lines := strings.Split(strings.TrimSuffix(help.stdout, "\n"), "\n"); help.code != 0 || help.stderr != "" || len(lines) > 24 {
		t.Errorf("--help: exit code %d, stderr %q, %d lines, want 0, nothing, at most 24", help.code, help.stderr, len(lines))
	} else {
		for _, line := range lines {
			if len(line) > 80 {
				t.Errorf("--help: line of %d characters: %q", len(line), line)
			}
		}
	}
	if got := server("-h"); got != help {
		t.Errorf("-h: got %+v, want the same as --help", got)
	}
	if got := server("--version"); got.code != 0 || strings.Count(got.stdout, "\n") != 1 || got.stdout == "\n" {
		t.Errorf("--version: got %+v, want one line", got)
	}
	for _, tt := range []struct {
		name string
		args []string
		text string
	}{
		{"unknown option", []string{"--frobnicate"}, "frobnicate"},
		{"unknown short option", []string{"-x"}, "x"},
		{"no file for -c", []string{"-c"}, "c"},
		{"an argument", []string{"server.json"}, `"server.json"`},
		{"a configuration that is not there", []string{"-c", "/nonexistent.json"}, "/nonexistent.json: no such file"},
		{"a configuration without a name", []string{"-c", ""}, "configuration"},
		{"a directory", []string{"-c", "/etc", "--check"}, "is a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := server(tt.args...)
			if got.code != 1 || got.stdout != "" || !strings.Contains(got.stderr, tt.text) || !strings.HasPrefix(got.stderr, "table-allocator-server: ") {
				t.Errorf("got %+v, want exit code 1, nothing on stdout and %q on stderr", got, tt.text)
			}
		})
	}
}

// TestServerConfig: an error names the key, and nothing is touched. What is an error is
// the business of the tests of package server.
func TestServerConfig(t *testing.T) {
	h := newHost(t)
	logPath := filepath.Join(h.dir, "server.log")
	for _, tt := range []struct {
		name  string
		more  []string
		texts []string
	}{
		{"unknown key", []string{`"db_file":"x"`}, []string{"db_file: unknown key"}},
		{"wrong type", []string{`"num_tables":"40"`}, []string{"num_tables: want a number of tables"}},
		{"reserved tables", []string{`"table_offset":200`, `"num_tables":100`}, []string{"table_offset: tables 200 to 299 contain 253"}},
		{"wrap-around", []string{`"table_offset":4294967290`}, []string{"num_tables: 40 tables from table_offset 4294967290"}},
		{"long name", []string{`"socket_path":"` + strings.Repeat("n", 107) + `"`}, []string{"socket_path", "107 bytes"}},
		{"no family", []string{`"addr_families":{"inet":false}`}, []string{"addr_families: none is true"}},
		{"unknown user", []string{`"allowed_users":["nobody-of-that-name"]`}, []string{`allowed_users: "nobody-of-that-name"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := h.config(append(tt.more, fmt.Sprintf(`"log_path":%q`, logPath))...)
			for _, args := range [][]string{{"-c", config}, {"--check", "--config=" + config}} {
				got := h.run(bin(t, serverBin), args...)
				if got.code != 1 || got.stdout != "" {
					t.Errorf("%s: got %+v, want exit code 1 and nothing on stdout", args[0], got)
				}
				for _, text := range append(tt.texts, config) {
					if !strings.Contains(got.stderr, text) {
						t.Errorf("%s: stderr %q, want %q in it", args[0], got.stderr, text)
					}
				}
			}
		})
	}
	for _, text := range []string{"", "1", "[]", `"x"`, "null", "{", "{} {}"} {
		path := filepath.Join(h.dir, "odd.json")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := h.run(bin(t, serverBin), "-c", path); got.code != 1 || got.stdout != "" || !strings.Contains(got.stderr, path) ||
			strings.Contains(got.stderr, "panic") {
			t.Errorf("configuration %q: got %+v, want exit code 1 and a message", text, got)
		}
	}
	// A good one, larger than the original's 1,024 bytes, with a name of 106.
	name := strings.Repeat("n", 106)
	config := h.config(`"socket_path":"`+name+`"`, `"allowed_users":[`+strings.Repeat("1000, ", 400)+`1000]`,
		fmt.Sprintf(`"log_path":%q`, logPath))
	if got := h.run(bin(t, serverBin), "--check", "-c", config); got.code != 0 || got.stderr != "" || got.stdout != "configuration ok\n" {
		t.Errorf("--check: got %+v, want exit code 0", got)
	}
	for _, path := range []string{h.db, logPath} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: got %v, want no such file", path, err)
		}
	}
	server := h.start(exec.Command(bin(t, serverBin), "-c", config))
	eventually(t, "it serves", func() error {
		text, err := os.ReadFile(logPath)
		if err == nil && !strings.Contains(string(text), "msg=serving") {
			err = fmt.Errorf("it logged %q", text)
		}
		return err
	})
	p := h.cPeer("peer")
	for _, to := range []sockaddr{paddedName(name), exactName(name)} {
		p.to = to
		wantTable(t, p.ask(acquire(1)), 10000)
	}
	if code := server.stop(); code != 0 || server.log.String() != "" {
		t.Errorf("with log_path: exit code %d, output %q, want 0 and nothing", code, server.log.String())
	}
}

// TestServerOriginalConfig is the example file of the original, but for its paths.
func TestServerOriginalConfig(t *testing.T) {
	h := newHost(t)
	config := filepath.Join(h.dir, "original.json")
	text := fmt.Sprintf(`{
	"socket_path" : "tas_socket",
	"table_offset" : 10000,
	"num_tables" : 40,
	"table_timeout" : 3600, // seconds
	"db_path" : %q,
	"do_syslog" : true,
	"addr_families" : { "inet" : true, "inet6" : false, "unspec" : false }
}`, h.db)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	// A /dev of its own, whose log is a socket of ours.
	path := filepath.Join(h.dir, "syslog")
	syslog, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer syslog.Close()
	server := h.start(exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec", `
		mount -t tmpfs dev /dev
		mknod -m 666 /dev/null c 1 3
		ln -s "$1" /dev/log
		exec "$2" -c "$3"`, "sh", path, bin(t, serverBin), config))
	expect := func(text string) {
		t.Helper()
		buf := make([]byte, 4096)
		for {
			if err := syslog.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			n, err := syslog.Read(buf)
			if err != nil {
				t.Fatalf("wait until syslog gets %q: %v; stderr: %s", text, err, server.log.String())
			}
			// daemon.info, or the like; the time is syslog's business
			if line := string(buf[:n]); strings.Contains(line, text) {
				if !strings.HasPrefix(line, "<") || !strings.Contains(line, " table-allocator-server[") || strings.Contains(line, "level=") {
					t.Errorf("syslog got %q", line)
				}
				return
			}
		}
	}
	expect("<30>")
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	expect(`msg="lease granted" ifname=eth0 addr=10.9.0.1 family=inet table=10000 tag="" owner=0 expires=`)
	wantRefusal(t, p.ask(request(10, "eth0", "fd00::1", 0)), wire.NotServed, "")
	expect(`msg="lease refused" ifname=eth0 addr=fd00::1 family=inet6`)
	if code := server.stop(); code != 0 || server.log.String() != "" {
		t.Errorf("exit code %d, stderr %q, want 0 and nothing", code, server.log.String())
	}
	expect("msg=stopped")
}

// TestServerWithoutSyslog: a syslog that is not there is no reason not to serve.
func TestServerWithoutSyslog(t *testing.T) {
	h := newHost(t)
	server := h.start(exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec", `
		mount -t tmpfs dev /dev
		mknod -m 666 /dev/null c 1 3
		exec "$1" -c "$2"`, "sh", bin(t, serverBin), h.config(`"do_syslog":true`)))
	server.waitLog("syslog is not there")
	server.waitLog("msg=serving")
	wantTable(t, h.cPeer("peer").ask(acquire(1)), 10000)
}

// TestServerLog: each change of a lease is one line with the fixed keys.
func TestServerLog(t *testing.T) {
	h := newHost(t)
	path := filepath.Join(h.dir, "server.log")
	if err := os.WriteFile(path, []byte("what was there\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := h.start(exec.Command(bin(t, serverBin), "-c",
		h.config(fmt.Sprintf(`"log_path":%q`, path), `"table_timeout":1`, `"num_tables":1`)))
	text := ""
	expect := func(line string) {
		t.Helper()
		eventually(t, "the log has "+line, func() error {
			data, err := os.ReadFile(path)
			if text = string(data); err == nil && !strings.Contains(text, line) {
				err = fmt.Errorf("it is:\n%s", text)
			}
			return err
		})
	}
	expect("msg=serving")
	p := h.cPeer("peer")
	tagged := `{"tag":"say \"hi\"",` + acquire(1)[1:]
	_, expires := granted(t, p.ask(tagged))
	lease := fmt.Sprintf(`ifname=eth0 addr=10.9.0.1 family=inet table=10000 tag="say \"hi\"" owner=0 expires=%d`, expires)
	expect(fmt.Sprintf(`level=INFO msg="lease granted" %s pid=%d uid=0`, lease, os.Getpid()))
	expect(fmt.Sprintf(`level=INFO msg="lease expired" %s`, lease))
	eventually(t, "a lease is released before it expires", func() error {
		p.waitLease(acquire(2))
		p.ask(release(2))
		data, err := os.ReadFile(path)
		const line = `level=INFO msg="lease released" ifname=eth0 addr=10.9.0.2 family=inet table=10000 tag="" owner=0 expires=`
		if err == nil && !strings.Contains(string(data), line) {
			err = fmt.Errorf("the log is:\n%s", data)
		}
		return err
	})
	wantRefusal(t, p.askAs(uidNobodyKnows, 0, acquire(3)), wire.Denied, "")
	expect(`level=WARN msg="lease refused" ifname=eth0 addr=10.9.0.3 family=inet uid=21999`)
	if strings.Contains(text, "renewed") {
		t.Errorf("renewals are for --debug only; the log:\n%s", text)
	}
	if !strings.HasPrefix(text, "what was there\n") {
		t.Error("the log was not appended to")
	}
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	// Whoever starts it by hand sees an error also when the log is elsewhere.
	h.refuse(exec.Command(bin(t, serverBin), "-c", h.config(`"log_path":"/nonexistent/log"`)), "/nonexistent/log")
	h.refuse(exec.Command(bin(t, serverBin), "-c", h.config(fmt.Sprintf(`"log_path":%q`, path), `"db_path":"/dev/null"`)), "not a regular file")
}

// TestServerNotifies: what systemd hears.
func TestServerNotifies(t *testing.T) {
	h := newHost(t)
	path := filepath.Join(h.dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	next := func() string {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 256)
		n, err := manager.Read(buf)
		if err != nil {
			t.Fatalf("wait for the server's message: %v", err)
		}
		return string(buf[:n])
	}
	cmd := exec.Command(bin(t, serverBin), "-c", h.config())
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=3000000") // a loop that waits for a processor for a second is not stuck
	server := h.start(cmd)
	got := next()
	for got == "WATCHDOG=1" { // they are told side by side
		got = next()
	}
	if got != "READY=1" {
		t.Errorf("first: got %q, want READY=1", got)
	}
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000) // ready is ready
	working := func(what string) {
		t.Helper()
		for range 3 { // longer than a loop may be stuck for another reason
			if got := next(); got != "WATCHDOG=1" {
				t.Errorf("%s: got %q, want WATCHDOG=1", what, got)
			}
		}
	}
	working("while it works")
	mend := inject(writes, stuck)(h, server)
	h.writeUntilStuck(server, writes, p)
	for buf := make([]byte, 256); err == nil; { // what it said before
		if err = manager.SetReadDeadline(time.Now()); err == nil {
			_, err = manager.Read(buf)
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	working("while it waits for the disk") // lest it be killed for that
	mend()
	answer, _ := p.receive()
	wantTable(t, answer, 10001)
	working("afterwards")
	if err := server.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for got = next(); got == "WATCHDOG=1"; {
		got = next()
	}
	if got != "STOPPING=1" {
		t.Errorf("last: got %q, want STOPPING=1", got)
	}
	if code := server.wait(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	h.refuse(watchdog(exec.Command(bin(t, serverBin), "-c", h.config()), "soon"), "WATCHDOG_USEC")
}

func watchdog(cmd *exec.Cmd, usec string) *exec.Cmd {
	cmd.Env = append(os.Environ(), "WATCHDOG_USEC="+usec)
	return cmd
}
