package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	askMark  = `{"ifname":"eth0","cmd":16,"version":1}`
	markEth0 = `"mark":33554432,"mask":4278190080,"block":9002,"fallback":15002}`
	noMark   = `{"version":1,"cmd":2,"table":0,"lease_expires":0}`
)

// TestServerMarks: an interface has one mark, which outlives the server, its leases and the
// boot, and which nobody hears of who did not ask.
func TestServerMarks(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"allowed_users":[21999]`)
	p := h.cPeer("peer")
	understands := strings.Replace(acquire(1), "}", `,"marks":1}`, 1)
	wantTable(t, p.ask(understands), 10000) // byte for byte as the original's: there is no mark
	if got := p.ask(strings.Replace(askMark, "}", `,"known":1}`, 1)); got != noMark {
		t.Errorf("mark that is not there: got %s", got)
	}
	wantRefusal(t, p.askAs(uidNobodyKnows, uidNobodyKnows, askMark), wire.Denied, "only root and the server's own user may ask for marks")
	wantTable(t, p.askAs(uidNobodyKnows, uidNobodyKnows, acquire(2)), 10001) // but lease it may

	wantMark := strings.TrimSuffix(noMark, "}") + "," + markEth0
	if got := p.ask(askMark); got != wantMark {
		t.Errorf("mark: got %s, want %s", got, wantMark)
	}
	server.kill() // right behind the reply
	server = h.serve()
	if got := p.ask(strings.Replace(askMark, "}", `,"known":1}`, 1)); got != wantMark {
		t.Errorf("mark after kill -9: got %s, want %s", got, wantMark)
	}
	wantTable(t, p.ask(acquire(1)), 10000)
	reply := p.ask(understands)
	if !strings.HasPrefix(reply, `{"version":1,"cmd":2,"table":10000,"lease_expires":`) || !strings.HasSuffix(reply, ","+markEth0) {
		t.Errorf("renewal by who understands marks: got %s", reply)
	}
	if got := p.ask(release(1)); got != released {
		t.Errorf("release: got %s", got)
	}
	if got := p.ask(`{"ifname":"wan1","cmd":16,"version":1}`); !strings.Contains(got, `"mark":67108864,`) {
		t.Errorf("mark of another interface: got %s", got)
	}
	wantRefusal(t, p.ask(`{"ifname":"","cmd":16,"version":1}`), wire.Malformed, "ifname: 0 bytes")

	server.kill()
	server = h.start(nettest.RebootCommand(context.Background(), 0, "11111111-2222-3333-4444-555555555555", bin(t, serverBin), "-c", h.dir+"/server.json"))
	server.waitLog("msg=serving")
	if got := p.ask(askMark); got != wantMark {
		t.Errorf("mark after a boot: got %s, want %s", got, wantMark)
	}
	if got := strings.TrimSpace(h.sqlite("select ifname, idx from marks order by idx")); got != "eth0|1\nwan1|2" {
		t.Errorf("sqlite3 shows %q", got)
	}
}

// TestServerMarksRunOut: a mark that rules refer to is nobody else's.
func TestServerMarksRunOut(t *testing.T) {
	h := newHost(t)
	h.serve(`"bind_mark_mask":"0x7000"`, `"bind_priority":500`, `"bind_fallback_priority":600`) // three
	p := h.cPeer("peer")
	ask := func(ifname string) string { return p.ask(strings.Replace(askMark, "eth0", ifname, 1)) }
	want := func(ifname string, index int) {
		t.Helper()
		keys := fmt.Sprintf(`"mark":%d,"mask":28672,"block":%d,"fallback":%d}`, index<<13, 500+2*index, 600+2*index)
		if got := ask(ifname); !strings.HasSuffix(got, keys) {
			t.Errorf("mark of %s: got %s, want %s", ifname, got, keys)
		}
	}
	h.ns.IP(t, "rule add pref 5000 fwmark 0x2000/0x2000 lookup 77") // somebody's, in the bits of 1 and 3
	want("wan0", 2)
	h.ns.IP(t, "-6 rule add pref 505 fwmark 0x4000/0x7000 unreachable protocol 116") // wan0's guard
	wantRefusal(t, ask("wan1"), wire.Exhausted, "all marks are in use: unbind what is not needed any more, or configure a wider bind_mark_mask")
	h.ns.IP(t, "rule del pref 5000")
	want("wan1", 1)
	want("wan2", 3)
	want("wan3", 1)
	h.ns.IP(t, "rule add pref 607 uidrange 1-1 nop protocol 116") // wan2's
	h.ns.IP(t, "rule add pref 502 uidrange 1-1 lookup 10000 protocol 116")
	wantRefusal(t, ask("wan4"), wire.Exhausted, "all marks are in use")
	want("wan0", 2)
	want("wan2", 3)
	h.ns.IP(t, "rule del pref 502")
	want("wan4", 1)
}
