package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/cgroup"
)

const (
	resolvConf   = "/etc/resolv.conf"
	resolvUplink = "uplink" // of --resolv: the name servers of the link
)

// giveResolv gives this process, and what it executes, a resolv.conf of its own in a mount namespace: a file, or the
// name servers of the link.
func giveResolv(what string, target cgroup.Uplink) error {
	before, err := os.ReadFile(resolvConf)
	if err != nil {
		return fmt.Errorf("--resolv: %w", err)
	}
	file := what
	if what == resolvUplink {
		servers, err := bind.Nameservers(target.Ifname)
		if err != nil {
			return err
		}
		if len(servers) == 0 {
			return fmt.Errorf("--resolv uplink: nobody said which name servers %s has (--nameserver, a hook, systemd-resolved): use --resolv FILE", target.Ifname)
		}
		if file, err = resolvFile(servers, string(before)); err != nil {
			return err
		}
		defer os.Remove(file) // the mount keeps it
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("--resolv: new mount namespace: %w", err)
	}
	// What the host mounts later appears here, too, and ours does not appear there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("--resolv: make mounts ours: %w", err)
	}
	if err := unix.Mount(file, resolvConf, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("--resolv: mount %s at %s: %w", file, resolvConf, err)
	}
	return nil
}

// resolvFile writes a file with name servers, and with the other lines of the host's.
func resolvFile(servers []netip.Addr, before string) (path string, err error) {
	var text strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&text, "nameserver %s\n", s)
	}
	for line := range strings.Lines(before) {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "search" || f[0] == "domain" || f[0] == "options") {
			text.WriteString(strings.TrimSuffix(line, "\n") + "\n")
		}
	}
	f, err := os.CreateTemp("/run", "table-allocator-resolv-")
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(text.String())
	return f.Name(), errors.Join(err, f.Chmod(0o644), f.Close())
}

// warnOfResolver says that the host's name servers are behind another link only, so that no name resolves.
func warnOfResolver(ifname string) {
	text, err := os.ReadFile(resolvConf)
	if err != nil {
		return // there are none
	}
	var servers []netip.Addr
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			if addr, err := netip.ParseAddr(f[1]); err == nil {
				servers = append(servers, addr)
			}
		}
	}
	link, err := bind.BehindOthers(ifname, servers)
	if err == nil && link != "" {
		warn(fmt.Sprintf("%s names %s, which is behind %s, so that names do not resolve: use --resolv uplink, or --resolv FILE", resolvConf, servers[0], link))
	}
}

// parseResolv reads the value of --resolv.
func parseResolv(text string) (string, error) {
	if text == resolvUplink {
		return text, nil
	}
	path, err := filepath.Abs(text)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: want uplink or a regular file", path)
	}
	return path, err
}
