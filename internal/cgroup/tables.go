package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A table is one of the tables of descriptors that the threads of a process have.
type table struct {
	dir string // of its descriptors in /proc
	fd  int    // a pidfd of a thread that has it
}

// tables returns the tables of a process: that of its threads, and those of threads which have one of their own. A main
// thread that has ended has none. unseen names what this kernel does not let us look into.
func tables(pid, pidfd int) (all []table, unseen []string, err error) {
	tids, err := numbersIn(fmt.Sprintf("/proc/%d/task", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil // it has ended
	}
	if err != nil {
		return nil, nil, err
	}
	var have []int // a thread of each table
	for _, tid := range tids {
		dir := fmt.Sprintf("/proc/%d/task/%d/fd", pid, tid)
		if entries, err := os.ReadDir(dir); err != nil || len(entries) == 0 || slices.ContainsFunc(have, func(other int) bool { return sameTable(tid, other) }) {
			continue // ended, without descriptors, or with those of another thread
		}
		have = append(have, tid)
		fd := pidfd
		if tid != pid {
			const thread = unix.O_EXCL // PIDFD_THREAD, Linux 6.9
			if fd, err = unix.PidfdOpen(tid, thread); errors.Is(err, unix.ESRCH) {
				continue
			} else if err != nil {
				unseen = append(unseen, fmt.Sprintf("thread %d has descriptors of its own, which cannot be seen before Linux 6.9", tid))
				continue
			}
		}
		all = append(all, table{dir, fd})
	}
	return all, unseen, nil
}

// sameTable reports whether two threads share their descriptors. A kernel without kcmp(2) does not tell: they do then.
func sameTable(tid, other int) bool {
	const files = 2 // KCMP_FILES
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(tid), uintptr(other), files, 0, 0, 0)
	return errno != 0 || order == 0
}

// eachSocket calls f with each internet socket that a process has. Sockets are taken out of the process by a copy of
// their descriptor; it is not stopped and does not notice. unseen names what holds others that cannot be taken out.
func eachSocket(pid, pidfd int, f func(*Socket)) (sockets []Socket, unseen []string, err error) {
	all, unseen, err := tables(pid, pidfd)
	defer func() {
		for _, t := range all {
			if t.fd != pidfd {
				unix.Close(t.fd)
			}
		}
	}()
	if err != nil {
		return nil, nil, err
	}
	use := func(fd, own int) {
		s := Socket{FD: fd, fd: own}
		if s.look() {
			f(&s)
			sockets = append(sockets, s)
		}
	}
	for _, t := range all {
		fds, err := numbersIn(t.dir)
		if err != nil {
			continue // the thread has ended
		}
		for _, fd := range fds {
			link, err := os.Readlink(fmt.Sprintf("%s/%d", t.dir, fd))
			if err == nil && strings.HasPrefix(link, "anon_inode:[io_uring]") {
				if n := fdinfo(t.dir, fd, "UserFiles"); n > 0 {
					unseen = append(unseen, fmt.Sprintf("fd %d io_uring has up to %d descriptors of its own, which cannot be seen", fd, n))
				}
			}
			if err != nil || !strings.HasPrefix(link, "socket:") {
				continue
			}
			own, err := unix.PidfdGetfd(t.fd, fd, 0)
			if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
				continue // it was closed
			}
			if err != nil {
				return sockets, unseen, fmt.Errorf("sockets of process %d that it already has stay as they are: %w", pid, err)
			}
			use(fd, own)
			if n := fdinfo(t.dir, fd, "scm_fds"); n > 0 {
				passed := peek(own)
				for _, p := range passed {
					use(fd, p)
					unix.Close(p)
				}
				if len(passed) < n {
					unseen = append(unseen, fmt.Sprintf("fd %d unix has %d descriptors on their way, which cannot be seen", fd, n-len(passed)))
				}
			}
			unix.Close(own)
		}
	}
	return sockets, unseen, nil
}

// fdinfo reads a number of what the kernel says of a descriptor.
func fdinfo(dir string, fd int, name string) int {
	text, err := os.ReadFile(fmt.Sprintf("%sinfo/%d", dir, fd))
	if err != nil {
		return 0
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+":"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(value)) // 0 if it is none
			return n
		}
	}
	return 0
}

// peek returns copies of the descriptors in the first message that waits in a unix socket, which stays there.
func peek(fd int) (passed []int) {
	buf, oob := make([]byte, 1), make([]byte, 4096)
	_, n, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil
	}
	for _, m := range messages {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			passed = append(passed, fds...)
		}
	}
	return passed
}
