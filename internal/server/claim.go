package server

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// claim is which tables a server leases, of which families (bits). It is the name of a socket, by which servers of one network
// namespace that have other databases and other socket names find each other.
type claim struct {
	first, last uint64
	families    uint
}

const claimForm = "table-allocator-tables-%d-%d-%d"

func claimOf(cfg Config) claim {
	c := claim{first: uint64(cfg.FirstTable), last: uint64(cfg.FirstTable) + cfg.Tables - 1}
	for _, family := range cfg.Families {
		c.families |= 1 << family
	}
	return c
}

// overlaps reports whether both servers may lease the same table of one family.
func (c claim) overlaps(o claim) bool {
	return c.first <= o.last && o.first <= c.last && c.families&o.families != 0
}

// makeClaim binds the name of the claim, and warns of each other server that leases the same tables. It only warns: any process
// of the same user could else keep the server from its work. Users that are not trusted are not heard.
func makeClaim(c claim, log *slog.Logger) (*wire.Conn, error) {
	names, err := wire.PaddedNames(func(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() })
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		var other claim
		if n, err := fmt.Sscanf(name, claimForm, &other.first, &other.last, &other.families); n < 3 || err != nil || !c.overlaps(other) {
			continue
		}
		whose := "unknown"
		if addr, err := wire.Padded(name); err == nil {
			if owner, err := wire.FindOwner(addr); err == nil {
				whose = owner.String()
			}
		}
		log.Warn("another server leases the same tables, so two addresses may get one: stop it, or give one of them another table_offset",
			"owner", whose, "tables", fmt.Sprintf("%d-%d", other.first, other.last))
	}
	addr, err := wire.Padded(fmt.Sprintf(claimForm+"-%x", c.first, c.last, c.families, rand.Uint64()))
	if err != nil {
		return nil, err
	}
	return wire.Listen(addr, 1)
}
