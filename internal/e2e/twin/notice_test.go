package twin

import (
	"fmt"
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
		if err := broken(b, false, stock); err != nil {
			t.Errorf("%s: %v", b.name, err)
		}
	}
	for _, b := range breakagesAtEnd {
		if err := broken(b, true, stock); err != nil {
			t.Errorf("%s: %v", b.name, err)
		}
	}
}

// broken lets a host start, ends the watch, breaks something, and fails if the comparison has
// nothing to say.
func broken(b breakage, atTheEnd bool, stock *twins) error {
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
	s, err := w.second()
	if err != nil {
		return err
	}
	if atTheEnd {
		if ok, err := l.end(); err != nil || !ok {
			return fmt.Errorf("wrong before it was broken: %v, %w\n%s", f.wrong, err, h.text())
		}
	} else {
		w.killWatch() // it would put things right again
	}
	if err := w.spoil(b, s); err != nil {
		return err
	}
	r, err := w.compareAgain(atTheEnd, stock)
	if err == nil && len(r.wrong) == 0 {
		err = fmt.Errorf("none of %d answers is wrong\n%s", r.answers, h.text())
	}
	return err
}

func (w *world) compareAgain(atTheEnd bool, stock *twins) (result, error) {
	if atTheEnd {
		return w.compareEnd()
	}
	return w.compare(stock)
}

// second is the address of the second uplink: what main has as a default for that one, too, would
// hide some breakages.
func (w *world) second() (served, error) {
	plain, err := w.plain.picture()
	if err != nil {
		return served{}, err
	}
	rules, err := w.real.rules()
	if err != nil {
		return served{}, err
	}
	for _, s := range servedBy(rules, plain) {
		if s.addr == w.host.second.addr.Addr() {
			return s, nil
		}
	}
	return served{}, fmt.Errorf("%s is not served", w.host.second.addr)
}

// spoil breaks something on the real host.
func (w *world) spoil(b breakage, s served) error {
	commands := b.commands(s, w.host.second)
	failed, err := w.real.run(commands)
	if err == nil && len(failed) > 0 {
		err = fmt.Errorf("commands %d of %q failed", failed, commands)
	}
	return err
}
