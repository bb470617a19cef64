package probe

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLost says that a packet of a size is not answered, though smaller ones are.
var ErrLost = errors.New("no answer to packets of this size, and no message that they are too big")

const (
	sizeTries   = 3
	sizePatient = time.Second // for an answer
)

// PathMTU asks a target with a packet that no router may cut into pieces and that has size bytes with its IP header, after
// a small one that shows that the target answers. nil says that it is answered, or that a router says that it is too big.
// ErrLost says that it is lost; any other error, that the target does not answer at all.
func PathMTU(ctx context.Context, u Uplink, target netip.Addr, size int) error {
	const small = 56
	if err := pingSize(ctx, u, target, small); err != nil {
		return err
	}
	err := pingSize(ctx, u, target, size)
	switch {
	case err == nil, errors.Is(err, unix.EMSGSIZE):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	if err := pingSize(ctx, u, target, small); err != nil {
		return err // it has stopped answering
	}
	return ErrLost
}

// pingSize pings with packets of a size until one is answered.
func pingSize(ctx context.Context, u Uplink, target netip.Addr, size int) (err error) {
	for range sizeTries {
		try, cancel := context.WithTimeout(ctx, sizePatient)
		_, err = pingWith(try, u, target, size-ipHeader(target), true)
		cancel()
		if err == nil || errors.Is(err, unix.EMSGSIZE) {
			return err
		}
	}
	return err
}
