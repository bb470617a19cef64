package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
)

// dnsmasqPIDFiles are where dnsmasq of a distribution, and by default, leaves its pid.
var dnsmasqPIDFiles = []string{"/run/dnsmasq/dnsmasq.pid", "/run/dnsmasq.pid"}

// setServers makes the lines of addr in a servers-file of dnsmasq those for servers, and
// reports whether that changed the file. A line names the source address of queries, and
// the rule from there chooses the uplink; every dnsmasq reads this form, while the place
// of an interface behind it differs between versions.
func setServers(path string, addr netip.Addr, servers []netip.Addr) (changed bool, err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, fmt.Errorf("resolver lines: %w", err)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return false, fmt.Errorf("resolver lines: %w", err)
	}
	defer unlock()
	before, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("resolver lines: %w", err)
	}
	suffix := "@" + addr.String()
	var after []byte
	for line := range bytes.Lines(before) {
		text := strings.TrimSpace(string(line))
		if strings.HasPrefix(text, "server=") && strings.HasSuffix(text, suffix) {
			continue
		}
		if after = append(after, line...); after[len(after)-1] != '\n' {
			after = append(after, '\n')
		}
	}
	for _, s := range servers {
		after = append(after, "server="+s.String()+suffix+"\n"...)
	}
	if bytes.Equal(before, after) {
		return false, nil
	}
	if err := remember.ReplaceFile(path, after, 0o644); err != nil {
		return true, fmt.Errorf("resolver lines: %w", err)
	}
	return true, nil
}

// lockDir keeps the holders of other addresses from losing each other's lines.
func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if err == nil {
			return func() { d.Close() }, nil
		}
		if !errors.Is(err, unix.EINTR) {
			d.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
	}
}

// tellDnsmasq makes a dnsmasq that runs read its servers-file again. None is no error: it
// reads the file when it starts.
func tellDnsmasq(pidFile string) error {
	files := dnsmasqPIDFiles
	if pidFile != "" {
		files = []string{pidFile}
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil || pid <= 1 {
			return fmt.Errorf("tell dnsmasq: %s holds no pid", file)
		}
		// The file of a dnsmasq that died may name a process of somebody else by now.
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
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
