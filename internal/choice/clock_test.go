package choice

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// TestClocks: what decides about uplinks reads wire.Now alone, CLOCK_MONOTONIC_RAW, which a step of the time of day does not move
// and which stands still while the machine sleeps; this package reads no clock at all. The files that read another one are named
// here, with what for.
func TestClocks(t *testing.T) {
	readers := map[string]string{
		"../client/chooserserve.go": "the time of day of an event, for the user",
		"../client/client.go":       "how long a command waits, by the monotonic reading of time.Now",
		"../client/memory.go":       "the age of files about addresses that nobody serves",
		"../client/tell.go":         "the time of day in texts",
		"../probe/ask.go":           "round trips, by the monotonic reading of time.Now",
		"../probe/round.go":         "round trips, by the monotonic reading of time.Now",
		"../probe/socket.go":        "a deadline that has passed",
	}
	found := make(map[string]bool)
	for _, dir := range []string{".", "../client", "../probe", "../onchange"} {
		files, err := filepath.Glob(dir + "/*.go")
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, file := range files {
			if !strings.HasSuffix(file, "_test.go") && readsClock(t, file) {
				found[file] = true
				if readers[file] == "" {
					t.Errorf("%s reads a clock other than wire.Now", file)
				}
			}
		}
	}
	for file := range readers {
		if !found[file] {
			t.Errorf("%s reads no clock any more", file)
		}
	}
}

// readsClock reports whether a file takes a moment, or the distance to one, from package time.
func readsClock(t *testing.T, file string) (reads bool) {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(parsed, func(n ast.Node) bool {
		if s, is := n.(*ast.SelectorExpr); is {
			if x, is := s.X.(*ast.Ident); is && x.Name == "time" {
				switch s.Sel.Name {
				case "Now", "Since", "Until", "Unix", "UnixMilli", "Date":
					reads = true
				}
			}
		}
		return !reads
	})
	return reads
}
