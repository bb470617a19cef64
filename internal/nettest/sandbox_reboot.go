package nettest

import (
	"context"
	"fmt"
	"os/exec"
	"time"
)

// RebootCommand returns a command that runs name as if the machine had been
// booted anew: /proc/sys/kernel/random/boot_id reads bootID, and the clocks
// that count from boot, CLOCK_MONOTONIC and CLOCK_BOOTTIME, are off by offset,
// rounded down to seconds. A negative offset makes the uptime shorter; it must
// not exceed the uptime of the machine. The real-time clock, the network
// namespace and everything else are the caller's.
//
// The process that the command starts is name itself: signals and exit status
// are name's. It needs root, Linux 5.6 and the programs of util-linux.
func RebootCommand(ctx context.Context, offset time.Duration, bootID string, name string, args ...string) *exec.Cmd {
	// Only the children of unshare are in the new time namespace. nsenter enters it without a fork; a
	// fork would hide the command from signals. The file that is mounted over boot_id stays when the
	// tmpfs is unmounted.
	const script = `
		set -e
		mount -t tmpfs boot_id /mnt
		echo "$1" >/mnt/boot_id
		mount --bind /mnt/boot_id /proc/sys/kernel/random/boot_id
		umount --lazy /mnt
		shift
		exec nsenter --time=/proc/self/ns/time_for_children -- "$@"`
	seconds := fmt.Sprint(int64(offset / time.Second))
	argv := []string{"--mount", "--propagation", "private",
		"--time", "--monotonic", seconds, "--boottime", seconds,
		"--", "sh", "-c", script, "sh", bootID, name}
	return exec.CommandContext(ctx, "unshare", append(argv, args...)...)
}
