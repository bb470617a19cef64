package client

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServedSince: what a client wrote down that has come since the names of holders were read is not what one that died left.
func TestServedSince(t *testing.T) {
	key := wire.Key{Family: wire.Inet, Ifname: "since0", Address: "192.0.2.77"}
	addr := netip.MustParseAddr(key.Address)
	h := &host{memory: remember.Dir(filepath.Join(t.TempDir(), "4026531840"))}
	if err := os.Mkdir(string(h.memory), 0o700); err != nil {
		t.Fatal(err)
	}
	file := h.memory.Path(key.String())
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	names, err := peer.HolderNames()
	if err != nil {
		t.Fatal(err)
	}
	served := servedNow(servedBy(names))
	want := func(want bool) {
		t.Helper()
		if got, err := served(addr); err != nil || got != want {
			t.Errorf("served: %v, %v; want %v", got, err, want)
		}
		if err := h.dropStale(names); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(file); (err == nil) != want {
			t.Errorf("what is remembered: %v; want it: %v", err, want)
		}
	}
	conn, err := peer.Open(key, peer.AsHolder)
	if err != nil {
		t.Fatal(err)
	}
	want(true)
	conn.Close()
	want(false)
}
