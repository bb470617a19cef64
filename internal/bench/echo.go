package main

import (
	"github.com/table-allocator/table-allocator/internal/wire"
)

// echoCommand is the first argument of the process that serves echo.
const echoCommand = "echo"

// echo returns each datagram to whom it came from, and does nothing else. It does that with
// the server's own sockets, batches and all: simpler ones are slower, and would make the
// server look better.
func echo(name string) error {
	addr, err := wire.Exact(name)
	if err != nil {
		return err
	}
	conn, err := wire.Listen(addr, wire.MaxRequest)
	if err != nil {
		return err
	}
	var replies []wire.Message
	for {
		datagrams, err := conn.Receive()
		if err != nil {
			return err
		}
		replies = replies[:0]
		for _, d := range datagrams {
			replies = append(replies, wire.Message{Data: d.Data, To: d.From})
		}
		for _, err := range conn.Send(replies...) {
			if err != nil {
				return err
			}
		}
	}
}
