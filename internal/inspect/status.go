// Package inspect says how the addresses of the host stand, why a packet leaves where it does, and what is wrong with the
// host: from what holders of leases answer, and from what the kernel has and does. It changes nothing.
package inspect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/uplinks"
	"github.com/table-allocator/table-allocator/internal/walk"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Question is what Status is asked for.
type Question struct {
	Selection uplink.Selection
	Ifnames   []string    // patterns of the links to show
	Addresses []string    // to show beside them
	Family    wire.Family // Unspec: both
	Server    string      // its name
	UIDs      []uint32    // users whose servers are trusted, beside root

	Targets    []netip.Addr       // of Doctor: hosts to ask how large packets may be; none: those of the watch
	Namespaces func() []Namespace // lists network namespaces on uplinks; nil: none

	Load    func(file string) (uplink.Selection, error)   // reads the configuration of a watch; nil: it is not known
	Options func(args []string) (uplink.Selection, error) // reads the command line of a watch, likewise
}

// Namespace is a network namespace whose only way out is one uplink.
type Namespace struct {
	Name      string   `json:"name"`
	Ifname    string   `json:"ifname"`
	OnLoss    string   `json:"on_loss"`
	Tables    []uint32 `json:"tables"`
	Addresses []string `json:"addresses"` // in it
	Resolv    string   `json:"resolv"`
	VPN       string   `json:"vpn"` // up or down; empty: it has none
	Programs  int      `json:"programs"`
	Missing   string   `json:"missing"` // empty: all is as it should be
	Unsure    string   `json:"-"`       // what it may miss where nobody can tell
	Cure      string   `json:"-"`
}

// ErrNoLink says that no link and no lease has a name.
var ErrNoLink = errors.New("no link and no lease has this name")

// ErrNoAddress says that no link that can be an uplink, and no lease, has an address.
var ErrNoAddress = errors.New("no link that can be an uplink and no lease has this address")

// ErrNotAsked says that the caller may not ask the holders.
var ErrNotAsked = peer.ErrNotAsked

// shows reports whether the addresses of a link are asked for.
func (q Question) shows(ifname string, family wire.Family) bool {
	return (q.Family == wire.Unspec || family == q.Family || family == wire.Unspec) && (len(q.Addresses) > 0 || q.names(ifname)) // keep knows addresses
}

// names reports whether a pattern fits the name of a link.
func (q Question) names(ifname string) bool {
	return slices.ContainsFunc(q.Ifnames, func(pattern string) bool { return q.Selection.Fits(pattern, ifname) })
}

// keep leaves out the rows of addresses that nobody asked for.
func (q Question) keep(rows []Row) []Row {
	return slices.DeleteFunc(rows, func(r Row) bool {
		return len(q.Addresses) > 0 && !slices.Contains(q.Addresses, r.Address) && !q.names(r.Ifname)
	})
}

// checkNames returns an error if somebody asked for a name that nothing has.
func (q Question) checkNames(h *host, rows []Row) error {
	for _, addr := range q.Addresses {
		if !slices.ContainsFunc(rows, func(r Row) bool { return r.Address == addr }) {
			return fmt.Errorf("%s: %w", addr, ErrNoAddress)
		}
	}
	for _, name := range q.Ifnames {
		if strings.ContainsAny(name, `*?[\`) || h.linkNamed(name).Index != 0 ||
			slices.ContainsFunc(rows, func(r Row) bool { return r.Ifname == name }) {
			continue
		}
		return fmt.Errorf("%s: %w", name, ErrNoLink)
	}
	return nil
}

// Report is how the host stands.
type Report struct {
	Version int       `json:"version"` // of this format
	Server  Server    `json:"server"`
	Unbound []Unbound `json:"unbound"`
	Uplinks []Row     `json:"uplinks"`
	Others  []Row     `json:"others"` // leases of programs for what is no address

	Namespaces []Namespace `json:"namespaces"`

	fronts []inFront
	watch  *uplinks.Report // nil: no watch answers
	pools  []pool          // see Measure
}

// Unbound is where packets of one family leave that are bound to nothing.
type Unbound struct {
	Family  string `json:"family"`
	Ifname  string `json:"ifname"`  // "": there is no route
	Gateway string `json:"gateway"` // "": none, or the neighbours of the link
	Table   uint32 `json:"table"`
	Chosen  string `json:"chosen"` // the link that a watch chose; "": none
	Why     string `json:"why"`    // of the choice, or there is no route
}

// Row is how one address of the host stands.
type Row struct {
	Ifname    string    `json:"ifname"`
	Address   string    `json:"address"`
	Family    string    `json:"family"`
	Table     uint32    `json:"table"`      // 0: none
	LeaseLeft int64     `json:"lease_left"` // seconds
	Gateway   string    `json:"gateway"`    // of the first default route of the table
	PID       int       `json:"pid"`        // of the holder
	Mode      string    `json:"mode"`       // what the holder does about routes
	Missing   string    `json:"missing"`    // empty: nothing is wrong
	State     string    `json:"state"`      // ok, or the name of the first finding
	LeavesBy  string    `json:"leaves_by"`  // the links by which packets from the address reach the Internet
	Probe     *Probe    `json:"probe"`      // null: no watch probes it
	Since     int64     `json:"since"`      // when a fault began, in seconds since 1970; 0: there is none, or nobody noted it
	Findings  []Finding `json:"findings"`
	restored  int64     // see Measure
}

// Probe is what probes of an uplink told.
type Probe struct {
	State string  `json:"state"`
	RTT   float64 `json:"rtt_ms"` // 0: no answer
	Loss  int     `json:"loss"`   // percent
	Since int64   `json:"since"`  // seconds that it has been in this state
	Used  bool    `json:"used"`   // by unbound traffic
}

// ok is the state of an address that has no finding.
const ok = "ok"

// IsFault reports whether an address is in a state that it should not be in.
func (r Row) IsFault() bool { return slices.ContainsFunc(r.Findings, Finding.IsFault) }

// Text is the state for people.
func (r Row) Text() string {
	if len(r.Findings) == 0 {
		return ok
	}
	return r.Findings[0].What
}

// Worst returns the row with the severest finding, of rows that are not empty.
func Worst(rows []Row) Row {
	return slices.MinFunc(rows, func(a, b Row) int { return cmp.Compare(a.rank(), b.rank()) })
}

// rank is that of the first finding, which is the severest.
func (r Row) rank() int {
	if len(r.Findings) == 0 {
		return Note.rank() + 1
	}
	return r.Findings[0].Severity.rank()
}

// IsFault reports whether anything is wrong.
func (r Report) IsFault() bool {
	return slices.ContainsFunc(slices.Concat(r.Uplinks, r.Others), Row.IsFault) ||
		slices.ContainsFunc(r.Namespaces, func(n Namespace) bool { return n.Missing != "" })
}

// Status asks the holder of each address that is selected, and the kernel where its packets leave.
func Status(ctx context.Context, q Question) (Report, error) {
	report := Report{Version: 1, Uplinks: []Row{}, Others: []Row{}, Unbound: []Unbound{}, Namespaces: []Namespace{}}
	h, err := openHost()
	if err != nil {
		return report, err
	}
	defer h.close()
	q.Selection.Others = uplink.OthersOf(h.links)
	if report.Server, err = serverOf(q.Server, q.UIDs); err != nil {
		return report, err
	}
	candidates, rows, err := h.selected(q)
	if err != nil {
		return report, err
	}
	asker, err := newAsker(ctx)
	if err != nil {
		return report, err
	}
	defer asker.close()
	for _, c := range candidates {
		held, err := asker.ask(c.Key)
		if err != nil {
			return report, err
		}
		if row, err := h.rowOf(c, held, report.Server); err != nil {
			return report, err
		} else if row.PID != 0 || c.wanted {
			rows = append(rows, row)
		}
	}
	awaited, others, err := h.withoutAddress(asker, q, candidates, report.Server)
	if err != nil {
		return report, err
	}
	report.Uplinks, report.Others = q.keep(append(rows, awaited...)), q.keep(append(report.Others, others...))
	if err := q.checkNames(h, slices.Concat(report.Uplinks, report.Others)); err != nil {
		return report, err
	}
	q.noteUnserved(report.Uplinks)
	if report.fronts, err = h.inFront(q); err != nil {
		return report, err
	}
	noteFronts(report.Uplinks, report.fronts)
	if err := h.noteLock(report.Uplinks, q); err != nil {
		return report, err
	}
	for _, rows := range [][]Row{report.Uplinks, report.Others} {
		finish(rows)
	}
	if report.IsFault() {
		noteSince(report.Uplinks, &report.Server, history())
	}
	if report.Unbound, err = h.unbound(); err != nil {
		return report, err
	}
	report.noteProbes()
	if q.Namespaces != nil {
		for _, n := range q.Namespaces() {
			if q.names(n.Ifname) {
				report.Namespaces = append(report.Namespaces, n)
			}
		}
	}
	return report, nil
}

// finish sorts rows, and fills in what their findings say.
func finish(rows []Row) {
	slices.SortStableFunc(rows, func(a, b Row) int { return cmp.Or(cmp.Compare(a.Ifname, b.Ifname), cmp.Compare(a.Family, b.Family)) })
	for i := range rows {
		r := &rows[i]
		sortFindings(r.Findings)
		r.State = ok
		if len(r.Findings) > 0 {
			r.State = r.Findings[0].Name
		} else {
			r.Findings = []Finding{}
		}
		var missing []string
		for _, f := range r.Findings {
			switch {
			case f.What == missesSome:
				missing = append(missing, f.Evidence)
			case f.Name == "incomplete":
				missing = append(missing, f.What+": "+f.Evidence)
			case f.IsFault():
				missing = append(missing, f.What)
			}
		}
		r.Missing = strings.Join(missing, ", ")
	}
}

// noteUnserved makes a fault of addresses that nobody serves while a watch runs, but for those that its configuration leaves out.
func (q Question) noteUnserved(rows []Row) {
	if !slices.ContainsFunc(rows, func(r Row) bool {
		return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Name == "not-served" })
	}) {
		return
	}
	watch := uplinks.Watch()
	if isCommand(watch, "uplinks") { // --run, which serves no address
		watch = 0
	}
	if at := slices.IndexFunc(rows, func(r Row) bool { return r.PID != 0 && isWatch(r.PID) }); watch == 0 && at >= 0 {
		watch = rows[at].PID
	}
	if watch == 0 {
		return
	}
	file := configOf(watch)
	selection, known := q.selectionOf(file)
	from := file
	if file == "" {
		from = "the command line of the watch"
		if q.Options != nil {
			words := commandLine(watch)
			s, err := q.Options(words[min(1, len(words)):])
			s.Others = q.Selection.Others
			selection, known = s, err == nil
		}
	}
	for i := range rows {
		for j := range rows[i].Findings {
			f := &rows[i].Findings[j]
			if f.Name != "not-served" {
				continue
			}
			addr, _ := netip.ParseAddr(rows[i].Address) // no other is not served
			_, selected := selection.Uplink(route.Address{Addr: addr}, rows[i].Ifname)
			switch {
			case unservable(rows[i].Ifname) != nil:
				f.Severity = Error
			case known && !selected:
				f.What, f.Evidence = "not served: the configuration of the watch leaves it out", fmt.Sprintf("%s does not select %s on %s", from, addr, rows[i].Ifname)
				if f.Cure = "nothing, or start the watch with other options"; file != "" {
					f.Cure = "nothing, or change " + file + " and: " + outside.Service("reload", "table-allocator-watch")
				}
			default:
				f.Severity = Error
				f.What, f.Evidence = "not served by the watch that runs", fmt.Sprintf("pid %d is a watch, and has no lease for the address", watch)
				if file != "" && !known {
					f.Evidence += ", or its configuration leaves the link out: status -c " + file
				}
				f.Cure = outside.Service("restart", "table-allocator-watch") + "; table-allocator-client history " + rows[i].Ifname
			}
		}
	}
}

// selectionOf is what a watch serves by its configuration file. Only a file that root alone can write is read.
func (q Question) selectionOf(file string) (selection uplink.Selection, known bool) {
	var stat unix.Stat_t
	const othersWrite = 0o022
	if q.Load == nil || !path.IsAbs(file) || unix.Stat(file, &stat) != nil || stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Uid != 0 || stat.Mode&othersWrite != 0 {
		return selection, false
	}
	selection, err := q.Load(file)
	selection.Others = q.Selection.Others
	return selection, err == nil // the watch says what is wrong with its file
}

// configOf is the configuration that a watch was started with; "": none.
func configOf(watch int) string {
	words := commandLine(watch)
	for i, word := range words {
		if file, ok := strings.CutPrefix(word, "--config="); ok {
			return file
		}
		if (word == "-c" || word == "--config") && i+1 < len(words) {
			return words[i+1]
		}
	}
	return ""
}

// unservable says why no link of a name can be served; nil if one can.
func unservable(ifname string) error {
	_, err := wire.Key{Ifname: ifname, Address: "any"}.Canonical()
	return err
}

// isWatch reports whether a process is a watch.
func isWatch(pid int) bool { return isCommand(pid, "watch") }

// isCommand reports whether the first argument of a process is a command.
func isCommand(pid int, command string) bool {
	words := commandLine(pid)
	return len(words) > 1 && words[1] == command
}

// commandLine are the arguments that a process was started with, its name first.
func commandLine(pid int) []string {
	return strings.Split(strings.TrimSuffix(readLine(fmt.Sprintf("/proc/%d/cmdline", pid)), "\x00"), "\x00")
}

// candidate is an address that the configuration selects by the name of its link.
type candidate struct {
	uplink.Uplink
	at     route.Address
	link   route.Link
	wanted bool // its link is one that a watch serves

	withoutRouter bool // and nobody serves the address
}

// selected returns the addresses to ask for, and the rows of links that look like uplinks and are excluded.
func (h *host) selected(q Question) (candidates []candidate, excluded []Row, err error) {
	var main []route.Route // its default routes, and halves of them
	for _, family := range families {
		routes, err := h.kernel.Wide(family, unix.RT_TABLE_MAIN, uplink.Halves(family))
		if err != nil {
			return nil, nil, err
		}
		main = append(main, routes...)
	}
	cfg, links := q.Selection, uplink.Links(h.links, uplink.Defaults(main))
	addresses := slices.SortedFunc(slices.Values(h.addresses), func(a, b route.Address) int { return a.Addr.Compare(b.Addr) })
	for _, a := range addresses {
		link := links[a.Index]
		settled := a
		settled.Flags &^= unix.IFA_F_DADFAILED // a duplicate is shown, too
		u, selected := cfg.Uplink(settled, link.Name)
		switch {
		case !q.shows(link.Name, wire.Family(a.Family())):
		case selected:
			wanted := cfg.Wants(link)
			withoutRouter := wanted && uplink.WithoutRouter(main, h.addresses, a)
			candidates = append(candidates, candidate{u, a, link.Link, wanted && (withoutRouter || uplink.Leaves(main, a)), withoutRouter})
		case link.Default && cfg.Excludes(link.Name) && link.Name != uplink.Loopback && uplink.Leaves(main, a):
			excluded = append(excluded, Row{Ifname: link.Name, Address: a.Addr.String(), Family: wire.Family(a.Family()).String(),
				Findings: []Finding{{"excluded", Error, "excluded, but main has a default route over it",
					"the configuration excludes " + link.Name, "take the link out of exclude, or delete its default route"}}})
		}
	}
	return candidates, excluded, nil
}

// withoutAddress are the leases for addresses that this host does not have yet, and for what is no address.
func (h *host) withoutAddress(asker *asker, q Question, candidates []candidate, server Server) (awaited, others []Row, err error) {
	names, err := peer.HolderNames()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		if slices.ContainsFunc(candidates, func(c candidate) bool { return c.Key.String() == name }) {
			continue
		}
		for _, key := range peer.KeysOf(name) {
			held, err := asker.ask(key)
			if err != nil {
				return nil, nil, err
			}
			if held.PID == 0 {
				continue // it is another key of the same name, or of a socket of another program
			}
			row := rowOfLease(key, held, server)
			_, selected := q.Selection.Uplink(route.Address{Addr: addrOf(key)}, key.Ifname)
			switch {
			case !q.shows(key.Ifname, key.Family):
			case key.Family == wire.Unspec:
				others = append(others, row)
			case selected:
				row.Findings = append([]Finding{{"waiting-address", Note, "waiting for the address",
					key.Address + " is not on " + key.Ifname, "configure the address, or release the lease"}}, slices.DeleteFunc(row.Findings,
					func(f Finding) bool { return f.Name == "no-lease" })...) // which it needs when the address is there
				awaited = append(awaited, row)
			}
			break
		}
	}
	return awaited, others, nil
}

func addrOf(key wire.Key) netip.Addr {
	addr, _ := netip.ParseAddr(key.Address) // what is no address is of no profile
	return addr
}

// unbound asks where packets leave that are bound to nothing.
func (h *host) unbound() (all []Unbound, err error) {
	for _, family := range families {
		exits, err := h.exits(family, route.Question{})
		if err != nil {
			return nil, err
		}
		u := Unbound{Family: wire.Family(family).String()}
		e := exits[0]
		if e.err != nil && family == unix.AF_INET6 {
			e = h.bySource(e)
		}
		if e.err == nil {
			u.Ifname, u.Table = h.linkNames(e.links()), e.route.Table
			if e.route.Gateway.IsValid() {
				u.Gateway = e.route.Gateway.String()
			}
		} else if a, err := h.walk(family, route.Question{Dst: e.to}); err == nil { // with too many routes, none is named
			u.Why = h.refusal(a)
			if u.Why == "" && !h.leadsTo(family, unix.RT_TABLE_MAIN) {
				u.Why = "no rule leads to table main"
			}
		}
		all = append(all, u)
	}
	return all, nil
}

// bySource asks again where packets to an address leave that has no route, with the source that a socket gets: IPv6 looks for one
// where it has found nothing, and main may have default routes for some sources only.
func (h *host) bySource(e exit) exit {
	made, err := connect(route.Question{Dst: e.to})
	if err != nil || made.err != nil || !made.src.IsValid() {
		return e
	}
	r, err := h.kernel.Match(route.Question{Dst: e.to, Src: made.src})
	if err != nil {
		return e
	}
	return exit{to: e.to, route: r}
}

// refusal is the rule or route that answers a lookup with an error; "": none does, and nothing is found.
func (h *host) refusal(a walk.Answer) string {
	rule, decided := a.Rule()
	switch {
	case !decided || a.Err == 0:
		return ""
	case a.Route.Table != 0:
		return h.routeText(a.Route)
	}
	return "rule " + rule.String()
}
