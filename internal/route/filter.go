package route

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// OnlyDeletedRules limits what the watcher hears of rules to those that are deleted and lead to a table: of a thousand
// clients each hears of its own. The kernel looks at the notifications, so that a client does not wake up for others.
func (w *Watcher) OnlyDeletedRules(table uint32) error {
	const (
		load, loadX, jumpEqual, toX, answer = unix.BPF_LD, unix.BPF_LDX, unix.BPF_JMP | unix.BPF_JEQ, unix.BPF_MISC | unix.BPF_TAX, unix.BPF_RET
		attribute                           = 0xfffff000 + 12 // SKF_AD_OFF + SKF_AD_NLATTR: where attribute X is, from A on
		typeOf                              = 4               // nlmsg_type
		attributes                          = unix.SizeofNlMsghdr + 12
		fraTable                            = 15
	)
	// The filter reads numbers as big endian, and rtnetlink writes them as the host does.
	short := func(n uint16) uint32 { return uint32(binary.BigEndian.Uint16(native.AppendUint16(nil, n))) }
	long := func(n uint32) uint32 { return binary.BigEndian.Uint32(native.AppendUint32(nil, n)) }
	program := []unix.SockFilter{
		{Code: load | unix.BPF_H | unix.BPF_ABS, K: typeOf},
		{Code: jumpEqual, K: short(unix.RTM_NEWRULE), Jt: 9},
		{Code: jumpEqual, K: short(unix.RTM_DELRULE), Jf: 7},
		{Code: load | unix.BPF_IMM, K: attributes},
		{Code: loadX | unix.BPF_IMM, K: fraTable},
		{Code: load | unix.BPF_W | unix.BPF_ABS, K: attribute},
		{Code: jumpEqual, K: 0, Jt: 4},
		{Code: toX},
		{Code: load | unix.BPF_W | unix.BPF_IND, K: unix.SizeofRtAttr},
		{Code: jumpEqual, K: long(table), Jf: 1},
		{Code: answer, K: 1<<32 - 1}, // all of it
		{Code: answer, K: 0},
	}
	return w.filter(func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
}

// AllRules ends OnlyDeletedRules.
func (w *Watcher) AllRules() error {
	return w.filter(func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		if err == unix.ENOENT {
			err = nil // there is none
		}
		return err
	})
}

func (w *Watcher) filter(set func(fd int) error) error {
	var err error
	controlErr := w.conn.Control(func(fd uintptr) { err = set(int(fd)) })
	if err == nil {
		err = controlErr
	}
	if err != nil {
		return fmt.Errorf("filter rtnetlink notifications: %w", err)
	}
	return nil
}
