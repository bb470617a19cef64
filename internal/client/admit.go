package client

import (
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/events"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const (
	// Wait this long after an event, so that a burst of addresses costs one read of the host.
	admitIn = 20 * time.Millisecond
	// With so many new addresses the kernel's queue of events may have been full, so everything is compared again
	// afterBurst later.
	burst      = 100
	afterBurst = 5 * time.Second
	// How long an address waits after the server, or the kernel, refused it for good.
	refusedFor = 10 * time.Minute
	// How often it is looked at who has the name of a holder: a client that ended, say, and then a stranger.
	strangerEvery = 30 * time.Second
	// When another client deletes its rules it is about to end: look for its address this much later. When an address
	// goes before it gets a table, look as late for what the watch before left of it.
	afterForeign = 2 * time.Second
)

// note decides what the host has to do about events, and when. It does nothing yet, since more events may follow.
func (h *host) note(n news) {
	if n.overrun {
		h.reconcileAt, h.blind = 0, true
	}
	for addr := range n.went {
		h.clearRefusal(addr)
	}
	if n.linksChanged || n.newDefault || h.admitAt == 0 && h.unknown(n.came) { // another profile may select a link by its new name
		h.admitSoon()
	}
	h.noteRules(n.tables)
	h.choices.note(n)
}

// unknown reports whether any address has no session.
func (h *host) unknown(came map[onLink]bool) bool {
	if len(came) == 0 {
		return false
	}
	known := make(map[onLink]bool, len(h.sessions))
	for _, s := range h.sessions {
		known[onLink{s.addr, s.inst.Index}] = true
	}
	for at := range came {
		if !known[at] {
			return true
		}
	}
	return false
}

// noteRules has deleted rules restored, if they lead to tables of sessions. Rules of other tables are those of another
// client: its link is an uplink, or no longer, and if its address is the host's to serve, it may be about to end.
func (h *host) noteRules(tables map[uint32]bool) {
	if len(tables) == 0 {
		return
	}
	leased := h.tables()
	for table, lost := range tables {
		if isLeased(table) && !leased[table] {
			h.admitSoon()
		}
		switch {
		case !lost:
		case (leased[table] || !isLeased(table)) && h.healAt == 0:
			h.healAt = wire.Now()
		case len(h.foreign) > 0:
			h.reconcileAt = min(h.reconcileAt, wire.Now()+afterForeign)
		}
	}
}

// retryOne lets one refused address of each family be asked for again: the server may have been started anew, with
// another configuration.
func (h *host) retryOne() {
	h.retried = make(map[wire.Key]bool)
	for _, family := range []wire.Family{wire.Inet, wire.Inet6} {
		for key := range h.refused {
			if key.Family == family {
				h.retried[key] = true
				delete(h.refused, key)
				break
			}
		}
	}
}

// retryRefused lets all refused addresses of a family be asked for again, once the server grants a table to one.
func (h *host) retryRefused(s *session) {
	if !s.again || s.lease.state != held {
		return
	}
	s.again = false
	maps.DeleteFunc(h.refused, func(key wire.Key, _ time.Duration) bool { return key.Family == s.lease.uplink.Key.Family })
	h.admitSoon()
}

// clearRefusal lets an address that was deleted be served when it is added again.
func (h *host) clearRefusal(addr netip.Addr) {
	if len(h.ended)+len(h.refused) == 0 {
		return
	}
	text := addr.String()
	maps.DeleteFunc(h.ended, func(key wire.Key, _ bool) bool { return key.Address == text })
	maps.DeleteFunc(h.refused, func(key wire.Key, _ time.Duration) bool { return key.Address == text })
}

func (h *host) admitSoon() {
	if h.admitAt == 0 {
		h.admitAt = wire.Now() + admitIn
	}
}

// dropped removes what the host keeps of a session, and looks for its address, which may have been added again.
func (h *host) dropped(s *session) {
	h.removeOrder(s)
	h.dropSettings(s)
	h.choices.soon()
	h.cgroups.due = true
	h.replies.soon()
	switch {
	case len(s.enders) > 0:
		h.ended[s.lease.uplink.Key] = true
	case s.lease.denied && s.inst.Present && s.left == 0: // else it was deleted meanwhile, and may be there again
		h.refused[s.lease.uplink.Key] = wire.Now() + refusedFor
	}
	if s.lease.table == 0 && !s.lease.denied { // a watch that was killed may have left rules and routes of the address
		h.reconcileAt = min(h.reconcileAt, wire.Now()+afterForeign)
	}
	h.admitSoon()
	h.bequeath(s)
}

// A round is what a comparison of everything has read of the host, and holds for the rest of it.
type round struct {
	links     map[int]route.Link
	addresses []route.Address
	routes    map[int][]route.Route // of ours, by family: see ourRoutes
}

// hostAddresses are the links and addresses of the host, read once for a comparison of everything that found nothing to do.
func (h *host) hostAddresses() (map[int]route.Link, []route.Address, error) {
	if h.round != nil {
		return h.round.links, h.round.addresses, nil
	}
	return h.kernel.HostAddresses()
}

// changedSessions are the sessions whose address, link or routes differ from what is noted of them, by one read of
// the host; if events were lost, all.
func (h *host) changedSessions() []*session {
	links, addresses, err := h.hostAddresses()
	counted, routes := make(map[tableOf]int), make(map[int][]route.Route)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		some, count, readErr := h.ourRoutes(family)
		routes[family], err = some, errors.Join(err, readErr)
		maps.Copy(counted, count)
	}
	if err != nil || h.blind {
		return h.all()
	}
	there := make(map[onLink]route.Address, len(addresses))
	for _, a := range addresses {
		there[onLink{a.Addr, a.Index}] = a
	}
	changed := slices.DeleteFunc(h.all(), func(s *session) bool {
		a, ok := there[onLink{s.addr, s.inst.Index}]
		return ok && a.Created == s.created && links[s.inst.Index].Name == s.lease.uplink.Key.Ifname && a.Tentative() != s.inst.Usable && !a.DADFailed() &&
			(s.lease.state != held || s.inst.Installed && !s.inst.Stale() && counted[tableOf{s.family(), s.lease.table}] == s.inst.Routes())
	})
	if len(changed) == 0 {
		h.round = &round{links, addresses, routes}
	}
	return changed
}

// admit starts a session for each address that has none.
func (h *host) admit() {
	h.admitAt = 0
	links, addresses, err := h.uplinks()
	if err != nil {
		h.log.Error("cannot read the addresses of the host", "err", err)
		return
	}
	if err := h.readRuled(addresses); err != nil {
		h.log.Error("cannot read which links have rules", "err", err)
	}
	now := wire.Now()
	maps.DeleteFunc(h.refused, func(_ wire.Key, until time.Duration) bool { return now >= until })
	maps.DeleteFunc(h.deprecated, func(key wire.Key, _ bool) bool { return h.refused[key] == 0 })
	for _, s := range h.all() {
		if links[s.inst.Index].LeftToVRF() {
			h.feed(s, event{kind: end, why: "its link is in a VRF, which has its routes"})
		}
	}
	before := len(h.sessions)
	h.shortage.begin()
	h.meetOthers(h.admitEach(links, addresses))
	h.shortage.tell(h.log)
	if len(h.sessions)-before >= burst {
		h.reconcileAt = min(h.reconcileAt, now+afterBurst)
	}
	h.followStale()
}

// admitEach starts a session for each address that has none, and returns those that another process has the name of.
func (h *host) admitEach(links map[int]uplink.Link, addresses []route.Address) (taken []candidate) {
	sessions := make(map[wire.Key]bool, len(h.sessions))
	former := make(map[onLink]bool) // addresses that have a session, which sees to it that its link was renamed
	for _, s := range h.sessions {
		sessions[s.lease.uplink.Key], former[onLink{s.addr, s.inst.Index}] = true, true
	}
	ended := make(map[wire.Key]bool)
	for _, a := range addresses {
		link := links[a.Index]
		u, ok := h.config.Uplink(a, link.Name)
		if a.Flags&unix.IFA_F_DEPRECATED == 0 {
			h.readmit(u.Key)
		}
		switch key := u.Key; {
		case ok && !sessions[key] && h.wantsAddress(link, a) && h.noteUnservable(key):
		case !ok || sessions[key] || former[onLink{a.Addr, a.Index}] || h.refused[key] != 0 || !h.wantsAddress(link, a):
			h.noteExcluded(link)
			if ok && uplink.IsLinkLocal4(a.Addr) { // few are, where a link has thousands
				h.noteWithoutRouter(link, addresses, a)
			}
		case h.ended[key]:
			ended[key] = true
		case h.holderTaken(u, a):
			taken = append(taken, candidate{u, a})
		}
	}
	h.ended = ended
	return taken
}

// wantsAddress reports whether an address is worth a first lease, or has rules of an earlier watch, which may have moved the route by
// which its packets leave.
func (h *host) wantsAddress(link uplink.Link, a route.Address) bool {
	if !h.config.Wants(link) {
		return false
	}
	leaves, err := h.env.Picture.Leaves(a)
	if err != nil {
		h.logOf(wire.Key{Family: wire.Family(a.Family()), Ifname: link.Name, Address: a.Addr.String()}).Error("cannot read by what route packets leave", "err", err)
	}
	return leaves || h.ruled[a.Addr]
}

// readmit has an address asked for that gave its table because it was deprecated.
func (h *host) readmit(key wire.Key) {
	if h.deprecated[key] {
		delete(h.deprecated, key)
		delete(h.refused, key)
	}
}

// uplinks are the links and addresses of the host. Those of links that main has a default route over, or had before it
// was moved, come first, and of these those that are not deprecated, in case that there are not tables enough.
func (h *host) uplinks() (map[int]uplink.Link, []route.Address, error) {
	links, addresses, err := h.hostAddresses()
	if err != nil {
		return nil, nil, err
	}
	h.nameLinks(links)
	defaults, err := h.env.Picture.Defaults()
	if err != nil {
		return nil, nil, err
	}
	for _, s := range h.sessions {
		if s.inst.Moved() {
			defaults[s.inst.Index] = true
		}
	}
	maps.Copy(defaults, h.moved)
	rank := func(a route.Address) (n int) {
		if !defaults[a.Index] {
			n = 2
		}
		return n + int(a.Flags/unix.IFA_F_DEPRECATED&1)
	}
	slices.SortStableFunc(addresses, func(a, b route.Address) int { return rank(a) - rank(b) })
	return uplink.Links(links, defaults), addresses, nil
}

// noteUnservable reports whether the server refuses the name of a link, and says so once.
func (h *host) noteUnservable(key wire.Key) bool {
	_, err := key.Canonical()
	if err != nil && !h.excluded[key.Ifname] {
		h.excluded[key.Ifname] = true
		h.log.Warn("a link of this name cannot be served: rename it", "ifname", key.Ifname, "err", err)
	}
	return err != nil
}

// noteExcluded says once of a link that looks like an uplink that the configuration leaves it alone.
func (h *host) noteExcluded(link uplink.Link) {
	if !link.Default || !h.config.Excludes(link.Name) || h.excluded[link.Name] || link.Name == uplink.Loopback {
		return
	}
	h.excluded[link.Name] = true
	h.log.Warn("the configuration excludes a link that main has a default route over: its addresses are not served", "ifname", link.Name)
	h.events.Append(events.Event{What: events.Excluded, Ifname: link.Name, Text: "main has a default route over this link, and the configuration excludes it"})
}

// noteWithoutRouter says once of a link that its link-local address of IPv4 is not served, though main has a default route over it.
func (h *host) noteWithoutRouter(link uplink.Link, addresses []route.Address, a route.Address) {
	if h.excluded[link.Name] || !h.config.Wants(link) || !h.env.Picture.WithoutRouter(addresses, a) {
		return
	}
	h.excluded[link.Name] = true
	h.log.Warn("not served: "+uplink.NoRouter, "ifname", link.Name, "addr", a.Addr.String())
}

// routed reports whether main has routes over the link of an address.
func (h *host) routed(s *session) bool {
	routed, err := h.env.Picture.HasRoutes(s.family(), s.inst.Index)
	s.warn("read the routes", err)
	return routed
}

// followStale carries over what changed with the links that are uplinks: tables have routes over the other ones.
func (h *host) followStale() {
	h.env.Picture.Invalidate()
	for _, s := range h.sessions {
		if s.lease.state == held && s.inst.Installed && s.lease.uplink.Settings.PlacesRoutes() && s.inst.Stale() {
			s.follow()
		}
	}
}

func (h *host) wants(l uplink.Link) bool { return h.config.Serves(l) }

// servesLink reports whether a link has an address in service, of this process or of another one.
func (h *host) servesLink(index int) bool {
	return h.leased[index] || slices.ContainsFunc(h.sessions, func(s *session) bool { return s.inst.Index == index })
}

// readRuled notes the addresses with a rule of ours to a table, whatever process added it, and their links.
func (h *host) readRuled(addresses []route.Address) error {
	rules, err := h.sourceRules()
	if err != nil {
		return err
	}
	ruled := make(map[netip.Addr]bool)
	for _, r := range rules {
		ruled[r.Src.Addr()] = true
	}
	h.ruled, h.leased = ruled, make(map[int]bool)
	for _, a := range addresses {
		if ruled[a.Addr] {
			h.leased[a.Index] = true
		}
	}
	return nil
}

// candidate is an address that the watch is to serve.
type candidate struct {
	uplink.Uplink
	address route.Address
}

// holderTaken starts a session, or reports that another process has the name of the holder.
func (h *host) holderTaken(u uplink.Uplink, a route.Address) bool {
	conn, err := h.open(u.Key, peer.AsHolder)
	switch {
	case err == nil:
		h.startSession(u, a, conn)
	case errors.Is(err, errFull):
		h.shortage.left++
	case errors.Is(err, syscall.EADDRINUSE):
		return true
	default:
		h.logOf(u.Key).Error("cannot hold an address", "err", err)
	}
	return false
}

// meetOthers leaves addresses to other clients of ours, and serves those whose holder's name a stranger has.
func (h *host) meetOthers(taken []candidate) {
	now, foreign := wire.Now(), make(map[wire.Key]time.Duration)
	var unknown []wire.Key
	for _, c := range taken {
		if at, known := h.foreign[c.Key]; known && now < at+strangerEvery {
			foreign[c.Key] = at
		} else {
			unknown = append(unknown, c.Key)
		}
	}
	var occupants map[wire.Key]peer.Occupant
	if len(unknown) > 0 {
		var err error
		if occupants, err = peer.Occupants(unknown); err != nil {
			h.log.Error("cannot find out who serves an address", "err", err)
		}
	}
	for _, c := range taken {
		_, known := h.foreign[c.Key]
		occupant := occupants[c.Key]
		switch {
		case occupant.Stranger:
			h.standIn(c, occupant.Owner)
		case foreign[c.Key] == 0:
			foreign[c.Key] = now
			if !known {
				h.logOf(c.Key).Info("another client serves this address", "holder", occupant.String())
			}
		}
	}
	h.foreign = foreign
}

// standIn serves an address from another name than that of its holder.
func (h *host) standIn(c candidate, owner wire.Owner) {
	log := h.logOf(c.Key)
	conn, err := h.open(c.Key, peer.AsStandIn)
	switch {
	case errors.Is(err, errFull):
		h.shortage.left++
		return
	case err != nil:
		log.Error("cannot hold an address", "err", err)
		return
	}
	log.Warn("a process that is not trusted has the holder's name of this address; serving the address from another name", "owner", owner.String())
	h.startSession(c.Uplink, c.address, conn)
}

func (h *host) logOf(key wire.Key) *slog.Logger {
	return h.log.With("ifname", key.Ifname, "addr", key.Address, "family", key.Family.String())
}

// startSession starts the session of an address, at the socket of its holder.
func (h *host) startSession(u uplink.Uplink, a route.Address, conn *wire.Conn) {
	log := h.logOf(u.Key)
	u, saved := h.loadSettings(u, a, log)
	s := h.add(newMachine(u, false, true), conn)
	s.inst.Index, s.inst.Present, s.inst.Usable, s.created = a.Index, true, !a.Tentative(), a.Created
	s.deprecated = a.Flags&unix.IFA_F_DEPRECATED != 0
	s.again, s.hooked, s.saved = h.retried[u.Key], saved != remembered{}, saved
	s.inst.AdoptServers()
	h.feed(s, event{kind: start})
	h.feed(s, event{kind: addressSeen})
}
