package cgroup

import "github.com/cilium/ebpf/asm"

// Offsets in struct __sk_buff of linux/bpf.h and in the headers of IP.
const (
	skbProtocol = 16
	skbIfindex  = 40
	skbSocket   = 168

	source4 = 12
	source6 = 8
	target4 = 16
	target6 = 24

	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
)

// Where the program has the key of a lookup in its stack: see lockKey.
const (
	keyMark   = -24
	keyLink   = -20
	keySource = -16
	keyIPv4   = -4 // of an IPv4 source, behind twelve bytes of 0xff
)

// A second key is that of the link.
const (
	linkKey  = -48
	linkLink = -44
	linkAddr = -40
)

// egress drops what leaves by another link than the map allows, or with another source address. The kernel asks it for
// each packet of a socket that was made in the cgroup, when route, source and link are final. The mark of the socket
// counts, since that of a packet is anybody's. Subflows that the kernel makes for MPTCP have no mark.
func egress(m Mark, lock int) asm.Instructions {
	return dropping(m, lock, asm.Mov.Imm32(asm.R8, int32(m.Value)))
}

// former is egress for the cgroup that a process left to be bound. The sockets from before belong to that cgroup for good,
// beside those of others, which have no mark.
func former(m Mark, lock int) asm.Instructions {
	return dropping(m, lock, asm.Ja.Label(allow))
}

// dropping is a program that drops. unmarked is what it does with a socket that has no mark of ours.
func dropping(m Mark, lock int, unmarked asm.Instruction) asm.Instructions {
	return join(
		asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R7, asm.R6, skbIfindex, asm.Word),
			asm.JEq.Imm(asm.R7, loopbackIndex, allow),

			asm.LoadMem(asm.R1, asm.R6, skbSocket, asm.DWord),
			asm.JEq.Imm(asm.R1, 0, "unmarked"),
			asm.FnSkFullsock.Call(),
			asm.JEq.Imm(asm.R0, 0, "unmarked"),
			asm.LoadMem(asm.R8, asm.R0, sockMark, asm.Word),
			asm.And.Imm32(asm.R8, int32(m.Mask)),
			asm.JNE.Imm(asm.R8, 0, "marked"),
			unmarked.WithSymbol("unmarked"),
			asm.Mov.Reg(asm.R1, asm.R8).WithSymbol("marked"),
			asm.And.Imm32(asm.R1, int32(m.out())),
			asm.JNE.Imm(asm.R1, 0, allow), // it was taken out, or may use other uplinks

			asm.StoreMem(asm.R10, keyMark, asm.R8, asm.Word),
			asm.StoreMem(asm.R10, keyLink, asm.R7, asm.Word),
		},
		addressToKey(source4, source6),
		label(lookup(lock, keyMark), "look"),
		asm.Instructions{
			asm.JNE.Imm(asm.R0, 0, allow),
			asm.LoadMem(asm.R1, asm.R10, keyMark, asm.DWord),
			asm.StoreMem(asm.R10, linkKey, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.R10, linkAddr, asm.R1, asm.DWord),
			asm.StoreMem(asm.R10, linkAddr+8, asm.R1, asm.DWord),
		},
		lookup(lock, linkKey),
		byLink(),
		localSource(lock),
		localTarget(lock),
		verdict(drop),
		verdict(allow),
	)
}

// loadBytes copies bytes of the packet in R6 to the stack.
func loadBytes(from, to, length int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, from),
		asm.Mov.Reg(asm.R3, asm.R10),
		asm.Add.Imm(asm.R3, to),
		asm.Mov.Imm(asm.R4, length),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, drop),
	}
}

// addressToKey puts an address of the packet in R6 into the key of the lookup that begins at "look", and its type into R9.
// The arguments are where the header of IPv4 has the address, and where that of IPv6.
func addressToKey(at4, at6 int32) asm.Instructions {
	return join(
		asm.Instructions{
			asm.LoadMem(asm.R9, asm.R6, skbProtocol, asm.Word),
			asm.HostTo(asm.BE, asm.R9, asm.Half),
			asm.JEq.Imm(asm.R9, etherIPv4, "IPv4"),
			asm.JNE.Imm(asm.R9, etherIPv6, drop),
		},
		loadBytes(at6, keySource, 16),
		asm.Instructions{
			asm.Ja.Label("look"),
			asm.Mov.Imm(asm.R1, -1).WithSymbol("IPv4"),
			asm.StoreMem(asm.R10, keySource, asm.R1, asm.DWord),
			asm.StoreMem(asm.R10, keySource+8, asm.R1, asm.Word),
		},
		loadBytes(at4, keyIPv4, 4),
	)
}

// byLink decides by the entry of a link in R0, for a source that has none. R9 is the type of the packet.
func byLink() asm.Instructions {
	return asm.Instructions{
		asm.JEq.Imm(asm.R0, 0, drop),
		asm.LoadMem(asm.R0, asm.R0, 0, asm.Word),
		asm.JEq.Imm(asm.R0, hostSource, "local"),
		asm.JEq.Imm(asm.R9, etherIPv4, "own IPv4"),
		asm.LoadMem(asm.R1, asm.R10, keySource, asm.Word),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.RSh.Imm(asm.R1, 22),
		asm.JEq.Imm(asm.R1, 0xfe80>>6, allow),
		asm.Ja.Label(drop),
		asm.LoadMem(asm.R1, asm.R10, keyIPv4, asm.Word).WithSymbol("own IPv4"),
		asm.JEq.Imm(asm.R1, 0, allow),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.RSh.Imm(asm.R1, 16),
		asm.JEq.Imm(asm.R1, 0xa9fe, allow), // 169.254/16
		asm.Ja.Label(drop),
	}
}

// lookup looks for the key that is in the stack.
func lookup(lock int, at int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, lock),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, at),
		asm.FnMapLookupElem.Call(),
	}
}

// label returns code with a symbol at its first instruction.
func label(code asm.Instructions, symbol string) asm.Instructions {
	return join(asm.Instructions{code[0].WithSymbol(symbol)}, code[1:])
}
