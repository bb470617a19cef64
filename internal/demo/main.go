// Command demo shows the server and the client at work: it makes a host with two uplinks out of
// network namespaces, starts the server and clients there, and sends packets. The namespaces end with
// the demo, and the network of this machine is not touched. See make demo.
package main

import (
	"os"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func main() { os.Exit(nettest.Program("demo", show)) }
