package e2e

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// staticDir has the commands as they ship: without cgo, and without the race detector.
func staticDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("TABLE_ALLOCATOR_STATIC_BIN"); dir != "" {
		return dir
	}
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", dir+"/", "../../cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the commands: %v\n%s", err, out)
	}
	return dir
}

// TestStatic: what ships works, too. All other tests run commands with the race detector,
// which are linked with the C library.
func TestStatic(t *testing.T) {
	h := newHost(t)
	if err := addUsers(); err != nil {
		t.Fatal(err)
	}
	dir := staticDir(t)
	server, client := filepath.Join(dir, serverBin), filepath.Join(dir, clientBin)
	for _, path := range []string{server, client} {
		f, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				t.Errorf("%s is linked dynamically", path)
			}
		}
		if r := h.run(path, "--version"); r.code != 0 || strings.TrimSpace(r.stdout) == "" {
			t.Errorf("%s --version: got %+v", path, r)
		}
	}

	h.link("wan0", "10.77.0.2/24")
	p := h.start(exec.Command(server, "-c", h.config(`"allowed_users":["anna"]`, `"allowed_groups":["leasers"]`)))
	p.waitLog("msg=serving")
	r := h.run(client, "-l", filepath.Join(h.dir, "client.log"), "-4", "-a", "10.77.0.2", "-i", "wan0", "-t", "cable")
	if r.code != 0 || r.stdout != "10000\n" {
		t.Fatalf("client: got %+v, want table 10000", r)
	}
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.wantLeases("10000|inet|wan0|10.77.0.2|cable|0")
	if got := h.sqlite("select RtTable, Addr from RtTables"); got != "10000|10.77.0.2\n" {
		t.Errorf("the original's view: got %q", got)
	}

	// Names and memberships are read from /etc/passwd and /etc/group by Go itself.
	peer := h.cPeer("peer")
	wantTable(t, peer.askAs(uidAnna, uidAnna, acquire(1)), 10001)
	wantTable(t, peer.askAs(uidBert, uidBert, acquire(2)), 10002)
	wantRefusal(t, peer.askAs(uidCarl, uidCarl, acquire(3)), wire.Denied, fmt.Sprintf("uid %d is not permitted", uidCarl))
	for n, uid := range map[int]int{1: uidAnna, 2: uidBert} {
		if got := peer.askAs(uid, uid, release(n)); got != released {
			t.Errorf("release by uid %d: got %s", uid, got)
		}
	}

	h.ns.IP(t, "address del 10.77.0.2/24 dev wan0")
	h.waitClean()
	if code := p.stop(); code != 0 {
		t.Errorf("server: exit code %d after SIGTERM, want 0", code)
	}
}
