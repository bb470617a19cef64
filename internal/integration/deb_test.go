//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// plain are the machines on which a package lives.
var plain = []nettest.Debian{debian("bookworm", base), debian("trixie", base)}

const oldVersion, newVersion = "0.1.0~test1", "0.1.0~test2"

// debs makes two versions of the package, pressed as those that are published, and small. OLD_DEB names a file to take for the
// first one, as that of an older commit: make deb PACKAGE_VERSION=0.1.0~test1.
var debs = sync.OnceValues(func() (files [2]string, err error) {
	for i, version := range []string{oldVersion, newVersion} {
		dir, err := os.MkdirTemp("", "deb")
		if err != nil {
			return files, err
		}
		made, err := packages(dir, version, nil, arches[own:own+1], "deb")
		if err != nil {
			return files, err
		}
		files[i] = made["deb"][0]
		if err := small(files[i], 6<<20); err != nil {
			return files, err
		}
	}
	if old := os.Getenv("OLD_DEB"); old != "" {
		files[0] = old
	}
	return files, nil
})

// TestDebLife: the package is installed, upgraded, removed and purged on machines that run systemd.
func TestDebLife(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range plain {
		t.Run(d.Suite, func(t *testing.T) { debLife(t, boot(t, d), files[0], files[1]) })
	}
}

// units asks for the state of the units: the socket, the server and the watch.
const units = `for unit in server.socket server.service watch.service; do
	echo "$(systemctl is-enabled "table-allocator-$unit")" "$(systemctl is-active "table-allocator-$unit")"; done`

// traces finds all files of the package.
const traces = `find / -xdev \( -path /root -o -path /proc -o -path /sys \) -prune -o -name "*table[-_]allocator*" -print -o -name tactl -print; find /run /sys/fs/bpf -name "*table[-_]allocator*"`

func debLife(t *testing.T, m *machine, oldDeb, newDeb string) {
	i := m.behind(2)
	m.install(oldDeb)
	m.want(units, "enabled active", "enabled active", "disabled inactive")
	m.want(`table-allocator-client --version | grep -o '[^ ]*$'; sysctl -n net.unix.max_dgram_qlen; ls /usr/lib/udev/rules.d/90-table-allocator.rules`,
		oldVersion, "512", "/usr/lib/udev/rules.d/90-table-allocator.rules")
	m.uplink(1)
	m.sh(`table-allocator-client -4 -a 10.1.0.2 -n 24 -i wan1 -t hook --routes copy; table-allocator-client -6 -a fd01::2 -n 64 -i wan1 -t hook --routes copy`)
	m.sh(`systemctl enable --now table-allocator-watch`)
	m.uplink(2)
	i.waitUplinks()
	m.sh(`echo "// mine" >>/etc/table-allocator/server.json`)
	wantBound, stays := i.bound()
	wantBound()
	rules := m.sh(`ip rule; ip -6 rule`)

	// An upgrade changes no rule. The watch goes on with the new program, the holders with theirs, and what is bound leaves by its uplink.
	changes, before := m.ruleEvents(), m.sh(`systemctl show -P MainPID table-allocator-watch; pidof table-allocator-client`)
	m.install(newDeb)
	m.want(units, "enabled active", "enabled active", "enabled active")
	m.wait("all is served", `table-allocator-client status >/dev/null`)
	if changes := changes(); len(changes) > 0 || m.sh(`ip rule; ip -6 rule`) != rules {
		t.Errorf("an upgrade changed rules: %q\nbefore\n%safter\n%s", changes, rules, m.sh(`ip rule; ip -6 rule`))
	}
	m.want(`readlink "/proc/$(systemctl show -P MainPID table-allocator-watch)/exe" "/proc/$(systemctl show -P MainPID table-allocator-server)/exe"
		readlink /proc/[0-9]*/exe | grep -c "^/usr/sbin/table-allocator-client (deleted)"; tail -n 1 /etc/table-allocator/server.json`,
		"/usr/sbin/table-allocator-client", "/usr/sbin/table-allocator-server", "2", "// mine")
	if now := m.sh(`systemctl show -P MainPID table-allocator-watch; pidof table-allocator-client`); now == before {
		t.Errorf("the watch was not restarted: processes %q", now)
	}
	i.waitUplinks()

	// The holders go on with the new program when they are told to, and again no rule changes.
	changes = m.ruleEvents()
	m.want(`table-allocator-client status | grep -c "older version\|not installed any more"`, "2")
	m.sh(`table-allocator-client reexec >/dev/null`)
	m.wait("the holders execute the new program", `! readlink /proc/[0-9]*/exe | grep "^/usr/sbin/table-allocator-client (deleted)"; table-allocator-client status >/dev/null`)
	if changes := changes(); len(changes) > 0 || m.sh(`ip rule; ip -6 rule`) != rules {
		t.Errorf("reexec changed rules: %q", changes)
	}
	i.waitUplinks()
	wantBound()
	m.sh(`systemctl restart table-allocator-server table-allocator-watch`)
	wantBound()

	// Downgraded and upgraded again it goes on, too.
	for _, deb := range []string{oldDeb, newDeb} {
		m.install(deb)
		i.waitUplinks()
		m.wait("all is served", `table-allocator-client status`)
		wantBound()
	}

	// Removed, it leaves nothing in the kernel, and no process. What is configuration stays, and hooks are harmless.
	m.sh(`dpkg -r table-allocator 2>&1`)
	stays()
	m.sh(`systemctl stop bound`)
	m.want(`set +e; ip -N rule | grep "proto 116"; ip -N -6 rule | grep "proto 116"; ip -N route show table all proto 116; ip -N -6 route show table all proto 116
		pidof table-allocator-client table-allocator-server; grep -a tas_ /proc/net/unix; true`)
	m.sh(`IFACE=wan1 MODE=start ADDRFAM=inet METHOD=static IF_ADDRESS=10.1.0.2 /etc/network/if-up.d/table-allocator
		interface=wan1; reason=BOUND; . /etc/dhcp/dhclient-enter-hooks.d/table-allocator`)
	m.sh(`dpkg -P table-allocator 2>&1`)
	// That of the kernel's variables may fail in a sandbox, whatever is installed.
	m.want(traces + `; systemctl list-units --all --plain --no-legend "*table-allocator*"; systemctl --failed --plain --no-legend | grep -v ^systemd-sysctl || :`)
}

// bound runs a program on wan2 that sends all the time, by IPv4 and IPv6, to the port discard of the internet. It returns a
// function that waits until more of its packets have passed by wan2, and both fail the test if one ever came by wan1.
func (i *internet) bound() (want, stays func()) {
	i.m.t.Helper()
	rules := filepath.Join(i.m.t.TempDir(), "discard.nft")
	if err := os.WriteFile(rules, []byte("table inet discard {\nchain raw {\ntype filter hook prerouting priority -500\nmeta nfproto ipv4 udp dport 9 counter\nmeta nfproto ipv6 udp dport 9 counter\n}\n}\n"), 0o644); err != nil {
		i.m.t.Fatal(err)
	}
	for _, p := range i.Providers {
		p.Run(i.m.t, "nft", "-f", rules)
	}
	i.m.sh(`systemd-run --quiet --unit=bound table-allocator-client run wan2 bash -c "$1"`,
		`while :; do for far in `+nettest.Far4+` `+nettest.Far6+`; do echo >"/dev/udp/$far/9"; done; sleep 0.02; done 2>/dev/null`)
	passed := func(p *nettest.Provider) (n []string) {
		for _, m := range regexp.MustCompile(`packets (\d+)`).FindAllStringSubmatch(p.Run(i.m.t, "nft", "list", "table", "inet", "discard"), -1) {
			n = append(n, m[1])
		}
		return n
	}
	stays = func() {
		i.m.t.Helper()
		if other := passed(i.Providers[0]); other[0] != "0" || other[1] != "0" {
			i.m.t.Errorf("what is bound to wan2 sent by wan1: packets of IPv4 and IPv6 %q", other)
		}
	}
	return func() {
		i.m.t.Helper()
		for deadline, before := time.Now().Add(patience), passed(i.Providers[1]); ; time.Sleep(50 * time.Millisecond) {
			if now := passed(i.Providers[1]); now[0] != before[0] && now[1] != before[1] {
				break
			}
			if time.Now().After(deadline) {
				i.m.t.Fatalf("what is bound sends nothing by wan2: %q before, %q now", before, passed(i.Providers[1]))
			}
		}
		stays()
	}, stays
}

// uplink adds addresses and default routes by wanN.
func (m *machine) uplink(n int) {
	m.t.Helper()
	var lines []string
	for _, line := range []string{
		"address add 10.N.0.2/24 dev wanN", "address add fd0N::2/64 dev wanN nodad",
		"route add default via 10.N.0.1 dev wanN metric N00", "route add default via fd0N::1 dev wanN metric N00",
	} {
		lines = append(lines, strings.ReplaceAll(line, "N", string(rune('0'+n))))
	}
	m.ns.Batch(m.t, lines...)
}
