// Looking for a changed number of processors would wake an idle process.
//go:debug updatemaxprocs=0

// Command table-allocator-client leases a routing table for an address and installs the rules that
// lead to it; when the address is deleted, it deletes rules and routes and releases the lease. See its
// manual page, table-allocator-client(8).
package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
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
	{"history", "show what happened to the addresses of this host, and when", historyUsage, 2, 1, history},
	{"uplinks", "show which uplinks work, and which one unbound traffic uses", uplinksUsage, 2, 1, showUplinks},
	{"explain", "say which rule and route decide where packets leave, and why", explainUsage, 2, 1, explain},
	{"doctor", "look for what is wrong with this host", doctorUsage, 2, 1, doctor},
	{"run", "execute a command whose traffic leaves by one link", runUsage, exitFailed, exitFailed, execute},
	{"attach", "bind running processes to a link", attachUsage, 2, 1, attach},
	{"detach", "undo run and attach", detachUsage, 2, 1, detach},
	{"bind", "bind a user, a port or a cgroup to a link", bindUsage, 2, 1, bindTraffic},
	{"unbind", "undo bind", bindUsage, 2, 1, unbindTraffic},
	{"bound", "show which processes, users and ports are bound to which link", boundUsage, 2, 1, bound},
	{"release", "take back leases, rules and routes of links, addresses or the host", releaseUsage, 2, 1, release},
	{"reexec", "make holders go on with the installed program, after an upgrade", reexecUsage, 2, 1, reexec},
	{"netns", "run programs in network namespaces whose only way out is one link", netnsUsage, 2, 1, netnsCommand},
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

// overview is what --help prints without anything else: the commands, and how to get the options.
func overview() string {
	var list strings.Builder
	for _, c := range commands {
		fmt.Fprintf(&list, "  %-8s %s\n", c.name, c.summary)
	}
	return `Usage: table-allocator-client COMMAND [options]
Or:    table-allocator-client -4 -a ADDR [-n MASK] -i IFNAME [options]

` + list.String() + `
help COMMAND prints the options of COMMAND, version prints the version. Without
COMMAND a table for ADDR is leased: -4 --help prints the options of that.
`
}

func main() { cli.Exit(run(filepath.Base(os.Args[0]), os.Args[1:])) }

// The names of this program that change what a command line means.
const (
	shortName    = "tactl"                  // without a command it prints status
	originalName = "table_allocator_client" // the family of an address is never guessed
)

func run(name string, args []string) int {
	c, args := commandOf(name, args)
	cli.NameProcess(name, c.name)
	switch {
	case c.name != "help":
	case len(args) == 0:
		fmt.Print(overview())
		return cli.ExitOK
	default:
		if c, _ = commandOf("", args[:1]); c.name == "" || len(args) > 1 {
			return original.exit(wrongWord(strings.Join(args, " ")))
		}
		if c.name == "help" { // of help, that is the list of commands
			c = original
		}
		args = []string{"--help"}
	}
	f := newFlags(c.name)
	f.program = name
	do := c.declare(f)
	err := f.parse(args)
	if c.name == "" && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		return c.exit(wrongWord(args[0]))
	}
	switch {
	case errors.Is(err, pflag.ErrHelp):
		if c.name == "" && len(args) == 1 && name != originalName {
			fmt.Print(overview())
		} else {
			fmt.Print(c.usage + sharedUsage)
		}
		return cli.ExitOK
	case err != nil:
		err = wrongUsage(err)
	default:
		err = do(f.Args())
	}
	return c.exit(err)
}

// commandOf returns the command of a command line, and the rest of it.
func commandOf(name string, args []string) (command, []string) {
	if name == shortName && isStatus(args) {
		args = slices.Insert(slices.Clone(args), 0, "status")
	}
	if len(args) == 0 {
		return original, nil
	}
	for _, c := range append(commands, words...) {
		if c.name == args[0] {
			return c, args[1:]
		}
	}
	return original, args
}

// isStatus reports whether a command line without a command is one of status: it names no address, and asks for no help.
func isStatus(args []string) bool {
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		return false
	}
	return !slices.ContainsFunc(args, func(arg string) bool {
		if name, long := strings.CutPrefix(arg, "--"); long {
			name, _, _ = strings.Cut(name, "=")
			return slices.Contains([]string{"address", "release", "help", "version"}, name)
		}
		letters, short := strings.CutPrefix(arg, "-")
		if value := strings.IndexAny(letters, "acdilnt"); value >= 0 { // what follows is the value of that option
			letters = letters[:value+1]
		}
		return short && strings.ContainsAny(letters, "arh")
	})
}

// words are commands that need no list.
var words = []command{
	{name: "help"},
	{"version", "", "Usage: table-allocator-client version\n\nPrints the version.\n", 2, 1, func(*flags) action {
		return func(args []string) error {
			if err := noArguments(args); err != nil {
				return err
			}
			fmt.Println(cli.Version())
			return nil
		}
	}},
}

// wrongWord says that a word is no command, and which one is meant.
func wrongWord(word string) error {
	nearest, least := "", 3 // what differs by more is another word
	for _, c := range append(commands, words...) {
		if d := distance(word, c.name); d < least {
			nearest, least = c.name, d
		}
	}
	meant := ""
	if _, err := net.InterfaceByName(word); err == nil || isAddress(word) {
		nearest = "status " + word
	}
	if nearest != "" {
		meant = ": did you mean " + nearest + "?"
	}
	var names []string
	for _, c := range commands {
		names = append(names, c.name)
	}
	warn(fmt.Sprintf("%q is not a command%s (commands: %s; see --help)", word, meant, strings.Join(names, " ")))
	return exitError{original.wrong}
}

func isAddress(word string) bool {
	_, err := netip.ParseAddr(word)
	return err == nil
}

// distance is how many letters have to be added, removed, changed or swapped with their neighbour to make b of a.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// exit prints an error on standard error and returns the exit code.
func (c command) exit(err error) int {
	usage, coded := usageError{}, exitError{}
	switch {
	case err == nil:
		return cli.ExitOK
	case errors.As(err, &usage):
		warn(fmt.Errorf("%w (see %s --help)", err, cmp.Or(c.name, "-4")))
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
func warn(what any) { fmt.Fprintln(cli.Stderr, "table-allocator-client:", message(fmt.Sprint(what))) }
