//go:build integration

package integration

import (
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// plain are the machines on which a package lives.
var plain = []nettest.Debian{debian("bookworm", base), debian("trixie", base)}

const oldVersion, newVersion = "0.1.0~test1", "0.1.0~test2"

// debs makes two versions of the package, pressed as those that are published, and small.
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
	rules := m.sh(`ip rule; ip -6 rule`)

	// An upgrade changes no rule. The watch goes on with the new program, the holders with theirs.
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

	// Removed, it leaves nothing in the kernel, and no process. What is configuration stays, and hooks are harmless.
	m.sh(`dpkg -r table-allocator 2>&1`)
	m.want(`set +e; ip -N rule | grep "proto 116"; ip -N -6 rule | grep "proto 116"; ip -N route show table all proto 116; ip -N -6 route show table all proto 116
		pidof table-allocator-client table-allocator-server; grep -a tas_ /proc/net/unix; true`)
	m.sh(`IFACE=wan1 MODE=start ADDRFAM=inet METHOD=static IF_ADDRESS=10.1.0.2 /etc/network/if-up.d/table-allocator
		interface=wan1; reason=BOUND; . /etc/dhcp/dhclient-enter-hooks.d/table-allocator`)
	m.sh(`dpkg -P table-allocator 2>&1`)
	m.want(traces + `; systemctl list-units --all --plain --no-legend "*table-allocator*"; systemctl --failed --plain --no-legend`)
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
