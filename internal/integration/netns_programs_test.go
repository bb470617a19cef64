//go:build integration

package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// programs are those that users of namespaces run.
var programs = append(append([]string{}, base...), "apt", "bind9-dnsutils", "dnsmasq-base", "git", "iptables", "iputils-ping", "libnss-resolve", "nscd", "openssh-client",
	"openssh-server", "openssl", "openvpn", "python3", "systemd-resolved", "tmux", "transmission-daemon", "wget")

// serve runs a server with the machine's programs in the internet until the test ends.
func (i *internet) serve(script string) {
	i.m.t.Helper()
	cmd := i.m.command(script)
	for n, arg := range cmd.Args {
		if arg == "--net" {
			cmd.Args[n] = "--net=" + i.Path()
		}
	}
	if err := cmd.Start(); err != nil {
		i.m.t.Fatal(err)
	}
	i.m.t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() }) // it may have ended
}

// namespaceMachine is a machine with both uplinks, whose service has the namespaces of a configuration; alice may enter.
func namespaceMachine(t *testing.T, d nettest.Debian, config string) (*machine, *internet) {
	t.Helper()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	m := boot(t, d)
	i := m.behind(2)
	m.install(files[0])
	m.uplink(1)
	m.uplink(2)
	m.sh(`systemctl enable --now table-allocator-watch; useradd --create-home alice; usermod -a -G table-allocator -p "*" alice`)
	i.waitUplinks()
	m.write("/etc/table-allocator/netns.json", config, 0o644)
	return m, i
}

// TestNetnsPrograms: real programs of a user in a namespace on wan2, which main does not prefer: the far end of each of them sees
// the address of wan2. Resolvers of the host are not asked.
func TestNetnsPrograms(t *testing.T) {
	t.Parallel()
	m, i := namespaceMachine(t, debian("trixie", programs), fmt.Sprintf(`{"namespaces": [{"name": "work", "ifname": "wan2", "resolv": "%s",
		"run": [["/usr/bin/transmission-daemon", "--foreground", "--config-dir", "/run/torrents"]], "run_as": "debian-transmission"}]}`, nettest.Far4))
	m.sh(`mkdir -p /run/far /run/torrents /run/sshd; chown debian-transmission /run/torrents; ssh-keygen -q -t ed25519 -N "" -f /run/far/host
		install -d -o alice /home/alice/.ssh; runuser -u alice -- ssh-keygen -q -t ed25519 -N "" -f /home/alice/.ssh/id_ed25519; cp /home/alice/.ssh/id_ed25519.pub /home/alice/.ssh/authorized_keys
		git init -q --bare /run/far/x.git; printf "" >/run/far/Packages`)
	i.serve(`exec /usr/sbin/sshd -D -e -f /dev/null -o StrictModes=no -h /run/far/host -o ListenAddress=` + nettest.Far4 + ` 2>/run/far/ssh.log`)
	i.serve(`exec git -c safe.directory=* daemon --verbose --export-all --base-path=/run/far --listen=` + nettest.Far4 + ` 2>/run/far/git.log`)
	i.serve(`exec dnsmasq --keep-in-foreground --log-facility=/run/far/dns.log --log-queries=extra --no-resolv --no-hosts --user=root --address=/far.test/` + nettest.Far4 + ` --listen-address=` + nettest.Far4 + ` --bind-interfaces --pid-file`)
	i.serve(`cd /run/far; exec python3 -m http.server --bind ` + nettest.Far4 + ` 8080 2>/run/far/http.log`)
	m.write("/etc/apt/sources.list", "deb [trusted=yes] http://far.test:8080/ ./\n", 0o644)
	m.sh(`rm -f /etc/apt/sources.list.d/*; systemctl enable --now table-allocator-netns; systemctl start nscd systemd-resolved
		sed -i 's/^hosts:.*/hosts: files resolve dns/' /etc/nsswitch.conf`)
	m.wait("the namespace is there", `table-allocator-client netns list`)
	const enter = `cd /; setpriv --reuid=alice --regid=alice --init-groups env HOME=/home/alice table-allocator-client netns exec work `
	for _, tt := range []struct{ name, script string }{
		{"curl", enter + `curl --silent --max-time 5 http://far.test/ | grep -x 10.2.0.2`},
		{"wget", enter + `wget -q -O - -T 5 http://far.test/ | grep -x 10.2.0.2`},
		{"python", enter + `python3 -c 'import urllib.request; print(urllib.request.urlopen("http://far.test/").read().decode())' | grep -x 10.2.0.2`},
		{"dig", enter + `dig +short +timeout=3 asked-by-dig.far.test | grep -x ` + nettest.Far4 + `; grep "10.2.0.2/.*asked-by-dig" /run/far/dns.log`},
		{"getent beside nscd and resolved", enter + `getent ahosts asked-by-getent.far.test | grep ` + nettest.Far4 + `; grep "10.2.0.2/.*asked-by-getent" /run/far/dns.log`},
		{"ping", enter + `ping -c 1 -W 5 far.test`},
		{"ssh", enter + `ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null alice@far.test 'echo $SSH_CLIENT' | grep '^10.2.0.2 '`},
		{"git", enter + `git ls-remote git://far.test/x.git && grep 'Connection from 10.2.0.2:' /run/far/git.log`},
		{"apt-get", `table-allocator-client netns exec work apt-get update 2>&1 && grep '^10.2.0.2 .*Packages' /run/far/http.log`},
		{"sudo's way: a root's command", `table-allocator-client netns exec work --user alice -- curl --silent --max-time 5 http://far.test/ | grep -x 10.2.0.2`},
		{"tmux inside, attached outside", enter + `tmux -L work new-session -d; cd /; runuser -u alice -- tmux -L work send-keys 'curl --silent http://far.test/ >/home/alice/seen' Enter`},
		{"what tmux started", `grep -x 10.2.0.2 /home/alice/seen`},
		{"a daemon by run", `table-allocator-client netns ps work | grep "$(id -u debian-transmission) .*transmission-daemon"`},
	} {
		m.wait(tt.name, tt.script)
	}
	if log := m.sh(`cat /run/far/*.log | grep -F 10.1.0.2 || :`); log != "" {
		t.Errorf("the far end saw the other uplink:\n%s", log)
	}
	m.sh(`cd /; runuser -u alice -- tmux -L work kill-server`)
	// A unit of systemd in the namespace.
	m.sh(`mkdir -p /etc/systemd/system/inside.service.d; table-allocator-client netns unit work >/etc/systemd/system/inside.service.d/netns.conf`)
	m.write("/etc/systemd/system/inside.service", "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'curl --silent --retry 20 --retry-all-errors --max-time 60 http://far.test/ >/run/far/unit; (cat /etc/resolv.conf; id -un) >>/run/far/unit'\n", 0o644)
	m.sh(`systemctl daemon-reload; systemctl start inside`)
	m.want(`cat /run/far/unit`, "10.2.0.2", "nameserver "+nettest.Far4, "root")
	m.sh(`printf '[Service]\nUser=alice\nRuntimeDirectory=inside\n' >/etc/systemd/system/inside.service.d/user.conf; chown alice /run/far/unit
		systemctl daemon-reload; systemctl start inside`)
	m.want(`cat /run/far/unit`, "10.2.0.2", "nameserver "+nettest.Far4, "alice")
	// Socket activation: the service is away, and a user enters.
	m.sh(`systemctl stop table-allocator-netns; systemctl enable --now table-allocator-netns.socket`)
	m.want(`stat -c '%a %G' /run/table-allocator/netns.sock`, "660 table-allocator")
	m.want(enter+`curl --silent --max-time 5 http://far.test/`, "10.2.0.2")
	m.wait("the service is active", `systemctl is-active table-allocator-netns`)
}

// TestNetnsOpenVPN: a real OpenVPN is the only way out of a namespace, over its uplink.
func TestNetnsOpenVPN(t *testing.T) {
	t.Parallel()
	m, i := namespaceMachine(t, debian("trixie", programs),
		`{"namespaces": [{"name": "work", "ifname": "wan2", "vpn": "/etc/openvpn/work.conf"}]}`)
	m.sh(`cd /etc/openvpn; for who in server client; do
			openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=$who -keyout $who.key -out $who.crt 2>&1
		done
		fingerprint() { openssl x509 -noout -fingerprint -sha256 -in $1.crt | cut -d= -f2; }
		printf '%s\n' "dev tunserver" "dev-type tun" "topology subnet" "server 10.97.0.0 255.255.255.0" "server-ipv6 fd97::/64" "dh none" "cert server.crt" "key server.key" \
			"peer-fingerprint $(fingerprint client)" "push \"dhcp-option DNS 10.97.0.1\"" "keepalive 1 4" "local ` + nettest.Far4 + `" >server.conf
		printf '%s\n' "client" "dev tun" "remote ` + nettest.Far4 + `" "nobind" "cert client.crt" "key client.key" "peer-fingerprint $(fingerprint server)" \
			"connect-retry 1 1" "redirect-gateway def1" allow-recursive-routing >work.conf; chmod 600 *.conf *.key`)
	i.serve(`cd /etc/openvpn; exec openvpn --config server.conf >/run/server.log 2>&1`)
	m.sh(`systemctl enable --now table-allocator-netns`)
	curl := `table-allocator-client netns exec work curl --silent --max-time 3 http://` + nettest.Far4 + `/ | grep '^10\.97\.0\.'`
	m.wait("packets leave by the VPN", curl+` || { tail -n 20 /run/server.log; table-allocator-client netns exec work ip -s link; false; }`)
	m.wait("in IPv6, too", `table-allocator-client netns exec work curl --silent --max-time 3 --globoff 'http://[`+nettest.Far6+`]/' | grep '^fd97::'`)
	m.want(`table-allocator-client netns exec work cat /etc/resolv.conf; table-allocator-client netns exec work ls /sys/class/net | grep -v '^tav\|^lo$' || :`, "nameserver 10.97.0.1")
	m.want(`grep -o 'Initiated with .*AF_INET.10[.0-9]*' /run/server.log | grep -o '10[.0-9]*$' | sort -u`, "10.2.0.2")
	m.sh(`ip link set wan2 down`)
	if out, err := m.try(strings.Replace(curl, "--max-time 3", "--max-time 1", 1)); err == nil {
		t.Errorf("while the uplink is down: %s", out)
	}
	m.sh(`ip link set wan2 up; ip route replace default via 10.2.0.1 dev wan2 metric 200; ip -6 address replace fd02::2/64 dev wan2 nodad; ip -6 route replace default via fd02::1 dev wan2 metric 200`)
	m.wait("it works again", curl)
	m.sh(`pid=$(pgrep -f '[o]penvpn .*work.conf'); kill -9 $pid`)
	m.wait("the VPN begins again", curl)
	m.sh(`systemctl stop table-allocator-netns; kill -9 $(pgrep -f '[o]penvpn .*work.conf')`)
	if out, err := m.try(strings.Replace(curl, "--max-time 3", "--max-time 1", 1) + ` || curl --silent --max-time 1 http://` + nettest.Far4 + `/ | grep never`); err == nil {
		t.Errorf("without the VPN: %s", out)
	}
	m.sh(`table-allocator-client netns del work`)
	m.want(`pgrep -f '[o]penvpn .*work.conf' || :; ls /run/netns`)
}

// TestNetnsFirewalls: beside iptables with policy drop, docker's chain and firewalld, namespaces work as the manual page says,
// and nothing of theirs is left.
func TestNetnsFirewalls(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			m, _ := namespaceMachine(t, debian(suite, managers), `{}`)
			m.sh(`systemctl start table-allocator-netns; for i in iptables ip6tables; do $i -P FORWARD DROP; done`)
			works := `{ table-allocator-client netns exec work curl --silent --max-time 3 http://` + nettest.Far4 + `/ | grep -x 10.2.0.2 && table-allocator-client netns exec work curl --silent --max-time 3 --globoff 'http://[` + nettest.Far6 + `]/' | grep -x fd02::2; }`
			fails := `! table-allocator-client netns exec work curl --silent --max-time 1 http://` + nettest.Far4 + `/`
			m.once(`table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 2>&1 | grep -c 'ip filter FORWARD.*has policy drop' || :`, "1")
			m.sh(fails)
			m.want(`table-allocator-client doctor | grep -c 'misses a way through the packet filter' || :`, "1")
			m.sh(`table-allocator-client netns del work; table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 --firewall accept`)
			m.wait("it passes", works)
			m.want(`iptables -S FORWARD | grep -c 'tav1.*comment table-allocator'; ip6tables -S FORWARD | grep -c 'tav1.*comment table-allocator'`, "2", "2")
			m.sh(`iptables -F FORWARD; ip6tables -F FORWARD`)
			m.wait("the service restores the rules", works)
			m.sh(`table-allocator-client netns del work`)
			m.want(`iptables -S FORWARD; ip6tables -S FORWARD`, "-P FORWARD DROP", "-P FORWARD DROP")
			// docker's chain.
			m.sh(`for i in iptables ip6tables; do $i -N DOCKER-USER; $i -A DOCKER-USER -j RETURN; $i -A FORWARD -j DOCKER-USER; done`)
			m.once(`table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 2>&1`)
			m.wait("it passes docker's chain", works)
			m.sh(`table-allocator-client netns del work`)
			m.want(`iptables -S | grep -i table-allocator || :; iptables -S DOCKER-USER`, "-N DOCKER-USER", "-A DOCKER-USER -j RETURN")
			m.sh(`for i in iptables ip6tables; do $i -F; $i -X; $i -P FORWARD ACCEPT; done`)
			// ufw, and what nftables does not show.
			for _, with := range []struct{ name, start, chain, again, rules, end string }{
				{"ufw", `ufw --force enable`, "ip filter FORWARD", `ufw reload`, `iptables -S FORWARD`, `ufw --force disable; for i in iptables ip6tables; do $i -F; $i -X; $i -P FORWARD ACCEPT; done`},
				{"iptables-legacy", `for i in iptables ip6tables; do $i-legacy -P FORWARD DROP; done`, "iptables-legacy FORWARD", `true`, `iptables-legacy -S FORWARD`, `for i in iptables ip6tables; do $i-legacy -P FORWARD ACCEPT; done`},
			} {
				m.sh(with.start)
				m.once(`table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 2>&1 | grep -c '`+with.chain+`.*has policy drop' || :`, "1")
				m.sh(fails)
				m.sh(`table-allocator-client netns del work; table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 --firewall accept`)
				m.wait("it passes "+with.name, works)
				m.sh(with.again)
				m.wait("it passes "+with.name+" after a reload", works)
				m.sh(`table-allocator-client netns del work`)
				m.want(with.rules+` | grep -c table-allocator || :; ip6`+with.rules[2:]+` | grep -c table-allocator || :`, "0", "0")
				if with.name == "iptables-legacy" {
					const unsure = ` 2>&1 | grep -c 'there is a table filter of ip6tables-legacy and iptables-legacy, which is not installed'`
					m.sh(`mkdir /root/hidden; mv /usr/sbin/iptables-legacy /usr/sbin/ip6tables-legacy /root/hidden/`)
					m.sh(`table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 --firewall accept` + unsure + `; table-allocator-client doctor` + unsure)
					m.sh(`table-allocator-client netns del work 2>&1 | grep 'rules of ip6tables-legacy and iptables-legacy for its link, tav1, may be left'`)
					m.want(`ls /run/netns`)
					m.sh(`mv /root/hidden/* /usr/sbin/; rmdir /root/hidden`)
				}
				m.sh(with.end)
			}
			// firewalld.
			// firewalld 2 looks for the way back to the address inside, and main prefers the other uplink.
			m.sh(`sed -i 's/^IPv6_rpfilter=yes/IPv6_rpfilter=no/; s/^IPv6_rpfilter=strict/IPv6_rpfilter=loose/' /etc/firewalld/firewalld.conf; systemctl start dbus firewalld`)
			m.once(`table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 2>&1`)
			m.wait("it passes firewalld", works)
			m.wait("firewalld has the link in its zone", `firewall-cmd --get-zone-of-interface=tav1 | grep -x table-allocator`) // it may start for longer than systemd says
			m.sh(`firewall-cmd --reload`)
			m.wait("it passes firewalld after a reload", works)
			m.sh(`table-allocator-client netns del work`)
			m.want(`firewall-cmd --zone=table-allocator --list-interfaces`)
		})
	}
}

// TestNetnsDocker: beside a real docker, whose FORWARD drops, a namespace and containers work, also after docker started again,
// and docker's chain has nothing of ours in the end.
func TestNetnsDocker(t *testing.T) {
	t.Parallel()
	m, _ := namespaceMachine(t, nettest.Debian{Suite: "trixie", Packages: engines}, `{}`)
	m.write("/etc/docker/daemon.json", `{"storage-driver": "vfs"}`, 0o644)
	m.sh(`systemctl start table-allocator-netns docker; ` + importBox)
	const works, box = `table-allocator-client netns exec work curl --silent --max-time 3 http://` + nettest.Far4 + `/ | grep -x 10.2.0.2`,
		`docker run --rm box /usr/bin/curl --version`
	m.once(`table-allocator-client netns add work -i wan2 --resolv 192.0.2.53 --ipv6 off 2>&1; iptables -S DOCKER-USER | grep -c 'tav1.*comment table-allocator'`, "2")
	m.wait("it passes docker's chain", works)
	m.sh(box + `; systemctl restart docker; ` + box)
	m.wait("it passes after docker started again", works)
	m.sh(`iptables -F DOCKER-USER; ip6tables -F DOCKER-USER 2>/dev/null || :`)
	m.wait("the service restores its rules", works)
	m.sh(`table-allocator-client netns del work`)
	m.want(`iptables -S | grep -c table-allocator || :`, "0")
}
