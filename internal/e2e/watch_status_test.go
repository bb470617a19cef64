package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

const longAddress = "2001:db8:1234:5678:9abc:def0:1234:5678"

func TestStatus(t *testing.T) {
	h := newHost(t)
	h.link("wan1", "10.78.0.20/24", "10.78.0.3/24")
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "address add "+longAddress+"/64 dev wan0 nodad")
	h.ns.Batch(t, "route add default via fe80::1234:5678:9abc:def0 dev wan0", "route add default via 10.78.0.1 dev wan1")
	server := h.serve()
	if rows := h.statusRows(); len(rows) != 4 || rows[0].State != "not-served" || rows[0].Missing != "" {
		t.Errorf("with nobody there: %+v", rows)
	}
	h.lease("10.77.0.2", "wan0", "--routes", "copy", "--gateway", "10.77.0.1")
	h.lease6(longAddress, "wan0", "--routes", "copy")
	h.lease("10.78.0.20", "wan1")
	h.ns.IP(t, "route add default via 10.78.0.1 dev wan1 table 10001")
	h.lease("10.78.0.3", "wan1", "--routes", "move")
	h.waitRoutes6("10000", "2001:db8:1234:5678::/64 dev wan0 proto 116 src "+longAddress+" metric 256",
		"default via fe80::1234:5678:9abc:def0 dev wan0 proto 116 src "+longAddress+" metric 1024")
	rows := h.statusRows()
	want := []row{
		{Ifname: "wan0", Address: "10.77.0.2", Family: "inet", Table: 10000, Gateway: "10.77.0.1", Mode: "copy", State: "ok"},
		{Ifname: "wan0", Address: longAddress, Family: "inet6", Table: 10000, Gateway: "fe80::1234:5678:9abc:def0", Mode: "copy", State: "ok"},
		{Ifname: "wan1", Address: "10.78.0.3", Family: "inet", Table: 10002, Gateway: "10.78.0.1", Mode: "move", State: "ok"},
		{Ifname: "wan1", Address: "10.78.0.20", Family: "inet", Table: 10001, Gateway: "10.78.0.1", Mode: "none", State: "ok"},
	}
	pids := make(map[int]bool)
	for i, r := range rows {
		if r.LeaseLeft < 3000 || r.LeaseLeft > 3600 || r.PID == 0 || pids[r.PID] {
			t.Errorf("lease and holder: %+v", r)
		}
		pids[r.PID] = true
		r.PID, r.LeaseLeft = 0, 0
		if i >= len(want) || r != want[i] {
			t.Errorf("row %d: %+v", i, r)
		}
	}
	for range 5 {
		if again := h.statusRows(); fmt.Sprint(addressesOf(again)) != fmt.Sprint(addressesOf(rows)) {
			t.Errorf("another order: %v", addressesOf(again))
		}
	}
	if rows := h.statusRows("--ifname", "wan1", "--exclude", "x"); len(rows) != 2 {
		t.Errorf("for wan1: %+v", rows)
	}

	// For people, and for scripts: a line for each address.
	text := h.run(bin(t, clientBin), "status")
	if text.code != 0 || strings.Contains(text.stdout, "\x1b") {
		t.Errorf("exit code %d:\n%s", text.code, text.stdout)
	}
	if bare := h.run(bin(t, clientBin), "status", "--no-legend", "-4", "wan1"); len(lines(bare.stdout)) != 2 || bare.code != 0 {
		t.Errorf("without legend, exit code %d:\n%s", bare.code, bare.stdout)
	}
	for _, part := range []string{"running, pid", "IFNAME", longAddress, "fe80::1234:5678:9abc:def0", "10.78.0.20", "10002", "LEFT", "move"} {
		if !strings.Contains(text.stdout, part) {
			t.Errorf("no %s in\n%s", part, text.stdout)
		}
	}

	// Without the server; and what is missing.
	server.kill()
	if rows := h.statusRows(); !strings.HasPrefix(rows[0].Missing, "server stopped, lease ends in ") {
		t.Errorf("without the server: %+v", rows[0])
	}
	if r := h.run(bin(t, clientBin), "status"); strings.Count(r.stdout, "why no process has the name of the server") != 1 || !strings.Contains(r.stdout, "server   stopped") {
		t.Errorf("the server is stopped, which is to be said once:\n%s", r.stdout)
	}
	deleting := h.start(h.sh("while :; do ip rule del pref 20000 lookup 10001 2>/dev/null; done"))
	eventually(t, "it says what is missing", func() error {
		rows = h.statusRows()
		_, got, _ := strings.Cut(rows[3].Missing, "rule 20000: ")
		text = h.run(bin(t, clientBin), "status")
		if got != "from all to 10.78.0.0/24 lookup 10001 proto 116" || text.code != 1 || !strings.Contains(text.stdout, "misses rules or routes") ||
			!strings.Contains(text.stdout, "why rule 20000: from all to 10.78.0.0/24 lookup 10001 proto 116\n") {
			return fmt.Errorf("missing %q, exit code %d:\n%s", rows[3].Missing, text.code, text.stdout)
		}
		return nil
	})
	deleting.kill()
	terminal := h.run("script", "-qec", "stty cols 80; "+bin(t, clientBin)+" status", "/dev/null")
	if terminal.code != 1 {
		t.Errorf("on a terminal, exit code %d:\n%q", terminal.code, terminal.stdout)
	}
	checkWidth(t, strings.ReplaceAll(terminal.stdout, "\r", ""))
	// A user without rights learns that, and nothing that is not so.
	user := h.clientWith(asStranger, "status")
	if user.code != 2 || user.stdout != "" || !strings.Contains(user.stderr, "answer root and their own user only") {
		t.Errorf("as a user: exit code %d, stdout %q, stderr %q", user.code, user.stdout, user.stderr)
	}
	// A holder that does not answer is not waited for long.
	for pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range h.statusRows() {
		if r.State != "silent" {
			t.Errorf("of a stopped holder: %+v", r)
		}
	}
}

func addressesOf(rows []row) (all []string) {
	for _, r := range rows {
		all = append(all, r.Address)
	}
	return all
}

func checkWidth(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if line = strings.TrimRight(line, "\n"); len(line) > 80 {
			t.Errorf("%d columns: %s", len(line), line)
		}
	}
}

// TestStatusOfWatch: what a watch holds, also while it has no lease.
func TestStatusOfWatch(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	p := h.watch()
	eventually(t, "the row says what it waits for", func() error {
		if rows := h.statusRows(); len(rows) != 1 || rows[0].PID != p.cmd.Process.Pid || rows[0].State != "no-lease" || !strings.Contains(rows[0].Missing, "server stopped") {
			return fmt.Errorf("%+v", rows)
		}
		return nil
	})
	h.serve()
	eventually(t, "it has one", func() error {
		if rows := h.statusRows(); rows[0].Missing != "" {
			return errors.New(rows[0].Missing)
		}
		return nil
	})
	h.ns.IP(t, "link set wan0 down")
	h.ns.IP(t, "link set wan0 up")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	eventually(t, "it is complete again", func() error {
		if rows := h.statusRows(); rows[0].Missing != "" || rows[0].Table != 10000 {
			return fmt.Errorf("%+v", rows)
		}
		return nil
	})
}

// TestStatusOfLeftOut: what the configuration of the running watch leaves out is no fault, whoever asks without that file.
func TestStatusOfLeftOut(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("wan1", "10.78.0.2/24")
	h.ns.Batch(t, "route add default via 10.77.0.1 dev wan0", "route add default via 10.78.0.1 dev wan1 metric 200")
	h.serve()
	file := h.watchFile(`{"exclude": ["lo", "far*", "wan1"]}`)
	h.watch("-c", file)
	h.waitStatus("10.77.0.2", "ok", "")
	says := func(code int, want string) {
		t.Helper()
		if r := h.run(bin(t, clientBin), "status", "wan1"); r.code != code || !strings.Contains(r.stdout, want) {
			t.Errorf("want exit code %d and %q: %+v", code, want, r)
		}
		if r := h.run(bin(t, clientBin), "doctor", "--only", "no-lease"); strings.Contains(r.stdout, "no-lease") != (code != 0) {
			t.Errorf("want a finding: %v: %+v", code != 0, r)
		}
	}
	says(0, "not served: the configuration of the watch leaves it out")
	if err := os.Chmod(file, 0o666); err != nil { // anybody may have changed it
		t.Fatal(err)
	}
	says(1, "or its configuration leaves the link out: status -c "+file)
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	h.watchFile(`{"exclude": ["lo", "far*"]}`) // the watch has not read that
	says(1, "not served by the watch that runs")
}

// TestStatusOfOptions: what the options of a watch leave out is no fault either.
func TestStatusOfOptions(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.link("lan0", "10.78.0.2/24", "2001:db8:78::2/64")
	h.serve()
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.watch("-4", "--ifname", "wan*,dsl*", "--exclude=wan1", "--routes", "move")
	h.waitStatus("10.77.0.2", "ok", "")
	const says = "not served: the configuration of the watch leaves it out"
	if r := h.run(bin(t, clientBin), "status"); r.code != 0 || strings.Count(r.stdout, says) != 2 {
		t.Errorf("want exit code 0 and %q of two addresses: %+v", says, r)
	}
	if r := h.run(bin(t, clientBin), "doctor", "--only", "no-lease"); strings.Contains(r.stdout, "no-lease") {
		t.Errorf("%+v", r)
	}
}
