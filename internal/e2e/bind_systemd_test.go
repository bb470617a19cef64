package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// TestBindSystemd: a unit that is bound from before its first process on, and one that binds itself,
// which is its unit's as ever.
func TestBindSystemd(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	inside := h.systemd()
	must := func(name string, args ...string) string {
		t.Helper()
		r := inside(name, args...)
		if r.code != 0 {
			t.Fatalf("%s %q: %+v", name, args, r)
		}
		return r.stdout
	}
	h.waitRules(copyRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	client := filepath.Join("/mnt/usr/sbin", clientBin)
	const out = "/tmp/marks" // the machine's own

	properties := strings.Fields(must(client, "bind", "--ifname", "wan0", "--pin"))
	if len(properties) != 6 {
		t.Fatalf("lines for a unit: %q", properties)
	}
	args := []string{"--unit=pinned", "--wait", "--quiet"}
	for _, p := range properties {
		args = append(args, "--property="+p)
	}
	const marks = `import socket
print([socket.socket(f, t).getsockopt(socket.SOL_SOCKET, 36) for f in (socket.AF_INET, socket.AF_INET6) for t in (socket.SOCK_STREAM, socket.SOCK_DGRAM)])`
	must("systemd-run", append(args, "sh", "-c", "python3 -c '"+marks+"' >"+out)...)
	const want = "[33554432, 33554432, 33554432, 33554432]\n" // 0x2000000, of the first interface
	if text := must("cat", out); text != want {
		t.Errorf("marks of a pinned unit's sockets: %q, want %q", text, want)
	}
	must(client, "unbind", "--ifname", "wan0", "--pin")
	if r := inside("ls", "/sys/fs/bpf/table-allocator/wan0"); r.code == 0 {
		t.Errorf("pins left: %+v", r)
	}

	must("systemd-run", "--unit=itself", client, "run", "--ifname", "wan0", "sh", "-c", "python3 -c '"+marks+"' >"+out+".2; exec sleep 1000")
	eventually(t, "the unit has made its sockets", func() error {
		if r := inside("cat", out+".2"); r.stdout != want {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	must("systemctl", "daemon-reload")
	if shown := must("systemctl", "status", "itself"); !strings.Contains(shown, "ta-wan0") || !strings.Contains(shown, "sleep 1000") {
		t.Errorf("systemctl status:\n%s", shown)
	}
	if r := inside(client, "bound"); !strings.Contains(r.stdout, "(sleep)") || !strings.Contains(r.stdout, "blocked: no route") {
		t.Errorf("bound: %+v", r) // wan0 has no default route
	}

	// The watch, with the rights of its unit, opens the lock for a link that is plugged in again.
	const sends = `import socket, time
while True:
	s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
	try: s.sendto(b"?", ("10.77.0.9", 9)); said = "sent"
	except OSError as e: said = e.strerror
	open("` + out + `.3", "w").write(said)
	time.sleep(.05)`
	must("systemd-run", "--unit=sender", client, "run", "--ifname", "wan0", "python3", "-c", sends)
	said := func(want string) {
		t.Helper()
		eventually(t, "the bound program says "+want, func() error {
			if r := inside("cat", out+".3"); r.stdout != want {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	}
	said("sent")
	h.ns.IP(t, "link del wan0")
	said("Network is unreachable")
	h.link("wan0", "10.77.0.2/24")
	said("sent")
	must("systemctl", "stop", "sender", "itself")
	eventually(t, "the unit's process has ended, its cgroup is gone", func() error {
		if r := inside("pgrep", "-x", "sleep"); r.code == 0 {
			return errors.New("it has not")
		}
		if r := inside("find", "/sys/fs/cgroup", "-name", "ta-*"); r.stdout != "" {
			return errors.New(r.stdout)
		}
		return nil
	})
}
