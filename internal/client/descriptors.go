package client

import (
	"errors"
	"log/slog"
	"syscall"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// spareDescriptors stay free for all that a watch does for the addresses that it serves: files of /proc, which say whether a
// sender is root, questions to other sockets, probes, programs that it executes. A process that has few keeps a quarter of them.
const spareDescriptors = 16

// errFull says that a process has too few descriptors to serve one more address.
var errFull = errors.New("too few descriptors are free")

// shortage is how many addresses have no session since each of them takes a descriptor.
type shortage struct {
	limit int  // of descriptors, since the last address that had none; 0: there are enough
	all   bool // the limit is that of the host
	left  int  // addresses
	told  int  // addresses of which the log has said so
}

func (f *shortage) begin() { f.limit, f.all, f.left = 0, false, 0 }

// open binds a name of the holder of key, unless too few descriptors are free then. After the first address that is left out
// it tries no other one.
func (h *host) open(key wire.Key, as string) (*wire.Conn, error) {
	if h.shortage.limit != 0 {
		return nil, errFull
	}
	conn, err := peer.Open(key, as)
	if all := errors.Is(err, syscall.ENFILE); all || errors.Is(err, syscall.EMFILE) {
		h.shortage.limit, h.shortage.all = wire.MaxDescriptors(), all
		return nil, errFull
	}
	if err != nil {
		return nil, err
	}
	if free, limit := conn.Room(); free < min(spareDescriptors, limit/4) {
		h.shortage.limit = limit
		return nil, errors.Join(errFull, conn.Close())
	}
	return conn, nil
}

// tell logs how many addresses are left out, when that changes.
func (f *shortage) tell(log *slog.Logger) {
	switch {
	case f.left == f.told:
	case f.left == 0:
		log.Info("there are descriptors for all addresses again")
	case f.all:
		log.Error("the host has no descriptor left, so some addresses are not served: see sysctl fs.file-nr and fs.file-max", "not_served", f.left)
	default:
		log.Error("this process may not open one descriptor for each address, so some are not served: raise LimitNOFILE= of the unit, or ulimit -n",
			"not_served", f.left, "limit", f.limit)
	}
	f.told = f.left
}
