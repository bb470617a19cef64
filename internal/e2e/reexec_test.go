package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// rootsProgram puts the client where root alone can write, and returns its path.
func rootsProgram(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/usr/local/sbin", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, clientBin)
	upgrade(t, path)
	return path
}

// upgrade replaces the program, as package managers do.
func upgrade(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile(bin(t, clientBin))
	if err == nil {
		err = nettest.WriteExecutable(path+".new", text)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = os.Chmod(filepath.Dir(path), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestReexec: after an upgrade holders execute the new program, and nothing else changes.
func TestReexec(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "fd77::2/64")
	h.ns.IP(t, "route add default via 10.77.0.1 dev wan0")
	h.ns.IP(t, "-6 route add default via fd77::1 dev wan0")
	h.serve(`"table_timeout":10`)
	client := rootsProgram(t)
	lease := func(args ...string) {
		t.Helper()
		if r := h.run(client, append(args, "-i", "wan0", "-l", h.dir+"/client.log")...); r.code != 0 || strings.TrimSpace(r.stdout) == "0" {
			t.Fatalf("%q: %+v", args, r)
		}
	}
	lease("-4", "-a", "10.77.0.2", "--routes", "move", "--gateway", "10.77.0.1")
	lease("-6", "-a", "fd77::2", "--routes", "copy")
	// A later call changes tag and settings, which the command line of the holder does not have.
	lease("-4", "-a", "10.77.0.2", "-t", "later", "--routes", "move", "--gateway", "10.77.0.1", "--route", "10.99.0.0/16,via 10.77.0.9")
	table := h.tableOf("10.77.0.2")
	eventually(t, "the later call counts", func() error {
		if got := h.routes(table); !strings.Contains(fmt.Sprint(got), "10.99.0.0/16 via 10.77.0.9") {
			return fmt.Errorf("table %s has %q", table, got)
		}
		return nil
	})
	eventually(t, "both are served", func() error { // the kernel looks for duplicates of the address first
		if r := h.run(client, "status"); r.code != 0 || len(h.rulesFrom("fd77::2")) == 0 {
			return fmt.Errorf("status: %+v", r)
		}
		return nil
	})
	before := fmt.Sprint(h.allRules(), h.routes("main"), h.routes(table))
	pids := h.waitClients(2)

	reexec := func(code int) result {
		t.Helper()
		r := h.run(client, "reexec")
		if r.code != code {
			t.Fatalf("reexec: %+v, want %d", r, code)
		}
		return r
	}
	program := func(pid int) string {
		t.Helper()
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			t.Fatal(err)
		}
		return exe
	}
	upgrade(t, client)
	if r := h.run(client, "status"); strings.Count(r.stdout, "not installed any more") != 2 || r.code != 0 {
		t.Errorf("status: %+v", r)
	}
	// Others could put a program of theirs there.
	for path, mode := range map[string]os.FileMode{client: 0o775, filepath.Dir(client): 0o757} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if r := reexec(1); strings.Count(r.stderr, path+" is writable for others") != 2 {
			t.Errorf("reexec of what others can write: %+v", r)
		}
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(client, 1, 1); err != nil {
		t.Fatal(err)
	}
	if r := reexec(1); !strings.Contains(r.stderr, "is not root's") {
		t.Errorf("reexec of another user's program: %+v", r)
	}
	if err := os.Chown(client, 0, 0); err != nil {
		t.Fatal(err)
	}
	if got := program(pids[0]); !strings.HasSuffix(got, " (deleted)") {
		t.Errorf("a refused holder executes %s", got)
	}

	// Another program, and a version that does not know an option of the command line.
	for _, other := range []string{"#!/bin/sh\n", "#!/bin/sh\necho unknown option: --routes >&2; exit 1\n"} {
		if err := nettest.WriteExecutable(client+".new", []byte(other)); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(client+".new", client); err != nil {
			t.Fatal(err)
		}
		r := h.run(bin(t, clientBin), "reexec")
		if want := "another program"; r.code != 1 || strings.Count(r.stderr, want)+strings.Count(r.stderr, "unknown option") != 2 {
			t.Errorf("reexec of %q: %+v", other, r)
		}
	}
	upgrade(t, client)

	rules, rules6 := h.monitor(), h.hear("6")
	if r := reexec(0); strings.Count(r.stdout, "executes") != 2 {
		t.Errorf("reexec: %+v", r)
	}
	for _, pid := range pids { // which has answered
		if got := program(pid); got != client {
			t.Errorf("pid %d executes %s", pid, got)
		}
	}
	served := func() error {
		if r := h.run(client, "status"); r.code != 0 || strings.Contains(r.stdout, "any more") {
			return fmt.Errorf("status: %+v", r)
		}
		return nil
	}
	eventually(t, "the new program serves both", served)
	expires := func() string { return h.sqlite("SELECT group_concat(LeaseExpires, ' ') FROM RtTables") }
	for range 2 { // the first may be by the old program
		at := expires()
		eventually(t, "the leases are renewed", func() error {
			if now := expires(); now == at {
				return fmt.Errorf("expiry %s", now)
			}
			return served()
		})
	}
	rules.sync()
	if changes := rules.changes(); len(changes) > 0 {
		t.Errorf("rules changed: %q", changes)
	}
	if changes := rules6(); len(changes) > 0 {
		t.Errorf("rules of IPv6 changed: %q", changes)
	}
	if now := fmt.Sprint(h.allRules(), h.routes("main"), h.routes(table)); now != before {
		t.Errorf("got\n%s\nwant\n%s", now, before)
	}
	if got := fmt.Sprint(h.pids(clientBin)); got != fmt.Sprint(pids) {
		t.Errorf("processes %s, want %d", got, pids)
	}
	if tag := h.sqlite("SELECT Tag FROM RtTables WHERE Addr LIKE '10.77%'"); strings.TrimSpace(tag) != "later" {
		t.Errorf("tag %q", tag)
	}
	if r := h.run(client, "reexec", "wan9"); r.code != 2 || !strings.Contains(r.stderr, "wan9: no holder serves") {
		t.Errorf("reexec of a name that nothing has: %+v", r)
	}
	if r := h.run(client, "reexec", "FD77::2"); r.code != 0 || strings.Count(r.stdout, "executes") != 1 {
		t.Errorf("reexec of an address: %+v", r)
	}
	// The holder keeps its name all the time: a watch that starts meanwhile does not take the address.
	watch := h.watch()
	h.ns.IP(t, "address add 10.78.0.2/24 dev wan0")
	h.served("10.78.0.2")
	if r := reexec(0); strings.Count(r.stdout, "executes") != 2 || r.stderr != "" {
		t.Errorf("reexec beside a watch: %+v", r)
	}
	h.ns.IP(t, "address del 10.78.0.2/24 dev wan0")
	h.waitNotServed("10.78.0.2")
	watch.stop()
	// The link has another name than on the command lines, and is gone before the new program looks.
	h.ns.IP(t, "link set wan0 name wan7")
	renamed := func() error {
		if got := h.sqlite("SELECT group_concat(DISTINCT Ifname) FROM RtTables"); strings.TrimSpace(got) != "wan7" {
			return fmt.Errorf("leases of %s", got)
		}
		return served()
	}
	eventually(t, "the renamed link is served", renamed)
	reexec(0)
	eventually(t, "the new program serves the renamed link", renamed)
	reexec(0)
	h.ns.IP(t, "link delete wan7")
	h.waitClean()
}
