package cgroup

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// A hook is one of our programs and the place in a cgroup that it belongs to.
type hook struct {
	spec ebpf.ProgramSpec
	// lost is what is not covered where the kernel does not take the program.
	lost string
}

// Offsets in the contexts of the programs: linux/bpf.h, struct bpf_sock, bpf_sock_addr,
// bpf_sock_ops and bpf_sockopt. They are part of the kernel's interface.
const (
	sockMark = 16
	sockSrc4 = 24
	sockSrc6 = 28

	addrUser4   = 4
	addrUser6   = 8
	addrSource4 = 40
	addrSource6 = 44
	addrSocket  = 64

	opsOp     = 0
	opsSocket = 184
	opsListen = 11 // BPF_SOCK_OPS_TCP_LISTEN_CB

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

// hooks are the programs that put sockets under mark m, first the one without which nothing works.
//
// "Our bits" of a socket's mark are those under m.Mask. What is already in them stays: in a cgroup
// inside of another one the inner program comes first, and a socket that was taken out is out. No
// program refuses anything but those for datagrams, and that once for a socket.
func hooks(m Mark) []hook {
	const allow = "allow"
	end := asm.Instructions{
		asm.Mov.Imm(asm.R0, 1).WithSymbol(allow),
		asm.Return(),
	}
	// Jumps away unless our bits of the mark in R1 are all 0. Changes R2.
	unlessMarked := asm.Instructions{
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.And.Imm32(asm.R2, int32(m.Mask)),
		asm.JNE.Imm(asm.R2, 0, allow),
	}
	// Gives the socket of the context in R6 the mark in R1.
	setMark := asm.Instructions{
		asm.StoreMem(asm.R10, -4, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, unix.SOL_SOCKET),
		asm.Mov.Imm(asm.R3, unix.SO_MARK),
		asm.Mov.Reg(asm.R4, asm.R10),
		asm.Add.Imm(asm.R4, -4),
		asm.Mov.Imm(asm.R5, 4),
		asm.FnSetsockopt.Call(),
	}
	// The same, of the socket in R7, without our bits.
	clearMark := join(
		asm.Instructions{
			asm.LoadMem(asm.R1, asm.R7, sockMark, asm.Word),
			asm.Mov.Reg(asm.R2, asm.R1),
			asm.And.Imm32(asm.R2, int32(m.Mask)),
			asm.JEq.Imm(asm.R2, 0, allow),
			asm.And.Imm32(asm.R1, int32(^m.Mask)),
		},
		setMark,
	)

	create := join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R1, asm.R6, sockMark, asm.Word),
		},
		unlessMarked,
		asm.Instructions{
			asm.Or.Imm32(asm.R1, int32(m.Value)),
			asm.StoreMem(asm.R6, sockMark, asm.R1, asm.Word),
		},
		end,
	)

	// Of the context in R1: keeps that in R6 and its socket in R7, and makes R1 the mark that the socket
	// is to have. Jumps away if it has our bits already, or a source address, which is a word other than 0
	// of those behind from: whoever has one has chosen it.
	unlessBound := func(from asm.Register, source []int16) asm.Instructions {
		code := join(
			asm.Instructions{
				asm.Mov.Reg(asm.R6, asm.R1),
				asm.LoadMem(asm.R7, asm.R6, addrSocket, asm.DWord),
				asm.LoadMem(asm.R1, asm.R7, sockMark, asm.Word),
			},
			unlessMarked,
		)
		for _, offset := range source {
			code = append(code,
				asm.LoadMem(asm.R2, from, offset, asm.Word),
				asm.JNE.Imm(asm.R2, 0, allow))
		}
		return append(code, asm.Or.Imm32(asm.R1, int32(m.Value)))
	}

	// The kernel makes the subflows of MPTCP itself, so no program is asked, and does not give them the
	// mark of the socket.
	connect := func(source ...int16) asm.Instructions {
		return join(unlessBound(asm.R7, source), setMark, end)
	}

	// Jumps away if the IPv4 address in R2, in network order, is none to leave from: any, loopback,
	// multicast, broadcast.
	unlessSource4 := asm.Instructions{
		asm.JEq.Imm(asm.R2, 0, allow),
		asm.HostTo(asm.BE, asm.R2, asm.Word),
		asm.RSh.Imm(asm.R2, 24),
		asm.JEq.Imm(asm.R2, 127, allow),
		asm.JGE.Imm(asm.R2, 224, allow),
	}
	bind4 := join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R7, asm.R6, addrSocket, asm.DWord),
			asm.LoadMem(asm.R2, asm.R6, addrUser4, asm.Word),
		},
		unlessSource4, clearMark, end,
	)
	const explicit = "explicit"
	bind6 := join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R7, asm.R6, addrSocket, asm.DWord),
			asm.LoadMem(asm.R1, asm.R6, addrUser6, asm.Word),
			asm.Mov.Reg(asm.R2, asm.R1),
			asm.HostTo(asm.BE, asm.R2, asm.Word),
			asm.RSh.Imm(asm.R2, 24),
			asm.JEq.Imm(asm.R2, 0xff, allow), // multicast
			asm.LoadMem(asm.R2, asm.R6, addrUser6+4, asm.Word),
			asm.Or.Reg(asm.R1, asm.R2),
			asm.JNE.Imm(asm.R1, 0, explicit),
			asm.LoadMem(asm.R1, asm.R6, addrUser6+8, asm.Word),
			asm.LoadMem(asm.R2, asm.R6, addrUser6+12, asm.Word),
			asm.HostTo(asm.BE, asm.R1, asm.Word),
			asm.JEq.Imm(asm.R1, 0xffff, "mapped"),
			asm.JNE.Imm(asm.R1, 0, explicit),
			asm.HostTo(asm.BE, asm.R2, asm.Word),
			asm.JGT.Imm(asm.R2, 1, explicit),
			asm.Ja.Label(allow), // :: or ::1
		},
		label(unlessSource4, "mapped"), label(clearMark, explicit), end,
	)

	// A bind that fails has lost the socket its mark all the same, and of datagrams without a connection
	// none goes past the programs for connect. The kernel has read the mark of this one already: it may
	// leave only if others may be used.
	var verdict int32
	if m.fallback() {
		verdict = 1
	}
	sendmsg := func(source ...int16) asm.Instructions {
		return join(unlessBound(asm.R6, source), setMark,
			asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}, end)
	}

	listen := join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R2, asm.R6, opsOp, asm.Word),
			asm.JNE.Imm(asm.R2, opsListen, allow),
			asm.LoadMem(asm.R7, asm.R6, opsSocket, asm.DWord),
			asm.JEq.Imm(asm.R7, 0, allow),
		},
		clearMark, end,
	)

	setsockopt := join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R2, asm.R6, optLevel, asm.Word),
			asm.JNE.Imm(asm.R2, unix.SOL_SOCKET, "other"),
			asm.LoadMem(asm.R2, asm.R6, optName, asm.Word),
			asm.JNE.Imm(asm.R2, unix.SO_MARK, "other"),
			asm.LoadMem(asm.R7, asm.R6, optValue, asm.DWord),
			asm.LoadMem(asm.R8, asm.R6, optEnd, asm.DWord),
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
		end,
	)

	program := func(name string, typ ebpf.ProgramType, at ebpf.AttachType, code asm.Instructions, lost string) hook {
		// Fills in how far jumps go, without which the kernel's tag of a program is not that of the code.
		if err := code.Marshal(io.Discard, binary.LittleEndian); err != nil {
			panic(fmt.Sprintf("assemble %s: %v", name, err))
		}
		return hook{ebpf.ProgramSpec{Name: name, Type: typ, AttachType: at, Instructions: code, License: "MIT"}, lost}
	}
	const (
		mptcp = "MPTCP connections leave by any uplink"
		stray = "datagrams of sockets whose bind to an address failed leave by any uplink"
		bound = "sockets bound to an address of another uplink get no answers"
	)
	return []hook{
		program(createName, ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, create, "nothing is bound"),
		program("ta_connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, connect(sockSrc4), mptcp),
		program("ta_connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect,
			connect(sockSrc6, sockSrc6+4, sockSrc6+8, sockSrc6+12), mptcp),
		program("ta_sendmsg4", ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Sendmsg, sendmsg(addrSource4), stray),
		program("ta_sendmsg6", ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Sendmsg,
			sendmsg(addrSource6, addrSource6+4, addrSource6+8, addrSource6+12), stray),
		program("ta_bind4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind, bind4, bound),
		program("ta_bind6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind, bind6, bound),
		program("ta_listen", ebpf.SockOps, ebpf.AttachCGroupSockOps, listen,
			"servers do not answer over another uplink"),
		program("ta_setopt", ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt, setsockopt,
			"programs that set a mark leave by any uplink"),
	}
}

const createName = "ta_create"

func join(parts ...asm.Instructions) asm.Instructions {
	var all asm.Instructions
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// label returns code with a symbol at its first instruction.
func label(code asm.Instructions, symbol string) asm.Instructions {
	return join(asm.Instructions{code[0].WithSymbol(symbol)}, code[1:])
}
