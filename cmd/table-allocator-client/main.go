// Looking for a changed number of processors would wake an idle process.
//go:debug updatemaxprocs=0

// Command table-allocator-client leases a routing table for an address and installs the rules that
// lead to it; when the address is deleted, it deletes rules and routes and releases the lease. See its
// manual page, table-allocator-client(8).
package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/table-allocator/table-allocator/internal/cli"
)

// A command is named by the first word of a command line. Each has a file of its name.
type command struct {
	name, summary string
	usage         string // what --help prints
	wrong, failed int    // exit codes of wrong usage, and of all other errors
	declare       func(*flags) action
}

// An action executes a command with its arguments, after the options are parsed.
type action func(args []string) error

var commands = []command{
	{"watch", "serve every address of this host, as addresses come and go", watchUsage, 2, 1, watch},
	{"status", "show table, lease and holder of each address, and what is missing", statusUsage, 2, 1, status},
	{"explain", "say which rule and route decide where packets leave, and why", explainUsage, 2, 1, explain},
	{"doctor", "look for what is wrong with this host", doctorUsage, 2, 1, doctor},
	{"run", "execute a command whose traffic leaves by one link", runUsage, exitFailed, exitFailed, execute},
	{"attach", "bind running processes to a link", attachUsage, 2, 1, attach},
	{"detach", "undo run and attach", detachUsage, 2, 1, detach},
	{"bind", "bind a user, a port or a cgroup to a link", bindUsage, 2, 1, bindTraffic},
	{"unbind", "undo bind", bindUsage, 2, 1, unbindTraffic},
	{"bound", "show which processes, users and ports are bound to which link", boundUsage, 2, 1, bound},
	{"hook", "serve the addresses that dhclient, ifup or NetworkManager tell", hookUsage, 2, 1, hookEvent},
}

// original is the command line without a command word, as of the C original.
var original = command{"", "", holdUsage, 1, 1, hold}

// sharedUsage is the end of each command's help.
const sharedUsage = `  -d, --destination NAME    socket of the server (tas_socket)
      --server-user USER    trust a server of this user, too (repeatable)
      --debug               say more on standard error, or in the log
  -h, --help                print this and exit
`

// help returns what --help prints. Without a command word that begins with the list of commands.
func (c command) help() string {
	text := c.usage + sharedUsage
	if c.name != "" {
		return text
	}
	var list strings.Builder
	list.WriteString("Usage: table-allocator-client COMMAND [options]\n\n")
	for _, c := range commands {
		fmt.Fprintf(&list, "  %-8s %s\n", c.name, c.summary)
	}
	list.WriteString("\nCOMMAND --help prints the options of COMMAND.\n\n")
	return list.String() + text
}

func main() { cli.Exit(run(os.Args[1:])) }

func run(args []string) int {
	c := original
	if len(args) > 0 {
		if at := slices.IndexFunc(commands, func(c command) bool { return c.name == args[0] }); at >= 0 {
			c, args = commands[at], args[1:]
		}
	}
	f := newFlags(c.name)
	do := c.declare(f)
	err := f.parse(args)
	if c.name == "" && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		err = fmt.Errorf("%q is not a command", args[0])
	}
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Print(c.help())
		return cli.ExitOK
	case err != nil:
		err = wrongUsage(err)
	default:
		err = do(f.Args())
	}
	return c.exit(err)
}

// exit prints an error on standard error and returns the exit code.
func (c command) exit(err error) int {
	usage, coded := usageError{}, exitError{}
	switch {
	case err == nil:
		return cli.ExitOK
	case errors.As(err, &usage):
		warn(fmt.Errorf("%w (see %s)", err, strings.TrimSpace(c.name+" --help")))
		return c.wrong
	case errors.As(err, &coded):
		return coded.code
	}
	warn(err)
	return c.failed
}

// usageError says what is wrong with a command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func wrongUsage(err error) error { return usageError{err} }

// exitError is an exit code of a command that has printed the reason.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// exitWith prints an error and ends with an exit code of its own.
func exitWith(code int, err error) error {
	warn(err)
	return exitError{code}
}

// errMissing ends a command that has shown what is missing.
var errMissing = exitError{1}

// warn prints a message for the caller on standard error.
func warn(what any) { fmt.Fprintln(cli.Stderr, "table-allocator-client:", what) }
