package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/walk"
)

// Packet is what Explain is asked for: a route.Question with the names of links.
type Packet struct {
	route.Question
	Iif, Oif string
}

// Explanation is why a packet leaves where it does.
type Explanation struct {
	Question Asked     `json:"question"`
	Steps    []Step    `json:"steps"`
	Second   []Step    `json:"second"` // of the lookup with the source that the kernel has chosen
	Result   Result    `json:"result"`
	Without  []Without `json:"without"`
	Reverse  *Reverse  `json:"reverse"` // null: replies do not arrive from another host, or it is IPv6
	Kernel   Kernel    `json:"kernel"`
	Warnings []string  `json:"warnings"` // what rules and routes do not say of the packet
}

// Asked is the question.
type Asked struct {
	To    string `json:"to"`
	From  string `json:"from"` // "": none
	Iif   string `json:"iif"`
	Oif   string `json:"oif"`
	Mark  uint32 `json:"mark"`
	UID   uint32 `json:"uid"`
	TOS   uint8  `json:"tos"`
	Proto uint8  `json:"proto"`
	Sport uint16 `json:"sport"`
	Dport uint16 `json:"dport"`
}

// Step is one rule.
type Step struct {
	Priority uint32 `json:"priority"`
	Place    int    `json:"place"` // in the order of the rules, from 0
	Rule     string `json:"rule"`  // as `ip rule` prints it
	Owner    string `json:"owner"` // "": the kernel
	Decides  bool   `json:"decides"`
	Why      string `json:"why"` // the lookup goes on
	Table    uint32 `json:"table"`
	Route    string `json:"route"` // that was found, as `ip route` prints it
	differs  bool   // its selector is for other packets
}

// Result is where the packet goes.
type Result struct {
	Link    string `json:"link"` // lo: to this host
	Gateway string `json:"gateway"`
	Source  string `json:"source"`
	MTU     int    `json:"mtu"`
	MTUFrom string `json:"mtu_from"` // link, route or path
	Error   string `json:"error"`    // "": it leaves
}

// Without is where the packet would go without a rule, or without main's default routes.
type Without struct {
	What  string `json:"what"`
	Link  string `json:"link"` // "": nowhere
	Error string `json:"error"`
}

// Reverse is what becomes of replies.
type Reverse struct {
	Link     string `json:"link"` // by which they arrive
	RPFilter int    `json:"rp_filter"`
	Verdict  string `json:"verdict"` // accepted, dropped, or the kernel's error
}

// Kernel is what the kernel says itself.
type Kernel struct {
	Socket   string `json:"socket"`   // what a socket gets: ok, an error, or why there was none
	GetRoute string `json:"getroute"` // what RTM_GETROUTE answers
	Agrees   bool   `json:"agrees"`
}

// Explain walks through the rules for a packet, and compares the result with what the kernel does.
func Explain(p Packet) (e Explanation, err error) {
	const tries = 3 // rules may change meanwhile
	for range tries {
		h, err := openHost()
		if err != nil {
			return e, err
		}
		e, err = h.explain(p)
		family := p.Family()
		again, rulesErr := h.kernel.Rules(family)
		same := slices.Equal(again, h.rules[family])
		h.close()
		if err != nil || rulesErr != nil {
			return e, errors.Join(err, rulesErr)
		}
		if same && e.Kernel.Agrees {
			break
		}
	}
	return e, nil
}

func (h *host) explain(p Packet) (e Explanation, err error) {
	q := p.Question
	for _, l := range []struct {
		name  string
		index *int
	}{{p.Iif, &q.Iif}, {p.Oif, &q.Oif}} {
		if l.name == "" {
			continue // a socket has the ifindex
		}
		if *l.index = h.linkNamed(l.name).Index; *l.index == 0 {
			return e, fmt.Errorf("%s: %w", l.name, ErrNoLink)
		}
	}
	if p.Oif == "" && q.Oif != 0 {
		p.Oif = h.linkName(q.Oif)
	}
	e = Explanation{Question: Asked{To: q.Dst.String(), Iif: p.Iif, Oif: p.Oif, Mark: q.Mark, UID: q.UID, TOS: q.TOS, Proto: q.IPProto, Sport: q.Sport, Dport: q.Dport},
		Steps: []Step{}, Second: []Step{}, Without: []Without{}, Warnings: []string{}}
	if q.Src.IsValid() {
		e.Question.From = q.Src.String()
	}
	err = h.fill(&e, q)
	if addr, err := netip.ParseAddr(e.Result.Source); err == nil { // else it has none
		q.Src = addr
	}
	e.Warnings = append(e.Warnings, h.warnings(e.Result, q)...)
	return e, err
}

// warnings say what becomes of a packet although it has a route.
func (h *host) warnings(r Result, q route.Question) (all []string) {
	if link := h.linkNamed(r.Link); r.Error == "" && link.Index != 0 && !link.Carrier {
		all = append(all, r.Link+" has no carrier: the packet is lost")
	}
	if gateway, err := netip.ParseAddr(r.Gateway); r.Error == "" && err == nil {
		if silent, err := h.isSilent(h.linkNamed(r.Link).Index, gateway, time.Now().Add(answer)); err == nil && silent {
			all = append(all, fmt.Sprintf("the gateway %s does not answer on %s: the packet is lost", gateway, r.Link))
		}
	}
	if p := h.policy(q, h.linkNamed(r.Link).Index); r.Error == "" && r.Link != "lo" && p != nil && p.Far.IsValid() {
		by := h.tunnel(p)
		if by == "" {
			by = "no link"
		}
		all = append(all, fmt.Sprintf("the IPsec policy %q takes the packet: the tunnel to %s leaves by %s", p, p.Far, by))
	}
	if q.IPProto != unix.IPPROTO_TCP || q.Sport != 0 {
		return all
	}
	for _, rule := range h.rules[q.Family()] {
		if rule.Sports != (route.Ports{}) && (rule.IPProto == 0 || rule.IPProto == unix.IPPROTO_TCP) {
			all = append(all, fmt.Sprintf("rule %d selects by source port: TCP chooses its port after the source, and may leave elsewhere with this source", rule.Priority))
		}
	}
	return all
}

// fill walks, asks, and compares.
func (h *host) fill(e *Explanation, q route.Question) error {
	w, err := h.world(q.Family())
	if errors.Is(err, errManyRoutes) {
		return h.fillFromKernel(e, q, err)
	}
	if err != nil {
		return err
	}
	if q.Dst.IsMulticast() || q.Dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return h.fillToMany(e, q, w)
	}
	if !askable(q.Family(), q.IPProto) || q.Iif == 0 && q.Src.IsValid() && !h.isLocal(q) {
		h.fillFromWalk(e, q, w)
		return nil
	}
	made, madeErr := connection{}, error(nil)
	if q.Iif == 0 {
		if made, madeErr = connect(q); madeErr == nil {
			q.Sport = made.sport // a socket has a port before it is connected
		}
	}
	matched, matchErr := h.kernel.Match(q)
	resolved, resolveErr := h.kernel.Resolve(q)
	if !isExit(matchErr) {
		return matchErr
	}
	chosen := made.src
	if !chosen.IsValid() && resolveErr == nil {
		chosen = resolved.Src
	}
	packet := walk.Packet{Question: q, Bound: q.Oif != 0}
	answers := []walk.Answer{w.Walk(packet)}
	if q.Iif == 0 {
		answers = w.Connect(packet, chosen)
	}
	last := answers[len(answers)-1]
	e.Steps = h.steps(answers[0], q.Family())
	if len(answers) > 1 && last.Route.Type != unix.RTN_LOCAL {
		e.Second = h.steps(last, q.Family())
		packet.Src = chosen
		resolved, resolveErr = h.kernel.Resolve(packet.Question)
	}
	e.Kernel = h.kernelSays(q, answers, matched, matchErr, made, madeErr)
	if len(answers) > 1 {
		again, againErr := h.kernel.Match(packet.Question)
		e.Kernel.Agrees = e.Kernel.Agrees && (last.Unknown != "" || q.Dst.Is6() && q.Oif != 0 || last.Agrees(again, againErr))
	}
	e.Result = h.result(q, last, resolved, resolveErr, chosen)
	if why := h.refused(q, last, matchErr); why != "" {
		e.Result, e.Kernel.Agrees = Result{Error: why}, true
	}
	if q.Iif == 0 && !isExit(made.err) {
		e.Result = Result{Error: "the kernel refuses sockets: " + errnoOf(made.err).Error() + ": " + h.refuser(packet.Question, resolved.Index)}
		return nil
	}
	e.Without = h.without(w, packet, last)
	home := h.home(e.Result, q, last)
	if link := h.linkNamed(e.Result.Link); home != 0 && home != link.Index {
		e.Warnings = append(e.Warnings, fmt.Sprintf("%s is an address of %s: unless NAT replaces it, the provider of %s may drop the packet, and replies arrive on %s",
			e.Result.Source, h.linkName(home), link.Name, h.linkName(home)))
	}
	return h.reverse(e, packet.Question, resolveErr, home)
}

// fillFromKernel is fill where there are too many routes to walk through.
func (h *host) fillFromKernel(e *Explanation, q route.Question, why error) error {
	resolved, err := h.kernel.Resolve(q)
	if !isExit(err) {
		return err
	}
	matched, matchErr := h.kernel.Match(q)
	e.Kernel = Kernel{Socket: why.Error(), GetRoute: h.answerText(matched, matchErr), Agrees: true}
	e.Result = h.result(q, walk.Answer{Route: matched, Err: errnoOf(err)}, resolved, err, resolved.Src)
	return h.reverse(e, q, err, 0)
}

// steps are the rules that were looked at.
func (h *host) steps(a walk.Answer, family int) []Step {
	tables := h.tables()
	steps := make([]Step, len(a.Steps))
	for i, s := range a.Steps {
		steps[i] = Step{Priority: s.Rule.Priority, Place: slices.Index(h.rules[family], s.Rule), Rule: ruleText(s.Rule), Owner: ruleOwner(s.Rule, tables),
			Why: s.Why, Table: s.Rule.Table, Decides: s.Why == "", differs: s.Differs}
		if s.Why == "" && a.Route.Table != 0 {
			steps[i].Route = strings.ReplaceAll(h.routeText(a.Route), fmt.Sprintf(" proto %d", a.Route.Protocol), "")
			if owner := routeOwner(a.Route, tables); owner != "" && s.Rule.Protocol != route.Protocol {
				steps[i].Route += " (" + owner + ")"
			}
		}
	}
	return steps
}

// ruleText is a rule as `ip rule` prints it, without its priority.
func ruleText(r route.Rule) string {
	_, text, _ := strings.Cut(r.String(), ": ")
	return text
}

// Hides reports whether a step is of no interest unless somebody wants all: a rule for other packets that is not ours.
func (s Step) Hides() bool { return s.differs && !strings.HasPrefix(s.Owner, "ours") }

// kernelSays compares the walk with the kernel.
func (h *host) kernelSays(q route.Question, answers []walk.Answer, matched route.Route, matchErr error, made connection, madeErr error) Kernel {
	k := Kernel{GetRoute: h.answerText(matched, matchErr), Agrees: true}
	last := answers[len(answers)-1]
	// In IPv6, RTM_GETROUTE with a device and a source asks for less than a socket does.
	if q.Dst.Is4() || q.Oif == 0 || !q.Src.IsValid() {
		k.Agrees = answers[0].Agrees(matched, matchErr)
	}
	switch {
	case q.Iif != 0:
		k.Socket = "none: the packet is forwarded"
	case madeErr != nil:
		k.Socket = "none: " + madeErr.Error()
	case !isExit(made.err): // no rule and no route refuses
		k.Socket = made.err.Error()
	case made.err != nil:
		k.Socket = made.err.Error()
		k.Agrees = k.Agrees && last.Err != 0
	default:
		k.Socket = "ok, source " + made.src.String()
		k.Agrees = k.Agrees && last.Err == 0
	}
	if last.Unknown != "" { // the walk does not know a selector: the kernel is right
		k.Agrees = true
	}
	return k
}

func (h *host) answerText(r route.Route, err error) string {
	if err != nil {
		return err.Error()
	}
	return h.routeText(r)
}

func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	errors.As(err, &errno)
	return errno
}

// result says where the packet goes.
func (h *host) result(q route.Question, last walk.Answer, resolved route.Route, resolveErr error, source netip.Addr) Result {
	if last.Err != 0 {
		r := Result{Error: last.Err.Error()}
		if rule, decided := last.Rule(); decided && last.Route.Table == 0 {
			r.Error = fmt.Sprintf("%s (rule %d)", r.Error, rule.Priority)
		} else if decided {
			r.Error = fmt.Sprintf("%s (%s)", r.Error, h.routeText(last.Route))
		}
		return r
	}
	link := h.links[resolved.Index]
	if resolveErr != nil || q.Dst.Is6() && q.Oif != 0 {
		link = h.links[q.Oif]
		if links := last.Route.Links(); len(links) > 0 {
			link = h.links[links[0]]
		}
	}
	r := Result{Link: link.Name, MTU: link.MTU, MTUFrom: "link"}
	if q.Iif != 0 {
		source = q.Src // the packet has one
	}
	if source.IsValid() {
		r.Source = source.String()
	} else if q.Src.IsValid() {
		r.Source = q.Src.String()
	}
	if resolved.Gateway.IsValid() && resolveErr == nil {
		r.Gateway = resolved.Gateway.String()
	} else if last.Route.Gateway.IsValid() {
		r.Gateway = last.Route.Gateway.String()
	}
	if mtu := last.Route.MTU(); mtu != 0 && mtu < r.MTU {
		r.MTU, r.MTUFrom = mtu, "route"
	}
	if mtu := resolved.MTU(); resolveErr == nil && mtu != 0 && mtu < r.MTU {
		r.MTU, r.MTUFrom = mtu, "path"
	}
	if last.Route.Type == unix.RTN_LOCAL {
		r.Link = "lo"
	}
	return r
}

// without says where packets go without the rule that decides, and without the default routes of main, if that is
// elsewhere.
func (h *host) without(w *walk.World, p walk.Packet, last walk.Answer) []Without {
	tables := h.tables()
	without := []Without{}
	where := func(a walk.Answer) string {
		if a.Err != 0 {
			return ""
		}
		if a.OnLink {
			return h.linkName(p.Oif)
		}
		return h.linkNames(a.Route.Links())
	}
	add := func(what string, world walk.World) {
		a := world.Walk(p)
		if where(a) == where(last) {
			return
		}
		x := Without{What: what, Link: where(a)}
		if a.Err != 0 {
			x.Error = a.Err.Error()
		}
		without = append(without, x)
	}
	for _, s := range last.Steps {
		if owner := ruleOwner(s.Rule, tables); s.Why == "" && owner != "" { // nobody deletes the kernel's rules
			fewer := *w
			fewer.Rules = slices.DeleteFunc(slices.Clone(w.Rules), func(r route.Rule) bool { return r == s.Rule })
			add(fmt.Sprintf("rule %d (%s)", s.Rule.Priority, owner), fewer)
		}
	}
	if last.Route.Table == unix.RT_TABLE_MAIN && last.Route.Dst.Bits() == 0 {
		fewer := *w
		fewer.Tables = make(map[uint32][]route.Route)
		for table, routes := range w.Tables {
			if table == unix.RT_TABLE_MAIN {
				routes = slices.DeleteFunc(slices.Clone(routes), func(r route.Route) bool { return r.Dst.Bits() == 0 })
			}
			fewer.Tables[table] = routes
		}
		add("main's default routes", fewer)
	}
	return without
}

// reverse asks whether replies are accepted, which arrive by home, or where the packet leaves if that is 0. IPv6 has no rp_filter.
func (h *host) reverse(e *Explanation, q route.Question, resolveErr error, home int) error {
	source, _ := netip.ParseAddr(e.Result.Source) // none: nothing to reply to
	if q.Iif != 0 {
		source = q.Src
	}
	if e.Result.Error != "" || !q.Dst.Is4() || e.Result.Link == "lo" || !source.IsValid() || resolveErr != nil {
		return nil
	}
	link := h.linkNamed(e.Result.Link)
	if home != 0 {
		link = h.links[home]
	}
	filter := rpFilter(link.Name)
	r := &Reverse{Link: link.Name, RPFilter: filter, Verdict: "accepted"}
	_, err := h.kernel.Match(route.Question{Dst: source, Src: q.Dst, Iif: link.Index})
	switch {
	case !isExit(err):
		return err
	case errors.Is(err, unix.EINVAL) && filter == 1:
		r.Verdict = "dropped by rp_filter"
	case err != nil:
		r.Verdict = errnoOf(err).Error()
	}
	e.Reverse = r
	return nil
}

// rpFilter is the effective value for a link.
func rpFilter(ifname string) int {
	return max(number(setting(unix.AF_INET, "all", "rp_filter")), number(setting(unix.AF_INET, ifname, "rp_filter")))
}

// refused says why the host takes no packet from a link, whatever the rules say; "": it does.
func (h *host) refused(q route.Question, last walk.Answer, err error) string {
	name := h.linkName(q.Iif)
	switch {
	case q.Iif == 0 && q.Dst.Is4() && q.Src.IsLoopback() && last.Err == 0 && errors.Is(err, unix.EINVAL):
		return "a packet from " + q.Src.String() + " does not leave this host"
	case q.Iif == 0 || last.Err != 0 || last.Route.Type == unix.RTN_LOCAL:
		return ""
	case q.Dst.Is4() && errors.Is(err, unix.EHOSTUNREACH) && setting(unix.AF_INET, name, "forwarding") == "0":
		return "this host does not forward what arrives by " + name + ": sysctl -w net.ipv4.ip_forward=1"
	case q.Dst.Is6() && setting(unix.AF_INET6, "all", "forwarding") == "0":
		return "this host does not forward: sysctl -w net.ipv6.conf.all.forwarding=1"
	case errors.Is(err, unix.EINVAL) && rpFilter(name) > 0:
		return fmt.Sprintf("dropped by rp_filter %d of %s: packets to %s do not leave there", rpFilter(name), name, q.Src)
	case errors.Is(err, unix.EINVAL):
		return "dropped: no packet may come from " + q.Src.String()
	}
	return ""
}

func number(text string) int {
	n, _ := strconv.Atoi(text) // what is not there is 0
	return n
}
