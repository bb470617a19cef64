package main

import (
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"strings"
)

// addressLike finds words that may be addresses.
var addressLike = regexp.MustCompile(`[0-9A-Fa-f]*[.:][0-9A-Fa-f.:]*[0-9A-Fa-f:]`)

// redactor shortens public addresses in texts that somebody shows to others. The same address gets the same number.
type redactor map[netip.Addr]int

// redacted is a value with shorter addresses in its strings, if that is wanted.
func redacted[T any](v T, wanted bool) T {
	if wanted {
		eachString(reflect.ValueOf(&v).Elem(), redactor{}.text)
	}
	return v
}

func (r redactor) text(s string) string { return addressLike.ReplaceAllStringFunc(s, r.word) }

// dotted finds IPv4 addresses in what has more: a port, or the end of another word.
var dotted = regexp.MustCompile(`[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+`)

// word is a word with shorter addresses, without regard to colons around one.
func (r redactor) word(word string) string {
	if a, err := netip.ParseAddr(word); err == nil {
		return r.address(a, word)
	}
	if rest, ok := strings.CutPrefix(word, ":"); ok {
		return ":" + r.word(rest)
	}
	if rest, ok := strings.CutSuffix(word, ":"); ok {
		return r.word(rest) + ":"
	}
	return dotted.ReplaceAllStringFunc(word, func(part string) string {
		a, _ := netip.ParseAddr(part) // the zero address is not public
		return r.address(a, part)
	})
}

// address is a public address without its end, and any other as it is written.
func (r redactor) address(a netip.Addr, written string) string {
	if !a.IsGlobalUnicast() || a.IsPrivate() {
		return written
	}
	if r[a] == 0 {
		r[a] = len(r) + 1
	}
	if a.Is4() {
		parts := strings.SplitN(written, ".", 3)
		return fmt.Sprintf("%s.%s.x.x(%d)", parts[0], parts[1], r[a])
	}
	b := a.As16()
	return fmt.Sprintf("%x:%x::x(%d)", uint16(b[0])<<8|uint16(b[1]), uint16(b[2])<<8|uint16(b[3]), r[a])
}
