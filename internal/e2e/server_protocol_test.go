package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerBytes is the conversation of the original, byte for byte.
func TestServerBytes(t *testing.T) {
	h := newHost(t)
	h.serve()
	p := h.cPeer("ta0-10.77.0.2-2")

	before := wire.Seconds(wire.Now())
	reply := p.ask(`{"address":"10.77.0.2","ifname":"ta0","tag":"op1","addr_family":2,"cmd":0,"version":1}`)
	after := wire.Seconds(wire.Now())
	expires := before + 3600
	for expires < after+3600 && !strings.Contains(reply, fmt.Sprint(expires)) {
		expires++
	}
	if want := fmt.Sprintf(`{"version":1,"cmd":2,"table":10000,"lease_expires":%d}`, expires); reply != want {
		t.Errorf("request: got %s, want %s", reply, want)
	}
	h.wantLeases("10000|inet|ta0|10.77.0.2|op1|0")

	reply = p.ask(`{"address":"10.77.0.2","ifname":"ta0","tag":"op2","addr_family":2,"cmd":0,"version":1}`)
	if table, renewed := granted(t, reply); table != 10000 || renewed < expires {
		t.Errorf("renewal: got table %d until %d, want 10000 until %d or later", table, renewed, expires)
	}
	eventually(t, "the newer tag is in the database", func() error {
		if got := h.leases(); len(got) != 1 || got[0] != "10000|inet|ta0|10.77.0.2|op2|0" {
			return fmt.Errorf("leases: %q", got)
		}
		return nil
	})

	// No tag is a tag, too; a release takes the key with or without one.
	wantTable(t, p.ask(`{"address":"10.77.0.2","ifname":"ta0","addr_family":2,"cmd":0,"version":1}`), 10000)
	const give = `{"address":"10.77.0.2","ifname":"ta0","addr_family":2,"cmd":1,"version":1}`
	for _, what := range []string{"release", "release of what is not held"} {
		if got := p.ask(give); got != released {
			t.Errorf("%s: got %s, want %s", what, got, released)
		}
		h.wantLeases()
	}

	// Each family has its own pool, and addresses are compared as addresses.
	wantTable(t, p.ask(request(2, "ta0", "10.77.0.2", 0)), 10000)
	wantTable(t, p.ask(request(10, "ta0", "FD00:0::02", 0)), 10000)
	wantTable(t, p.ask(request(10, "ta0", "fd00::2", 0)), 10000)
	wantTable(t, p.ask(request(0, "ta0", "modem 1", 0)), 10000)
	wantTable(t, p.ask(request(2, "ta1", "10.77.0.2", 0)), 10001)
	h.wantLeases("10000|inet|ta0|10.77.0.2||0", "10000|inet6|ta0|fd00::2||0", "10000|unspec|ta0|modem_1||0",
		"10001|inet|ta1|10.77.0.2||0")
}

// TestServerPeers: whoever can be answered is, at the very name that he bound and from
// the very name that he asked at.
func TestServerPeers(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	n := 0
	for _, to := range []struct {
		name string
		addr sockaddr
	}{{"padded", paddedName("tas_socket")}, {"exact", exactName("tas_socket")}} {
		for _, from := range []struct {
			name string
			addr sockaddr
		}{
			{"padded", paddedName("eth0-10.9.0.1-2")},
			{"exact", exactName("eth0-10.9.0.1-2")},
			{"path", pathName(filepath.Join(h.dir, "peer"+to.name))},
			{"the longest", paddedName(strings.Repeat("x", 107))},
			{"NULs within", exactName("a\x00b\x00")},
			{"NULs alone", exactName("\x00")},
		} {
			n++
			p := h.rawPeer(from.addr)
			p.to = to.addr
			table, _ := granted(t, p.ask(acquire(n)))
			if table != uint32(9999+n) {
				t.Errorf("%s peer at the %s name: got table %d, want %d", from.name, to.name, table, 9999+n)
			}
			unix.Close(p.fd) // the next one takes the name
			p.fd = -1
		}
	}
	before := h.leases()

	unbound := h.rawPeer(nil)
	unbound.send(acquire(200))
	server.waitLog("not bound")
	h.wantLeases(before...)
	unbound.send(release(1))
	eventually(t, "the release by an unbound peer is carried out", func() error {
		if got := h.leases(); len(got) != len(before)-1 {
			return fmt.Errorf("leases: %q", got)
		}
		return nil
	})
	unbound.nothing()
}

// TestServerMalformed: what breaks the protocol is refused and changes nothing.
func TestServerMalformed(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	holder, p := h.cPeer("holder"), h.cPeer("eth1-10.0.0.1-2")
	wantTable(t, holder.ask(acquire(1)), 10000)
	const good = `{"address":"10.0.0.1","ifname":"eth1","addr_family":2,"cmd":0,"version":1}`
	swap := func(old, with string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("%q is not in the request", old)
		}
		return strings.Replace(good, old, with, 1)
	}
	fill := func(size int) string {
		return strings.Replace(good, "{", `{"x":"`+strings.Repeat("x", size-len(good)-7)+`",`, 1)
	}
	cases := []struct{ name, datagram, reason string }{
		{"nothing", "", "not a JSON object"},
		{"a NUL", "\x00", "not a JSON object"},
		{"not JSON", "hello", "not a JSON object"},
		{"a number", "1", "not a JSON object"},
		{"a list", "[]", "not a JSON object"},
		{"a list of a request", "[" + good + "]", "not a JSON object"},
		{"a string", `"x"`, "not a JSON object"},
		{"null", "null", "not a JSON object"},
		{"true", "true", "not a JSON object"},
		{"the beginning of another's request", "{", "not a JSON object"},
		{"a request cut short", good[:len(good)-1], "not a JSON object"},
		{"two requests", good + good, "not a JSON object"},
		{"NUL behind", good + "\x00", "not a JSON object"},
		{"NUL within", swap("eth1", "eth\x001"), "not a JSON object"},
		{"newline within a string", swap("eth1", "eth\n1"), "not a JSON object"},
		{"byte order mark", "\ufeff" + good, "not a JSON object"},
		{"invalid UTF-8", swap("eth1", "eth\xff"), "not a JSON object"},
		{"comment", "// x\n" + good, "not a JSON object"},
		{"trailing comma", swap("}", ",}"), "not a JSON object"},
		{"single quotes", strings.ReplaceAll(good, `"`, "'"), "not a JSON object"},
		{"no keys", "{}", "missing"},
		{"no address", swap(`"address":"10.0.0.1",`, ""), "address: missing"},
		{"no ifname", swap(`"ifname":"eth1",`, ""), "ifname: missing"},
		{"no family", swap(`"addr_family":2,`, ""), "addr_family: missing"},
		{"no cmd", swap(`"cmd":0,`, ""), "cmd: missing"},
		{"no version", swap(`,"version":1`, ""), "version: missing"},
		{"key in capitals", swap("cmd", "CMD"), "cmd: missing"},
		{"key twice", swap("{", `{"address":"10.9.0.1",`), "address: given twice"},
		{"tag twice", swap("{", `{"tag":"a","tag":"b",`), "tag: given twice"},
		{"address is a number", swap(`"10.0.0.1"`, "10"), "address: not a string"},
		{"address is null", swap(`"10.0.0.1"`, "null"), "address: not a string"},
		{"ifname is an object", swap(`"eth1"`, "{}"), "ifname: not a string"},
		{"tag is a number", swap("{", `{"tag":1,`), "tag: not a string"},
		{"family is a string", swap(`_family":2`, `_family":"2"`), "addr_family: not an integer"},
		{"family is a fraction", swap(`_family":2`, `_family":2.0`), "addr_family: not an integer"},
		{"cmd is a fraction", swap(`"cmd":0`, `"cmd":0.5`), "cmd: not an integer"},
		{"cmd with an exponent", swap(`"cmd":0`, `"cmd":0e0`), "cmd: not an integer"},
		{"cmd is true", swap(`"cmd":0`, `"cmd":false`), "cmd: not an integer"},
		{"cmd is negative", swap(`"cmd":0`, `"cmd":-1`), "cmd: -1 is not within"},
		{"cmd beyond 64 bits", swap(`"cmd":0`, `"cmd":18446744073709551616`), "cmd: not an integer"},
		{"cmd that folds to 0", swap(`"cmd":0`, `"cmd":256`), "cmd: 256 is not within"},
		{"unknown cmd", swap(`"cmd":0`, `"cmd":3`), "cmd 3: unknown"},
		{"cmd of a holder", swap(`"cmd":0`, `"cmd":17`), "not for the server"},
		{"family that folds to 2", swap(`_family":2`, `_family":258`), "addr_family: 258 is not within"},
		{"unknown family", swap(`_family":2`, `_family":1`), "addr_family 1"},
		{"version 0", swap(`"version":1`, `"version":0`), "version 0"},
		{"version 2", swap(`"version":1`, `"version":2`), "version 2"},
		{"no text for an address", swap("10.0.0.1", ""), "address: 0 bytes"},
		{"no address at all", swap("10.0.0.1", "10.0.0.256"), "not an address"},
		{"address with a mask", swap("10.0.0.1", "10.0.0.1/24"), "not an address"},
		{"address with a zero in front", swap("10.0.0.1", "10.0.0.01"), "not an address"},
		{"address with space", swap("10.0.0.1", "10.0.0.1 "), "not an address"},
		{"address of inet6", swap("10.0.0.1", "fd00::1"), "not an address of family inet"},
		{"address of inet", swap(`_family":2`, `_family":10`), "not an address of family inet6"},
		{"IPv4 in IPv6", request(10, "eth1", "::ffff:10.0.0.1", 0), "written as IPv6: want 10.0.0.1"},
		{"address with a zone", request(10, "eth1", "fe80::1%eth1", 0), "without its zone"},
		{"address that fills the reply", swap("10.0.0.1", strings.Repeat(`\"`, 45)), `address "\"\"`},
		{"long address", swap("10.0.0.1", strings.Repeat("1", 46)), "address: 46 bytes"},
		{"long identifier", request(0, "eth1", strings.Repeat("1", 46), 0), "address: 46 bytes"},
		{"long ifname", swap("eth1", strings.Repeat("e", 16)), "ifname: 16 bytes"},
		{"no text for an ifname", swap("eth1", ""), "ifname: 0 bytes"},
		{"long tag", swap("{", `{"tag":"`+strings.Repeat("t", 128)+`",`), "tag: 128 bytes"},
		{"escaped NUL in ifname", swap("eth1", `eth\u0000`), "ifname: contains the control character U+0000"},
		{"escaped NUL in address", swap("10.0.0.1", `10.0.0.1\u0000`), "address: contains the control character U+0000"},
		{"newline in ifname", swap("eth1", `e\nlevel=INFO`), "ifname: contains the control character U+000A"},
		{"newline in tag", swap("{", `{"tag":"a\nb",`), "tag: contains the control character U+000A"},
		{"deep lists", swap("{", `{"x":`+strings.Repeat("[", 200)+strings.Repeat("]", 200)+","), "nested deeper"},
		{"deep objects", strings.Repeat(`{"":`, 80) + "1" + strings.Repeat("}", 80), "nested deeper"},
		{"deep and not closed", strings.Repeat("[", 512), "not a JSON object"},
		{"513 bytes", fill(513), "longer than 512 bytes"},
		{"513 bytes, the last a space", fill(512) + " ", "longer than 512 bytes"},
		{"200,000 bytes", fill(200_000), "longer than 512 bytes"},
		{"1 MiB", fill(1 << 20), "longer than 512 bytes"},
		{"1 MiB of brackets", strings.Repeat("[", 1<<20), "longer than 512 bytes"},
	}
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			// Another's request just before it, whose bytes are not to be seen again.
			wantTable(t, holder.ask(acquire(1)), 10000)
			wantRefusal(t, p.ask(tt.datagram), wire.Malformed, tt.reason)
		})
	}
	// A response is never answered. What follows it is, and is answered in order.
	for _, tt := range []struct{ name, datagram string }{
		{"a reply", `{"version":1,"cmd":2,"table":10000,"lease_expires":4933}`},
		{"a refusal", `{"version":1,"cmd":2,"table":0,"lease_expires":0,"code":"malformed","error":"x"}`},
		{"a request in all but cmd", swap(`"cmd":0`, `"cmd":2`)},
		{"with an error before cmd", `{"address":5,"cmd":2}`},
		{"with an error behind cmd", `{"cmd":2,"address":5}`},
		{"with another cmd", `{"cmd":0,"cmd":2}`},
		{"not closed", `{"version":1,"cmd":2,`},
		{"too long", `{"version":1,"cmd":2,"x":"` + strings.Repeat("x", 1000) + `"}`},
	} {
		t.Run("response: "+tt.name, func(t *testing.T) {
			p.send(tt.datagram)
			wantRefusal(t, p.ask(`{}`), wire.Malformed, "version: missing")
		})
	}
	p.nothing()
	h.wantLeases("10000|inet|eth0|10.9.0.1||0")

	// Whoever has a log, has it also after a flood; and each line is one line.
	for range 300 {
		p.ask(`{"x":"\n"`)
	}
	log := server.log.String()
	if n := strings.Count(log, "malformed datagram"); n < 1 || n > 100 {
		t.Errorf("%d lines about more than 300 malformed datagrams, want some but few", n)
	}
	for line := range strings.Lines(log) {
		if !strings.HasPrefix(line, "time=") {
			t.Errorf("line of the log that is none: %q", line)
		}
	}
	if got := p.ask(fill(512)); got == "" {
		t.Error("no answer to 512 bytes")
	} else {
		wantTable(t, got, 10001)
	}
}

// TestServerClosesDescriptors: what somebody sends along is not kept.
func TestServerClosesDescriptors(t *testing.T) {
	h := newHost(t)
	server := h.serve()
	p := h.rawPeer(exactName("peer"))
	p.to = exactName("tas_socket")
	wantTable(t, p.ask(acquire(1)), 10000)
	count := func() int {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", server.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	before := count()
	rights := unix.UnixRights(p.fd, p.fd, 0)
	for n := range 200 {
		datagram := acquire(1)
		if n%2 == 1 {
			datagram = "{"
		}
		if err := unix.Sendmsg(p.fd, []byte(datagram), rights, &unix.SockaddrUnix{Name: "@tas_socket"}, 0); err != nil {
			t.Fatal(err)
		}
		p.receive()
	}
	if after := count(); after != before {
		t.Errorf("descriptors of the server: got %d after 200 datagrams with some, want %d as before", after, before)
	}
}

// TestServerPeersThatNeverRead: they cost nobody else anything. The kernel charges what
// they do not read to the server's send buffer.
func TestServerPeersThatNeverRead(t *testing.T) {
	h := newHost(t)
	h.serve()
	lazy := h.cPeer("lazy")
	for range 30 {
		lazy.send(acquire(1))
	}
	strangers := make([]*rawPeer, 100)
	for i := range strangers {
		strangers[i] = h.rawPeer(sockaddr{unix.AF_UNIX, 0}) // the kernel finds a name
	}
	err := asUser(uidNobodyKnows, uidNobodyKnows, func() error {
		for _, p := range strangers {
			for range 10 {
				if err := p.trySend(acquire(2)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	p := h.cPeer("eth0-10.9.0.3-2")
	wantTable(t, p.ask(acquire(3)), 10001)
	wantRefusal(t, p.ask("{"), wire.Malformed, "")
	h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.3||0")
}
