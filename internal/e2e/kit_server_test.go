package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// config writes a configuration file with the keys that the original has. Each of more is a member
// `"key":value`, which it adds or replaces.
func (h *host) config(more ...string) string {
	h.t.Helper()
	keys := map[string]string{
		"socket_path":   `"tas_socket"`,
		"table_offset":  "10000",
		"num_tables":    "40",
		"table_timeout": "3600",
		"db_path":       strconv.Quote(h.db),
		"do_syslog":     "false",
		"addr_families": `{"inet":true,"inet6":true,"unspec":true}`,
	}
	for _, m := range more {
		key, value, ok := strings.Cut(m, ":")
		if !ok {
			h.t.Fatalf("config: %q is no member", m)
		}
		keys[strings.Trim(key, `"`)] = value
	}
	text := "{ // a comment, as in the original's example\n"
	for key, value := range keys {
		text += fmt.Sprintf("  %q: %s,\n", key, value)
	}
	text = strings.TrimSuffix(text, ",\n") + "\n}\n"
	path := filepath.Join(h.dir, "server.json")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// serve starts the server with a configuration, and waits until it serves.
func (h *host) serve(config ...string) *process {
	h.t.Helper()
	p := h.start(exec.Command(bin(h.t, serverBin), "--debug", "-c", h.config(config...)))
	p.waitLog("msg=serving")
	return p
}

// restart starts the server with the configuration of the last serve, and waits until it serves.
func (h *host) restart() *process {
	h.t.Helper()
	p := h.launch()
	p.waitLog("msg=serving")
	return p
}

// launch is restart that does not wait.
func (h *host) launch() *process {
	h.t.Helper()
	return h.start(h.serverCommand())
}

// serverCommand is a command line of the server with the configuration of the last serve.
func (h *host) serverCommand(more ...string) *exec.Cmd {
	h.t.Helper()
	return exec.Command(bin(h.t, serverBin), append(more, "-c", filepath.Join(h.dir, "server.json"))...)
}

// refuse runs the server to its end, and fails the test unless its exit code is 1 and stderr has all of
// texts.
func (h *host) refuse(cmd *exec.Cmd, texts ...string) {
	h.t.Helper()
	p := h.start(cmd)
	if code := p.wait(); code != 1 {
		h.t.Errorf("exit code: got %d, want 1; it wrote:\n%s", code, p.log.String())
	}
	for _, text := range texts {
		if !strings.Contains(p.log.String(), text) {
			h.t.Errorf("it wrote:\n%swant %q in it", p.log.String(), text)
		}
	}
}

// database is a database of the server, which the test reads with sqlite3.
type database struct {
	t  *testing.T
	db string
}

// leases are the leases, one line each: table|family|ifname|address|tag|owner.
func (d database) leases() []string {
	d.t.Helper()
	out := d.sqlite(`select "table", family, ifname, address, tag, owner from leases`)
	return strings.Fields(strings.ReplaceAll(strings.TrimSpace(out), " ", "_"))
}

// sqlite runs a statement with sqlite3, and returns its output.
func (d database) sqlite(statement string) string {
	d.t.Helper()
	out, err := exec.Command("sqlite3", "-cmd", ".timeout 5000", d.db, statement).CombinedOutput()
	if err != nil {
		d.t.Fatalf("sqlite3 %s %q: %v\n%s", d.db, statement, err, out)
	}
	return string(out)
}

// wantLeases fails the test unless the leases are these.
func (d database) wantLeases(want ...string) {
	d.t.Helper()
	if diff := unordered(d.leases(), want); diff != "" {
		d.t.Errorf("leases: %s", diff)
	}
}

// waitLeases waits until the leases are these.
func (d database) waitLeases(want ...string) {
	d.t.Helper()
	eventually(d.t, "the leases are there", func() error {
		if diff := unordered(d.leases(), want); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}
