package twin

import (
	"errors"
	"fmt"
	"slices"
	"testing"
)

// breakage breaks what the product has installed for an address of a host.
type breakage struct {
	name     string
	commands func(served, network) []string
}

// breakages are found by asking where packets go.
var breakages = []breakage{
	{"a default is left out", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip route del %s table %d", anywhere(s.addr.Is4()), s.table)}
	}},
	{"a network is left out", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip route del %s table %d", s.networks[0], s.table)}
	}},
	{"a route leads to another router", func(s served, n network) []string {
		return []string{fmt.Sprintf("ip route replace 100.99.0.0/16 via %s table %d", n.gateway.Next(), s.table)}
	}},
	{"a destination leads nowhere", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip route add blackhole 9.9.9.0/24 table %d", s.table)}
	}},
	{"the source rule stands behind main", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip rule del from %s pref 10000", s.addr),
			fmt.Sprintf("ip rule add from %s lookup %d pref 33000 protocol %d", s.addr, s.table, protocol)}
	}},
	{"a rule to main stands before the source rule", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip rule add from %s lookup main pref 9999", s.addr)}
	}},
	{"a rule for everybody stands before main", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip rule add to 9.0.0.0/8 lookup %d pref 20000", s.table)}
	}},
}

// breakagesAtEnd are found when the product has taken everything back.
var breakagesAtEnd = []breakage{
	{"a rule is left", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip rule add from %s lookup %d pref 10000", s.addr, s.table)}
	}},
	{"a route is left in a table", func(s served, n network) []string {
		return []string{fmt.Sprintf("ip route add %s via %s table %d", anywhere(s.addr.Is4()), n.gateway, s.table)}
	}},
	{"a route has not come back", func(s served, _ network) []string {
		return []string{fmt.Sprintf("ip route del %s", s.networks[0])}
	}},
}

// TestTwinNotices breaks hosts on which all was right, and wants the comparison to find that.
func TestTwinNotices(t *testing.T) {
	stock := &twins{}
	defer stock.close()
	for _, b := range breakages {
		for _, rich := range []bool{false, true} {
			if err := noticed(b, rich, stock); err != nil {
				t.Errorf("%s: %v", b.name, err)
			}
		}
	}
	for _, b := range breakagesAtEnd {
		if err := noticedAtEnd(b, stock); err != nil {
			t.Errorf("%s: %v", b.name, err)
		}
	}
}

// noticed breaks hosts until the comparison finds that, and fails if it never does. On a rich host another route, or what
// main says, may stand in for what is broken.
func noticed(b breakage, rich bool, stock *twins) error {
	for seed := uint64(7001); seed < 7021; seed++ {
		h := generate(seed, rich, []string{atStart}, kernel{})
		w, err := newWorld(h)
		if err != nil {
			return err
		}
		var r result
		if err = w.startWatch(); err == nil {
			r, err = (&living{w, stock, &finding{host: h}}).spoil(b)
		}
		w.close()
		if err != nil || len(r.wrong) > 0 {
			return err
		}
	}
	return errors.New("the comparison finds nothing wrong on any host")
}

// noticedAtEnd lets a host go through its life, breaks it, and fails if the comparison has nothing to say.
func noticedAtEnd(b breakage, stock *twins) error {
	h := generate(7001, false, nil, kernel{})
	w, err := newWorld(h)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.startWatch(); err != nil {
		return err
	}
	f := finding{host: h}
	w.patience = patience
	l := &living{w, stock, &f}
	if ok, err := l.look(atStart); err != nil || !ok {
		return fmt.Errorf("wrong before it was broken: %v, %w\n%s", f.wrong, err, h.text())
	}
	victims, err := w.victims()
	if err != nil {
		return err
	}
	if ok, err := l.end(); err != nil || !ok {
		return fmt.Errorf("wrong before it was broken: %v, %w\n%s", f.wrong, err, h.text())
	}
	commands := b.commands(victims[0].served, victims[0].network)
	if failed, err := w.real.run(commands); err != nil || len(failed) > 0 {
		return fmt.Errorf("commands %d of %q failed: %w", failed, commands, err)
	}
	r, err := w.compareEnd()
	if err == nil && len(r.wrong) == 0 {
		err = fmt.Errorf("none of %d answers is wrong\n%s", r.answers, h.text())
	}
	return err
}

// victim is an address whose rules or routes can be broken.
type victim struct {
	served
	network network
}

// victims are the addresses with tables. That of the second uplink is the first: what main has as a default for that
// one, too, would hide some breakages.
func (w *world) victims() (all []victim, err error) {
	plain, err := w.plain.picture()
	if err != nil {
		return nil, err
	}
	rules, err := w.real.rules()
	if err != nil {
		return nil, err
	}
	for _, s := range servedBy(rules, plain) {
		i := slices.IndexFunc(w.host.nets, func(n network) bool { return n.addr.Addr() == s.addr })
		switch {
		case i < 0:
		case s.addr == w.host.second.addr.Addr():
			all = slices.Insert(all, 0, victim{s, w.host.nets[i]})
		default:
			all = append(all, victim{s, w.host.nets[i]})
		}
	}
	return all, nil
}

// spoil breaks a host on which all is right, with the watch gone, which would put that right again. It breaks one address
// after the other until an answer is wrong.
func (l *living) spoil(b breakage) (r result, err error) {
	w := l.w
	w.patience = patience
	if ok, err := l.look(atStart); err != nil || !ok {
		return r, fmt.Errorf("wrong before it was broken: %v, %w\n%s", l.f.wrong, err, w.host.text())
	}
	w.killWatch()
	victims, err := w.victims()
	for _, v := range victims {
		// What fails, since the table has no such route, changes nothing.
		if _, err := w.real.run(b.commands(v.served, v.network)); err != nil {
			return r, err
		}
		if r, err = w.compare(l.t); err != nil || len(r.wrong) > 0 {
			return r, err
		}
	}
	return r, err
}
