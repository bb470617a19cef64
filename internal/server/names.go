package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/outside"
)

// namesFile has the names of tables for iproute2, where the configuration wants them. What is installed makes a link to it
// in /etc/iproute2/rt_tables.d, where the service of the server may not write.
const namesFile = "/run/table-allocator/rt_tables.conf"

// namesAfter is how long a change of the leases waits, so that a burst of them costs one file.
const namesAfter = 100 * time.Millisecond

// tableNamesLimit is how long the file systems of these files may take, which an end of the server waits for.
const tableNamesLimit = 5 * time.Second

// foreignNames are where names of tables stand that are not ours, in the versions of iproute2.
var foreignNames = []string{
	"/etc/iproute2/rt_tables", "/etc/iproute2/rt_tables.d/*.conf", "/usr/share/iproute2/rt_tables", "/usr/share/iproute2/rt_tables.d/*.conf",
	"/usr/lib/iproute2/rt_tables", "/usr/lib/iproute2/rt_tables.d/*.conf",
}

// names are names of tables: numbers by name, and whether a number has a name.
type names struct {
	of    map[string]bool
	named map[uint32]bool
}

// readNames reads the names that iproute2 has, but for those of our own file.
func readNames(patterns []string, own string) names {
	n := names{make(map[string]bool), make(map[uint32]bool)}
	for _, pattern := range patterns {
		files, _ := filepath.Glob(pattern) // the patterns are right
		for _, file := range files {
			if target, err := os.Readlink(file); err == nil && target == own {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				continue // it has gone, or nobody may read it, and ip cannot either
			}
			for line := range strings.Lines(string(text)) {
				fields := strings.Fields(line)
				if len(fields) < 2 || strings.HasPrefix(fields[0], "#") {
					continue
				}
				if number, err := strconv.ParseUint(fields[0], 0, 32); err == nil {
					n.of[fields[1]], n.named[uint32(number)] = true, true
				}
			}
		}
	}
	return n
}

// nameable are the links that may give a name.
var nameable = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// nameTables returns the file for leases: a line "10000 ta-wan0" for each table that has the leases of one link. Of several
// tables of a link the first has the plain name, and the others have their number behind it. A name that iproute2 has, and
// a table that has a name, are left out.
func nameTables(leases []allocator.Lease, have names) string {
	links := make(map[uint32]string)
	for _, l := range leases {
		if other, taken := links[l.Table]; taken && other != l.Ifname {
			links[l.Table] = "" // an IPv4 address of one link and an IPv6 address of another
		} else if !taken {
			links[l.Table] = l.Ifname
		}
	}
	tables := make([]uint32, 0, len(links))
	for table := range links {
		tables = append(tables, table)
	}
	slices.Sort(tables)
	var b strings.Builder
	used := make(map[string]bool)
	for _, table := range tables {
		ifname := links[table]
		if !nameable.MatchString(ifname) || have.named[table] {
			continue
		}
		name := "ta-" + ifname
		if used[name] {
			name += "-" + strconv.FormatUint(uint64(table), 10)
		}
		if !used[name] && !have.of[name] {
			fmt.Fprintf(&b, "%d\t%s\n", table, name)
		}
		used[name] = true
	}
	return b.String()
}

// changeNames says that leases have changed. It never waits.
func (s *server) changeNames() {
	select {
	case s.renamed <- struct{}{}:
	default: // a change is noted already
	}
}

// keepNames writes the names of tables until ctx ends. Afterwards they stay, as the leases do.
func (s *server) keepNames(ctx context.Context) {
	head := fmt.Sprintf("# By table-allocator-server of network namespace %d: table_names in its configuration.\n", s.conns[0].NetnsCookie())
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.renamed:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(namesAfter):
		}
		leases, wanted := s.rootLeases()
		_, err := outside.Ask("names of tables", tableNamesLimit, func() (struct{}, error) {
			outside.Reach(filepath.Dir(namesFile))
			text := ""
			if wanted {
				text = head + nameTables(leases, readNames(foreignNames, namesFile))
			}
			return struct{}{}, writeNames(head, text)
		})
		if err != nil {
			s.log.Warn("cannot write the names of tables", "file", namesFile, "err", err)
		}
	}
}

// rootLeases are the leases that get names: of root and of the server's own user.
func (s *server) rootLeases() (leases []allocator.Lease, wanted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.cfg.TableNames {
		return nil, false
	}
	s.leases.Each(func(l allocator.Lease) {
		if l.Owner == 0 || l.Owner == s.access.self {
			leases = append(leases, l)
		}
	})
	slices.SortFunc(leases, func(a, b allocator.Lease) int { return cmp.Compare(a.Table, b.Table) })
	return leases, true
}

// writeNames replaces the file. Without text it removes the file, unless that has another head: of a server in another
// network namespace.
func writeNames(head, text string) error {
	was, err := os.ReadFile(namesFile)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case string(was) == text:
		return nil
	case text == "" && !strings.HasPrefix(string(was), head):
		return nil
	case text == "":
		return os.Remove(namesFile)
	}
	if err := os.MkdirAll(filepath.Dir(namesFile), 0o755); err != nil {
		return err
	}
	fresh := namesFile + ".new" // only root may write there
	if err := os.WriteFile(fresh, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(fresh, namesFile)
}
