package cgroup

import (
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Offsets in struct bpf_sockopt of linux/bpf.h.
const (
	optSocket = 0
	optValue  = 8
	optEnd    = 16
	optLevel  = 24
	optName   = 28
	optLength = 32
)

// A setsockopt(SO_MARK) of eight bytes, of which the kernel reads four and whose other four are
// this, is ours. The programs let it pass: they belong to the cgroup that a socket was made in,
// wherever its process is now.
const passage = 0x74615f6d

// Options that join a group of multicast, of linux/in.h, and the lengths of their values.
const (
	joinGroup       = 42 // MCAST_JOIN_GROUP, of both families, and
	joinSourceGroup = 46 // MCAST_JOIN_SOURCE_GROUP: struct group_req begins with an ifindex
	mreqAddress     = 4  // in struct ip_mreq, ip_mreqn and ip_mreq_source: an address of the link
	mreqnIndex      = 8  // in struct ip_mreqn
	mreqnLength     = 12
	mreq6Index      = 16 // in struct ipv6_mreq
)

// setsockopt keeps our bits where a program sets a mark of its own. joins handles options of IP.
func setsockopt(m Mark, joins asm.Instructions) asm.Instructions {
	return keepingMark(m, joins, nil)
}

// formerOpt is setsockopt for the cgroup that a process left to be bound: it changes nothing for sockets without a mark of
// ours, which are others'.
func formerOpt(m Mark, lock int) asm.Instructions {
	joins := joinOnLink(m, lock, asm.Ja.Label(allow))
	return keepingMark(m, joins, asm.Instructions{asm.JEq.Imm(asm.R1, 0, allow)})
}

// keepingMark is a program for setsockopt. unmarked goes on where R1 has our bits of a socket.
func keepingMark(m Mark, joins, unmarked asm.Instructions) asm.Instructions {
	return join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R7, asm.R6, optValue, asm.DWord),
			asm.LoadMem(asm.R8, asm.R6, optEnd, asm.DWord),
			asm.LoadMem(asm.R2, asm.R6, optLevel, asm.Word),
			asm.JEq.Imm(asm.R2, unix.SOL_SOCKET, "socket"),
		},
		joins,
		asm.Instructions{
			asm.LoadMem(asm.R2, asm.R6, optName, asm.Word).WithSymbol("socket"),
			asm.JNE.Imm(asm.R2, unix.SO_MARK, "other"),
			asm.Mov.Reg(asm.R2, asm.R7),
			asm.Add.Imm(asm.R2, 4),
			asm.JGT.Reg(asm.R2, asm.R8, allow),
			asm.LoadMem(asm.R2, asm.R6, optLength, asm.Word),
			asm.JNE.Imm(asm.R2, 8, "keep"),
			asm.Mov.Reg(asm.R2, asm.R7),
			asm.Add.Imm(asm.R2, 8),
			asm.JGT.Reg(asm.R2, asm.R8, "keep"),
			asm.LoadMem(asm.R2, asm.R7, 4, asm.Word),
			asm.JEq.Imm(asm.R2, passage, allow),

			asm.LoadMem(asm.R3, asm.R6, optSocket, asm.DWord).WithSymbol("keep"),
			asm.LoadMem(asm.R1, asm.R3, sockMark, asm.Word),
			asm.And.Imm32(asm.R1, int32(m.Mask)),
		},
		unmarked,
		asm.Instructions{
			asm.LoadMem(asm.R2, asm.R7, 0, asm.Word),
			asm.And.Imm32(asm.R2, int32(^m.Mask)),
			asm.Or.Reg(asm.R2, asm.R1),
			asm.StoreMem(asm.R7, 0, asm.R2, asm.Word),
			asm.Ja.Label(allow),

			// Of an option longer than a page (netfilter has such) the kernel shows a page, and until
			// Linux 6.4 refuses the option unless the program says by a length of 0 that it did not look.
			asm.LoadMem(asm.R2, asm.R6, optLength, asm.Word).WithSymbol("other"),
			asm.JLE.Imm(asm.R2, 4096, allow),
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.R6, optLength, asm.R1, asm.Word),
		},
		verdict(allow),
	)
}

// joinOnLink makes a program join groups of multicast on its link. Where the program names none, the kernel takes the
// link of its main routes, whose network then hears of the program. It refuses other links. It expects the level in R2,
// the context in R6, the value in R7 and the end of the value in R8. unmarked says in R8 what counts as the mark of a
// socket that has none of ours.
func joinOnLink(m Mark, lock int, unmarked asm.Instruction) asm.Instructions {
	return join(
		asm.Instructions{
			asm.LoadMem(asm.R1, asm.R6, optName, asm.Word),
			asm.JEq.Imm(asm.R2, unix.SOL_IP, "IP"),
			asm.JNE.Imm(asm.R2, unix.SOL_IPV6, "other"),
			asm.Mov.Reg(asm.R9, asm.R7),
			asm.Add.Imm(asm.R9, mreq6Index),
			asm.JEq.Imm(asm.R1, unix.IPV6_JOIN_GROUP, "join"),
			asm.Mov.Reg(asm.R9, asm.R7).WithSymbol("IP"),
			asm.JEq.Imm(asm.R1, joinGroup, "join"),
			asm.JEq.Imm(asm.R1, joinSourceGroup, "join"),
			asm.JEq.Imm(asm.R2, unix.SOL_IPV6, "other"),
			asm.Add.Imm(asm.R9, mreqAddress),
			asm.JEq.Imm(asm.R1, unix.IP_ADD_SOURCE_MEMBERSHIP, "join"),
			asm.JNE.Imm(asm.R1, unix.IP_ADD_MEMBERSHIP, "other"),
			asm.LoadMem(asm.R3, asm.R6, optLength, asm.Word),
			asm.JLT.Imm(asm.R3, mreqnLength, "join"),
			asm.Mov.Reg(asm.R3, asm.R7),
			asm.Add.Imm(asm.R3, mreqnLength),
			asm.JGT.Reg(asm.R3, asm.R8, allow),
			asm.LoadMem(asm.R3, asm.R9, 0, asm.Word),
			asm.LoadMem(asm.R4, asm.R9, mreqnIndex-mreqAddress, asm.Word),
			asm.JNE.Imm(asm.R4, 0, "by index"),
			asm.JNE.Imm(asm.R3, 0, "join"),
			asm.Add.Imm(asm.R9, mreqnIndex-mreqAddress).WithSymbol("by index"),
			asm.Mov.Imm(asm.R2, unix.SOL_IPV6), // as of IPv6, which has an ifindex there

			// R9 is where the link is named, in R8 comes the mark that counts.
			asm.Mov.Reg(asm.R3, asm.R9).WithSymbol("join"),
			asm.Add.Imm(asm.R3, 4),
			asm.JGT.Reg(asm.R3, asm.R8, allow), // too short: the kernel refuses it
			asm.LoadMem(asm.R3, asm.R6, optSocket, asm.DWord),
			asm.LoadMem(asm.R8, asm.R3, sockMark, asm.Word),
			asm.And.Imm32(asm.R8, int32(m.Mask)),
			asm.JNE.Imm(asm.R8, 0, "marked"),
			unmarked,
			asm.Mov.Reg(asm.R3, asm.R8).WithSymbol("marked"),
			asm.And.Imm32(asm.R3, int32(m.out())),
			asm.JNE.Imm(asm.R3, 0, allow),
			asm.StoreMem(asm.R10, keyMark, asm.R8, asm.Word),
			asm.LoadMem(asm.R7, asm.R9, 0, asm.Word),
			asm.JEq.Imm(asm.R2, unix.SOL_IPV6, "index"),
			asm.JEq.Imm(asm.R1, joinGroup, "index"),
			asm.JEq.Imm(asm.R1, joinSourceGroup, "index"),
		},
		byAddress(lock),
		byIndex(lock),
	)
}

// byAddress fills in the IPv4 address of the link at R9, or refuses the one in R7 unless the link has it.
func byAddress(lock int) asm.Instructions {
	return join(
		asm.Instructions{asm.JNE.Imm(asm.R7, 0, "address")},
		lockKeyIPv4(none, asm.R7), lookup(lock, keyMark),
		asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, "fill"),
			asm.Ja.Label(drop),
			asm.Mov.Reg(asm.R1, asm.R7).WithSymbol("address"),
			asm.HostTo(asm.BE, asm.R1, asm.Word),
			asm.RSh.Imm(asm.R1, 24),
			asm.JEq.Imm(asm.R1, 127, allow),
		},
		lockKeyLink(none), lookup(lock, keyMark),
		asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, drop),
			asm.LoadMem(asm.R8, asm.R0, 0, asm.Word),
		},
		lockKeyIPv4(asm.R8, asm.R7), lookup(lock, keyMark),
		asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, allow),
			asm.Ja.Label(drop),
		},
	)
}

// byIndex fills in the ifindex of the link at R9, or refuses the one in R7 unless it is that of the link.
func byIndex(lock int) asm.Instructions {
	return join(
		asm.Instructions{
			asm.JEq.Imm(asm.R7, 0, "no index").WithSymbol("index"),
			asm.JEq.Imm(asm.R7, loopbackIndex, allow),
		},
		lockKeyLink(asm.R7), lookup(lock, keyMark),
		asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, allow),
			asm.Ja.Label(drop),
		},
		label(lockKeyLink(none), "no index"), lookup(lock, keyMark),
		asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, drop),
			asm.LoadMem(asm.R1, asm.R0, 0, asm.Word).WithSymbol("fill"),
			asm.StoreMem(asm.R9, 0, asm.R1, asm.Word),
			asm.Ja.Label(allow),
		},
		verdict(drop),
	)
}

// none stands for no link: the entry of a mark has its ifindex, and its IPv4 address, there.
const none = asm.R0

// lockKeyLink makes the key of a link, next to the mark that is there. It changes R1.
func lockKeyLink(index asm.Register) asm.Instructions {
	return join(lockKeyIndex(index), asm.Instructions{
		asm.StoreMem(asm.R10, keySource, asm.R1, asm.DWord),
		asm.StoreMem(asm.R10, keySource+8, asm.R1, asm.DWord),
	})
}

// lockKeyIPv4 is the same for an address on the link.
func lockKeyIPv4(index, addr asm.Register) asm.Instructions {
	return join(lockKeyIndex(index), asm.Instructions{
		asm.Mov.Imm(asm.R1, -1),
		asm.StoreMem(asm.R10, keySource, asm.R1, asm.DWord),
		asm.StoreMem(asm.R10, keySource+8, asm.R1, asm.Word),
		asm.StoreMem(asm.R10, keyIPv4, addr, asm.Word),
	})
}

func lockKeyIndex(index asm.Register) asm.Instructions {
	zero := asm.Mov.Imm(asm.R1, 0)
	if index == none {
		index = asm.R1
	}
	return asm.Instructions{zero, asm.StoreMem(asm.R10, keyLink, index, asm.Word)}
}
