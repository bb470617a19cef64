package e2e

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// seccomp executes a program under a filter: system calls of some numbers fail with an error. Its arguments are the error,
// the numbers with commas, and the command line.
const seccomp = `
import ctypes, os, struct, sys
error, numbers = int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")]
code = struct.pack("HBBI", 0x20, 0, 0, 0)                                  # load the number
for i, n in enumerate(numbers):
    code += struct.pack("HBBI", 0x15, len(numbers) - i, 0, n)              # equal: to the end
code += struct.pack("HBBI", 0x06, 0, 0, 0x7fff0000)                        # allow
code += struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error)
text = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(text)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(22, 2, program, 0, 0):                                       # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
os.execv(sys.argv[3], sys.argv[3:])
`

// filtered is a command line under a filter.
func filtered(errno unix.Errno, numbers []int, name string, args ...string) *exec.Cmd {
	var list []string
	for _, n := range numbers {
		list = append(list, strconv.Itoa(n))
	}
	return exec.Command("python3", append([]string{"-c", seccomp, strconv.Itoa(int(errno)), strings.Join(list, ","), name}, args...)...)
}

// spare are system calls that no command needs, whatever the Go runtime and libraries do if they are there.
var spare = []int{
	unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_GETAFFINITY, unix.SYS_PRCTL, unix.SYS_GETRANDOM, unix.SYS_STATX, unix.SYS_PIDFD_OPEN,
	unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_RSEQ, unix.SYS_MEMBARRIER, unix.SYS_IO_URING_SETUP, unix.SYS_OPENAT2, unix.SYS_FACCESSAT2,
	unix.SYS_CLOSE_RANGE, unix.SYS_INOTIFY_INIT1, unix.SYS_MEMFD_CREATE, unix.SYS_BPF, unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_MOUNT,
	unix.SYS_PTRACE, unix.SYS_SETPRIORITY, unix.SYS_GETPRIORITY, unix.SYS_SETRLIMIT, unix.SYS_PRLIMIT64, unix.SYS_FALLOCATE, unix.SYS_MADVISE,
	unix.SYS_SYSINFO, unix.SYS_UNAME, unix.SYS_COPY_FILE_RANGE, unix.SYS_SETUID, unix.SYS_FCHOWNAT, unix.SYS_IOCTL, unix.SYS_GETRUSAGE,
}

// TestSeccomp: a service manager, or a container, allows a server, a watch and a client the system calls that it thinks they
// need. Without those that they can spare they serve as ever.
func TestSeccomp(t *testing.T) {
	denied := spare
	if os.Getenv("TABLE_ALLOCATOR_STATIC_BIN") != "" { // else libc makes the threads
		denied = append(denied, unix.SYS_CLONE3)
	}
	for _, errno := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
		t.Run(unix.ErrnoName(errno), func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.link("wan1", "10.78.0.2/24")
			server := h.start(filtered(errno, denied, staticBin(t, serverBin), "-c", h.config()))
			server.waitLog("msg=serving")
			watch := h.start(filtered(errno, denied, staticBin(t, clientBin), "watch", "--clean", "--ifname", "wan0"))
			h.served("10.77.0.2")
			h.ns.IP(t, "address add 10.77.0.3/24 dev wan0")
			h.served("10.77.0.3")
			client := h.start(filtered(errno, denied, staticBin(t, clientBin), "-4", "-f", "-a", "10.78.0.2", "-i", "wan1"))
			client.waitLog("has table ")
			h.served("10.78.0.2")
			for _, p := range []*process{client, watch, server} {
				if code := p.stop(); code != 0 {
					t.Errorf("exit code %d:\n%s", code, p.log.String())
				}
			}
			h.wantRules()
		})
	}
}

// TestSeccompNeeded: what is needed and denied is said.
func TestSeccompNeeded(t *testing.T) {
	for _, tt := range []struct {
		name, says string
		number     int
		watch      bool // that says it; else the server does
	}{
		{"flock", "open database ", unix.SYS_FLOCK, false},
		{"fchmod", "open database ", unix.SYS_FCHMOD, false},
		{"recvmmsg", `receive from \"@tas_socket\"`, unix.SYS_RECVMMSG, false},
		{"sendmmsg", `send to \"@tas_socket\"`, unix.SYS_SENDMMSG, true},
		{"socket", "socket: ", unix.SYS_SOCKET, true},
		{"bind", "bind", unix.SYS_BIND, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			cmd := filtered(unix.ENOSYS, []int{tt.number}, staticBin(t, serverBin), "-c", h.config())
			if tt.watch {
				h.serve()
				cmd = filtered(unix.ENOSYS, []int{tt.number}, staticBin(t, clientBin), "watch")
			}
			p := h.start(cmd)
			eventually(t, "it says what is missing", func() error {
				if wrote := p.log.String(); !strings.Contains(wrote, tt.says) || !strings.Contains(wrote, unix.ENOSYS.Error()) {
					return errors.New(wrote)
				}
				return nil
			})
		})
	}
}
