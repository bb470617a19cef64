package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// bench builds the load generator.
var bench = sync.OnceValues(func() (path string, err error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, "bench")
	if out, err := exec.Command("go", "build", "-o", path, "../bench").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the bench: %w\n%s", err, out)
	}
	return path, nil
})

// TestBench: make bench's load on a server of any name, padded or not, finds nothing wrong and
// gives everything back.
func TestBench(t *testing.T) {
	h := newHost(t)
	h.serve(`"num_tables":300`)
	path, err := bench()
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"-exact"}} {
		args = append(args, "-json", "-server", "tas_socket", "-leases", "300", "-runs", "1", "-slice", "20ms")
		out, err := h.ns.Output(path, args...)
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		var report struct {
			Lines []struct {
				What  string
				Value float64
			}
			Faults faults
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if len(report.Lines) == 0 || report.Faults.sum() > 0 {
			t.Errorf("%q: %s", args, out)
		}
		for _, l := range report.Lines {
			if l.Value <= 0 {
				t.Errorf("%s: %v", l.What, l.Value)
			}
		}
		if leases := h.leases(); len(leases) > 0 {
			t.Errorf("%q: %d leases are left", args, len(leases))
		}
	}
	// More than there are.
	if out, err := h.ns.Output(path, "-server", "tas_socket", "-leases", "301", "-runs", "1", "-slice", "20ms"); err == nil || !strings.Contains(out, "no table is free") {
		t.Errorf("301 of 300 leases: %v\n%s", err, out)
	}
}

// standIn makes a folder with two commands that have the original's names and interface: ours.
// The server gets its configuration through a script, and leaves it in the folder.
func standIn(t *testing.T, script string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for from, to := range map[string]string{serverBin: "server", clientBin: "table_allocator_client"} {
		data, err := os.ReadFile(filepath.Join(staticDir(t), from))
		if err == nil {
			err = nettest.WriteExecutable(filepath.Join(dir, to), data)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf("#!/bin/sh\nset -e\ncd %s\n%s <\"$2\" >config\nexec ./server -c config\n", dir, script)
	if err := nettest.WriteExecutable(filepath.Join(dir, "table_allocator_server"), []byte(text)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// compared is what the bench prints of our commands and the original's.
type compared struct {
	Lines []struct {
		What     string
		Value    float64
		Original *float64
		Of       *float64 `json:"of_original"`
	}
	Faults   faults
	Original *faults `json:"original_faults"`
}

type faults struct{ Violations, Lost, Refused int }

func (f faults) sum() int { return f.Violations + f.Lost + f.Refused }

func benchOriginal(t *testing.T, original string, args ...string) (b compared) {
	t.Helper()
	path, err := bench()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(staticDir(t), filepath.Join(dir, "bin")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, append(args, "-json", "-short", "-runs", "1", "-slice", "20ms", "-clients", "2", "-original", original)...)
	cmd.Dir = dir
	var complaints strings.Builder
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &b)
	}
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, complaints.String())
	}
	return b
}

// TestBenchOriginal: the original's figures stand next to ours.
func TestBenchOriginal(t *testing.T) {
	t.Parallel()
	original := standIn(t, "cat")
	report := benchOriginal(t, original)
	if report.Faults.sum()+report.Original.sum() > 0 {
		t.Errorf("faults: ours %+v, the original's %+v", report.Faults, report.Original)
	}
	var got []string
	for _, l := range report.Lines {
		if l.Original == nil {
			continue
		}
		got = append(got, l.What)
		switch {
		case strings.Contains(l.What, "wake-ups"):
		case strings.Contains(l.What, "rules that are left"):
			if l.Value != 0 || *l.Original != 0 {
				t.Errorf("%s: %v and %v", l.What, l.Value, *l.Original)
			}
		case l.Value <= 0 || *l.Original <= 0 || l.Of == nil || *l.Of != l.Value / *l.Original:
			t.Errorf("%s: %+v", l.What, l)
		}
	}
	want := []string{
		"2 clients: new leases, committed before the reply",
		"2 clients: renewals",
		"2 clients: half of renewals within",
		"2 clients: half of new leases within",
		"2 clients: 99 of 100 renewals within",
		"2 clients: 99 of 100 new leases within",
		"2 clients: processor time of the server for each renewal",
		"2 clients: processor time of the server for each new lease",
		"boot storm: half of 64 callers have a table after",
		"boot storm: the last of 64 callers has a table after",
		"boot storm: callers that have a table within 10s",
		"boot storm: the same, each asking as its own client does",
		"client: from its start to the table on stdout, rules in place",
		"client: wake-ups without an event",
		"client: memory (PSS) of each of 4, at rest",
		"client: memory (PSS) of one alone, at rest",
		"client: rules that are left of 8 addresses which are gone",
	}
	if !slices.Equal(got, want) {
		t.Errorf("rows with the original's figure:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// The original reads no more than this of its configuration, and only a part of what ours may be.
	text, err := os.ReadFile(filepath.Join(original, "config"))
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Socket   string          `json:"socket_path"`
		Database string          `json:"db_path"`
		Log      string          `json:"log_path"`
		First    int             `json:"table_offset"`
		Tables   int             `json:"num_tables"`
		Timeout  int             `json:"table_timeout"`
		Syslog   *bool           `json:"do_syslog"`
		Families map[string]bool `json:"addr_families"`
	}
	if err := json.Unmarshal(text, &config); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if f := config.Families; len(text) >= 1024 || config.Socket == "" || !filepath.IsAbs(config.Database) || config.Log != "/dev/null" ||
		config.First != 10000 || config.Tables != 8192 || config.Timeout != 3600 ||
		config.Syslog == nil || *config.Syslog || !f["inet"] || !f["inet6"] || !f["unspec"] {
		t.Errorf("the original's configuration: %s", text)
	}
}

// TestBenchOriginalFaults: what the original does wrong is counted, and is no fault of ours.
func TestBenchOriginalFaults(t *testing.T) {
	t.Parallel()
	report := benchOriginal(t, standIn(t, `sed 's/"num_tables": [0-9]*/"num_tables": 50/'`), "-only", "server")
	if f := report.Original; report.Faults.sum() > 0 || f.Refused == 0 || f.Violations+f.Lost > 0 {
		t.Errorf("faults: ours %+v, the original's %+v; want refusals of the original's alone", report.Faults, f)
	}
}

// TestBenchFindsFaults: it says what a server does wrong.
func TestBenchFindsFaults(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply func(n int, r wire.Request) wire.Reply
		want  string
	}{
		{"one table for all", func(int, wire.Request) wire.Reply { return wire.Reply{Table: 10000, Expires: 5} }, "is held by"},
		{"another table for each renewal", func(n int, _ wire.Request) wire.Reply {
			return wire.Reply{Table: uint32(10000 + n), Expires: 5}
		}, "renewal of table"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			path, err := bench()
			if err != nil {
				t.Fatal(err)
			}
			addr, err := wire.Padded("wrong")
			if err != nil {
				t.Fatal(err)
			}
			var conn *wire.Conn
			h.ns.Do(func() { conn, err = wire.Listen(addr, wire.MaxRequest) })
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for n := 0; ; {
					datagrams, err := conn.Receive()
					if err != nil {
						return
					}
					for _, d := range datagrams {
						request, err := wire.ParseRequest(d.Data)
						reply := tt.reply(n, request)
						if n++; err != nil || request.Cmd == wire.Release {
							reply = wire.Reply{}
						}
						conn.Send(wire.Message{Data: reply.Append(nil), To: d.From})
					}
				}
			}()
			out, err := h.ns.Output(path, "-server", "wrong", "-leases", "8", "-runs", "1", "-slice", "10ms", "-clients", "2")
			conn.Close()
			<-done
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, tt.want) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
