package e2e

import (
	"fmt"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerRoutesOfOthers: a table with routes of another program is not leased, of whatever family the key is, and
// the refusal says which tables those are and what to do.
func TestServerRoutesOfOthers(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "10.9.0.1/24")
	h.link("eth1", "10.8.0.1/24")
	h.ns.IP(t, "route add 172.16.0.0/12 dev eth1 table 10000 proto zebra")
	h.ns.IP(t, "route add blackhole 10.0.0.0/8 table 10001")
	h.serve(`"num_tables":3`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10002)
	wantTable(t, p.ask(request(0, "eth0", "x", 0)), 10002)
	wantTable(t, p.ask(request(10, "eth1", "fd00::1", 0)), 10000) // the same number, and another table
	wantRefusal(t, p.ask(acquire(2)), wire.Exhausted, "no table is free; routes of others are in 10000, 10001: to free a table, ip route flush table 10000")
	h.ns.IP(t, "route flush table 10000")
	if got := p.waitLease(acquire(2)); got != 10000 {
		t.Errorf("table after its routes are gone: %d, want 10000", got)
	}
}

// TestServerTableOfOthers: a table that another program fills for the very address is its own, as that of a cloud's second link by
// systemd-networkd or a script. The rules of a client that was killed, and of the original's, show a table with leftovers.
func TestServerTableOfOthers(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "10.9.0.1/24")
	for i, like := range []string{"protocol static", "", "protocol 116", "pref 10000"} {
		table := fmt.Sprint(10000 + i)
		h.ns.Batch(t, "rule add from 10.9.0."+fmt.Sprint(i+1)+" lookup "+table+" "+like, "route add default via 10.9.0.254 dev eth0 proto static table "+table)
	}
	h.serve(`"num_tables":6`)
	p := h.cPeer("peer")
	for i, table := range []uint32{10004, 10005, 10002, 10003} {
		wantTable(t, p.ask(acquire(i+1)), table)
	}
}

// TestServerRoutesLeft: who held a table last gets it back with the routes that are in it, unless these lead over
// another link.
func TestServerRoutesLeft(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "10.9.0.1/24")
	h.link("eth1", "10.8.0.1/24")
	h.serve(`"num_tables":8`)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(1)), 10000)
	h.ns.IP(t, "route add default dev eth0 table 10000")
	p.ask(release(1))
	wantTable(t, p.ask(acquire(2)), 10001)
	wantTable(t, p.ask(acquire(1)), 10000)
	p.ask(release(1))
	h.ns.IP(t, "route add 172.16.0.0/12 dev eth1 table 10000")
	wantTable(t, p.ask(acquire(1)), 10002)
	// A lease in force stays.
	h.ns.IP(t, "route add 172.16.0.0/12 dev eth1 table 10001")
	wantTable(t, p.ask(acquire(2)), 10001)
	// An identifier gets its table back even from a server that has lost its database.
	h.ns.IP(t, "route add default dev eth1 table 10005")
	wantTable(t, p.ask(`{"address":"vpn","ifname":"tun9","addr_family":0,"cmd":0,"version":1,"want":10005}`), 10005)
}

// TestServerRoutesOfAddressesThatChange: the routes that callers of clients leave, in mode none, do not use up the
// tables, as long as they lead over the link of who asks.
func TestServerRoutesOfAddressesThatChange(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "fd00:9::1/64")
	h.link("eth1", "fd00:8::1/64")
	h.serve(`"num_tables":3`)
	p := h.cPeer("peer")
	for n := range 10 {
		addr := fmt.Sprintf("fd00:9::%x", n+1)
		table, _ := granted(t, p.ask(request(10, "eth0", addr, 0)))
		h.ns.IP(t, fmt.Sprintf("-6 route replace default dev eth0 table %d", table))
		p.ask(request(10, "eth0", addr, 1))
	}
	wantRefusal(t, p.ask(request(10, "eth1", "fd00:8::1", 0)), wire.Exhausted, "ip -6 route flush table 1000")
}

// TestServerRoutesOfManyTables: numbers that are leased one after the other are read together, and those with routes
// are left out all the same, also behind a table that is large.
func TestServerRoutesOfManyTables(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "10.9.0.1/24")
	h.link("eth1", "10.8.0.1/24")
	var lines []string
	for i := range 6000 {
		lines = append(lines, fmt.Sprintf("route add blackhole 172.%d.%d.0/24 table 10020", i>>8, i&0xff))
	}
	for _, table := range []int{10003, 10008, 10009, 10050} {
		lines = append(lines, fmt.Sprintf("route add blackhole 10.0.0.0/8 table %d", table))
	}
	h.ns.Batch(t, lines...)
	h.serve(`"num_tables":100`)
	p := h.cPeer("peer")
	want := uint32(10000)
	for n := range 95 {
		for want == 10003 || want == 10008 || want == 10009 || want == 10020 || want == 10050 {
			want++
		}
		wantTable(t, p.ask(acquire(n+1)), want)
		want++
	}
	wantRefusal(t, p.ask(acquire(200)), wire.Exhausted, "routes of others are in 10003, 10008, 10009, 10020, 1 more")
	// What was read with another number is no news of a table that was leased since.
	p.ask(release(95))
	h.ns.IP(t, "route add 10.0.0.0/8 dev eth1 table 10099")
	wantRefusal(t, p.ask(acquire(200)), wire.Exhausted, "2 more")
}
