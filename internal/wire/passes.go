package wire

import (
	"errors"

	"golang.org/x/sys/unix"
)

// tries is how often a system call is made whose error need not come back.
const tries = 4

// Again calls f until it returns no error, or one that would come back.
func Again(f func() error) (err error) {
	for range tries {
		if err = f(); err == nil || !Passes(err) {
			break
		}
	}
	return err
}

// Passes reports whether an error of a socket need not come back: memory was short, say.
func Passes(err error) bool {
	for _, errno := range []unix.Errno{unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EIO} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
