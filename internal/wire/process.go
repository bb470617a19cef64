package wire

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// Process is a process for the life of the kernel, as its pid is not: the inode of its pidfd, which pidfs (Linux 6.9)
// never uses again. 0: not known.
//
// Datagrams to the server come without one. The kernel takes 2.6 us to open a pidfd for each of many datagrams, and 8 us for
// one; the server takes 10 us for all else. It reads a datagram at once, so that a pid can hardly be used again before.
type Process uint64

// ended is the process of a sender that the kernel knows no more. No inode has this number.
const ended Process = math.MaxUint64

// ProcessOf returns the process that has a pid now.
func ProcessOf(pid int32) Process {
	if !processesAreKnown() {
		return 0
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err == unix.ESRCH {
		return ended
	}
	if err != nil {
		return 0
	}
	return takeProcess(int32(fd))
}

// PeerCred returns who connected a stream socket.
func PeerCred(fd int) (Cred, error) {
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Cred{}, fmt.Errorf("getsockopt SO_PEERCRED: %w", err)
	}
	cred := Cred{PID: peer.Pid, UID: peer.Uid, GID: peer.Gid}
	if !processesAreKnown() {
		return cred, nil
	}
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch {
	case err == nil:
		cred.Process = takeProcess(int32(pidfd))
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ESRCH):
		cred.Process = ended
	}
	return cred, nil
}

// takeProcess closes a pidfd. A negative one is the error by which the kernel has none.
func takeProcess(fd int32) Process {
	if fd == -int32(unix.EINVAL) || fd == -int32(unix.ESRCH) {
		return ended
	}
	if fd < 0 {
		return 0
	}
	defer unix.Close(int(fd))
	var stat unix.Stat_t
	if err := unix.Fstat(int(fd), &stat); err != nil {
		return 0
	}
	return Process(stat.Ino)
}

// pidfdsHaveInodes is what processesAreKnown found: 0 nothing yet, 1 yes, -1 no.
var pidfdsHaveInodes atomic.Int32

// processesAreKnown reports whether pidfds have inodes of their own.
func processesAreKnown() bool {
	if known := pidfdsHaveInodes.Load(); known != 0 {
		return known > 0
	}
	const pidfs = 0x50494446
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || outside.Passes(err) {
		return false // for now
	}
	found := int32(-1)
	if err == nil {
		defer unix.Close(fd)
		var stat unix.Statfs_t
		if unix.Fstatfs(fd, &stat) == nil && stat.Type == pidfs {
			found = 1
		}
	}
	pidfdsHaveInodes.Store(found)
	return found > 0
}
