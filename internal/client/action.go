package client

import "github.com/table-allocator/table-allocator/internal/wire"

// action is something to do, in order.
type action struct {
	kind    actionKind
	request wire.Request
	table   uint32
	why     string
}

type actionKind int

const (
	send       actionKind = iota // request
	placeRules                   // and routes, for table; those of a table before it go; rulesPlaced follows
	clearRules                   // and routes, of table
	block                        // clearRules, but nothing may leave from the address if it returns
	fallBack                     // give main the routes, while there is no lease
	report                       // table (0: none, and why) to the caller
	finish                       // nothing is left to do: why
)
