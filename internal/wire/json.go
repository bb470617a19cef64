package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxNesting bounds the brackets within brackets of a message.
const maxNesting = 32

var errNotObject = errors.New("not a JSON object")

// pair is one member of an object: its key without the quotes but with its escapes, and the text of its
// value.
type pair struct{ key, value string }

// members splits text, which must be one object, and appends its members to into. It accepts exactly what
// RFC 8259 and encoding/json accept, and valid UTF-8 only. encoding/json itself takes longer than all the
// rest of a renewal, ignores the case of keys, and accepts 1.0 for an integer.
func members(text string, into []pair) ([]pair, error) {
	s := scanner{text: text}
	s.space()
	if !s.has('{') {
		return nil, errNotObject
	}
	all, ok := s.object(1, into)
	if ok {
		s.space()
		ok = s.at == len(text)
	}
	if s.deep && json.Valid([]byte(text)) && utf8.ValidString(text) {
		return nil, fmt.Errorf("nested deeper than %d", maxNesting)
	}
	if !ok {
		return nil, errNotObject
	}
	return all, nil
}

// scanner reads a JSON text. Each of its methods reports whether what it is named for stands at position
// at, and moves at behind it.
type scanner struct {
	text string
	at   int
	deep bool // there are more brackets than maxNesting
}

func (s *scanner) space() {
	for s.at < len(s.text) {
		switch s.text[s.at] {
		case ' ', '\t', '\r', '\n':
			s.at++
		default:
			return
		}
	}
}

func (s *scanner) has(c byte) bool {
	if s.at < len(s.text) && s.text[s.at] == c {
		s.at++
		return true
	}
	return false
}

// object reads an object behind its opening bracket. It collects the members if into is not nil.
func (s *scanner) object(depth int, into []pair) ([]pair, bool) {
	if s.space(); s.has('}') {
		return into, true
	}
	for {
		from := s.at
		if !s.string() {
			return into, false
		}
		key := s.text[from+1 : s.at-1]
		s.space()
		if !s.has(':') {
			return into, false
		}
		s.space()
		from = s.at
		if !s.value(depth) {
			return into, false
		}
		if into != nil {
			into = append(into, pair{key, s.text[from:s.at]})
		}
		if s.space(); s.has('}') {
			return into, true
		}
		if !s.has(',') {
			return into, false
		}
		s.space()
	}
}

func (s *scanner) array(depth int) bool {
	if s.space(); s.has(']') {
		return true
	}
	for {
		if !s.value(depth) {
			return false
		}
		if s.space(); s.has(']') {
			return true
		}
		if !s.has(',') {
			return false
		}
		s.space()
	}
}

// value reads a value that is within depth brackets.
func (s *scanner) value(depth int) bool {
	if s.at == len(s.text) {
		return false
	}
	switch c := s.text[s.at]; c {
	case '"':
		return s.string()
	case '{', '[':
		if depth == maxNesting {
			s.deep = true
			return false
		}
		s.at++
		if c == '[' {
			return s.array(depth + 1)
		}
		_, ok := s.object(depth+1, nil)
		return ok
	case 't':
		return s.word("true")
	case 'f':
		return s.word("false")
	case 'n':
		return s.word("null")
	}
	return s.number()
}

func (s *scanner) word(w string) bool {
	if len(s.text)-s.at < len(w) || s.text[s.at:s.at+len(w)] != w {
		return false
	}
	s.at += len(w)
	return true
}

func (s *scanner) string() bool {
	if !s.has('"') {
		return false
	}
	for s.at < len(s.text) {
		switch c := s.text[s.at]; {
		case c == '"':
			s.at++
			return true
		case c < ' ':
			return false
		case c == '\\':
			if s.at++; !s.escape() {
				return false
			}
		case c < utf8.RuneSelf:
			s.at++
		default:
			r, size := utf8.DecodeRuneInString(s.text[s.at:])
			if r == utf8.RuneError && size == 1 {
				return false
			}
			s.at += size
		}
	}
	return false
}

// escape reads an escape behind its backslash.
func (s *scanner) escape() bool {
	if s.at == len(s.text) {
		return false
	}
	c := s.text[s.at]
	s.at++
	switch c {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return true
	case 'u':
		for range 4 {
			if s.at == len(s.text) {
				return false
			}
			switch c := s.text[s.at]; {
			case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
				s.at++
			default:
				return false
			}
		}
		return true
	}
	return false
}

func (s *scanner) number() bool {
	s.has('-')
	if !s.has('0') && !s.digits() {
		return false
	}
	if s.has('.') && !s.digits() {
		return false
	}
	if s.has('e') || s.has('E') {
		if !s.has('+') {
			s.has('-')
		}
		return s.digits()
	}
	return true
}

func (s *scanner) digits() bool {
	from := s.at
	for s.at < len(s.text) && '0' <= s.text[s.at] && s.text[s.at] <= '9' {
		s.at++
	}
	return s.at > from
}

// key is a key that a message may have. Its value is a string, or with most an integer from 0 to most.
type key struct {
	name     string
	required bool
	most     int64
}

const (
	keysMost     = 18 // known keys of a message
	usualMembers = 10 // members that have room on the stack
)

// message is a JSON object: the texts of the values of known keys, by the number of the key, and the
// first error in them.
type message struct {
	keys   []key
	values [keysMost]string // "": the message does not have the key
	err    error
}

// read finds the values. A key that is given twice is an error: programs do not agree on which counts.
func (m *message) read(text string) {
	all, err := members(text, make([]pair, 0, usualMembers))
	m.err = err
	for _, p := range all {
		for i := range m.keys {
			if m.keys[i].name != p.key {
				continue
			}
			if m.values[i] != "" {
				m.fail(i, "given twice")
			}
			m.values[i] = p.value
			break
		}
	}
}

func (m *message) fail(i int, format string, args ...any) {
	if m.err == nil {
		m.err = fmt.Errorf("%s: "+format, append([]any{m.keys[i].name}, args...)...)
	}
}

// check returns the first error. The message must have the required keys with numbers below end.
func (m *message) check(version int64, end int) error {
	for i, k := range m.keys[:end] {
		if k.required && m.values[i] == "" {
			m.fail(i, "missing")
		}
	}
	if m.err == nil && version != Version {
		m.err = fmt.Errorf("version %d: this is version %d", version, Version)
	}
	return m.err
}

// text returns the string of a key, "" if the message does not have it. The string is a part of the
// text that was read, or a copy if it has escapes.
func (m *message) text(i int) string {
	value := m.values[i]
	switch {
	case value == "":
		return ""
	case value[0] != '"':
		m.fail(i, "not a string")
		return ""
	case strings.IndexByte(value, '\\') < 0:
		return value[1 : len(value)-1]
	}
	var s string
	if err := json.Unmarshal([]byte(value), &s); err != nil {
		m.fail(i, "%w", err)
	}
	return s
}

// number returns the integer of a key, 0 if the message does not have it.
func (m *message) number(i int) int64 {
	value := m.values[i]
	if value == "" {
		return 0
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		m.fail(i, "not an integer in range")
	} else if n < 0 || n > m.keys[i].most {
		m.fail(i, "%d is not within 0 to %d", n, m.keys[i].most)
	}
	return n
}

// marking returns the Marking in the four keys from number first on.
func (m *message) marking(first int) Marking {
	word := func(i int) uint32 { return uint32(m.number(first + i)) }
	marking := Marking{Mark: word(0), Mask: word(1), Block: word(2), Fallback: word(3)}
	if err := marking.check(); err != nil && m.err == nil {
		m.err = err
	}
	return marking
}

// object is a JSON object that is being written.
type object []byte

func (o *object) name(name string) {
	if (*o)[len(*o)-1] != '{' {
		*o = append(*o, ',')
	}
	*o = append(append(append(*o, '"'), name...), `":`...)
}

func (o *object) number(name string, n int64) {
	o.name(name)
	*o = strconv.AppendInt(*o, n, 10)
}

// some writes a number other than 0.
func (o *object) some(name string, n int64) {
	if n != 0 {
		o.number(name, n)
	}
}

func (o *object) text(name, s string) {
	o.name(name)
	*o = appendStringWithin(*o, s, len(s)*6+2)
}

// someText writes a text that is not empty.
func (o *object) someText(name, s string) {
	if s != "" {
		o.text(name, s)
	}
}

// marking writes the keys of a Marking, unless it is the zero Marking.
func (o *object) marking(m Marking) {
	if m != (Marking{}) {
		o.number("mark", int64(m.Mark))
		o.number("mask", int64(m.Mask))
		o.number("block", int64(m.Block))
		o.number("fallback", int64(m.Fallback))
	}
}

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
