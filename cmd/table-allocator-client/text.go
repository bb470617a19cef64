package main

import (
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// printable returns v with each string quoted that has something else than printable characters. Names of processes
// and links, paths and texts with such names are others' to choose, and a terminal obeys what some of them say.
func printable[T any](v T) T {
	eachString(reflect.ValueOf(&v).Elem(), quoted)
	return v
}

// eachString replaces the strings of a value that can be set. It copies what slices and pointers lead to, since others may
// have that, too.
func eachString(v reflect.Value, change func(string) string) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(change(v.String()))
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() { // a field of another package's may not
				eachString(v.Field(i), change)
			}
		}
	case reflect.Slice:
		if v.IsNil() {
			return
		}
		all := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(all, v)
		v.Set(all)
		for i := range all.Len() {
			eachString(all.Index(i), change)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			one := reflect.New(v.Type().Elem())
			one.Elem().Set(v.Elem())
			v.Set(one)
			eachString(one.Elem(), change)
		}
	}
}

// quoted is a text from outside as it may be printed: quoted, if not all of it prints.
func quoted(s string) string {
	if prints(s) {
		return s
	}
	return strconv.Quote(s)
}

func prints(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// message is a message as it may be printed: what does not print is escaped. It may have several lines.
func message(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		if escaped := strconv.Quote(line); !prints(line) {
			lines[i] = strings.ReplaceAll(escaped[1:len(escaped)-1], `\"`, `"`)
		}
	}
	return strings.Join(lines, "\n")
}
