package inspect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Check looks for one thing that is wrong with a host.
type Check struct {
	Name     string   `json:"name"`
	Severity Severity `json:"severity"`
	look     func(*patient) []symptom
	Sends    bool `json:"sends"` // packets, so it runs only if it is named
}

// symptom is a Finding without what its Check knows.
type symptom struct{ what, evidence, cure string }

// Checks are those of doctor. Names and severities never change, since scripts know them.
var Checks = []Check{
	{Name: "server-stopped", Severity: Error, look: lookServer},
	{Name: "hook-without-server", Severity: Error, look: lookHooks},
	{Name: "main-default-back", Severity: Error, look: lookMainDefault},
	{Name: "table-empty", Severity: Error, look: lookTableEmpty},
	{Name: "table-gateway", Severity: Error, look: lookTableGateway},
	{Name: "rule-missing", Severity: Error, look: lookRuleMissing},
	{Name: "rp-filter", Severity: Error, look: lookRPFilter},
	{Name: "networkd-dropin", Severity: Error, look: lookNetworkd},
	{Name: "dad", Severity: Error, look: lookDAD},
	{Name: "accept-ra", Severity: Error, look: lookAcceptRA},
	{Name: "excluded", Severity: Error, look: lookExcluded},
	{Name: "no-lease", Severity: Error, look: lookNoLease},
	{Name: "namespaces", Severity: Error, look: lookNamespaces},
	{Name: "bridge-port", Severity: Error, look: lookPorts},
	{Name: "table-local", Severity: Error, look: lookLocal},
	{Name: "gateway-silent", Severity: Warning, look: lookGateways},
	{Name: "filter", Severity: Warning, look: lookFilter},
	{Name: "rule-before-ours", Severity: Warning, look: lookRuleBefore},
	{Name: "rule-main", Severity: Warning, look: lookRuleMain},
	{Name: "rule-in-front", Severity: Warning, look: lookInFront},
	{Name: "lock-missing", Severity: Warning, look: lookLock},
	{Name: "overlap", Severity: Warning, look: lookOverlap},
	{Name: "arp-flux", Severity: Warning, look: lookARPFlux},
	{Name: "table-shared", Severity: Warning, look: lookTableShared},
	{Name: "rule-orphan", Severity: Warning, look: lookRuleOrphan},
	{Name: "rule-uid0", Severity: Warning, look: lookRuleUID0},
	{Name: "rule-sport", Severity: Warning, look: lookRuleSport},
	{Name: "carrier", Severity: Warning, look: lookCarrier},
	{Name: "duplicate", Severity: Warning, look: lookDuplicate},
	{Name: "snat-fixed", Severity: Warning, look: lookSNAT},
	{Name: "marks", Severity: Warning, look: lookMarks},
	{Name: "leases", Severity: Warning, look: lookHolders},
	{Name: "rules-many", Severity: Warning, look: lookRulesMany},
	{Name: "uplink-dead", Severity: Warning, look: lookUplinkDead},
	{Name: "mark-nowhere", Severity: Warning, look: lookMarkNowhere},
	{Name: "choice-shadowed", Severity: Warning, look: lookShadowed},
	{Name: "main-default-kept", Severity: Note, look: lookMainKept},
	{Name: "choice-unprobed", Severity: Note, look: lookUnprobed},
	{Name: "probes", Severity: Note, look: lookProbes},
	{Name: "rp-filter-forward", Severity: Warning, look: lookRPForward},
	{Name: "forward", Severity: Warning, look: lookForward},
	{Name: "dns", Severity: Warning, look: lookDNS},
	{Name: "delegated-prefix", Severity: Warning, look: lookDelegated},
	{Name: "same-subnet", Severity: Note, look: lookSameSubnet},
	{Name: "rule-detached", Severity: Note, look: lookRuleDetached},
	{Name: "table-name", Severity: Note, look: lookTableNames},
	{Name: "src-valid-mark", Severity: Note, look: lookSrcValidMark},
	{Name: "udp-any", Severity: Note, look: lookUDP},
	{Name: "ifupdown2", Severity: Note, look: lookIfupdown2},
	{Name: "unbound-shadowed", Severity: Note, look: lookUnboundShadowed},
	{Name: "published-port", Severity: Note, look: lookPublished},
	{Name: "device-bound-guard", Severity: Note, look: lookGuards},
	{Name: "mptcp-endpoints", Severity: Note, look: lookMPTCP},
	{Name: "program-32bit", Severity: Note, look: lookPrograms},
	{Name: "left-out", Severity: Note, look: lookLeftOut},
	{Name: "namespace-unsure", Severity: Note, look: lookUnsure},
	{Name: "pool", Severity: Warning, look: lookPool},
	{Name: "database", Severity: Error, look: lookDatabase},
	{Name: "conntrack-zones", Severity: Note, look: lookZones},
	{Name: "kernel-features", Severity: Note, look: lookFeatures},
	{Name: "mtu", Severity: Warning, look: lookMTU, Sends: true},
}

// patient is the host that is looked at.
type patient struct {
	*host
	report Report
	leases []lease
	tables map[uint32]string // links of leased tables

	question  Question
	nftables  []chain                    // nil: not listed yet
	healths   map[wire.Family]wire.Reply // of the server; nil: not asked yet
	healthErr error
	unseen    error // why the check at hand could not look
}

// lease is an address that has one.
type lease struct {
	Row
	addr   netip.Addr
	at     route.Address // zero: the address is not on the host
	link   route.Link
	family int
}

// Diagnosis is what doctor says.
type Diagnosis struct {
	Version  int       `json:"version"`
	Fine     int       `json:"fine"` // checks that found nothing
	Findings []Finding `json:"findings"`
	Unseen   []Unseen  `json:"unseen"`
	Silent   []string  `json:"-"` // names of the checks that found nothing
}

// Unseen is a check that could not look.
type Unseen struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Code is the exit code: 0, 1 for warnings, 3 for errors.
func (d Diagnosis) Code() int {
	code := 0
	for _, f := range d.Findings {
		switch f.Severity {
		case Error:
			return 3
		case Warning:
			code = 1
		}
	}
	return code
}

// Doctor runs the checks of names, or all of them that send nothing if there are none. It changes nothing.
func Doctor(ctx context.Context, q Question, names []string) (Diagnosis, error) {
	d := Diagnosis{Version: 1, Findings: []Finding{}, Unseen: []Unseen{}}
	for _, name := range names {
		if !slices.ContainsFunc(Checks, func(c Check) bool { return c.Name == name }) {
			return d, fmt.Errorf("%s: %w", name, ErrNoCheck)
		}
	}
	if q.Namespaces != nil {
		q.Namespaces = sync.OnceValue(q.Namespaces) // checks ask, too
	}
	report, err := Status(ctx, q)
	if err != nil {
		return d, err
	}
	p, err := newPatient(q, report)
	if err != nil {
		return d, err
	}
	defer func() { p.close() }()
	for _, c := range Checks {
		if len(names) == 0 && c.Sends || len(names) > 0 && !slices.Contains(names, c.Name) {
			continue
		}
		found, unseen := c.within(lookLimit, p)
		if errors.Is(unseen, outside.ErrSilent) {
			next, err := newPatient(q, report) // the check may still look at the one before
			if err != nil {
				return d, err
			}
			p = next
		}
		switch {
		case len(found) > 0:
		case unseen != nil:
			d.Unseen = append(d.Unseen, Unseen{c.Name, unseen.Error()})
		default:
			d.Fine++
			d.Silent = append(d.Silent, c.Name)
		}
		for _, s := range found {
			d.Findings = append(d.Findings, Finding{c.Name, c.Severity, s.what, s.evidence, s.cure})
		}
	}
	sortFindings(d.Findings)
	return d, nil
}

// newPatient reads the host. The caller closes it.
func newPatient(q Question, report Report) (*patient, error) {
	h, err := openHost()
	if err != nil {
		return nil, err
	}
	q.Selection.Others = uplink.OthersOf(h.links)
	p := &patient{host: h, report: report, tables: h.tables(), question: q}
	for _, row := range report.Uplinks {
		addr, _ := netip.ParseAddr(row.Address) // uplinks are addresses
		at, _ := h.address(row.Ifname, addr)
		if row.Table != 0 {
			p.leases = append(p.leases, lease{row, addr, at, h.linkNamed(row.Ifname), familyOf(addr)})
		}
	}
	return p, nil
}

// lookLimit is how long a check may take: a file system, a name service or a command may never answer. A busy machine needs
// more than a second for some.
const lookLimit = 5 * time.Second

// within runs a check, and says why it could not look. With outside.ErrSilent it still looks at p, which nobody may use then.
func (c Check) within(limit time.Duration, p *patient) (found []symptom, unseen error) {
	p.unseen = nil
	if c.Sends {
		found = c.look(p) // it waits for other hosts, as the caller wants
		return found, p.unseen
	}
	return outside.Ask(c.Name, limit, func() ([]symptom, error) {
		found := c.look(p)
		return found, p.unseen
	})
}

// ErrNoCheck says that no check has a name.
var ErrNoCheck = fmt.Errorf("no check has this name")

// foreign are the rules of other programs of a family: neither ours nor the kernel's.
func (h *host) foreign(family int) (rules []route.Rule) {
	for _, r := range h.rules[family] {
		if r.Protocol != route.Protocol && ruleOwner(r, nil) != "" {
			rules = append(rules, r)
		}
	}
	return rules
}

// routes are those of a table, or none if it cannot be read or has very many.
func (p *patient) routes(family int, table uint32) []route.Route {
	routes, _, err := p.kernel.RoutesAtMost(family, table, mostRoutes)
	if err != nil {
		return nil
	}
	return routes
}

// symptom is a finding of status about an address.
func (r Row) symptom(f Finding) symptom {
	if r.Since != 0 {
		f.Evidence += time.Unix(r.Since, 0).Format(", since 2006-01-02 15:04:05")
	}
	return symptom{r.Address + " on " + r.Ifname + ": " + f.What, f.Evidence, f.Cure}
}

// found are the findings of status with one of some names, as symptoms.
func (p *patient) found(names ...string) (all []symptom) {
	for _, row := range p.report.Uplinks {
		for _, f := range row.Findings {
			if slices.Contains(names, f.Name) {
				all = append(all, row.symptom(f))
			}
		}
	}
	return all
}

func lookServer(p *patient) []symptom {
	if f := p.report.Server.finding(""); f != nil && len(p.report.Uplinks)+len(p.report.Others) > 0 &&
		slices.ContainsFunc(slices.Concat(p.report.Uplinks, p.report.Others), func(r Row) bool { return r.PID != 0 }) {
		return []symptom{{"the server is stopped, and leases end", f.Evidence, f.Cure}}
	}
	return nil
}

func lookTableEmpty(p *patient) (all []symptom) {
	for _, l := range p.leases {
		for _, f := range l.Findings {
			if f.Name == "no-route" || f.Name == "blocked" {
				all = append(all, l.symptom(f))
			}
		}
	}
	return all
}

func lookRuleMissing(p *patient) (all []symptom) {
	for _, s := range p.found("incomplete") {
		if kind := leadingWord(s.evidence); kind == "rule" || kind == "route" || kind == "rules," {
			all = append(all, s)
		}
	}
	return all
}

func leadingWord(text string) string {
	word := ""
	_, _ = fmt.Sscan(text, &word) // of an empty text there is none
	return word
}

// lookNamespaces asks the caller, who knows the network namespaces on uplinks.
func lookNamespaces(p *patient) (all []symptom) {
	if p.question.Namespaces == nil {
		return nil
	}
	for _, n := range p.question.Namespaces() {
		if n.Missing != "" {
			all = append(all, symptom{fmt.Sprintf("the network namespace %s on %s misses %s", n.Name, n.Ifname, n.Missing), "table-allocator-client netns list", n.Cure})
		}
	}
	return all
}

// lookUnsure asks the same, for what nobody can tell of them.
func lookUnsure(p *patient) (all []symptom) {
	if p.question.Namespaces == nil {
		return nil
	}
	for _, n := range p.question.Namespaces() {
		if n.Unsure != "" {
			all = append(all, symptom{fmt.Sprintf("the network namespace %s on %s may miss %s", n.Name, n.Ifname, n.Unsure), "/proc/net/ip_tables_names", "apt-get install iptables"})
		}
	}
	return all
}

func lookExcluded(p *patient) []symptom { return p.found("excluded") }
func lookDAD(p *patient) []symptom      { return p.found("duplicate") }

func lookCarrier(p *patient) []symptom { return p.found("no-carrier", "link-down") }

func lookMainDefault(p *patient) (all []symptom) {
	for _, row := range p.report.Uplinks {
		if row.Mode != "move" {
			continue
		}
		family, index := unix.AF_INET, p.linkNamed(row.Ifname).Index
		if row.Family == wire.Inet6.String() {
			family = unix.AF_INET6
		}
		routes := p.routes(family, unix.RT_TABLE_MAIN)
		if slices.ContainsFunc(routes, uplink.IsDeadEnd) {
			continue // all stay: see lookMainKept
		}
		ofHost := p.addressesOn(uplink.Loopback)
		for _, r := range routes {
			if uplink.Movable(r, index, ofHost) {
				all = append(all, symptom{"main has a default route of " + row.Ifname + ", whose routes are to be moved", p.routeText(r),
					outside.Service("start", "table-allocator-server") + "; " + outside.Journal("table-allocator-watch")})
			}
		}
	}
	return all
}

// lookMainKept finds what keeps main's default routes where move would take them.
func lookMainKept(p *patient) (all []symptom) {
	for _, family := range families {
		if !slices.ContainsFunc(p.linksOf(family), func(l lease) bool { return l.Mode == string(uplink.MoveRoutes) }) {
			continue
		}
		for _, r := range p.routes(family, unix.RT_TABLE_MAIN) {
			if uplink.IsDeadEnd(r) {
				all = append(all, symptom{"main keeps its default routes, also those to be moved, since it has one that leads nowhere, and no rule behind main is asked",
					p.routeText(r), p.deleteRoute(r) + " # if main is to lose its default routes"})
			}
		}
	}
	return all
}
