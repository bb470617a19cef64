package client

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/onchange"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplinks"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// serve answers questions about uplinks, beside the loop, until stop. The name is also the lock of the choice: if another
// process of a user that is trusted has it, that one chooses, and this one does when the other has ended. It is for the start: it
// may wait for that process.
func (c *chooser) serve() error {
	err := c.listen()
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("the command uplinks cannot ask this process: %w", err)
	}
	pid, is, unknown := uplinks.Chooser()
	if unknown == nil {
		c.yields = is
	}
	if c.yields {
		return yielding(pid, err)
	}
	return fmt.Errorf("the command uplinks cannot ask this process, since another one has its name: %w", errors.Join(err, unknown))
}

func (c *chooser) listen() error {
	l, err := uplinks.Listen()
	if err != nil {
		return err
	}
	c.listener, c.yields = l, false
	c.readers.Go(func() { l.Serve(c.readers.Go, c.answer) })
	return nil
}

// serveAgain takes the name where another process had it, and with the name the choice, if that process chose. While the name is
// not free, it has the process that has it asked, beside the loop: nobody knows how long that takes.
func (c *chooser) serveAgain() {
	if c.listener != nil {
		return
	}
	yielded := c.yields
	err := c.listen()
	switch {
	case err != nil:
		c.askHolder(err)
	case yielded:
		c.chooseAgain()
	default:
		c.log.Info("the name that another process had is free: the command uplinks asks this process from now on")
	}
}

// askHolder has the process that has the name asked whether it chooses: one question at a time, and not at each event.
func (c *chooser) askHolder(inUse error) {
	now := wire.Now()
	if c.asking || now < c.askAt {
		return
	}
	c.asking, c.askAt = true, now+c.reconcileEvery()/2
	c.log.Debug("asking who has the name of the command uplinks")
	go func() { // it ends by itself, and the end of the loop does not wait for that
		pid, is, err := uplinks.Chooser()
		c.hand(func() {
			c.log.Debug("asked who has the name of the command uplinks", "pid", pid, "chooses", is, "err", err)
			c.asking = false
			if c.listener == nil && err == nil {
				c.holderIs(pid, is, inUse)
			}
		})
	}()
}

// holderIs takes over whether the process that has the name chooses. One that could not be asked before, and chooses, keeps both.
func (c *chooser) holderIs(pid int, chooses bool, inUse error) {
	if c.yields == chooses {
		return
	}
	c.yields = chooses
	switch {
	case chooses && c.alone:
		c.fail(yielding(pid, inUse))
	case chooses:
		c.log.Warn("another process chooses the uplink of unbound traffic; this watch does not any more", "err", yielding(pid, inUse))
		for _, family := range families {
			c.of[family].table, c.of[family].placed = 0, false // what is in the kernel is of the other process
		}
	default: // the name has another process, of a user that is not trusted
		c.chooseAgain()
	}
}

func yielding(pid int, inUse error) error {
	return fmt.Errorf("process %d chooses the uplink of unbound traffic, and probes: %w", pid, inUse)
}

// chooseAgain goes on with the choice of a process that has ended.
func (c *chooser) chooseAgain() {
	c.log.Info("the process that chose the uplink of unbound traffic has ended; this one chooses from now on")
	c.loadPinned() // a user may have told the other process another wish since
	if err := c.adopt(); err != nil {
		c.log.Error("cannot read the choice", "err", err)
	}
}

// stop ends serve.
func (c *chooser) stop() {
	if c.listener != nil {
		_ = c.listener.Close() // it is open
	}
	c.ignoreNeighbours()
	for _, events := range slices.Clone(c.followers) {
		c.unfollow(events) // else who follows would keep the process
	}
}

// answer has the loop answer a request.
func (c *chooser) answer(req uplinks.Request) (a uplinks.Answer, ok bool) {
	done := make(chan uplinks.Answer, 1)
	c.hand(func() {
		var a uplinks.Answer
		if req.Use != "" {
			if err := c.use(req); err != nil {
				done <- uplinks.Answer{Report: uplinks.Report{Error: err.Error()}}
				return
			}
		}
		a.Report = c.report(wire.Now())
		if req.Follow {
			events := make(chan uplinks.Event, maxEvents)
			c.followers = append(c.followers, events)
			a.Events = events
			a.Done = func() { c.hand(func() { c.unfollow(events) }) }
		}
		done <- a
	})
	select {
	case a = <-done:
		return a, true
	case <-c.stopped:
		return a, false
	}
}

// maxEvents is how far behind a follower may be. One that is further gets no more.
const maxEvents = 64

func (c *chooser) unfollow(events chan uplinks.Event) {
	if at := slices.Index(c.followers, events); at >= 0 {
		c.followers = slices.Delete(c.followers, at, at+1)
		close(events)
	}
}

// emit tells followers what happened, and the program of on_change.
func (c *chooser) emit(e uplinks.Event) {
	e.Time = time.Now()
	c.execute(e)
	for _, events := range slices.Clone(c.followers) {
		select {
		case events <- e:
		default:
			c.unfollow(events)
		}
	}
}

// execute has the program of on_change executed for an event.
func (c *chooser) execute(e uplinks.Event) {
	subject := e.Event + " " + e.Family
	values := []onchange.Value{{Name: "EVENT", Text: e.Event}, {Name: "FAMILY", Text: e.Family}, {Name: "IFNAME", Text: e.Ifname},
		{Name: "ADDRESS", Text: e.Address}, {Name: "TABLE", Text: fmt.Sprint(e.Table)}, {Name: "REASON", Text: e.Reason}}
	if e.Event == "unbound" {
		values = append(values, onchange.Value{Name: "FROM", Text: e.From}, onchange.Value{Name: "TO", Text: e.To}, onchange.Value{Name: "GATEWAY", Text: e.Gateway})
	} else {
		subject += " " + e.Ifname + " " + e.Address
		values = append(values, onchange.Value{Name: "STATE", Text: e.State}, onchange.Value{Name: "OLD_STATE", Text: e.Old},
			onchange.Value{Name: "RTT_MS", Text: fmt.Sprint(e.RTT)}, onchange.Value{Name: "LOSS", Text: fmt.Sprint(e.Loss)})
	}
	c.program.Tell(subject, values...)
}

// emitState tells followers that the state of an uplink is another one.
func (c *chooser) emitState(p *probed, before choice.State) {
	h, u := p.health, p.session.lease.uplink
	c.emit(uplinks.Event{
		Event: "state", Ifname: u.Key.Ifname, Family: u.Key.Family.String(), Address: u.Key.Address, Table: p.session.lease.table,
		Old: before.String(), State: h.State.String(), Reason: h.Reason, RTT: millis(h.RTT), Loss: h.Loss(),
	})
}

// use takes over the wish of a user.
func (c *chooser) use(req uplinks.Request) error {
	if c.ending {
		return errors.New("the watch is ending")
	}
	of, serves := c.familiesOf(req.Use, req.Family)
	if !serves {
		return c.unused(req.Use)
	}
	wish := req.Use
	if wish == uplinks.Auto {
		wish = ""
	}
	for _, family := range of {
		c.of[family].pinned = wish
	}
	c.savePinned()
	c.log.Info("a user wants an uplink for unbound traffic", "ifname", req.Use)
	c.decide(wire.Now())
	return nil
}

// unused is why unbound traffic cannot use a link.
func (c *chooser) unused(ifname string) error {
	for _, s := range c.leases() {
		if s.lease.uplink.Key.Ifname == ifname && s.lease.uplink.NoUnbound {
			return fmt.Errorf("unbound traffic does not use %s: \"unbound\" is false for it in the configuration", ifname)
		}
	}
	return fmt.Errorf("no address of %s is in service: see table-allocator-client status", ifname)
}

// familiesOf returns the families, or the one that is asked for, in which a link has an address, and whether one of these is in
// service: the address of the other family may be about to be. All have Auto.
func (c *chooser) familiesOf(ifname string, only wire.Family) (of []int, serves bool) {
	for _, family := range families {
		has := ifname == uplinks.Auto
		serves = serves || has
		for _, s := range c.offers(family, ifname) {
			has, serves = true, serves || s.serves() && (only == wire.Unspec || int(only) == family)
		}
		if has && (only == wire.Unspec || int(only) == family) {
			of = append(of, family)
		}
	}
	return of, serves
}

// offers are the leases of a link and family that unbound traffic may use.
func (c *chooser) offers(family int, ifname string) (offers []*session) {
	for _, s := range c.leases() {
		if s.family() == family && s.lease.uplink.Key.Ifname == ifname && !s.lease.uplink.NoUnbound {
			offers = append(offers, s)
		}
	}
	return offers
}

// dropPinned ends the wish for a link that is gone.
func (c *chooser) dropPinned(now time.Duration, family int) {
	ifname := c.of[family].pinned
	if ifname == "" || len(c.offers(family, ifname)) > 0 {
		return
	}
	if now < c.grace { // its address may not be in service yet
		c.in(c.grace - now)
		return
	}
	c.log.Info("the link that a user wanted for unbound traffic has no address for that any more", "ifname", ifname, "family", wire.Family(family).String())
	c.of[family].pinned = ""
	c.savePinned()
}

// pinnedFile has the wishes of a user for the next watch.
const pinnedFile = "pinned"

// pinned is what pinnedFile has.
type pinned struct {
	Namespace uint64            `json:"namespace"` // of which the wishes are, see remember.Namespace
	Ifnames   map[string]string `json:"ifnames"`   // by family
}

func (c *chooser) savePinned() {
	namespace, err := remember.Namespace()
	if err == nil {
		var dir remember.Dir
		if dir, err = remember.Own("uplinks"); err == nil {
			err = dir.Write(pinnedFile, pinned{namespace, map[string]string{"inet": c.of[unix.AF_INET].pinned, "inet6": c.of[unix.AF_INET6].pinned}})
		}
	}
	if err != nil {
		c.log.Warn("cannot save which uplink a user wants for the next watch", "err", err)
	}
}

func (c *chooser) loadPinned() {
	namespace, err := remember.Namespace()
	var p pinned
	if err == nil {
		var dir remember.Dir
		if dir, err = remember.Own("uplinks"); err == nil {
			err = dir.Read(pinnedFile, &p)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("cannot load which uplink a user wants", "err", err)
		return
	}
	if p.Namespace != namespace {
		p.Ifnames = nil // they were left by a namespace that had the same inode number
	}
	for _, family := range families {
		c.of[family].pinned = p.Ifnames[wire.Family(family).String()]
	}
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// report says how the uplinks are.
func (c *chooser) report(now time.Duration) uplinks.Report {
	r := uplinks.Report{Probing: c.config.Probes != nil, Targets: []string{}, Kinds: []string{}, Uplinks: []uplinks.Uplink{}, Unbound: []uplinks.Choice{}}
	if p := c.config.Probes; p != nil {
		for _, t := range p.Targets {
			r.Targets = append(r.Targets, t.String())
		}
		for _, k := range p.Kinds {
			r.Kinds = append(r.Kinds, k.String())
		}
	}
	for _, s := range c.leases() {
		if p := c.uplinks[s.lease.uplink.Key]; p != nil && p.session == s {
			r.Uplinks = append(r.Uplinks, c.reportOn(now, p))
		}
	}
	for _, family := range families {
		if !c.active(family) {
			continue
		}
		of := c.of[family]
		d := of.decision
		one := uplinks.Choice{Family: wire.Family(family).String(), Table: d.Table, Why: d.Why, By: append([]string{}, of.by...), Pinned: d.Pinned, Warn: of.warning.text, Cure: of.warning.cure}
		if s := c.sessionOf(family, d.Table); s != nil {
			one.Ifname = s.lease.uplink.Key.Ifname
		}
		r.Unbound = append(r.Unbound, one)
		c.explainUnused(now, family, r.Uplinks)
	}
	return r
}

// explainUnused says why the uplinks of a family are not used.
func (c *chooser) explainUnused(now time.Duration, family int, rows []uplinks.Uplink) {
	all := c.candidates(family)
	byTable := func(table uint32) int {
		return slices.IndexFunc(all, func(o choice.Candidate) bool { return o.Table == table })
	}
	used := byTable(c.of[family].table)
	if used < 0 {
		return
	}
	for i := range rows {
		if at := byTable(rows[i].Table); at >= 0 && at != used && rows[i].Family == wire.Family(family).String() {
			rows[i].Unused = choice.Unused(now, all[at], all[used], c.of[family].decision.Pinned)
		}
	}
}

func (c *chooser) reportOn(now time.Duration, p *probed) uplinks.Uplink {
	s, h := p.session, p.health
	key := s.lease.uplink.Key
	u := uplinks.Uplink{
		Ifname: key.Ifname, Family: key.Family.String(), Address: key.Address, Table: s.lease.table, Rank: p.traits.Rank, Metered: p.traits.Metered,
		State: h.State.String(), Reason: h.Reason, Since: int64((now - h.Since) / time.Second), RTT: millis(h.RTT), Loss: h.Loss(),
		Bytes: p.bytes, Used: c.of[s.family()].table == s.lease.table, Nameservers: []string{},
	}
	if h.State == choice.Dead || h.State == choice.NoCarrier {
		u.Loss = 100
	}
	if p.plan.GatewayAlone() {
		u.Reason += "; only its gateway is asked, since nobody beyond is named"
	}
	if p.waits() && c.config.Probes != nil {
		u.Next = int64(max(p.due-now, 0) / time.Second)
	}
	for _, n := range s.lease.uplink.Settings.Nameservers {
		u.Nameservers = append(u.Nameservers, n.String())
	}
	if c.config.Probes == nil {
		return u
	}
	for _, m := range h.Hour(now) {
		one := uplinks.Minute{RTT: millis(m.RTT), Loss: m.Loss}
		if !m.Any {
			one.Loss = -1
		}
		u.Hour = append(u.Hour, one)
	}
	return u
}

// linkHaving names the link whose address has a table, or had it until it went out of service.
func (c *chooser) linkHaving(family int, table uint32) (ifname string) {
	for key, p := range c.uplinks {
		if p.table == table && table != 0 && (key.Family == wire.Inet) == (family == unix.AF_INET) && (ifname == "" || p.session != nil) {
			ifname = key.Ifname
		}
	}
	return ifname
}
