// Package systemd speaks systemd's protocols to services. It is apart from cli because its
// library brings in much that the client has no use for.
package systemd

import (
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

func notify(state string) error {
	_, err := daemon.SdNotify(false, state)
	return err
}

// WatchdogInterval is how often NotifyAlive is due; 0 if nobody watches.
func WatchdogInterval() (time.Duration, error) {
	interval, err := daemon.SdWatchdogEnabled(false)
	return interval / 2, err
}
