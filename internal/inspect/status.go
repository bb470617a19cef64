// Package inspect says how the addresses of the host stand, from what their holders answer and the kernel has.
package inspect

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Row is how one address of the host stands.
type Row struct {
	Ifname    string `json:"ifname"`
	Address   string `json:"address"`
	Family    string `json:"family"`
	Table     uint32 `json:"table"`             // 0: none
	LeaseLeft int64  `json:"lease_left"`        // seconds
	Gateway   string `json:"gateway,omitempty"` // of the first default route of the table
	PID       int    `json:"pid,omitempty"`     // of the holder
	Mode      string `json:"mode,omitempty"`    // what the holder does about routes
	Missing   string `json:"missing,omitempty"` // empty: all is as it should be
}

// patience is for all holders together that do not answer. Those that answer, perhaps a thousand, take no time of it.
const patience = 5 * time.Second

// Status asks the holder of each address that cfg selects.
func Status(ctx context.Context, cfg uplink.Selection) ([]Row, error) {
	kernel, err := route.Dial()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	candidates, rows, err := selected(kernel, cfg)
	if err != nil {
		return nil, err
	}
	patience := patience
	var conn *wire.Conn
	for _, c := range candidates {
		if conn == nil {
			if conn, err = peer.Open(c.Key, peer.AsAsker); err != nil {
				return nil, err
			}
			defer conn.Close()
		}
		began := time.Now()
		asking, cancel := context.WithTimeout(ctx, patience)
		row, err := rowOf(asking, kernel, conn, c.Uplink)
		cancel()
		if err != nil {
			return nil, err
		}
		if row.PID == 0 {
			patience -= time.Since(began)
		}
		if row.PID != 0 || c.wanted {
			rows = append(rows, row)
		}
	}
	slices.SortStableFunc(rows, func(a, b Row) int { return cmp.Compare(a.Ifname, b.Ifname) })
	return rows, nil
}

// candidate is an address that the configuration selects by the name of its link.
type candidate struct {
	uplink.Uplink
	wanted bool // its link is one that a watch serves
}

// selected returns the addresses to ask for, and the rows of links that look like uplinks and are excluded.
func selected(kernel *route.Conn, cfg uplink.Selection) (candidates []candidate, excluded []Row, err error) {
	byIndex, addresses, err := kernel.HostAddresses()
	if err != nil {
		return nil, nil, err
	}
	defaults := make(map[int]bool)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := kernel.Routes(family, unix.RT_TABLE_MAIN)
		if err != nil {
			return nil, nil, err
		}
		maps.Copy(defaults, uplink.Defaults(routes))
	}
	links := uplink.Links(byIndex, defaults)
	slices.SortFunc(addresses, func(a, b route.Address) int { return a.Addr.Compare(b.Addr) })
	excluded = []Row{}
	for _, a := range addresses {
		link := links[a.Index]
		u, ok := cfg.Uplink(a, link.Name)
		if ok {
			candidates = append(candidates, candidate{u, cfg.Wants(link)})
		} else if link.Default && cfg.Excludes(link.Name) && link.Name != uplink.Loopback && a.Addr.IsGlobalUnicast() {
			excluded = append(excluded, Row{Ifname: link.Name, Address: a.Addr.String(), Family: wire.Family(a.Family()).String(),
				Missing: "service: the configuration excludes this link, and main has a default route over it"})
		}
	}
	return candidates, excluded, nil
}

func rowOf(ctx context.Context, kernel *route.Conn, conn *wire.Conn, u uplink.Uplink) (Row, error) {
	row := Row{Ifname: u.Key.Ifname, Address: u.Key.Address, Family: u.Key.Family.String()}
	reply, err := peer.Ask(ctx, conn, wire.Request{Key: u.Key, Cmd: wire.Query}, peer.HolderPatience)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		row.Missing = "a holder: there is no client for it, and no watch"
		return row, nil
	case errors.Is(err, context.DeadlineExceeded):
		row.Missing = "an answer of its holder, which is there"
		return row, nil
	case err != nil:
		row.Missing = "an answer of its holder: " + err.Error()
		return row, nil
	case reply.Code == wire.Denied:
		return row, peer.ErrNotAsked
	}
	row.PID, row.Mode, row.Table, row.Missing = reply.PID, reply.Mode, reply.Table, reply.Missing
	if reply.Table == 0 {
		row.Missing = "a lease"
		if reply.Error != "" {
			row.Missing += ": " + reply.Error
		}
		return row, nil
	}
	row.LeaseLeft = max(reply.Expires-wire.Seconds(wire.Now()), 0)
	routes, err := kernel.Routes(u.Family(), reply.Table)
	if err != nil {
		return row, err
	}
	row.Gateway = gatewayOf(routes)
	return row, nil
}

// gatewayOf is where the first default route leads: an address, or "link".
func gatewayOf(routes []route.Route) string {
	best := route.Route{}
	found := false
	for _, r := range routes {
		if r.Dst.Bits() == 0 && r.Type == unix.RTN_UNICAST && (!found || r.Metric < best.Metric) {
			best, found = r, true
		}
	}
	switch {
	case !found:
		return ""
	case best.Gateway == netip.Addr{}:
		return "link"
	}
	return best.Gateway.String()
}
