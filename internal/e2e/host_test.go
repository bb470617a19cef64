// Package e2e runs the real commands against the real kernel, in private network
// namespaces inside a sandbox.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestMain(m *testing.M) {
	if !isProbe() {
		nettest.Main(m, "sqlite3", "strace")
	}
}

const (
	serverBin = "table-allocator-server"
	clientBin = "table-allocator-client"
	// patience is how long an event may take before a test says that it does not come. It
	// is no measure of anything: the machine may be busy.
	patience = 30 * time.Second
)

// bin is the path of one of our commands, built with the race detector.
func bin(t *testing.T, name string) string {
	t.Helper()
	dir, err := binDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

var binDir = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("TABLE_ALLOCATOR_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "bin")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-race", "-o", dir+"/", "../../cmd/...").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the commands: %w\n%s", err, out)
	}
	return dir, nil
})

// host is a network namespace with the commands running in it.
type host struct {
	t   *testing.T
	ns  *nettest.Namespace
	isp *nettest.Namespace // the far end of every link
	dir string
	db  string
}

// newHost makes a host without links, and lets the test run beside others.
func newHost(t *testing.T) *host {
	t.Helper()
	t.Parallel()
	dir := t.TempDir()
	h := &host{
		t:   t,
		ns:  nettest.New(t, "host"),
		isp: nettest.New(t, "isp"),
		dir: dir,
		db:  filepath.Join(dir, "leases.db"),
	}
	t.Cleanup(h.endClients)
	return h
}

// link adds a link that is up, with addresses in "192.0.2.5/24" form.
func (h *host) link(name string, addrs ...string) {
	h.t.Helper()
	nettest.Veth(h.t, h.ns, name, h.isp, name)
	for _, a := range addrs {
		h.ns.IP(h.t, "address add "+a+" dev "+name)
	}
}

// config writes a configuration file: the original's keys for this host, and those in
// more, one `"key":value` each, instead or besides.
func (h *host) config(more ...string) string {
	h.t.Helper()
	keys := map[string]string{
		"socket_path":   `"tas_socket"`,
		"table_offset":  "10000",
		"num_tables":    "40",
		"table_timeout": "3600",
		"db_path":       strconv.Quote(h.db),
		"do_syslog":     "false",
		"addr_families": `{"inet":true,"inet6":true,"unspec":true}`,
	}
	for _, m := range more {
		key, value, ok := strings.Cut(m, ":")
		if !ok {
			h.t.Fatalf("config: %q is no member", m)
		}
		keys[strings.Trim(key, `"`)] = value
	}
	text := "{ // a comment, as in the original's example\n"
	for key, value := range keys {
		text += fmt.Sprintf("  %q: %s,\n", key, value)
	}
	text = strings.TrimSuffix(text, ",\n") + "\n}\n"
	path := filepath.Join(h.dir, "server.json")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// process is a command of ours that runs until the test ends it.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{} // closed when it has ended
}

// serve starts the server and waits until it serves.
func (h *host) serve(config ...string) *process {
	h.t.Helper()
	p := h.start(exec.Command(bin(h.t, serverBin), "--debug", "-c", h.config(config...)))
	p.waitLog("msg=serving")
	return p
}

// start runs cmd in the host and keeps what it writes.
func (h *host) start(cmd *exec.Cmd) *process {
	h.t.Helper()
	p := &process{t: h.t, cmd: cmd, log: &logBuffer{}, done: make(chan struct{})}
	if cmd.Stderr == nil {
		cmd.Stderr = p.log
	}
	if cmd.Stdout == nil {
		cmd.Stdout = p.log
	}
	if err := h.ns.Start(cmd); err != nil {
		h.t.Fatalf("start %s: %v", cmd, err)
	}
	go func() {
		_ = cmd.Wait() // its end is what counts; the state says how
		close(p.done)
	}()
	h.t.Cleanup(func() {
		p.kill()
		if strings.Contains(p.log.String(), "DATA RACE") {
			h.t.Error("the race detector has something to say")
		}
		if h.t.Failed() {
			h.t.Logf("%s wrote:\n%s", filepath.Base(cmd.Path), p.log.String())
		}
	})
	return p
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended already
	<-p.done
}

// stop is SIGTERM; it returns the exit code.
func (p *process) stop() int {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // as above
	return p.wait()
}

// wait waits for the end and returns the exit code.
func (p *process) wait() int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("%s does not end; it wrote:\n%s", p.cmd, p.log.String())
	}
	return p.cmd.ProcessState.ExitCode()
}

// waitLog waits until it has written text.
func (p *process) waitLog(text string) {
	p.t.Helper()
	eventually(p.t, "the log says "+text, func() error {
		if strings.Contains(p.log.String(), text) {
			return nil
		}
		select {
		case <-p.done:
			p.t.Fatalf("%s ended without writing %q; it wrote:\n%s", p.cmd, text, p.log.String())
		default:
		}
		return fmt.Errorf("it wrote:\n%s", p.log.String())
	})
}

// logBuffer is a buffer that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// result is what a command that ended left.
type result struct {
	stdout, stderr string
	code           int
}

// run runs a command in the host to its end. What it leaves in the background has to
// let go of the output, or run does not return.
func (h *host) run(name string, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := h.ns.Start(cmd); err != nil {
		h.t.Fatalf("start %s: %v", cmd, err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		h.t.Fatalf("%s: %v\nstdout: %s\nstderr: %s", cmd, err, stdout.String(), stderr.String())
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// client runs the client as hooks do.
func (h *host) client(args ...string) result {
	h.t.Helper()
	return h.run(bin(h.t, clientBin), append([]string{"-l", filepath.Join(h.dir, "client.log"), "--debug"}, args...)...)
}

// lease runs the client for an IPv4 address and returns the table that it printed.
func (h *host) lease(addr, ifname string, more ...string) uint32 {
	h.t.Helper()
	r := h.client(append([]string{"-4", "-a", addr, "-i", ifname}, more...)...)
	table, err := strconv.ParseUint(strings.TrimSuffix(r.stdout, "\n"), 10, 32)
	if err != nil || r.code != 0 {
		h.t.Fatalf("client for %s on %s: stdout %q, exit code %d, stderr: %s", addr, ifname, r.stdout, r.code, r.stderr)
	}
	return uint32(table)
}

// clientLog is what all clients of the host logged.
func (h *host) clientLog() string {
	text, err := os.ReadFile(filepath.Join(h.dir, "client.log"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Error(err)
	}
	return string(text)
}

// pids are the processes of a command of ours in this host.
func (h *host) pids(name string) []int {
	h.t.Helper()
	own, err := os.Stat(h.ns.Path())
	if err != nil {
		h.t.Fatal(err)
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		h.t.Fatal(err)
	}
	var pids []int
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		exe, err := os.Readlink("/proc/" + p.Name() + "/exe")
		if err != nil || filepath.Base(exe) != name {
			continue
		}
		if ns, err := os.Stat("/proc/" + p.Name() + "/ns/net"); err == nil && os.SameFile(own, ns) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// endClients ends what a test leaves running, and shows the log of a failed one.
func (h *host) endClients() {
	for _, pid := range h.pids(clientBin) {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended already
	}
	if h.t.Failed() {
		h.t.Logf("clients logged:\n%s", h.clientLog())
		out, _ := h.ns.Output("ip", "rule")
		h.t.Logf("rules at the end:\n%s", out)
	}
}

// rules are the rules of the host but the kernel's three, as `ip -d rule` shows them,
// one line each with single spaces.
func (h *host) rules() []string {
	h.t.Helper()
	var rules []string
	for line := range strings.Lines(h.ns.IP(h.t, "-d -4 rule show")) {
		line = strings.Join(strings.Fields(line), " ")
		if line != "" && !strings.HasSuffix(line, "proto kernel") {
			rules = append(rules, line)
		}
	}
	return rules
}

// clientRules are the rules that a client with default options installs.
func clientRules(addr, network string, table uint32) []string {
	return []string{
		fmt.Sprintf("10000: from %s lookup %d proto 116", addr, table),
		fmt.Sprintf("20000: from all to %s lookup %d proto 116", network, table),
		fmt.Sprintf("91000: from all iif lo lookup %d proto 116", table),
	}
}

// wantRules fails the test unless the host's rules are want, in any order.
func (h *host) wantRules(want ...string) {
	h.t.Helper()
	if diff := unordered(h.rules(), want); diff != "" {
		h.t.Errorf("rules: %s", diff)
	}
}

// waitRules waits until they are.
func (h *host) waitRules(want ...string) {
	h.t.Helper()
	eventually(h.t, "the rules are there", func() error {
		if diff := unordered(h.rules(), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

func unordered(got, want []string) string {
	count := make(map[string]int)
	for _, s := range want {
		count[s]++
	}
	for _, s := range got {
		count[s]--
	}
	diff := ""
	for s, n := range count {
		switch {
		case n > 0:
			diff += fmt.Sprintf("\n  missing: %s", s)
		case n < 0:
			diff += fmt.Sprintf("\n  too many: %s", s)
		}
	}
	return diff
}

// leases is what sqlite3 says of the leases: table|family|ifname|address|tag|owner.
func (h *host) leases() []string {
	h.t.Helper()
	out := h.sqlite(`select "table", family, ifname, address, tag, owner from leases`)
	return strings.Fields(strings.ReplaceAll(strings.TrimSpace(out), " ", "_"))
}

// sqlite asks the database with sqlite3, as people do.
func (h *host) sqlite(statement string) string {
	h.t.Helper()
	out, err := exec.Command("sqlite3", "-cmd", ".timeout 5000", h.db, statement).CombinedOutput()
	if err != nil {
		h.t.Fatalf("sqlite3 %s %q: %v\n%s", h.db, statement, err, out)
	}
	return string(out)
}

// wantLeases fails the test unless sqlite3 shows exactly these.
func (h *host) wantLeases(want ...string) {
	h.t.Helper()
	if diff := unordered(h.leases(), want); diff != "" {
		h.t.Errorf("leases: %s", diff)
	}
}

// waitClean waits until nothing of the clients is left: processes, rules, leases.
func (h *host) waitClean() {
	h.t.Helper()
	eventually(h.t, "nothing is left of the clients", func() error {
		if pids := h.pids(clientBin); len(pids) > 0 {
			return fmt.Errorf("processes: %d", pids)
		}
		if rules := h.rules(); len(rules) > 0 {
			return fmt.Errorf("rules: %q", rules)
		}
		if leases := h.leases(); len(leases) > 0 {
			return fmt.Errorf("leases: %q", leases)
		}
		return nil
	})
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v until %s: %v", patience, what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// peer is a program of our own making that talks to the server.
type peer struct {
	t    *testing.T
	conn *wire.Conn
}

// peer binds a socket in the host; name is the text of a padded name, as a C program
// binds it, or with exact of the name as Python does.
func (h *host) peer(name string, exact bool) *peer {
	h.t.Helper()
	addr := must(h.t)(wire.Padded(name))
	if exact {
		addr = must(h.t)(wire.Exact(name))
	}
	var conn *wire.Conn
	var err error
	h.ns.Do(func() { conn, err = wire.Listen(addr, wire.MaxRequest) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return &peer{h.t, conn}
}

func must(t *testing.T) func(wire.Addr, error) wire.Addr {
	return func(a wire.Addr, err error) wire.Addr {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
}

// receive waits for a datagram; io.EOF says that none came in time.
func (p *peer) receive(wait time.Duration) (string, error) {
	if err := p.conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	datagrams, err := p.conn.Receive()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "", io.EOF
	}
	if err != nil {
		return "", err
	}
	if len(datagrams) != 1 {
		return "", fmt.Errorf("%d datagrams at once", len(datagrams))
	}
	return string(datagrams[0].Data), nil
}
