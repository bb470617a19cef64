package wire

import (
	"bytes"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Standing is what uid 0 of a sender is worth. Root of a container that shares the network of the host has uid 0, too.
type Standing int

// The standings.
const (
	NoRoot Standing = iota // it has no CAP_NET_ADMIN in the user namespace of this process: an ordinary user
	Root
	Gone   // the process has ended, so nobody can say
	Hidden // /proc does not show the process: its uid has to do
)

// StandingOf returns the standing of a process of uid 0, by its pid. The process that asks needs no capability. CapEff
// alone does not prove anything: who makes a user namespace has all capabilities there. Such a namespace has another
// uid_map, unless its maker could write any map; then it belongs to uid 0, so that a process of uid 0 outside may
// read its name. The names of other namespaces cannot be read without capabilities.
func StandingOf(pid int32) Standing {
	if pid <= 0 || !procIsOurs() {
		return Hidden
	}
	dir := "/proc/" + strconv.Itoa(int(pid)) + "/"
	status, err := os.ReadFile(dir + "status")
	var uids []byte
	if err == nil {
		uids, err = os.ReadFile(dir + "uid_map")
	}
	if err != nil {
		if unix.Kill(int(pid), 0) == unix.ESRCH {
			return Gone
		}
		return Hidden
	}
	namespace, err := os.Readlink(dir + "ns/user")
	ours := ownNamespace()
	switch {
	case !hasNetAdmin(status) && !anyThreadHasNetAdmin(dir):
		return NoRoot
	case bytes.Equal(bytes.TrimSpace(uids), everyUID) && !bytes.Equal(ours.uids, everyUID): // outside of our user namespace
	case !bytes.Equal(bytes.TrimSpace(uids), ours.uids), err == nil && namespace != ours.name:
		return NoRoot
	}
	return Root
}

// everyUID is the uid_map of the first user namespace.
var everyUID = []byte("0          0 4294967295")

// InOwnPIDNamespace reports whether a process is in the pid namespace of this process, or outside of it, and not in one
// that a container has below it.
func InOwnPIDNamespace(pid int32) bool {
	if pid <= 0 || !procIsOurs() {
		return true // no process below has no number here
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(int(pid)) + "/status")
	if err != nil {
		return unix.Kill(int(pid), 0) != unix.ESRCH
	}
	return len(bytes.Fields(field(status, "NSpid:"))) <= 1
}

// hasNetAdmin reads the effective capabilities in the status of a process.
func hasNetAdmin(status []byte) bool {
	caps, err := strconv.ParseUint(string(bytes.TrimSpace(field(status, "CapEff:"))), 16, 64)
	return err == nil && caps&(1<<unix.CAP_NET_ADMIN) != 0
}

// anyThreadHasNetAdmin reads the first threads of a process: the first one, which its status shows, may have given up
// what the sender has. Threads share their memory, so what one may do all may do.
func anyThreadHasNetAdmin(dir string) bool {
	const most = 32
	tasks, err := os.Open(dir + "task")
	if err != nil {
		return false
	}
	defer tasks.Close()
	names, _ := tasks.Readdirnames(most) // what cannot be read has no capability
	return len(names) > 1 && slices.ContainsFunc(names, func(name string) bool {
		status, err := os.ReadFile(dir + "task/" + name + "/status")
		return err == nil && hasNetAdmin(status)
	})
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

var ownNamespace = sync.OnceValue(func() userNamespace {
	name, err := os.Readlink("/proc/self/ns/user")
	uids, mapErr := os.ReadFile("/proc/self/uid_map")
	if err != nil || mapErr != nil {
		return userNamespace{}
	}
	return userNamespace{name, bytes.TrimSpace(uids)}
})
