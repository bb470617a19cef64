package e2e

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// crowd is many peers that acquire, renew and release while the server is killed again and
// again, and the books of who holds what by the replies that came.
type crowd struct {
	t      *testing.T
	deaths atomic.Int64 // of the server
	ending atomic.Bool

	mu      sync.Mutex
	holders map[uint32]string // address by table: granted, and no release has been asked for
	figures struct{ grants, renewals, releases, exhausted, unanswered int }
}

// crowdPatience is patience with a server that is dead most of the time, and has a queue of ten
// for so many.
const crowdPatience = 10 * patience

// book changes the books; it fails the test if f finds a fault.
func (c *crowd) book(f func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := f(); err != nil {
		c.t.Error(err)
		c.ending.Store(true)
	}
}

// ask sends a request until it is answered: again only when the server died in between,
// so that no answer is for an earlier request.
func (c *crowd) ask(p *peer, datagram string) (wire.Reply, error) {
	to := wire.Message{Data: []byte(datagram)}
	var err error
	if to.To, err = wire.Padded("tas_socket"); err != nil {
		return wire.Reply{}, err
	}
	for begun := time.Now(); ; {
		deaths := c.deaths.Load()
		if errs := p.conn.Send(to); errs != nil {
			if !errors.Is(errs[0], syscall.EAGAIN) && !errors.Is(errs[0], syscall.ECONNREFUSED) {
				return wire.Reply{}, errs[0]
			}
			if time.Since(begun) > crowdPatience {
				return wire.Reply{}, fmt.Errorf("%s: %w", datagram, errs[0])
			}
			time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond)
			continue
		}
		for {
			died := c.deaths.Load() != deaths
			answer, err := p.receive(10 * time.Millisecond)
			if err == nil {
				return wire.ParseReply([]byte(answer))
			}
			if !errors.Is(err, io.EOF) {
				return wire.Reply{}, err
			}
			if time.Since(begun) > crowdPatience {
				return wire.Reply{}, fmt.Errorf("%s: no answer", datagram)
			}
			if died { // before the look into the queue: there will be no answer
				c.book(func() error { c.figures.unanswered++; return nil })
				break
			}
		}
	}
}

// live is one peer, from nothing to at most one lease and back, over and over.
func (c *crowd) live(p *peer, n int, rnd *rand.Rand) error {
	addr := fmt.Sprintf("10.9.0.%d", n)
	var table uint32
	for !c.ending.Load() {
		if table != 0 && rnd.IntN(4) == 0 {
			c.book(func() error {
				delete(c.holders, table)
				c.figures.releases++
				return nil
			})
			if r, err := c.ask(p, release(n)); err != nil || r != (wire.Reply{}) {
				return fmt.Errorf("release of %s: %+v, %v", addr, r, err)
			}
			table = 0
			continue
		}
		r, err := c.ask(p, acquire(n))
		if err != nil {
			return fmt.Errorf("request of %s: %w", addr, err)
		}
		c.book(func() error {
			other, taken := c.holders[r.Table]
			switch {
			case table != 0 && r.Table != table:
				return fmt.Errorf("%s holds %d and is answered %+v", addr, table, r)
			case table != 0:
				c.figures.renewals++
			case r.Table == 0 && r.Code == wire.Exhausted:
				c.figures.exhausted++
			case r.Table == 0:
				return fmt.Errorf("%s is refused: %+v", addr, r)
			case taken:
				return fmt.Errorf("table %d goes to %s while %s holds it", r.Table, addr, other)
			default:
				c.figures.grants++
				table = r.Table
				c.holders[table] = addr
			}
			return nil
		})
	}
	return nil
}

// wantStored looks at what a server that was killed left on the disk, in a copy, so that
// the next server finds it untouched.
func (c *crowd) wantStored(h *host) (checked int) {
	h.t.Helper()
	dir := h.t.TempDir()
	defer os.RemoveAll(dir) // now, not at the end: there may be a thousand
	for _, suffix := range []string{"", "-wal"} {
		data, err := os.ReadFile(h.db + suffix)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "leases.db"+suffix), data, 0o600)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			h.t.Fatal(err)
		}
	}
	left := database{h.t, filepath.Join(dir, "leases.db")}
	out := left.sqlite("pragma integrity_check; select RtTable || ' ' || Addr from RtTables; select 'twice ' || Addr from RtTables group by Addr having count(*) > 1")
	rows := strings.Split(strings.TrimSpace(out), "\n")
	stored := make(map[string]bool)
	for _, row := range rows[1:] {
		stored[row] = true
		if strings.HasPrefix(row, "twice") {
			h.t.Errorf("an address has two tables in the database: %s", out)
		}
	}
	if rows[0] != "ok" {
		h.t.Errorf("integrity_check: %s", out)
	}
	c.book(func() error {
		for table, addr := range c.holders {
			if !stored[fmt.Sprint(table, " ", addr)] {
				return fmt.Errorf("%s was told that it holds %d, which is not in the database:\n%s", addr, table, out)
			}
			checked++
		}
		return nil
	})
	return checked
}

// TestSoakServerKilled: at whatever moment the server is killed, each lease that was
// granted and not released is its holder's afterwards, and no table ever has two holders.
func TestSoakServerKilled(t *testing.T) {
	h := newHost(t)
	kills := 15
	if os.Getenv("SOAK") == "full" {
		kills = 1000
	}
	const clients, tables = 64, 48 // so that tables go from hand to hand
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	h.config(fmt.Sprintf(`"num_tables":%d`, tables))
	c := &crowd{t: t, holders: make(map[uint32]string)}
	var running sync.WaitGroup
	errs := make([]error, clients)
	for n := range clients {
		p, rnd := h.peer(fmt.Sprint("peer-", n), n%2 == 0), rand.New(rand.NewPCG(seed, uint64(n)+1))
		running.Go(func() {
			if errs[n] = c.live(p, n, rnd); errs[n] != nil {
				c.ending.Store(true)
			}
		})
	}
	begun := time.Now()
	checked, young := 0, 0
	for i := range kills {
		server := h.launch()
		if i > 0 && rnd.IntN(5) == 0 { // while it starts, too; but for the first, which makes the database
			young++
		} else {
			server.waitLog("msg=serving")
		}
		time.Sleep(time.Duration(rnd.IntN(100_000)) * time.Microsecond)
		server.kill()
		c.deaths.Add(1)
		checked += c.wantStored(h)
		if c.ending.Load() {
			break
		}
	}
	server := h.launch()
	server.waitLog("msg=serving")
	c.ending.Store(true)
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	var want []string
	for table, addr := range c.holders {
		want = append(want, fmt.Sprintf("%d|inet|eth0|%s||0", table, addr))
	}
	h.wantLeases(want...)
	p := h.cPeer("last")
	for table, addr := range c.holders {
		wantTable(t, p.ask(request(2, "eth0", addr, 0)), table)
	}
	if code := server.stop(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	f := c.figures
	t.Logf("%d kills in %v, %d of them of a server that perhaps did not serve yet: %d grants, %d renewals, %d releases, %d times no table was free",
		kills, time.Since(begun).Round(time.Millisecond), young, f.grants, f.renewals, f.releases, f.exhausted)
	t.Logf("%d requests died with the server and were asked again; %d leases looked up in %d databases of killed servers, all there, each database whole",
		f.unanswered, checked, kills)
	if f.grants < kills || f.renewals < kills || f.releases < kills || checked < kills {
		t.Errorf("too little happened to show anything")
	}
}
