package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// providers are three, two of which have the same network and the same gateway.
var providers = []provider{
	{ifname: "wan0", network: "192.168.1.0/24", gateway: "192.168.1.1", customers: "192.168.1.0/25", nat: true},
	{ifname: "wan1", network: "192.168.1.0/24", gateway: "192.168.1.1", customers: "192.168.1.128/25", nat: true},
	{ifname: "wan2", network: "10.64.2.0/24", gateway: "10.64.2.1", customers: "10.64.2.0/24", nat: true},
}

// site is a host behind providers with an /etc, /run and /var/lib of its own. The commands and hooks are
// there as "make install" installs them.
type site struct {
	*uplinks
	mounts string // its mount namespace
}

// newSite makes a site behind all providers, with IPv4. Its links are up and have no addresses. settings
// are lines of /etc/default/table-allocator.
func newSite(t *testing.T, settings ...string) *site {
	t.Helper()
	image, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	s := &site{uplinks: newHost(t).behind(some(len(providers), false)...)}
	sysctl(t, s.ns, "net/ipv6/conf/all/disable_ipv6", "1") // IPv6 sends packets by itself
	s.enclose(image)
	s.configure(settings...)
	return s
}

// some are the first n providers, with IPv6 if inet6 is set.
func some(n int, inet6 bool) []provider {
	isps := slices.Clone(providers[:n])
	for i := range isps {
		isps[i].customers6 = block6(i).String()
		if inet6 {
			isps[i].routers6 = []string{router6 + "/64", router6At(i, 0) + "/64", router6At(i, 1) + "/64"}
		}
	}
	return isps
}

// configure writes /etc/default/table-allocator.
func (s *site) configure(settings ...string) {
	s.t.Helper()
	settings = append([]string{
		"CLIENT_OPTIONS='--debug --log-path " + filepath.Join(s.dir, "client.log") + "'",
		"export GORACE=atexit_sleep_ms=0", // dhclient clears the environment of its script
	}, settings...)
	s.write("/etc/default/table-allocator", strings.Join(settings, "\n")+"\n")
}

func sysctl(t *testing.T, ns *nettest.Namespace, name, value string) {
	t.Helper()
	ns.Do(func() {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	})
}

// installed runs "make install" once for all tests. The files of /usr/local are installed in the sandbox.
// Those of /etc and the hook of dhcpcd would change other tests, so they are in a directory, image.
var installed = sync.OnceValues(func() (image string, err error) {
	dir, err := binDir()
	if err != nil {
		return "", err
	}
	if image, err = os.MkdirTemp("", "image"); err != nil {
		return "", err
	}
	const script = `make -C ../.. install "BIN=$1" "DESTDIR=$2" && cp -a "$2/usr/local/." /usr/local`
	if out, err := exec.Command("sh", "-c", script, "sh", dir, image).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make install: %w\n%s", err, out)
	}
	return image, nil
})

// enclose gives the site its own directories. /etc is a copy with the files of image, the others are empty.
func (s *site) enclose(image string) {
	s.t.Helper()
	const script = `set -e
		mkdir -p "$0/etc"
		mount -t tmpfs etc "$0/etc"
		cp -a /etc/. "$0/etc"
		cp -a "$1/etc/." "$0/etc"
		mount --move "$0/etc" /etc
		if [ -d "$1/usr/lib/dhcpcd" ]; then
			mkdir -p "$0/dhcpcd"
			mount -t tmpfs dhcpcd "$0/dhcpcd"
			cp -a /usr/lib/dhcpcd/. "$0/dhcpcd"
			cp -a "$1/usr/lib/dhcpcd/." "$0/dhcpcd"
			mount --move "$0/dhcpcd" /usr/lib/dhcpcd
		fi
		mount -t tmpfs run /run
		mount -t tmpfs lib /var/lib
		mkdir -p /run/lock /run/network /run/dbus /run/udev /var/lib/dhcp /var/lib/NetworkManager /var/lib/misc
		mount -t sysfs -o ro sysfs /sys
		echo ready
		exec sleep infinity`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script, s.dir, image)
	p := s.start(cmd)
	p.waitLog("ready")
	s.mounts = fmt.Sprintf("/proc/%d/ns/mnt", cmd.Process.Pid)
	s.t.Cleanup(s.end) // runs before the end of the process, which holds the mounts
}

// end kills what the test left running on the site, and logs the state of the network if it failed.
func (s *site) end() {
	if s.t.Failed() {
		for _, args := range []string{"address", "rule", "route show table all", "-s link"} {
			out, _ := s.ns.Output("ip", strings.Fields(args)...) // an error is in out
			s.t.Logf("ip %s:\n%s", args, out)
		}
	}
	for _, pid := range sharing(s.t, s.mounts, "mnt") {
		_ = syscall.Kill(pid, syscall.SIGKILL) // the process may have ended
	}
}

// inside is a command line that runs on the site.
func (s *site) inside(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--mount=" + s.mounts, name}, args...)...)
}

// sh runs a script that has to succeed on the site, and returns its stdout.
func (s *site) sh(script string, args ...string) string {
	s.t.Helper()
	r := s.try(script, args...)
	if r.code != 0 {
		s.t.Fatalf("%s %q: exit code %d\nstdout: %s\nstderr: %s", script, args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// try is sh for a script that may fail.
func (s *site) try(script string, args ...string) result {
	s.t.Helper()
	cmd := s.inside("sh", append([]string{"-c", script, "sh"}, args...)...)
	return s.run(cmd.Args[0], cmd.Args[1:]...)
}

// daemon starts a program on the site.
func (s *site) daemon(name string, args ...string) *process {
	s.t.Helper()
	return s.start(s.inside(name, args...))
}

// write writes a file of the site, and makes its directory.
func (s *site) write(path, text string) {
	s.t.Helper()
	s.sh(`mkdir -p "${1%/*}" && printf %s "$2" >"$1"`, path, text)
}

// read returns a file of the site; "" if there is none.
func (s *site) read(path string) string {
	s.t.Helper()
	return s.sh(`[ ! -e "$1" ] || cat "$1"`, path)
}

// waitAwaited waits until the only rule of an address is the one that blocks it.
func (s *site) waitAwaited(addr string) {
	s.t.Helper()
	eventually(s.t, addr+" is awaited", func() error {
		return unorderedError(s.rulesFrom(addr), []string{awaited(addr)})
	})
}

// awaited is the rule that blocks an address while a client waits for it to come back: no packet from
// it leaves by another uplink.
func awaited(addr string) string { return "10001: from " + addr + " unreachable proto 116" }

// waitGone waits until an address has no lease, rules, routes and resolver lines.
func (s *site) waitGone(addr string) {
	s.t.Helper()
	eventually(s.t, "nothing is left of "+addr, func() error {
		if err := s.left(addr); err != nil {
			return err
		}
		if err := unorderedError(s.rulesFrom(addr), nil); err != nil {
			return err
		}
		if servers := s.read("/run/table-allocator/dnsmasq.servers"); strings.Contains(servers, "@"+addr+"\n") {
			return fmt.Errorf("resolver lines:\n%s", servers)
		}
		return nil
	})
}

// waitServers waits until the resolver lines are these.
func (s *site) waitServers(want ...string) {
	s.t.Helper()
	eventually(s.t, "the resolver lines are there", func() error {
		if diff := unordered(strings.Fields(s.read("/run/table-allocator/dnsmasq.servers")), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}
