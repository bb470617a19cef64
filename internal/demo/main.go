// Command demo shows the pair at work: it makes a host with two uplinks out of network
// namespaces, starts the server and clients there, and sends packets. Nothing of it
// outlives it, and nothing of this machine's network is touched. See make demo.
package main

import (
	"os"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func main() { os.Exit(nettest.Program("demo", show)) }
