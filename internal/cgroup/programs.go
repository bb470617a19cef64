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
	lock ebpf.MapID // of the map that the program reads; 0: it reads none
	// needed is why nothing is bound where the kernel does not take the program; nil: only lost is not covered there.
	needed error
	lost   string
}

// Offsets in the contexts of the programs: linux/bpf.h, struct bpf_sock and bpf_sock_addr. They are part of the
// kernel's interface.
const (
	sockMark = 16

	addrSocket = 64
)

// hooks are the programs that put sockets under mark m. lock is the map of the program that holds them there, which a
// mark has that may use no other uplink.
//
// "Our bits" of a socket's mark are those under m.Mask. What is already in them stays: in a cgroup
// inside of another one the inner program comes first, and a socket that was taken out is out.
func hooks(m Mark, lock *Lock) []hook {
	mptcp, marks := "MPTCP connections leave by any uplink", "programs that set a mark leave by any uplink"
	joins := asm.Instructions{asm.Ja.Label("other")}
	all := []hook{program(createName, ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, create(m), ErrUnsupported, "")}
	if !m.fallback() {
		h := program(egressName, ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, egress(m, lock.fd()), ErrNoLock, "")
		answers := program(ingressName, ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress, ingress(m, lock.fd()), nil,
			"resets of listeners leave by the link with addresses of other uplinks")
		h.lock = lock.id()
		answers.lock = h.lock
		all = append(all, h, answers)
		mptcp = "MPTCP connections do not leave"
		joins = joinOnLink(m, lock.fd(), asm.Mov.Imm32(asm.R8, int32(m.Value)))
	}
	setopt := program("ta_setopt", ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt, setsockopt(m, joins), nil, marks)
	if lock != nil {
		setopt.lock = lock.id()
	}
	return append(all,
		program("ta_connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, connect(m), nil, mptcp),
		program("ta_connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, connect(m), nil, mptcp),
		setopt,
	)
}

// formerHooks are the programs for the cgroup that a process left to be bound: to that belong its sockets from before.
func formerHooks(m Mark, lock *Lock) []hook {
	all := []hook{
		program(formerName, ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, former(m, lock.fd()), nil, "sockets from before are held by rules alone"),
		program(formerOptName, ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt, formerOpt(m, lock.fd()), nil,
			"sockets from before leave by any uplink once their program sets a mark"),
	}
	for i := range all {
		all[i].lock = lock.id()
	}
	return all
}

const (
	createName = "ta_create"
	egressName = "ta_egress"
	formerName = "ta_former"

	ingressName = "ta_ingress"

	formerOptName = "ta_former_opt"
)

// formers are the names of formerHooks.
var formers = map[string]ebpf.AttachType{
	formerName:    ebpf.AttachCGroupInetEgress,
	formerOptName: ebpf.AttachCGroupSetsockopt,
}

// retired are programs of versions before this one.
var retired = map[string]ebpf.AttachType{
	"ta_bind4":    ebpf.AttachCGroupInet4Bind,
	"ta_bind6":    ebpf.AttachCGroupInet6Bind,
	"ta_sendmsg4": ebpf.AttachCGroupUDP4Sendmsg,
	"ta_sendmsg6": ebpf.AttachCGroupUDP6Sendmsg,
	"ta_listen":   ebpf.AttachCGroupSockOps,
}

func program(name string, typ ebpf.ProgramType, at ebpf.AttachType, code asm.Instructions, needed error, lost string) hook {
	// Fills in how far jumps go, without which the kernel's tag of a program is not that of the code.
	if err := code.Marshal(io.Discard, binary.LittleEndian); err != nil {
		panic(fmt.Sprintf("assemble %s: %v", name, err))
	}
	spec := ebpf.ProgramSpec{Name: name, Type: typ, AttachType: at, Instructions: code, License: "MIT"}
	return hook{spec: spec, needed: needed, lost: lost}
}

// Labels at the ends of programs.
const (
	allow = "allow"
	drop  = "drop"
)

// verdict is an end of a program.
func verdict(label string) asm.Instructions {
	var answer int32
	if label == allow {
		answer = 1
	}
	return asm.Instructions{asm.Mov.Imm(asm.R0, answer).WithSymbol(label), asm.Return()}
}

// unlessMarked jumps away unless our bits of the mark in R1 are all 0. It changes R2.
func unlessMarked(m Mark) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.And.Imm32(asm.R2, int32(m.Mask)),
		asm.JNE.Imm(asm.R2, 0, allow),
	}
}

// create gives a new socket our bits.
func create(m Mark) asm.Instructions {
	return join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R1, asm.R6, sockMark, asm.Word),
		},
		unlessMarked(m),
		asm.Instructions{
			asm.Or.Imm32(asm.R1, int32(m.Value)),
			asm.StoreMem(asm.R6, sockMark, asm.R1, asm.Word),
		},
		verdict(allow),
	)
}

// connect gives our bits to a subflow of MPTCP that connects. The kernel makes those itself, so that no program is
// asked then, and does not give them the mark of the socket.
func connect(m Mark) asm.Instructions {
	return join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R7, asm.R6, addrSocket, asm.DWord),
			asm.LoadMem(asm.R1, asm.R7, sockMark, asm.Word),
		},
		unlessMarked(m),
		asm.Instructions{
			asm.Or.Imm32(asm.R1, int32(m.Value)),
			asm.StoreMem(asm.R10, -4, asm.R1, asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, unix.SOL_SOCKET),
			asm.Mov.Imm(asm.R3, unix.SO_MARK),
			asm.Mov.Reg(asm.R4, asm.R10),
			asm.Add.Imm(asm.R4, -4),
			asm.Mov.Imm(asm.R5, 4),
			asm.FnSetsockopt.Call(),
		},
		verdict(allow),
	)
}

func join(parts ...asm.Instructions) asm.Instructions {
	var all asm.Instructions
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}
