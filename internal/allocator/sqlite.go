package allocator

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"os"
	"strconv"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// database is one connection to SQLite. It uses the driver without database/sql, which is for
// many connections and takes a fifth of the time of a row.
type database struct {
	conn     session
	prepared []*statement
}

type session interface {
	driver.Conn
	driver.ExecerContext
	driver.QueryerContext
}

func openDatabase(path string) (*database, error) {
	uri := url.URL{Scheme: "file", Path: path}
	connector, err := sqlite.NewConnector(uri.String())
	if err != nil {
		return nil, explain(err)
	}
	conn, err := connector.Connect(context.Background())
	if err != nil {
		return nil, explain(err)
	}
	return &database{conn: conn.(session)}, nil
}

func (d *database) close() error {
	var errs []error
	for _, s := range d.prepared {
		errs = append(errs, s.stmt.Close())
	}
	return explain(errors.Join(append(errs, d.conn.Close())...))
}

// exec runs a statement, or some. Arguments are what SQLite knows: int64, float64, string,
// []byte or nil.
func (d *database) exec(text string, args ...driver.Value) error {
	_, err := d.conn.ExecContext(context.Background(), text, ordered(nil, args))
	return explain(err)
}

// query calls each with every row. The next row uses the memory of the row again.
func (d *database) query(text string, each func(row []driver.Value) error) (err error) {
	rows, err := d.conn.QueryContext(context.Background(), text, nil)
	if err != nil {
		return explain(err)
	}
	defer func() {
		if closed := rows.Close(); err == nil { // otherwise Close repeats the error
			err = explain(closed)
		}
	}()
	row := make([]driver.Value, len(rows.Columns()))
	for {
		switch err := rows.Next(row); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return explain(err)
		}
		if err := each(row); err != nil {
			return err
		}
	}
}

// queryRow reads the one row that there is.
func (d *database) queryRow(text string, into ...any) error {
	found := false
	err := d.query(text, func(row []driver.Value) error {
		found = true
		return scan(row, into...)
	})
	if err == nil && !found {
		err = fmt.Errorf("%s: no answer", text)
	}
	return err
}

// scan reads columns. A value of another type than the schema's is damage.
func scan(row []driver.Value, into ...any) error {
	for i, to := range into {
		n, isInt := row[i].(int64)
		ok := false
		switch to := to.(type) {
		case *string:
			*to, ok = row[i].(string)
		case *int64:
			*to, ok = n, isInt
		case *uint32:
			*to, ok = uint32(n), isInt && n >= 0 && n <= math.MaxUint32
		case *Family:
			*to, ok = Family(n), isInt && n >= 0 && n <= math.MaxUint8
		}
		if !ok {
			return fmt.Errorf("%w: column %d is %v", errDamaged, i+1, row[i])
		}
	}
	return nil
}

// statement is a prepared statement.
type statement struct {
	stmt driver.Stmt
	run  driver.StmtExecContext
	args []driver.NamedValue
}

func (d *database) prepare(text string) (*statement, error) {
	stmt, err := d.conn.Prepare(text)
	if err != nil {
		return nil, explain(err)
	}
	s := &statement{stmt: stmt, run: stmt.(driver.StmtExecContext)}
	d.prepared = append(d.prepared, s)
	return s, nil
}

func (s *statement) exec(args ...driver.Value) error {
	s.args = ordered(s.args[:0], args)
	_, err := s.run.ExecContext(context.Background(), s.args)
	return explain(err)
}

func ordered(to []driver.NamedValue, args []driver.Value) []driver.NamedValue {
	for i, v := range args {
		to = append(to, driver.NamedValue{Ordinal: i + 1, Value: v})
	}
	return to
}

// errDamaged says that a file is not a whole database. It is not the error of a disk that is full,
// read-only or broken.
var errDamaged = errors.New("it is not a whole SQLite database")

// hints say what to do about errors of SQLite, by primary result code.
var hints = map[int]string{
	sqlite3.SQLITE_BUSY:     inUse,
	sqlite3.SQLITE_LOCKED:   inUse,
	sqlite3.SQLITE_FULL:     "make room on the file system",
	sqlite3.SQLITE_IOERR:    "the file system is full, read-only or broken; see the kernel log",
	sqlite3.SQLITE_READONLY: noWriting,
	sqlite3.SQLITE_CANTOPEN: noWriting,
	sqlite3.SQLITE_PERM:     noWriting,
}

const inUse = "another program holds a lock on it; fuser names it"

var noWriting = "the file and its directory must be writable for uid " + strconv.Itoa(os.Geteuid())

// explain adds to an error of SQLite what to do about it, and makes errDamaged of some.
func explain(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	code := e.Code() & 0xff
	if hint, ok := hints[code]; ok {
		return fmt.Errorf("%w: %s", err, hint)
	}
	// Our statements are right for our schema, so a logic error means that the schema is another one.
	if code == sqlite3.SQLITE_NOTADB || code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_ERROR {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}
