package main

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
)

const attachUsage = `Usage: table-allocator-client attach --ifname IFNAME [options] PID...

Binds processes that run: what they and their future children connect to from
now on leaves by IFNAME. Established connections stay where they are; what was
done is said for each socket. Needs root.

      --ifname IFNAME     the link; an address of it needs a lease
      --on-loss WHAT      without a route there: block (default) or fallback
      --tree              all descendants of the processes, too
      --reset             cut connections, so that programs make new ones
      --wait SECONDS      wait for a lease so long (0)
  -d, --destination NAME  socket of the server (tas_socket)
      --server-user USER  believe a server of this user, too (repeatable)
  -h, --help              print this and exit
`

const detachUsage = `Usage: table-allocator-client detach [--tree] PID...

Undoes run and attach. Established connections stay where they are. Needs root.

      --tree              all descendants of the processes, too
  -h, --help              print this and exit
`

func runAttach(args []string) int {
	o := newBindOptions("attach")
	pids, code := o.processes(args, attachUsage)
	if pids == nil {
		return code
	}
	uplink, mark, err := o.bound()
	if err != nil {
		return failed(err)
	}
	return o.each(pids, func(c *cgroup.Cgroups, pid int) (cgroup.Process, error) {
		return c.Attach(pid, uplink, mark, o.reset)
	})
}

func runDetach(args []string) int {
	o := newBindOptions("detach")
	pids, code := o.processes(args, detachUsage)
	if pids == nil {
		return code
	}
	return o.each(pids, (*cgroup.Cgroups).Detach)
}

// processes parses the command line of attach and detach; without any the exit code counts.
func (o *bindOptions) processes(args []string, usage string) (pids []int, code int) {
	err := o.parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		fmt.Print(usage)
		return nil, cli.ExitOK
	}
	for _, arg := range o.flags.Args() {
		pid, parseErr := strconv.ParseInt(arg, 10, 32)
		if parseErr != nil || pid < 1 {
			err = errors.Join(err, fmt.Errorf("%q is no process id", arg))
		}
		pids = append(pids, int(pid))
	}
	if err == nil && len(pids) == 0 {
		err = errors.New("a PID is needed")
	}
	if err != nil {
		return nil, failed(fmt.Errorf("%w (see %s --help)", err, o.command))
	}
	return pids, cli.ExitOK
}

// each attaches or detaches the processes and says what was done to each.
func (o *bindOptions) each(pids []int, do func(*cgroup.Cgroups, int) (cgroup.Process, error)) int {
	cgroups, err := cgroup.Open()
	if err != nil {
		return failed(err)
	}
	defer cgroups.Close()
	code := cli.ExitOK
	one := func(pid int) {
		p, err := do(cgroups, pid)
		tell(p.Missing)
		if p.Cgroup != "" {
			fmt.Printf("%d (%s): cgroup %s\n", p.PID, p.Name, p.Cgroup)
		}
		for _, s := range p.Sockets {
			fmt.Println(" ", s)
		}
		if err != nil && !(o.tree && errors.Is(err, unix.ESRCH)) { // a descendant may end at any time
			code = failed(err)
		}
	}
	if !o.tree {
		for _, pid := range pids {
			one(pid)
		}
	} else if err := cgroup.Tree(pids, one); err != nil {
		return failed(err)
	}
	return code
}
