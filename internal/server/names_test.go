package server

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/table-allocator/table-allocator/internal/allocator"
)

func lease(ifname string, table uint32) allocator.Lease {
	return allocator.Lease{Key: allocator.Key{Family: allocator.Inet, Ifname: ifname}, Table: table}
}

func TestNameTables(t *testing.T) {
	none := names{}
	for _, tt := range []struct {
		name   string
		leases []allocator.Lease
		have   names
		want   string
	}{
		{"none", nil, none, ""},
		{"a table of both families", []allocator.Lease{lease("wan0", 10000), lease("wan0", 10000), lease("wan1", 10001)}, none, "10000\tta-wan0\n10001\tta-wan1\n"},
		{"a second table of a link", []allocator.Lease{lease("wan0", 10003), lease("wan0", 10001)}, none, "10001\tta-wan0\n10003\tta-wan0-10003\n"},
		{"a link called like that", []allocator.Lease{lease("wan0", 10001), lease("wan0-10003", 10002), lease("wan0", 10003)}, none, "10001\tta-wan0\n10002\tta-wan0-10003\n"},
		{"two links with one number", []allocator.Lease{lease("wan0", 10000), lease("wan1", 10000)}, none, ""},
		{"what a shell or ip would not take as a word", []allocator.Lease{lease("a b", 1), lease("a/b", 2), lease("ä", 3), lease("#a", 4), lease("", 5), lease("a\nb", 6)}, none, ""},
		{"what it takes", []allocator.Lease{lease("eth0.7_x-y", 7)}, none, "7\tta-eth0.7_x-y\n"},
		{"a name that iproute2 has", []allocator.Lease{lease("wan0", 10000)}, names{of: map[string]bool{"ta-wan0": true}}, ""},
		{"a table that has a name", []allocator.Lease{lease("wan0", 10000)}, names{named: map[uint32]bool{10000: true}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := nameTables(tt.leases, tt.have); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestReadNames(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"rt_tables": "#\n255\tlocal\n0x64 vpn\nx y\n#1 inr.ruhep\n7\n", "own": "10000 ta-wan0\n", "b.conf": "10001 ta-wan1\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	own := filepath.Join(dir, "own")
	if err := os.Symlink(own, filepath.Join(dir, "a.conf")); err != nil {
		t.Fatal(err)
	}
	got := readNames([]string{filepath.Join(dir, "rt_tables"), filepath.Join(dir, "*.conf"), filepath.Join(dir, "nothing")}, own)
	if !got.of["local"] || !got.of["vpn"] || !got.of["ta-wan1"] || len(got.of) != 3 || !got.named[100] || !got.named[255] || !got.named[10001] || len(got.named) != 3 {
		t.Errorf("%+v", got)
	}
}
