package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// software is a server and a client to measure.
type software struct {
	server, client string        // paths
	tables         int           // of the server's pool
	timeout        int           // of leases, in seconds; 0: an hour
	log            string        // of the server; "" is its standard error
	padded         bool          // its sockets have names as C programs write them
	rest           time.Duration // see target
	args           []string      // more arguments of the client
	releases       bool          // the client with -r releases the lease
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
		log:    "/dev/null", // it logs a few lines for each request, and nothing turns that off
		padded: true,
		// It stores seconds: a renewal within the second of the one before changes no row.
		rest: 1100 * time.Millisecond,
		args: []string{"-l", "/dev/null"}, // in the background it has no standard error
	}
}

// programs are our commands, and those of the original if it is given.
func (o options) programs() []software {
	if o.original == "" {
		return []software{ours}
	}
	return []software{ours, theirs(o.original)}
}

// maxConfig is how many bytes of its configuration the original reads.
const maxConfig = 1023

// start starts the server with a database in dir, which may exist already. The name of the server
// is that of dir. With a profile it starts our server with a profiler, in this program.
func (s software) start(dir, profile string) (*process, error) {
	config := filepath.Join(dir, "server.json")
	text := fmt.Sprintf(`{"socket_path": %q, "db_path": %q, "table_offset": 10000, "num_tables": %d, "table_timeout": %d, `+
		`"do_syslog": false, "log_path": %q, "addr_families": {"inet": true, "inet6": true, "unspec": true}}`,
		filepath.Base(dir), filepath.Join(dir, "leases.db"), s.tables, cmp.Or(s.timeout, 3600), s.log)
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

// target is the server that start started with a database in dir.
func (s software) target(dir string) target {
	return target{name: filepath.Base(dir), padded: s.padded, rest: s.rest}
}
