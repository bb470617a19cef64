package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// stranger is the uid of somebody who is not trusted.
const stranger = 4711

// as runs f inside the host on a thread of its own that belongs to user uid, and
// returns when f has called ready or returned. Sockets that f makes or writes to are
// that user's to the kernel.
func (h *host) as(uid int, f func(ready func())) {
	h.t.Helper()
	begun, ended := make(chan struct{}), make(chan struct{})
	var err error
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		var ns *os.File
		if ns, err = os.Open(h.ns.Path()); err != nil {
			return
		}
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		ns.Close()
		if err != nil {
			return
		}
		// The raw call: of this thread, where the library's would be of all.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			err = errno
			return
		}
		f(sync.OnceFunc(func() { close(begun) }))
	}()
	select {
	case <-begun:
	case <-ended:
		if err != nil {
			h.t.Fatalf("become uid %d: %v", uid, err)
		}
	}
}

// owner is how messages call user uid of a socket that this program has made. The pid may
// be of a child that has it for a moment, too.
func owner(uid int) string {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(" (%s) of uid %d", strings.TrimSpace(string(comm)), uid)
}

// bound is a socket of user uid at a name of the host. The user's program does nothing
// with it until the test does.
func (h *host) bound(uid int, addr wire.Addr) *wire.Conn {
	h.t.Helper()
	var conn *wire.Conn
	var err error
	h.as(uid, func(func()) { conn, err = wire.Listen(addr, wire.MaxReplace) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

func padded(t *testing.T, name string) wire.Addr {
	t.Helper()
	return must(t)(wire.Padded(name))
}

func exact(t *testing.T, name string) wire.Addr {
	t.Helper()
	return must(t)(wire.Exact(name))
}

// fake is a server of the test's own, of some user and at some form of the name.
type fake struct {
	mu       sync.Mutex
	requests []string // as they came
	from     []wire.Addr
}

// fakeServer answers each request with what answer makes of it, and not at all where
// that is "".
func (h *host) fakeServer(uid int, at wire.Addr, answer func(wire.Request) string) *fake {
	h.t.Helper()
	f := &fake{}
	done := make(chan struct{})
	var conn *wire.Conn
	h.as(uid, func(ready func()) {
		defer close(done)
		var err error
		if conn, err = wire.Listen(at, wire.MaxRequest); err != nil {
			h.t.Error(err)
			return
		}
		ready()
		for {
			datagrams, err := conn.Receive()
			if err != nil {
				return
			}
			for _, d := range datagrams {
				f.mu.Lock()
				f.requests = append(f.requests, string(d.Data))
				f.from = append(f.from, d.From)
				f.mu.Unlock()
				req, err := wire.ParseRequest(d.Data)
				if err != nil {
					h.t.Errorf("request %q: %v", d.Data, err)
				}
				if text := answer(req); text != "" {
					conn.Send(wire.Message{Data: []byte(text), To: d.From})
				}
			}
		}
	})
	h.t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return f
}

// heard are the requests so far.
func (f *fake) heard() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.requests)
}

func (f *fake) count(cmd wire.Command) (n int) {
	for _, text := range f.heard() {
		if strings.Contains(text, fmt.Sprintf(`"cmd":%d,`, cmd)) {
			n++
		}
	}
	return n
}

// alwaysGrant answers like a server that leases one table to everybody.
func alwaysGrant(table uint32, seconds int64) func(wire.Request) string {
	return func(r wire.Request) string {
		if r.Cmd == wire.Release {
			return string(wire.Reply{}.Append(nil))
		}
		return string(wire.Reply{Table: table, Expires: wire.Seconds(wire.Now()) + seconds}.Append(nil))
	}
}

// askAt sends a datagram to the padded name and returns the answer, "" if none comes in
// time or nobody is there.
func (p *peer) askAt(name, datagram string, wait time.Duration) string {
	p.t.Helper()
	if errs := p.conn.Send(wire.Message{Data: []byte(datagram), To: padded(p.t, name)}); errs != nil {
		if errors.Is(errs[0], syscall.ECONNREFUSED) {
			return ""
		}
		p.t.Fatal(errs[0])
	}
	answer, err := p.receive(wait)
	if err != nil && !errors.Is(err, io.EOF) {
		p.t.Fatal(err)
	}
	return answer
}

// userBin is the client where any user may run it.
var userBin = sync.OnceValues(func() (string, error) {
	from, err := binDir()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "userbin")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(from, clientBin))
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, clientBin)
	return path, os.WriteFile(path, data, 0o755)
})

// clientWith runs the client through setpriv with the given words.
func (h *host) clientWith(setpriv string, args ...string) result {
	h.t.Helper()
	path, err := userBin()
	if err != nil {
		h.t.Fatal(err)
	}
	return h.run("setpriv", append(append(strings.Fields(setpriv), path), args...)...)
}

// command is the client, to be started.
func (h *host) command(args ...string) *exec.Cmd {
	h.t.Helper()
	return exec.Command(bin(h.t, clientBin), args...)
}

const (
	asStranger     = "--reuid 4711 --regid 4711 --clear-groups"
	withoutNetwork = "--bounding-set -net_admin --inh-caps -net_admin"
)

// shell runs a script; $CLIENT is the client with a log and debugging.
func (h *host) shell(script string) result {
	h.t.Helper()
	client := fmt.Sprintf("%s -l %s --debug", bin(h.t, clientBin), filepath.Join(h.dir, "client.log"))
	return h.run("sh", "-c", "CLIENT='"+client+"'\nDIR='"+h.dir+"'\n"+script)
}

// front starts the client with -f and returns it with the table that it prints.
func (h *host) front(args ...string) (*process, string) {
	h.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	defer w.Close()
	cmd := h.command(append([]string{"-f", "--debug"}, args...)...)
	cmd.Stdout = w
	p := h.start(cmd)
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		h.t.Fatal(err)
	}
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		h.t.Fatalf("table of %s: %v; it wrote:\n%s", cmd, err, p.log.String())
	}
	h.t.Cleanup(func() { r.Close() })
	return p, strings.TrimSuffix(line, "\n")
}

// waitClients waits until n client processes are there, and returns their pids.
func (h *host) waitClients(n int) (pids []int) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("clients are %d", n), func() error {
		if pids = h.pids(clientBin); len(pids) != n {
			return fmt.Errorf("clients: %d", pids)
		}
		return nil
	})
	return pids
}

// onlyClient is the pid of the one client process that is there.
func (h *host) onlyClient() int {
	h.t.Helper()
	return h.waitClients(1)[0]
}

// freeze stops a process, and waits until its last thread stands still.
func (h *host) freeze(pid int) {
	h.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, fmt.Sprintf("process %d is stopped", pid), func() error {
		for _, state := range status(h.t, pid, "State") {
			if !strings.HasPrefix(state, "T") {
				return errors.New(state)
			}
		}
		return nil
	})
}

// signalClients sends a signal to all clients of the host.
func (h *host) signalClients(sig syscall.Signal) {
	h.t.Helper()
	for _, pid := range h.pids(clientBin) {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			h.t.Fatal(err)
		}
	}
}

// waitNoClient waits until no client is left.
func (h *host) waitNoClient() {
	h.t.Helper()
	h.waitClients(0)
}

// waitClientLog waits until the clients' log has text n times.
func (h *host) waitClientLog(n int, text string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("the clients have logged %q %d times", text, n), func() error {
		if got := strings.Count(h.clientLog(), text); got < n {
			return fmt.Errorf("%d times", got)
		}
		return nil
	})
}

// monitor follows the IPv4 rules of the host as `ip monitor rule` shows them.
type monitor struct {
	h *host
	p *process
}

func (h *host) monitor() *monitor {
	h.t.Helper()
	m := &monitor{h, h.start(exec.Command("ip", "-d", "-4", "monitor", "rule"))}
	m.sync()
	return m
}

// sync waits until it has shown all that happened so far.
func (m *monitor) sync() {
	m.h.t.Helper()
	before := strings.Count(m.p.log.String(), "Deleted 32765:")
	eventually(m.h.t, "ip monitor shows rules", func() error {
		m.h.ns.IP(m.h.t, "rule add pref 32765 lookup 99")
		m.h.ns.IP(m.h.t, "rule del pref 32765 lookup 99")
		if strings.Count(m.p.log.String(), "Deleted 32765:") == before {
			return errors.New("not yet")
		}
		return nil
	})
}

// changes are what it showed, "Deleted" and all, with single spaces.
func (m *monitor) changes() []string {
	m.h.t.Helper()
	m.sync()
	var changes []string
	for line := range strings.Lines(m.p.log.String()) {
		line = strings.Join(strings.Fields(line), " ")
		if line != "" && !strings.Contains(line, "32765:") {
			changes = append(changes, line)
		}
	}
	return changes
}

// wantNeverWithout fails unless, while the changes were applied to the rules that stood
// before, one that matches was always there.
func (m *monitor) wantNeverWithout(what string, before []string, match func(rule string) bool) {
	m.h.t.Helper()
	n := 0
	for _, rule := range before {
		if match(rule) {
			n++
		}
	}
	changes := m.changes()
	for i, change := range changes {
		rule, deleted := strings.CutPrefix(change, "Deleted ")
		switch {
		case !match(rule):
		case deleted:
			n--
		default:
			n++
		}
		if n < 1 {
			m.h.t.Errorf("no rule %s after change %d of\n%s", what, i, strings.Join(changes, "\n"))
			return
		}
	}
}

// status is a field of /proc/PID/status of each thread of a process.
func status(t *testing.T, pid int, field string) []string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %q, %v", pid, files, err)
	}
	var values []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that ended
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, field+":"); ok {
				values = append(values, strings.TrimSpace(value))
			}
		}
	}
	return values
}

// together runs many commands at once to their ends.
func (h *host) together(cmds []*exec.Cmd) []result {
	h.t.Helper()
	outs := make([]struct{ stdout, stderr bytes.Buffer }, len(cmds))
	errs := make([]error, len(cmds))
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	for i, cmd := range cmds {
		cmd.Stdout, cmd.Stderr = &outs[i].stdout, &outs[i].stderr
		all.Go(func() {
			if errs[i] = h.ns.Start(cmd); errs[i] == nil {
				stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // it may have ended
				errs[i] = cmd.Wait()
				stop()
			}
		})
	}
	all.Wait()
	var results []result
	for i, cmd := range cmds {
		var exit *exec.ExitError
		if errs[i] != nil && !errors.As(errs[i], &exit) {
			h.t.Fatalf("%s: %v", cmd, errs[i])
		}
		results = append(results, result{outs[i].stdout.String(), outs[i].stderr.String(), cmd.ProcessState.ExitCode()})
	}
	return results
}
