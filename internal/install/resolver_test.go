package install

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSetServers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "servers")
	one, two := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.10")
	ns := []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("192.0.2.54")}
	set := func(addr netip.Addr, servers []netip.Addr, wantChanged bool, want ...string) {
		t.Helper()
		changed, err := setServers(path, addr, servers)
		if err != nil || changed != wantChanged {
			t.Errorf("changed %v, %v, want %v", changed, err, wantChanged)
		}
		text, err := os.ReadFile(path)
		if err != nil && len(want) > 0 {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(text)); got != strings.Join(want, "\n") {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	set(one, nil, false)
	set(one, ns, true, "server=192.0.2.53@10.0.0.1", "server=192.0.2.54@10.0.0.1")
	set(one, ns, false, "server=192.0.2.53@10.0.0.1", "server=192.0.2.54@10.0.0.1")
	set(two, ns[:1], true, "server=192.0.2.53@10.0.0.1", "server=192.0.2.54@10.0.0.1", "server=192.0.2.53@10.0.0.10")
	// 10.0.0.1 is not 10.0.0.10, and what others wrote stays.
	if err := os.WriteFile(path, []byte("# mine\nserver=/lan/10.0.0.1\nserver=192.0.2.53@10.0.0.1\nserver=192.0.2.53@10.0.0.10"), 0o644); err != nil {
		t.Fatal(err)
	}
	set(one, nil, true, "# mine", "server=/lan/10.0.0.1", "server=192.0.2.53@10.0.0.10")
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}
}
