// Package jsonc reads configuration files: one JSON object with comments and trailing
// commas, strictly. It hides the library that knows that syntax.
package jsonc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/tailscale/hujson"
)

// Bounds of a file. The parser calls itself for each level, so that a file of brackets
// would overflow the stack.
const (
	MaxSize     = 1 << 20
	MaxBrackets = 10_000
)

// Load calls set for each member of the object in the file path.
func Load(path string, set func(key string, value []byte) error) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	if err := Read(f, set); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	return nil
}

// Read is Load for a reader.
func Read(r io.Reader, set func(key string, value []byte) error) error {
	text, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return err
	}
	if len(text) > MaxSize {
		return fmt.Errorf("larger than %d bytes", MaxSize)
	}
	if bytes.Count(text, []byte("["))+bytes.Count(text, []byte("{")) > MaxBrackets {
		return fmt.Errorf("more than %d brackets", MaxBrackets)
	}
	return Each(text, set)
}

// Each calls set for each member of the object that text is. A key that stands there
// twice is an error, since programs do not agree on which of the two counts.
func Each(text []byte, set func(key string, value []byte) error) error {
	value, err := parse(text)
	if err != nil {
		return err
	}
	object, ok := value.Value.(*hujson.Object)
	if !ok {
		return errors.New("not a JSON object")
	}
	seen := make(map[string]bool, len(object.Members))
	for _, member := range object.Members {
		key := member.Name.Value.(hujson.Literal).String()
		if seen[key] {
			return fmt.Errorf("%s: given twice", key)
		}
		seen[key] = true
		start := member.Value.StartOffset - len(member.Value.BeforeExtra)
		member.Value.Standardize() // which keeps newlines
		if err := set(key, member.Value.Pack()); err != nil {
			return at(err, text, member.Name.StartOffset, start)
		}
	}
	return nil
}

// parse parses text. The error begins with the place: "line 1, column 35: ...".
func parse(text []byte) (hujson.Value, error) {
	value, err := hujson.Parse(text)
	if err != nil {
		err = errors.New(strings.TrimPrefix(err.Error(), "hujson: "))
	}
	return value, err
}

// EachElement calls f for each element of the list that text is. want says what it has to be.
func EachElement(key string, text []byte, want string, f func(i int, element []byte) error) error {
	value, err := parse(text)
	if err != nil {
		return err
	}
	list, ok := value.Value.(*hujson.Array)
	if !ok {
		return fmt.Errorf("%s: want %s, have %s", key, want, strings.TrimSpace(string(text)))
	}
	for i, element := range list.Elements {
		start := element.StartOffset - len(element.BeforeExtra)
		if err := f(i, element.Pack()); err != nil {
			return at(err, text, element.StartOffset, start)
		}
	}
	return nil
}

// located is an error in a line of a text.
type located struct {
	line int // from 1
	error
}

func (l located) Error() string { return fmt.Sprintf("line %d: %v", l.line, l.error) }
func (l located) Unwrap() error { return l.error }

// at says in which line of text an error is: in that of the value at start if it is located in the value, else in that of
// the key.
func at(err error, text []byte, key, start int) error {
	line := func(offset int) int { return bytes.Count(text[:offset], []byte("\n")) + 1 }
	var inner located
	if errors.As(err, &inner) {
		return located{line(start) + inner.line - 1, inner.error}
	}
	return located{line(key), err}
}

// Decode reads the value of a key. The error names the key and says what it wants.
func Decode(key string, value []byte, into any, want string) error {
	// null would leave the default in place without a word.
	if strings.TrimSpace(string(value)) == "null" || json.Unmarshal(value, into) != nil {
		return fmt.Errorf("%s: want %s, have %s", key, want, strings.TrimSpace(string(value)))
	}
	return nil
}
