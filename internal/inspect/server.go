package inspect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Server is how the server stands.
type Server struct {
	State   string `json:"state"`   // running, waiting (systemd starts it with the first request), stopped, stranger
	PID     int    `json:"pid"`     // 0: none, or it cannot be seen
	UID     uint32 `json:"uid"`     // of the owner of the server's name
	Since   int64  `json:"since"`   // it runs, or is stopped; seconds since 1970; 0: not known
	Version string `json:"version"` // "": not known
}

// The states of a Server.
const (
	Running  = "running"
	Waiting  = "waiting"
	Stopped  = "stopped"
	Stranger = "stranger"
)

// defaultServer is the name of the server that the unit starts.
const defaultServer = "tas_socket"

// serverOf finds the server by its name.
func serverOf(name string, uids []uint32) (Server, error) {
	asked, err := peer.NewServer(name, uids)
	if err != nil {
		return Server{}, err
	}
	owner, err := asked.Owner()
	switch {
	case errors.Is(err, wire.ErrNobody):
		return Server{State: Stopped, Since: stoppedSince(name)}, nil
	case err != nil:
		return Server{}, err
	case !asked.Has(owner.UID):
		return Server{State: Stranger, PID: owner.PID, UID: owner.UID}, nil
	case owner.Command == "systemd":
		return Server{State: Waiting, UID: owner.UID}, nil
	}
	return Server{Running, owner.PID, owner.UID, startOf(owner.PID), versionOf(owner.PID)}, nil
}

// finding says what is wrong with the server; nil: nothing.
func (s Server) finding(until string) *Finding {
	cure := outside.Service("start", "table-allocator-server") + "; " + outside.Journal("table-allocator-server")
	switch s.State {
	case Stopped:
		return &Finding{"server-stopped", Error, "server stopped" + until, "no process has the name of the server", cure}
	case Stranger:
		return &Finding{"server-stopped", Error, "server stopped" + until,
			fmt.Sprintf("pid %d of uid %d has the name of the server, and is not trusted", s.PID, s.UID), "end that process; " + cure}
	}
	return nil
}

// startOf is when a process started, in seconds since 1970; 0 if that cannot be seen.
func startOf(pid int) int64 {
	_, rest, ok := strings.Cut(readLine(fmt.Sprintf("/proc/%d/stat", pid)), ") ")
	fields := strings.Fields(rest)
	const start, ticks = 19, 100 // the 22nd field, and USER_HZ
	if !ok || len(fields) <= start {
		return 0
	}
	n, err := strconv.ParseInt(fields[start], 10, 64)
	var now unix.Timespec
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return 0
	}
	up := time.Duration(now.Nano()) - time.Duration(n)*(time.Second/ticks)
	return time.Now().Add(-up).Round(time.Second).Unix()
}

// stoppedSince asks systemd, where it is there, when the server of its unit ended; 0: it does not know, or the name is that
// of another server, or of one in another network namespace.
func stoppedSince(name string) int64 {
	if !outside.HasSystemd() || name != defaultServer || !isInNetworkOf(1) {
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", "show", "--timestamp=unix", "--property=ActiveState,InactiveEnterTimestamp", "table-allocator-server").Output()
	if err != nil {
		return 0
	}
	return endOf(string(out))
}

// endOf is when a unit ended that is not active, from what systemctl shows of it.
func endOf(shown string) int64 {
	values := make(map[string]string)
	for line := range strings.Lines(shown) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[key] = value
	}
	since, isTime := strings.CutPrefix(values["InactiveEnterTimestamp"], "@")
	if state := values["ActiveState"]; !isTime || state != "inactive" && state != "failed" {
		return 0
	}
	return int64(number(since))
}

// isInNetworkOf reports whether this process is in the network namespace of another.
func isInNetworkOf(pid int) bool {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	theirs, otherErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && otherErr == nil && own == theirs
}

// versionOf asks the server that is installed beside this program for its version, if the process runs that file. The
// file of any other process, perhaps in a container, is not executed.
func versionOf(pid int) string {
	own, err := os.Executable()
	if err != nil {
		return ""
	}
	server := filepath.Join(filepath.Dir(own), "table-allocator-server")
	installed, err := os.Stat(server)
	if err != nil {
		return ""
	}
	if running, err := outside.Stat(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || !os.SameFile(installed, running) {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, server, "--version").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}
