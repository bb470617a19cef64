package allocator

import (
	"database/sql/driver"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	migrations "github.com/table-allocator/table-allocator/sql"
)

// store is the database: one connection, and the file kept open to hold its lock.
type store struct {
	boot  Boot
	path  string
	file  *os.File
	found [3]fileID // what path and its companions led to when it was opened
	left  stamp     // of the file after we wrote last
	db    *database // nil once it is closed

	begin, commit                                *statement
	putLease, putSome                            *statement // one lease, rowsInOne
	dropLease, putHistory, dropHistory, putClock *statement
	row                                          []driver.Value // for them
	clock                                        [2]int64       // the row that the database has: monotonic, utc
}

// busyTimeout is how long SQLite waits for other programs, in milliseconds. New leases wait
// behind it.
const busyTimeout = 250

// openStore opens the database without writing to it, but for its mode. The store is to be
// closed also after an error.
func openStore(path string, boot Boot, log *slog.Logger) (s *store, err error) {
	s = &store{boot: boot, path: path}
	if s.file, err = openFile(path, log); err != nil {
		return s, err
	}
	var mine unix.Stat_t
	if err := unix.Fstat(int(s.file.Fd()), &mine); err != nil {
		return s, err
	}
	s.found[0] = fileID{mine.Dev, mine.Ino}
	if s.db, err = openDatabase(path); err != nil {
		return s, err
	}
	if s.begin, err = s.db.prepare("BEGIN IMMEDIATE"); err != nil {
		return s, err
	}
	if s.commit, err = s.db.prepare("COMMIT"); err != nil {
		return s, err
	}
	if err := s.db.exec("PRAGMA busy_timeout = " + strconv.Itoa(busyTimeout)); err != nil {
		return s, err
	}
	// In a directory that others write to, the path may lead elsewhere by now.
	if now, err := identify(path); err != nil || now != s.found[0] {
		return s, errors.New("the file was replaced while it was opened: use a directory that nobody else writes to")
	}
	return s, nil
}

// companions are what SQLite has beside the file while the database is open.
var companions = [3]string{"", "-wal", "-shm"}

// fileID is a file, whatever its name; zero is none.
type fileID struct{ dev, ino uint64 }

// identify returns zero only for a path that certainly leads nowhere.
func identify(path string) (fileID, error) {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fileID{}, nil
	}
	return fileID{st.Dev, st.Ino}, err
}

// settle notes which files the open database has, once it has been written to.
func (s *store) settle() {
	for i, suffix := range companions[1:] {
		s.found[i+1], _ = identify(s.path + suffix) // unknown: not watched
	}
	s.left = s.stamp()
}

// stamp changes with each write to the file itself. Ours go to the log beside it, and from
// there into the file within our transactions.
type stamp struct {
	size  int64
	mtime unix.Timespec
}

func (s *store) stamp() stamp {
	var st unix.Stat_t
	if unix.Fstat(int(s.file.Fd()), &st) != nil {
		return s.left
	}
	return stamp{st.Size, st.Mtim}
}

// overwritten tells whether another program wrote to the file: perhaps it only moved the log
// into it, as sqlite3 does, perhaps it copied something over it.
func (s *store) overwritten() bool { return s.stamp() != s.left }

// astray tells whether the path leads to something else than the open files: SQLite would go
// on writing to them, and nobody would ever find that again.
func (s *store) astray() bool {
	if s.db == nil {
		return true
	}
	for i, suffix := range companions {
		now, err := identify(s.path + suffix)
		if err == nil && now != s.found[i] && (s.found[i] != fileID{}) {
			return true
		}
	}
	return false
}

// vacate closes a database that is astray, unless something else is in its place.
func (s *store) vacate() error {
	now, err := identify(s.path)
	if err != nil {
		return err
	}
	if (now != fileID{}) && now != s.found[0] {
		return errors.New("another file is in its place: move that away, and the leases are written anew; or restart the server to use it")
	}
	return s.close()
}

// close also ends the lock, and so comes after all writing. The file goes last: closing any
// descriptor of a file drops the locks that SQLite has on it. Closing again does nothing.
func (s *store) close() error {
	var errs []error
	if s.db != nil {
		errs = append(errs, s.db.close())
		s.db = nil
	}
	if s.file != nil {
		errs = append(errs, s.file.Close())
		s.file = nil
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close database: %w", err)
	}
	return nil
}

// transact runs fn in a transaction that has the write lock from its beginning, so that a
// database locked by others is noticed before anything is written.
func (s *store) transact(fn func() error) error {
	err := s.begin.exec()
	if err == nil {
		err = fn()
	}
	if err == nil {
		err = s.commit.exec()
	}
	if err != nil {
		// SQLite may have ended the transaction itself, or never begun it: then this fails,
		// rightly. If it stayed open, the next BEGIN would fail.
		_ = s.db.exec("ROLLBACK")
	}
	return err
}

// version returns the schema version, and whether this is a database of the original. It
// is an error if the database is of neither of us.
func (s *store) version() (version int64, original bool, err error) {
	if err := s.db.queryRow("PRAGMA user_version", &version); err != nil {
		return 0, false, err
	}
	var ours, others int64
	if err := s.db.queryRow("SELECT count(*) FILTER (WHERE name = 'RtTables' COLLATE NOCASE), count(*) FROM sqlite_master WHERE type = 'table'",
		&ours, &others); err != nil {
		return 0, false, err
	}
	known := int64(len(migrations.Migrations()))
	switch {
	case ours == 0 && (others > 0 || version != 0):
		return 0, false, errors.New("it is a database of another program: choose another path")
	case version < 0 || version > known:
		return 0, false, fmt.Errorf("it has schema version %d, this program knows up to %d: install the newer version again, or choose another path", version, known)
	}
	if ours > 0 {
		if err := s.db.exec("SELECT RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag FROM RtTables LIMIT 0"); err != nil {
			return 0, false, fmt.Errorf("it is a database of another program: choose another path: %w", err)
		}
	}
	return version, version == 0 && ours > 0, nil
}

// check looks at all of the database. What is damaged must not be taken for leases, and not be
// written to either.
func (s *store) check() error {
	var found string
	if err := s.db.queryRow("PRAGMA integrity_check(1)", &found); err != nil {
		return err
	}
	if found != "ok" {
		return fmt.Errorf("it is damaged (%s): move the file away, or choose another path", strings.ReplaceAll(found, "\n", " "))
	}
	return nil
}

// copyOriginal writes a copy of the database beside it and returns its path.
func (s *store) copyOriginal(path string) (string, error) {
	for n := 0; ; n++ {
		name := path + ".original"
		if n > 0 {
			name += "." + strconv.Itoa(n)
		}
		// SQLite writes into an empty file as it is. Creating it first keeps its mode ours and
		// makes sure that it is new.
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("keep a copy: %w", err)
		}
		if err = f.Close(); err == nil {
			err = s.db.exec("VACUUM INTO ?", name)
		}
		if err != nil {
			return "", errors.Join(fmt.Errorf("keep a copy: %w", err), os.Remove(name))
		}
		return name, nil
	}
}

const (
	pageBytes = 2 << 10 // of a new database; a lease changes two pages, the fewer bytes of which to log the better
	logBytes  = 4 << 20 // of the write-ahead log, before its pages go to the database
)

// prepareJournal switches to a journal that lets others read while we write.
func (s *store) prepareJournal(log *slog.Logger) error {
	var mode string
	var page int64
	if err := s.db.exec("PRAGMA page_size = " + strconv.Itoa(pageBytes)); err != nil {
		return err
	}
	if err := s.db.queryRow("PRAGMA journal_mode = WAL", &mode); err != nil {
		return err
	}
	if err := s.db.queryRow("PRAGMA page_size", &page); err != nil {
		return err
	}
	if err := s.db.exec("PRAGMA wal_autocheckpoint = " + strconv.FormatInt(logBytes/page, 10)); err != nil {
		return err
	}
	if mode != "wal" {
		log.Warn("the file system has no write-ahead log for databases: programs that read the leases delay new ones", "mode", mode)
	}
	// A lease means nothing after a crash of the machine, so nothing has to reach the disk in
	// order before a reply.
	return s.db.exec("PRAGMA synchronous = NORMAL")
}

// migrate brings the schema from a version to ours, within a transaction, and readies what
// needs it.
func (s *store) migrate(version int64) error {
	texts := migrations.Migrations()
	for n, text := range texts[version:] {
		if err := s.db.exec(text); err != nil {
			return fmt.Errorf("migrate to schema version %d: %w", version+int64(n)+1, err)
		}
	}
	if err := s.db.exec("PRAGMA user_version = " + strconv.Itoa(len(texts))); err != nil {
		return err
	}
	for _, p := range []struct {
		stmt **statement
		text string
	}{
		{&s.putLease, insertLeases(1)},
		{&s.putSome, insertLeases(rowsInOne)},
		{&s.dropLease, "DELETE FROM RtTables WHERE RtTable = ? AND AddrFamily = ?"},
		{&s.putHistory, "INSERT OR REPLACE INTO history (RtTable, AddrFamily, Ifname, Addr, Ended, Boot, Netns) VALUES (?, ?, ?, ?, ?, ?, ?)"},
		{&s.dropHistory, "DELETE FROM history WHERE RtTable = ? AND AddrFamily = ?"},
		{&s.putClock, "INSERT OR REPLACE INTO clock (id, boot, netns, monotonic, utc) VALUES (1, ?, ?, ?, ?)"},
	} {
		var err error
		if *p.stmt, err = s.db.prepare(p.text); err != nil {
			return err
		}
	}
	return nil
}

// save writes the state of slots and the clock row, all or nothing.
func (s *store) save(now int64, utc time.Time, lists ...[]*slot) error {
	err := s.transact(func() error { return s.put(now, utc, lists...) })
	if err == nil {
		s.clock = [2]int64{now, utc.Unix()}
	}
	s.left = s.stamp()
	return err
}

// amend is save for a database that another program wrote to, if it is whole. slots is all
// that there is.
func (s *store) amend(now int64, utc time.Time, slots []*slot) error {
	// What SQLite remembers of the file may be what it was.
	if err := s.db.exec("PRAGMA shrink_memory"); err != nil {
		return err
	}
	if err := s.check(); err != nil {
		return err
	}
	s.clock = [2]int64{}
	if err := s.transact(func() error {
		if err := s.db.exec("DELETE FROM RtTables WHERE Boot = ? AND Netns = ?", s.boot.ID, int64(s.boot.Netns)); err != nil {
			return err
		}
		return s.put(now, utc, slots)
	}); err != nil {
		return err
	}
	s.left = s.stamp()
	return nil
}

// fill readies the database at its path, which may be new, and writes slots and marks into it.
func (s *store) fill(slots []*slot, marks map[string]mark, now int64, utc time.Time, log *slog.Logger) error {
	version, original, err := s.version()
	if err == nil && original {
		err = errors.New("it is a database of the original: restart the server to take it over, or move it away")
	}
	if err == nil {
		err = s.check()
	}
	if err == nil {
		err = s.prepareJournal(log)
	}
	if err != nil {
		return err
	}
	if err := s.transact(func() error {
		if err := s.migrate(version); err != nil {
			return err
		}
		for ifname, m := range marks {
			if err := s.putMark(ifname, m); err != nil {
				return err
			}
		}
		return s.put(now, utc, slots)
	}); err != nil {
		return err
	}
	s.settle()
	return nil
}

// put writes states, not changes: after an error of unclear effect the same can be written
// again.
func (s *store) put(now int64, utc time.Time, lists ...[]*slot) error {
	var boot, netns driver.Value = s.boot.ID, int64(s.boot.Netns)
	for _, list := range lists {
		for len(list) > 0 {
			n := 1
			if len(list) >= rowsInOne && !slices.ContainsFunc(list[:rowsInOne], (*slot).hasPast) {
				n = rowsInOne
			}
			if err := s.putSlots(list[:n], boot, netns); err != nil {
				return fmt.Errorf("table %d of %s: %w", list[0].Table, list[0].Family, err)
			}
			list = list[n:]
		}
	}
	if s.clock == [2]int64{now, utc.Unix()} {
		return nil
	}
	return s.putClock.exec(boot, netns, now, utc.Unix())
}

// rowsInOne is how many rows one statement writes: a tenth of a row's time less than one by
// one, and with more rows it is not less.
const rowsInOne = 4

// insertLeases is a statement for so many rows.
func insertLeases(rows int) string {
	return `INSERT INTO RtTables (RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag, Owner, Boot, Netns, Sum)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)` + strings.Repeat(", (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows-1) + `
		ON CONFLICT (RtTable, AddrFamily) DO UPDATE SET Ifname = excluded.Ifname, Addr = excluded.Addr,
		LeaseExpires = excluded.LeaseExpires, Tag = excluded.Tag, Owner = excluded.Owner, Boot = excluded.Boot, Netns = excluded.Netns,
		Sum = excluded.Sum`
}

// putSlots writes one, or rowsInOne that have no past.
func (s *store) putSlots(slots []*slot, boot, netns driver.Value) error {
	s.row = s.row[:0]
	for _, t := range slots {
		s.row = append(s.row, int64(t.Table), int64(t.Family), t.Ifname, t.Addr, t.Expires, t.Tag, int64(t.Owner), boot, netns, t.sum(s.boot))
	}
	if len(slots) > 1 {
		return s.putSome.exec(s.row...)
	}
	t, table, family := slots[0], s.row[0], s.row[1]
	if t.held {
		err := s.putLease.exec(s.row...)
		if err == nil && t.past {
			err = s.dropHistory.exec(table, family)
		}
		return err
	}
	if !t.local {
		boot, netns = "", int64(0)
	}
	t.past = true
	err := s.putHistory.exec(table, family, t.Ifname, t.Addr, t.ended, boot, netns)
	if err == nil {
		err = s.dropLease.exec(table, family)
	}
	return err
}

// history returns the free tables that were in use before, the one unused for longest
// first.
func (s *store) history() (slots []*slot, err error) {
	err = s.db.query("SELECT RtTable, AddrFamily, Ifname, Addr, Ended, Boot, Netns FROM history ORDER BY Ended", func(row []driver.Value) error {
		t, boot, netns := &slot{}, "", int64(0)
		err := scan(row, &t.Table, &t.Family, &t.Ifname, &t.Addr, &t.ended, &boot, &netns)
		t.local = Boot{boot, uint64(netns)} == s.boot
		slots = append(slots, t)
		return err
	})
	return slots, err
}

// leaseRow is a row of RtTables as it is: the original, and people with sqlite3, put
// anything in any column.
type leaseRow struct {
	id                                        int64
	table, family, ifname, addr, expires, tag any
	owner, boot, netns                        any
	sum                                       any // nil: of an older schema
}

func (s *store) leaseRows(each func(leaseRow) error) error {
	const text = "SELECT rowid, RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag, Owner, Boot, Netns, Sum FROM RtTables ORDER BY rowid"
	return s.db.query(text, func(row []driver.Value) error {
		r := leaseRow{0, row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10]}
		if err := scan(row, &r.id); err != nil {
			return err
		}
		return each(r)
	})
}

// sumsSince is the schema version since which our rows have their sums.
const sumsSince = 4

// sum is what a row of ours has as checksum, never 0.
func (l *Lease) sum(at Boot) int64 {
	b := make([]byte, 0, 192)
	for _, n := range [...]int64{int64(l.Table), int64(l.Family), l.Expires, int64(l.Owner), int64(at.Netns)} {
		b = append(strconv.AppendInt(b, n, 10), ' ')
	}
	for _, text := range [...]string{l.Ifname, l.Addr, at.ID} {
		b = append(append(b, text...), 0)
	}
	return 1<<32 | int64(crc32.ChecksumIEEE(b))
}

// reject moves a row of RtTables that makes no sense to where nothing reads it.
func (s *store) reject(id int64, reason string) error {
	if err := s.db.exec(`INSERT INTO rejected SELECT RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag, Owner, Boot, Netns, ?
		FROM RtTables WHERE rowid = ?`, reason, id); err != nil {
		return err
	}
	return s.db.exec("DELETE FROM RtTables WHERE rowid = ?", id)
}
