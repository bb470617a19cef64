// Package wire is the protocol between table-allocator-server, its clients and the
// holders of leases: one JSON object per datagram over abstract unix sockets, version 1.
//
// It hides what goes over the wire and how: the bytes of requests and replies and their
// bounds, the two forms of an abstract name, peers that must be answered with the raw
// bytes of their address, SCM_CREDENTIALS, batches of datagrams, and the clock in which
// leases are measured. PROTOCOL.md, beside this file, describes it for other programs.
package wire

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"sync"
	"unicode"
	"unicode/utf8"
)

// Version is the only version of the protocol.
const Version = 1

// Bounds of the protocol, in bytes.
const (
	MaxRequest = 512      // a request to the server
	MaxReply   = 254      // a reply: clients of the original read no more
	MaxReplace = 64 << 10 // a Replace, which goes to a holder and not to the server
	MaxAddress = 45
	MaxIfname  = 15
	MaxTag     = 127
	expiresMax = 1 << 33 // seconds: in nanoseconds, the lease clock is an int64
	tableMax   = 1<<32 - 1
)

// Family is an address family with the number that Linux gives it.
type Family uint8

// The families that tables are leased for. Unspec leases a number for any identifier.
const (
	Unspec Family = 0
	Inet   Family = 2
	Inet6  Family = 10
)

var familyNames = map[Family]string{Unspec: "unspec", Inet: "inet", Inet6: "inet6"}

func (f Family) String() string {
	if name, ok := familyNames[f]; ok {
		return name
	}
	return "family " + strconv.Itoa(int(f))
}

// Command is what a message asks for.
type Command int

// The commands. The server serves Acquire, Release, Mark and Health; the holder of a lease, at the
// name of its key, serves Query, Replace, End and Reexec.
const (
	Acquire  Command = 0 // ask for a lease, or renew it
	Release  Command = 1
	Response Command = 2  // a reply; never answered
	Mark     Command = 16 // which mark has an interface?
	Query    Command = 17 // which table is in force?
	Replace  Command = 18 // take over what a newer call was told
	End      Command = 19 // take everything back and exit
	Reexec   Command = 20 // execute the installed program, and keep everything
	Health   Command = 21 // how stand the server and its pool of a family?
)

// Code names the reason of a refusal for programs.
type Code string

// The codes of refusals.
const (
	Malformed Code = "malformed"  // the request breaks the protocol
	Denied    Code = "denied"     // the sender may not ask for this
	NotServed Code = "not-served" // the family is switched off
	Exhausted Code = "exhausted"  // no table, or no mark, is free now
	Storage   Code = "storage"    // the database cannot be written now, or the groups of the sender cannot be looked up
	Ending    Code = "ending"     // the holder is taking everything back
	Mismatch  Code = "wrong-key"  // the holder holds another key
)

// Final reports whether it is useless to ask again later.
func (c Code) Final() bool {
	return c == Malformed || c == Denied || c == NotServed
}

// Key is what a lease is for. Address is canonical text once it has passed Canonical.
type Key struct {
	Family  Family
	Ifname  string
	Address string
}

// String is IFNAME-ADDRESS-FAMILY. The holder of a key answers at the padded name of this text.
func (k Key) String() string { return k.Ifname + "-" + k.Address + "-" + strconv.Itoa(int(k.Family)) }

// Canonical returns the key with its address in the form in which addresses are compared, or an error that
// says which bound the key breaks.
func (k Key) Canonical() (Key, error) {
	if err := checkText("ifname", k.Ifname, 1, MaxIfname); err != nil {
		return k, err
	}
	if err := checkText("address", k.Address, 1, MaxAddress); err != nil {
		return k, err
	}
	switch k.Family {
	case Unspec:
		return k, nil
	case Inet, Inet6:
	default:
		return k, fmt.Errorf("addr_family %d: want 2, 10 or 0", k.Family)
	}
	addr, err := netip.ParseAddr(k.Address)
	switch {
	case err != nil:
		return k, fmt.Errorf("address %q: not an address", k.Address)
	case addr.Is4In6():
		return k, fmt.Errorf("address %q: %s", k.Address, Mapped(addr))
	case addr.Zone() != "":
		return k, fmt.Errorf("address %q: want it without its zone, since ifname says the link", k.Address)
	case addr.Is4() != (k.Family == Inet):
		return k, fmt.Errorf("address %q: not an address of family %s", k.Address, k.Family)
	}
	var buf [MaxAddress]byte
	if text := addr.AppendTo(buf[:0]); string(text) != k.Address { // mostly it is canonical
		k.Address = string(text)
	}
	return k, nil
}

// Mapped says what to give instead of an IPv4 address that is written as one of IPv6; empty: addr is none.
func Mapped(addr netip.Addr) string {
	if !addr.Is4In6() {
		return ""
	}
	return fmt.Sprintf("this is IPv4, written as IPv6: want %s", addr.Unmap())
}

// CheckTag returns an error that says which bound a tag breaks.
func CheckTag(tag string) error { return checkText("tag", tag, 0, MaxTag) }

// checkText refuses text that would break a line of a log, or that a C program would cut at a NUL.
func checkText(key, s string, least, most int) error {
	if len(s) < least || len(s) > most {
		return fmt.Errorf("%s: %d bytes, want %d to %d", key, len(s), least, most)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%s: not UTF-8", key)
	}
	for _, r := range s {
		if unicode.IsControl(r) {
			return fmt.Errorf("%s: contains the control character %U", key, r)
		}
	}
	return nil
}

// Marking binds traffic to an interface: the bits of a socket's mark that do so, and the priorities of the
// rules for them. The zero Marking is none.
type Marking struct {
	Mark     uint32 // within Mask, without its lowest bit. With that bit the traffic may use Fallback
	Mask     uint32
	Block    uint32 // priority of lookups for traffic that uses no other uplink; the block rule has the next one
	Fallback uint32 // priority of lookups for traffic that may use another uplink; its nop rule has the next one
}

// ReplyMark is the mark, in all of its bits, of a reply that is forwarded and has to leave by a table. Its highest byte is that of no Marking
// with the default mask, and the two below are those that other programs use least.
func ReplyMark(table uint32) uint32 {
	const kind, numbers = 0x01000000, 0x00ffffff
	return kind | table&numbers
}

// Request is a message to the server or to a holder. A Mark has no address and no family, a Health no address and
// AnyInterface.
type Request struct {
	Key
	Tag      string
	Cmd      Command
	Want     uint32  // the table to lease rather than another, in an Acquire only; 0: any
	Marks    bool    // in an Acquire: the reply may have a Marking
	Left     bool    // in an Acquire: the reply may say how long the lease lasts
	Known    bool    // in a Mark: do not choose one for an interface that has none
	Priority uint32  // in a Mark that is Known, for AnyInterface: of lookups of the interface; 0: it is not asked for
	Marking  Marking // in a Query: serve the traffic that is bound with it; in an Acquire: the interface had it
	Settings string  // a JSON object, in a Replace only
}

// AnyInterface is the name of no interface.
const AnyInterface = "."

// Append appends the datagram for r to b: the original's keys in the original's order.
func (r Request) Append(b []byte) []byte {
	o := object(append(b, '{'))
	if r.Cmd != Mark && r.Cmd != Health {
		o.text("address", r.Address)
	}
	o.text("ifname", r.Ifname)
	if r.Cmd != Mark {
		o.someText("tag", r.Tag)
		o.number("addr_family", int64(r.Family))
	}
	o.number("cmd", int64(r.Cmd))
	o.number("version", Version)
	if r.Known && r.Cmd == Mark {
		o.number("known", 1)
		o.some("priority", int64(r.Priority))
	}
	if r.Cmd == Mark || r.Cmd == Health {
		return append(o, '}')
	}
	o.some("want", int64(r.Want))
	if r.Marks {
		o.number("marks", 1)
	}
	if r.Left {
		o.number("lease_left", 1)
	}
	o.marking(r.Marking)
	if r.Settings != "" {
		o.name("settings")
		o = append(o, r.Settings...)
	}
	return append(o, '}')
}

// check returns an error that says what is wrong with a Marking of a datagram.
func (m Marking) check() error {
	const last = 32765 // the rule of table main follows
	lowest := m.Mask & -m.Mask
	switch {
	case m == Marking{}:
	case m.Mark == 0 || m.Mark&^m.Mask != 0 || m.Mark&lowest != 0:
		return fmt.Errorf("mark %#x: want bits of the mask %#x, without the lowest", m.Mark, m.Mask)
	case m.Block == 0 || m.Block >= last || m.Fallback == 0 || m.Fallback >= last || m.Block == m.Fallback:
		return fmt.Errorf("block %d, fallback %d: want two priorities from 1 to %d", m.Block, m.Fallback, last-1)
	}
	return nil
}

// ParseRequest reads exactly the bytes of one datagram, strictly: the keys that a command
// needs are required, types and ranges are checked, other keys are ignored.
// The address comes back in canonical text. With an error Cmd is Response if data looks
// like one, since a Response is never answered, however broken.
func ParseRequest(data []byte) (Request, error) { return ParseRequestText(string(data)) }

// ParseRequestText is ParseRequest for text that the Request may keep parts of.
func ParseRequestText(text string) (Request, error) {
	r, err := parseRequest(text)
	if err != nil && responseLike().MatchString(text) {
		r.Cmd = Response
	}
	return r, err
}

// responseLike finds the member of a response, also in a datagram that is not JSON or that was cut off
// behind it.
var responseLike = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`"cmd"[ \t\r\n]*:[ \t\r\n]*2[ \t\r\n]*[,}]`) })

// requestKeys are those of a request, by number.
var requestKeys = []key{
	0:  {name: "version", required: true, most: 1 << 31},
	1:  {name: "cmd", required: true, most: 255},
	2:  {name: "ifname", required: true},
	3:  {name: "addr_family", required: true, most: 255},
	4:  {name: "address", required: true},
	5:  {name: "tag"},
	6:  {name: "want", most: tableMax},
	7:  {name: "marks", most: 1},
	8:  {name: "known", most: 1},
	9:  {name: "settings"},
	10: {name: "mark", most: tableMax},
	11: {name: "mask", most: tableMax},
	12: {name: "block", most: tableMax},
	13: {name: "fallback", most: tableMax},
	14: {name: "lease_left", most: 1},
	15: {name: "priority", most: tableMax},
}

func parseRequest(text string) (r Request, err error) {
	m := message{keys: requestKeys}
	m.read(text)
	version := m.number(0)
	r.Cmd, r.Key = Command(m.number(1)), Key{Ifname: m.text(2)}
	if r.Cmd == Mark {
		r.Known, r.Priority = m.number(8) != 0, uint32(m.number(15))
		if err := m.check(version, 3); err != nil {
			return r, err
		}
		return r, checkText("ifname", r.Ifname, 1, MaxIfname)
	}
	r.Family = Family(m.number(3))
	if r.Cmd == Health {
		if err := m.check(version, 4); err != nil {
			return r, err
		}
		if _, known := familyNames[r.Family]; !known || r.Ifname != AnyInterface {
			return r, fmt.Errorf("ifname %q, addr_family %d: want %q, and 2, 10 or 0", r.Ifname, r.Family, AnyInterface)
		}
		return r, nil
	}
	r.Address, r.Tag = m.text(4), m.text(5)
	switch r.Cmd {
	case Acquire:
		r.Want, r.Marks, r.Marking = uint32(m.number(6)), m.number(7) != 0, m.marking(10)
		r.Left = m.number(14) != 0
	case Replace:
		r.Settings = m.values[9]
	case Query:
		r.Marking = m.marking(10)
	}
	if err := m.check(version, len(m.keys)); err != nil {
		return r, err
	}
	switch {
	case r.Cmd != Acquire && r.Cmd != Release && r.Cmd != Query && r.Cmd != Replace && r.Cmd != End && r.Cmd != Reexec:
		return r, fmt.Errorf("cmd %d: unknown", r.Cmd)
	case r.Settings != "" && r.Settings[0] != '{':
		return r, errors.New("settings: not an object")
	}
	if err := CheckTag(r.Tag); err != nil {
		return r, err
	}
	r.Key, err = r.Canonical()
	return r, err
}

// Reply answers a request.
type Reply struct {
	Table   uint32 // 0: no lease
	Expires int64  // lease clock, seconds; 0 without a lease
	Left    int64  // seconds, for clients whose clock is another one; 0: not said
	Error   string // why there is no lease, for people
	Code    Code   // why there is no lease, for programs
	PID     int    // in a holder's replies: its process
	Mode    string // in a holder's replies: what it does with routes
	Missing string // in a holder's replies: what should be in the kernel and is not
	// Nameservers are in a holder's replies those of its address, with spaces between.
	Nameservers string
	Ifname      string // of the interface that a Mark with a Priority asks for
	Leased      int64  // in the reply to a Health: tables of the pool that are leased
	Tables      int64  // in the reply to a Health: how many the pool has; 0: it is no such reply
	Marking            // of the interface, if the request asks for it
}

// Refuse returns a refusal with its reason.
func Refuse(code Code, reason string) Reply { return Reply{Error: reason, Code: code} }

// Append appends the datagram for r to b, at most MaxReply bytes: a long Error is cut.
func (r Reply) Append(b []byte) []byte {
	o := object(append(b, '{'))
	o.number("version", Version)
	o.number("cmd", int64(Response))
	o.number("table", int64(r.Table))
	o.number("lease_expires", r.Expires)
	o.some("pid", int64(r.PID))
	o.some("lease_left", r.Left)
	o.someText("code", string(r.Code))
	o.someText("mode", r.Mode)
	o.someText("nameservers", r.Nameservers)
	o.marking(r.Marking)
	o.someText("ifname", r.Ifname)
	if r.Tables != 0 {
		o.number("leased", r.Leased)
		o.number("tables", r.Tables)
	}
	name, long := "error", r.Error // a reply has one of the two texts that may be long
	if r.Missing != "" {
		name, long = "missing", r.Missing
	}
	if long != "" {
		o.name(name)
		o = appendStringWithin(o, long, MaxReply-(len(o)-len(b))-len(`}`))
	}
	return append(o, '}')
}

// replyKeys are those of a reply, by number.
var replyKeys = []key{
	0:  {name: "version", required: true, most: 1 << 31},
	1:  {name: "cmd", required: true, most: 255},
	2:  {name: "table", required: true, most: tableMax},
	3:  {name: "lease_expires", required: true, most: expiresMax},
	4:  {name: "pid", most: 1<<31 - 1},
	5:  {name: "error"},
	6:  {name: "code"},
	7:  {name: "mode"},
	8:  {name: "missing"},
	9:  {name: "mark", most: tableMax},
	10: {name: "mask", most: tableMax},
	11: {name: "block", most: tableMax},
	12: {name: "fallback", most: tableMax},
	13: {name: "lease_left", most: expiresMax},
	14: {name: "nameservers"},
	15: {name: "ifname"},
	16: {name: "leased", most: 1 << 32},
	17: {name: "tables", most: 1 << 32},
}

// ParseReply reads one reply. Keys other than version, cmd, table and lease_expires may
// be missing, and unknown keys are ignored.
func ParseReply(data []byte) (Reply, error) {
	m := message{keys: replyKeys}
	m.read(string(data))
	version, cmd := m.number(0), Command(m.number(1))
	r := Reply{
		Table: uint32(m.number(2)), Expires: m.number(3), PID: int(m.number(4)),
		Error: m.text(5), Code: Code(m.text(6)), Mode: m.text(7), Missing: m.text(8), Marking: m.marking(9),
		Left: m.number(13), Nameservers: m.text(14), Ifname: m.text(15),
		Leased: m.number(16), Tables: m.number(17),
	}
	if err := m.check(version, len(m.keys)); err != nil {
		return Reply{}, err
	}
	if cmd != Response {
		return Reply{}, fmt.Errorf("cmd %d: not a response", cmd)
	}
	return r, nil
}
