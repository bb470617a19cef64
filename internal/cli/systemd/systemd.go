// Package systemd speaks systemd's protocols to services. It is apart from cli because its
// library brings in much that the client has no use for.
package systemd

import (
	"io"
	"net"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
)

// PassedFiles are the sockets that systemd hands in (sd_listen_fds(3)).
func PassedFiles() []*os.File { return activation.Files(true) }

// NotifyReady tells systemd that the service is up, NotifyStopping that it ends and
// NotifyAlive that it works (sd_notify(3)). They do nothing without systemd.
func NotifyReady() error    { return notify(daemon.SdNotifyReady) }
func NotifyStopping() error { return notify(daemon.SdNotifyStopping) }
func NotifyAlive() error    { return notify(daemon.SdNotifyWatchdog) }

// notify does not wait for ever for a service manager that does not read, as the library does.
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err = io.WriteString(conn, state)
	return err
}

// WatchdogInterval is how often NotifyAlive is due; 0 if nobody watches.
func WatchdogInterval() (time.Duration, error) {
	interval, err := daemon.SdWatchdogEnabled(false)
	return interval / 2, err
}
