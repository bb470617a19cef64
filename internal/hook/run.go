package hook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
)

// Client has the parts of the program that calls need.
type Client struct {
	// Hold starts the process that holds a lease, and waits until the rules stand or patience is over.
	Hold func(args []string, patience time.Duration) error
	// Release is the client's --release. Wrong options of the administrator are ignored.
	Release func(args, options []string) error
	// Behind starts the program in the background.
	Behind func(args []string) (pid int, err error)
	// CheckWatch reports what is wrong with the arguments of a watch. Watch runs one until ctx ends.
	CheckWatch func(args []string) error
	Watch      func(ctx context.Context, args []string) error
}

// Runner makes calls.
type Runner struct {
	Client
	Warn  func(text string)
	until time.Time // when the caller waits no longer
}

// The limits of time. A call that is not done by then is not waited for.
const (
	patience        = 8 * time.Second // for all calls
	releasePatience = 4 * time.Second // then the next call begins
	askPatience     = 2 * time.Second // for another program
	cleanUp         = time.Second     // for a watch that cleans up behind one that was killed
)

// Run makes the calls in order. After an error it goes on with the next call.
func (r *Runner) Run(calls []Call) error {
	r.until = time.Now().Add(patience)
	var errs []error
	for _, call := range calls {
		if err := call.run(r); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Tell warns of what is left out, once: programs tell the same at each renewal, until they release the address.
func (r *Runner) Tell(warnings []Warning) {
	of := make(map[string][]string)
	for _, w := range warnings {
		of[w.Ifname] = append(of[w.Ifname], w.String())
	}
	for ifname, texts := range of {
		if ifname != "" {
			texts = r.memory(ifname).News(remember.Said, texts)
		}
		for _, text := range texts {
			r.Warn(text)
		}
	}
}

// left is the time until the caller waits no longer, but most at most.
func (r *Runner) left(most time.Duration) time.Duration {
	return max(0, min(most, time.Until(r.until)))
}

func (r *Runner) hold(l Lease) error {
	err := r.Hold(l.Args(), r.left(patience))
	if err != nil {
		err = fmt.Errorf("hold %s on %s: %w", l.Addr, l.Ifname, err)
	}
	return errors.Join(err, r.memory(l.Ifname).addAddress(l.Addr)) // the holder may have its table later
}

func (h Hold) run(r *Runner) error {
	if h.Delegated {
		h.Prefix = r.memory(h.Ifname).prefix()
	}
	if h.GatewayOf != "" {
		gateways, warnings := r.gatewaysOf(h)
		h.Gateways = gateways
		r.Tell(warnings)
	}
	return r.hold(h.Lease)
}

// gatewaysOf asks ifquery(8) for the gateways of all stanzas of a link.
func (r *Runner) gatewaysOf(h Hold) ([]netip.Addr, []Warning) {
	ctx, cancel := context.WithTimeout(context.Background(), r.left(askPatience))
	defer cancel()
	cmd := exec.CommandContext(ctx, "ifquery", h.GatewayOf)
	cmd.WaitDelay = time.Millisecond // a child of ifquery may keep the pipe open
	out, _ := cmd.Output()           // without an answer there is no gateway
	e := event{ifname: h.Ifname, env: Environment{}}
	var told []variable
	for line := range bytes.Lines(out[:min(len(out), maxValue)]) {
		if value, ok := strings.CutPrefix(string(line), "gateway: "); ok {
			for _, word := range strings.Fields(value) {
				told = append(told, variable{"gateway", word})
			}
		}
	}
	return e.gateways(netip.PrefixFrom(h.Addr, h.Addr.BitLen()), told), e.warnings
}

func (h HoldPresent) run(r *Runner) error {
	return errors.Join(r.holdPresent(h.Lease), r.awaits(AwaitPresentProgram, presentName, h.Lease))
}

func (r *Runner) holdPresent(l Lease) error {
	present, err := present(l.Ifname)
	for _, a := range present {
		l.Addr, l.Bits = a.Addr, a.Bits
		err = errors.Join(err, r.hold(l))
	}
	return err
}

func (h HoldStatic) run(r *Runner) (err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		found, listErr := addresses(h.Ifname, family, func(a route.Address) bool {
			return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&(unix.IFA_F_PERMANENT|unix.IFA_F_DADFAILED) == unix.IFA_F_PERMANENT && !slices.Contains(h.But, a.Addr)
		})
		err = errors.Join(err, listErr)
		for _, a := range found {
			l := h.Lease
			l.Addr, l.Bits = a.Addr, a.Bits
			err = errors.Join(err, r.hold(l))
		}
	}
	return err
}

func (h HoldDynamic) run(r *Runner) error {
	dynamic, err := dynamic(h.Ifname)
	if err != nil {
		return err
	}
	if len(dynamic) == 0 && h.Wait {
		return r.awaits(AwaitProgram, awaitedName, h.Lease)
	}
	return r.holdAll(h.Lease, dynamic)
}

func (r *Runner) holdAll(l Lease, addrs []netip.Addr) error {
	var errs []error
	l.Prefix = r.memory(l.Ifname).prefix()
	for _, addr := range addrs {
		l.Addr = addr
		errs = append(errs, r.hold(l))
	}
	return errors.Join(errs...)
}

func (c Release) run(r *Runner) error {
	done := make(chan error, 1)
	go func() { done <- r.Release(c.args(), c.Options) }()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("release %s on %s: %w", c.Addr, c.Ifname, err)
		}
		m := r.memory(c.Ifname)
		return errors.Join(m.removeAddress(c.Addr), m.Remove(remember.Said))
	case <-time.After(r.left(releasePatience)):
		return fmt.Errorf("release %s on %s: it takes too long", c.Addr, c.Ifname)
	}
}

func (c Lose) run(r *Runner) error {
	return errors.Join(removeAddress(c.Ifname, c.Addr), c.Release.run(r))
}

func (d Delegate) run(r *Runner) error { return r.memory(d.Ifname).Write(prefixName, d.Prefix) }

func (u Undelegate) run(r *Runner) error {
	m := r.memory(u.Ifname)
	return errors.Join(m.Remove(prefixName), m.Remove(awaitedName))
}

func (s StartWatch) run(r *Runner) error {
	if err := r.CheckWatch(s.Args); err != nil {
		return err // nobody reads errors of the process in the background
	}
	m := r.memory(s.Ifname)
	if w, ok := m.watch(); ok {
		w.close()
		return nil
	}
	pid, err := r.Behind(s.Args)
	if err != nil {
		return fmt.Errorf("start a watch for %s: %w", s.Ifname, err)
	}
	return m.setWatch(pid)
}

func (e EndWatch) run(r *Runner) error {
	m := r.memory(e.Ifname)
	if _, err := m.watchRead(); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	w, ok := m.watch()
	if ok {
		defer w.close()
		ok = w.end(r.left(releasePatience))
	}
	err := m.Remove(watchName)
	if !ok { // the watch was killed: another one deletes its rules and routes as it starts
		ctx, cancel := context.WithTimeout(context.Background(), r.left(cleanUp))
		defer cancel()
		err = errors.Join(err, r.Watch(ctx, e.Args))
	}
	return err
}

func (c EndDhclient) run(r *Runner) error { return endDhclient(c.Ifname) }

func (c ReleaseAll) run(r *Runner) error {
	m := r.memory(c.Ifname)
	addrs, err := m.addresses()
	for _, addr := range addrs {
		err = errors.Join(err, Release{c.Ifname, addr, c.Options}.run(r))
	}
	return errors.Join(err, m.Remove(prefixName), m.Remove(awaitedName), m.Remove(presentName), m.Remove(remember.Said))
}

// memory returns the memory of a link in this network namespace.
func (r *Runner) memory(ifname string) memory {
	dir, err := remember.OfLink(ifname)
	if err != nil {
		r.Warn("nothing is remembered about " + ifname + ": " + err.Error())
	}
	m := memory{Dir: dir, ifname: ifname}
	if err := m.takeOver(); err != nil {
		r.Warn("what an earlier version remembered about " + ifname + ": " + err.Error())
	}
	return m
}
