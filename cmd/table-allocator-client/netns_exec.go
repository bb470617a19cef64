package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

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
	case n.user != nil && h == nil:
		return errors.New("--user needs root")
	}
	path, err := lookPath(command[0])
	if err != nil {
		return notExecuted(command[0], err)
	}
	if h != nil && !h.Has(name) {
		file, err := netns.Load(netns.ConfigPath)
		if err == nil {
			err = h.Demand(context.Background(), file, name)
		}
		if err != nil {
			return err
		}
	}
	if err := n.awaitLease(h, name); err != nil {
		return err
	}
	c := netns.Command{Path: path, Args: command, User: n.user, Log: n.log}
	if h == nil {
		if c, err = byEnterer(c, name); err != nil {
			return err
		}
	} else if err := h.Enter(name); err != nil {
		return err
	}
	switch {
	case n.detach:
		if h == nil { // the service refuses here rather than where nobody looks
			if _, err := netns.Leased(context.Background(), name); err != nil {
				return err
			}
		}
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

// byEnterer is a command by table-allocator-enter, for those who are not root.
func byEnterer(c netns.Command, name string) (netns.Command, error) {
	path, err := netns.EntererPath()
	if err != nil {
		return c, err
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return c, fmt.Errorf("only root enters namespaces here: you cannot execute %s (%w). It is for members of the group %s; see \"WHO MAY ENTER\" in table-allocator-netns(8)",
			path, err, netns.DefaultGroup)
	}
	c.Path, c.Args = path, append([]string{path, name, c.Path}, c.Args...)
	return c, nil
}

// leased reports whether the uplink of a namespace has a lease.
func leased(h *netns.Host, name string) (bool, error) {
	if h == nil {
		return netns.Leased(context.Background(), name)
	}
	rows, err := h.List()
	return slices.ContainsFunc(rows, func(r netns.Row) bool { return r.Name == name && r.Leads() }), err
}

// awaitLease waits until the uplink of a namespace has a lease, as long as --wait says.
func (n *netnsFlags) awaitLease(h *netns.Host, name string) error {
	for deadline := time.Now().Add(n.wait); n.wait > 0; time.Sleep(100 * time.Millisecond) {
		if has, err := leased(h, name); err != nil || has {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("namespace %s: its uplink has no lease", name)
		}
	}
	return nil
}
