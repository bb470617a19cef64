package e2e

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestServerReload: at SIGHUP the server reads its configuration again, and leases, their holders and rules stay. What is
// wrong or cannot change leaves all of the old configuration in force.
func TestServerReload(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "10.9.0.1/24")
	server := h.serve(`"user_tables":1`)
	h.front("-4", "-a", "10.9.0.1", "-n", "255.255.255.0", "-i", "eth0")
	rules := clientRules("10.9.0.1", "10.9.0.0/24", 10000)
	h.waitRules(rules...)
	p := h.cPeer("peer")
	wantTable(t, p.ask(acquire(2)), 10001)
	wantRefusal(t, p.askAs(uidNobodyKnows, 0, acquire(3)), wire.Denied, "not permitted")
	reload := func(says string, config ...string) {
		t.Helper()
		h.config(config...)
		from := len(server.log.String())
		server.again()
		if log := server.log.String()[from:]; !strings.Contains(log, says) {
			t.Errorf("no %s in %s", says, log)
		}
	}
	reload(`changed="table_timeout allowed_users"`, `"user_tables":1`, `"table_timeout":7200`, `"allowed_users":[21999]`)
	wantTable(t, p.askAs(uidNobodyKnows, 0, acquire(3)), 10002)
	_, before := granted(t, p.ask(acquire(2)))
	reload(`changed="table_timeout user_tables"`, `"user_tables":2`, `"table_timeout":60`, `"allowed_users":[21999]`)
	if _, after := granted(t, p.ask(acquire(2))); after > before-7000 {
		t.Errorf("lease with a timeout of 60 s ends %d s before one with 7200 s", before-after)
	}
	wantTable(t, p.askAs(uidNobodyKnows, 0, acquire(4)), 10003)
	// Nothing of what is wrong in part comes into force.
	for _, wrong := range []struct{ says, key string }{
		{`keys="num_tables bind_priority"`, `"num_tables":1,"bind_priority":9100`},
		{`keys=socket_path`, `"socket_path":"other"`},
		{`unknown key`, `"nonsense":1`},
		{`root_tables: 50, want at most`, `"root_tables":50`},
	} {
		reload(wrong.says, wrong.key, `"allowed_users":[]`, `"table_timeout":7200`)
		if _, ends := granted(t, p.askAs(uidNobodyKnows, 0, acquire(3))); ends > before-7000 {
			t.Errorf("after %s: the timeout of a configuration that was refused is in force", wrong.key)
		}
	}
	reload("nothing has changed", `"user_tables":2`, `"table_timeout":60`, `"allowed_users":[21999]`)
	h.wantRules(rules...)
	h.wantLeases("10000|inet|eth0|10.9.0.1||0", "10001|inet|eth0|10.9.0.2||0", "10002|inet|eth0|10.9.0.3||21999", "10003|inet|eth0|10.9.0.4||21999")
}

// TestServerReloadDefaults: a server without a configuration does not end at SIGHUP either.
func TestServerReloadDefaults(t *testing.T) {
	h := newHost(t)
	server := h.start(exec.Command(bin(t, serverBin)))
	server.waitLog("msg=serving")
	server.again()
	wantTable(t, h.cPeer("peer").ask(acquire(1)), 10000)
}
