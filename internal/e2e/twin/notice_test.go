package twin

import (
	"fmt"
	"testing"
)

// TestTwinNotices breaks what the product has installed on hosts where all was right, and wants
// the comparison to find that.
func TestTwinNotices(t *testing.T) {
	breakages := []struct {
		name     string
		commands func(served, network) []string
	}{
		{"a default is left out", func(s served, _ network) []string {
			return []string{fmt.Sprintf("ip route del %s table %d", anywhere(s.addr.Is4()), s.table)}
		}},
		{"a network is left out", func(s served, _ network) []string {
			return []string{fmt.Sprintf("ip route del %s table %d", s.network, s.table)}
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
		{"the source rule of another address", func(s served, _ network) []string {
			return []string{fmt.Sprintf("ip rule add from %s lookup main pref 9999", s.addr)}
		}},
		{"a rule before main for everybody", func(s served, _ network) []string {
			return []string{fmt.Sprintf("ip rule add to 9.0.0.0/8 lookup %d pref 20000", s.table)}
		}},
	}
	stock := &twins{}
	defer stock.close()
	for i, b := range breakages {
		// The second uplink: what main has as a default for it, too, would hide some of them.
		h := generate(uint64(7000+i), false, nil, kernel{})
		err := broken(h, stock, func(w *world, s served) error {
			failed, err := w.real.run(b.commands(s, h.second))
			if err == nil && len(failed) > 0 {
				err = fmt.Errorf("commands %d of %q failed", failed, b.commands(s, h.second))
			}
			return err
		})
		if err != nil {
			t.Errorf("%s: %v\n%s", b.name, err, h.text())
		}
	}
}

// broken lets a host start, kills the watch, breaks something, and fails if the comparison has
// nothing to say.
func broken(h *host, stock *twins, breakIt func(*world, served) error) error {
	w, err := newWorld(h)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.startWatch(); err != nil {
		return err
	}
	f := finding{host: h}
	w.patience = longPatience
	if ok, err := (&living{w, stock, &f}).look(atStart); err != nil || !ok {
		return fmt.Errorf("wrong before it was broken: %v, %w", f.wrong, err)
	}
	w.watch.kill() // it would put things right again
	plain, err := w.plain.picture()
	if err != nil {
		return err
	}
	rules, err := w.real.rules()
	if err != nil {
		return err
	}
	for _, s := range servedBy(rules, plain) {
		if s.addr != h.second.addr.Addr() {
			continue
		}
		if err := breakIt(w, s); err != nil {
			return err
		}
		r, err := w.compare(stock)
		if err != nil {
			return err
		}
		if len(r.wrong) == 0 {
			return fmt.Errorf("none of %d answers is wrong", r.answers)
		}
		return nil
	}
	return fmt.Errorf("%s is not served", h.second.addr)
}
