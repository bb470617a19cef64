package main

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
)

const attachUsage = `Usage: table-allocator-client attach IFNAME [options] PID...

Binds running processes: what they and their future children connect to from
now on leaves by IFNAME. Established connections stay where they are. A line
for each socket says what was done. Needs root.

  -i, --ifname IFNAME       the link; one of its addresses needs a lease
      --on-loss WHAT        while the link has no route: block (default: nothing
                            leaves by another link) or fallback
      --local               reach containers, too (default), or --local=false
      --tree                the descendants of the processes, too
      --reset               cut connections, so that programs connect again
      --wait SECONDS        how long to wait for a lease (0)
      --force               bind to a name that no link has yet
`

const detachUsage = `Usage: table-allocator-client detach [IFNAME] [options] PID...

Undoes run and attach. Established connections stay where they are. Needs root.

  -i, --ifname IFNAME       only processes that are bound to this link
      --tree                the descendants of the processes, too
`

func attach(f *flags) action {
	b := newBindFlags(f)
	value(f, &b.config.Wait, "wait", "", parseSeconds)
	tree := f.Bool("tree", false, "")
	reset := f.Bool("reset", false, "")
	return func(args []string) error {
		args, err := f.takeLink(&b.config.Ifname, args)
		if err != nil {
			return err
		}
		pids, err := parsePIDs(args)
		if err != nil {
			return err
		}
		if err := b.check(); err != nil {
			return err
		}
		target, mark, err := b.bind()
		if err == nil {
			err = each(pids, *tree, func(c *cgroup.Cgroups, pid int) (cgroup.Process, error) {
				return c.Attach(pid, target, mark, *reset)
			})
		}
		return b.undo(err)
	}
}

func detach(f *flags) action {
	var ifname string
	f.link(&ifname)
	tree := f.Bool("tree", false, "")
	return func(args []string) error {
		args, err := f.takeLink(&ifname, args)
		if err != nil {
			return err
		}
		pids, err := parsePIDs(args)
		if err != nil {
			return err
		}
		if err := f.needsRoot(); err != nil {
			return err
		}
		f.debug("processes %v", pids)
		return each(pids, *tree, func(c *cgroup.Cgroups, pid int) (cgroup.Process, error) {
			if ifname != "" {
				bound, err := c.BoundTo(pid, ifname)
				if err == nil && !bound {
					err = fmt.Errorf("process %d %w %s", pid, errNotBound, ifname)
				}
				if err != nil {
					return cgroup.Process{}, err
				}
			}
			return c.Detach(pid)
		})
	}
}

var errNotBound = errors.New("is not bound to")

func parsePIDs(args []string) (pids []int, err error) {
	if len(args) == 0 {
		return nil, wrongUsage(errors.New("a PID is needed"))
	}
	for _, arg := range args {
		pid, err := strconv.ParseInt(arg, 10, 32)
		if err != nil || pid < 1 {
			return nil, wrongUsage(fmt.Errorf("%q is not a process id", arg))
		}
		pids = append(pids, int(pid))
	}
	return pids, nil
}

// each attaches or detaches the processes and prints what was done to each. An error of one process
// does not end the loop.
func each(pids []int, tree bool, do func(*cgroup.Cgroups, int) (cgroup.Process, error)) error {
	cgroups, err := cgroup.Open()
	if err != nil {
		return err
	}
	defer cgroups.Close()
	var failed error
	one := func(pid int) {
		p, err := do(cgroups, pid)
		warnMissing(p.Missing)
		if p.Cgroup != "" {
			fmt.Printf("%d (%s): cgroup %s\n", p.PID, quoted(p.Name), quoted(p.Cgroup))
		}
		for _, s := range p.Sockets {
			fmt.Println(" ", quoted(s.String()))
		}
		for _, what := range p.Unseen {
			fmt.Println("  left alone:", quoted(what))
		}
		if err != nil && !(tree && (errors.Is(err, unix.ESRCH) || errors.Is(err, errNotBound))) { // a descendant may end at any time
			warn(err)
			failed = exitError{cli.ExitError}
		}
	}
	if tree {
		if err := cgroup.Tree(pids, one); err != nil {
			return err
		}
		return failed
	}
	for _, pid := range pids {
		one(pid)
	}
	return failed
}
