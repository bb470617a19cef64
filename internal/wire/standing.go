package wire

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// Standing is what uid 0 of a sender is worth. Root of a container that shares the network of the host has uid 0, too.
type Standing int

// The standings.
const (
	NoRoot Standing = iota // it has no CAP_NET_ADMIN in the user namespace of this process: an ordinary user
	Root
	Gone   // the process has ended, so nobody can say
	Hidden // /proc does not show the process: its uid has to do
	Silent // /proc cannot be read now, and did not say before: ask later
)

// StandingOf returns the standing of a sender of uid 0, by its pid. The process that asks needs no capability. CapEff
// alone does not prove anything: who makes a user namespace has all capabilities there. Such a namespace has another
// uid_map, unless its maker could write any map; then it belongs to uid 0, so that a process of uid 0 outside may
// read its name. The names of other namespaces cannot be read without capabilities.
//
// While /proc cannot be read, what it said of the process before counts.
func StandingOf(cred Cred) Standing {
	if cred.PID <= 0 {
		return Hidden
	}
	return standingBy(cred, standingOf)
}

// Unread returns why the standing of a sender is not known now: /proc does not answer, say, or too many files are open. It
// returns nil if it is known.
func Unread(cred Cred) error {
	if cred.PID <= 0 {
		return nil
	}
	_, _, err := standings.ask(cred.PID, standingOf)
	return err
}

func standingBy(cred Cred, read func(pid int32) (Standing, error)) Standing {
	standing, process, _ := standings.ask(cred.PID, read) // Unread says why
	switch {
	case cred.Process != 0 && process != 0 && cred.Process != process:
		return Gone // another process has the pid
	case standing == nil && process == ended:
		return Gone // it ended while it was looked at
	case standing == nil:
		return Silent
	}
	return *standing
}

func standingOf(pid int32) (Standing, error) {
	if !procIsOurs() {
		return Hidden, nil
	}
	dir := "/proc/" + strconv.Itoa(int(pid)) + "/"
	ours, err := ownNamespace()
	if err != nil {
		return Silent, err
	}
	status, err := os.ReadFile(dir + "status")
	var uids []byte
	if err == nil {
		uids, err = os.ReadFile(dir + "uid_map")
	}
	var able bool
	if err == nil {
		able, err = anyThreadHasNetAdmin(dir)
		able = able || hasNetAdmin(status)
	}
	switch {
	case err != nil && unix.Kill(int(pid), 0) == unix.ESRCH:
		return Gone, nil
	case hides(err):
		return Hidden, nil
	case err != nil:
		return Silent, err
	}
	namespace, err := os.Readlink(dir + "ns/user")
	switch {
	case !able:
		return NoRoot, nil
	case bytes.Equal(bytes.TrimSpace(uids), everyUID) && !bytes.Equal(ours.uids, everyUID): // outside of our user namespace
	case !bytes.Equal(bytes.TrimSpace(uids), ours.uids), err == nil && namespace != ours.name:
		return NoRoot, nil
	}
	return Root, nil
}

// hides reports whether /proc refused to show a process. Another error, too many open files say, proves nothing: nobody is
// root because of it.
func hides(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) }

// procLimit is how long a loop waits for /proc, once.
const procLimit = 2 * time.Second

// askAgain is how long an answer of /proc counts, so that a flood of datagrams does not cost a look for each.
const askAgain = 100 * time.Millisecond

// said is what /proc said of processes.
type said[T any] struct {
	mu sync.Mutex
	of map[int32]answerOf[T]
}

type answerOf[T any] struct {
	value   T
	process Process // that it is about
	until   time.Duration
}

var (
	standings = said[Standing]{of: make(map[int32]answerOf[Standing])}
	ownPIDs   = said[bool]{of: make(map[int32]answerOf[bool])}
)

// ask reads what /proc says of the process that has a pid now or, while /proc is silent, returns what it said of that process
// last. A nil value is not known, and the error says why, unless the process has ended.
func (s *said[T]) ask(pid int32, read func(pid int32) (T, error)) (*T, Process, error) {
	const most = 1024 // processes, so that many senders do not use up the memory
	process := ProcessOf(pid)
	s.mu.Lock()
	last, known := s.of[pid]
	s.mu.Unlock()
	known = known && (last.process == process || process == 0)
	if known && process != 0 && Now() < last.until { // else the process may have ended since
		return &last.value, process, nil
	}
	value, err := outside.Ask(outside.Proc, procLimit, func() (T, error) {
		outside.Reach(outside.Proc)
		return read(pid)
	})
	again := ProcessOf(pid)
	switch {
	case err != nil && known:
		return &last.value, process, nil
	case err != nil:
		return nil, process, err
	case again != process && again != 0: // it was read of two
		return nil, ended, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.of) >= most {
		clear(s.of)
	}
	s.of[pid] = answerOf[T]{value, process, Now() + askAgain}
	return &value, process, nil
}

// everyUID is the uid_map of the first user namespace.
var everyUID = []byte("0          0 4294967295")

// InOwnPIDNamespace reports whether a sender is in the pid namespace of this process, or outside of it, and not in one
// that a container has below it.
func InOwnPIDNamespace(cred Cred) bool {
	if cred.PID <= 0 {
		return true // no process below has no number here
	}
	is, process, _ := ownPIDs.ask(cred.PID, inOwnPIDNamespace) // Unread says why
	return is != nil && *is && (cred.Process == 0 || process == 0 || cred.Process == process)
}

func inOwnPIDNamespace(pid int32) (bool, error) {
	if !procIsOurs() {
		return true, nil
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(int(pid)) + "/status")
	switch {
	case hides(err):
		return unix.Kill(int(pid), 0) != unix.ESRCH, nil
	case err != nil:
		return false, err
	}
	return len(bytes.Fields(field(status, "NSpid:"))) <= 1, nil
}

// hasNetAdmin reads the effective capabilities in the status of a process.
func hasNetAdmin(status []byte) bool {
	caps, err := strconv.ParseUint(string(bytes.TrimSpace(field(status, "CapEff:"))), 16, 64)
	return err == nil && caps&(1<<unix.CAP_NET_ADMIN) != 0
}

// anyThreadHasNetAdmin reads the first threads of a process: the first one, which its status shows, may have given up
// what the sender has. Threads share their memory, so what one may do all may do.
func anyThreadHasNetAdmin(dir string) (bool, error) {
	const most = 32
	tasks, err := os.Open(dir + "task")
	if hides(err) { // it has ended
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer tasks.Close()
	names, _ := tasks.Readdirnames(most) // a process that has ended has none
	if len(names) <= 1 {
		return false, nil
	}
	for _, name := range names {
		status, err := os.ReadFile(dir + "task/" + name + "/status")
		switch {
		case err != nil && !hides(err) && !errors.Is(err, unix.ESRCH):
			return false, err
		case err == nil && hasNetAdmin(status):
			return true, nil
		}
	}
	return false, nil
}

// field returns what stands behind a name at the begin of a line. A process can have no line break in its name.
func field(status []byte, name string) []byte {
	_, rest, _ := bytes.Cut(status, []byte("\n"+name))
	value, _, _ := bytes.Cut(rest, []byte("\n"))
	return value
}

// procIsOurs reports whether /proc shows the pids that this process sees.
var procIsOurs = sync.OnceValue(func() bool {
	self, err := os.Readlink("/proc/self")
	return err == nil && self == strconv.Itoa(os.Getpid())
})

type userNamespace struct {
	name string
	uids []byte // its uid_map
}

var (
	ownLock sync.Mutex
	own     userNamespace
)

// ownNamespace is that of this process, which never changes. An error passes.
func ownNamespace() (userNamespace, error) {
	ownLock.Lock()
	defer ownLock.Unlock()
	if own.name != "" {
		return own, nil
	}
	name, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		return userNamespace{}, err
	}
	uids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return userNamespace{}, err
	}
	own = userNamespace{name, bytes.TrimSpace(uids)}
	return own, nil
}
