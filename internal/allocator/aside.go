package allocator

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The server starts also with a damaged database: it renames the file, so that nothing is lost, and
// begins a new one. Rows that it can still read become preferences, and clients that run name their
// numbers when they renew.

const (
	headerBytes   = 100 // of an SQLite database
	applicationAt = 68  // in the header

	// applicationID is what databases of ours have there.
	applicationID = 0x54614c41

	asideMark = ".damaged-" // in the name of a database that is set aside, before the date
	asideMost = 3           // databases that may be set aside
)

// errInPlace says that the path leads to a file that we have not opened.
var errInPlace = errors.New("another file is in its place: move that away, and the leases are written anew; or restart the server to use it")

// ours reports whether a damaged file was certainly a database of this program or of the original, or
// consists of zeros, as after a power cut.
func (s *store) ours() (bool, error) {
	const most = 64 << 20 // bytes to search for the schema, which is near the beginning
	data, err := io.ReadAll(io.NewSectionReader(s.file, 0, most))
	if err != nil {
		return false, err
	}
	has := func(text string) bool { return bytes.Contains(data, []byte(text)) }
	return len(data) >= headerBytes && binary.BigEndian.Uint32(data[applicationAt:]) == applicationID ||
		has("RtTables") && has("LeaseExpires") || len(bytes.TrimLeft(data, "\x00")) == 0, nil
}

// prove returns an error unless a damaged file was certainly ours.
func (s *store) prove() error {
	ours, err := s.ours()
	if err == nil && !ours {
		err = errors.New("move the file away, or choose another path")
	}
	return err
}

// setAside renames a damaged database of ours, with its companions, and returns its new name.
func (s *store) setAside(utc time.Time) (aside string, err error) {
	if err := s.makeRoom(); err != nil {
		return "", err
	}
	aside = s.path + asideMark + utc.UTC().Format("20060102-150405.000")
	for _, suffix := range companions {
		err := os.Rename(s.path+suffix, aside+suffix)
		if err == nil {
			err = os.Chmod(aside+suffix, 0o600)
		}
		if err != nil && !(suffix != "" && errors.Is(err, fs.ErrNotExist)) {
			return "", fmt.Errorf("set it aside: %w", err)
		}
	}
	return aside, nil
}

// makeRoom deletes the newest database that was set aside if there are asideMost. The oldest ones show
// best what damaged them.
func (s *store) makeRoom() error {
	dir, base := filepath.Split(s.path)
	entries, err := os.ReadDir(dir) // in the order of names, and so of dates
	if err != nil {
		return err
	}
	var sets []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), base+asideMark) && !strings.HasSuffix(e.Name(), companions[1]) && !strings.HasSuffix(e.Name(), companions[2]) {
			sets = append(sets, e.Name())
		}
	}
	var errs []error
	for len(sets) >= asideMost {
		for _, suffix := range companions {
			if err := os.Remove(filepath.Join(dir, sets[len(sets)-1]+suffix)); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		sets = sets[:len(sets)-1]
	}
	return errors.Join(errs...)
}

// leave closes a database that is damaged or was deleted, and sets it aside if the file is still there.
func (s *store) leave(utc time.Time) (aside string, err error) {
	switch now, err := identify(s.path); {
	case err != nil:
		return "", err
	case now == fileID{}:
	case now != s.found[0]:
		return "", errInPlace
	case !s.begun && s.made: // an earlier attempt to begin anew has left it
		return "", errors.Join(s.close(), os.Remove(s.path))
	case !s.begun:
		return "", errInPlace
	default:
		if err = s.prove(); err == nil {
			aside, err = s.setAside(utc)
		}
		if err != nil {
			return "", err
		}
	}
	return aside, s.close()
}
