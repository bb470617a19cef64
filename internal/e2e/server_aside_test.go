package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// damage makes the database of a host wrong while no server runs: all of it but the header, or only
// a byte of that, so that all rows can still be read.
func (h *host) damage(all bool) {
	h.t.Helper()
	data, err := os.ReadFile(h.db)
	if err != nil {
		h.t.Fatal(err)
	}
	if all {
		copy(data[100:], bytes.Repeat([]byte{0x5a}, len(data)))
	} else {
		data[18] = 9 // the version of the file format
	}
	if err := os.WriteFile(h.db, data, 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// restartDamaged starts the server again, which sets its database aside.
func (h *host) restartDamaged() *process {
	h.t.Helper()
	before, err := os.ReadFile(h.db)
	if err != nil {
		h.t.Fatal(err)
	}
	server := h.restart()
	if n := strings.Count(server.log.String(), "level=WARN"); n != 1 || !strings.Contains(server.log.String(), "so it is set aside and a new one begun") {
		h.t.Errorf("want one warning, it wrote:\n%s", server.log.String())
	}
	sets, err := filepath.Glob(h.db + ".damaged-2*[0-9]")
	if err != nil || len(sets) != 1 {
		h.t.Fatalf("set aside: %q, %v", sets, err)
	}
	info, err := os.Stat(sets[0])
	if err != nil || info.Mode() != 0o600 {
		h.t.Errorf("what was set aside: %v, %v", info, err)
	}
	if after, err := os.ReadFile(sets[0]); err != nil || !bytes.Equal(before, after) {
		h.t.Errorf("what was set aside is not what it was: %v", err)
	}
	return server
}

// TestServerDamaged: a damaged database keeps no server from starting, and nobody from his number who
// uses it: what rules of the host show goes to nobody else, and back to whom it was, also if he does
// not name it, as clients of the original do not; where there are no rules, what could be read.
func TestServerDamaged(t *testing.T) {
	for _, tt := range []struct {
		name string
		all  bool
	}{{"nothing can be read", true}, {"all can be read", false}} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24", "10.77.0.3/24", "10.77.0.4/24")
			server := h.serve(`"table_timeout":20`, `"num_tables":8`)
			originals, modem := h.cPeer("wan0-10.77.0.3-2"), h.cPeer("wwan0-modem-0")
			askOriginals, askModem := request(2, "wan0", "10.77.0.3", 0), request(0, "wwan0", "modem", 0)
			wantTable(t, modem.ask(`{"want":10002,`+askModem[1:]), 10002) // a number that no rule looks up
			wantTable(t, originals.ask(askOriginals), 10000)
			h.ns.IP(t, "rule add from 10.77.0.3 lookup 10000 pref 10000 protocol 0")
			h.ns.IP(t, "rule add iif lo lookup 10000 pref 91000 protocol 0")
			if got := h.lease("10.77.0.2", "wan0"); got != 10001 {
				t.Fatalf("table: got %d", got)
			}
			if code := server.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
			h.damage(tt.all)
			server = h.restartDamaged()

			// Somebody else comes first, and wants just these numbers.
			stranger := h.cPeer("stranger")
			for n, want := range []uint32{10000, 10001} {
				table, _ := granted(t, stranger.ask(fmt.Sprintf(`{"want":%d,%s`, want, acquire(n)[1:])))
				if table < 10002 {
					t.Errorf("table %d went to another", table)
				}
			}
			if !tt.all {
				another := request(0, "wwan1", "modem", 0)
				if table, _ := granted(t, stranger.ask(`{"want":10002,`+another[1:])); table == 10002 {
					t.Errorf("the table of a modem went to another")
				}
				wantTable(t, modem.ask(askModem), 10002)
			}
			wantTable(t, originals.ask(askOriginals), 10000)
			server.waitLog(`msg="lease granted" ifname=wan0 addr=10.77.0.2 family=inet table=10001`) // to the client that runs
			if got := h.lease("10.77.0.2", "wan0"); got != 10001 {
				t.Errorf("table: got %d", got)
			}
			server.kill()
			h.restart()
			wantTable(t, originals.ask(askOriginals), 10000)
		})
	}
}

// TestServerDamagedBound: programs that are bound to two uplinks stay so without a database: their
// marks go to no other interface, and each gets its own again.
func TestServerDamagedBound(t *testing.T) {
	c := newCrossingAlone(t)
	server := c.serve()
	c.watch("--routes", "copy")
	for n := range c.isps {
		c.waitTables(n)
	}
	p := c.cPeer("peer")
	ask := func(ifname string) string { return p.ask(strings.Replace(askMark, "eth0", ifname, 1)) }
	ask("wan9") // so that the numbers of the others are not what a new database would begin with
	first, second := c.bound("wan1"), c.bound("wan0")
	inet0, _ := at(0)
	inet1, _ := at(1)
	before := [2]string{ask("wan0"), ask("wan1")}
	served := func() {
		t.Helper()
		c.only(1, func() { first.want(inet1, "new s tcp4\nconnect s %s\nask s", far4) })
		c.only(0, func() { second.want(inet0, "new s udp4\nask s %s", far4) })
	}
	served()
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	c.damage(true)
	c.restartDamaged()
	if got := ask("wan8"); got == before[0] || got == before[1] || !strings.Contains(got, `"mark":`) {
		t.Errorf("a new interface: got %s", got)
	}
	for n, ifname := range []string{"wan0", "wan1"} {
		if got := ask(ifname); got != before[n] {
			t.Errorf("%s: got %s, want %s", ifname, got, before[n])
		}
	}
	served()
	third := c.bound("wan1")
	c.only(1, func() { third.want(inet1, "new s tcp4\nconnect s %s\nask s", far4) })
}

// TestServerDamagedMarks: who holds a lease gives the server the mark of his interface again, also where
// no rule shows whose it is.
func TestServerDamagedMarks(t *testing.T) {
	c := newCrossingAlone(t)
	server := c.serve(`"table_timeout":4`)
	c.watch("--routes", "copy")
	for n := range c.isps {
		c.waitTables(n)
	}
	p := c.cPeer("peer")
	ask := func(ifname string) string {
		return p.ask(fmt.Sprintf(`{"ifname":%q,"cmd":16,"version":1,"known":1}`, ifname))
	}
	c.must("bind", "--ifname", "wan1", "--uid", "21001")
	c.must("bind", "--ifname", "wan0", "--uid", "21002")
	before := [2]string{ask("wan0"), ask("wan1")}
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	c.damage(true)
	c.restartDamaged()
	for n, ifname := range []string{"wan0", "wan1"} {
		eventually(t, ifname+" has its mark again", func() error {
			if got := ask(ifname); got != before[n] {
				return fmt.Errorf("got %s, want %s", got, before[n])
			}
			return nil
		})
	}
	// Nobody gets the mark that another interface has.
	wantMark := strings.TrimPrefix(before[0], `{"version":1,"cmd":2,"table":0,"lease_expires":0,`)
	if wantMark == before[0] || ask("wan7") != noMark {
		t.Errorf("marks: %s, %s", before[0], ask("wan7"))
	}
	p.ask(strings.Replace(request(2, "wan7", "10.9.0.7", 0), `"cmd":0`, `"cmd":0,"marks":1,`+strings.TrimSuffix(wantMark, "}"), 1))
	if got := ask("wan7"); got != noMark {
		t.Errorf("the mark of another interface: got %s", got)
	}
}

// TestServerDamagedOriginal: a damaged database of the original is set aside, too.
func TestServerDamagedOriginal(t *testing.T) {
	h := newHost(t)
	now := wire.Seconds(wire.Now())
	h.sqlite(originalSchema + originalInsert(10005, 2, "eth0", "10.9.0.1", now+900, "live") + originalInsert(10007, 2, "eth0", "10.9.0.3", now+100_000, "of an earlier boot"))
	h.damage(false)
	h.config()
	h.restartDamaged()
	p := h.cPeer("peer")
	wantTable(t, p.ask(`{"want":10005,`+acquire(9)[1:]), 10000)
	wantTable(t, p.ask(acquire(1)), 10005)
	wantTable(t, p.ask(acquire(3)), 10007)
}
