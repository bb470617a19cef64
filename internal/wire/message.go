// Package wire is the protocol between table-allocator-server, its clients and the
// holders of leases: one JSON object per datagram over abstract unix sockets, version 1.
//
// It hides what goes over the wire and how: the bytes of requests and replies and their
// bounds, the two forms of an abstract name, peers that must be answered with the raw
// bytes of their address, SCM_CREDENTIALS, batches of datagrams, and the clock in which
// leases are measured. PROTOCOL.md, beside this file, describes it for other programs.
package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
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
	maxNesting = 32      // of a whole message
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

func (f Family) String() string {
	switch f {
	case Unspec:
		return "unspec"
	case Inet:
		return "inet"
	case Inet6:
		return "inet6"
	}
	return "family " + strconv.Itoa(int(f))
}

// Command is what a message asks for.
type Command int

// The commands. The server serves Acquire and Release; the holder of a lease, at the
// name HolderName gives, serves Query, Replace and End.
const (
	Acquire  Command = 0 // ask for a lease, or renew it
	Release  Command = 1
	Response Command = 2  // a reply; never answered
	Query    Command = 17 // which table is in force?
	Replace  Command = 18 // take over what a newer call was told
	End      Command = 19 // take everything back and exit
)

// Code names the reason of a refusal for programs.
type Code string

// The codes of refusals.
const (
	Malformed Code = "malformed"  // the request breaks the protocol
	Denied    Code = "denied"     // the sender may not ask for this
	NotServed Code = "not-served" // the family is switched off
	Exhausted Code = "exhausted"  // no table is free now
	Storage   Code = "storage"    // the database cannot be written now
	Ending    Code = "ending"     // the holder is taking everything back
	Mismatch  Code = "wrong-key"  // the holder holds another key
)

// Final tells whether asking again later is pointless.
func (c Code) Final() bool {
	return c == Malformed || c == Denied || c == NotServed
}

// Key is what a lease is for. Address is canonical text once it has passed Canonical.
type Key struct {
	Family  Family
	Ifname  string
	Address string
}

func (k Key) String() string { return k.Ifname + "-" + k.Address + "-" + strconv.Itoa(int(k.Family)) }

// Canonical returns the key with its address in the one form in which addresses are
// compared, or an error that says which bound it breaks.
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
	case addr.Zone() != "" || addr.Is4In6() || addr.Is4() != (k.Family == Inet):
		return k, fmt.Errorf("address %q: not an address of family %s", k.Address, k.Family)
	}
	k.Address = addr.String()
	return k, nil
}

// CheckTag returns an error that says which bound a tag breaks.
func CheckTag(tag string) error { return checkText("tag", tag, 0, MaxTag) }

// checkText refuses what would break a line of a log or be cut at a NUL by a C program.
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

// Request is a message to the server or to a holder.
type Request struct {
	Key
	Tag      string
	Cmd      Command
	Want     uint32 // the table to lease rather than another, in an Acquire only; 0: any
	Settings string // a JSON object, in a Replace only
}

// Append appends the datagram for r to b: the original's keys in the original's order.
func (r Request) Append(b []byte) []byte {
	b = append(b, `{"address":`...)
	b = appendString(b, r.Address)
	b = append(b, `,"ifname":`...)
	b = appendString(b, r.Ifname)
	if r.Tag != "" {
		b = append(b, `,"tag":`...)
		b = appendString(b, r.Tag)
	}
	b = append(b, `,"addr_family":`...)
	b = strconv.AppendInt(b, int64(r.Family), 10)
	b = append(b, `,"cmd":`...)
	b = strconv.AppendInt(b, int64(r.Cmd), 10)
	b = append(b, `,"version":`...)
	b = strconv.AppendInt(b, Version, 10)
	if r.Want != 0 {
		b = append(b, `,"want":`...)
		b = strconv.AppendUint(b, uint64(r.Want), 10)
	}
	if r.Settings != "" {
		b = append(b, `,"settings":`...)
		b = append(b, r.Settings...)
	}
	return append(b, '}')
}

// ParseRequest reads exactly the bytes of one datagram, strictly: every key of the
// protocol but tag is required, types and ranges are checked, other keys are ignored.
// The address comes back in canonical text. With an error Cmd is Response if data looks
// like one, since a Response is never answered, however broken.
func ParseRequest(data []byte) (Request, error) {
	r, err := parseRequest(data)
	if err != nil && responseLike.Match(data) {
		r.Cmd = Response
	}
	return r, err
}

// responseLike finds the member that marks a response, also in what is no JSON or was
// cut off behind it.
var responseLike = regexp.MustCompile(`"cmd"[ \t\r\n]*:[ \t\r\n]*2[ \t\r\n]*[,}]`)

func parseRequest(data []byte) (Request, error) {
	var (
		r        Request
		family   int64
		cmd      int64 = -1
		version  int64
		want     int64
		settings string
		seen     seenKeys
	)
	err := members(data, func(key, value []byte) (err error) {
		switch string(key) {
		case "address":
			seen.mark(0)
			r.Address, err = stringValue("address", value)
		case "ifname":
			seen.mark(1)
			r.Ifname, err = stringValue("ifname", value)
		case "tag":
			seen.mark(5)
			r.Tag, err = stringValue("tag", value)
		case "addr_family":
			seen.mark(2)
			family, err = intValue("addr_family", value, 0, 255)
		case "cmd":
			seen.mark(3)
			cmd, err = intValue("cmd", value, 0, 255)
		case "version":
			seen.mark(4)
			version, err = intValue("version", value, 0, 1<<31)
		case "settings":
			seen.mark(6)
			settings = string(value)
		case "want":
			seen.mark(7)
			want, err = intValue("want", value, 0, tableMax)
		}
		return err
	})
	r.Cmd, r.Family = Command(cmd), Family(family)
	if err != nil {
		return r, err
	}
	if err := seen.check(5, "address", "ifname", "addr_family", "cmd", "version", "tag", "settings", "want"); err != nil {
		return r, err
	}
	if version != Version {
		return r, fmt.Errorf("version %d: this is version %d", version, Version)
	}
	switch r.Cmd {
	case Acquire, Release, Query, Replace, End:
	default:
		return r, fmt.Errorf("cmd %d: unknown", cmd)
	}
	if err := CheckTag(r.Tag); err != nil {
		return r, err
	}
	if r.Cmd == Replace && settings != "" { // to other commands it is a key that nobody knows
		if settings[0] != '{' {
			return r, errors.New("settings: not an object")
		}
		r.Settings = settings
	}
	if r.Cmd == Acquire {
		r.Want = uint32(want)
	}
	r.Key, err = r.Canonical()
	return r, err
}

// Reply answers a request.
type Reply struct {
	Table   uint32 // 0: no lease
	Expires int64  // lease clock, seconds; 0 without a lease
	Error   string // why there is no lease, for people
	Code    Code   // the same for programs
	PID     int    // in a holder's replies: its process
	Mode    string // likewise: what becomes of routes
	Missing string // likewise: what should be in the kernel and is not
}

// Refuse is the reply that says why not.
func Refuse(code Code, reason string) Reply { return Reply{Error: reason, Code: code} }

// Append appends the datagram for r to b, at most MaxReply bytes: a long Error is cut.
func (r Reply) Append(b []byte) []byte {
	start := len(b)
	b = append(b, `{"version":1,"cmd":2,"table":`...)
	b = strconv.AppendUint(b, uint64(r.Table), 10)
	b = append(b, `,"lease_expires":`...)
	b = strconv.AppendInt(b, r.Expires, 10)
	if r.PID != 0 {
		b = append(b, `,"pid":`...)
		b = strconv.AppendInt(b, int64(r.PID), 10)
	}
	if r.Code != "" {
		b = append(b, `,"code":`...)
		b = appendString(b, string(r.Code))
	}
	if r.Mode != "" {
		b = append(b, `,"mode":`...)
		b = appendString(b, r.Mode)
	}
	if r.Missing != "" {
		b = append(b, `,"missing":`...)
		b = appendStringWithin(b, r.Missing, MaxReply-(len(b)-start)-len(`}`))
	} else if r.Error != "" { // of the two that may be long there is one
		b = append(b, `,"error":`...)
		b = appendStringWithin(b, r.Error, MaxReply-(len(b)-start)-len(`}`))
	}
	return append(b, '}')
}

// ParseReply reads one reply. Keys other than version, cmd, table and lease_expires may
// be missing, and keys that nobody knows are ignored.
func ParseReply(data []byte) (Reply, error) {
	var (
		r            Reply
		version, cmd int64
		table, pid   int64
		seen         seenKeys
	)
	err := members(data, func(key, value []byte) (err error) {
		switch string(key) {
		case "version":
			seen.mark(0)
			version, err = intValue("version", value, 0, 1<<31)
		case "cmd":
			seen.mark(1)
			cmd, err = intValue("cmd", value, 0, 255)
		case "table":
			seen.mark(2)
			table, err = intValue("table", value, 0, tableMax)
		case "lease_expires":
			seen.mark(3)
			r.Expires, err = intValue("lease_expires", value, 0, expiresMax)
		case "pid":
			seen.mark(4)
			pid, err = intValue("pid", value, 0, 1<<31-1)
		case "error":
			seen.mark(5)
			r.Error, err = stringValue("error", value)
		case "mode":
			seen.mark(7)
			r.Mode, err = stringValue("mode", value)
		case "missing":
			seen.mark(8)
			r.Missing, err = stringValue("missing", value)
		case "code":
			seen.mark(6)
			var code string
			code, err = stringValue("code", value)
			r.Code = Code(code)
		}
		return err
	})
	if err != nil {
		return Reply{}, err
	}
	if err := seen.check(4, "version", "cmd", "table", "lease_expires", "pid", "error", "code", "mode", "missing"); err != nil {
		return Reply{}, err
	}
	if version != Version {
		return Reply{}, fmt.Errorf("version %d: this is version %d", version, Version)
	}
	if Command(cmd) != Response {
		return Reply{}, fmt.Errorf("cmd %d: not a response", cmd)
	}
	r.Table, r.PID = uint32(table), int(pid)
	return r, nil
}

// seenKeys remembers which of the known keys a message had, and which it had twice.
type seenKeys struct{ once, twice uint }

func (s *seenKeys) mark(i int) {
	s.twice |= s.once & (1 << i)
	s.once |= 1 << i
}

// check wants the first required of names to be there, and none of them twice: programs
// do not agree on which of two counts.
func (s seenKeys) check(required int, names ...string) error {
	for i, name := range names {
		if s.twice&(1<<i) != 0 {
			return fmt.Errorf("%s: stands there twice", name)
		}
		if i < required && s.once&(1<<i) == 0 {
			return fmt.Errorf("%s: missing", name)
		}
	}
	return nil
}

var errNotObject = errors.New("not a JSON object")

// members calls f with the raw key and value of each member of the object that data
// must be. encoding/json judges the grammar; only the split is done here, because its
// decoder matches keys without regard to case, takes any number for an integer that it
// fits, and allocates on a path that a renewal takes thousands of times a second.
func members(data []byte, f func(key, value []byte) error) error {
	if !utf8.Valid(data) || !json.Valid(data) {
		return errNotObject
	}
	rest := trimSpace(data)
	if len(rest) == 0 || rest[0] != '{' {
		return errNotObject
	}
	if nesting(rest) > maxNesting {
		return fmt.Errorf("nested deeper than %d", maxNesting)
	}
	for rest = trimSpace(rest[1:]); rest[0] != '}'; {
		var key, value []byte
		key, rest = splitValue(rest)
		value, rest = splitValue(trimSpace(trimSpace(rest)[1:])) // behind the colon
		if err := f(key[1:len(key)-1], value); err != nil {
			return err
		}
		if rest = trimSpace(rest); rest[0] == ',' {
			rest = trimSpace(rest[1:])
		}
	}
	return nil
}

// splitValue splits the first value off rest, which is known to be valid JSON.
func splitValue(rest []byte) (value, behind []byte) {
	depth, i := 0, 0
	for ; i < len(rest); i++ {
		switch rest[i] {
		case '"':
			for i++; rest[i] != '"'; i++ {
				if rest[i] == '\\' {
					i++
				}
			}
			if depth == 0 {
				return rest[:i+1], rest[i+1:]
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return rest[:i], rest[i:]
			}
			if depth--; depth == 0 {
				return rest[:i+1], rest[i+1:]
			}
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return rest[:i], rest[i:]
			}
		}
	}
	return rest, nil
}

func nesting(data []byte) int {
	depth, most := 0, 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			for i++; data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			most = max(most, depth)
		case '}', ']':
			depth--
		}
	}
	return most
}

func trimSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t' || b[0] == '\r' || b[0] == '\n') {
		b = b[1:]
	}
	return b
}

func stringValue(key string, value []byte) (string, error) {
	if value[0] != '"' {
		return "", fmt.Errorf("%s: not a string", key)
	}
	for _, c := range value {
		if c == '\\' {
			var s string
			if err := json.Unmarshal(value, &s); err != nil {
				return "", fmt.Errorf("%s: %w", key, err)
			}
			return s, nil
		}
	}
	return string(value[1 : len(value)-1]), nil
}

func intValue(key string, value []byte, least, most int64) (int64, error) {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil {
		return -1, fmt.Errorf("%s: not an integer in range", key)
	}
	if n < least || n > most {
		return -1, fmt.Errorf("%s: %d is not within %d to %d", key, n, least, most)
	}
	return n, nil
}

func appendString(b []byte, s string) []byte { return appendStringWithin(b, s, len(s)*6+2) }

// appendStringWithin appends s as a JSON string of at most room bytes, cut between
// characters.
func appendStringWithin(b []byte, s string, room int) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	room -= 2
	for _, r := range s {
		var c [12]byte
		piece := c[:0]
		switch {
		case r == '"' || r == '\\':
			piece = append(piece, '\\', byte(r))
		case r < ' ' || r == 0x7f:
			piece = append(piece, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			piece = utf8.AppendRune(piece, r)
		}
		if room -= len(piece); room < 0 {
			break
		}
		b = append(b, piece...)
	}
	return append(b, '"')
}
