package e2e

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
)

// udev starts udevd with our rule alone: what other rules would do is the host's business.
func (s *site) udev() {
	s.t.Helper()
	s.sh(`mount -t tmpfs rules /usr/lib/udev/rules.d && test -s /usr/local/lib/udev/rules.d/90-table-allocator.rules`)
	s.daemon("/lib/systemd/systemd-udevd")
	eventually(s.t, "udevd answers", func() error {
		if r := s.try("udevadm control --ping"); r.code != 0 {
			return errors.New(r.stderr)
		}
		return nil
	})
}

// dhclientRuns tells whether the dhclient of a link does.
func (s *site) dhclientRuns(ifname string) bool {
	s.t.Helper()
	return s.try(`read -r pid <"/run/dhclient.$1.pid" && read -r name <"/proc/$pid/comm" && [ "$name" = dhclient ]`, ifname).code == 0
}

// A modem is unplugged: its dhclient ends and no other does, and nothing of its address is
// left, whether its holder saw the link go or had been killed before.
func TestUdevRemove(t *testing.T) {
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprintf("holder killed %v", killed), func(t *testing.T) {
			s := newSite(t)
			s.prepareDhclient()
			s.serve()
			s.udev()
			servers := make(map[int]*process)
			for _, n := range []int{0, 1} {
				servers[n] = s.dnsmasqAt(n, noRenewals...)
				s.dhclient(s.isps[n].ifname)
				s.waitUplink(n, given[n])
			}
			s.ns.IP(t, "link add wan10 type veth peer name wan10peer")
			s.dhclient("wan10", "-nw")
			if killed {
				for _, pid := range s.pids(clientBin) {
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}
			}
			s.ns.IP(t, "link del wan1")
			eventually(t, "its dhclient ends", func() error {
				if s.dhclientRuns("wan1") {
					return errors.New("it runs")
				}
				return nil
			})
			s.waitGone(given[1])
			for _, other := range []string{"wan0", "wan10"} {
				if !s.dhclientRuns(other) {
					t.Errorf("the dhclient of %s has ended, too", other)
				}
			}
			// A link of that name comes back with another dhclient.
			servers[1].kill()
			s.connect(1)
			s.dnsmasqAt(1)
			s.dhclient("wan1")
			s.waitUplink(1, given[1])
			s.waitUplink(0, given[0])
		})
	}
}

// The number in a pid file may be somebody else's.
func TestUdevRemoveStrangers(t *testing.T) {
	s := newSite(t)
	s.serve()
	stranger := s.daemon("sleep", "1000")
	other := s.daemon("sh", "-c", "printf dhclient >/proc/self/comm; while :; do read -r line; done", "-pf", "/run/dhclient.eth10.pid", "eth10")
	for _, p := range []*process{stranger, other} {
		s.write("/run/dhclient.eth1.pid", fmt.Sprintln(p.cmd.Process.Pid))
		s.sh("INTERFACE=eth1 /usr/local/lib/table-allocator/udev-remove")
	}
	s.write("/run/dhclient.eth1.pid", "")
	s.sh("INTERFACE=eth1 /usr/local/lib/table-allocator/udev-remove")
	s.sh("INTERFACE= /usr/local/lib/table-allocator/udev-remove")
	s.sh("kill -0 $1 && kill -0 $2", fmt.Sprint(stranger.cmd.Process.Pid), fmt.Sprint(other.cmd.Process.Pid))
}

// A resolver on the host asks the name servers of each uplink through that uplink, although
// two of them have the same address, and follows when uplinks come and go.
func TestDnsmasq(t *testing.T) {
	s := newSite(t)
	s.prepareDhclient()
	s.serve()
	// The user keeps resolv.conf, as one can with a hook of one's own.
	s.write("/etc/dhcp/dhclient-enter-hooks.d/keep", "make_resolv_conf() { :; }\n")
	lookup := s.resolver()
	resolves := func(n ...int) {
		t.Helper()
		eventually(t, fmt.Sprintf("names resolve through %d", n), func() error {
			_, got := lookup()
			for _, n := range n {
				if got == seenAs(n).String() {
					return nil
				}
			}
			return fmt.Errorf("the answer is %q", got)
		})
	}
	up := func(n int) {
		t.Helper()
		s.dhclient(s.isps[n].ifname)
		s.waitFilled(given[n], "default via "+s.isps[n].gateway, s.isps[n].network)
		s.waitUplink(n, given[n])
	}
	for n := range s.isps {
		s.dnsmasqAt(n)
	}
	if _, got := lookup(); got != "" {
		t.Errorf("answer without an uplink: %q", got)
	}
	up(0)
	resolves(0)
	up(1)
	resolves(0, 1)
	s.dhclient("wan0", "-r")
	s.waitGone(given[0])
	resolves(1)
	up(2)
	s.killDhclient("wan1")
	s.ns.IP(t, "link del wan1")
	s.waitGone(given[1])
	resolves(2)
	s.ns.IP(t, "link set wan2 down")
	s.ns.IP(t, "link set wan2 up")
	s.waitUplink(2, given[2])
	resolves(2)
	up(0)
	s.dhclient("wan2", "-r")
	s.waitGone(given[2])
	resolves(0)
	s.wantOwnOnly()
}
