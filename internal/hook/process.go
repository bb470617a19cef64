package hook

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// process is a process that is not a child. Its pid may belong to another process by the time it is used;
// with a descriptor (Linux 5.3) a signal never reaches that one.
type process struct {
	pid     int
	fd      int    // -1: none
	started uint64 // in ticks since the boot: another process with this pid has another value
}

func openProcess(pid int) (process, error) {
	p := process{pid: pid, fd: -1}
	if pid <= 1 {
		return p, fmt.Errorf("process %d: no pid of ours", pid)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == nil:
		p.fd = fd
	case !errors.Is(err, unix.ENOSYS):
		return p, fmt.Errorf("process %d: %w", pid, err)
	}
	if p.started, err = started(pid); err != nil {
		p.close()
		return p, err
	}
	return p, nil
}

// started reads the 22nd field of /proc/PID/stat, proc(5). The second may contain anything.
func started(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	const state, start = 3, 22
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) <= start-state || fields[0] == "Z" {
		return 0, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	return strconv.ParseUint(fields[start-state], 10, 64)
}

func (p process) close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
	}
}

func (p process) comm() string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.pid)) // none: it has ended
	return strings.TrimSuffix(string(text), "\n")
}

// args returns its arguments, its name first.
func (p process) args() []string {
	text, _ := outside.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid)) // none: it has ended
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
}

func (p process) signal(sig unix.Signal) error {
	if p.fd >= 0 {
		return unix.PidfdSendSignal(p.fd, sig, nil, 0)
	}
	return unix.Kill(p.pid, sig)
}

// gone waits until the process has ended, and reports whether it has.
func (p process) gone(limit time.Duration) bool {
	until := time.Now().Add(limit)
	for {
		left := max(0, time.Until(until))
		if p.fd < 0 {
			time.Sleep(min(left, 10*time.Millisecond)) // without a descriptor there is nothing to wait for
			if now, err := started(p.pid); err != nil || now != p.started {
				return true
			}
		} else {
			fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, int(left.Milliseconds()))
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				return err == nil
			}
		}
		if left == 0 {
			return false
		}
	}
}

// end sends SIGTERM, and SIGKILL after the limit. It reports whether SIGTERM was enough.
func (p process) end(limit time.Duration) bool {
	if p.signal(unix.SIGTERM) == nil && p.gone(limit) {
		return true
	}
	_ = p.signal(unix.SIGKILL) // it has ended, or will now
	p.gone(time.Second)
	return false
}

// endDhclient ends the dhclients of a link, for DHCP and DHCPv6.
func endDhclient(ifname string) error {
	var errs []error
	for _, name := range []string{"dhclient." + ifname, "dhclient-" + ifname, "dhclient6." + ifname} {
		text, err := outside.ReadFile("/run/" + name + ".pid")
		if err != nil {
			continue // there is none
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			continue // it holds no pid
		}
		p, err := openProcess(pid)
		if err != nil {
			continue // it has ended
		}
		if p.comm() == "dhclient" && slices.Contains(p.args(), ifname) { // else another process has the pid
			errs = append(errs, p.signal(unix.SIGTERM))
		}
		p.close()
	}
	return errors.Join(errs...)
}
