//go:build integration

package integration

import (
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestNetnsUnit: the package makes the group and the capabilities, and the service adds the namespaces of its configuration,
// which a user of the group enters: by the unit, as systemd restricts it.
func TestNetnsUnit(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range plain {
		t.Run(d.Suite, func(t *testing.T) {
			m := boot(t, d)
			i := m.behind(2)
			m.install(files[0])
			m.want(`stat -c '%a %U %G' /usr/sbin/table-allocator-enter; getcap /usr/sbin/table-allocator-enter | grep -o 'cap.*'`,
				"750 root table-allocator", "cap_sys_chroot,cap_sys_admin=ep")
			m.uplink(1)
			m.uplink(2)
			m.sh(`systemctl enable --now table-allocator-watch`)
			i.waitUplinks()
			m.sh(`useradd alice; usermod -a -G table-allocator alice; useradd bob`)
			m.write("/etc/table-allocator/netns.json", `{"namespaces": [{"name": "work", "ifname": "wan2", "resolv": "192.0.2.53"}]}`, 0o644)
			m.sh(`mount --make-rshared /; systemctl enable --now table-allocator-netns`) // as systemd has it outside of containers
			m.wait("the namespace is there", `table-allocator-client netns list`)
			const enter = `setpriv --reuid=alice --regid=alice --init-groups table-allocator-client netns exec work `
			m.wait("a user's packets leave by the link", enter+`curl --silent --max-time 5 http://`+nettest.Far4+`/ | grep -x 10.2.0.2`)
			m.wait("and in IPv6", enter+`curl --silent --max-time 5 --globoff 'http://[`+nettest.Far6+`]/' | grep -x fd02::2`)
			if out, err := m.try(strings.ReplaceAll(enter, "alice", "bob") + "id"); err == nil {
				t.Errorf("bob, who is not in the group, enters: %s", out)
			}
			m.write("/etc/table-allocator/netns.json", `{"namespaces": [{"name": "work", "ifname": "wan1", "resolv": "192.0.2.53"}]}`, 0o644)
			m.sh(`systemctl reload table-allocator-netns`)
			m.wait("it follows the configuration", enter+`curl --silent --max-time 5 http://`+nettest.Far4+`/ | grep -x 10.1.0.2`)
			// A User= is named, and once it has gone all is as before.
			m.sh(`d=/etc/systemd/system/table-allocator-netns.service.d; mkdir $d; printf '[Service]\nUser=alice\n' >$d/user.conf
				systemctl daemon-reload; ! systemctl restart table-allocator-netns`)
			m.want(`systemctl show --property=ExecMainStatus --value table-allocator-netns; journalctl --unit=table-allocator-netns | grep -c "a User= of the unit is in the way"`, "78", "1")
			m.want(`find /run/table-allocator ! -user root`)
			m.sh(`rm -r /etc/systemd/system/table-allocator-netns.service.d; systemctl daemon-reload; systemctl restart table-allocator-netns`)
			m.wait("a user's packets leave again", enter+`curl --silent --max-time 5 http://`+nettest.Far4+`/ | grep -x 10.1.0.2`)
			m.write("/etc/table-allocator/netns.json", `{"namespaces": [{"name": 1}]}`, 0o644)
			if out, err := m.try(`systemctl reload table-allocator-netns`); err == nil {
				t.Errorf("a wrong file is reloaded: %s", out)
			}
			// What the host mounts and unmounts later is so in there, too.
			m.sh(`mkdir /run/later; mount -t tmpfs later /run/later; touch /run/later/file`)
			m.want(`table-allocator-client netns exec work ls /run/later`, "file")
			m.sh(`umount /run/later`)
			m.want(`table-allocator-client netns exec work ls /run/later`)
			m.want(`for u in $(grep -l '^RuntimeDirectory=table-allocator$' /lib/systemd/system/table-allocator-*); do grep -q '^RuntimeDirectoryPreserve=yes$' $u || echo $u; done`)
			// An upgrade and a restart leave the namespace and its programs in place.
			m.sh(`systemd-run --quiet --unit=inside table-allocator-client netns exec work sleep 1000`)
			m.wait("a program is in it", `table-allocator-client netns ps work | grep "sleep 1000"`)
			m.write("/etc/table-allocator/netns.json", `{}`, 0o644)
			m.install(files[1])
			m.want(`systemctl is-active table-allocator-netns inside; stat -c '%a %G' /usr/sbin/table-allocator-enter; getcap /usr/sbin/table-allocator-enter | grep -o 'cap.*'`,
				"active", "active", "750 table-allocator", "cap_sys_chroot,cap_sys_admin=ep")
			m.wait("it works after the upgrade", enter+`curl --silent --max-time 5 http://`+nettest.Far4+`/ | grep -x 10.1.0.2`)
			m.sh(`systemctl stop inside; table-allocator-client netns del work`)
			m.want(`ls /run/netns; ip -o link show | grep -c tav || :; nft list ruleset`, "0")
			m.want(`systemctl --failed --plain --no-legend`)
		})
	}
}

// TestNetnsBoot: namespaces of the configuration are there again after a boot of the same root, also after a loss of power, and
// those of commands are not. What the boot before kept in its network namespace and below /run is gone anyway.
func TestNetnsBoot(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	d, disk := debian("trixie", base), t.TempDir()
	const enter = `table-allocator-client netns exec work `
	for n, end := range []func(m *machine){
		func(m *machine) { _, _ = m.try(`systemctl poweroff --no-block`); m.awaitEnd() }, // which may end that shell first
		func(m *machine) { _ = m.cmd.Process.Kill(); m.awaitEnd() },
		func(m *machine) {},
	} {
		m := bootFrom(t, d, disk)
		i := m.behind(2)
		if n == 0 {
			m.install(files[0])
			m.write("/etc/table-allocator/netns.json", `{"namespaces": [{"name": "work", "ifname": "wan2", "resolv": "192.0.2.53", "start": "boot",
				"run": [["/bin/sh", "-c", "exec sleep 4722 >/dev/null 2>&1"]]}, {"name": "later", "ifname": "wan2", "resolv": "192.0.2.53", "start": "on-demand"}]}`, 0o644)
			m.sh(`systemctl enable --now table-allocator-watch table-allocator-netns`)
		}
		m.wait("the service is up before the uplinks are", `systemctl is-active table-allocator-netns`)
		m.want(`ls /run/netns`, "work")
		m.uplink(1)
		m.uplink(2)
		i.waitUplinks()
		m.wait("its packets leave by the link", enter+`curl --silent --max-time 5 http://`+nettest.Far4+`/ | grep -x 10.2.0.2`)
		m.wait("and in IPv6", enter+`curl --silent --max-time 5 --globoff 'http://[`+nettest.Far6+`]/' | grep -x fd02::2`)
		m.want(`ls /run/netns; ip -o link show | grep -c ': tav'; ip rule | grep -c 'iif tav.*unreachable'; table-allocator-client netns ps work | grep -c 'sleep 4722'`, "work", "1", "1", "1")
		m.sh(`table-allocator-client netns add byhand -i wan1 --resolv 192.0.2.53; table-allocator-client netns exec later true`)
		m.want(`ls /run/netns`, "byhand", "later", "work")
		m.want(`systemctl --failed --plain --no-legend`)
		end(m)
	}
}
