package cli

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// NotifyReady tells systemd that the service is up, and NotifyAlive that it works (sd_notify(3)). They do nothing without systemd,
// and never wait. They are apart from internal/cli/systemd, whose library is too large for the client.
func NotifyReady() error { return notify("READY=1") }
func NotifyAlive() error { return notify("WATCHDOG=1") }

// WatchdogPeriod is after how long systemd ends a service that it does not hear NotifyAlive of; 0: never.
func WatchdogPeriod() (time.Duration, error) {
	text := os.Getenv("WATCHDOG_USEC")
	if pid := os.Getenv("WATCHDOG_PID"); text == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0, nil
	}
	usec, err := strconv.ParseUint(text, 10, 52)
	if err != nil || usec == 0 {
		return 0, fmt.Errorf("read WATCHDOG_USEC: %q is no number of microseconds", text)
	}
	return time.Duration(usec) * time.Microsecond, nil
}

func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer unix.Close(fd)
	if strings.HasPrefix(path, "@") || strings.HasPrefix(path, "/") {
		err = unix.Sendto(fd, []byte(state), unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: path})
	} else {
		err = errors.New(path + " is no socket of this host")
	}
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}
