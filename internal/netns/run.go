package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A job is a program of the configuration that the service started in a namespace.
type job struct {
	Args    []string
	RunAs   string // who it runs as; "": root
	PID     int
	Outside bool   `json:"VPN"` // it is outside of the namespace: its VPN, or pasta
	Lease   bool   // it asks for the address of the namespace
	Start   string // when the process began, as /proc says: a pid may be another process's
}

// same reports whether a job is what another one says, whichever process it is.
func (j job) same(o job) bool {
	return j.Outside == o.Outside && j.RunAs == o.RunAs && slices.Equal(j.Args, o.Args)
}

// runs reports whether the process of a job is there.
func (j job) runs() bool { return j.Start != "" && beganAt(j.PID) == j.Start }

// jobs returns the jobs of a namespace, also those that have ended.
func (m memory) jobs(name string) (jobs []job, err error) {
	if err := m.dir.Read(runFile(name), &jobs); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("tell which programs run: %w", err)
	}
	return jobs, nil
}

// session lists the processes of a job: its own, and those that it started, unless they began sessions of their own.
func (j job) session() ([]Program, error) {
	if j.Outside {
		if !j.runs() {
			return nil, nil
		}
		return []Program{{PID: j.PID, Command: strings.Join(j.Args, " ")}}, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var programs []Program
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if session, err := unix.Getsid(pid); err == nil && session == j.PID {
			if p, ok := programOf(pid); ok {
				programs = append(programs, p)
			}
		}
	}
	return programs, nil
}

// endJobs ends the jobs of a namespace, but for those to keep.
func (h *Host) endJobs(name string, keep func(job) bool) error {
	jobs, err := h.memory.jobs(name)
	var errs []error
	for _, j := range jobs {
		if keep(j) || !j.runs() {
			continue
		}
		_, err := Stop(context.Background(), j.session, unix.SIGTERM, killPatience, nil)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, err)...)
}

// EndJobs ends the programs that the service runs in a namespace, and its VPN.
func (h *Host) EndJobs(name string) error {
	return named(name, h.endJobs(name, func(job) bool { return false }))
}

// Visitors lists the processes in a namespace, but for those that the service runs.
func (h *Host) Visitors(name string) ([]Program, error) {
	return h.without(name, func(job) bool { return true })
}

// Occupants lists the processes in a namespace, but for those that are part of it: who asks for its address.
func (h *Host) Occupants(name string) ([]Program, error) {
	return h.without(name, func(j job) bool { return j.Lease })
}

// without lists the processes in a namespace, but for those of jobs that are left out.
func (h *Host) without(name string, out func(job) bool) ([]Program, error) {
	jobs, err := h.memory.jobs(name)
	if err != nil {
		return nil, named(name, err)
	}
	ours := make(map[int]bool)
	for _, j := range jobs {
		if !j.runs() || !out(j) {
			continue
		}
		programs, err := j.session()
		if err != nil {
			return nil, named(name, err)
		}
		for _, p := range programs {
			ours[p.PID] = true
		}
	}
	programs, err := h.Programs(name)
	return slices.DeleteFunc(programs, func(p Program) bool { return ours[p.PID] }), err
}

// runFile is the file of the memory with the jobs of a namespace.
func runFile(name string) string { return "." + name + ".run" }

// The pause before a program that ended is started again doubles up to the longest.
const (
	shortestPause = time.Second
	longestPause  = time.Minute
)

// A runner keeps the programs of the configuration running.
type runner struct {
	host  *Host
	log   *slog.Logger
	ended func()            // a program ended
	again map[string]*pause // by job
}

type pause struct {
	began time.Time // of the last start
	next  time.Time // no start before
	long  time.Duration
}

// run starts what does not run, and returns how long until the next program may start; none: 0.
func (r *runner) run() (wait time.Duration) {
	states, err := r.host.memory.all()
	if err != nil {
		r.log.Error("cannot read the namespaces", "err", err)
		return 0
	}
	for _, s := range states {
		if s.Phase != Up {
			continue
		}
		wanted, jobs, err := r.wanted(s)
		if err != nil {
			r.log.Warn("cannot run the programs of a namespace", "namespace", s.Name, "err", err)
			continue
		}
		for _, want := range wanted {
			args := want.Args
			if slices.ContainsFunc(jobs, func(j job) bool { return j.same(want) && r.follows(j) }) {
				continue
			}
			key := s.Name + "\x00" + strings.Join(args, "\x00")
			if r.again[key] == nil {
				r.again[key] = &pause{long: shortestPause}
			}
			p := r.again[key]
			if rest := time.Until(p.next); rest > 0 {
				if wait == 0 || rest < wait {
					wait = rest
				}
				continue
			}
			if !p.began.IsZero() && time.Since(p.began) > longestPause {
				p.long = shortestPause
			}
			p.began, p.next = time.Now(), time.Now().Add(p.long)
			p.long = min(2*p.long, longestPause)
			if jobs, err = r.start(s, want, jobs); err != nil {
				r.log.Warn("cannot run a program in a namespace", "namespace", s.Name, "command", args, "err", err)
				if wait == 0 {
					wait = p.long
				}
			}
		}
	}
	return wait
}

// wanted are the jobs that a namespace is to have, and those that it has. Others are ended: of another configuration, or the VPN
// of another uplink.
func (r *runner) wanted(s State) (wanted, jobs []job, err error) {
	if s.VPN != "" {
		args, err := r.host.vpnCommand(s)
		if err != nil {
			return nil, nil, err
		}
		wanted = append(wanted, job{Args: args, Outside: true})
	}
	if s.Wiring == WiringPasta {
		args, err := r.host.pastaCommand(s)
		if err != nil {
			return nil, nil, err
		}
		wanted = append(wanted, job{Args: args, Outside: true})
	}
	if s.Wiring == WiringMacvlan {
		args, err := leaseCommand()
		if err != nil {
			return nil, nil, err
		}
		wanted = append(wanted, job{Args: args, Lease: true})
	}
	for _, args := range s.Run {
		wanted = append(wanted, job{Args: args, RunAs: s.RunAs})
	}
	if err := r.host.endJobs(s.Name, func(j job) bool { return slices.ContainsFunc(wanted, j.same) }); err != nil {
		return nil, nil, err
	}
	jobs, err = r.host.memory.jobs(s.Name)
	return wanted, jobs, err
}

// start starts a program, and remembers it.
func (r *runner) start(s State, want job, jobs []job) ([]job, error) {
	args := want.Args
	cmd := &exec.Cmd{Path: args[0], Args: args, Stdout: os.Stderr, Stderr: os.Stderr, Dir: "/", SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		Env: []string{"PATH=" + binaries}}
	if want.RunAs != "" {
		account, err := Account(want.RunAs)
		if err != nil {
			return jobs, fmt.Errorf("run_as %s: %w", want.RunAs, err)
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: account.UID, Gid: account.GID, Groups: account.Groups}
		cmd.Env = append(cmd.Env, "HOME="+account.Home, "USER="+account.Name, "LOGNAME="+account.Name)
	}
	unlock, err := r.host.memory.lock() // so that it is not deleted meanwhile
	if err != nil {
		return jobs, err
	}
	defer unlock()
	if now, found, err := r.host.memory.get(s.Name); err != nil || !found || now.Phase != Up {
		return jobs, err
	}
	if want.Outside {
		err = cmd.Start()
	} else {
		err = r.host.enclosed(s.Name, cmd.Start)
	}
	if err != nil {
		return jobs, err
	}
	pid := cmd.Process.Pid
	r.log.Info("a program of a namespace has started", "namespace", s.Name, "pid", pid, "command", args)
	go func() { // it ends with the program or with this process, since programs outlive the service
		err := cmd.Wait()
		r.log.Info("a program of a namespace has ended", "namespace", s.Name, "pid", pid, "command", args, "err", err)
		r.ended()
	}()
	jobs = slices.DeleteFunc(slices.Clone(jobs), func(j job) bool { return !j.runs() })
	want.PID, want.Start = pid, beganAt(pid)
	jobs = append(jobs, want)
	return jobs, r.host.memory.dir.Write(runFile(s.Name), jobs)
}

// follows reports whether a job runs, and has the end of one that another service started be told.
func (r *runner) follows(j job) bool {
	if !j.runs() {
		return false
	}
	key := fmt.Sprint("pid ", j.PID)
	if r.again[key] == nil {
		r.again[key] = &pause{}
		if fd, err := unix.PidfdOpen(j.PID, 0); err == nil {
			go func() { // as in start
				defer unix.Close(fd)
				for {
					_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
					if !errors.Is(err, unix.EINTR) {
						break
					}
				}
				r.ended()
			}()
		}
	}
	return true
}

// beganAt is when a process began, in ticks since the boot; "": there is none, or it has ended.
func beganAt(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	const state, start = 0, 19 // as in programOf
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) <= start || fields[state] == "Z" {
		return ""
	}
	return fields[start]
}

// enclosed calls f on a thread in the network namespace and the mount namespace of a name. What f starts is in there.
func (h *Host) enclosed(name string, f func() error) error {
	return inside(name, func() error {
		mounts, err := os.Open(h.memory.mountPin(name))
		if err != nil {
			return err
		}
		defer mounts.Close()
		// A thread whose directory others share cannot change its mounts.
		if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(int(mounts.Fd()), unix.CLONE_NEWNS)); err != nil {
			return fmt.Errorf("enter its mounts: %w", err)
		}
		return f()
	})
}
