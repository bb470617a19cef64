package inspect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/probe"
	"github.com/table-allocator/table-allocator/internal/route"
)

// lookFeatures tries what programs under `run` and rules need of the kernel.
func lookFeatures(p *patient) (all []symptom) {
	const cure = "a newer kernel; table-allocator-run(8), LIMITS"
	programs, err := cgroup.Features()
	p.unseen = err
	for _, m := range programs {
		all = append(all, symptom{"this kernel lacks what `run` needs: " + m.Lost, fmt.Sprintf("%s: %v", m.Program, m.Err), cure})
	}
	for _, r := range refusedRules() {
		all = append(all, symptom{"this kernel refuses a kind of rule", r, cure})
	}
	return all
}

// refusedRules adds each kind of rule in a network namespace that goes with the thread, and returns those that the kernel
// refuses. Who may make no network namespace sees none.
func refusedRules() (refused []string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if unix.Unshare(unix.CLONE_NEWNET) != nil {
			return
		}
		kernel, err := route.Dial()
		if err != nil {
			return
		}
		defer kernel.Close()
		rule := route.Rule{Priority: 9000, Table: 10000, Protocol: route.Protocol}
		for _, t := range []route.Traffic{
			{Iif: "lo"},
			{Mark: 1, Mask: 1},
			{UIDs: route.UIDs{First: 1000, Last: 1000, Set: true}},
			{IPProto: unix.IPPROTO_UDP, Dports: route.Ports{First: 53, Last: 53}},
		} {
			rule.Traffic = t
			for _, r := range []route.Rule{rule, {Priority: 9001, Traffic: t, Table: unix.RT_TABLE_MAIN, MinLength: 1, Protocol: route.Protocol}} {
				if _, _, err := kernel.SyncRules(unix.AF_INET, func(o route.Rule) bool { return o.Protocol == route.Protocol }, []route.Rule{r}); err != nil {
					refused = append(refused, err.Error())
				}
			}
		}
	}()
	<-done
	return refused
}

// lookZones finds an address on two links, and address translation that takes their connections for one.
func lookZones(p *patient) (all []symptom) {
	if len(p.chains("masquerade"))+len(p.chains("snat ")) == 0 || len(p.chains("ct zone set"))+len(p.chains("ct original zone set")) > 0 {
		return nil
	}
	links := make(map[netip.Addr][]string)
	for _, l := range p.leases {
		if !slices.Contains(links[l.addr], l.Ifname) {
			links[l.addr] = append(links[l.addr], l.Ifname)
		}
	}
	for _, l := range p.leases {
		if on := links[l.addr]; len(on) > 1 && on[0] == l.Ifname {
			all = append(all, symptom{fmt.Sprintf("connections by %v with the same ends are one to address translation: %s is on both", on, l.addr), "a chain with masquerade or snat, and none with ct zone",
				"a chain at prerouting and output, priority raw, with a zone for each link: iifname " + on[1] + " ct zone set 1"})
		}
	}
	return all
}

// lookMTU asks hosts through each uplink whether they answer packets of its whole MTU.
func lookMTU(p *patient) (all []symptom) {
	targets := p.question.Targets
	if p.report.watch != nil && len(targets) == 0 {
		for _, text := range p.report.watch.Targets {
			if a, err := netip.ParseAddr(text); err == nil {
				targets = append(targets, a)
			}
		}
	}
	if len(targets) == 0 {
		p.unseen = errors.New("there is no host to ask: name one with --target, or have the watch probe")
	}
	for _, l := range p.leases {
		for _, target := range targets {
			if l.IsFault() || l.link.Index == 0 || familyOf(target) != l.family {
				continue
			}
			const most = 1500 // larger packets are cut on the way, whatever the link takes
			size := min(l.link.MTU, most)
			ctx, cancel := context.WithTimeout(context.Background(), mtuPatience)
			err := probe.PathMTU(ctx, probe.Uplink{Ifname: l.Ifname, Address: l.addr}, target, size)
			cancel()
			switch {
			case errors.Is(err, probe.ErrLost):
				all = append(all, symptom{fmt.Sprintf("packets of %d bytes by %s are lost, and no router says that they are too big: connections hang", size, l.Ifname),
					fmt.Sprintf("%s from %s answers 56 bytes and not %d", target, l.Address, size),
					fmt.Sprintf("ip link set %s mtu 1400, or less, or: nft add rule inet filter forward oifname %s tcp flags syn tcp option maxseg size set rt mtu", l.Ifname, l.Ifname)})
			case err != nil:
				p.unseen = fmt.Errorf("ask %s from %s: %w", target, l.Address, err)
			}
			break // one host for each uplink
		}
	}
	return all
}

const mtuPatience = 10 * time.Second // for one uplink
