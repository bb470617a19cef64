//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A neighbour is a program that configures the network of a host, or changes rules and routes, with its real daemon
// on a machine that boots. The machine is behind two providers; each has DHCP, with renewals each few seconds, and
// router advertisements.
type neighbour struct {
	name     string
	packages []string          // of the machine; those of managers by default
	suites   []string          // both by default
	hooks    bool              // the hooks serve the addresses, and no watch runs
	provide  string            // a script of each provider, first
	brief    bool              // default routes of router advertisements live for a few seconds
	files    map[string]string // by path. One with {N} is written for each uplink, and so is its text
	start    string            // brings up both uplinks
	then     []string          // scripts after which they still work
	keeps    []string          // lines that "ip rule; ip -6 rule; ip route show table all" has at the end: those of the neighbour
	prefixes []string          // of the addresses whose packets pass; both families of both uplinks by default
}

// expand fills in the number of an uplink.
func expand(text, number string) string { return strings.ReplaceAll(text, "{N}", number) }

// test runs the neighbour with the installed package and its units.
func (n neighbour) test(t *testing.T, suite string) {
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	packages := n.packages
	if packages == nil {
		packages = managers
	}
	m := boot(t, debian(suite, packages))
	i := m.behind(2)
	for _, p := range i.Providers {
		p.Run(t, "sh", "-ec", n.provide)
	}
	life := 60
	if n.brief {
		life = 12
	}
	i.dhcpFor(life)
	m.install(files[0])
	for path, text := range n.files {
		for _, number := range []string{"1", "2"} {
			mode := os.FileMode(0o644)
			if strings.HasPrefix(path, "/etc/NetworkManager/") { // which believes no file that others can read
				mode = 0o600
			}
			m.write(expand(path, number), expand(text, number), mode)
		}
	}
	if !n.hooks {
		m.sh(`systemctl enable --now table-allocator-watch`)
	}
	for _, script := range slices.Concat([]string{n.start}, n.then) {
		m.sh(script)
		i.waitUplinks(n.prefixes...)
		m.wait("status finds no fault after "+script, `table-allocator-client status`)
	}
	for _, line := range n.keeps {
		m.wait("there is "+line, `{ ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; } | grep --fixed-strings "$1"`, line)
	}
	m.want(`systemctl --failed --plain --no-legend`)
}

// TestNeighbours: packets of both uplinks, and of both families, pass beside each program. Each odd host is one of the suites
// in turn, and with SOAK=full of both.
func TestNeighbours(t *testing.T) {
	t.Parallel()
	all := slices.Clone(neighbours)
	for at, n := range odd {
		if !full {
			n.suites = suites[at%2 : at%2+1]
		}
		all = append(all, n)
	}
	for _, n := range all {
		if n.suites == nil {
			n.suites = suites
		}
		for _, suite := range n.suites {
			t.Run(n.name+"/"+suite, func(t *testing.T) {
				t.Parallel()
				n.test(t, suite)
			})
		}
	}
}

// daemon runs a program at provider n, from 1, until the test ends.
func (i *internet) daemon(n int, argv ...string) {
	i.m.t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := i.Providers[n-1].Start(cmd); err != nil {
		i.m.t.Fatal(err)
	}
	i.m.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // killed
		if i.m.t.Failed() {
			i.m.t.Logf("%s of provider %d:\n%s", argv[0], n, &log)
		}
	})
}

// dhcp makes the providers serve DHCP, with renewals each few seconds, and router advertisements, whose default route lives for a minute.
func (i *internet) dhcp() { i.dhcpFor(60) }

// dhcpFor is dhcp with default routes that live for so many seconds. Advertisements come each four.
func (i *internet) dhcpFor(life int) {
	i.m.t.Helper()
	for n := 1; n <= len(i.Providers); n++ {
		i.daemon(n, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--interface=lan", "--bind-interfaces",
			"--user=root", "--pid-file="+filepath.Join(i.m.t.TempDir(), "pid"), "--dhcp-leasefile="+filepath.Join(i.m.t.TempDir(), "leases"),
			fmt.Sprintf("--address=/who.test/198.18.0.%d", n),
			fmt.Sprintf("--dhcp-range=10.%d.0.50,10.%[1]d.0.60,2m", n), "--dhcp-authoritative", "--no-ping", "--dhcp-option=option:T1,5", "--dhcp-option=option:T2,60",
			"--enable-ra", fmt.Sprintf("--dhcp-range=fd0%d::,ra-only,64,300", n), fmt.Sprint("--ra-param=lan,4,", life), "--log-facility=-")
	}
	for _, p := range i.Providers { // some clients ask only for so long
		for deadline := time.Now().Add(patience); !strings.Contains(p.Run(i.m.t, "ss", "-ln", "--udp"), ":67 "); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				i.m.t.Fatalf("no DHCP server of %s listens", p)
			}
		}
	}
}
