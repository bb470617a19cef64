package nat

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m, "nftables") }

// inNamespace runs f in a network namespace. nft runs nft in it.
func inNamespace(t *testing.T, f func(nft func(args string) string)) {
	t.Helper()
	ns := nettest.New(t, "host")
	ns.Do(func() {
		f(func(args string) string {
			t.Helper()
			return ns.Run(t, "nft", strings.Fields(args)...)
		})
	})
}

func sync(t *testing.T, r Ruleset, want bool) {
	t.Helper()
	if changed, err := Sync(r); err != nil || changed != want {
		t.Fatalf("changed: %v, %v; want %v", changed, err, want)
	}
}

var two = Ruleset{Namespaces: []Namespace{{Link: "tav1", Uplinks: []string{"wan1"}}, {Link: "tav2", Uplinks: []string{"wan2", "wan3"}}}, Closed: []string{"wan1"}}

// TestSync: the table is what nft shows of it, it is written only where it differs, and it goes with the last namespace.
func TestSync(t *testing.T) {
	inNamespace(t, func(nft func(string) string) {
		sync(t, Ruleset{}, false)
		sync(t, two, true)
		sync(t, two, false)
		text := nft("list table inet table-allocator")
		at := 0
		for _, want := range []string{
			"chain between", "ct state established,related accept", "icmp type echo-request accept", "icmpv6 type nd-neighbor-solicit accept", "drop",
			"type filter hook input priority filter - 10; policy accept", `iifname "tav1" jump between`, `iifname "tav2" jump between`,
			"type filter hook output priority filter - 10; policy accept", `oifname "tav1" jump between`, `oifname "tav2" jump between`,
			"type filter hook forward priority filter - 10; policy accept",
			`iifname "tav1" oifname "wan1" accept`, `iifname "tav1" drop`, `oifname "tav1" ct state established,related accept`, `oifname "tav1" drop`,
			`iifname "tav2" oifname "wan2" accept`, `iifname "tav2" oifname "wan3" accept`, `iifname "tav2" drop`, `iifname "wan1" drop`,
			"type nat hook postrouting priority srcnat; policy accept", `iifname "tav1" masquerade`,
			"type filter hook postrouting priority srcnat + 10; policy accept", `iifname "tav1" fib saddr . oif type != local drop`,
		} {
			next := strings.Index(text[at:], want)
			if next < 0 {
				t.Fatalf("no %q behind %q in\n%s", want, text[:at], text)
			}
			at += next
		}
		one := two
		one.Namespaces = two.Namespaces[:1]
		sync(t, one, true)
		if text := nft("list table inet table-allocator"); strings.Contains(text, "tav2") {
			t.Error(text)
		}
		sync(t, Ruleset{}, true)
		if text := nft("list ruleset"); text != "" {
			t.Error(text)
		}
	})
}

// TestSyncLost: what another program deletes, all of it or one rule, comes back; tables of others stay.
func TestSyncLost(t *testing.T) {
	inNamespace(t, func(nft func(string) string) {
		nft("add table inet other")
		sync(t, two, true)
		before := nft("list table inet table-allocator")
		for _, args := range []string{"flush chain inet table-allocator postrouting", "delete chain inet table-allocator forward",
			"flush table inet table-allocator", "delete table inet table-allocator"} {
			nft(args)
			sync(t, two, true)
			if after := nft("list table inet table-allocator"); after != before {
				t.Errorf("%s: it was\n%s\nand is\n%s", args, before, after)
			}
		}
		if tables := nft("list tables"); !strings.Contains(tables, "inet other") {
			t.Error(tables)
		}
	})
}

// TestWatch: a change by another program is heard of.
func TestWatch(t *testing.T) {
	inNamespace(t, func(nft func(string) string) {
		w, err := Watch()
		if err != nil {
			t.Fatal(err)
		}
		nft("add table inet other")
		if err := w.Next(); err != nil {
			t.Error(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if err := w.Next(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	})
}
