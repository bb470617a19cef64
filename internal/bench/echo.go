package main

import (
	"github.com/table-allocator/table-allocator/internal/wire"
)

// echoCommand is the first argument of the process that is the echo server.
const echoCommand = "echo"

// echo sends each datagram back to its sender and does nothing else. It uses the server's own
// sockets and batches: simpler sockets are slower, and would make the server look better.
func echo(name string) error {
	addr, err := wire.Exact(name)
	if err != nil {
		return err
	}
	conn, err := wire.Listen(addr, wire.MaxRequest)
	if err != nil {
		return err
	}
	if err := conn.Wait(); err != nil {
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
