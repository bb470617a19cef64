package install

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// systemd-resolved has one list of name servers for each link. resolvedDir has a file for each link, named by its index,
// with lines as for dnsmasq: they say which address of the link has which servers. Beside it is an empty file with the
// suffix told if the list that systemd-resolved has is ours.
const (
	resolvedDir = "/run/table-allocator/resolved"
	told        = ".told"
)

// resolvedSocket is open in the network namespace in which systemd-resolved runs. In another one its links are others.
const resolvedSocket = "/run/systemd/resolve/io.systemd.Resolve"

// resolvedLimit is how long a call of systemd-resolved may take, and how long a process that ends waits for it.
const resolvedLimit = 2 * time.Second

// serversFile is the file for resolver lines of the address: "" if it has to have none.
func (i *Installation) serversFile() string {
	switch i.Uplink.Settings.Resolver {
	case uplink.NoResolver:
		return ""
	case uplink.Resolved:
		return i.resolvedFile()
	}
	return i.Uplink.Settings.ServersFile
}

// resolvedFile is the file of the link. It is "" if a daemon that configures the link tells systemd-resolved.
func (i *Installation) resolvedFile() string {
	if i.Index == 0 {
		return ""
	}
	if manager := linkManager(i.Index); manager != "" {
		i.log.Debug("systemd-resolved is not told: another program tells it the name servers of the link", "program", manager)
		return ""
	}
	sockets, err := outside.ReadFile("/proc/net/unix")
	if err == nil && !bytes.Contains(sockets, []byte(resolvedSocket+"\n")) {
		err = fmt.Errorf("it does not run in this network namespace (%s is not open)", resolvedSocket)
	}
	i.warn("tell systemd-resolved", err)
	if err != nil {
		return ""
	}
	return filepath.Join(resolvedDir, strconv.Itoa(i.Index))
}

// linkManager names the daemon that configures a link and tells systemd-resolved; "" if there is none.
func linkManager(index int) string {
	if managedByNetworkManager(index) {
		return "NetworkManager"
	}
	state, err := readOutside(filepath.Join("/run/systemd/netif/links", strconv.Itoa(index)))
	if err == nil && !strings.Contains(string(state), "ADMIN_STATE=unmanaged\n") {
		return "systemd-networkd"
	}
	return ""
}

// SyncResolved tells systemd-resolved again if the name servers of the address are not there any more, of which there is
// no event. It leaves a link to a daemon that configures the link now.
func (i *Installation) SyncResolved() {
	if i.Uplink.Settings.Resolver != uplink.Resolved || !i.filled && i.Uplink.Settings.PlacesRoutes() {
		return
	}
	i.resolve()
	if i.ServersFile == "" {
		return
	}
	if linkManager(i.Index) != "" {
		i.ServersFile = ""
	}
	i.env.resolved.tell(filepath.Join(resolvedDir, strconv.Itoa(i.Index)), i.log)
}

// AdoptServers takes over resolver lines that the last holder of the address may have left.
func (i *Installation) AdoptServers() {
	file := i.Uplink.Settings.ServersFile
	if i.Uplink.Settings.Resolver == uplink.Resolved {
		file = filepath.Join(resolvedDir, strconv.Itoa(i.Index))
	}
	if HasServers(file) {
		i.ServersFile = file
	}
}

// InheritServers takes over what systemd-resolved was told for the former name of the link, which is the same link to it.
func (i *Installation) InheritServers(former *Installation) {
	if isOfResolved(former.ServersFile) {
		i.ServersFile, i.servers, former.ServersFile = former.ServersFile, former.servers, ""
	}
}

// removeResolved removes the name servers of an address from all links, or from the one of the key.
func (e *Env) removeResolved(u uplink.Uplink) error {
	files, err := outside.Ask(resolvedDir, outside.Limit, func() ([]os.DirEntry, error) {
		outside.Reach(resolvedDir)
		return os.ReadDir(resolvedDir)
	})
	if err != nil {
		return nil // nobody was told of any
	}
	for _, file := range files {
		index, err := strconv.Atoi(file.Name())
		if err != nil {
			continue
		}
		if link, found, err := e.Kernel.LinkByIndex(index); u.Key.Ifname != "" && err == nil && found && link.Name != u.Key.Ifname {
			continue // of another link, which may have the address now
		}
		l := lines{file: filepath.Join(resolvedDir, file.Name()), addr: u.Addr(), log: e.Log.With("addr", u.Key.Address)}
		if err := e.setLines(l); err != nil {
			return err
		}
	}
	return nil
}

// teller tells systemd-resolved the name servers of links, one link at a time, in a goroutine of its own: nothing waits for
// systemd-resolved. The zero teller is ready.
type teller struct {
	mu      sync.Mutex
	due     []string // files of links
	logs    map[string]*slog.Logger
	running bool
	done    sync.WaitGroup
}

// tell has systemd-resolved told what a file says.
func (t *teller) tell(file string, log *slog.Logger) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Contains(t.due, file) {
		t.due = append(t.due, file)
	}
	if t.logs == nil {
		t.logs = make(map[string]*slog.Logger)
	}
	t.logs[file] = log
	if !t.running {
		t.running = true
		t.done.Go(t.run)
	}
}

// next returns the file that is due, and who logs of it. It ends the goroutine if there is none.
func (t *teller) next() (file string, log *slog.Logger) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.due) == 0 {
		t.running, t.logs = false, nil
		return "", nil
	}
	file, t.due = t.due[0], t.due[1:]
	return file, t.logs[file]
}

func (t *teller) run() {
	for file, log := t.next(); log != nil; file, log = t.next() {
		if err := tellResolved(file); err != nil {
			log.Warn("cannot tell systemd-resolved the name servers", "file", file, "err", err)
		}
	}
}

// wait waits until all is told, and resolvedLimit at most.
func (t *teller) wait() {
	told := make(chan struct{})
	go func() {
		t.done.Wait()
		close(told)
	}()
	select {
	case <-told:
	case <-time.After(resolvedLimit): // the process ends, and with it the goroutine
	}
}

// tellResolved tells systemd-resolved what a file of resolvedDir says, unless a daemon configures the link now, or another
// program has told name servers of the link: those stay until that program takes them back. Another process may write to
// the file meanwhile, and be faster: so the file is read again after each call.
func tellResolved(file string) error {
	index, err := strconv.Atoi(filepath.Base(file))
	if err != nil {
		return err
	}
	if linkManager(index) != "" {
		return removeResolvedFiles(file)
	}
	const rounds = 5
	for range rounds {
		text, err := remember.ReadFile(file)
		if err != nil {
			return nil // all is told, and the file was removed
		}
		want := serversOf(text)
		have, others, err := resolvedServers(index)
		_, err2 := os.Stat(file + told)
		ours := err2 == nil
		switch {
		case len(want) == 0 && (err != nil || !ours || len(have) == 0): // the link has gone, or there is nothing of ours
			return removeIfEmpty(file)
		case err != nil:
			return err
		case !ours && (len(have) > 0 || others), slices.Equal(have, want) && !others:
			return nil
		}
		if err := os.WriteFile(file+told, nil, 0o644); err != nil {
			return err
		}
		if _, err := resolvectl(index, cmp.Or(strings.Join(want, " "), " ")); err != nil {
			if !ours {
				err = errors.Join(err, os.Remove(file+told))
			}
			return err
		}
	}
	return fmt.Errorf("systemd-resolved has another list of name servers for link %d after each of %d calls", index, rounds)
}

// resolvedServers are the name servers that systemd-resolved has for a link. others reports whether there are some that are
// never of ours: with a port or a name.
func resolvedServers(index int) (servers []string, others bool, err error) {
	out, err := resolvectl(index, "")
	_, list, _ := strings.Cut(out, "): ") // Link 2 (wan1): 192.0.2.53
	fields := strings.Fields(list)
	servers = withoutZones(fields)
	return servers, len(servers) < len(fields), err
}

// serversOf returns the name servers in resolver lines, each once.
func serversOf(text []byte) (servers []string) {
	for line := range strings.Lines(string(text)) {
		server, ok := strings.CutPrefix(strings.TrimSpace(line), "server=")
		if server, _, _ = strings.Cut(server, "@"); ok && !slices.Contains(servers, server) {
			servers = append(servers, server)
		}
	}
	return withoutZones(servers)
}

// withoutZones drops the zone of link-local addresses, which is the link that systemd-resolved is told of.
func withoutZones(servers []string) (bare []string) {
	for _, server := range servers {
		server, _, _ = strings.Cut(server, "%")
		if _, err := netip.ParseAddr(server); err == nil {
			bare = append(bare, server)
		}
	}
	return bare
}

// resolvectl sets the name servers of a link to a list, " " for none, or with "" prints those that it has.
func resolvectl(index int, list string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), resolvedLimit)
	defer cancel()
	args := []string{"dns", strconv.Itoa(index)}
	if servers := strings.Fields(list); list != "" && len(servers) == 0 {
		args = append(args, "")
	} else {
		args = append(args, servers...)
	}
	cmd := exec.CommandContext(ctx, "resolvectl", args...)
	cmd.WaitDelay = resolvedLimit
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("resolvectl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), err
}

// removeIfEmpty removes the file of a link that has no name servers of ours any more: others may tell of it now.
func removeIfEmpty(file string) error {
	unlock, err := remember.Lock(resolverLock)
	if err != nil {
		return nil // another process writes to it
	}
	defer unlock()
	if text, err := remember.ReadFile(file); err != nil || len(text) > 0 {
		return nil // others have lines in it
	}
	return removeResolvedFiles(file)
}

func removeResolvedFiles(file string) error {
	for _, path := range []string{file, file + told} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func isOfResolved(file string) bool { return filepath.Dir(file) == resolvedDir }
