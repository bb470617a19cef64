//go:build integration

package integration

import (
	"path/filepath"
	"testing"
)

// image makes /usr read-only, as systems have it that are images, and /usr/local a part of /var, as OSTree has it.
const image = `mkdir /var/usrlocal; cp -a /usr/local/. /var/usrlocal; rm -r /usr/local; ln -s ../var/usrlocal /usr/local
	mount --bind /usr /usr; mount -o remount,bind,ro /usr; if touch /usr/bin/new 2>/dev/null; then exit 1; fi`

// TestMakeInstall: make install on a machine that runs systemd, and make uninstall while all of it runs.
func TestMakeInstall(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, suite, before string }{{"bookworm", "bookworm", ""}, {"trixie", "trixie", ""}, {"image", "trixie", image}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := boot(t, debian(tt.suite, base))
			i := m.behind(2)
			m.sh(`mkdir -p /root/source/bin`)
			if err := copyModule(m.root + "/root/source"); err != nil {
				t.Fatal(err)
			}
			m.copy("/usr/bin/make", "/usr/bin/make")                      // it needs nothing but the C library
			programs, err := filepath.Glob("../../bin/table-allocator-*") // make integration has built them
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range programs {
				m.copy(path, "/root/source/bin/"+filepath.Base(path))
			}
			m.sh(`chmod 755 /usr/bin/make /root/source/bin/*; ` + tt.before)
			m.sh(`make -C /root/source install; systemctl daemon-reload; systemctl enable --now table-allocator-server table-allocator-watch`)
			m.uplink(1)
			m.uplink(2)
			i.waitUplinks()
			m.wait("status finds no fault", `table-allocator-client status`)
			m.want(`systemd-sysusers; make -C /root/source install >/dev/null; stat -c %G:%a /usr/local/sbin/table-allocator-enter
				groupdel table-allocator; chgrp 987 /usr/local/sbin/table-allocator-enter; systemd-sysusers; getent group table-allocator`,
				"table-allocator:750", "table-allocator:x:987:")
			m.sh(`make -C /root/source uninstall`)
			m.want(`ip -N rule | grep "proto 116" || :; ip -N -6 rule | grep "proto 116" || :; ip -N route show table all proto 116; ip -N -6 route show table all proto 116
				pidof table-allocator-client table-allocator-server || :; grep -a tas_ /proc/net/unix || :`)
			m.want(traces+`; systemctl list-units --all --plain --no-legend "*table-allocator*"; systemctl --failed --plain --no-legend`,
				"/var/lib/table-allocator")
		})
	}
}
