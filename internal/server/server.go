// Package server is the process that leases table numbers: its configuration, who may ask, which
// numbers the rules of the host use already, and the loops from datagram to transaction to reply. It
// leaves to package allocator who holds which table, and to package wire the protocol.
package server

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Host is what the service manager gives to the server, and how the server notifies it.
type Host struct {
	Sockets     []*os.File    // sockets that it has bound to forms of the name
	Ready       func() error  // called once requests are served
	Stopping    func() error  // called when that ends
	Alive       func() error  // called each AlivePeriod while the loops work
	AlivePeriod time.Duration // 0: Alive is not called
	Reload      <-chan Reload // nil: the configuration never changes
}

// Run serves until ctx ends. Then it finishes the rounds at hand, stores the renewals and returns nil.
func Run(ctx context.Context, cfg Config, host Host, log *slog.Logger) error {
	conns, err := listen(cfg.SocketName, host.Sockets)
	if err != nil {
		return err
	}
	defer closeAll(conns)
	s := &server{
		cfg:      cfg,
		log:      log,
		recorder: recorder{log: log},
		marking:  cfg.Marking,
		timeout:  cfg.Timeout,
		conns:    conns,
		access:   newAccess(cfg),
		rules:    &rulesInUse{log: log, last: uint32(uint64(cfg.FirstTable) + cfg.Tables - 1)},
		noise:    newThrottle(log),
		faults:   newThrottle(log),
		kick:     make(chan struct{}, 1),
		renamed:  make(chan struct{}, 1),
		seed:     maphash.MakeSeed(),
	}
	defer s.rules.close()
	epoch, err := thisEpoch(conns[0])
	if err != nil {
		return err
	}
	s.leases, err = allocator.Open(allocator.Config{
		Path:    cfg.Database,
		Pools:   pools(cfg),
		Limits:  cfg.limits(),
		Epoch:   epoch,
		Marks:   cfg.Marking.marks(),
		Avoid:   s.rules.avoid,
		Taken:   s.rules.taken,
		Sources: s.rules.lookedUp,
		Named:   s.rules.named,
		Self:    s.access.self,
	}, wire.Seconds(wire.Now()), log)
	if err != nil {
		return err
	}
	if claimed, err := makeClaim(claimOf(cfg), log); err != nil {
		log.Debug("cannot find out whether another server leases the same tables", "err", err) // as without CONFIG_UNIX_DIAG
	} else {
		defer claimed.Close()
	}
	return s.serve(ctx, cfg, host, conns)
}

// server is the state behind the loops: one for each socket, and the ticker. mu guards what
// comes after it. Nothing sleeps under mu, or waits for more than the kernel and the database.
type server struct {
	log      *slog.Logger
	marking  marking
	conns    []*wire.Conn
	kick     chan struct{} // something is due before the ticker wakes
	renamed  chan struct{} // leases have changed that may have names
	watchdog watchdog
	seed     maphash.Seed // of the names of senders

	warnHidden sync.Once

	mu       sync.Mutex
	cfg      Config
	timeout  int64 // of leases, in seconds
	leases   *allocator.Allocator
	access   *access
	rules    *rulesInUse
	recorder recorder
	noise    *throttle     // log lines that any user can cause
	faults   *throttle     // log lines that noise must not hide
	armed    int64         // second of the lease clock that dueAt was made from
	dueAt    time.Duration // when the allocator has something to do next
	round    round
	stopping bool           // no look-up begins any more
	beside   sync.WaitGroup // what runs beside the loops; Go is called with mu held
}

// listen binds both forms of the name: any user could bind a form that is left, and half of the
// clients would ask him.
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

// taken returns an error that names the owner of a socket name.
func taken(addr wire.Addr, cause error) error {
	owner, err := wire.FindOwner(addr)
	if err != nil {
		return errors.Join(cause, err)
	}
	return fmt.Errorf("bind %s: taken by %s: stop it, or serve another name (socket_path)", addr, owner)
}

func closeAll(conns []*wire.Conn) {
	for _, c := range conns {
		_ = c.Close() // nothing can be lost
	}
}

// thisEpoch returns the boot and the network namespace of the server: rules end with either of them.
func thisEpoch(conn *wire.Conn) (allocator.Epoch, error) {
	var id []byte
	err := outside.Again(func() (err error) {
		id, err = os.ReadFile("/proc/sys/kernel/random/boot_id")
		return err
	})
	if err != nil {
		return allocator.Epoch{}, fmt.Errorf("read boot id: %w", err)
	}
	return allocator.Epoch{Boot: strings.TrimSpace(string(id)), Netns: conn.NetnsCookie()}, nil
}

func pools(cfg Config) map[allocator.Family]allocator.Pool {
	pools := make(map[allocator.Family]allocator.Pool)
	for _, family := range cfg.Families {
		pools[allocator.Family(family)] = allocator.Pool{First: cfg.FirstTable, Count: cfg.Tables}
	}
	return pools
}

// serve runs the loops, and ends all when one ends.
func (s *server) serve(ctx context.Context, cfg Config, host Host, conns []*wire.Conn) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Wake ends the wait for a datagram. A round at hand goes on to its end.
	defer context.AfterFunc(ctx, func() {
		for _, c := range conns {
			if err := c.Wake(); err != nil {
				s.log.Error("cannot wake the loop of a socket, so the server cannot end", "err", err)
			}
		}
	})()
	useOneProcessor()
	found := s.leases.Held()
	s.watchdog.writing = s.leases.Writing
	errs := make(chan error, len(conns))
	var running sync.WaitGroup
	for _, c := range conns {
		if err := c.Wait(); err != nil {
			return err
		}
	}
	for _, c := range conns {
		loop := s.watchdog.add()
		running.Go(func() {
			defer cancel()
			errs <- s.receive(ctx, &socket{Conn: c}, loop)
		})
	}
	running.Go(func() { s.followReloads(ctx, host.Reload) })
	running.Go(func() { s.keepNames(ctx) })
	s.changeNames()
	ticker := s.watchdog.add()
	running.Go(func() { s.tick(ctx, ticker) })
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
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	s.beside.Wait() // for groupsLimit at most
	for range conns {
		err = errors.Join(err, <-errs)
	}
	err = errors.Join(err, s.leases.Close(wire.Seconds(wire.Now())))
	if err == nil {
		s.log.Info("stopped")
	}
	return err
}

// useOneProcessor limits Go to one processor. The loops work under one mutex, so another processor
// would only cost moves of threads.
func useOneProcessor() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
}

func (s *server) tell(notify func() error) {
	if notify == nil {
		return
	}
	if err := notify(); err != nil {
		s.log.Warn("cannot tell the service manager", "err", err)
	}
}

// receive is the loop of a socket.
func (s *server) receive(ctx context.Context, c *socket, loop *loop) error {
	for ctx.Err() == nil {
		datagrams, err := c.Receive()
		if err != nil {
			return err
		}
		s.work(c, datagrams, loop)
		runtime.Gosched() // this thread keeps the processor while it waits: let others run before
	}
	return nil
}

func (s *server) work(c *socket, datagrams []wire.Datagram, loop *loop) {
	s.watchdog.begin(loop)
	defer loop.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	began := s.resume()
	s.handle(c, datagrams, began)
	s.advance(began)
	if s.leases.Next() < s.armed {
		s.arm()
		select {
		case s.kick <- struct{}{}:
		default: // one is under way
		}
	}
}

// tick is the loop that ends leases and stores renewals when that is due.
func (s *server) tick(ctx context.Context, loop *loop) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-s.kick:
		}
		timer.Reset(s.tickOnce(loop))
	}
}

// tickOnce does what is due, and returns how long to wait for the next time.
func (s *server) tickOnce(loop *loop) time.Duration {
	s.watchdog.begin(loop)
	defer loop.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advance(s.resume())
	return max(s.dueAt-wire.Now(), time.Millisecond) // of what waits for a socket, too
}

// resume returns the time at the begin of a round. If something was due long before it, the server
// stood still.
func (s *server) resume() (now time.Duration) {
	now = wire.Now()
	if s.dueAt != 0 {
		s.notePause(now, s.dueAt)
	}
	return now
}

// notePause finds that the server stood still: it was stopped, or waited for its disk. Requests to
// renew are in the queue then, or could not even be sent, so leases last as much longer.
func (s *server) notePause(now, since time.Duration) {
	const least = time.Second
	if paused := now - since; paused > least {
		s.log.Warn("the server stood still, so all leases last longer", "seconds", int64(paused.Seconds()))
		s.leases.Pause(wire.Seconds(paused) + 1)
		s.arm()
	}
}

// emptyWithin is how long leases that are due wait for the sockets to be read empty: a renewal may be in there. Who
// sends without end does not keep all leases alive.
const emptyWithin = time.Second

// unread reports whether datagrams wait that came before what is due.
func (s *server) unread(now time.Duration) bool {
	return now < s.dueAt+emptyWithin && slices.ContainsFunc(s.conns, (*wire.Conn).Waiting)
}

// advance does what is due at the end of a round.
func (s *server) advance(began time.Duration) {
	now := wire.Now()
	s.notePause(now, began)
	if now < s.dueAt || s.unread(now) { // the loop of the socket comes back soon
		return
	}
	expired, err := s.leases.Tick(wire.Seconds(now))
	if err != nil {
		s.faults.write(slog.LevelError, "cannot write to the database, trying again", "err", err)
	}
	for _, lease := range expired {
		s.rules.forgetRoutes(lease.Family, lease.Table)
		s.log.LogAttrs(context.Background(), slog.LevelInfo, "lease expired", leaseAttrs(nil, lease)...)
	}
	if len(expired) > 0 {
		s.changeNames()
	}
	s.arm()
}

// arm sets dueAt.
func (s *server) arm() {
	const least = 100 * time.Millisecond
	// Not long, so that it is known for how long the server stood still.
	most := min(max(time.Duration(s.timeout)*time.Second/4, least), time.Minute)
	now := wire.Now()
	s.armed = s.leases.Next()
	s.dueAt = now + min(max(time.Duration(min(s.armed, 1<<32))*time.Second-now, least), most)
}
