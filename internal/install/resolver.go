package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// dnsmasqPIDFiles are where dnsmasq of a distribution, and by default, leaves its pid.
var dnsmasqPIDFiles = []string{"/run/dnsmasq/dnsmasq.pid", "/run/dnsmasq.pid"}

// lines are what a servers-file of dnsmasq has to say of an address.
type lines struct {
	file    string
	addr    netip.Addr
	servers []netip.Addr // none: no line
	own     []netip.Addr // that this installation has lines for
	shared  bool         // another client has the address on another link: its lines stay
	pidFile string       // of the dnsmasq that reads the file; empty: the usual one
	late    bool         // they may have been written after nobody waited for that any more
	log     *slog.Logger
}

// Lines that another process of ours keeps from being written are tried again after retryIn, then
// after twice as long, up to retryMost.
const (
	retryIn   = 10 * time.Millisecond
	retryMost = 7 // times twice: 1.28 s
)

// resolverLock is the lock of all servers-files. Others are of cgroups, whose numbers are above it.
const resolverLock = 0

// readOutside reads a file of another program, and waits for its file system as outside.Ask does.
func readOutside(path string) ([]byte, error) {
	return outside.Ask(filepath.Dir(path), outside.Limit, func() ([]byte, error) {
		outside.Reach(filepath.Dir(path))
		return remember.ReadFile(path)
	})
}

// HasServers reports whether there is a servers-file, which may have lines of ours.
func HasServers(file string) bool {
	if file == "" {
		return false
	}
	_, err := outside.Ask(filepath.Dir(file), outside.Limit, func() (fs.FileInfo, error) {
		outside.Reach(filepath.Dir(file))
		return os.Stat(file)
	})
	return err == nil
}

// setLines writes lines and has dnsmasq read them. While another process of ours writes to the file, or its file system
// does not answer, Retry will do it.
func (e *Env) setLines(l lines) error {
	e.waiting = slices.DeleteFunc(e.waiting, func(w lines) bool { return w.file == l.file && w.addr == l.addr })
	changed, err := outside.Ask(filepath.Dir(l.file), outside.Limit, l.write)
	changed = changed || l.late
	if errors.Is(err, remember.ErrBusy) || errors.Is(err, outside.ErrSilent) {
		l.late = l.late || errors.Is(err, outside.ErrSilent)
		e.waiting, e.waitsFor = append(e.waiting, l), err
		if e.RetryAt == 0 {
			e.RetryAt = wire.Now() + retryIn<<min(e.tries, retryMost)
		}
		return nil
	}
	if changed {
		l.log.Info("resolver lines written", "file", l.file, "servers", len(l.servers))
		if isOfResolved(l.file) {
			e.resolved.tell(l.file, l.log)
			return err
		}
		err = errors.Join(err, tellDnsmasq(l.pidFile))
	}
	return err
}

// Retry writes the lines that wait.
func (e *Env) Retry() {
	e.RetryAt = 0
	if e.tries++; e.tries == retryMost {
		e.Log.Warn("resolver lines wait", "err", e.waitsFor)
	}
	for _, l := range slices.Clone(e.waiting) {
		if err := e.setLines(l); err != nil {
			l.log.Warn("cannot write the resolver lines", "file", l.file, "err", err)
		}
	}
	if len(e.waiting) == 0 {
		e.tries = 0
	}
}

// Close tries for a second to write the lines that wait, and waits for systemd-resolved with a limit.
func (e *Env) Close() {
	defer e.resolved.wait()
	for tries := time.Duration(0); len(e.waiting) > 0; tries++ {
		if tries == time.Second/retryIn {
			e.Log.Error("resolver lines not written", "err", e.waitsFor)
			return
		}
		time.Sleep(retryIn)
		e.Retry()
	}
}

// write makes the lines of the address in a servers-file of dnsmasq those for servers, and
// reports whether that changed the file. A line names the source address of queries, and
// the rule from there chooses the uplink; every dnsmasq reads this form, while the place
// of an interface behind it differs between versions.
func (l lines) write() (changed bool, err error) {
	if l.shared && slices.Equal(l.own, l.servers) {
		return false, nil
	}
	outside.Reach(filepath.Dir(l.file))
	if err := os.MkdirAll(filepath.Dir(l.file), 0o755); err != nil {
		return false, fmt.Errorf("resolver lines: %w", err)
	}
	// The holders of other addresses write to the file, too. Where there can be no lock, as with a
	// /run that cannot be written to, the lines are worth more.
	unlock, err := remember.Lock(resolverLock)
	if errors.Is(err, remember.ErrBusy) || errors.Is(err, outside.ErrSilent) {
		return false, err
	}
	if err == nil {
		defer unlock()
		if err := remember.RemoveTemp(l.file); err != nil {
			return false, fmt.Errorf("resolver lines: %w", err)
		}
	}
	before, err := remember.ReadFile(l.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("resolver lines: %w", err)
	}
	after := l.after(before)
	if bytes.Equal(before, after) {
		return false, nil
	}
	if err := remember.ReplaceFile(l.file, after, 0o644); err != nil {
		return true, fmt.Errorf("resolver lines: %w", err)
	}
	return true, nil
}

// after is what the file has to say that said before.
func (l lines) after(before []byte) (after []byte) {
	suffix := "@" + l.addr.String()
	line := func(server netip.Addr) string { return "server=" + server.String() + suffix }
	if !l.shared && slices.Equal(l.present(before, suffix), l.servers) {
		return before
	}
	own := make(map[string]int)
	for _, s := range l.own {
		own[line(s)]++
	}
	for text := range bytes.Lines(before) {
		trimmed := strings.TrimSpace(string(text))
		switch {
		case !strings.HasPrefix(trimmed, "server=") || !strings.HasSuffix(trimmed, suffix):
		case !l.shared:
			continue
		case own[trimmed] > 0: // the other client may have the same line
			own[trimmed]--
			continue
		}
		if after = append(after, text...); after[len(after)-1] != '\n' {
			after = append(after, '\n')
		}
	}
	for _, s := range l.servers {
		after = append(after, line(s)+"\n"...)
	}
	return after
}

// present are the servers in the lines of the address.
func (l lines) present(text []byte, suffix string) (servers []netip.Addr) {
	for line := range strings.Lines(string(text)) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "server=")
		if rest, own := strings.CutSuffix(rest, suffix); ok && own {
			server, _ := netip.ParseAddr(rest) // a line of others is no server of ours
			servers = append(servers, server)
		}
	}
	return servers
}

// tellDnsmasq makes a dnsmasq that runs read its servers-file again. None is no error: it
// reads the file when it starts.
func tellDnsmasq(pidFile string) error {
	files := dnsmasqPIDFiles
	if pidFile != "" {
		files = []string{pidFile}
	}
	for _, file := range files {
		text, err := readOutside(file)
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || pid <= 1 {
			return fmt.Errorf("tell dnsmasq: %s holds no pid", file)
		}
		// The file of a dnsmasq that died may name a process of somebody else by now.
		comm, err := outside.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil || strings.TrimSpace(string(comm)) != "dnsmasq" {
			continue
		}
		if err := unix.Kill(pid, unix.SIGHUP); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("tell dnsmasq (pid %d): %w", pid, err)
		}
		return nil
	}
	return nil
}
