package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// dhcpLease is a lease of a dhcpServer.
type dhcpLease struct {
	addr, mask, router string
	seconds, renew     uint32 // how long it lasts, and after how long the client renews it
}

// dhcpServer is a DHCP server of the test's own, for answers that no real one gives.
type dhcpServer struct {
	mu    sync.Mutex
	lease dhcpLease
	deny  bool // refuse requests
	heard []string
}

func (d *dhcpServer) set(f func(d *dhcpServer)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(d)
}

// answer makes the reply to a request: RFC 2131, RFC 2132.
func (d *dhcpServer) answer(request []byte, server netip.Addr) ([]byte, net.Addr) {
	const discover, offer, ask, ack, nak = 1, 2, 3, 5, 6
	kind := byte(0)
	for o := request[240:]; len(o) > 2 && o[0] != 255; o = o[2+int(o[1]):] {
		if o[0] == 53 {
			kind = o[2]
		}
		if len(o) < 2+int(o[1]) {
			return nil, nil
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.heard = append(d.heard, strconv.Itoa(int(kind)))
	ciaddr := netip.AddrFrom4([4]byte(request[12:16]))
	reply := make([]byte, 240, 300)
	copy(reply, request[:44])
	reply[0] = 2
	copy(reply[236:240], []byte{99, 130, 83, 99})
	option := func(code byte, value ...byte) {
		reply = append(append(reply, code, byte(len(value))), value...)
	}
	number := func(v uint32) []byte { return []byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)} }
	switch {
	case kind == discover:
		option(53, offer)
	case kind == ask && d.deny:
		option(53, nak)
	case kind == ask:
		option(53, ack)
	default:
		return nil, nil
	}
	option(54, server.AsSlice()...)
	to := &net.UDPAddr{IP: net.IPv4bcast, Port: 68}
	if reply[242] != nak {
		copy(reply[16:20], netip.MustParseAddr(d.lease.addr).AsSlice())
		option(1, netip.MustParseAddr(d.lease.mask).AsSlice()...)
		option(3, netip.MustParseAddr(d.lease.router).AsSlice()...)
		option(6, server.AsSlice()...)
		option(51, number(d.lease.seconds)...)
		option(58, number(d.lease.renew)...)
		option(59, number(d.lease.seconds*7/8)...)
		if ciaddr.IsValid() && !ciaddr.IsUnspecified() {
			to.IP = ciaddr.AsSlice()
		}
	}
	return append(reply, 255), to
}

// dhcp starts a dhcpServer at provider n.
func (s *site) dhcp(n int, lease dhcpLease) *dhcpServer {
	s.t.Helper()
	d := &dhcpServer{lease: lease}
	gateway := netip.MustParseAddr(s.isps[n].gateway)
	s.isps[n].ns.Do(func() {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			ctlErr := c.Control(func(fd uintptr) {
				err = errors.Join(unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "lan"),
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
			})
			return errors.Join(ctlErr, err)
		}}
		conn, err := lc.ListenPacket(context.Background(), "udp4", ":67")
		if err != nil {
			s.t.Fatal(err)
		}
		var done sync.WaitGroup
		done.Go(func() {
			buf := make([]byte, 1500)
			for {
				size, _, err := conn.ReadFrom(buf)
				if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
					return
				}
				if err != nil || size < 240 {
					continue
				}
				if reply, to := d.answer(buf[:size], gateway); reply != nil {
					_, _ = conn.WriteTo(reply, to) // a client without an answer asks again
				}
			}
		})
		s.t.Cleanup(func() {
			conn.Close()
			done.Wait()
		})
	})
	return d
}

// inNamespace starts a program in a namespace other than the host's.
func (s *site) inNamespace(ns *nettest.Namespace, name string, args ...string) *process {
	s.t.Helper()
	return (&machine{t: s.t, ns: ns}).start(exec.Command(name, args...))
}

// dnsmasqAt starts dnsmasq at provider n, as DHCP server and resolver. Clients renew their leases every
// two seconds. Every name below .test resolves to the address of the provider at the internet.
func (s *site) dnsmasqAt(n int, more ...string) *process {
	s.t.Helper()
	p := s.inNamespace(s.isps[n].ns, "dnsmasq", append([]string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-", "--log-dhcp",
		"--no-resolv", "--no-hosts", "--interface=lan", "--except-interface=lo", "--bind-interfaces",
		"--dhcp-range=" + given[n] + "," + given[n] + ",255.255.255.0,1h", "--dhcp-authoritative", "--no-ping",
		"--dhcp-leasefile=" + filepath.Join(s.dir, fmt.Sprintf("leases-%d-%d", n, time.Now().UnixNano())),
		"--dhcp-option=option:T1,2", "--dhcp-option=option:T2,4", "--address=/test/" + seenAs(n).String(),
	}, more...)...)
	p.waitLog("DHCP, IP range")
	return p
}

// noRenewals are options of dnsmasqAt: leases are not renewed while a test runs.
var noRenewals = []string{"--dhcp-option=option:T1,600", "--dhcp-option=option:T2,800"}

// dhcpdAt starts isc-dhcpd at provider n; subnet is more of the configuration of the subnet.
func (s *site) dhcpdAt(n int, subnet string) *process {
	s.t.Helper()
	base := filepath.Join(s.dir, fmt.Sprintf("dhcpd%d", n))
	s.write(base+".conf", `
		option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;
		authoritative; ping-check false;
		subnet `+strings.TrimSuffix(s.isps[n].network, "/24")+` netmask 255.255.255.0 { range `+given[n]+`; `+subnet+` }`)
	s.write(base+".leases", "")
	p := s.inNamespace(s.isps[n].ns, "dhcpd", "-4", "-f", "-d", "-user", "root", "-group", "root",
		"-cf", base+".conf", "-lf", base+".leases", "-pf", base+".pid", "lan")
	p.waitLog("Server starting service")
	return p
}

// prepareDhclient gives dhclient short time limits, and records the reasons for which it calls its
// script, after all hooks of the script.
func (s *site) prepareDhclient() {
	s.t.Helper()
	s.sh(`echo 'timeout 3; retry 1; reboot 1; initial-interval 1; backoff-cutoff 1; select-timeout 0;' >>/etc/dhcp/dhclient.conf`)
	s.write("/etc/dhcp/dhclient-exit-hooks.d/zz-record",
		`echo "$interface $reason $old_ip_address$old_ip6_address$old_ip6_prefix$cur_ip6_address $new_ip_address$new_ip6_address$new_ip6_prefix" >>/run/reasons`+"\n")
}

// dhclient runs dhclient for a link as ifup does, until the background process runs.
func (s *site) dhclient(ifname string, more ...string) {
	s.t.Helper()
	s.sh(`if=$1; shift; dhclient -4 -v -pf "/run/dhclient.$if.pid" -lf "/var/lib/dhcp/dhclient.$if.leases" "$@" "$if" >&2`,
		append([]string{ifname}, more...)...)
}

// killDhclient kills the dhclient of a link with SIGKILL.
func (s *site) killDhclient(ifname string) {
	s.t.Helper()
	s.sh(`kill -9 $(cat "/run/dhclient.$1.pid")`, ifname)
}

// quietDhclient kills dhclients by their pid files, and waits until no script of theirs runs.
func (s *site) quietDhclient(pidFiles ...string) {
	s.t.Helper()
	for _, file := range pidFiles {
		s.sh(`kill -9 $(cat "$1")`, file)
	}
	eventually(s.t, "no script of dhclient runs", func() error {
		for _, pid := range sharing(s.t, s.mounts, "mnt") {
			if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.HasPrefix(string(comm), "dhclient-script") {
				return fmt.Errorf("process %d", pid)
			}
		}
		return nil
	})
}

// reasons are the calls of dhclient-script for a link: reason, old and new address.
func (s *site) reasons(ifname string) (reasons []string) {
	s.t.Helper()
	for line := range strings.Lines(s.read("/run/reasons")) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), ifname+" "); ok {
			reasons = append(reasons, rest)
		}
	}
	return reasons
}

// waitReason waits until dhclient has called its script for a reason, not counting the first `after`
// calls.
func (s *site) waitReason(ifname, reason string, after int) {
	s.t.Helper()
	eventually(s.t, "dhclient says "+reason, func() error {
		reasons := s.reasons(ifname)
		for _, r := range reasons[min(after, len(reasons)):] {
			if strings.HasPrefix(r+" ", reason+" ") {
				return nil
			}
		}
		return fmt.Errorf("it has said %q", reasons)
	})
}

// dhclient6 runs dhclient for IPv6 as ifup does, until the background process runs. dhclient binds to
// the link-local address and does not wait for it, so dhclient6 does.
func (h *home) dhclient6(ifname string, more ...string) {
	h.t.Helper()
	h.waitLinkLocal(ifname)
	h.sh(`if=$1; shift; dhclient -6 -v -pf "/run/dhclient6.$if.pid" -lf "/var/lib/dhcp/dhclient6.$if.leases" "$@" "$if" >&2`,
		append([]string{ifname}, more...)...)
}

// waitLinkLocal waits until sockets may have the link-local address of a link.
func (h *host) waitLinkLocal(ifname string) {
	h.t.Helper()
	eventually(h.t, ifname+" has a link-local address", func() error {
		out := h.ns.IP(h.t, "-6 address show dev "+ifname+" scope link -tentative")
		if !strings.Contains(out, "fe80::") {
			return errors.New(out)
		}
		return nil
	})
}

// dnsmasq6At starts dnsmasq at provider n, which gives out addresses of both families and advertises
// the provider as the router.
func (h *home) dnsmasq6At(n int, more ...string) *process {
	h.t.Helper()
	return h.dnsmasqAt(n, append([]string{"--enable-ra", "--ra-param=lan,4,30",
		"--dhcp-range=" + given6(n, 0) + "," + given6(n, 0) + ",64,1h"}, more...)...)
}

// dhcpd6At starts isc-dhcpd for IPv6 at provider n. A second one has the leases and the identity of
// the first.
func (h *home) dhcpd6At(n int, config string) *process {
	h.t.Helper()
	base := h.dhcpd6Files(n)
	h.sh(`printf %s "$2" >"$1.conf"; : >>"$1.leases"`, base, config)
	p := h.inNamespace(h.isps[n].ns, "dhcpd", "-6", "-f", "-d", "-user", "root", "-group", "root",
		"-cf", base+".conf", "-lf", base+".leases", "-pf", base+".pid", "lan")
	p.waitLog("Server starting service")
	return p
}

func (h *home) dhcpd6Files(n int) string { return filepath.Join(h.dir, fmt.Sprintf("dhcpd6-%d", n)) }

// reserved is a configuration of isc-dhcpd: the host's link to provider n gets this address, and the
// client renews it after two seconds.
func (h *home) reserved(n int, addr string, more string) string {
	h.t.Helper()
	return `default-lease-time 600; preferred-lifetime 400; option dhcp-renewal-time 2; ` + more +
		` subnet6 ` + prefix6(n, 0) + ` { } host customer { hardware ethernet ` + h.mac(n) + `; fixed-address6 ` + addr + `; }`
}

// advertise starts radvd at provider n; options are options of its link.
func (h *home) advertise(n int, options string) *daemonRA {
	h.t.Helper()
	return h.advertiseOn(n, "lan", options)
}

func (h *home) advertiseOn(n int, ifname, options string) *daemonRA {
	h.t.Helper()
	d := &daemonRA{h: h, ifname: ifname, path: filepath.Join(h.dir, fmt.Sprintf("radvd-%d-%s", n, ifname))}
	d.configure(options)
	d.process = h.inNamespace(h.isps[n].ns, "radvd", "--nodaemon", "--logmethod=stderr", "--config="+d.path+".conf", "--pidfile="+d.path+".pid")
	d.waitLog("version")
	return d
}

// daemonRA is a radvd that runs.
type daemonRA struct {
	*process
	h            *home
	path, ifname string
}

// configure writes the configuration. radvd sends an advertisement every second; it accepts so short an
// interval only with AdvIntervalOpt.
func (d *daemonRA) configure(options string) {
	d.h.t.Helper()
	text := "interface " + d.ifname + " { AdvSendAdvert on; AdvIntervalOpt on; MinRtrAdvInterval 0.5; MaxRtrAdvInterval 1; " + options + " };\n"
	if err := os.WriteFile(d.path+".conf", []byte(text), 0o644); err != nil {
		d.h.t.Fatal(err)
	}
}

// change gives radvd other options.
func (d *daemonRA) change(options string) {
	d.h.t.Helper()
	d.configure(options)
	if err := d.cmd.Process.Signal(unix.SIGHUP); err != nil {
		d.h.t.Fatal(err)
	}
}

// end sends SIGTERM, and radvd advertises that it is no router any more.
func (d *daemonRA) end() {
	d.h.t.Helper()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		d.h.t.Fatal(err)
	}
	d.wait()
}

// prefixOption is a radvd option that advertises a network.
func prefixOption(network string, valid, preferred int, more ...string) string {
	return fmt.Sprintf("prefix %s { AdvValidLifetime %d; AdvPreferredLifetime %d; %s };", network, valid, preferred, strings.Join(more, " "))
}

// networkManager starts NetworkManager with its dispatcher and a bus.
func (s *site) networkManager() {
	s.t.Helper()
	s.write("/etc/NetworkManager/NetworkManager.conf", `[main]
plugins=keyfile
auth-polkit=false
no-auto-default=*
dns=none
[keyfile]
unmanaged-devices=none
[logging]
level=INFO
`)
	s.write("/etc/NetworkManager/dispatcher.d/zz-record", "#!/bin/sh\necho \"$1 $2\" >>/run/events\n")
	s.sh("chmod 755 /etc/NetworkManager/dispatcher.d/zz-record; dbus-uuidgen --ensure=/etc/machine-id")
	s.daemon("dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog")
	eventually(s.t, "the bus is there", func() error {
		if s.try("test -S /run/dbus/system_bus_socket").code != 0 {
			return errors.New("no socket")
		}
		return nil
	})
	s.daemon("/usr/lib/NetworkManager/nm-dispatcher", "--persist")
	s.daemon("NetworkManager", "--no-daemon")
	eventually(s.t, "NetworkManager answers", func() error {
		if r := s.try("nmcli general status"); r.code != 0 {
			return errors.New(r.stderr)
		}
		return nil
	})
}

// profile writes a connection profile of NetworkManager for a link; ipv4 and ipv6 are lines of these
// sections.
func (s *site) profile(ifname, ipv4, ipv6 string) {
	s.t.Helper()
	path := "/etc/NetworkManager/system-connections/" + ifname + ".nmconnection"
	s.write(path, fmt.Sprintf(`[connection]
id=%[1]s
type=ethernet
interface-name=%[1]s
autoconnect=false
[ipv4]
%[2]s
[ipv6]
%[3]s
`, ifname, ipv4, ipv6))
	s.sh(`chmod 600 "$1"`, path)
}

// resolver starts dnsmasq as the resolver of the site, with our example of a configuration. lookup
// resolves a name that was not asked for before, and returns the name and its address: the answer of
// the provider that dnsmasq asked, see dnsmasqAt.
func (s *site) resolver() (lookup func() (name, addr string)) {
	s.t.Helper()
	s.write("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
	s.sh("mkdir -p /run/dnsmasq")
	s.daemon("dnsmasq", "--keep-in-foreground", "--conf-file=/usr/local/share/doc/table-allocator/examples/dnsmasq.conf",
		"--pid-file=/run/dnsmasq/dnsmasq.pid", "--listen-address=127.0.0.1", "--bind-interfaces", "--cache-size=0",
		"--log-queries", "--log-facility=-").waitLog("started, version")
	asked := 0
	return func() (name, addr string) {
		asked++ // while dnsmasq waits for an answer, it does not ask for the same name again
		name = fmt.Sprintf("name%d.test", asked)
		return name, strings.TrimSpace(s.try(`getent ahostsv4 "$1" | sed -n '1s/ .*//p'`, name).stdout)
	}
}
