// Command layer installs the Debian packages that the tests run into a
// cached overlay layer. See nettest.BuildLayer.
package main

import (
	"fmt"
	"os"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

func main() {
	if err := nettest.BuildLayer(); err != nil {
		fmt.Fprintln(os.Stderr, "layer:", err)
		os.Exit(1)
	}
}
