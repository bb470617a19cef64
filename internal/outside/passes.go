package outside

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"
)

// Tries is how often something is tried whose error need not come back.
const Tries = 4

// passing are the errors that need not come back.
var passing = []error{unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EIO}

// Again calls f until it returns no error, or one that would come back.
func Again(f func() error) (err error) {
	for range Tries {
		if err = f(); !Passes(err) {
			break
		}
	}
	return err
}

// Passes reports whether an error need not come back: memory was short, say, or a signal came.
func Passes(err error) bool {
	return err != nil && slices.ContainsFunc(passing, func(one error) bool { return errors.Is(err, one) })
}
