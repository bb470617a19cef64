// Package nat keeps the nftables table of network namespaces: their packets leave by the links that they may use, with the
// address of that link, and neither the networks behind those links nor the namespaces reach anything else through this
// host. It hides google/nftables, and the order in which rules have to stand.
package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// TableName is the name of the table, of family inet.
const TableName = "table-allocator"

// Prefix begins the name of each link to a namespace.
const Prefix = "tav"

// Namespace is what the table says of one namespace.
type Namespace struct {
	Link    string       // this host's link to it
	Uplinks []string     // the links that its packets may leave by
	Ports   []Port       // of this host, that it reaches
	Inside  []netip.Addr // its addresses

	// Own is an address of IPv6 that packets keep on the first of the links; with As they have that prefix instead of theirs.
	// The zero Addr: they have the address of the link.
	Own netip.Addr
	As  netip.Prefix
}

// Port is a port of this host.
type Port struct {
	Protocol string // tcp or udp
	Number   uint16
}

// Ruleset is the content of the table.
type Ruleset struct {
	Namespaces []Namespace
	// Closed are links of this host whose forwarding is for namespaces alone: what arrives there goes to a namespace, as a
	// reply, or nowhere.
	Closed []string
}

// A chain is one chain of the table, and its rules.
type chain struct {
	name     string
	kind     nftables.ChainType // "": packets come by a jump
	hook     *nftables.ChainHook
	priority int
	rules    [][]expr.Any
}

// between is the name of the chain for what a namespace and this host send each other.
const between = "between"

// beforeFilters is the priority of the filters: before those of others, so that what those count is what passes.
const beforeFilters = -10

// chains returns the chains of the table, in the order in which they are added.
func (r Ruleset) chains() []chain {
	both := chain{name: between, rules: exchanged()}
	output := chain{name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: beforeFilters}
	input := chain{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: beforeFilters}
	forward := chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: beforeFilters}
	post := chain{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: 100}
	sources := chain{name: "sources", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPostrouting, priority: 110}
	for _, n := range r.Namespaces {
		for _, addr := range n.Inside {
			input.add(arrivesBy(n.Link), isElsewhere(addr), verdict(expr.VerdictDrop)) // an answer would leave by any link
		}
		for _, p := range n.Ports {
			input.add(arrivesBy(n.Link), isToPort(p), verdict(expr.VerdictAccept))
		}
		input.add(arrivesBy(n.Link), jump(both.name))
		output.add(leavesBy(n.Link), jump(both.name)) // users of this host do not reach services in a namespace
		for _, uplink := range n.Uplinks {
			forward.add(arrivesBy(n.Link), leavesBy(uplink), verdict(expr.VerdictAccept))
		}
		forward.add(arrivesBy(n.Link), verdict(expr.VerdictDrop))
		forward.add(leavesBy(n.Link), isReply(), verdict(expr.VerdictAccept))
		forward.add(leavesBy(n.Link), verdict(expr.VerdictDrop))
		// While the link is down, or has gone, main leads replies to the other uplink, and what this host says of them.
		for _, addr := range n.Inside {
			forward.add(isTo(addr), verdict(expr.VerdictDrop))
			for _, uplink := range n.Uplinks {
				output.add(leavesBy(uplink), isErrorFor(addr), verdict(expr.VerdictAccept))
			}
			output.add(isErrorFor(addr), verdict(expr.VerdictDrop))
		}
		switch {
		case n.As.IsValid():
			post.add(arrivesBy(n.Link), leavesBy(n.Uplinks[0]), isFrom(alone(n.Own)), translate(n.As))
			sources.add(arrivesBy(n.Link), leavesBy(n.Uplinks[0]), isFrom(n.As), verdict(expr.VerdictAccept))
		case n.Own.IsValid():
			post.add(arrivesBy(n.Link), leavesBy(n.Uplinks[0]), isFrom(alone(n.Own)), verdict(expr.VerdictAccept))
			sources.add(arrivesBy(n.Link), leavesBy(n.Uplinks[0]), isFrom(alone(n.Own)), verdict(expr.VerdictAccept))
		}
		post.add(arrivesBy(n.Link), []expr.Any{&expr.Masq{}})
		sources.add(arrivesBy(n.Link), sourceIsOfAnother(), verdict(expr.VerdictDrop))
	}
	for _, link := range r.Closed {
		forward.add(arrivesBy(link), verdict(expr.VerdictDrop))
	}
	return []chain{both, input, output, forward, post, sources}
}

// in is the chain in a table.
func (c chain) in(table *nftables.Table) *nftables.Chain {
	in := &nftables.Chain{Name: c.name, Table: table, Type: c.kind, Hooknum: c.hook}
	if c.hook != nil {
		in.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(c.priority))
	}
	return in
}

func (c *chain) add(parts ...[]expr.Any) { c.rules = append(c.rules, slices.Concat(parts...)) }

// exchanged is what a namespace and this host may send each other: what IP needs, and replies.
func exchanged() [][]expr.Any {
	rules := [][]expr.Any{slices.Concat(isReply(), verdict(expr.VerdictAccept))}
	for _, t := range []byte{8, 3, 11, 12} { // echo request, unreachable, time exceeded, parameter problem
		rules = append(rules, slices.Concat(isICMP(unix.IPPROTO_ICMP, t), verdict(expr.VerdictAccept)))
	}
	for _, t := range []byte{1, 2, 3, 4, 128, 133, 135, 136} { // the same, packet too big, and neighbours
		rules = append(rules, slices.Concat(isICMP(unix.IPPROTO_ICMPV6, t), verdict(expr.VerdictAccept)))
	}
	return append(rules, verdict(expr.VerdictDrop))
}

// register is where an expression leaves a value for the next one.
const register = 1

func arrivesBy(link string) []expr.Any {
	return isLink(expr.MetaKeyIIFNAME, expr.CmpOpEq, padded(link))
}
func leavesBy(link string) []expr.Any { return isLink(expr.MetaKeyOIFNAME, expr.CmpOpEq, padded(link)) }

func isLink(key expr.MetaKey, op expr.CmpOp, name []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: register}, &expr.Cmp{Op: op, Register: register, Data: name}}
}

// padded is a name as the kernel compares it, whole.
func padded(link string) []byte {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, link)
	return name
}

func isReply() []expr.Any { return hasState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED) }

// isErrorFor is for errors of ICMP about packets to an address, which they quote behind eight bytes of their own.
func isErrorFor(addr netip.Addr) []expr.Any {
	protocol := byte(unix.IPPROTO_ICMPV6)
	if addr.Is4() {
		protocol = unix.IPPROTO_ICMP
	}
	_, to := places(addr)
	return slices.Concat(hasState(expr.CtStateBitRELATED), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{protocol}},
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 8 + to, Len: uint32(addr.BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: addr.AsSlice()},
	})
}

// hasState is for packets whose flow has one of the states.
func hasState(bits uint32) []expr.Any {
	states := binary.NativeEndian.AppendUint32(nil, bits)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: states, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: make([]byte, 4)},
	}
}

func isICMP(protocol, kind byte) []expr.Any {
	return append(isProtocol(protocol),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{kind}},
	)
}

func isToPort(p Port) []expr.Any {
	protocol := byte(unix.IPPROTO_TCP)
	if p.Protocol == "udp" {
		protocol = unix.IPPROTO_UDP
	}
	return append(isProtocol(protocol),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: binary.BigEndian.AppendUint16(nil, p.Number)},
	)
}

// isFamily is for packets of the family of an address.
func isFamily(addr netip.Addr) []expr.Any {
	family := byte(unix.NFPROTO_IPV6)
	if addr.Is4() {
		family = unix.NFPROTO_IPV4
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{family}},
	}
}

// isTo is for packets to an address.
func isTo(addr netip.Addr) []expr.Any {
	_, to := places(addr)
	return slices.Concat(isFamily(addr), []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: to, Len: uint32(addr.BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: addr.AsSlice()},
	})
}

// isElsewhere is for packets of the family of an address with another source, which in IPv6 is not one of the link alone.
func isElsewhere(addr netip.Addr) []expr.Any {
	from, _ := places(addr)
	source := &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: from, Len: uint32(addr.BitLen() / 8)}
	parts := append(isFamily(addr), source, &expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: addr.AsSlice()})
	if addr.Is6() {
		parts = append(parts,
			&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 16, Mask: net.CIDRMask(10, 128), Xor: make([]byte, 16)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: netip.MustParseAddr("fe80::").AsSlice()})
	}
	return parts
}

// places are where the header has the source and the destination.
func places(addr netip.Addr) (from, to uint32) {
	if addr.Is4() {
		return 12, 16
	}
	return 8, 24
}

// alone is the prefix that has one address.
func alone(addr netip.Addr) netip.Prefix { return netip.PrefixFrom(addr, addr.BitLen()) }

// isFrom is for packets of IPv6 with a source in a prefix.
func isFrom(p netip.Prefix) []expr.Any {
	from, _ := places(p.Addr())
	return slices.Concat(isFamily(p.Addr()), []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: from, Len: 16},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 16, Mask: net.CIDRMask(p.Bits(), 128), Xor: make([]byte, 16)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: p.Masked().Addr().AsSlice()},
	})
}

// sourceIsOfAnother is for packets whose source is no address of the link that they leave by. A link that has lost its
// addresses makes masquerading take one of another link.
func sourceIsOfAnother() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: register, FlagSADDR: true, FlagOIF: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)},
	}
}

// translate gives packets the prefix instead of theirs, and replies theirs again (RFC 6296, but with a table of flows).
func translate(prefix netip.Prefix) []expr.Any {
	const first, last = 1, 2
	from, to := prefix.Masked().Addr().As16(), prefix.Masked().Addr().As16()
	for bit := prefix.Bits(); bit < 128; bit++ {
		to[bit/8] |= 0x80 >> (bit % 8)
	}
	return []expr.Any{
		&expr.Immediate{Register: first, Data: from[:]},
		&expr.Immediate{Register: last, Data: to[:]},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV6, RegAddrMin: first, RegAddrMax: last, Prefix: true},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }
func jump(to string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: to}}
}

// Sync makes the table be what r says, in one transaction; without namespaces and links there is no table. Flows that are
// open go on. It reports whether the table was another one.
func Sync(r Ruleset) (changed bool, err error) {
	c, err := open()
	if err != nil {
		return false, err
	}
	var chains []chain
	if len(r.Namespaces) > 0 || len(r.Closed) > 0 {
		chains = r.chains()
	}
	table := &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
	have, found, err := comments(c, table, Ruleset{}.chains())
	if err != nil || found == (len(chains) > 0) && slices.Equal(have, wanted(chains)) {
		return false, err
	}
	c.AddTable(table) // else there may be none to delete
	c.DelTable(table)
	if len(chains) > 0 {
		add(c, table, chains)
	}
	if err := c.Flush(); err != nil {
		return false, fmt.Errorf("change nftables table inet %s (the kernel needs nf_tables, nft_masq, nft_ct and nft_fib_inet): %w", TableName, err)
	}
	return true, nil
}

// answers is room for the kernel's answers to the largest transaction, in bytes: it repeats each of some 2,000 rules.
const answers = 16 << 20

func open() (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithSockOptions(func(conn *netlink.Conn) error { return conn.SetReadBuffer(answers) }))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return c, nil
}

func add(c *nftables.Conn, table *nftables.Table, chains []chain) {
	c.AddTable(table)
	texts := wanted(chains)
	for _, of := range chains {
		to := of.in(table)
		c.AddChain(to)
		for _, exprs := range of.rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: to, Exprs: exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, texts[0])})
			texts = texts[1:]
		}
	}
}

// wanted are the comments of the rules of chains. By them Sync knows the table again: what the kernel tells of an
// expression is not always what it was told.
func wanted(chains []chain) []string {
	sum := fnv.New64a()
	for _, c := range chains {
		for _, exprs := range c.rules {
			for _, e := range exprs {
				fmt.Fprintf(sum, "%s %T %+v\n", c.name, e, e)
			}
		}
	}
	var texts []string
	for _, c := range chains {
		for i := range c.rules {
			texts = append(texts, fmt.Sprintf("%s %s %d %x", TableName, c.name, i, sum.Sum64()))
		}
	}
	return texts
}

// comments reads the comments of the rules of a table in chains, by their names, and whether there is one of these.
func comments(c *nftables.Conn, table *nftables.Table, of []chain) (texts []string, found bool, err error) {
	chains, err := c.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return nil, false, fmt.Errorf("list nftables chains: %w", err)
	}
	all, err := ruleComments(table)
	if err != nil {
		return nil, false, fmt.Errorf("list nftables rules: %w", err)
	}
	for _, one := range of {
		if slices.ContainsFunc(chains, func(o *nftables.Chain) bool { return o.Table.Name == table.Name && o.Name == one.name }) {
			found = true
			texts = append(texts, all[one.name]...)
		}
	}
	return texts, found, nil
}

// ruleComments reads the comments of the rules of a table, by their chains. google/nftables would read the expressions, too, and fails for
// some that it can write.
func ruleComments(table *nftables.Table) (map[string][]string, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(table.Name), 0)}})
	if err != nil {
		return nil, err
	}
	header := netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump}
	rules, err := c.Execute(netlink.Message{Header: header, Data: append([]byte{byte(table.Family), unix.NFNETLINK_V0, 0, 0}, attrs...)})
	if err != nil && !errors.Is(err, os.ErrNotExist) { // it may have been deleted since
		return nil, err
	}
	all := make(map[string][]string)
	for _, r := range rules {
		const family = 4 // bytes, before the attributes
		attrs, err := netlink.NewAttributeDecoder(r.Data[min(family, len(r.Data)):])
		if err != nil {
			return nil, err
		}
		var in, chain, text string
		for attrs.Next() {
			switch attrs.Type() {
			case unix.NFTA_RULE_TABLE:
				in = attrs.String()
			case unix.NFTA_RULE_CHAIN:
				chain = attrs.String()
			case unix.NFTA_RULE_USERDATA:
				text, _ = userdata.GetString(attrs.Bytes(), userdata.TypeComment)
			}
		}
		if err := attrs.Err(); err != nil {
			return nil, err
		}
		if in == table.Name {
			all[chain] = append(all[chain], text)
		}
	}
	return all, nil
}

// A Watcher hears of changes of any table of this network namespace.
type Watcher struct{ file *os.File }

// Watch subscribes to changes.
func Watch() (*Watcher, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
		if err != nil {
			_ = unix.Close(fd) // err is what went wrong
		}
	}
	if err != nil {
		return nil, fmt.Errorf("watch nftables: %w", err)
	}
	return &Watcher{os.NewFile(uintptr(fd), "nftables")}, nil
}

// Next waits for changes. What they were it does not say. After Close the error is os.ErrClosed.
func (w *Watcher) Next() error {
	buf := make([]byte, 1<<16)
	_, err := w.file.Read(buf)
	if errors.Is(err, unix.ENOBUFS) { // some were lost, which is a change, too
		return nil
	}
	return err
}

// Close ends the subscription, and a Next that waits.
func (w *Watcher) Close() error { return w.file.Close() }
