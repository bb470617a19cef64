package cgroup

import (
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// Offsets in struct bpf_sock of linux/bpf.h: the far end of a connection.
const (
	sockTarget4 = 52
	sockTarget6 = 56
)

// Where the program has the target of a packet in its stack: two numbers, of which the first is -1 for IPv4.
const (
	targetHigh = -64
	targetLow  = -56
)

// localSource goes on with packets that leave by a local link, and drops those with a source that nobody there can answer:
// neither that of a local link, nor of the link of the mark, nor the address that the program is connected to, which is
// an address of this host whose port another program publishes from a container. It expects the context in R6, the
// ifindex in R7 and the type of the packet in R9.
func localSource(lock int) asm.Instructions {
	code := join(
		asm.Instructions{
			asm.Mov.Imm(asm.R1, localSources).WithSymbol("local"),
			asm.StoreMem(asm.R10, keyLink, asm.R1, asm.Word),
		},
		lookup(lock, keyMark),
		asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, "target"),
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.R10, linkLink, asm.R1, asm.Word),
		},
		lookup(lock, linkKey),
		asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, drop),
			asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
			asm.StoreMem(asm.R10, keyLink, asm.R1, asm.Word),
		},
		lookup(lock, keyMark),
		asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, "target"),
			asm.LoadMem(asm.R1, asm.R6, skbSocket, asm.DWord),
			asm.JEq.Imm(asm.R1, 0, drop),
			asm.FnSkFullsock.Call(),
			asm.JEq.Imm(asm.R0, 0, drop),
			asm.JEq.Imm(asm.R9, etherIPv4, "connected IPv4"),
			asm.LoadMem(asm.R1, asm.R10, keySource, asm.DWord),
			asm.JEq.Imm(asm.R1, 0, drop), // ::1
		},
	)
	for word := int16(0); word < 16; word += 4 {
		code = append(code,
			asm.LoadMem(asm.R1, asm.R0, sockTarget6+word, asm.Word),
			asm.LoadMem(asm.R2, asm.R10, keySource+word, asm.Word),
			asm.JNE.Reg(asm.R1, asm.R2, drop),
		)
	}
	return append(code,
		asm.Ja.Label("target"),
		asm.LoadMem(asm.R1, asm.R0, sockTarget4, asm.Word).WithSymbol("connected IPv4"),
		asm.LoadMem(asm.R2, asm.R10, keyIPv4, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, drop),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.RSh.Imm(asm.R1, 24),
		asm.JEq.Imm(asm.R1, 127, drop),
	)
}

// localTarget allows what goes to a network of the local link, and drops the rest: somebody there may answer for the
// internet.
func localTarget(lock int) asm.Instructions {
	code := join(
		asm.Instructions{
			asm.Mov.Imm(asm.R1, 0).WithSymbol("target"),
			asm.Sub.Reg(asm.R1, asm.R7),
			asm.StoreMem(asm.R10, linkLink, asm.R1, asm.Word),
			asm.JEq.Imm(asm.R9, etherIPv4, "target IPv4"),
		},
		loadBytes(target6, targetHigh, 16),
		asm.Instructions{
			asm.Ja.Label("networks"),
			asm.Mov.Imm(asm.R1, -1).WithSymbol("target IPv4"),
			asm.StoreMem(asm.R10, targetHigh, asm.R1, asm.DWord),
			asm.StoreMem(asm.R10, targetLow, asm.R1, asm.Word),
			asm.StoreMem(asm.R10, linkAddr, asm.R1, asm.DWord),
			asm.StoreMem(asm.R10, linkAddr+8, asm.R1, asm.Word),
		},
		loadBytes(target4, targetLow+4, 4),
		label(lookup(lock, linkKey), "networks"),
		asm.Instructions{
			asm.JEq.Imm(asm.R0, 0, drop),
			asm.LoadMem(asm.R8, asm.R0, 0, asm.Word),
		},
	)
	for n := range localLengths {
		code = join(code, inNetwork(lock, fmt.Sprint("length ", n)))
	}
	return append(code, asm.Ja.Label(drop))
}

// inNetwork allows a target whose network with the length in the last byte of R8 is in the map, and shifts R8.
func inNetwork(lock int, symbol string) asm.Instructions {
	short, look := symbol+" short", symbol+" look"
	return join(
		asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R8),
			asm.And.Imm(asm.R1, 0xff),
			asm.JEq.Imm(asm.R1, 0, drop),
			asm.RSh.Imm(asm.R8, 8),
			asm.LoadMem(asm.R2, asm.R10, targetHigh, asm.DWord),
			asm.LoadMem(asm.R3, asm.R10, targetLow, asm.DWord),
			asm.HostTo(asm.BE, asm.R2, asm.DWord),
			asm.HostTo(asm.BE, asm.R3, asm.DWord),
			asm.Mov.Imm(asm.R4, 128),
			asm.Sub.Reg(asm.R4, asm.R1),
			asm.JGE.Imm(asm.R4, 64, short),
			asm.RSh.Reg(asm.R3, asm.R4),
			asm.LSh.Reg(asm.R3, asm.R4),
			asm.Ja.Label(look),
			asm.Sub.Imm(asm.R4, 64).WithSymbol(short),
			asm.RSh.Reg(asm.R2, asm.R4),
			asm.LSh.Reg(asm.R2, asm.R4),
			asm.Mov.Imm(asm.R3, 0),
			asm.HostTo(asm.BE, asm.R2, asm.DWord).WithSymbol(look),
			asm.HostTo(asm.BE, asm.R3, asm.DWord),
			asm.StoreMem(asm.R10, linkAddr, asm.R2, asm.DWord),
			asm.StoreMem(asm.R10, linkAddr+8, asm.R3, asm.DWord),
		},
		lookup(lock, linkKey),
		asm.Instructions{asm.JNE.Imm(asm.R0, 0, allow)},
	)
}
