// To look how many processors there are now would wake an idle process.
//go:debug updatemaxprocs=0

// Command table-allocator-client leases a routing table for an address, installs the
// rules that lead to it, and takes everything back when the address goes. See its manual
// page, table-allocator-client(8).
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
)

func main() { os.Exit(run(os.Args[1:])) }

// commands are those with a name; without one it holds a lease.
var commands = map[string]func(args []string) int{
	"watch": runWatch, "status": runStatus, "run": runRun, "attach": runAttach, "detach": runDetach, "bound": runBound,
	"bind": runBind, "unbind": runUnbind,
}

func run(args []string) int {
	if len(args) > 0 {
		if command := commands[args[0]]; command != nil {
			return command(args[1:])
		}
	}
	opts, err := parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Print(usage)
		return cli.ExitOK
	case err != nil:
		return fail(err)
	case opts.version:
		fmt.Println(cli.Version())
		return cli.ExitOK
	case opts.release:
		return release(opts)
	case opts.foreground:
		log, err := cli.NewLogger(opts.logging(false))
		if err != nil {
			return fail(err)
		}
		return hold(opts, reportToStdout, log)
	}
	if parent := parentPipe(); parent != nil {
		return background(opts, parent)
	}
	return foreground()
}
