package cgroup

import (
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// sockType is an offset in struct bpf_sock of linux/bpf.h.
const sockType = 8

// ingress drops what somebody sends to a listener, or to a connection, at an address of another uplink. The kernel itself
// answers some of that, with a reset or, while many connections begin, with a SYN cookie. Such an answer has the mark, so that
// it would leave by the link of the mark with the address of the other uplink, and no socket, so that egress is not asked.
// Datagrams are for the program, which may want to hear them: the kernel answers none.
func ingress(m Mark, lock int) asm.Instructions {
	return join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R7, asm.R6, skbIfindex, asm.Word),
			asm.JEq.Imm(asm.R7, loopbackIndex, allow),
			asm.LoadMem(asm.R1, asm.R6, skbSocket, asm.DWord),
			asm.JEq.Imm(asm.R1, 0, allow),
			asm.FnSkFullsock.Call(),
			asm.JEq.Imm(asm.R0, 0, allow),
			asm.LoadMem(asm.R1, asm.R0, sockType, asm.Word),
			asm.JNE.Imm(asm.R1, unix.SOCK_STREAM, allow),
			asm.LoadMem(asm.R8, asm.R0, sockMark, asm.Word),
			asm.And.Imm32(asm.R8, int32(m.Mask)),
			asm.JNE.Imm(asm.R8, 0, "marked"),
			asm.Mov.Imm32(asm.R8, int32(m.Value)), // a subflow of MPTCP
			asm.Mov.Reg(asm.R1, asm.R8).WithSymbol("marked"),
			asm.And.Imm32(asm.R1, int32(m.out())),
			asm.JNE.Imm(asm.R1, 0, allow),

			// What comes in by the link, or by a local one, is asked of the host as it stands there.
			asm.StoreMem(asm.R10, keyMark, asm.R8, asm.Word),
		},
		lockKeyLink(asm.R7), lookup(lock, keyMark),
		asm.Instructions{asm.JNE.Imm(asm.R0, 0, allow)},

		// What is sent to an address of the link may come in by another one, where both are in one network.
		lockKeyLink(none), lookup(lock, keyMark),
		asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, drop),
			asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
			asm.StoreMem(asm.R10, keyLink, asm.R1, asm.Word),
		},
		addressToKey(target4, target6),
		label(lookup(lock, keyMark), "look"),
		asm.Instructions{asm.JNE.Imm(asm.R0, 0, allow)},
		verdict(drop),
		verdict(allow),
	)
}
