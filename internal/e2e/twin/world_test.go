package twin

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// world is a made-up host twice: real, with the product, and plain, without it. Both get the same
// commands.
type world struct {
	host        *host
	dir         string
	real, plain *namespace
	heard       *socket // of what changes in real
	server      *process
	watch       []*process
	clients     map[netip.Addr]client // those that were started
	log         *logBuffer            // of all watches
	refused     []string              // commands that only the real host refused
	again       []string              // commands that the plain host refused: a manager tries again, see tryAgain
	unrestored  map[string]bool       // links of routes that nobody could put back into main, so that tables keep them
	unwatched   map[string]bool       // places of defaults that came while the watch was dead, see knowable
	had         had
	patience    []time.Duration
	wanted      string // the link that a user wants, see chosen_test.go
}

// newWorld builds a host, with the server and without the watch.
func newWorld(h *host) (w *world, err error) {
	w = &world{host: h, log: newLog(), unrestored: make(map[string]bool), had: had{ways: make(map[way]bool)}}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.dir, err = os.MkdirTemp("", "twin"); err != nil {
		return w, err
	}
	if w.real, err = newNamespace("real"); err != nil {
		return w, err
	}
	if w.plain, err = newNamespace("plain"); err != nil {
		return w, err
	}
	if w.heard, err = dial(w.real.Namespace, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE); err != nil {
		return w, err
	}
	if w.server, err = w.startServer(); err != nil {
		return w, err
	}
	return w, w.apply(step{commands: h.buildCommands()})
}

func (w *world) close() {
	w.killWatch()
	if w.server != nil {
		w.server.kill()
	}
	for _, n := range []*namespace{w.real, w.plain} {
		if n != nil {
			n.close()
		}
	}
	if w.heard != nil {
		w.heard.close()
	}
	_ = os.RemoveAll(w.dir) // what is left goes with the sandbox
}

// apply carries a step out on both: what the plain host refuses to add nobody asks of the real one,
// and what that refuses alone is wrong.
func (w *world) apply(s step) error {
	if len(s.commands) == 0 {
		return nil
	}
	if w.host.watch.Routes == "move" {
		return w.applyMoved(s)
	}
	failed, err := w.plain.run(s.commands)
	if err != nil {
		return err
	}
	var asked, mayFail []int
	for i, c := range s.commands {
		switch {
		case !slices.Contains(failed, i):
			asked = append(asked, i)
		case strings.Contains(c, " del "): // of several next hops some may be gone
			asked, mayFail = append(asked, i), append(mayFail, i)
			w.goneBefore(s, c)
		default:
			w.again = append(w.again, c)
		}
	}
	commands := make([]string, len(asked))
	for k, i := range asked {
		commands[k] = s.commands[i]
	}
	failed, err = w.real.run(commands)
	for _, k := range failed {
		if !slices.Contains(mayFail, asked[k]) {
			w.refused = append(w.refused, commands[k])
		}
	}
	return err
}

// goneBefore takes over that a command of a step could not delete a route. It went with the last address of its link: nobody
// puts it back, and if that address comes again at once, the table keeps it.
func (w *world) goneBefore(s step, command string) {
	if s.phase != eachChange && strings.HasPrefix(command, "ip route del ") {
		w.giveUp(command)
	}
}

// tryAgain does what managers do: a route or nexthop that the kernel refused right after its link came up they add a
// moment later. What nobody puts back into main a table keeps, as it should.
func (w *world) tryAgain() error {
	again := w.again
	w.again = nil
	for _, c := range again {
		if !strings.HasPrefix(c, "ip route ") && !strings.HasPrefix(c, "ip -6 route ") && !strings.HasPrefix(c, "ip nexthop ") {
			continue
		}
		failed, err := w.plain.run([]string{c})
		if len(failed) > 0 {
			w.giveUp(c)
		}
		if err == nil && len(failed) == 0 {
			if failed, err = w.real.run([]string{c}); len(failed) > 0 {
				w.refused = append(w.refused, c)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *world) startServer() (*process, error) {
	config := filepath.Join(w.dir, "server.json")
	text := fmt.Sprintf(`{"db_path": %q, "num_tables": 400}`, filepath.Join(w.dir, "leases.db"))
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	return w.start(newLog(), "msg=serving", "table-allocator-server", "-c", config)
}

// startWatch starts the watch, or the clients of the addresses that there are, and waits until it
// follows the kernel, or they have their tables.
func (w *world) startWatch() error {
	w.unwatched = nil
	if w.host.watch.clients {
		return w.startClients()
	}
	config := filepath.Join(w.dir, "watch.json")
	if err := os.WriteFile(config, []byte(w.host.watch.config()), 0o644); err != nil {
		return err
	}
	p, err := w.start(w.log, "msg=watching", "table-allocator-client", "watch", "--clean", "-c", config)
	w.watch = []*process{p}
	return err
}

func (w *world) startClients() error {
	addresses, err := w.real.addresses()
	if err != nil {
		return err
	}
	names, err := w.real.linkNames()
	if err != nil {
		return err
	}
	if err := w.release(addresses, names); err != nil {
		return err
	}
	had := w.clients
	w.watch, w.clients = nil, make(map[netip.Addr]client)
	for _, a := range addresses {
		if a.index == 1 || !a.addr.IsGlobalUnicast() {
			continue
		}
		if _, again := had[a.addr]; !again && !w.host.watch.selects(names[a.index]) { // a link may have another name since
			continue
		}
		if _, started := w.clients[a.addr]; started {
			continue // of two lengths one client is enough
		}
		args := w.host.watch.client(a.addr, a.network.Bits(), names[a.index])
		p, err := w.start(w.log, `: has table `, "table-allocator-client", args...)
		if err != nil {
			return err
		}
		w.watch, w.clients[a.addr] = append(w.watch, p), client{a.index, names[a.index], a.network.Bits()}
	}
	return nil
}

// client is what a client was started for, but for its address.
type client struct {
	index  int
	ifname string
	bits   int
}

// release takes back what killed clients left of addresses that have gone meanwhile, as hooks do, which know links by the
// names that these have now.
func (w *world) release(there []address, names map[int]string) error {
	dir, err := commands()
	if err != nil {
		return err
	}
	for addr, c := range w.clients {
		if slices.ContainsFunc(there, func(a address) bool { return a.addr == addr }) {
			continue
		}
		args := append([]string{"--release"}, w.host.watch.client(addr, c.bits, cmp.Or(names[c.index], c.ifname))[1:]...) // but for -f
		if out, err := w.real.Output(filepath.Join(dir, "table-allocator-client"), args...); err != nil {
			return fmt.Errorf("release the lease of %s: %w\n%s", addr, err, out)
		}
	}
	return nil
}

// killWatch is kill -9.
func (w *world) killWatch() {
	w.unwatched = make(map[string]bool)
	for _, p := range w.watch {
		p.kill()
	}
}

// stopWatch ends the watch, or the clients, which take everything back.
func (w *world) stopWatch() error {
	for _, p := range w.watch {
		if err := p.stop(); err != nil {
			return err
		}
	}
	w.watch = nil
	return nil
}

// state is what somebody wants to see of a real host that is wrong.
func (w *world) state() string {
	dir, err := commands()
	if err != nil {
		return err.Error()
	}
	out, err := w.real.Output("sh", "-c", `ip rule; ip -6 rule
		ip -4 route show table all | grep -v 'table local'; ip -6 route show table all | grep -v 'table local'
		"$0" status --json`, filepath.Join(dir, "table-allocator-client"))
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) { // status also tells by its exit code that something is wrong
		out += err.Error()
	}
	return out
}

// settle waits until nothing has changed in the real namespace for a time.
func (w *world) settle(quiet time.Duration) error {
	for {
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(w.heard.fd), Events: unix.POLLIN}}, int(quiet.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for events: %w", err)
		}
		if ready == 0 {
			return nil
		}
		n, _, err := unix.Recvfrom(w.heard.fd, w.heard.buf, unix.MSG_DONTWAIT)
		switch {
		case err == nil:
			w.had.note(w.heard.buf[:n])
		case errors.Is(err, unix.ENOBUFS):
			w.had.all = true // nobody knows what is missing
		case !errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("receive events: %w", err)
		}
	}
}

// process is one of the product's commands.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// deadline is how long a command may take to start or to end. It measures nothing.
const deadline = time.Minute

// start runs a command in the real namespace and waits until it has logged text.
func (w *world) start(log *logBuffer, text, name string, args ...string) (*process, error) {
	dir, err := commands()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(filepath.Join(dir, name), args...), done: make(chan struct{})}
	said := log.expect(text)
	p.cmd.Stderr = log
	p.cmd.Env = append(os.Environ(), "GOMAXPROCS=1") // many run at once, for a moment each
	if err := w.real.Start(p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // the state says how it ended
		close(p.done)
	}()
	select {
	case <-said:
		return p, nil
	case <-p.done:
		return nil, fmt.Errorf("%s ended at once:\n%s", name, log)
	case <-time.After(deadline):
		p.kill()
		return nil, fmt.Errorf("%s does not say %q:\n%s", name, text, log)
	}
}

func (p *process) kill() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// stop ends a process as an administrator does.
func (p *process) stop() error {
	err := p.cmd.Process.Signal(syscall.SIGTERM)
	if err != nil && !errors.Is(err, os.ErrProcessDone) { // as a client's is whose address went
		return fmt.Errorf("end %s: %w", p.cmd.Path, err)
	}
	select {
	case <-p.done:
	case <-time.After(deadline):
		return fmt.Errorf("%s does not end", p.cmd.Path)
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("%s: %s", p.cmd.Path, p.cmd.ProcessState)
	}
	return nil
}

// logBuffer keeps what a process writes.
type logBuffer struct {
	mu     sync.Mutex
	text   []byte
	seen   int // how much of text is behind what was expected last
	want   string
	wanted chan struct{}
}

func newLog() *logBuffer { return &logBuffer{} }

// expect returns a channel that is closed when text is written from now on.
func (l *logBuffer) expect(text string) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen, l.want, l.wanted = len(l.text), text, make(chan struct{})
	return l.wanted
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	if l.wanted != nil && strings.Contains(string(l.text[l.seen:]), l.want) {
		close(l.wanted)
		l.wanted = nil
	}
	return len(b), nil
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// commands is the folder with the product's commands.
var commands = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("TABLE_ALLOCATOR_STATIC_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "bin")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/", "../../../cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the commands: %w\n%s", err, out)
	}
	return dir, nil
})
