package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

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
			Faults struct{ Violations, Lost, Refused int }
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if len(report.Lines) == 0 || report.Faults.Violations+report.Faults.Lost+report.Faults.Refused > 0 {
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
