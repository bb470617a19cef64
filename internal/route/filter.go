package route

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Of a notification, where the kernel's filter finds what it is about.
const (
	typeAt     = 4                        // nlmsg_type
	tableAt    = unix.SizeofNlMsghdr + 4  // rtm_table, RT_TABLE_COMPAT for numbers above 255
	protocolAt = unix.SizeofNlMsghdr + 5  // rtm_protocol
	rulesAttrs = unix.SizeofNlMsghdr + 12 // behind struct fib_rule_hdr
	findAttr   = 0xfffff000 + 12          // SKF_AD_OFF + SKF_AD_NLATTR: where attribute X is, from A on
	fraTable   = 15                       // FRA_TABLE
)

const (
	bpfLoad, bpfLoadX, bpfEqual, bpfToX, bpfAnswer = unix.BPF_LD, unix.BPF_LDX, unix.BPF_JMP | unix.BPF_JEQ, unix.BPF_MISC | unix.BPF_TAX, unix.BPF_RET
)

// The filter reads numbers as big endian, and rtnetlink writes them as the host does.
func short(n uint16) uint32 { return uint32(binary.BigEndian.Uint16(native.AppendUint16(nil, n))) }
func long(n uint32) uint32  { return binary.BigEndian.Uint32(native.AppendUint32(nil, n)) }

// OnlyDeletedRules limits what the watcher hears of rules to those that are deleted and lead to a table: of a thousand
// clients each hears of its own. The kernel looks at the notifications, so that a client does not wake up for others.
func (w *Watcher) OnlyDeletedRules(table uint32) error {
	return w.filter([]unix.SockFilter{
		{Code: bpfEqual, K: short(unix.RTM_NEWRULE), Jt: 9},
		{Code: bpfEqual, K: short(unix.RTM_DELRULE), Jf: 7},
		{Code: bpfLoad | unix.BPF_IMM, K: rulesAttrs},
		{Code: bpfLoadX | unix.BPF_IMM, K: fraTable},
		{Code: bpfLoad | unix.BPF_W | unix.BPF_ABS, K: findAttr},
		{Code: bpfEqual, K: 0, Jt: 4},
		{Code: bpfToX},
		{Code: bpfLoad | unix.BPF_W | unix.BPF_IND, K: unix.SizeofRtAttr},
		{Code: bpfEqual, K: long(table), Jf: 1},
	})
}

// AllRules ends OnlyDeletedRules. Of the routes of ours that are added the watcher hears in main only: whoever fills a
// table would hear of each route of it.
func (w *Watcher) AllRules() error { return w.filter(nil) }

// filter lets through what rules, which are between the type in A and two answers, and what is said here of routes, let.
func (w *Watcher) filter(rules []unix.SockFilter) error {
	n := uint8(len(rules))
	program := slices.Concat([]unix.SockFilter{
		{Code: bpfLoad | unix.BPF_H | unix.BPF_ABS, K: typeAt},
		{Code: bpfEqual, K: short(unix.RTM_NEWROUTE), Jf: 4},
		{Code: bpfLoad | unix.BPF_B | unix.BPF_ABS, K: protocolAt},
		{Code: bpfEqual, K: Protocol, Jf: n + 2},
		{Code: bpfLoad | unix.BPF_B | unix.BPF_ABS, K: tableAt},
		{Code: bpfEqual, K: unix.RT_TABLE_MAIN, Jt: n, Jf: n + 1},
	}, rules, []unix.SockFilter{
		{Code: bpfAnswer, K: 1<<32 - 1}, // all of it
		{Code: bpfAnswer, K: 0},
	})
	return w.attach(program)
}

// attach has the kernel ask a program which notifications this watcher gets.
func (w *Watcher) attach(program []unix.SockFilter) error {
	var err error
	controlErr := w.conn.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
	if err == nil {
		err = controlErr
	}
	if err != nil {
		return fmt.Errorf("filter rtnetlink notifications: %w", err)
	}
	return nil
}
