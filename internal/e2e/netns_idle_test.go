package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// changingCalls are system calls that may change something; aChange is how strace shows one that does.
const changingCalls = "trace=openat,sendto,sendmsg,sendmmsg,execve,mount,umount2,open_tree,move_mount,unlinkat,renameat,renameat2,mkdirat,symlinkat,fchmodat"

var aChange = regexp.MustCompile(`openat\(.*O_(WRONLY|RDWR|CREAT|TRUNC)|type=RTM_(NEW|DEL|SET)|NFT_MSG_(NEW|DEL)|(exec|mount|unlink|rename|mkdir|symlink|fchmod)[a-z0-9]*\(`)

// changesOf are the system calls in the trace of strace that change something. To ask the server and to lock changes nothing.
func changesOf(t *testing.T, trace string) (lines []string) {
	t.Helper()
	for line := range strings.Lines(readFile(t, trace)) {
		if aChange.MatchString(line) && !strings.Contains(line, "/run/table-allocator/locks") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// TestNetnsIdle: a service that looks again, and finds all as it should be, changes nothing.
func TestNetnsIdle(t *testing.T) {
	c := newNamespaces(t)
	for n := range c.isps {
		sysctl(t, c.ns, fmt.Sprintf("net/ipv6/conf/wan%d/accept_ra", n), "1")
	}
	_, inet6 := at(1)
	c.must("-6", "-a", inet6, "-i", "wan1", "--routes", "copy", "--prefix", "fd02:0:0:ff00::/56")
	service := c.start(c.here(bin(t, clientBin), "netns", "serve", "--debug"))
	service.waitLog("serving namespaces")
	t.Cleanup(func() { c.do("netns", "del", "--all", "--kill", "5") })
	for name, options := range map[string]string{"auto": "", "hosted": "--wiring macvlan", "npt": "--ipv6 npt", "fallback": "--on-loss fallback", "proxy": "--ipv6 proxy"} {
		c.must(append([]string{"netns", "add", name, "--ifname", "wan1", "--resolv", "192.0.2.53"}, strings.Fields(options)...)...)
	}
	looks := func() int { return strings.Count(service.log.String(), "connect it with the network") }
	look := func() {
		t.Helper()
		before := looks()
		c.ns.IP(t, fmt.Sprintf("link set lo alias x%d", before))
		eventually(t, "it looks again", func() error {
			if looks() <= before {
				return fmt.Errorf("%d times so far", before)
			}
			return nil
		})
	}
	look() // what follows from additions is done
	look()
	trace := filepath.Join(c.dir, "trace")
	tracer := c.start(exec.Command("strace", "-f", "-o", trace, "-e", changingCalls, "-p", fmt.Sprint(service.cmd.Process.Pid)))
	tracer.waitLog("attached")
	look()
	look()
	tracer.stop()
	for _, line := range changesOf(t, trace) {
		t.Errorf("a service that has nothing to do: %s", line)
	}
	if text := readFile(t, trace); !strings.Contains(text, "RTM_GETRULE") || !strings.Contains(text, "NFT_MSG_GETRULE") {
		t.Errorf("it did not look:\n%s", text)
	}
	// Settings of the link that answers for an address are put back, and those of others are what they were.
	heeds := func(want string) {
		t.Helper()
		if got := c.sh("cd /proc/sys/net/ipv6/conf; cat wan0/accept_ra wan1/accept_ra wan1/forwarding"); got != want {
			t.Errorf("accept_ra of wan0 and wan1, and forwarding, are %q, want %q", got, want)
		}
	}
	heeds("1\n2\n1\n")
	c.must("netns", "del", "proxy")
	heeds("1\n1\n0\n")
}
