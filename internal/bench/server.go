package main

import (
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	_ "github.com/table-allocator/table-allocator/internal/allocator" // the SQLite driver
	"github.com/table-allocator/table-allocator/internal/wire"
)

// What the project wants of the server.
const (
	wantRenewals1 = 0.5 // of echo, with one client
	wantRenewals  = 0.6 // with more
	wantNew       = 0.35
	wantTail      = 4.0 // 99 of 100, of echo's
	wantFlat      = 0.9 // with many leases held, of the rate with few
	wantStorm     = 1.0 // seconds
	wantMemory    = 64 << 20
	wantStart     = 0.5 // seconds

	many      = 60_000 // leases
	few       = 1000
	callers   = 1024 // of a boot storm
	turns     = 3    // measurements of a kind in one run
	flatLoad  = 16   // clients
	stormLate = 30 * time.Second
)

func measureServer(o options, dir string, r *report) error {
	echo, err := spawn(filepath.Join(dir, "echo"), "/proc/self/exe", echoCommand, echoName)
	if err != nil {
		return err
	}
	defer echo.kill()
	for _, clients := range o.clients {
		if err := measureRates(o, dir, echo, clients, r); err != nil {
			return err
		}
	}
	if err := measureStorm(o, dir, r); err != nil {
		return err
	}
	return measureMany(o, dir, r)
}

const echoName = "table-allocator-bench-echo"

// sample is what one kind of measurement gave, slice by slice.
type sample struct{ rates, middle, tail, cost []float64 }

// measure adds what a server did, and what processor time it took for each request.
func (s *sample) measure(server *process, measured func() run) error {
	before, err := processor(server.cmd.Process.Pid)
	if err != nil {
		return err
	}
	r := measured()
	after, err := processor(server.cmd.Process.Pid)
	s.cost = append(s.cost, (after-before).Seconds()/float64(r.requests))
	s.add(r)
	return err
}

func (s *sample) add(r run) {
	s.rates = append(s.rates, r.rate())
	s.middle = append(s.middle, r.quantile(0.5).Seconds())
	s.tail = append(s.tail, r.quantile(0.99).Seconds())
}

// over is the median of what s is of other, slice by slice: what takes turns is disturbed
// alike by the rest of the machine.
func over(s, other []float64) float64 {
	ratios := make([]float64, min(len(s), len(other)))
	for i := range ratios {
		ratios[i] = s[i] / other[i]
	}
	return median(ratios)
}

// measureRates lets echo, new leases and renewals take turns.
func measureRates(o options, dir string, echoServer *process, clients int, r *report) error {
	var echo, fresh, renew sample
	for n := range o.runs {
		profile := ""
		if o.profile != "" {
			profile = fmt.Sprintf("%s.%d", o.profile, clients)
		}
		at := filepath.Join(dir, fmt.Sprintf("rates-%d-%d", clients, n))
		server, err := startServer(at, profile)
		if err != nil {
			return err
		}
		other, err := newFleet(target{name: echoName, echo: true}, clients, pool)
		if err != nil {
			return err
		}
		f, err := newFleet(target{name: filepath.Base(at)}, clients, pool)
		if err != nil {
			return err
		}
		next := 0
		for range turns {
			err := errors.Join(
				echo.measure(echoServer, func() run { return other.renew(0, few, o.slice) }),
				fresh.measure(server, func() run { return f.once(wire.Acquire, next, pool, o.slice) }),
				renew.measure(server, func() run { return f.renew(0, f.end, o.slice) }),
			)
			if err != nil {
				return err
			}
			next = f.end
		}
		other.close()
		f.close()
		err = errors.Join(server.stop(), compare(f, filepath.Join(at, "leases.db")))
		r.Faults.merge(&other.faults)
		r.Faults.merge(&f.faults)
		if err := errors.Join(err, os.RemoveAll(at)); err != nil {
			return err
		}
	}
	who := fmt.Sprintf("%d clients", clients)
	if clients == 1 {
		who = "1 client"
	}
	r.add(perSecond, median(clone(echo.rates)), "%s: echo", who)
	r.add(perSecond, median(clone(fresh.rates)), "%s: new leases, committed before the reply", who)
	r.add(perSecond, median(clone(renew.rates)), "%s: renewals", who)
	if clients == 1 {
		r.add(ratio, over(fresh.rates, echo.rates), "%s: new leases, of echo", who)
		r.atLeast(wantRenewals1, ratio, over(renew.rates, echo.rates), "%s: renewals, of echo", who)
	} else {
		r.atLeast(wantNew, ratio, over(fresh.rates, echo.rates), "%s: new leases, of echo", who)
		r.atLeast(wantRenewals, ratio, over(renew.rates, echo.rates), "%s: renewals, of echo", who)
	}
	r.add(seconds, median(clone(echo.middle)), "%s: half of echo's answers within", who)
	r.add(seconds, median(clone(renew.middle)), "%s: half of renewals within", who)
	r.add(seconds, median(clone(fresh.middle)), "%s: half of new leases within", who)
	r.add(seconds, median(clone(echo.tail)), "%s: 99 of 100 of echo's answers within", who)
	r.add(seconds, median(clone(renew.tail)), "%s: 99 of 100 renewals within", who)
	r.add(seconds, median(clone(fresh.tail)), "%s: 99 of 100 new leases within", who)
	r.add(seconds, median(clone(echo.cost)), "%s: processor time of echo for each answer", who)
	r.add(seconds, median(clone(renew.cost)), "%s: processor time of the server for each renewal", who)
	r.add(seconds, median(clone(fresh.cost)), "%s: processor time of the server for each new lease", who)
	if clients == 256 {
		r.atMost(wantTail, ratio, over(renew.tail, echo.tail), "%s: 99 of 100 renewals, of echo's", who)
	}
	return nil
}

// measureStorm lets all callers of a boot ask at once, each as the client does: what finds
// the queue full tries again after a moment.
func measureStorm(o options, dir string, r *report) error {
	queue, err := os.ReadFile("/proc/sys/net/unix/max_dgram_qlen")
	if err != nil {
		return err
	}
	var all, half []float64
	for n := range o.runs {
		at := filepath.Join(dir, fmt.Sprintf("storm-%d", n))
		server, err := startServer(at, "")
		if err != nil {
			return err
		}
		took, err := storm(filepath.Base(at), &r.Faults)
		if err := errors.Join(err, server.stop(), os.RemoveAll(at)); err != nil {
			return err
		}
		all, half = append(all, quantile(took, 1)), append(half, median(took))
	}
	r.add(count, float64(number(queue)), "boot storm: datagrams that the server's queue holds")
	r.add(seconds, median(half), "boot storm: half of %d callers have a table after", callers)
	r.atMost(wantStorm, seconds, median(all), "boot storm: the last of %d callers has a table after", callers)
	return nil
}

func number(text []byte) (n int) {
	fmt.Sscan(string(text), &n) // 0 shows as such
	return n
}

func storm(name string, f *faults) (took []float64, err error) {
	to, err := wire.Exact(name)
	if err != nil {
		return nil, err
	}
	conns := make([]*wire.Conn, callers)
	for i := range conns {
		from, err := wire.Exact(fmt.Sprintf("%s-caller-%d", name, i))
		if err == nil {
			conns[i], err = wire.Listen(from, wire.MaxReplace) // as a holder does
		}
		if err != nil {
			return nil, err
		}
		defer conns[i].Close()
	}
	took = make([]float64, callers)
	tables := make([]uint32, callers)
	var all sync.WaitGroup
	begin := make(chan struct{})
	var start time.Time
	for i, key := range keysFor(callers) {
		request := wire.Message{Data: wire.Request{Key: key}.Append(nil), To: to}
		all.Go(func() {
			<-begin
			for tries := 0; ; tries++ {
				errs := conns[i].Send(request)
				if errs == nil {
					break
				}
				if !errors.Is(errs[0], syscall.EAGAIN) {
					f.add(&f.Lost, "caller %d: %v", i, errs[0])
					return
				}
				window := time.Millisecond << min(tries, 5)
				time.Sleep(window/2 + rand.N(window))
			}
			_ = conns[i].SetReadDeadline(time.Now().Add(stormLate)) // or Receive says why not
			datagrams, err := conns[i].Receive()
			if err != nil {
				f.add(&f.Lost, "caller %d: %v", i, err)
				return
			}
			took[i] = time.Since(start).Seconds()
			reply, err := wire.ParseReply(datagrams[0].Data)
			if err != nil || reply.Table == 0 {
				f.add(&f.Refused, "caller %d: %s: %v", i, datagrams[0].Data, err)
			}
			tables[i] = reply.Table
		})
	}
	start = time.Now()
	close(begin)
	all.Wait()
	holder := make(map[uint32]int)
	for i, table := range tables {
		if other, taken := holder[table]; taken && table != 0 {
			f.add(&f.Violations, "callers %d and %d both have table %d", i, other, table)
		}
		holder[table] = i
	}
	return took, nil
}

// measureMany compares a server that holds many leases with one that holds few.
func measureMany(o options, dir string, r *report) error {
	type side struct {
		dir    string
		server *process
		fleet  *fleet
		held   int
		renew  sample
		fresh  sample
	}
	sides := []*side{{held: few}, {held: many}}
	for _, s := range sides {
		s.dir = filepath.Join(dir, fmt.Sprint("held-", s.held))
		var err error
		if s.server, err = startServer(s.dir, ""); err != nil {
			return err
		}
		if s.fleet, err = newFleet(target{name: filepath.Base(s.dir)}, flatLoad, pool); err != nil {
			return err
		}
		if got := s.fleet.once(wire.Acquire, 0, s.held, time.Minute); got.requests != s.held {
			return fmt.Errorf("%d of %d leases", got.requests, s.held)
		}
	}
	for range o.runs * turns {
		for _, s := range sides {
			s.renew.add(s.fleet.renew(0, s.held, o.slice))
		}
		for _, s := range sides {
			s.fresh.add(s.fleet.once(wire.Acquire, s.held, pool, o.slice/2))
			s.fleet.once(wire.Release, s.held, s.fleet.end, time.Minute)
		}
	}
	r.atLeast(wantFlat, ratio, over(sides[1].renew.rates, sides[0].renew.rates), "%d held leases: renewals, of the rate with %d", many, few)
	r.atLeast(wantFlat, ratio, over(sides[1].fresh.rates, sides[0].fresh.rates), "%d held leases: new leases, of the rate with %d", many, few)
	s := sides[1]
	bytesUsed, err := memory(s.server.cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.atMost(wantMemory, octets, bytesUsed, "%d held leases: memory of the server (PSS)", many)
	var starts []float64
	for range o.runs {
		if err := s.server.stop(); err != nil {
			return err
		}
		begin := time.Now()
		if s.server, err = startServer(s.dir, ""); err != nil {
			return err
		}
		s.fleet.resize(1)
		if got := s.fleet.once(wire.Acquire, 0, 1, time.Minute); got.requests != 1 {
			return errors.New("the server does not answer after its start")
		}
		starts = append(starts, time.Since(begin).Seconds())
	}
	r.atMost(wantStart, seconds, median(starts), "%d held leases: from the server's start to its first answer", many)
	for _, s := range sides {
		s.fleet.close()
		r.Faults.merge(&s.fleet.faults)
		if err := errors.Join(s.server.stop(), compare(s.fleet, filepath.Join(s.dir, "leases.db"))); err != nil {
			return err
		}
	}
	return nil
}

// compare holds what the clients were told against what the database says.
func compare(f *fleet, database string) error {
	db, err := sql.Open("sqlite", "file:"+database+"?mode=ro")
	if err != nil {
		return err
	}
	defer db.Close()
	rows, err := db.Query("SELECT RtTable, Ifname, Addr FROM RtTables")
	if err != nil {
		return fmt.Errorf("read %s: %w", database, err)
	}
	defer rows.Close()
	stored := make(map[wire.Key]uint32)
	for rows.Next() {
		var table uint32
		key := wire.Key{Family: wire.Inet}
		if err := rows.Scan(&table, &key.Ifname, &key.Address); err != nil {
			return err
		}
		stored[key] = table
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for i, table := range f.held {
		if stored[f.keys[i]] != table {
			f.faults.add(&f.faults.Violations, "%v was told table %d, and the database has %d", f.keys[i], table, stored[f.keys[i]])
		}
		delete(stored, f.keys[i])
	}
	for key, table := range stored {
		f.faults.add(&f.faults.Violations, "the database has table %d for %v, which holds none", table, key)
	}
	return nil
}

// foreign measures a server that runs here and gives everything back.
func foreign(o options) error {
	r := newReport()
	f, err := newFleet(target{name: o.server, padded: !o.exact}, 1, o.leases)
	if err != nil {
		return err
	}
	for _, clients := range o.clients {
		if err := f.resize(clients); err != nil {
			return err
		}
		var fresh, renew sample
		for range o.runs {
			fresh.add(f.once(wire.Acquire, 0, o.leases, time.Minute))
			renew.add(f.renew(0, f.end, o.slice*turns))
			f.once(wire.Release, 0, f.end, time.Minute)
		}
		r.add(perSecond, median(fresh.rates), "%d clients: new leases", clients)
		r.add(perSecond, median(renew.rates), "%d clients: renewals", clients)
		r.add(seconds, median(fresh.middle), "%d clients: half of new leases within", clients)
		r.add(seconds, median(renew.middle), "%d clients: half of renewals within", clients)
		r.add(seconds, median(fresh.tail), "%d clients: 99 of 100 new leases within", clients)
		r.add(seconds, median(renew.tail), "%d clients: 99 of 100 renewals within", clients)
	}
	f.close()
	r.Faults.merge(&f.faults)
	return r.print(o)
}
