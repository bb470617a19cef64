package main

import (
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"time"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/netns"
)

// exec executes a command in a namespace. The first thread of this process enters, and executes: see run.
func (n *netnsFlags) exec(h *netns.Host, args []string) error {
	name, command, err := n.name(args)
	if err != nil {
		return err
	}
	switch {
	case len(command) == 0:
		return wrongUsage(errors.New("a COMMAND is needed behind the namespace"))
	case n.pty && n.detach:
		return wrongUsage(errors.New("--pty and --detach exclude each other"))
	case n.log != "" && !n.detach:
		return wrongUsage(errors.New("--log is for --detach"))
	}
	path, err := lookPath(command[0])
	if err != nil {
		return notExecuted(command[0], err)
	}
	if err := n.awaitLease(h, name); err != nil {
		return err
	}
	if err := h.Enter(name); err != nil {
		return err
	}
	c := netns.Command{Path: path, Args: command, User: n.user, Log: n.log}
	switch {
	case n.detach:
		pid, err := c.Start()
		if err != nil {
			return notExecuted(command[0], err)
		}
		_, err = fmt.Println(pid)
		return err
	case n.pty:
		code, err := c.RunOnTerminal()
		if err != nil {
			return notExecuted(command[0], err)
		}
		return exitError{code}
	}
	cli.Flush() // our lines come before those of COMMAND
	return notExecuted(command[0], c.Exec())
}

// awaitLease waits until the uplink of a namespace has a lease, as long as --wait says.
func (n *netnsFlags) awaitLease(h *netns.Host, name string) error {
	for deadline := time.Now().Add(n.wait); n.wait > 0; time.Sleep(100 * time.Millisecond) {
		rows, err := h.List()
		if err != nil {
			return err
		}
		for _, r := range rows {
			if r.Name == name && len(r.Tables) > 0 {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("namespace %s: its uplink has no lease", name)
		}
	}
	return nil
}

// parseAccount reads the name of a user, with all groups of that user.
func parseAccount(name string) (*netns.User, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, errors.New("no such user")
		}
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("the groups of %s: %w", name, err)
	}
	var account netns.User
	for _, id := range append([]string{u.Gid}, groups...) {
		n, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return nil, err
		}
		account.Groups = append(account.Groups, uint32(n))
	}
	account.GID = account.Groups[0]
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	account.UID = uint32(uid)
	return &account, err
}
