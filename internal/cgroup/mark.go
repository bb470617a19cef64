// Package cgroup binds processes to an uplink. It hides control groups and the BPF programs in them:
// small ones, assembled here, that put every new socket of a cgroup's processes under the mark
// of an interface, so that a rule for that mark chooses route and source address. Programs live as
// long as their cgroup and need nobody who keeps them. All of it needs root.
package cgroup

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Mark are the bits of sockets' marks that stand for an uplink.
type Mark struct {
	Value, Mask uint32 // Value has bits of Mask only, and one more of them than the lowest
}

// String returns the mark as `ip rule` writes it: 0x2000000/0xff000000.
func (m Mark) String() string { return fmt.Sprintf("%#x/%#x", m.Value, m.Mask) }

// out is what a socket has whose process was detached: no uplink's mark, yet not none, which the
// programs of the cgroup that it was made in would fill in.
func (m Mark) out() uint32 { return m.Mask & -m.Mask }

// fallback reports whether what has the mark may use other uplinks.
func (m Mark) fallback() bool { return m.Value&m.out() != 0 }

func (m Mark) check() error {
	if m.Value&^m.Mask != 0 || m.Value&^m.out() == 0 {
		return fmt.Errorf("mark %s: not a mark of an interface", m)
	}
	return nil
}

// An Uplink is what processes are bound to.
type Uplink struct {
	Ifname   string
	Fallback bool // while the interface has no route, others may be used
}

// fallbackSuffix cannot be in the name of an interface.
const fallbackSuffix = ":fallback"

// String returns the name of the cgroup of the interface: "wwan0" or "wwan0:fallback".
func (u Uplink) String() string {
	if u.Fallback {
		return u.Ifname + fallbackSuffix
	}
	return u.Ifname
}

// parseUplink is the inverse of String.
func parseUplink(name string) (u Uplink, ok bool) {
	u.Ifname, u.Fallback = strings.CutSuffix(name, fallbackSuffix)
	return u, u.Check() == nil
}

// Check returns why there cannot be such a link.
func (u Uplink) Check() error {
	if u.Ifname == "" || len(u.Ifname) >= unix.IFNAMSIZ || u.Ifname == "." || u.Ifname == ".." ||
		strings.ContainsAny(u.Ifname, "/:\n\x00 \t") {
		return fmt.Errorf("%q: not the name of an interface", u.Ifname)
	}
	return nil
}

// ErrUnsupported says that the kernel cannot bind processes at all.
var ErrUnsupported = errors.New("this kernel cannot bind processes: it takes no BPF program for new sockets of a cgroup (CONFIG_CGROUP_BPF, Linux 4.15)")
