package client

import (
	"context"
	"errors"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/route"
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

// Status asks the holder of each address that cfg selects.
func Status(ctx context.Context, cfg WatchConfig) ([]Row, error) {
	kernel, err := route.Dial()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	links, err := kernel.Links()
	if err != nil {
		return nil, err
	}
	rows := []Row{}
	for _, link := range links {
		addresses, err := kernel.AddressesOn(unix.AF_UNSPEC, link.Index)
		if err != nil {
			return nil, err
		}
		for _, a := range addresses {
			uplink, ok := cfg.uplink(a, link.Name)
			if !ok {
				continue
			}
			row, err := statusOf(ctx, kernel, uplink)
			if err != nil {
				return nil, err
			}
			rows = append(rows, row)
		}
	}
	return rows, nil
}

func statusOf(ctx context.Context, kernel *route.Conn, u Uplink) (Row, error) {
	row := Row{Ifname: u.Key.Ifname, Address: u.Key.Address, Family: u.Key.Family.String()}
	conn, err := open(u.Key, asAsker)
	if err != nil {
		return row, err
	}
	defer conn.Close()
	to, err := wire.Padded(wire.HolderName(u.Key))
	if err != nil {
		return row, err
	}
	reply, err := askHolder(ctx, conn, to, wire.Request{Key: u.Key, Cmd: wire.Query}, holderPatience)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		row.Missing = "nobody serves this address: no client, no watch"
		return row, nil
	case err != nil:
		row.Missing = err.Error()
		return row, nil
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
	routes, err := kernel.Routes(u.family(), reply.Table)
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
