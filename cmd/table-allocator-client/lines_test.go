package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// wordsOf splits a line as a shell does that has quotes and no variables.
var wordsOf = regexp.MustCompile(`"[^"]*"|'[^']*'|[^\s"']+`)

// documented are the command lines in the examples of the manual pages and of README.
func documented(t *testing.T) (lines []string) {
	t.Helper()
	files, err := filepath.Glob("../../packaging/man/*.[58]")
	if err != nil || len(files) < 5 {
		t.Fatalf("manual pages: %q, %v", files, err)
	}
	for _, file := range append(files, "../../README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte(`\-`), []byte("-"))
		for line := range strings.Lines(string(text)) {
			line = strings.TrimPrefix(strings.TrimSpace(line), "# ")
			line = strings.TrimPrefix(line, "sudo ")
			line, _, _ = strings.Cut(line, " #")
			line, _, _ = strings.Cut(line, ";")
			line, _, _ = strings.Cut(line, " | ")
			line, _, _ = strings.Cut(line, " >")
			for _, before := range []string{"ExecStart=", "ExecStartPre=", "/usr/sbin/", "/usr/local/sbin/"} {
				line = strings.TrimPrefix(line, before)
			}
			if words := strings.Fields(line); len(words) > 1 && (words[0] == "table-allocator-client" || words[0] == "tactl") && !strings.ContainsAny(line, "`[") && !strings.Contains(line, " - ") {
				lines = append(lines, strings.TrimSpace(line))
			}
		}
	}
	return lines
}

// TestDocumentedLines: the options of every command line that is documented now, or was once, are taken.
func TestDocumentedLines(t *testing.T) {
	old, err := os.ReadFile("testdata/lines")
	if err != nil {
		t.Fatal(err)
	}
	now := documented(t)
	if len(now) < 15 {
		t.Fatalf("found only %q", now)
	}
	for _, line := range slices.Concat(now, strings.Split(strings.TrimSpace(string(old)), "\n")) {
		words := wordsOf.FindAllString(line, -1)
		for i := range words {
			words[i] = strings.Trim(words[i], `"'`)
		}
		c, args := commandOf(words[0], words[1:])
		if c.name == "help" {
			continue
		}
		if c.name == "" && !strings.HasPrefix(args[0], "-") {
			t.Errorf("%s: %s is no command", line, args[0])
			continue
		}
		f := newFlags(c.name)
		f.program = words[0]
		c.declare(f)
		if err := f.parse(args); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// TestManualPages: each page that another one names is there and is installed, and each command has a page that names it.
func TestManualPages(t *testing.T) {
	files, err := filepath.Glob("../../packaging/man/*.[58]")
	if err != nil || len(files) < 8 {
		t.Fatalf("manual pages: %q, %v", files, err)
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	joined := regexp.MustCompile(`(?m)^\.[BIR]{2} [^"\n]*\\\(dq[a-z]+ .*`) // the macro prints its words without blanks
	reference := regexp.MustCompile(`table-allocator[a-z.-]* \(\d\)`)
	pages := make(map[string]bool)
	var names strings.Builder
	texts := make(map[string]string)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		base := filepath.Base(file)
		pages[base[:len(base)-2]+" ("+base[len(base)-1:]+")"] = true
		texts[base] = strings.ReplaceAll(string(text), `\-`, "-")
		_, name, _ := strings.Cut(texts[base], ".SH NAME\n")
		name, _, _ = strings.Cut(name, "\n.SH")
		_, synopsis, _ := strings.Cut(texts[base], ".SH SYNOPSIS\n")
		synopsis, _, _ = strings.Cut(synopsis, "\n.SH")
		names.WriteString(name + "\n" + synopsis + "\n")
		if line := joined.FindString(string(text)); line != "" {
			t.Errorf("%s loses a blank: %s", base, line)
		}
		if !strings.Contains(string(makefile), "packaging/man/"+base+":") {
			t.Errorf("make install does not install %s", base)
		}
	}
	for base, text := range texts {
		for _, other := range reference.FindAllString(text, -1) {
			if !pages[other] {
				t.Errorf("%s names the page %s, which there is not", base, other)
			}
		}
	}
	for _, c := range commands {
		inHold := c.name == "hook" || c.name == "release" || c.name == "reexec" // with the client's own options
		if !inHold && !strings.Contains(names.String(), c.name) {
			t.Errorf("no manual page has %s in its name or synopsis", c.name)
		}
	}
}
