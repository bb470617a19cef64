package netns

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/remember"
)

const resolvConf = "/etc/resolv.conf"

// maxResolv is how much of a resolv.conf is read, in bytes.
const maxResolv = 64 << 10

// errNoServers says that nobody knows the name servers of a link.
var errNoServers = errors.New("nobody said which name servers it has (--nameserver, a hook, systemd-resolved): use --resolv ADDRESS,... or --resolv FILE")

// resolv returns the content of a namespace's resolv.conf.
func (m memory) resolv(c Config) (text string, err error) {
	host, err := os.ReadFile(resolvConf)
	if err != nil {
		return "", noPlace(err)
	}
	if strings.HasPrefix(c.Resolv, "/") {
		return copyOf(c.Resolv)
	}
	if c.Resolv == Uplink || c.Resolv == VPN {
		if given := filepath.Join("/etc/netns", c.Name, "resolv.conf"); exists(given) {
			return copyOf(given)
		}
		servers, err := m.vpnServers(c.Name)
		if c.Resolv == Uplink {
			servers, err = bind.Nameservers(c.Ifname)
		}
		if err != nil {
			return "", err
		}
		if len(servers) == 0 {
			return "", fmt.Errorf("the name servers of %s: %w", c.Ifname, errNoServers)
		}
		return resolvText(servers, string(host)), nil
	}
	servers, err := parseServers(c.Resolv)
	return resolvText(servers, string(host)), err
}

// noPlace says what to do if the host has no file in whose place programs get that of their namespace.
func noPlace(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("this host has no " + resolvConf + ", or it is a link to nothing, and programs get their own in its place: make one, which may be empty")
	}
	return err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// resolvText has name servers, and the other lines of the host's file.
func resolvText(servers []netip.Addr, host string) string {
	var text strings.Builder
	for _, s := range servers {
		if !s.IsLoopback() { // that of the host is not reached
			fmt.Fprintf(&text, "nameserver %s\n", s)
		}
	}
	for line := range strings.Lines(host) {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "search" || f[0] == "domain" || f[0] == "options") {
			text.WriteString(strings.TrimSuffix(line, "\n") + "\n")
		}
	}
	return text.String()
}

func copyOf(path string) (string, error) {
	path, err := remember.RootsFile(path)
	if err != nil {
		return "", err
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxResolv))
	return string(text), err
}

// writeResolv writes a namespace's resolv.conf into the file that is mounted there, so that programs that run see it.
func (m memory) writeResolv(name, text string) error {
	path := m.resolvFile(name)
	if have, err := os.ReadFile(path); err == nil && string(have) == text {
		return nil
	}
	if err := m.dir.Make(); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644) // whatever the umask is
}
