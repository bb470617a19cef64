package route

import (
	"fmt"
	"slices"
	"sort"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// snapshot is the rules as a dump gave them, kept up to date by the notifications of the
// changes that this Conn makes. A change by anybody else makes it worthless: those of two
// programs may be told in another order than they happened.
//
// The kernel queues the notification of a change before it acknowledges the change, so what
// was changed through the Conn is always in here.
type snapshot struct {
	heard *nl.NetlinkSocket // of all changes of rules
	own   uint32            // port of the socket that we make ours with
	rules map[int][]kernelRule
	buf   []byte
	// receive is unix.Recvfrom, but for tests.
	receive func(fd int, p []byte, flags int) (int, unix.Sockaddr, error)
}

// KeepRules makes the Conn remember the rules between calls, for one that asks for them very
// often. Others pay a notification for each change of a rule. It is called on a thread in the
// namespace of Dial.
func (c *Conn) KeepRules() error {
	if c.snapshot != nil {
		return nil
	}
	heard, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
	if err != nil {
		return fmt.Errorf("subscribe to changes of rules: %w", err)
	}
	own, err := c.changing.GetPid()
	if err != nil {
		heard.Close()
		return fmt.Errorf("find port of rtnetlink socket: %w", err)
	}
	c.snapshot = &snapshot{heard: heard, own: own, rules: make(map[int][]kernelRule), buf: make([]byte, 1<<12), receive: unix.Recvfrom}
	return nil
}

// ForgetRules gives up the memory of what KeepRules remembers, until it is asked for again.
func (c *Conn) ForgetRules() {
	if c.snapshot != nil {
		clear(c.snapshot.rules)
	}
}

// read returns the rules of a family, which the caller must not change, nor use after the
// next call. dump reads them from the kernel, and reports whether they are all.
func (s *snapshot) read(family int, dump func() (rules []kernelRule, complete bool, err error)) ([]kernelRule, error) {
	heardAll := s.update()
	if rules, ok := s.rules[family]; ok {
		return rules, nil
	}
	rules, complete, err := dump()
	if err == nil && complete && heardAll { // what is heard later must be newer than the dump
		s.rules[family] = rules
	}
	return rules, err
}

// update takes over what was heard since the last call. It reports whether that is all.
func (s *snapshot) update() bool {
	for {
		n, from, err := s.receive(s.heard.GetFd(), s.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return true
		case err == nil && !isKernel(from):
		case err != nil || n > len(s.buf):
			clear(s.rules) // something was lost
			if err != nil && err != unix.ENOBUFS {
				return false
			}
		default:
			s.apply(s.buf[:n])
		}
	}
}

func (s *snapshot) apply(b []byte) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int64(native.Uint32(b))
		if n < unix.SizeofNlMsghdr+unix.SizeofRtMsg || n > int64(len(b)) {
			clear(s.rules)
			return
		}
		typ, port, body := native.Uint16(b[4:]), native.Uint32(b[12:]), b[unix.SizeofNlMsghdr:n]
		family := int(body[0])
		rules, known := s.rules[family]
		switch {
		case !known:
		case port != s.own:
			delete(s.rules, family)
		default:
			body = slices.Clone(body)
			r, err := parseRule(body)
			native.PutUint32(body[8:], native.Uint32(body[8:])&^flagsState)
			if rules, known = changed(rules, typ, kernelRule{r, body}); err != nil || !known {
				delete(s.rules, family)
			} else {
				s.rules[family] = rules
			}
		}
		b = b[min(align(int(n)), len(b)):]
	}
}

// changed returns the rules after a notification, and whether it fits them.
func changed(rules []kernelRule, typ uint16, r kernelRule) ([]kernelRule, bool) {
	if typ == unix.RTM_NEWRULE { // it stands behind its equals
		at := sort.Search(len(rules), func(i int) bool { return rules[i].Priority > r.Priority })
		return slices.Insert(rules, at, r), true
	}
	at := slices.IndexFunc(rules, func(k kernelRule) bool { return k.Rule == r.Rule })
	if typ != unix.RTM_DELRULE || at < 0 {
		return rules, false
	}
	return slices.Delete(rules, at, at+1), true
}
