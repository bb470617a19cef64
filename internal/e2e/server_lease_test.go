package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerPools: as many leases as there are tables, each once, and one that comes back
// is there for the next at once.
func TestServerPools(t *testing.T) {
	for _, tables := range []int{40, 3, 1} {
		t.Run(fmt.Sprint(tables), func(t *testing.T) {
			h := newHost(t)
			server := h.serve(fmt.Sprintf(`"num_tables":%d`, tables))
			p := h.cPeer("peer")
			for n := range tables {
				wantTable(t, p.ask(acquire(n)), uint32(10000+n))
			}
			wantRefusal(t, p.ask(acquire(tables)), wire.Exhausted, "no table is free")
			server.waitLog(fmt.Sprintf(`level=WARN msg="lease refused" ifname=eth0 addr=10.9.0.%d family=inet tag="" uid=0`, tables))
			// Of the other families nothing is gone.
			wantTable(t, p.ask(request(0, "eth0", "x", 0)), 10000)
			if got := len(h.leases()); got != tables+1 {
				t.Errorf("leases: got %d, want %d", got, tables+1)
			}
			wantTable(t, p.ask(acquire(tables/2)), uint32(10000+tables/2)) // renewing needs none
			p.ask(release(tables / 2))
			wantTable(t, p.ask(acquire(tables)), uint32(10000+tables/2))
			wantRefusal(t, p.ask(acquire(tables/2)), wire.Exhausted, "no table is free")
		})
	}
}

// TestServerFamilies: a family that is off is refused, also by its code.
func TestServerFamilies(t *testing.T) {
	h := newHost(t)
	h.serve(`"addr_families":{"inet":true,"inet6":false}`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	wantRefusal(t, p.ask(request(10, "eth0", "fd00::1", 0)), wire.NotServed, "family is not served")
	wantRefusal(t, p.ask(request(0, "eth0", "x", 0)), wire.NotServed, "family is not served")
	h.wantLeases("10000|inet|eth0|10.9.0.1||0")
}

// TestServerExpiry: a lease ends by itself, is logged and gone from the view, and its
// table is free.
func TestServerExpiry(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":1`, `"table_timeout":1`)
	p := h.cPeer("peer")
	table, expires := granted(t, p.ask(acquire(1)))
	server.waitLog(fmt.Sprintf(`msg="lease expired" ifname=eth0 addr=10.9.0.1 family=inet table=%d tag="" owner=0 expires=%d`, table, expires))
	h.wantLeases()
	// Now the pool is full again. What is free is found while somebody asks, too.
	p.waitLease(acquire(2))
	if got := p.waitLease(acquire(3)); got != table {
		t.Errorf("table: got %d, want %d", got, table)
	}
}

// TestServerStableNumbers: a key gets its number again while nobody else needed it.
func TestServerStableNumbers(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":3`)
	p := h.cPeer("peer")
	for n := range 3 {
		wantTable(t, p.ask(acquire(n)), uint32(10000+n))
	}
	for n := range 3 {
		p.ask(release(n))
	}
	wantTable(t, p.ask(acquire(1)), 10001)
	server.kill()
	h.restart()
	wantTable(t, p.ask(acquire(2)), 10002)
	wantTable(t, p.ask(acquire(9)), 10000) // another key takes the one that is left
	wantRefusal(t, p.ask(acquire(0)), wire.Exhausted, "no table is free")
}

// TestServerRulesOfOthers: numbers that a rule refers to are not leased.
func TestServerRulesOfOthers(t *testing.T) {
	h := newHost(t)
	for _, rule := range []string{
		"from 10.1.1.1 lookup 10000 priority 5000", // of another tool
		"from 10.1.1.1 lookup 10001 priority 5001 protocol 116",
		"to 10.1.0.0/16 lookup 10002 priority 20000 protocol 116", // ours, of a holder whom nobody knows
		"iif lo lookup 10003 priority 91000 protocol 116",
		"from 10.9.0.0/24 lookup 10004 priority 5004",
		"not from 10.9.0.1 lookup 10005 priority 5005",
		"fwmark 1 lookup 10006 priority 5006",
		"from 10.9.0.1 lookup 10007 priority 5007", // of the very address that will ask
		"from 10.9.0.1 fwmark 1 lookup 10007 priority 5008",
	} {
		h.ns.IP(t, "rule add "+rule)
	}
	h.ns.IP(t, "-6 rule add from fd00::9 lookup 10001 priority 5000")
	h.serve(`"num_tables":12`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(2)), 10008)
	wantTable(t, p.ask(acquire(1)), 10007)
	// Rules of inet mean nothing to inet6; an identifier may become either.
	wantTable(t, p.ask(request(10, "eth1", "fd00::1", 0)), 10000)
	wantTable(t, p.ask(request(10, "eth1", "fd00::2", 0)), 10002)
	wantTable(t, p.ask(request(0, "eth0", "x", 0)), 10008)

	for _, n := range []int{3, 4, 5} {
		wantTable(t, p.ask(acquire(n)), uint32(10006+n))
	}
	wantRefusal(t, p.ask(acquire(6)), wire.Exhausted, "no table is free")
	// What a rule kept is there at once when the rule goes.
	h.ns.IP(t, "rule del priority 5000")
	wantTable(t, p.ask(acquire(6)), 10000)
	wantRefusal(t, p.ask(acquire(7)), wire.Exhausted, "no table is free")
	// A rule on a table that is held changes nothing for its holder.
	h.ns.IP(t, "rule add from 10.1.1.1 lookup 10008 priority 5000")
	wantTable(t, p.ask(acquire(2)), 10008)
	// And a rule that came after a lease keeps it from the next. The server looks at the
	// rules again when it has no table left, so it knows this one now.
	wantRefusal(t, p.ask(acquire(7)), wire.Exhausted, "no table is free")
	p.ask(release(2))
	wantRefusal(t, p.ask(acquire(7)), wire.Exhausted, "no table is free")
}

// TestServerRulesOfDeadHolder: the rules of whoever held the table here last do not keep
// it, since the next client of ours replaces them; those of anybody else do.
func TestServerRulesOfDeadHolder(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":1`, `"table_timeout":1`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	for _, rule := range []string{
		"from 10.9.0.1 lookup 10000 priority 10000 protocol 116",
		"to 10.9.0.0/24 lookup 10000 priority 20000 protocol 116",
		"iif lo lookup 10000 priority 91000 protocol 116",
	} {
		h.ns.IP(t, "rule add "+rule)
	}
	server.waitLog("lease expired")
	wantTable(t, p.ask(acquire(2)), 10000)
	server.waitLog("lease expired\" ifname=eth0 addr=10.9.0.2")
	// Now 10.9.0.2 was last, and the rules of 10.9.0.1 are a stranger's.
	wantRefusal(t, p.ask(acquire(3)), wire.Exhausted, "no table is free")
	wantTable(t, p.ask(acquire(1)), 10000)
}

// TestServerKilledBeforeReply: who was not told of his lease has it all the same.
func TestServerKilledBeforeReply(t *testing.T) {
	h := newHost(t)
	config := h.config()
	server := h.start(exec.Command("strace", "-f", "-qq", "-o", h.dir+"/strace", "-e", "trace=sendmmsg",
		"-e", "inject=sendmmsg:signal=SIGKILL:when=1", bin(t, serverBin), "-c", config))
	server.waitLog("msg=serving")
	p := h.cPeer("peer")
	p.send(acquire(1))
	server.wait()
	if trace, err := os.ReadFile(h.dir + "/strace"); err != nil || !strings.Contains(string(trace), "killed by SIGKILL") {
		t.Fatalf("strace: %v\n%s", err, trace)
	}
	p.nothing()
	if got := h.sqlite("select RtTable, Addr from RtTables"); got != "10000|10.9.0.1\n" {
		t.Errorf("database: got %q, want the lease", got)
	}
	h.restart()
	wantTable(t, p.ask(acquire(2)), 10001)
	wantTable(t, p.ask(acquire(1)), 10000)
	h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.2||0")
}

// TestServerRestart: leases outlive the server, however it ends, and what was not written
// yet is when it is asked to end.
func TestServerRestart(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":3`)
	p := h.cPeer("peer")
	for n := range 2 {
		wantTable(t, p.ask(acquire(n)), uint32(10000+n))
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		tag := strings.ToLower(unix.SignalName(sig))
		_, expires := granted(t, p.ask(`{"tag":"`+tag+`",`+acquire(0)[1:]))
		if err := server.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if code := server.wait(); code != 0 {
			t.Errorf("exit code after %v: got %d, want 0", sig, code)
		}
		if !strings.Contains(server.log.String(), "msg=stopped") {
			t.Errorf("log after %v does not say that it stopped", sig)
		}
		want := fmt.Sprintf("10000|%s|%d\n", tag, expires)
		if got := h.sqlite("select RtTable, Tag, LeaseExpires from RtTables where Addr = '10.9.0.0'"); got != want {
			t.Errorf("database after %v: got %q, want %q", sig, got, want)
		}
		server = h.restart()
	}
	server.kill()
	h.restart()
	wantTable(t, p.ask(acquire(5)), 10002)
	wantTable(t, p.ask(acquire(1)), 10001)
	wantTable(t, p.ask(acquire(0)), 10000)
	wantRefusal(t, p.ask(acquire(6)), wire.Exhausted, "no table is free")
}

// TestServerDownTooLong: a holder that could not renew while the server was down has the
// time to do so afterwards.
func TestServerDownTooLong(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":1`, `"table_timeout":1`)
	p := h.cPeer("peer")
	_, expires := granted(t, p.ask(acquire(1)))
	server.kill()
	eventually(t, "the lease is over", func() error {
		if now := wire.Seconds(wire.Now()); now <= expires {
			return fmt.Errorf("now it is %d, the lease ends at %d", now, expires)
		}
		return nil
	})
	h.config(`"num_tables":1`, `"table_timeout":3600`)
	h.restart()
	wantRefusal(t, p.ask(acquire(2)), wire.Exhausted, "no table is free")
	wantTable(t, p.ask(acquire(1)), 10000)
}

// TestServerPoolMoves: leases outside of the pool are kept until they end and not handed
// out again.
func TestServerPoolMoves(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":3`)
	p := h.cPeer("peer")
	for n := range 3 {
		wantTable(t, p.ask(acquire(n)), uint32(10000+n))
	}
	server.stop()
	h.config(`"table_offset":10002`, `"num_tables":2`)
	h.restart()
	h.wantLeases("10000|inet|eth0|10.9.0.0||0", "10001|inet|eth0|10.9.0.1||0", "10002|inet|eth0|10.9.0.2||0")
	if got := p.ask(release(0)); got != released {
		t.Errorf("release of a table outside: got %s", got)
	}
	wantTable(t, p.ask(acquire(9)), 10003)
	wantRefusal(t, p.ask(acquire(8)), wire.Exhausted, "no table is free")
	wantTable(t, p.ask(acquire(2)), 10002)
}

// TestServerReboot: after a boot, old rows are a preference and no lease.
func TestServerReboot(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":2`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	wantTable(t, p.ask(acquire(2)), 10001)
	h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.2||0")
	server.kill() // as the machine does

	uptime := wire.Now()
	server = h.start(nettest.RebootCommand(context.Background(), -uptime/2, "11111111-2222-3333-4444-555555555555",
		bin(t, serverBin), "-c", h.dir+"/server.json"))
	server.waitLog("msg=serving")
	server.waitLog("held=0")
	h.wantLeases()
	table, expires := granted(t, p.ask(acquire(2)))
	if table != 10001 {
		t.Errorf("the number of before: got %d, want 10001", table)
	}
	if latest := wire.Seconds(wire.Now()-uptime/2) + 3601; expires > latest {
		t.Errorf("lease_expires: got %d, want at most %d by the clock of the new boot", expires, latest)
	}
	wantTable(t, p.ask(acquire(3)), 10000) // nobody has it, although a row says so
	wantRefusal(t, p.ask(acquire(1)), wire.Exhausted, "no table is free")
	h.wantLeases("10000|inet|eth0|10.9.0.3||0", "10001|inet|eth0|10.9.0.2||0")
	left := h.sqlite("select min(seconds_left), max(seconds_left) from leases")
	var least, most int
	if _, err := fmt.Sscanf(left, "%d|%d", &least, &most); err != nil || least < 3600-300 || most > 3600 {
		t.Errorf("seconds left: got %q, want almost an hour", left)
	}
}

// TestServerOtherNamespace: a database that has moved to another network namespace has
// preferences for it, and no leases.
func TestServerOtherNamespace(t *testing.T) {
	h := newHost(t)
	server := h.serve(`"num_tables":2`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	wantTable(t, p.ask(acquire(2)), 10001)

	other := hostIn(t, nettest.New(t, "other"))
	other.db = h.db
	other.refuse(exec.Command(bin(t, serverBin), "-c", h.dir+"/server.json"),
		fmt.Sprintf("another server uses it (pid %d)", server.cmd.Process.Pid))
	server.stop()
	server = other.start(exec.Command(bin(t, serverBin), "-c", h.dir+"/server.json"))
	server.waitLog("msg=serving")
	other.wantLeases()
	q := other.cPeer("peer")
	wantTable(t, q.ask(acquire(2)), 10001)
	wantTable(t, q.ask(acquire(3)), 10000)
	other.wantLeases("10000|inet|eth0|10.9.0.3||0", "10001|inet|eth0|10.9.0.2||0")
}

// TestServerTwoOnOneDatabase: under another name a second server would give out the same
// tables; it does not start.
func TestServerTwoOnOneDatabase(t *testing.T) {
	h := newHost(t)
	first := h.serve()
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	h.refuse(exec.Command(bin(t, serverBin), "-c", h.config(`"socket_path":"other"`)),
		fmt.Sprintf("another server uses it (pid %d)", first.cmd.Process.Pid))
	wantTable(t, p.ask(acquire(2)), 10001)
	h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.2||0")
	// A killed server locks nobody out.
	first.kill()
	h.serve(`"socket_path":"other"`)
	p.to = exactName("other")
	wantTable(t, p.ask(acquire(3)), 10002)
}

// TestServerTwoOfTheSameTables: a second server that would give out the same tables from another database says so, and whose
// they are. One with other tables does not.
func TestServerTwoOfTheSameTables(t *testing.T) {
	h := newHost(t)
	first := h.serve()
	second := h.serve(`"socket_path":"other"`, fmt.Sprintf("db_path:%q", h.db+"2"), "table_offset:10039")
	second.waitLog(fmt.Sprintf(`another server leases the same tables, so two addresses may get one: stop it, or give one of them another table_offset" owner="pid %d`, first.cmd.Process.Pid))
	third := h.serve(`"socket_path":"third"`, fmt.Sprintf("db_path:%q", h.db+"3"), "table_offset:10100")
	if text := third.log.String() + first.log.String(); strings.Contains(text, "same tables") {
		t.Errorf("tables that no other server has: %s", text)
	}
}

// TestServerView is what people see with sqlite3 while the server runs.
func TestServerView(t *testing.T) {
	h := newHost(t)
	if err := addUsers(); err != nil {
		t.Fatal(err)
	}
	h.serve(`"allowed_users":["anna"]`)
	p := h.cPeer("peer")
	before := time.Now()
	_, expires := granted(t, p.ask(`{"tag":"DSL, \"fast\"",`+acquire(1)[1:]))
	wantTable(t, p.askAs(uidAnna, uidAnna, request(10, "wwan0", "fd00::1", 0)), 10001)
	got := h.sqlite(`select "table", family, ifname, address, tag, owner from leases`)
	if want := "10000|inet|eth0|10.9.0.1|DSL, \"fast\"|0\n10001|inet6|wwan0|fd00::1||21001\n"; got != want {
		t.Errorf("view: got %q, want %q", got, want)
	}
	got = strings.TrimSpace(h.sqlite("select expires_at, seconds_left from leases where family = 'inet'"))
	text, left, _ := strings.Cut(got, "|")
	at, err := time.Parse(time.DateTime, text)
	if err != nil {
		t.Fatal(err)
	}
	if first, last := before.Add(3590*time.Second), time.Now().Add(3610*time.Second); at.Before(first) || at.After(last) {
		t.Errorf("expires_at: got %v, want %v to %v", at, first, last)
	}
	if left == "" || strings.HasPrefix(left, "-") {
		t.Errorf("seconds_left: got %q, want some", left)
	}
	want := fmt.Sprintf("10000|2|eth0|10.9.0.1|%d|DSL, \"fast\"\n", expires)
	if got := h.sqlite("select RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag from RtTables where AddrFamily = 2"); got != want {
		t.Errorf("RtTables: got %q, want %q", got, want)
	}

	// A reader that takes its time keeps nobody waiting.
	reader := exec.Command("sqlite3", h.db)
	in, err := reader.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	started := h.start(reader)
	if _, err := fmt.Fprintln(in, "begin; select 'reading', count(*) from leases;"); err != nil {
		t.Fatal(err)
	}
	started.waitLog("reading|2")
	wantTable(t, p.ask(acquire(2)), 10002)
	if _, err := fmt.Fprintln(in, "select 'still', count(*) from leases;"); err != nil {
		t.Fatal(err)
	}
	started.waitLog("still|2")
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	started.wait()
	if got := h.sqlite("select count(*) from leases"); got != "3\n" {
		t.Errorf("leases: got %q, want 3", got)
	}
}
