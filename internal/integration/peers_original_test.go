//go:build integration

package integration

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// originalConfig is what the server of the original reads.
const originalConfig = `{"socket_path": "tas_socket", "db_path": "/run/original.db", "table_offset": 10000, "num_tables": 40, "table_timeout": 3600,
	"addr_families": {"inet": true, "inet6": true, "unspec": true}}
`

// withDhclient are our hook and that of the C original in dir, both with the dhclient that ifup starts.
func withDhclient(dir string) []peer {
	const start = `rm /sbin/dhcpcd /sbin/udhcpc; ifup wan1 wan2`
	return []peer{
		{name: "table-allocator's hook, with dhclient", ours: true, files: interfaces, start: start, down: `ifdown wan2`, up: `ifup wan2`},
		{name: "the original's hook, with dhclient", original: dir, files: interfaces, down: `ifdown wan2`, up: `ifup wan2`,
			start: `systemd-run --quiet --unit=original table_allocator_server -c /etc/original.json; until grep -a -q tas_socket /proc/net/unix; do sleep 0.1; done; ` + start},
	}
}

// installOriginal installs the commands of the C original with the libraries that the machine may not have, and its hook.
func (m *machine) installOriginal(dir string) {
	m.t.Helper()
	m.write("/etc/original.json", originalConfig, 0o644)
	m.copy(filepath.Join(dir, "multihomed-routing.sh"), "/etc/dhcp/dhclient-enter-hooks.d/multihomed-routing")
	library := regexp.MustCompile(`=> (/\S+)`)
	for _, name := range []string{"table_allocator_server", "table_allocator_client"} {
		path := filepath.Join(dir, name)
		out, _ := exec.Command("ldd", path).Output() // a static program has none
		for _, found := range library.FindAllStringSubmatch(string(out), -1) {
			if file := filepath.Base(found[1]); !strings.HasPrefix(file, "libc.") && !strings.HasPrefix(file, "libm.") {
				m.copy(found[1], "/opt/original/lib/"+file)
			}
		}
		m.copy(path, "/opt/original/"+name)
		m.write("/usr/sbin/"+name, "#!/bin/sh\nLD_LIBRARY_PATH=/opt/original/lib exec /opt/original/"+name+` "$@"`+"\n", 0o755)
		m.sh(`chmod 755 "/opt/original/$1"`, name)
	}
}
