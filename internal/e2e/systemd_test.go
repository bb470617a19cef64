package e2e

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// bootScript becomes systemd, as process 1 of a machine that has our units installed, the
// network of the caller, and else only what it needs. $1 is its cgroup, $2 the commands.
const bootScript = `
echo $$ >"$1/cgroup.procs"
export BIN="$2" container=other SYSTEMD_UNIT_PATH=/mnt/usr/lib/systemd/system:/mnt/etc/systemd/system:/lib/systemd/system
exec unshare --fork --kill-child --pid --mount-proc --mount --propagation private --uts --ipc --cgroup sh -ec '
	mount -t tmpfs tmpfs /mnt
	make -C ../.. BIN="$BIN" install DESTDIR= PREFIX=/mnt/usr SYSCONFDIR=/mnt/etc DHCPCDHOOKS=/mnt/usr/lib/dhcpcd/dhcpcd-hooks
	mkdir /mnt/own # systemd-sysusers writes to /etc, which other tests see
	mount -t tmpfs tmpfs /mnt/own
	cp -a /etc/. /mnt/own
	mount --move /mnt/own /etc
	mount -t tmpfs tmpfs /run
	mount -t tmpfs tmpfs /var
	mount -t tmpfs tmpfs /tmp # which is emptied at boot
	mkdir -p /var/log /var/lib /var/tmp
	! mountpoint --quiet /sys/fs/cgroup || umount /sys/fs/cgroup
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	# systemd mounts this at the boot of a machine, which is what lets its units see it.
	mountpoint --quiet /sys/fs/bpf || mount -t bpf -o mode=0700 bpf /sys/fs/bpf
	printf "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n" >/mnt/usr/lib/systemd/system/test.target
	mkdir /mnt/usr/lib/systemd/system/test.target.wants
	ln -s ../table-allocator-server.socket ../table-allocator-server.service ../table-allocator-watch.service \
		/mnt/usr/lib/systemd/system/test.target.wants
	exec /lib/systemd/systemd --unit=test.target --show-status=no --log-target=console
'`

// systemd boots the host and returns what runs a command on it.
func (h *host) systemd() func(name string, args ...string) result {
	h.t.Helper()
	cgroup := nettest.Cgroup(h.t)
	p := h.start(exec.Command("sh", "-ec", bootScript, "sh", cgroup, staticDir(h.t)))
	one := ""
	eventually(h.t, "systemd has started", func() error {
		out, err := exec.Command("pgrep", "-P", strconv.Itoa(p.cmd.Process.Pid), "-x", "systemd").Output()
		one = strings.TrimSpace(string(out))
		return err
	})
	inside := func(name string, args ...string) result {
		h.t.Helper()
		return h.run("nsenter", append([]string{"--target=" + one, "--all", "--", name}, args...)...)
	}
	eventually(h.t, "the units are up", func() error {
		r := inside("systemctl", "is-active", "test.target")
		if r.code != 0 {
			return fmt.Errorf("test.target: %s %s", r.stdout, r.stderr)
		}
		return nil
	})
	return inside
}

// TestSystemd: the units as they are installed, with all that they forbid, under systemd
// itself.
func TestSystemd(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	inside := h.systemd()
	systemctl := func(args ...string) {
		t.Helper()
		if r := inside("systemctl", args...); r.code != 0 {
			journal := inside("journalctl", "--no-pager", "--lines=50", "--unit=table-allocator-*")
			t.Fatalf("systemctl %q: %+v\n%s", args, r, journal.stdout)
		}
	}
	pid := func(unit string) string {
		t.Helper()
		return inside("systemctl", "show", "--property=MainPID", "--value", unit).stdout
	}
	rules := copyRules("10.77.0.2", "10.77.0.0/24", 10000)
	h.waitRules(rules...)
	systemctl("is-active", "table-allocator-server.socket", "table-allocator-server", "table-allocator-watch")

	// Killed, both come back, and nothing has changed for the address.
	for _, unit := range []string{"table-allocator-server", "table-allocator-watch"} {
		before := pid(unit)
		m := h.monitor()
		systemctl("kill", "--signal=KILL", unit)
		eventually(t, unit+" is restarted", func() error {
			if now := pid(unit); now == before || strings.TrimSpace(now) == "0" {
				return fmt.Errorf("process %s", now)
			}
			return nil
		})
		eventually(t, "nothing is missing", func() error {
			if r := inside("/mnt/usr/sbin/table-allocator-client", "status"); r.code != 0 {
				return fmt.Errorf("status: %+v", r)
			}
			return nil
		})
		m.sync()
		if changes := m.changes(); len(changes) > 0 {
			t.Errorf("%s was killed, and this changed: %q", unit, changes)
		}
	}

	// Within its sandbox the watch makes the cgroup of a link, and removes it.
	for _, tt := range [][2]string{{`{"links":[{"cgroup":true}]}`, "test -k"}, {`{"links":[{}]}`, "test ! -e"}} {
		config, want := tt[0], tt[1]
		inside("sh", "-c", `echo "$1" >/mnt/etc/table-allocator/watch.json`, "sh", config)
		systemctl("reload", "table-allocator-watch")
		eventually(t, want+" its cgroup with "+config, func() error {
			if r := inside("sh", "-c", want+" /sys/fs/cgroup/ta-wan0"); r.code != 0 {
				return fmt.Errorf("%+v; the watch wrote:\n%s", r, inside("journalctl", "--no-pager", "--lines=20", "--unit=table-allocator-watch").stdout)
			}
			return nil
		})
	}
	h.waitRules(rules...) // its guards are gone, too

	// A server that was stopped is started by whoever asks.
	systemctl("stop", "table-allocator-server.service")
	h.ns.IP(t, "address add 10.77.1.2/24 dev wan0")
	h.waitRules(append(copyRules("10.77.1.2", "10.77.1.0/24", 10001), rules...)...)
	systemctl("is-active", "table-allocator-server")

	systemctl("reload", "table-allocator-server", "table-allocator-watch")
	h.ns.IP(t, "address del 10.77.1.2/24 dev wan0")
	h.waitRules(rules...)
	if r := inside("sh", "-c", "echo '{' >/mnt/etc/table-allocator/watch.json; systemctl reload table-allocator-watch"); r.code == 0 {
		t.Error("reload with a broken configuration of the watch succeeds")
	}
	systemctl("is-active", "table-allocator-watch")
	if r := inside("systemctl", "restart", "table-allocator-watch"); r.code == 0 {
		t.Error("a start with a broken configuration succeeds")
	}
	eventually(t, "the watch is not started again and again", func() error {
		r := inside("systemctl", "show", "--property=ActiveState,ExecMainStatus,NRestarts", "table-allocator-watch")
		if !strings.Contains(r.stdout, "ActiveState=failed") || !strings.Contains(r.stdout, "ExecMainStatus=78") || !strings.Contains(r.stdout, "NRestarts=0") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	inside("sh", "-c", "echo '{}' >/mnt/etc/table-allocator/watch.json")
	systemctl("mask", "--runtime", "table-allocator-server.service", "table-allocator-server.socket")
	systemctl("stop", "table-allocator-server.service", "table-allocator-server.socket")
	systemctl("start", "table-allocator-watch") // is up without a server
	systemctl("is-active", "table-allocator-watch")
	systemctl("unmask", "--runtime", "table-allocator-server.service", "table-allocator-server.socket")
	systemctl("start", "table-allocator-server")
	if r := inside("/mnt/usr/sbin/tactl", "release", "--all"); r.code != 1 || !strings.Contains(r.stderr, "systemctl disable --now table-allocator-watch.service") {
		t.Errorf("release --all while the watch is a unit: %+v", r)
	}
	h.waitRules(rules...)
	if r := inside("sh", "-c", "echo '{' >/mnt/etc/table-allocator/server.json; systemctl reload table-allocator-server"); r.code == 0 {
		t.Error("reload with a broken configuration of the server succeeds")
	}
	systemctl("is-active", "table-allocator-server")
	systemctl("stop", "table-allocator-watch", "table-allocator-server")
	h.wantRules(rules...)
	if r := inside("systemctl", "list-units", "--failed", "--plain", "--no-legend"); r.stdout != "" {
		t.Errorf("failed units: %s", r.stdout)
	}
}
