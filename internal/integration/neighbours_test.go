//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"
)

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

// dhcp makes the providers serve DHCP, with renewals each few seconds, and router advertisements.
func (i *internet) dhcp() {
	i.m.t.Helper()
	for n := 1; n <= len(i.Providers); n++ {
		i.daemon(n, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--interface=lan", "--bind-interfaces",
			"--user=root", "--pid-file="+filepath.Join(i.m.t.TempDir(), "pid"), "--dhcp-leasefile="+filepath.Join(i.m.t.TempDir(), "leases"),
			fmt.Sprintf("--address=/who.test/198.18.0.%d", n),
			fmt.Sprintf("--dhcp-range=10.%d.0.50,10.%[1]d.0.60,2m", n), "--dhcp-authoritative", "--no-ping", "--dhcp-option=option:T1,5", "--dhcp-option=option:T2,60",
			"--enable-ra", fmt.Sprintf("--dhcp-range=fd0%d::,ra-only,64,300", n), "--ra-param=lan,4,60")
	}
}

// TestNetworkd: a watch beside systemd-networkd, which takes away what others made unless it is told not to.
func TestNetworkd(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range plain {
		t.Run(d.Suite, func(t *testing.T) {
			m := boot(t, d)
			i := m.behind(2)
			i.dhcp()
			m.install(files[0])
			for n := 1; n <= 2; n++ {
				m.write(fmt.Sprintf("/etc/systemd/network/wan%d.network", n), fmt.Sprintf(
					"[Match]\nName=wan%d\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\n[DHCPv4]\nRouteMetric=%[1]d00\n", n), 0o644)
			}
			m.sh(`systemctl enable --now table-allocator-watch; systemctl start systemd-networkd`)
			i.waitUplinks()
			changes := m.ruleEvents()
			m.sh(`systemctl restart systemd-networkd; networkctl reload`)
			i.waitUplinks()
			for _, change := range changes() {
				t.Logf("a restart of networkd: %s", change)
			}
			m.sh(`networkctl reconfigure wan2`)
			i.waitUplinks()
			m.wait("status finds no fault", `table-allocator-client status`)
			m.want(`systemctl --failed --plain --no-legend`)
		})
	}
}
