package route

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Actions of a Rule. Lookup is the zero value; the others are the kernel's numbers.
const (
	Lookup      = 0
	Goto        = nl.FR_ACT_GOTO
	Nop         = nl.FR_ACT_NOP // goes on with the next rule: it only says something
	Blackhole   = nl.FR_ACT_BLACKHOLE
	Unreachable = nl.FR_ACT_UNREACHABLE
	Prohibit    = nl.FR_ACT_PROHIBIT
)

const (
	flagInvert = 0x02 // FIB_RULE_INVERT
	// FIB_RULE_UNRESOLVED and the two DETACHED: what became of a rule, not what it is.
	flagsState = 0x04 | 0x08 | 0x10

	noSuppress = ^uint32(0) // FRA_SUPPRESS_PREFIXLEN of a rule without one
	maxLength  = 128        // of a prefix
)

var errUnsettled = errors.New("another program undoes the change or holds an equal rule")

// Rule is one policy rule, `ip rule`. Whatever tells it from other rules is in one of the fields, so
// rules compare with ==. That a link it names is missing ("[detached]") is not part of it.
type Rule struct {
	Priority uint32
	Flags    uint32       // FIB_RULE_*: 2 inverts the selector ("not")
	Src, Dst netip.Prefix // the zero Prefix is "all"; host bits are kept and tell rules apart
	Oif      string
	Traffic
	Action uint8  // Lookup, or one without a table
	Table  uint32 // the whole number, above 255 too
	Goto   uint32 // the priority where the lookup goes on, for the action Goto
	// MinLength is one more than suppress_prefixlength: where the longest match of the table is
	// shorter, the lookup goes on with the next rule. 1 leaves out default routes, 0 nothing.
	// Error routes (blackhole, unreachable, prohibit) count whatever their length.
	MinLength uint8
	Protocol  uint8 // who made the rule: Protocol for ours, 0 where it is not said
	// Other is what else the kernel told, as sorted "name=hex" words: a TOS, realms, a tunnel.
	// A rule that has it can be deleted, but not be wanted.
	Other string
}

// String returns the rule as `ip rule` prints it, with one space for the tab, numbers for
// protocols and Other in brackets: "10000: from 192.0.2.5 lookup 10000 proto 116".
func (r Rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d: ", r.Priority)
	if r.Flags&flagInvert != 0 {
		b.WriteString("not ")
	}
	b.WriteString("from " + selector(r.Src))
	if r.Dst.IsValid() {
		b.WriteString(" to " + selector(r.Dst))
	}
	first := Traffic{Iif: r.Iif, Mark: r.Mark, Mask: r.Mask} // `ip` has links in the middle
	rest := r.Traffic
	rest.Iif, rest.Mark, rest.Mask = "", 0, 0
	if first != (Traffic{}) {
		b.WriteString(" " + first.String())
	}
	if r.Oif != "" {
		b.WriteString(" oif " + r.Oif)
	}
	if rest != (Traffic{}) {
		b.WriteString(" " + rest.String())
	}
	switch r.Action {
	case Lookup:
		b.WriteString(" lookup " + tableName(r.Table))
	case Goto:
		fmt.Fprintf(&b, " goto %d", r.Goto)
	case Nop:
		b.WriteString(" nop")
	case Blackhole:
		b.WriteString(" blackhole")
	case Unreachable:
		b.WriteString(" unreachable")
	case Prohibit:
		b.WriteString(" prohibit")
	default:
		fmt.Fprintf(&b, " action %d", r.Action)
	}
	if r.MinLength > 0 {
		fmt.Fprintf(&b, " suppress_prefixlength %d", r.MinLength-1)
	}
	if r.Protocol != unix.RTPROT_UNSPEC && r.Protocol != unix.RTPROT_KERNEL {
		fmt.Fprintf(&b, " proto %d", r.Protocol)
	}
	if r.Other != "" {
		b.WriteString(" [" + r.Other + "]")
	}
	return b.String()
}

func selector(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return "all"
	case p.IsSingleIP():
		return p.Addr().String()
	}
	return p.String()
}

func tableName(table uint32) string {
	switch table {
	case unix.RT_TABLE_DEFAULT:
		return "default"
	case unix.RT_TABLE_MAIN:
		return "main"
	case unix.RT_TABLE_LOCAL:
		return "local"
	}
	return strconv.FormatUint(uint64(table), 10)
}

// check returns why r cannot be installed in family, nil if it can.
func (r Rule) check(family int) error {
	bits := 32
	if family == unix.AF_INET6 {
		bits = 128
	}
	for _, p := range []netip.Prefix{r.Src, r.Dst} {
		// The kernel has no 0.0.0.0/0 in a rule: it would come back as "all", and be another rule.
		if p.IsValid() && (p.Addr().BitLen() != bits || p.Bits() == 0 || p.Addr().Zone() != "") {
			return fmt.Errorf("%v is no selector of this family", p)
		}
	}
	switch {
	case (r.Action == Lookup) != (r.Table != 0):
		// Asked to look up table 0 the kernel picks an empty one by itself.
		return errors.New("a lookup needs a table, any other action has none")
	case (r.Action == Goto) != (r.Goto != 0):
		return errors.New("a goto needs a priority, any other action has none")
	case r.Other != "" || r.Flags&^flagInvert != 0:
		return errors.New("has attributes that we cannot write")
	}
	return r.Traffic.Check()
}

// encode returns r as struct fib_rule_hdr and attributes. What it leaves out means none when the
// message adds, but any when it deletes.
func (r Rule) encode(family int) []byte {
	action := r.Action
	if action == Lookup {
		action = nl.FR_ACT_TO_TBL
	}
	// The header has one byte for the table, which cannot hold ours: the attribute goes first.
	b := []byte{byte(family), byte(max(r.Dst.Bits(), 0)), byte(max(r.Src.Bits(), 0)), 0, unix.RT_TABLE_UNSPEC, 0, 0, action}
	b = native.AppendUint32(b, r.Flags)
	b = appendUint32(b, unix.FRA_PRIORITY, r.Priority)
	b = appendUint32(b, unix.FRA_TABLE, r.Table)
	b = appendAttribute(b, unix.FRA_PROTOCOL, []byte{r.Protocol})
	if r.Src.IsValid() {
		b = appendAttribute(b, unix.FRA_SRC, r.Src.Addr().AsSlice())
	}
	if r.Dst.IsValid() {
		b = appendAttribute(b, unix.FRA_DST, r.Dst.Addr().AsSlice())
	}
	if r.Oif != "" {
		b = appendAttribute(b, unix.FRA_OIFNAME, append([]byte(r.Oif), 0))
	}
	b = r.Traffic.append(b)
	if r.Goto != 0 {
		b = appendUint32(b, unix.FRA_GOTO, r.Goto)
	}
	if r.MinLength > 0 {
		b = appendUint32(b, unix.FRA_SUPPRESS_PREFIXLEN, uint32(r.MinLength)-1)
	}
	return b
}

// otherNames are attributes that a Rule has no field for (linux/fib_rules.h).
var otherNames = map[uint16]string{
	unix.FRA_FWMARK: "fwmark", unix.FRA_FWMASK: "fwmask", unix.FRA_FLOW: "realms",
	unix.FRA_TUN_ID: "tun_id", unix.FRA_SUPPRESS_IFGROUP: "suppress_ifgroup", unix.FRA_SUPPRESS_PREFIXLEN: "suppress_prefixlength",
	unix.FRA_L3MDEV: "l3mdev", unix.FRA_UID_RANGE: "uidrange", unix.FRA_IP_PROTO: "ipproto", unix.FRA_SPORT_RANGE: "sport",
	unix.FRA_DPORT_RANGE: "dport",
	25:                   "dscp", 26: "flowlabel", 27: "flowlabel_mask", fraSportMask: "sport_mask", fraDportMask: "dport_mask", 30: "dscp_mask", // Linux 6.13 to 6.15
}

// parseRule reads the body of an RTM_NEWRULE or RTM_DELRULE.
func parseRule(b []byte) (Rule, error) {
	if len(b) < unix.SizeofRtMsg {
		return Rule{}, errMalformed
	}
	r := Rule{
		Flags:  native.Uint32(b[8:]) &^ flagsState,
		Table:  uint32(b[4]),
		Action: b[7],
	}
	if r.Action == nl.FR_ACT_TO_TBL {
		r.Action = Lookup
	}
	var other []string
	if b[3] != 0 {
		other = append(other, fmt.Sprintf("tos=%x", b[3]))
	}
	var bad bool
	prefix := func(value []byte, bits byte) netip.Prefix {
		addr, _ := netip.AddrFromSlice(value)
		p := netip.PrefixFrom(addr, int(bits))
		bad = bad || !p.IsValid()
		return p
	}
	err := eachAttribute(b[unix.SizeofRtMsg:], func(typ uint16, value []byte) {
		switch typ {
		case unix.FRA_UNSPEC, unix.FRA_PAD:
		case unix.FRA_PRIORITY:
			r.Priority = uint32Of(value)
		case unix.FRA_TABLE:
			r.Table = uint32Of(value)
		case unix.FRA_PROTOCOL:
			if len(value) > 0 {
				r.Protocol = value[0]
			}
		case unix.FRA_SRC:
			r.Src = prefix(value, b[2])
		case unix.FRA_DST:
			r.Dst = prefix(value, b[1])
		case unix.FRA_OIFNAME:
			r.Oif = unix.ByteSliceToString(value)
		case unix.FRA_GOTO:
			r.Goto = uint32Of(value)
		default:
			if typ == unix.FRA_SUPPRESS_PREFIXLEN && uint32Of(value) == noSuppress {
				return
			}
			if typ == unix.FRA_SUPPRESS_PREFIXLEN && uint32Of(value) < maxLength {
				r.MinLength = uint8(uint32Of(value) + 1)
				return
			}
			if r.Traffic.take(typ, value) {
				return
			}
			name, ok := otherNames[typ]
			if !ok {
				name = fmt.Sprintf("attribute%d", typ)
			}
			other = append(other, fmt.Sprintf("%s=%x", name, value))
		}
	})
	if bad {
		err = errMalformed
	}
	slices.Sort(other)
	r.Other = strings.Join(other, " ")
	return r, err
}

// kernelRule is a rule as the kernel told it.
type kernelRule struct {
	Rule
	// raw is its message. Sent back it names every attribute the kernel has, also those that a
	// Rule does not: nothing else deletes or restores it as exactly.
	raw []byte
}

// hits reports whether a request to delete d may delete r: what d does not have matches anything,
// and the flags are not looked at (fib_rules.c, rule_find).
func (d Rule) hits(r Rule) bool {
	words := strings.Fields(r.Other)
	for _, w := range strings.Fields(d.Other) {
		if !slices.Contains(words, w) {
			return false
		}
	}
	return d.Priority == r.Priority && d.Action == r.Action &&
		(d.Table == 0 || d.Table == r.Table) &&
		(d.Goto == 0 || d.Goto == r.Goto) &&
		(d.Protocol == 0 || d.Protocol == r.Protocol) &&
		(!d.Src.IsValid() || d.Src == r.Src) &&
		(!d.Dst.IsValid() || d.Dst == r.Dst) &&
		(d.Oif == "" || d.Oif == r.Oif) &&
		d.Traffic.hits(r.Traffic) &&
		(d.MinLength == 0 || d.MinLength == r.MinLength)
}

// Rules returns the rules of family, AF_INET or AF_INET6, in the kernel's order. A kernel that
// does not have the family has no rules.
func (c *Conn) Rules(family int) ([]Rule, error) {
	return c.RulesWhere(family, nil)
}

// RulesWhere is Rules without those that keep, which is asked several times, does not want; nil wants all.
func (c *Conn) RulesWhere(family int, keep func(*Rule) bool) ([]Rule, error) {
	have, err := c.dumpRules(family, keep)
	if err != nil {
		return nil, err
	}
	wanted := func(k *kernelRule) bool { return keep == nil || keep(&k.Rule) }
	kept := 0
	for i := range have {
		if wanted(&have[i]) {
			kept++
		}
	}
	rules := make([]Rule, 0, kept) // growing costs more than asking twice
	for i := range have {
		if wanted(&have[i]) {
			rules = append(rules, have[i].Rule)
		}
	}
	return rules, nil
}

// dumpRules reads the rules until it has done so undisturbed. A dump comes in parts of some dozens,
// the next one begins at a position, and unlike with addresses and routes the kernel does not say
// that the list changed in between: a rule may be missing. So a socket listens meanwhile. Where
// there is never a quiet moment the result is all that was seen, since a rule that stood through
// so many dumps was in one of them. Those that keep does not want may be left out; nil wants all.
func (c *Conn) dumpRules(family int, keep func(*Rule) bool) ([]kernelRule, error) {
	group := unix.RTNLGRP_IPV4_RULE
	switch family {
	case unix.AF_INET:
	case unix.AF_INET6:
		group = unix.RTNLGRP_IPV6_RULE
	default:
		return nil, fmt.Errorf("list rules of family %d: %w", family, unix.EAFNOSUPPORT)
	}
	dump := func() (have []kernelRule, quiet bool, err error) {
		var seen []kernelRule
		quiet, err = c.undisturbed(group, func() (err error) {
			seen = append(seen, have...)
			have, err = c.dumpRulesOnce(family, keep)
			return err
		})
		if err != nil {
			return nil, false, fmt.Errorf("list rules: %w", err)
		}
		if !quiet {
			have = merge(have, seen)
		}
		return have, quiet, nil
	}
	if c.snapshot != nil {
		keep = nil // all of them are remembered
		return c.snapshot.read(family, dump)
	}
	have, _, err := dump()
	return have, err
}

func (c *Conn) dumpRulesOnce(family int, keep func(*Rule) bool) ([]kernelRule, error) {
	header := make([]byte, unix.SizeofRtMsg)
	header[0] = byte(family)
	msgs, err := c.dump(unix.RTM_GETRULE, unix.RTM_NEWRULE, header)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var have []kernelRule
	if keep == nil {
		have = make([]kernelRule, 0, len(msgs))
	}
	for _, m := range msgs {
		r, err := parseRule(m)
		if err != nil {
			return nil, err
		}
		if keep == nil || keep(&r) {
			native.PutUint32(m[8:], native.Uint32(m[8:])&^flagsState)
			have = append(have, kernelRule{r, m})
		}
	}
	return have, nil
}

// merge returns what is in have or in seen, once: an interrupted dump may also repeat rules.
func merge(have, seen []kernelRule) []kernelRule {
	known := make(map[Rule]bool, len(have))
	var all []kernelRule
	for _, r := range slices.Concat(have, seen) {
		if !known[r.Rule] {
			known[r.Rule] = true
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b kernelRule) int { return cmp.Compare(a.Priority, b.Priority) })
	return all
}
