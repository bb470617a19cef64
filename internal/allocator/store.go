package allocator

import (
	"database/sql/driver"
	"errors"
	"fmt"
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
	epoch Epoch
	path  string
	file  *os.File
	found [3]fileID // what path and its companions led to when it was opened
	made  bool      // the file was new then
	begun bool      // it has our schema and rows
	db    *database // nil once it is closed

	begin, commit                                *statement
	putLease, putSome                            *statement // one lease, rowsInOne
	dropLease, putHistory, dropHistory, putClock *statement
	row                                          []driver.Value // for them
	clock                                        [2]int64       // the row that the database has: monotonic, utc
}

// patienceAtStart is how many milliseconds SQLite waits for locks of other programs before the server
// serves. Afterwards it does not wait, so that no program can delay renewals with a lock.
const patienceAtStart = 250

// openStore opens the database. It changes the mode of the file and nothing in it. The caller closes the
// store also after an error.
func openStore(path string, epoch Epoch, log *slog.Logger) (s *store, err error) {
	s = &store{epoch: epoch, path: path}
	if s.file, s.made, err = openFile(path, log); err != nil {
		return s, err
	}
	var mine unix.Stat_t
	if err := unix.Fstat(int(s.file.Fd()), &mine); err != nil {
		return s, err
	}
	s.found[0] = fileID{mine.Dev, mine.Ino}
	if err := checkHeader(s.file); err != nil {
		return s, err
	}
	if err := s.file.Chmod(0o600); err != nil {
		return s, explainFile(err)
	}
	if s.db, err = openDatabase(path); err != nil {
		return s, err
	}
	// A lease means nothing after a crash of the machine, so nothing has to reach the disk.
	if err := s.db.exec("PRAGMA busy_timeout = " + strconv.Itoa(patienceAtStart) + "; PRAGMA synchronous = OFF"); err != nil {
		return s, err
	}
	// In a directory that other users write to, the path may lead to another file by now.
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

// errAstray says that the path does not lead to the open files any more.
var errAstray = errors.New("it was deleted, or moved away")

// astray reports whether the path does not lead to the open files any more. SQLite would go on writing to
// files that no later server finds.
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

// close also drops the lock, so nothing may be written afterwards. It closes the file last: closing any
// descriptor of a file drops the locks that SQLite has on it. To close again does nothing.
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

// transact runs fn in a transaction that has the write lock from its beginning: if another program has
// the lock, transact fails before anything is written.
func (s *store) transact(fn func() error) error {
	err := s.begin.exec()
	if err == nil {
		err = fn()
	}
	if err == nil {
		err = s.commit.exec()
	}
	if err != nil {
		// If SQLite has ended the transaction itself, or never begun it, this fails, as it should.
		_ = s.db.exec("ROLLBACK")
	}
	return err
}

// schemaVersion is the schema version of the databases that this program writes.
var schemaVersion = int64(len(migrations.Migrations()))

// version returns the schema version, and whether this is a database of the original. A database of
// another program is an error.
func (s *store) version() (version int64, original bool, err error) {
	if err := s.db.queryRow("PRAGMA user_version", &version); err != nil {
		return 0, false, err
	}
	var ours, others int64
	if err := s.db.queryRow("SELECT count(*) FILTER (WHERE name = 'RtTables' COLLATE NOCASE), count(*) FROM sqlite_master WHERE type = 'table'",
		&ours, &others); err != nil {
		return 0, false, err
	}
	if ours == 0 && others == 0 && version == 0 {
		return 0, false, nil
	}
	if ours > 0 {
		err = s.db.exec("SELECT RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag FROM RtTables LIMIT 0")
	}
	switch {
	case ours == 0 || err != nil || version < 0:
		if proven, proofErr := s.ours(); proven || proofErr != nil {
			return 0, false, errors.Join(errDamaged, proofErr)
		}
		return 0, false, errors.New("it is a database of another program: choose another path")
	case version > schemaVersion:
		return 0, false, fmt.Errorf("it has schema version %d, this program knows up to %d: install the newer version again, or choose another path",
			version, schemaVersion)
	}
	return version, version == 0, nil
}

// check has SQLite check all of the database. A damaged one must neither be read as leases nor be written
// to.
func (s *store) check() error {
	var found string
	err := s.db.queryRow("PRAGMA integrity_check(1)", &found)
	if err == nil && found != "ok" {
		err = fmt.Errorf("%w: %s", errDamaged, strings.ReplaceAll(found, "\n", " "))
	}
	return err
}

// copyOriginal writes a copy of the database beside it and returns its path.
func (s *store) copyOriginal() (string, error) {
	for n := 0; ; n++ {
		name := s.path + ".original"
		if n > 0 {
			name += "." + strconv.Itoa(n)
		}
		// SQLite takes an empty file as a new database. Making it here gives it our mode, and makes sure
		// that it is new.
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

// start migrates the database from a schema version to ours and lets fill write rows, all or nothing.
func (s *store) start(version int64, log *slog.Logger, fill func() error) (err error) {
	if err := s.prepareJournal(log); err != nil {
		return err
	}
	if err := s.transact(func() error {
		if err := s.migrate(version); err != nil {
			return err
		}
		return fill()
	}); err != nil {
		return err
	}
	for i, suffix := range companions[1:] {
		s.found[i+1], _ = identify(s.path + suffix) // after an error astray ignores it
	}
	s.begun = true
	return s.db.exec("PRAGMA busy_timeout = 0")
}

// journal sets up the write-ahead log. A new database has small pages, since a lease changes two of them.
// After 4 MiB the pages in the log are written to the database.
const journal = `PRAGMA page_size = 2048; PRAGMA wal_autocheckpoint = 2048; PRAGMA application_id = %d`

// prepareJournal switches to the write-ahead log, with which other programs can read while we write, and
// writes into the header whose database it is.
func (s *store) prepareJournal(log *slog.Logger) (err error) {
	if err := s.db.exec(fmt.Sprintf(journal, applicationID)); err != nil {
		return err
	}
	var mode string
	if err := s.db.queryRow("PRAGMA journal_mode = WAL", &mode); err != nil {
		return err
	}
	if mode != "wal" {
		log.Warn("the file system has no write-ahead log for databases: programs that read the leases keep new ones from being granted", "mode", mode)
	}
	return s.prepare(statements{
		{&s.begin, "BEGIN IMMEDIATE"},
		{&s.commit, "COMMIT"},
	})
}

type statements []struct {
	stmt **statement
	text string
}

func (s *store) prepare(all statements) (err error) {
	for _, p := range all {
		if *p.stmt, err = s.db.prepare(p.text); err != nil {
			return err
		}
	}
	return nil
}

// migrate brings the schema from a version to ours, within a transaction, and prepares what
// needs it.
func (s *store) migrate(version int64) error {
	for n, text := range migrations.Migrations()[version:] {
		if err := s.db.exec(text); err != nil {
			return fmt.Errorf("migrate to schema version %d: %w", version+int64(n)+1, err)
		}
	}
	if err := s.db.exec("PRAGMA user_version = " + strconv.FormatInt(schemaVersion, 10)); err != nil {
		return err
	}
	return s.prepare(statements{
		{&s.putLease, insertLeases(1)},
		{&s.putSome, insertLeases(rowsInOne)},
		{&s.dropLease, "DELETE FROM RtTables WHERE RtTable = ? AND AddrFamily = ?"},
		{&s.putHistory, "INSERT OR REPLACE INTO history (RtTable, AddrFamily, Ifname, Addr, Ended, Boot, Netns, Reserved) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"},
		{&s.dropHistory, "DELETE FROM history WHERE RtTable = ? AND AddrFamily = ?"},
		{&s.putClock, "INSERT OR REPLACE INTO clock (id, boot, netns, monotonic, utc) VALUES (1, ?, ?, ?, ?)"},
	})
}

// put writes the state of slots. It does not write changes, so it can write the same again after an error
// of which the effect is not known.
func (s *store) put(now int64, utc time.Time, lists ...[]*slot) error {
	var boot, netns driver.Value = s.epoch.Boot, int64(s.epoch.Netns)
	for _, list := range lists {
		for len(list) > 0 {
			n := 1
			if len(list) >= rowsInOne && !slices.ContainsFunc(list[:rowsInOne], (*slot).hasHistory) {
				n = rowsInOne
			}
			if err := s.putSlots(list[:n], boot, netns); err != nil {
				return fmt.Errorf("table %d of %s: %w", list[0].Table, list[0].Family, err)
			}
			list = list[n:]
		}
	}
	clock := [2]int64{now, utc.Unix()}
	if s.clock == clock {
		return nil
	}
	s.clock = clock
	return s.putClock.exec(boot, netns, clock[0], clock[1])
}

// rowsInOne is how many rows one statement writes. A row takes a tenth less time than with one row in a
// statement; more rows save no more.
const rowsInOne = 4

// insertLeases returns the statement for a number of rows.
func insertLeases(rows int) string {
	return `INSERT INTO RtTables (RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag, Owner, Boot, Netns)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)` + strings.Repeat(", (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows-1) + `
		ON CONFLICT (RtTable, AddrFamily) DO UPDATE SET Ifname = excluded.Ifname, Addr = excluded.Addr,
		LeaseExpires = excluded.LeaseExpires, Tag = excluded.Tag, Owner = excluded.Owner, Boot = excluded.Boot, Netns = excluded.Netns`
}

// putSlots writes one slot, or rowsInOne slots without history.
func (s *store) putSlots(slots []*slot, boot, netns driver.Value) error {
	s.row = s.row[:0]
	for _, t := range slots {
		s.row = append(s.row, int64(t.Table), int64(t.Family), t.Ifname, t.Addr, t.Expires, t.Tag, int64(t.Owner), boot, netns)
	}
	if len(slots) > 1 {
		return s.putSome.exec(s.row...)
	}
	t, table, family := slots[0], s.row[0], s.row[1]
	if t.held {
		err := s.putLease.exec(s.row...)
		if err == nil && t.history {
			err = s.dropHistory.exec(table, family)
		}
		return err
	}
	if !t.local {
		boot, netns = "", int64(0)
	}
	t.history = true
	err := s.putHistory.exec(table, family, t.Ifname, t.Addr, t.ended, boot, netns, t.reserved)
	if err == nil {
		err = s.dropLease.exec(table, family)
	}
	return err
}

// leases calls each for the rows of RtTables. The original, and people with sqlite3, may have written any
// type into any column.
func (s *store) leases(version int64, order string, each func(row []driver.Value) error) error {
	since2 := "0, '', 0"
	if version >= 2 {
		since2 = "Owner, Boot, Netns"
	}
	return s.db.query("SELECT rowid, RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag, "+since2+" FROM RtTables ORDER BY rowid "+order, each)
}

// history calls each for the free tables that were leased before.
func (s *store) history(version int64, each func(*slot)) error {
	reserved := "0"
	if version >= 5 {
		reserved = "Reserved"
	}
	if version < 2 {
		return nil
	}
	return s.db.query("SELECT RtTable, AddrFamily, Ifname, Addr, Ended, Boot, Netns, "+reserved+" FROM history", func(row []driver.Value) error {
		t, boot, netns := &slot{history: true}, "", int64(0)
		err := scan(row, &t.Table, &t.Family, &t.Ifname, &t.Addr, &t.ended, &boot, &netns, &t.reserved)
		if err == nil {
			t.local = Epoch{boot, uint64(netns)} == s.epoch
			each(t)
		}
		return err
	})
}

// deleteLease deletes a row of RtTables.
func (s *store) deleteLease(id int64) error {
	return s.db.exec("DELETE FROM RtTables WHERE rowid = ?", id)
}

// marks calls each for the marks of interfaces.
func (s *store) marks(version int64, each func(ifname string, m mark)) error {
	if version < 3 {
		return nil
	}
	return s.db.query("SELECT ifname, idx, used FROM marks", func(row []driver.Value) error {
		var ifname string
		var m mark
		err := scan(row, &ifname, &m.index, &m.used)
		if err == nil {
			each(ifname, m)
		}
		return err
	})
}

func (s *store) putMark(ifname string, m mark) error {
	return s.db.exec("INSERT OR REPLACE INTO marks (ifname, idx, used) VALUES (?, ?, ?)", ifname, int64(m.index), m.used)
}
