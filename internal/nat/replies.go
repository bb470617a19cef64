package nat

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// RepliesName is the name of the tables of replies, one of family ip and one of ip6.
const RepliesName = "table-allocator-replies"

// Replies are the own addresses whose replies leave with them, and by the way that a mark has.
type Replies map[netip.Addr]uint32

// sorted are the addresses in an order of their own, so that the same addresses make the same table.
func (r Replies) sorted() []netip.Addr { return slices.SortedFunc(maps.Keys(r), netip.Addr.Compare) }

const (
	askedFor = 3 * time.Minute // after a datagram it is known whom it asked: as long as the kernel keeps an open flow of UDP
	askedMax = 1 << 14         // datagrams of more flows to one address are not noted
)

// Names of the sets of the tables, and the beginning of others. There is a set for each address, of who has asked it, and no map from who
// asked to the address: nft 1.0.6 aborts when it loads a rule that looks up an address of IPv6 and ports in a map.
const (
	addressesSet = "addresses"
	marksSet     = "marks"
	askedSet     = "asked_"
)

// Registers of 32 bits, side by side, for keys and values of sets.
const firstOf32 = 8

// replies is what one of the tables consists of. IPv4 and IPv6 differ in sizes and places.
type replies struct {
	family nftables.TableFamily
	addr   nftables.SetDatatype
	csumAt uint32     // where the header has its checksum
	any    netip.Addr // one of the family
}

var bothReplies = []replies{
	{nftables.TableFamilyIPv4, nftables.TypeIPAddr, 10, netip.IPv4Unspecified()},
	// IPv6 has none. Without one google/nftables cannot say that UDP has, so it is in the source, which the kernel writes after it.
	{nftables.TableFamilyIPv6, nftables.TypeIP6Addr, 8, netip.IPv6Unspecified()},
}

// SyncReplies makes the tables of replies what all says, each in one transaction; without an address of a family there is no table of
// it. It reports whether something was another.
func SyncReplies(all Replies) (changed bool, err error) {
	c, err := open()
	if len(all) == 0 && noTables(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var errs []error
	for _, r := range bothReplies {
		of := maps.Clone(all)
		maps.DeleteFunc(of, func(addr netip.Addr, _ uint32) bool { return addr.BitLen() != r.any.BitLen() })
		one, err := r.sync(c, of)
		changed = changed || one
		if err != nil {
			errs = append(errs, fmt.Errorf("nftables table %s (the kernel needs nf_tables, nft_ct and, from Linux 5.11 on, nft_socket): %w", RepliesName, err))
		}
	}
	return changed, errors.Join(errs...)
}

// RepliesOf are the addresses that the tables of replies have.
func RepliesOf() (map[netip.Addr]bool, error) {
	c, err := open()
	if err != nil {
		return nil, err
	}
	all := make(map[netip.Addr]bool)
	for _, r := range bothReplies {
		have, sound, err := r.elements(c, &nftables.Table{Name: RepliesName, Family: r.family})
		if err != nil {
			return nil, err
		}
		if !sound {
			continue
		}
		for key := range have[0] {
			addr, _ := netip.AddrFromSlice([]byte(key)) // not valid: nobody asks for it
			all[addr] = true
		}
	}
	return all, nil
}

func (r replies) sync(c *nftables.Conn, want Replies) (changed bool, err error) {
	table := &nftables.Table{Name: RepliesName, Family: r.family}
	chains := r.chains(want)
	texts, found, err := comments(c, table, chains)
	if len(want) == 0 && (noTables(err) || err == nil && !found) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	have, sound, err := r.elements(c, table)
	if err != nil {
		return false, err
	}
	if len(want) > 0 && sound && found && slices.Equal(texts, wanted(chains)) && slices.EqualFunc(have, r.wantedElements(want), maps.Equal) {
		return false, nil
	}
	c.AddTable(table) // else there may be none to delete
	if len(want) == 0 || !sound {
		c.DelTable(table)
		have = nil
	}
	if len(want) > 0 {
		err = r.write(c, table, have, want)
	}
	if err == nil {
		err = c.Flush()
	}
	return err == nil, err
}

// noTables reports whether an error says that the kernel has no nf_tables, or none of the family.
func noTables(err error) bool {
	return slices.ContainsFunc([]error{unix.EINVAL, unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT}, func(no error) bool { return errors.Is(err, no) })
}

// sets are those that hold all addresses, and all marks.
func (r replies) sets(table *nftables.Table) []*nftables.Set {
	return []*nftables.Set{
		{Table: table, Name: addressesSet, KeyType: r.addr},
		{Table: table, Name: marksSet, KeyType: nftables.TypeMark, KeyByteOrder: binaryutil.NativeEndian},
	}
}

// asked is the set of who has asked an address: by which address and port, at which port.
func (r replies) asked(table *nftables.Table, addr netip.Addr) *nftables.Set {
	kind, _ := nftables.ConcatSetType(r.addr, nftables.TypeInetService, nftables.TypeInetService) // fails for more than five
	return &nftables.Set{Table: table, Name: askedOf(addr), KeyType: kind, Dynamic: true, HasTimeout: true, Timeout: askedFor, Size: askedMax}
}

func askedOf(addr netip.Addr) string { return askedSet + hex.EncodeToString(addr.AsSlice()) }

// elements are the keys of a set.
type elements map[string]bool

// wantedElements are those of the sets.
func (r replies) wantedElements(want Replies) []elements {
	addresses, marks := make(elements), make(elements)
	for addr, mark := range want {
		addresses[string(addr.AsSlice())] = true
		marks[string(binary.NativeEndian.AppendUint32(nil, mark))] = true
	}
	return []elements{addresses, marks}
}

// elements reads those of the sets. sound reports whether the sets are there.
func (r replies) elements(c *nftables.Conn, table *nftables.Table) (have []elements, sound bool, err error) {
	for _, set := range r.sets(table) {
		is, err := c.GetSetByName(table, set.Name)
		if errors.Is(err, os.ErrNotExist) || err == nil && (is.KeyType.Bytes != set.KeyType.Bytes || is.IsMap || is.HasTimeout || is.Dynamic) {
			return nil, false, nil
		}
		if err != nil {
			return nil, false, fmt.Errorf("read the set %s: %w", set.Name, err)
		}
		all, err := c.GetSetElements(set)
		if err != nil {
			return nil, false, fmt.Errorf("read the set %s: %w", set.Name, err)
		}
		of := make(elements)
		for _, e := range all {
			of[string(e.Key)] = true
		}
		have = append(have, of)
	}
	return have, true, nil
}

// write makes sets and rules want, in a table that has some of them, or none if have is nil. Who asked an address stays known as long as it
// is among them.
func (r replies) write(c *nftables.Conn, table *nftables.Table, have []elements, want Replies) (err error) {
	sets := r.sets(table)
	if have == nil {
		c.AddTable(table)
		for _, set := range sets {
			err = errors.Join(err, c.AddSet(set, nil))
		}
		have = make([]elements, len(sets))
	}
	lacking := func(these, others elements) (all []nftables.SetElement) {
		for key := range these {
			if !others[key] {
				all = append(all, nftables.SetElement{Key: []byte(key)})
			}
		}
		return all
	}
	chains := r.chains(want)
	for _, of := range chains {
		c.AddChain(of.in(table)) // one may be missing
		c.FlushChain(of.in(table))
	}
	for _, addr := range want.sorted() {
		err = errors.Join(err, c.AddSet(r.asked(table, addr), nil)) // it may be there
	}
	for i, wanted := range r.wantedElements(want) {
		if old := lacking(have[i], wanted); len(old) > 0 {
			err = errors.Join(err, c.SetDeleteElements(sets[i], old))
		}
		if fresh := lacking(wanted, have[i]); len(fresh) > 0 {
			err = errors.Join(err, c.SetAddElements(sets[i], fresh))
		}
	}
	for key := range have[0] {
		if addr, _ := netip.AddrFromSlice([]byte(key)); want[addr] == 0 && addr.IsValid() {
			c.AddSet(r.asked(table, addr), nil) // else there may be none to delete
			c.DelSet(r.asked(table, addr))
		}
	}
	add(c, table, chains)
	return err
}

// Priorities of the chains: what others drop is not noted, a datagram gets its source before the kernel looks for its flow, and no
// chain of another program sees the mark of a reply, which only rules of routing are for.
const (
	beforeAll   = -500
	beforeFlows = -310
	behindAll   = 500
)

// chains returns the chains of the table.
func (r replies) chains(want Replies) []chain {
	size := r.addr.Bytes / 4
	from, to := places(r.any)
	const asking, answering = "asking", "answering"

	input := chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: behindAll}
	input.add(unmark())
	input.add(isProtocol(unix.IPPROTO_UDP), hasDirection(0), r.isTo(addressesSet), jump(asking))
	output := chain{name: "output", kind: nftables.ChainTypeRoute, hook: nftables.ChainHookOutput, priority: beforeFlows}
	output.add(isProtocol(unix.IPPROTO_UDP), hasNoMark(), isWildcard(), jump(answering))

	addresses := want.sorted()
	ask, answer := chain{name: asking}, chain{name: answering}
	who := func(peer, peersPort, ownPort uint32) []expr.Any {
		return slices.Concat(r.load(firstOf32, peer), port(firstOf32+size, peersPort), port(firstOf32+size+1, ownPort))
	}
	for _, addr := range addresses {
		ask.add(isProtocol(unix.IPPROTO_UDP), r.has(to, addr), who(from, 0, 2),
			[]expr.Any{&expr.Dynset{SrcRegKey: firstOf32, SetName: askedOf(addr), Operation: unix.NFT_DYNSET_OP_UPDATE}}, verdict(expr.VerdictReturn))
		answer.add(isProtocol(unix.IPPROTO_UDP), r.has(from, addr), who(to, 2, 0),
			[]expr.Any{&expr.Lookup{SourceRegister: firstOf32, SetName: askedOf(addr)}}, verdict(expr.VerdictAccept)) // it has the right source
	}
	for _, addr := range addresses {
		answer.add(isProtocol(unix.IPPROTO_UDP), who(to, 2, 0), []expr.Any{
			&expr.Lookup{SourceRegister: firstOf32, SetName: askedOf(addr)},
			&expr.Immediate{Register: register, Data: addr.AsSlice()},
			&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: from, Len: r.addr.Bytes,
				CsumType: expr.CsumTypeInet, CsumOffset: r.csumAt, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR},
		}, verdict(expr.VerdictAccept))
	}

	// nft prints no lookup of the address that a flow was begun with, as far as google/nftables can express it, and aborts: so there is
	// a rule for each. Only replies of flows that were translated to another address come that far.
	published := chain{name: "published"}
	for _, addr := range addresses {
		published.add([]expr.Any{&expr.Ct{Key: expr.CtKeyDST, Direction: 0, Register: register}, &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: addr.AsSlice()}},
			setMark(want[addr]), verdict(expr.VerdictReturn))
	}
	prerouting := chain{name: "prerouting", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: behindAll}
	prerouting.add(hasDirection(1), isTranslated(), hasNoMark(), jump(published.name))
	forward := chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: beforeAll}
	forward.add(unmark())
	return []chain{published, ask, answer, input, output, prerouting, forward}
}

// unmark takes the mark from a reply again.
func unmark() []expr.Any {
	return slices.Concat(hasDirection(1), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
		&expr.Lookup{SourceRegister: register, SetName: marksSet},
	}, setMark(0))
}

func setMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: register, Data: binary.NativeEndian.AppendUint32(nil, mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
	}
}

// isTranslated is for packets of a flow whose first one was translated to another destination.
func isTranslated() []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h
	bits := binary.NativeEndian.AppendUint32(nil, dstNAT)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: bits, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: make([]byte, 4)},
	}
}

// load loads an address of the header.
func (r replies) load(into, from uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: into, Base: expr.PayloadBaseNetworkHeader, Offset: from, Len: r.addr.Bytes}}
}

// port loads a port of UDP.
func port(into, from uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: into, Base: expr.PayloadBaseTransportHeader, Offset: from, Len: 2}}
}

// isTo is for packets to an address of a set.
func (r replies) isTo(set string) []expr.Any {
	_, to := places(r.any)
	return append(r.load(register, to), &expr.Lookup{SourceRegister: register, SetName: set})
}

// has is for packets with an address in a place of the header.
func (r replies) has(place uint32, addr netip.Addr) []expr.Any {
	return append(r.load(register, place), &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: addr.AsSlice()})
}

func isProtocol(protocol byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{protocol}},
	}
}

// hasDirection is for packets of a flow in the direction of its first one, 0, or against it, 1.
func hasDirection(direction byte) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{direction}},
	}
}

// hasNoMark is for packets without any mark: what has one is bound to an uplink, or another program leads it.
func hasNoMark() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: make([]byte, 4)},
	}
}

// isWildcard is for packets of a socket that is bound to no address, and not connected. What the kernel sends itself, as for a
// tunnel, has no socket.
func isWildcard() []expr.Any {
	return []expr.Any{
		&expr.Socket{Key: expr.SocketKeyWildcard, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{1}},
	}
}
