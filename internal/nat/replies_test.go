package nat

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

var (
	replies4, other4 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	replies6         = netip.MustParseAddr("2001:db8::1")
)

func syncReplies(t *testing.T, all Replies, want bool) {
	t.Helper()
	if changed, err := SyncReplies(all); err != nil || changed != want {
		t.Fatalf("%v: changed: %v, %v; want %v", all, changed, err, want)
	}
}

// listReplies is what nft lists. What it lists it can load again.
func listReplies(t *testing.T, nft func(string) string) string {
	t.Helper()
	text := nft("list ruleset")
	file := filepath.Join(t.TempDir(), "ruleset")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	nft("-j list ruleset")
	nettest.New(t, "elsewhere").Run(t, "nft", "-f", file)
	return text
}

// TestSyncReplies: the tables are what nft shows of them, are written only where they differ, and go with the last address.
func TestSyncReplies(t *testing.T) {
	inNamespace(t, func(nft func(string) string) {
		nft("add table inet other")
		syncReplies(t, nil, false)
		both := Replies{replies4: 0x01002710, replies6: 0x01002711}
		syncReplies(t, both, true)
		syncReplies(t, both, false)
		text := listReplies(t, nft)
		for _, want := range []string{"ct original ip daddr 192.0.2.1 meta mark set 0x01002710", "ct original ip6 daddr 2001:db8::1 meta mark set 0x01002711",
			"ct direction reply ct status dnat meta mark 0x00000000 jump published", "elements = { 0x01002710 }",
			"ct direction original ip daddr @addresses jump asking", "socket wildcard 1 jump answering",
			"ip daddr 192.0.2.1 update @asked_c0000201 { ip saddr . udp sport . udp dport } return",
			"ip6 saddr 2001:db8::1 ip6 daddr . udp dport . udp sport @asked_20010db8000000000000000000000001 accept",
			"ip6 daddr . udp dport . udp sport @asked_20010db8000000000000000000000001 ip6 saddr set 2001:db8::1 accept"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in\n%s", want, text)
			}
		}
		if all, err := RepliesOf(); err != nil || len(all) != 2 || !all[replies4] || !all[replies6] {
			t.Errorf("%v, %v", all, err)
		}
		syncReplies(t, Replies{replies4: 0x01002710}, true)
		if tables := nft("list tables"); strings.Contains(tables, "ip6 ") {
			t.Error(tables)
		}
		syncReplies(t, nil, true)
		if tables := nft("list tables"); strings.TrimSpace(tables) != "table inet other" {
			t.Error(tables)
		}
	})
}

// TestSyncRepliesLost: what another program changes is restored, and who asked an address stays known while others come and go.
func TestSyncRepliesLost(t *testing.T) {
	inNamespace(t, func(nft func(string) string) {
		all := Replies{replies4: 0x01002710, other4: 0x01002711}
		syncReplies(t, all, true)
		before := nft("list ruleset")
		const table = " ip table-allocator-replies "
		for _, args := range []string{"flush chain" + table + "output", "delete table" + table, "flush ruleset", "flush set" + table + "addresses",
			"delete element" + table + "marks { 0x01002710 }", "add element" + table + "addresses { 192.0.2.9 }", "insert rule" + table + "forward accept"} {
			nft(args)
			syncReplies(t, all, true)
			syncReplies(t, all, false)
			if after := nft("list ruleset"); after != before {
				t.Errorf("%s: it was\n%s\nand is\n%s", args, before, after)
			}
		}
		nft("add element" + table + "asked_c0000201 { 198.51.100.1 . 7 . 53 }")
		asked := func() {
			t.Helper()
			if text := nft("list set" + table + "asked_c0000201"); !strings.Contains(text, "198.51.100.1") {
				t.Errorf("it is forgotten who asked:\n%s", text)
			}
		}
		nft("flush chain" + table + "output")
		all[netip.MustParseAddr("192.0.2.3")] = 0x01002712
		syncReplies(t, all, true)
		asked()
		listReplies(t, nft)
		delete(all, other4)
		syncReplies(t, all, true)
		asked()
		if text := nft("list ruleset"); strings.Contains(text, "192.0.2.2") || strings.Contains(text, "asked_c0000202") {
			t.Errorf("an address is left:\n%s", text)
		}
	})
}
