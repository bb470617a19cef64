package inspect

import (
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// asker asks the holders of leases.
type asker struct {
	ctx      context.Context // of one call of Status
	conn     *wire.Conn
	patience time.Duration // for all holders together that do not answer
}

// Those that answer, perhaps a thousand, take no time of the patience.
const patience = 5 * time.Second

func newAsker(ctx context.Context) (*asker, error) {
	conn, err := peer.Open(wire.Key{Ifname: "status"}, peer.AsAsker)
	return &asker{ctx, conn, patience}, err
}

func (a *asker) close() { a.conn.Close() }

// holder is what the holder of an address answered.
type holder struct {
	wire.Reply         // its PID is 0 without an answer
	absent     bool    // there is no holder
	silent     *string // why the holder does not answer
}

// ask asks the holder of a key.
func (a *asker) ask(key wire.Key) (h holder, err error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(a.ctx, a.patience)
	defer cancel()
	reply, err := peer.Ask(ctx, a.conn, wire.Request{Key: key, Cmd: wire.Query}, peer.HolderPatience)
	if err != nil || reply.PID == 0 {
		a.patience -= time.Since(began)
	}
	why := ""
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return holder{absent: true}, nil
	case errors.Is(err, context.DeadlineExceeded):
		why = "its process is there, and does not answer"
	case err != nil:
		why = err.Error()
	case reply.Code == wire.Denied:
		return holder{}, peer.ErrNotAsked
	default:
		return holder{Reply: reply}, nil
	}
	return holder{silent: &why}, nil
}
