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
// rounded down to seconds. A negative offset is an uptime that shrank; it must
// not be more than the machine's own. The realtime clock and everything else,
// network namespace included, stay the caller's.
//
// The process started is name itself, with its signals and exit status. It
// needs root, Linux 5.6 and the programs of util-linux.
func RebootCommand(ctx context.Context, offset time.Duration, bootID string, name string, args ...string) *exec.Cmd {
	// A new time namespace is for the children of unshare; nsenter enters it
	// without a fork, which would hide the command from signals. The file over
	// boot_id outlives the tmpfs that it came from.
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
