package main

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestRest: keys that have to rest are renewed in turns, from run to run, and none too soon.
func TestRest(t *testing.T) {
	const keys = 4
	to := target{name: fmt.Sprintf("table-allocator-bench-rest-%d", os.Getpid()), rest: 20 * time.Millisecond}
	addr, err := wire.Exact(to.name)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := wire.Listen(addr, wire.MaxRequest)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(map[wire.Key][]time.Time)
	tables := make(map[wire.Key]uint32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			datagrams, err := conn.Receive()
			if err != nil {
				return
			}
			for _, d := range datagrams {
				request, err := wire.ParseRequest(d.Data)
				if err != nil {
					t.Error(err)
				}
				asked[request.Key] = append(asked[request.Key], time.Now())
				if tables[request.Key] == 0 {
					tables[request.Key] = uint32(len(asked))
				}
				conn.Send(wire.Message{Data: wire.Reply{Table: tables[request.Key], Expires: 5}.Append(nil), To: d.From})
			}
		}
	}()
	f, err := newFleet(to, 2, keys)
	if err != nil {
		t.Fatal(err)
	}
	requests := 0
	for deadline := time.Now().Add(30 * time.Second); requests < 2*keys && time.Now().Before(deadline); {
		r := f.renew(keys, time.Hour)
		if requests += r.requests; r.requests == 0 {
			t.Error("a run without a request")
		}
	}
	f.close()
	conn.Close()
	<-done
	if len(asked) != keys || f.faults.sum() > 0 {
		t.Errorf("%d keys were asked for, want %d; %v", len(asked), keys, &f.faults)
	}
	for key, times := range asked {
		for i, at := range times[1:] {
			if since := at.Sub(times[i]); since < to.rest {
				t.Errorf("%v: renewed after %v, want %v at least", key, since, to.rest)
			}
		}
	}
	if requests < 2*keys {
		t.Errorf("%d requests over %d keys", requests, keys)
	}
}
