package client

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/table-allocator/table-allocator/internal/choice"
	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/install"
	"github.com/table-allocator/table-allocator/internal/onchange"
	"github.com/table-allocator/table-allocator/internal/probe"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/uplinks"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	// Wait this long after an event, as for new addresses.
	decideIn = 20 * time.Millisecond
	// What another program deleted is restored this much later, and at this rate if it goes on.
	restoreIn    = 250 * time.Millisecond
	restoreEvery = 5 * time.Second
	restoreBurst = 10
	// For this long after the start a choice stays whose address has no session yet.
	startGrace = 10 * time.Second
	// maxRounds bounds the rounds at one time.
	maxRounds = 64
	// A round that ends this much later than it may says nothing: the process was stopped.
	lateAfter = 2 * time.Second
)

var families = []int{unix.AF_INET, unix.AF_INET6}

// chooser keeps unbound traffic on an uplink that works. Without "probe" in the configuration, and without the wish of a
// user, it does nothing, and the host is as without it. Rounds of probes run beside the loop and hand in their results.
type chooser struct {
	*host
	numbers  choice.Numbers // of the configuration
	uplinks  map[wire.Key]*probed
	of       map[int]*chosen // the choice of each family
	failure  string          // the last one in the log, until the choice is placed
	failing  time.Duration   // since when it cannot be placed; 0: it can
	decideAt time.Duration   // when the choice is made next; 0: nothing calls for that
	armed    time.Duration   // when runDue is to run at the latest; 0: nothing is due
	restored time.Duration   // not before then is restored what others delete
	grace    time.Duration   // until when a choice is waited for that was adopted
	running  int             // rounds
	restores *rate.Limiter

	alone  bool          // no watch: all addresses are served by other clients
	yields bool          // another process has the name, and chooses
	asking bool          // that process is asked whether it does
	askAt  time.Duration // not before then is it asked again
	others []*session    // what other clients serve, as of the last look; the older leases first

	followers []chan uplinks.Event
	program   *onchange.Runner
	listener  *uplinks.Listener // nil: another process has the name

	neighbours *route.Watcher // of those that answer no more; nil: nothing is probed
}

// chosen is the choice of a family.
type chosen struct {
	table    uint32 // that unbound traffic uses; 0: none is chosen
	pinned   string // the link that a user wants; "": any
	decision choice.Decision
	adopted  bool           // it is of the watch before, and its address may not be in service yet
	unsaid   *uplinks.Event // what followers hear of it once the kernel has it; nil: they have

	placed  bool // something of it may be in the kernel
	wanted  install.Choice
	by      []string // "rule", "main"
	warning obstacle // what stands against it
	warned  obstacle // the last one in the log
}

// probed is one address, whether it is in service or will be again.
type probed struct {
	session *session // nil: it is not in service
	table   uint32   // as of when it was, and the rule that keeps its address from other uplinks
	block   route.Rule
	health  *choice.Health
	habit   probe.Habit
	plan    probe.Plan
	traits  uplink.Traits
	leads   install.Default // of its table, as of the last turn of the loop
	due     time.Duration
	began   time.Duration // when the last round did
	busy    bool          // a round runs
	doubted bool          // the kernel has found its gateway silent since
	unable  string        // why rounds cannot ask; they go on, since that may change
	bytes   uint64
	left    time.Duration // when it went out of service
	dark    bool          // its link had no carrier, or was gone, when that was read last
}

func newChooser(h *host) *chooser {
	c := &chooser{
		host: h, uplinks: make(map[wire.Key]*probed), of: map[int]*chosen{unix.AF_INET: {}, unix.AF_INET6: {}},
		grace: wire.Now() + startGrace, restores: rate.NewLimiter(rate.Every(restoreEvery), restoreBurst), program: onchange.NewRunner(h.log),
	}
	c.configure()
	c.loadPinned()
	return c
}

// configure takes over the configuration.
func (c *chooser) configure() {
	c.numbers = choice.Default()
	c.followNeighbours()
	program := ""
	if p := c.config.Probes; p != nil {
		c.numbers, program = p.Numbers, p.OnChange
	}
	if err := c.program.Set(program); err != nil {
		c.log.Error("the program of on_change is not executed as it is: root alone must be able to write it and to replace it", "program", program, "err", err)
	}
}

// adopt reads the choice of the watch before.
func (c *chooser) adopt() error {
	if c.yields { // what is there is of the process that chooses
		return nil
	}
	for _, family := range families {
		rules, err := c.kernel.RulesWhere(family, func(r *route.Rule) bool { return uplink.IsChoice(*r) })
		if err != nil {
			return err
		}
		for _, r := range rules {
			c.of[family].table, c.of[family].adopted = r.Table, true
		}
		c.of[family].placed = true // a route in main is looked for
	}
	if !c.anyActive() {
		c.decide(wire.Now()) // which removes what is left of a choice
	}
	c.soon()
	return nil
}

// active reports whether anything is chosen for a family, here.
func (c *chooser) active(family int) bool {
	return !c.yields && (c.config.Probes != nil || c.of[family].pinned != "")
}

func (c *chooser) anyActive() bool {
	return c.active(unix.AF_INET) || c.active(unix.AF_INET6)
}

// soon has the choice made again. Where nothing is chosen, that costs nothing.
func (c *chooser) soon() {
	if c.anyActive() || c.of[unix.AF_INET].placed || c.of[unix.AF_INET6].placed {
		c.in(decideIn)
	}
}

func (c *chooser) in(pause time.Duration) {
	if at := wire.Now() + pause; c.decideAt == 0 || at < c.decideAt {
		c.decideAt = at
	}
}

// note hears of events.
func (c *chooser) note(n news) {
	if !c.anyActive() {
		return
	}
	for _, family := range families {
		own, forwarded := n.rules[ruleAt{family, uplink.ChoicePriority}], n.rules[ruleAt{family, uplink.ChoicePriority + 1}]
		if own || forwarded || n.choice[family] || n.others[family] {
			c.in(restoreIn)
		}
	}
	if c.sees() && (len(n.tables)+len(n.lost)+len(n.filled) > 0) { // of an address that another client serves
		c.in(restoreIn)
	}
	// Other routes of main change no choice: a host with a routing daemon has a thousand changes of these a second.
	if n.overrun || n.nexthops || len(n.links)+len(n.addresses)+len(n.gone) > 0 || len(n.defaults) > 0 {
		c.soon()
	}
}

// next is when runDue has something to do.
func (c *chooser) next(now time.Duration) time.Duration {
	c.armed = c.decideAt
	if c.config.Probes != nil {
		for _, p := range c.uplinks {
			if p.waits() && c.hasRoom(p) {
				c.armed = earliest(c.armed, max(p.due, 1))
			}
		}
	}
	if c.armed != 0 {
		c.armed = max(c.armed, now) // a round may have waited for others to end
	}
	return c.armed
}

// noteStill prolongs the holds of uplinks by the time that this process stood still, in which nobody asked whether they work.
func (c *chooser) noteStill(now time.Duration) {
	still := now - c.armed
	if c.armed == 0 || still <= lateAfter {
		return
	}
	for _, p := range c.uplinks {
		p.health.Still(c.armed, still)
	}
}

// hasRoom reports whether a round may begin now. That of an uplink in use does not wait for those of hundreds that are dead.
func (c *chooser) hasRoom(p *probed) bool { return c.running < maxRounds || c.role(p).InUse }

// waits reports whether a round is to come.
func (p *probed) waits() bool {
	off := p.health.State == choice.Off && p.unable == ""
	return p.session != nil && !p.busy && !off && p.health.State != choice.NoCarrier
}

func (c *chooser) runDue(now time.Duration) {
	c.noteStill(now)
	if c.tablesChanged() {
		c.in(decideIn)
	}
	if c.decideAt != 0 && now >= c.decideAt {
		c.decide(now)
	}
	if c.config.Probes == nil {
		return
	}
	for key, p := range c.uplinks {
		if p.waits() && now >= p.due && c.hasRoom(p) {
			c.startRound(now, key, p)
		}
	}
}

// tablesChanged reports whether a table has got or lost its default route, or is filled now: no event of main says when.
func (c *chooser) tablesChanged() (changed bool) {
	for _, p := range c.uplinks {
		if p.session == nil {
			continue
		}
		now := p.session.inst.Default()
		changed = changed || now != p.leads
		p.leads = now
	}
	return changed
}

// startRound starts a round beside the loop.
func (c *chooser) startRound(now time.Duration, key wire.Key, p *probed) {
	suspect := p.doubted || p.health.Suspect()
	p.busy, p.doubted, p.began = true, false, now
	c.running++
	t := probe.Task{
		Uplink: c.probeUplink(p.session), Plan: p.plan, Habit: p.habit, Suspect: suspect,
		Portal: p.health.AsksPortal(now), Timeout: p.health.Timeout(),
	}
	of := p.session
	c.readers.Go(func() {
		r, ok := runRound(t, c.stopped)
		if ok {
			c.hand(func() { c.finishRound(key, of, now, t.Timeout, r) })
		}
	})
}

func (c *chooser) probeUplink(s *session) probe.Uplink {
	return probe.Uplink{Ifname: s.lease.uplink.Key.Ifname, Address: s.addr, Nameservers: s.lease.uplink.Settings.Nameservers, Gateway: s.inst.Default().Gateway}
}

// finishRound takes over a round that began at a time, of a session that may have ended since.
func (c *chooser) finishRound(key wire.Key, of *session, began, timeout time.Duration, r probe.Result) {
	c.running--
	p := c.uplinks[key]
	if p == nil {
		return
	}
	now := wire.Now()
	p.busy = false
	p.bytes += uint64(r.Bytes)
	p.due = now
	if p.session != of || c.config.Probes == nil {
		return
	}
	if now-began <= timeout+lateAfter {
		p.habit = r.Habit
		c.judge(now, p, r)
	}
	p.due = max(now, began+p.health.Pause(now, c.role(p), rand.Float64()))
	if p.doubted {
		c.doubt(now, p)
	}
}

// judge takes over what a round brought. Where nothing could be asked, that says nothing of the uplink.
func (c *chooser) judge(now time.Duration, p *probed, r probe.Result) {
	before := p.health.State
	unable := ""
	switch {
	case errors.Is(r.Silent, probe.ErrUnable):
		unable = r.Silent.Error()
	case r.Silent != nil:
		return
	}
	if unable != p.unable {
		p.unable = unable
		p.health.SetOff(now, c.off(p))
	}
	if r.Silent == nil {
		p.health.Round(now, r.Round)
	}
	if p.health.State != before {
		c.changed(p, before)
		c.decideAt = now
	}
}

// off is why an uplink is not probed; "": it is. One that did not work stays so until it can be asked again.
func (c *chooser) off(p *probed) string {
	switch {
	case c.config.Probes == nil || p.traits.NoProbe:
		return "not probed"
	case !p.plan.Asks():
		return `not probed, since neither "targets" nor its network name anybody to ask, and its default route has no gateway`
	case p.unable != "" && p.health.State.Works(), p.unable != "" && p.health.State == choice.Unknown:
		return "not probed: " + p.unable
	}
	return ""
}

// askSooner has the uplink that was chosen asked as often as one in use: by then its next round was one of a standby, which
// may be a minute away.
func (c *chooser) askSooner(now time.Duration, family int) {
	for _, p := range c.uplinks {
		if p.session != nil && p.session.family() == family && c.role(p).InUse {
			p.due = min(p.due, now+p.health.Pause(now, c.role(p), rand.Float64()))
		}
	}
}

func (c *chooser) role(p *probed) choice.Role {
	return choice.Role{InUse: p.session.lease.table == c.of[p.session.family()].table, Metered: p.traits.Metered}
}

// gather makes the set of uplinks that of the addresses in service.
func (c *chooser) gather(now time.Duration) error {
	carrier, err := c.carriers()
	if err != nil {
		return err
	}
	if err := c.see(); err != nil {
		return err
	}
	serving := make(map[*session]bool)
	for _, s := range c.leases() {
		if s.lease.uplink.IsAddress() && !s.lease.uplink.NoUnbound && s.serves() {
			serving[s] = true
			c.enlist(now, s, carrier[s.inst.Index])
		}
	}
	c.retire(now, serving, carrier)
	return nil
}

// carriers tells which links have a carrier.
func (c *chooser) carriers() (map[int]bool, error) {
	links, err := c.kernel.Links()
	carrier := make(map[int]bool, len(links))
	for _, l := range links {
		carrier[l.Index] = l.Carrier
	}
	return carrier, err
}

// retire notes which uplinks are out of service, and forgets those that have been so for long.
func (c *chooser) retire(now time.Duration, serving map[*session]bool, carrier map[int]bool) {
	for key, p := range c.uplinks {
		switch {
		case p.session != nil && !serving[p.session]:
			c.leaves(now, p, carrier[p.session.inst.Index])
			p.session, p.left = nil, now
		case p.session == nil && !p.busy && now-p.left > c.numbers.Forget:
			delete(c.uplinks, key)
		}
	}
}

// leaves notes that an address is out of service, since its link has no carrier or for another reason.
func (c *chooser) leaves(now time.Duration, p *probed, carrier bool) {
	p.dark = !carrier
	if p.dark {
		c.observe(now, p, false)
	} else if before := p.health.State; p.health.Leave(now) {
		c.changed(p, before)
	}
}

// enlist takes an address in service for an uplink, whose link has a carrier or not.
func (c *chooser) enlist(now time.Duration, s *session, carrier bool) {
	key := s.lease.uplink.Key
	p := c.uplinks[key]
	if p == nil {
		p = &probed{health: choice.NewHealth(&c.numbers, now)}
		c.uplinks[key] = p
		if of := c.of[s.family()]; of.adopted && s.lease.table != of.table {
			p.health.Hold(now) // the watch before had a reason to use another one
		}
	}
	if p.session != s {
		p.session = s
		p.due = now + time.Duration(rand.Float64()*float64(c.numbers.Suspect))
	}
	p.table, p.block = s.lease.table, s.lease.uplink.Block()
	p.traits = c.config.Traits(key.Ifname, key.Family)
	p.dark = !carrier
	c.observe(now, p, carrier)
}

// observe notes the carrier of an uplink, and whether it is probed.
func (c *chooser) observe(now time.Duration, p *probed, carrier bool) {
	before := p.health.State
	p.plan = probe.Plan{}
	if c.config.Probes != nil && !p.traits.NoProbe {
		p.plan = c.config.Probes.Of(c.probeUplink(p.session))
	}
	if !p.plan.Asks() {
		p.unable = ""
	}
	changed := p.health.Carrier(now, carrier)
	if p.plan.Page == nil {
		changed = p.health.ForgetPortal(now) || changed
	}
	if p.health.SetOff(now, c.off(p)) || changed {
		p.due = now
		c.changed(p, before)
	}
}

// changed says that the state of an uplink is another one.
func (c *chooser) changed(p *probed, before choice.State) {
	h := p.health
	if h.State == before || c.config.Probes == nil {
		return
	}
	what := events.UplinkAlive
	if h.State == choice.Dead || h.State == choice.Portal || h.State == choice.NoCarrier {
		what = events.UplinkDead
	}
	c.tell(p.session, what, fmt.Sprintf("uplink is %s, before %s: %s", h.State, before, h.Reason))
	c.emitState(p, before)
}

// decide makes the choice, and the kernel what it means.
func (c *chooser) decide(now time.Duration) {
	c.decideAt = 0
	if c.alone { // a watch does so when it compares everything
		c.serveAgain()
	}
	if c.anyActive() {
		if err := c.gather(now); err != nil {
			c.log.Error("cannot read the links", "err", err)
			c.in(lookAgain)
			return
		}
	} else {
		clear(c.uplinks)
	}
	var errs []error
	for _, family := range families {
		errs = append(errs, c.decideFamily(now, family))
	}
	if c.alone {
		c.in(c.reconcileEvery()) // in case that an event was lost
	}
	c.noteFailure(now, errors.Join(errs...))
}
