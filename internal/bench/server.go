package main

import (
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
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

	turns      = 3                // measurements of a kind in one run
	flatLoad   = 16               // clients
	impatience = 10 * time.Second // of a caller: the original's client tries five times then
)

func measureServer(o options, dir string, r *report) error {
	echo, err := spawn(target{name: echoName}, filepath.Join(dir, "echo"), "/proc/self/exe", echoCommand, echoName)
	if err != nil {
		return err
	}
	defer echo.kill()
	var original *holder
	if o.original != "" {
		if original, err = hold(theirs(o.original), filepath.Join(dir, "original"), 1, o.few); err != nil {
			return err
		}
		defer original.server.kill()
	}
	for _, clients := range o.clients {
		if err := measureRates(o, dir, echo, original, clients, r); err != nil {
			return err
		}
	}
	if original != nil {
		if err := original.end(r.Original); err != nil {
			return err
		}
	}
	if err := measureStorm(o, dir, r); err != nil {
		return err
	}
	return measureMany(o, dir, r)
}

const echoName = "table-allocator-bench-echo"

// sample is the results of one kind of measurement, one for each slice.
type sample struct{ rates, middle, tail, cost []float64 }

// measure adds the result of a run, and the processor time of the server for each request.
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

// over is the median of the ratios of s and other, slice by slice: measurements that take turns are
// disturbed alike by the rest of the machine.
func over(s, other []float64) float64 {
	ratios := make([]float64, min(len(s), len(other)))
	for i := range ratios {
		ratios[i] = s[i] / other[i]
	}
	return median(ratios)
}

// holder is a server, and clients that hold a number of its leases all the time.
type holder struct {
	software
	dir     string
	server  *process
	fleet   *fleet
	held    int
	acquire sample
	renew   sample
}

func hold(s software, dir string, clients, held int) (*holder, error) {
	h := &holder{software: s, dir: dir, held: held}
	var err error
	if h.server, err = s.start(dir, ""); err != nil {
		return nil, err
	}
	if h.fleet, err = newFleet(s.target(dir), clients, s.tables); err != nil {
		return nil, err
	}
	h.fleet.once(wire.Acquire, 0, held, time.Minute)
	return h, nil
}

func (h *holder) renewals(slice time.Duration) error {
	return h.renew.measure(h.server, func() run { return h.fleet.renew(h.held, slice) })
}

// newLeases measures new leases, and releases them.
func (h *holder) newLeases(slice time.Duration) error {
	err := h.acquire.measure(h.server, func() run { return h.fleet.once(wire.Acquire, h.held, len(h.fleet.keys), slice) })
	h.fleet.once(wire.Release, h.held, h.fleet.end, time.Minute)
	return err
}

// end stops the server, compares its database, and adds all faults to f.
func (h *holder) end(f *faults) error {
	h.fleet.close()
	err := errors.Join(h.server.stop(), compare(h.fleet, filepath.Join(h.dir, "leases.db")))
	f.merge(&h.fleet.faults)
	return err
}

// measureRates measures echo, new leases and renewals, and those of the original, in turns.
func measureRates(o options, dir string, echoServer *process, original *holder, clients int, r *report) error {
	var echo, acquire, renew sample
	if original != nil {
		if err := original.fleet.resize(clients); err != nil {
			return err
		}
		original.acquire, original.renew = sample{}, sample{}
	}
	for n := range o.runs {
		profile := ""
		if o.profile != "" {
			profile = fmt.Sprintf("%s.%d", o.profile, clients)
		}
		at := filepath.Join(dir, fmt.Sprintf("rates-%d-%d", clients, n))
		server, err := ours.start(at, profile)
		if err != nil {
			return err
		}
		other, err := newFleet(target{name: echoName, echo: true}, clients, ours.tables)
		if err != nil {
			return err
		}
		f, err := newFleet(ours.target(at), clients, ours.tables)
		if err != nil {
			return err
		}
		next := 0
		for range turns {
			err := errors.Join(
				echo.measure(echoServer, func() run { return other.renew(o.few, o.slice) }),
				acquire.measure(server, func() run { return f.once(wire.Acquire, next, ours.tables, o.slice) }),
				renew.measure(server, func() run { return f.renew(f.end, o.slice) }),
			)
			if original != nil {
				err = errors.Join(err, original.newLeases(o.slice), original.renewals(o.slice))
			}
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
	if original == nil {
		original = &holder{} // it has no figures
	}
	reportRates(r, clients, echo, acquire, renew, original)
	return nil
}

// reportRates adds the figures of so many clients to the report.
func reportRates(r *report, clients int, echo, acquire, renew sample, original *holder) {
	who := fmt.Sprintf("%d clients", clients)
	if clients == 1 {
		who = "1 client"
	}
	r.add(perSecond, median(echo.rates), "%s: echo", who)
	r.add(perSecond, median(acquire.rates), "%s: new leases, committed before the reply", who).against(original.acquire.rates)
	r.add(perSecond, median(renew.rates), "%s: renewals", who).against(original.renew.rates)
	ofNew := r.add(ratio, over(acquire.rates, echo.rates), "%s: new leases, of echo", who)
	ofRenewals := r.add(ratio, over(renew.rates, echo.rates), "%s: renewals, of echo", who)
	if clients == 1 {
		ofRenewals.atLeast(wantRenewals1)
	} else {
		ofNew.atLeast(wantNew)
		ofRenewals.atLeast(wantRenewals)
	}
	r.add(seconds, median(echo.middle), "%s: half of echo's answers within", who)
	r.add(seconds, median(renew.middle), "%s: half of renewals within", who).against(original.renew.middle)
	r.add(seconds, median(acquire.middle), "%s: half of new leases within", who).against(original.acquire.middle)
	r.add(seconds, median(echo.tail), "%s: 99 of 100 of echo's answers within", who)
	r.add(seconds, median(renew.tail), "%s: 99 of 100 renewals within", who).against(original.renew.tail)
	r.add(seconds, median(acquire.tail), "%s: 99 of 100 new leases within", who).against(original.acquire.tail)
	r.add(seconds, median(echo.cost), "%s: processor time of echo for each answer", who)
	r.add(seconds, median(renew.cost), "%s: processor time of the server for each renewal", who).against(original.renew.cost)
	r.add(seconds, median(acquire.cost), "%s: processor time of the server for each new lease", who).against(original.acquire.cost)
	if clients == 256 {
		r.add(ratio, over(renew.tail, echo.tail), "%s: 99 of 100 renewals, of echo's", who).atMost(wantTail)
	}
}

// measureStorm measures how long callers wait that all ask at once, as at a boot.
func measureStorm(o options, dir string, r *report) error {
	queue, err := os.ReadFile("/proc/sys/net/unix/max_dgram_qlen")
	if err != nil {
		return err
	}
	var half, last, served [2][]float64
	for i, s := range o.programs() {
		for n := range o.runs {
			took, err := storm(s, filepath.Join(dir, fmt.Sprintf("storm-%d-%d", i, n)), o.callers, soon, r.faults(i))
			if err != nil {
				return err
			}
			half[i], last[i] = append(half[i], median(took)), append(last[i], quantile(took, 1))
			served[i] = append(served[i], answered(took))
			if n := slices.Min(served[0]); n < float64(o.callers) && i == 0 {
				r.Faults.add(&r.Faults.Lost, "%v of %d callers had a table within %v", n, o.callers, impatience)
			}
		}
	}
	r.add(count, float64(number(queue)), "boot storm: datagrams that the server's queue holds")
	r.add(seconds, median(half[0]), "boot storm: half of %d callers have a table after", o.callers).against(half[1])
	r.add(seconds, median(last[0]), "boot storm: the last of %d callers has a table after", o.callers).against(last[1]).atMost(wantStorm)
	if o.original == "" {
		return nil
	}
	r.add(count, median(served[0]), "boot storm: callers that have a table within %v", impatience).against(served[1])
	took, err := storm(theirs(o.original), filepath.Join(dir, "storm"), o.callers, late, r.Original)
	if err != nil {
		return err
	}
	r.add(count, median(served[0]), "boot storm: the same, each asking as its own client does").against([]float64{answered(took)})
	return nil
}

// soon is how long our client waits when it has found the queue full, after so many tries.
func soon(tries int) time.Duration {
	window := time.Millisecond << min(tries, 5)
	return window/2 + rand.N(window)
}

// late is how long the original's client waits in the same case.
func late(int) time.Duration { return 2 * time.Second }

// answered counts the callers that got an answer.
func answered(took []float64) (n float64) {
	for _, t := range took {
		if t < impatience.Seconds() {
			n++
		}
	}
	return n
}

func number(text []byte) (n int) {
	fmt.Sscan(string(text), &n) // what is no number is printed as 0
	return n
}

// storm returns after how many seconds each caller of a new server has a table. A caller that finds
// the queue full for impatience gives up, and counts as that long.
func storm(s software, dir string, callers int, pause func(tries int) time.Duration, f *faults) (took []float64, err error) {
	server, err := s.start(dir, "")
	if err != nil {
		return nil, err
	}
	defer server.kill()
	address := wire.Exact
	if s.padded {
		address = wire.Padded
	}
	to, err := address(s.target(dir).name)
	if err != nil {
		return nil, err
	}
	conns := make([]*wire.Conn, callers)
	for i := range conns {
		from, err := address(fmt.Sprintf("%s-caller-%d", filepath.Base(dir), i))
		if err == nil {
			conns[i], err = wire.Listen(from, wire.MaxReplace) // as a holder does
		}
		if err != nil {
			return nil, err
		}
		defer conns[i].Close()
	}
	took = slices.Repeat([]float64{impatience.Seconds()}, callers)
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
				wait := pause(tries)
				if time.Since(start)+wait > impatience {
					return
				}
				time.Sleep(wait)
			}
			_ = conns[i].SetReadDeadline(time.Now().Add(silence)) // or Receive says why not
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
	return took, server.stop()
}

// measureMany compares a server that holds many leases with one that holds few.
func measureMany(o options, dir string, r *report) error {
	var sides []*holder
	for _, held := range []int{o.few, o.many} {
		h, err := hold(ours, filepath.Join(dir, fmt.Sprint("held-", held)), flatLoad, held)
		if err != nil {
			return err
		}
		if h.fleet.end != held {
			return fmt.Errorf("%d of %d leases within a minute", h.fleet.end, held)
		}
		sides = append(sides, h)
	}
	small, large := sides[0], sides[1]
	for range 2 * o.runs * turns { // more turns: the two rates differ less than two turns of one server do
		slices.Reverse(sides)
		for _, h := range sides {
			if err := h.renewals(o.slice); err != nil {
				return err
			}
		}
		for _, h := range sides {
			if err := h.newLeases(o.slice / 2); err != nil {
				return err
			}
		}
	}
	r.add(ratio, over(large.renew.rates, small.renew.rates), "%d held leases: renewals, of the rate with %d", o.many, o.few).atLeast(wantFlat)
	r.add(ratio, over(large.acquire.rates, small.acquire.rates), "%d held leases: new leases, of the rate with %d", o.many, o.few).atLeast(wantFlat)
	bytesUsed, err := memory(large.server.cmd.Process.Pid)
	if err != nil {
		return err
	}
	r.add(octets, bytesUsed, "%d held leases: memory of the server (PSS)", o.many).atMost(wantMemory)
	var starts []float64
	for range o.runs {
		if err := large.server.stop(); err != nil {
			return err
		}
		begin := time.Now()
		if large.server, err = ours.start(large.dir, ""); err != nil {
			return err
		}
		starts = append(starts, time.Since(begin).Seconds())
	}
	r.add(seconds, median(starts), "%d held leases: from the server's start to its first answer", o.many).atMost(wantStart)
	return errors.Join(small.end(&r.Faults), large.end(&r.Faults))
}

// compare compares the tables that the clients were told with those in the database.
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

// foreign measures a server that runs here, and releases all leases.
func foreign(o options) error {
	r := newReport(o)
	f, err := newFleet(target{name: o.server, padded: !o.exact}, 1, o.leases)
	if err != nil {
		return err
	}
	for _, clients := range o.clients {
		if err := f.resize(clients); err != nil {
			return err
		}
		var acquire, renew sample
		for range o.runs {
			acquire.add(f.once(wire.Acquire, 0, o.leases, time.Minute))
			renew.add(f.renew(f.end, o.slice*turns))
			f.once(wire.Release, 0, f.end, time.Minute)
		}
		r.add(perSecond, median(acquire.rates), "%d clients: new leases", clients)
		r.add(perSecond, median(renew.rates), "%d clients: renewals", clients)
		r.add(seconds, median(acquire.middle), "%d clients: half of new leases within", clients)
		r.add(seconds, median(renew.middle), "%d clients: half of renewals within", clients)
		r.add(seconds, median(acquire.tail), "%d clients: 99 of 100 new leases within", clients)
		r.add(seconds, median(renew.tail), "%d clients: 99 of 100 renewals within", clients)
	}
	f.close()
	r.Faults.merge(&f.faults)
	return r.print(o)
}
