package wire

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Now reads the lease clock: the time on CLOCK_MONOTONIC_RAW of this boot, in which
// lease_expires counts whole seconds. Changes of the wall clock and suspend do not move it.
func Now() time.Duration {
	var ts unix.Timespec
	// RawSyscall, since the call never waits, and the server makes it twice for each datagram.
	_, _, errno := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC_RAW, uintptr(unsafe.Pointer(&ts)), 0)
	if errno != 0 {
		panic("clock_gettime: " + errno.Error()) // the clock exists since Linux 2.6.28
	}
	return time.Duration(ts.Nano())
}

// Seconds returns a time of the lease clock as messages carry it.
func Seconds(now time.Duration) int64 { return int64(now / time.Second) }
