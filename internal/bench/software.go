package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// software is a server and a client that are measured.
type software struct {
	server, client string // paths
	tables         int    // of the server's pool
	log            string // where the server writes that; to its standard error if empty
	padded         bool   // it has the names of sockets as C programs write them
	rest           time.Duration
	args           []string // more of the client's
	releases       bool     // the client does, with -r
}

// ours has a pool of more tables than any measurement needs.
var ours = software{
	server:   "bin/table-allocator-server",
	client:   "bin/table-allocator-client",
	tables:   1 << 17,
	releases: true,
}

// theirs is the C original.
func theirs(dir string) software {
	return software{
		server: filepath.Join(dir, "table_allocator_server"),
		client: filepath.Join(dir, "table_allocator_client"),
		tables: 8192,
		log:    "/dev/null", // a few lines for each request, which nothing turns off
		padded: true,
		// Seconds are all that it stores, so a renewal within the second of the one before
		// changes no row, and writes nothing.
		rest: 1100 * time.Millisecond,
		args: []string{"-l", "/dev/null"}, // it has no standard error in the background
	}
}

// programs are ours and, if it is to be measured, the original.
func (o options) programs() []software {
	if o.original == "" {
		return []software{ours}
	}
	return []software{ours, theirs(o.original)}
}

// maxConfig is how much of its configuration the original reads.
const maxConfig = 1023

// start starts the server with a database in dir, which may be one from before. Its name is
// that of dir. With a profile it is ours with a profiler.
func (s software) start(dir, profile string) (*process, error) {
	config := filepath.Join(dir, "server.json")
	text := fmt.Sprintf(`{"socket_path": %q, "db_path": %q, "table_offset": 10000, "num_tables": %d, "table_timeout": 3600, `+
		`"do_syslog": false, "log_path": %q, "addr_families": {"inet": true, "inet6": true, "unspec": true}}`,
		filepath.Base(dir), filepath.Join(dir, "leases.db"), s.tables, s.log)
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s is too long a path", dir)
	}
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(config, []byte(text), 0o644)); err != nil {
		return nil, err
	}
	args := []string{s.server, "-c", config}
	if profile != "" {
		args = []string{"/proc/self/exe", serveCommand, config, profile}
	}
	return spawn(s.target(dir), filepath.Join(dir, "log"), args...)
}

// target is its server with a database in dir.
func (s software) target(dir string) target {
	return target{name: filepath.Base(dir), padded: s.padded, rest: s.rest}
}
