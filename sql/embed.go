// Package sql holds the schema of the lease database as numbered migrations. A released
// migration never changes: the next one corrects it.
package sql

import (
	"embed"
	"fmt"
	"strings"
)

//go:embed *.sql
var files embed.FS

// Migrations returns the SQL text of every migration, in order: the text at index n leads
// from schema version n (PRAGMA user_version) to n+1.
func Migrations() []string {
	entries, err := files.ReadDir(".")
	if err != nil {
		panic(err) // the files are part of the program
	}
	texts := make([]string, len(entries))
	for i, e := range entries {
		if prefix := fmt.Sprintf("%04d_", i+1); !strings.HasPrefix(e.Name(), prefix) {
			panic("sql: " + e.Name() + " should begin with " + prefix)
		}
		text, err := files.ReadFile(e.Name())
		if err != nil {
			panic(err)
		}
		texts[i] = string(text)
	}
	return texts
}
