// Package server is the process that leases table numbers: its configuration, who may
// ask, which numbers the rules of the host keep from being leased, and the loop from
// datagram to transaction to reply. Who holds what is allocator's, the protocol wire's.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Host is what surrounds the server: what the service manager gives and wants to hear.
type Host struct {
	Sockets     []*os.File    // sockets that it bound for us, of either form of the name
	Ready       func() error  // called once requests are served
	Stopping    func() error  // called when that ends
	Alive       func() error  // called each AlivePeriod while the server works
	AlivePeriod time.Duration // 0: nobody watches
}

// Run serves until ctx ends, then finishes the batch at hand, flushes and returns nil.
func Run(ctx context.Context, cfg Config, host Host, log *slog.Logger) error {
	conns, err := listen(cfg.SocketName, host.Sockets)
	if err != nil {
		return err
	}
	defer closeAll(conns)
	s := &server{
		log:      log,
		recorder: recorder{log: log},
		disk:     newDisk(),
		marking:  cfg.Marking,
		access:   newAccess(cfg),
		rules:    &rulesInUse{log: log},
		noise:    newThrottle(log),
		faults:   newThrottle(log),
		kick:     make(chan struct{}, 1),
	}
	s.landed.L = &s.mu
	for _, c := range conns {
		s.sockets = append(s.sockets, &socket{Conn: c})
	}
	defer s.close()
	boot, err := thisBoot(conns[0])
	if err != nil {
		return err
	}
	s.leases, err = allocator.Open(allocator.Config{
		Path:    cfg.Database,
		Pools:   pools(cfg),
		Timeout: cfg.Timeout,
		Boot:    boot,
		Marks:   cfg.Marking.marks(),
		Avoid:   s.rules.avoid,
		Taken:   s.rules.taken,
		Beside:  s.beside,
	}, wire.Seconds(wire.Now()), log)
	if err != nil {
		return err
	}
	return s.serve(ctx, cfg, host)
}

// server is the state behind the loops. mu guards what comes after it.
type server struct {
	log     *slog.Logger
	disk    *disk
	marking marking
	sockets []*socket
	kick    chan struct{} // something is due before the ticker wakes

	mu        sync.Mutex
	landed    sync.Cond // a transaction is done
	leases    *allocator.Allocator
	access    *access
	rules     *rulesInUse
	recorder  recorder
	noise     *throttle     // what anybody on the host can cause
	faults    *throttle     // what noise must not hide
	armed     int64         // what dueAt is for
	dueAt     time.Duration // when the allocator has something to do
	receiving *socket       // to which the turn of whoever has mu belongs
	spare     *round        // memory for the next one
	later     queue         // asks for when the database can be written
}

// socket is one form of the name that is served. Who has the turn receives from it: one of two
// loops, so that the other can when the first waits for the disk.
type socket struct {
	*wire.Conn
	turn sync.Mutex
}

// listen holds both forms of the name: whoever held only one would leave the other, and
// with it half of the clients, to anybody.
func listen(name string, passed []*os.File) (conns []*wire.Conn, err error) {
	defer func() {
		if err != nil {
			closeAll(conns)
		}
	}()
	padded, err := wire.Padded(name)
	if err != nil {
		return nil, err
	}
	exact, err := wire.Exact(name)
	if err != nil {
		return nil, err
	}
	held := make(map[wire.Addr]bool)
	for _, f := range passed {
		c, err := wire.FromFile(f, wire.MaxRequest)
		if err != nil {
			return conns, err
		}
		conns = append(conns, c)
		if c.Addr() != padded && c.Addr() != exact || held[c.Addr()] {
			return conns, fmt.Errorf("socket %s was passed in, but the name to serve is %s", c.Addr(), padded)
		}
		held[c.Addr()] = true
	}
	for _, addr := range []wire.Addr{padded, exact} {
		if held[addr] {
			continue
		}
		c, err := wire.Listen(addr, wire.MaxRequest)
		if errors.Is(err, syscall.EADDRINUSE) {
			return conns, taken(addr, err)
		}
		if err != nil {
			return conns, err
		}
		conns = append(conns, c)
	}
	return conns, nil
}

// taken names the owner of a name that is in use.
func taken(addr wire.Addr, cause error) error {
	owner, err := wire.FindOwner(addr)
	if err != nil {
		return errors.Join(cause, err)
	}
	return fmt.Errorf("bind %s: taken by %s: stop it, or serve another name (socket_path)", addr, owner)
}

func closeAll(conns []*wire.Conn) {
	for _, c := range conns {
		_ = c.Close() // nothing is written through them that could be lost
	}
}

// thisBoot is the pair that a lease belongs to: rules die with either of them.
func thisBoot(conn *wire.Conn) (allocator.Boot, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return allocator.Boot{}, fmt.Errorf("read boot id: %w", err)
	}
	return allocator.Boot{ID: strings.TrimSpace(string(id)), Netns: conn.NetnsCookie()}, nil
}

func pools(cfg Config) map[allocator.Family]allocator.Pool {
	pools := make(map[allocator.Family]allocator.Pool)
	for _, family := range cfg.Families {
		pools[allocator.Family(family)] = allocator.Pool{First: cfg.FirstTable, Count: cfg.Tables}
	}
	return pools
}

func (s *server) close() {
	s.rules.close()
	s.disk.close()
}

// serve runs two loops for each socket and the ticker, and ends all when one ends.
func (s *server) serve(ctx context.Context, cfg Config, host Host) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A deadline breaks the wait for a datagram, not the batch that is being handled.
	defer context.AfterFunc(ctx, func() {
		for _, c := range s.sockets {
			_ = c.SetReadDeadline(time.Unix(1, 0)) // fails only on a socket that is closed
		}
	})()
	useOneProcessor()
	found := held(s.leases)
	errs := make(chan error, 2*len(s.sockets))
	var running sync.WaitGroup
	for _, c := range s.sockets {
		for range 2 {
			running.Go(func() {
				defer cancel()
				errs <- s.receive(ctx, c)
			})
		}
	}
	running.Go(func() { s.tick(ctx) })
	if host.Alive != nil && host.AlivePeriod > 0 {
		running.Go(func() { s.live(ctx, host) })
	}
	s.log.Info("serving", "socket", "@"+cfg.SocketName, "database", cfg.Database,
		"tables", fmt.Sprintf("%d-%d", cfg.FirstTable, uint64(cfg.FirstTable)+cfg.Tables-1),
		"families", fmt.Sprint(cfg.Families), "timeout", cfg.Timeout, "held", found)
	s.tell(host.Ready)
	<-ctx.Done()
	s.tell(host.Stopping)
	running.Wait()
	for range cap(errs) {
		err = errors.Join(err, <-errs)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err = errors.Join(err, s.leases.Close(wire.Seconds(wire.Now())))
	if err == nil {
		s.log.Info("stopped")
	}
	return err
}

// useOneProcessor is for a loop that works behind a lock: to another processor Go would only
// give the thread that it wakes for each datagram, in case that there is more to do.
func useOneProcessor() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
}

func held(leases *allocator.Allocator) (n uint64) {
	for _, stats := range leases.Stats() {
		n += stats.Held + stats.Outside
	}
	return n
}

func (s *server) tell(notify func() error) {
	if notify == nil {
		return
	}
	if err := notify(); err != nil {
		s.log.Warn("cannot tell the service manager", "err", err)
	}
}

// receive is one of the two loops of a socket.
func (s *server) receive(ctx context.Context, c *socket) error {
	c.turn.Lock()
	defer c.turn.Unlock()
	for ctx.Err() == nil {
		datagrams, err := c.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if relieved := s.work(c, datagrams); relieved {
			c.turn.Lock()
		}
	}
	return nil
}

// work tells whether the turn to receive was given up.
func (s *server) work(c *socket, datagrams []wire.Datagram) (relieved bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.receiving = c
	s.handle(c, datagrams)
	s.catchUp()
	relieved = s.receiving == nil
	s.receiving = nil
	if s.leases.Next() < s.armed {
		s.arm()
		select {
		case s.kick <- struct{}{}:
		default: // one is under way
		}
	}
	return relieved
}

// live tells the service manager that the server works, also while the disk does not.
func (s *server) live(ctx context.Context, host Host) {
	t := time.NewTicker(host.AlivePeriod)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		s.mu.Lock()
		//lint:ignore SA2001 a server that cannot get here does not work
		s.mu.Unlock()
		s.tell(host.Alive)
	}
}

// tick lets leases expire and renewals reach the disk, when the allocator wants it.
func (s *server) tick(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-s.kick:
		}
		timer.Reset(s.tickOnce())
	}
}

// tickOnce returns how long to wait for what comes next.
func (s *server) tickOnce() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.leases.Busy() {
		s.landed.Wait()
	}
	s.catchUp()
	return s.dueAt - wire.Now()
}

// advance does what is due.
func (s *server) advance() {
	now := wire.Now()
	if now < s.dueAt {
		return
	}
	expired, err := s.leases.Tick(wire.Seconds(now))
	if err != nil {
		s.faults.write(slog.LevelError, "cannot write to the database, trying again", "err", err)
	}
	for _, lease := range expired {
		s.log.LogAttrs(context.Background(), slog.LevelInfo, "lease expired", leaseAttrs(nil, lease)...)
	}
	s.arm()
}

// arm notes when something is due next.
func (s *server) arm() {
	const least, most = 100 * time.Millisecond, time.Minute
	now := wire.Now()
	s.armed = s.leases.Next()
	s.dueAt = now + min(max(time.Duration(min(s.armed, 1<<32))*time.Second-now, least), most)
}
