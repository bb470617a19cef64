package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// pair is a host with two routed uplinks of both families, of which main prefers the first.
type pair struct{ *uplinks }

const (
	port2         = 8 // answers, too
	unreachable   = "network is unreachable"
	boundTimeouts = `"table_timeout":4` // so that a renewal is never far
)

func newPair(t *testing.T) *pair {
	p := &pair{newHost(t).behind(routed(0), routed(1))}
	p.internet.Do(func() {
		for _, addr := range []string{internet, internet6} {
			serveWho(t, net.JoinHostPort(addr, fmt.Sprint(port2)))
		}
	})
	for n := range p.isps {
		p.address(n)
	}
	for i, ifname := range []string{"wan0", "wan1"} { // neighbours take their time to find each other
		for _, family := range []int{4, 6} {
			p.waitSeen("the internet is behind "+ifname, packet{family: family, device: ifname}, p.addr(i, family))
		}
	}
	return p
}

func (p *pair) addr(i, family int) string {
	inet, inet6 := at(i)
	if family == 4 {
		return inet
	}
	return inet6
}

// look is the address from which the internet sees a packet, or why it does not.
func (p *pair) look(b packet) string {
	p.t.Helper()
	b.tries = 20 // some may be lost, while neighbours are looked for and on a busy machine
	if b.tcp {
		b.wait = patience // the kernel sends the first one again
	}
	seen, err := p.seen(b)
	if err != nil {
		return err.Error()
	}
	return seen
}

// wantSeen fails unless packets of UDP and TCP are seen so.
func (p *pair) wantSeen(what string, b packet, want string) {
	p.t.Helper()
	for _, tcp := range []bool{false, true} {
		b.tcp = tcp
		if got := p.look(b); got != want {
			p.t.Errorf("%s, IPv%d, TCP %v: seen as %s, want %s", what, b.family, tcp, got, want)
		}
	}
}

// waitSeen waits until they are.
func (p *pair) waitSeen(what string, b packet, want string) {
	p.t.Helper()
	eventually(p.t, what, func() error {
		for _, tcp := range []bool{false, true} {
			b.tcp = tcp
			if got := p.look(b); got != want {
				return fmt.Errorf("IPv%d, TCP %v: seen as %s, want %s", b.family, tcp, got, want)
			}
		}
		return nil
	})
}

// holders are the two ways to serve the addresses of the host.
var holders = map[string]func(*pair) (stop func(syscall.Signal)){
	"watch": func(p *pair) func(syscall.Signal) {
		w := p.watch("--config", p.watchFile(`{"links":[{"ifname":"wan*","routes":"copy"}]}`))
		return func(sig syscall.Signal) {
			_ = w.cmd.Process.Signal(sig) // it may have ended
			<-w.done
		}
	},
	"clients": func(p *pair) func(syscall.Signal) {
		for i, ifname := range []string{"wan0", "wan1"} {
			p.lease(p.addr(i, 4), ifname, "--routes", "copy")
			p.lease6(p.addr(i, 6), ifname, "--routes", "copy")
		}
		return func(sig syscall.Signal) {
			p.signalClients(sig)
			p.waitNoClient()
		}
	},
}

func (p *pair) serveAddresses(how string) (stop func(syscall.Signal)) {
	p.t.Helper()
	stop = holders[how](p)
	p.waitServed(0, 1)
	return stop
}

func (p *pair) waitServed(uplinks ...int) {
	p.t.Helper()
	for _, i := range uplinks {
		for _, family := range []int{4, 6} {
			p.waitRoute(i, family)
		}
	}
}

// waitRoute waits until the table of an address has its default route, and returns the table.
func (p *pair) waitRoute(i, family int) (table string) {
	p.t.Helper()
	table = p.served(p.addr(i, family))
	eventually(p.t, "the table of "+p.addr(i, family)+" has a default route", func() error {
		out, _ := p.ns.Output("ip", fmt.Sprint("-", family), "route", "show", "default", "table", table)
		if out == "" {
			return errors.New("it has none")
		}
		return nil
	})
	return table
}

// bind binds traffic to an interface as the commands do.
func (p *pair) bind(ifname string, onLoss uplink.OnLoss, traffic ...route.Traffic) (b bind.Binding, err error) {
	p.t.Helper()
	cfg := bind.Config{Ifname: ifname, OnLoss: onLoss, Traffic: traffic, Server: "tas_socket", Wait: patience}
	p.ns.Do(func() { b, err = bind.Bind(context.Background(), cfg) })
	return b, err
}

func (p *pair) mustBind(ifname string, onLoss uplink.OnLoss, traffic ...route.Traffic) bind.Binding {
	p.t.Helper()
	var b bind.Binding
	eventually(p.t, "traffic is bound, by the holders, in both families", func() (err error) {
		if b, err = p.bind(ifname, onLoss, traffic...); err != nil {
			return err
		}
		if len(b.Tables[wire.Inet]) == 0 || len(b.Tables[wire.Inet6]) == 0 || len(b.Unanswered) > 0 {
			return fmt.Errorf("%+v", b)
		}
		return nil
	})
	return b
}

// boundRules are the rules of both families that select by more than addresses and links, or let
// nothing pass.
func (p *pair) boundRules() (rules []string) {
	p.t.Helper()
	for family, all := range map[string][]string{"4 ": p.rules(), "6 ": p.rules6()} {
		for _, r := range all {
			if strings.Contains(r, "fwmark") || strings.Contains(r, "uidrange") || strings.Contains(r, "ipproto") || strings.Contains(r, "unreachable") {
				rules = append(rules, family+r)
			}
		}
	}
	slices.Sort(rules)
	return rules
}

var (
	user7 = route.Traffic{UIDs: route.UIDs{First: 4711, Last: 4711, Set: true}}
	udp8  = route.Traffic{IPProto: unix.IPPROTO_UDP, Dports: route.Ports{First: port2, Last: port2}}
)
