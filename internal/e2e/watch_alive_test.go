package e2e

import (
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestWatchAlive: systemd hears that the watch is up, and again and again that its loop comes round, also after another
// configuration.
func TestWatchAlive(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	path := filepath.Join(h.dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	hear := func(want string) {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 256)
		n, err := manager.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Fatalf("systemd hears %q (%v), want %q", buf[:n], err, want)
		}
	}
	alive := func() {
		t.Helper()
		for range 5 {
			hear("WATCHDOG=1")
		}
	}
	cmd := watchdog(h.command("watch", "--config", h.watchFile(`{"links": [{"ifname": "*"}]}`)), "200000")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path)
	watch := h.start(cmd)
	hear("READY=1")
	alive()
	if err := watch.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	watch.waitLog("configuration read again")
	const queue = 11 // messages that may wait since before that: net.unix.max_dgram_qlen is 10
	for range queue {
		hear("WATCHDOG=1")
	}
	alive()
	if code := watch.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	// It is for the process that systemd started alone.
	cmd = watchdog(h.command("watch", "--config", h.watchFile(`{}`)), "soon")
	cmd.Env = append(cmd.Env, "WATCHDOG_PID=1")
	watch = h.start(cmd)
	watch.waitLog("msg=watching")
	if code := watch.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	h.refuse(watchdog(h.command("watch"), "soon"), "WATCHDOG_USEC")
}
