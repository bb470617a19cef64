package inspect

import (
	"context"
	"fmt"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// health is how the server says that it and its pool of a family stand; the zero Reply if it says nothing.
func (p *patient) health(family wire.Family) wire.Reply {
	if p.report.Server.State != Running {
		return wire.Reply{}
	}
	if p.healths == nil {
		p.healths = make(map[wire.Family]wire.Reply)
		server, err := peer.NewServer(p.question.Server, p.question.UIDs)
		for _, f := range []wire.Family{wire.Inet, wire.Inet6, wire.Unspec} {
			if err == nil {
				p.healths[f], err = server.Health(context.Background(), f)
			}
		}
		p.healthErr = err
	}
	p.unseen = p.healthErr
	return p.healths[family]
}

// lookPool finds pools that are nearly empty.
func lookPool(p *patient) (all []symptom) {
	for _, family := range []wire.Family{wire.Inet, wire.Inet6, wire.Unspec} {
		h := p.health(family)
		const high = 80 // percent
		if h.Tables == 0 || h.Leased*100 <= h.Tables*high {
			continue
		}
		what := fmt.Sprintf("more than %d %% of the tables for family %s are leased", high, family)
		if h.Leased == h.Tables {
			what = fmt.Sprintf("all tables for family %s are leased: the next address gets none", family)
		}
		all = append(all, symptom{what, fmt.Sprintf("%d of %d", h.Leased, h.Tables), moreTables()})
	}
	return all
}

// lookDatabase asks the server whether it can write its database. An answer for a family that is not served does not say so.
func lookDatabase(p *patient) []symptom {
	for _, family := range []wire.Family{wire.Inet, wire.Inet6, wire.Unspec} {
		if h := p.health(family); h.Code == wire.Storage {
			return []symptom{{"the server cannot write its database: it refuses new leases", h.Error, "make room on that file system, or let the server write there; " + outside.Journal("table-allocator-server")}}
		}
	}
	return nil
}
