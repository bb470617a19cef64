package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// clients are the processes of table-allocator-client on a machine.
type clients struct{ *machine }

// command is a command line of the client.
func (h clients) command(args ...string) *exec.Cmd {
	h.t.Helper()
	return exec.Command(bin(h.t, clientBin), args...)
}

// shell runs a script. $CLIENT is the client with a log and --debug, $DIR the directory of the host.
func (h clients) shell(script string) result {
	h.t.Helper()
	client := fmt.Sprintf("%s -l %s --debug", bin(h.t, clientBin), filepath.Join(h.dir, "client.log"))
	return h.run("sh", "-c", "CLIENT='"+client+"'\nDIR='"+h.dir+"'\n"+script)
}

// front starts the client in the foreground, and returns it and the table that it prints.
func (h clients) front(args ...string) (*process, string) {
	h.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	defer w.Close()
	cmd := h.command(append([]string{"-f", "--debug"}, args...)...)
	cmd.Stdout = w
	p := h.start(cmd)
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		h.t.Fatal(err)
	}
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		h.t.Fatalf("table of %s: %v; it wrote:\n%s", cmd, err, p.log.String())
	}
	h.t.Cleanup(func() { r.Close() })
	return p, strings.TrimSuffix(line, "\n")
}

// waitClients waits until n client processes run, and returns their pids.
func (h clients) waitClients(n int) (pids []int) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("clients are %d", n), func() error {
		if pids = h.pids(clientBin); len(pids) != n {
			return fmt.Errorf("clients: %d", pids)
		}
		return nil
	})
	return pids
}

// onlyClient waits until one client process runs, and returns its pid.
func (h clients) onlyClient() int {
	h.t.Helper()
	return h.waitClients(1)[0]
}

// signalClients sends a signal to all clients of the host.
func (h clients) signalClients(sig syscall.Signal) {
	h.t.Helper()
	for _, pid := range h.pids(clientBin) {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			h.t.Fatal(err)
		}
	}
}

// waitNoClient waits until no client process runs.
func (h clients) waitNoClient() {
	h.t.Helper()
	h.waitClients(0)
}

// waitClientLog waits until the clients' log has text n times.
func (h clients) waitClientLog(n int, text string) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("the clients have logged %q %d times", text, n), func() error {
		if got := strings.Count(h.clientLog(), text); got < n {
			return fmt.Errorf("%d times", got)
		}
		return nil
	})
}

// client runs the client as hooks do, with a log of all clients of the host.
func (h clients) client(args ...string) result {
	h.t.Helper()
	return h.run(bin(h.t, clientBin), append([]string{"-l", filepath.Join(h.dir, "client.log"), "--debug"}, args...)...)
}

// lease runs the client for an IPv4 address, and returns the table that it prints.
func (h clients) lease(addr, ifname string, more ...string) uint32 {
	h.t.Helper()
	r := h.client(append([]string{"-4", "-a", addr, "-i", ifname}, more...)...)
	table, err := strconv.ParseUint(strings.TrimSuffix(r.stdout, "\n"), 10, 32)
	if err != nil || r.code != 0 {
		h.t.Fatalf("client for %s on %s: stdout %q, exit code %d, stderr: %s", addr, ifname, r.stdout, r.code, r.stderr)
	}
	return uint32(table)
}

func (h clients) lease6(address, ifname string, more ...string) string {
	h.t.Helper()
	r := h.client(append([]string{"-6", "-a", address, "-i", ifname}, more...)...)
	if r.code != 0 {
		h.t.Fatalf("client for %s: %d, %s", address, r.code, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

// clientLog is the log of all clients of the host.
func (h clients) clientLog() string {
	text, err := os.ReadFile(filepath.Join(h.dir, "client.log"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Error(err)
	}
	return string(text)
}

// watch starts a watch, and waits until it follows the kernel.
func (h clients) watch(args ...string) *process {
	h.t.Helper()
	p := h.start(h.command(append([]string{"watch", "--debug"}, args...)...))
	p.waitLog("msg=watching")
	return p
}

// watchFile writes a watch's configuration and returns its path.
func (h clients) watchFile(text string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, "watch.json")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// watchPlain starts a watch without --debug. In a run at full size it is the static command, because
// then its time and memory are measured.
func (h clients) watchPlain(args ...string) *process {
	h.t.Helper()
	path := bin(h.t, clientBin)
	if dir := os.Getenv("TABLE_ALLOCATOR_STATIC_BIN"); dir != "" && fullSize() {
		path = filepath.Join(dir, clientBin)
	}
	p := h.start(exec.Command(path, append([]string{"watch", "--exclude", "lo,far*"}, args...)...))
	p.waitLog("msg=watching")
	return p
}

// row is an address in the JSON of status.
type row struct {
	Ifname    string `json:"ifname"`
	Address   string `json:"address"`
	Family    string `json:"family"`
	Table     uint32 `json:"table"`
	LeaseLeft int64  `json:"lease_left"`
	Gateway   string `json:"gateway"`
	PID       int    `json:"pid"`
	Mode      string `json:"mode"`
	Missing   string `json:"missing"`
	State     string `json:"state"`
}

// statusRows runs status, and checks its exit code.
func (h clients) statusRows(args ...string) (rows []row) {
	h.t.Helper()
	r := h.run(bin(h.t, clientBin), append([]string{"status", "--json"}, args...)...)
	var report struct{ Uplinks []row }
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		h.t.Fatalf("status --json: %v\n%s%s", err, r.stdout, r.stderr)
	}
	rows = report.Uplinks
	missing := 0
	for _, row := range rows {
		if row.Missing != "" {
			missing = 1
		}
	}
	if r.code != missing {
		h.t.Errorf("exit code %d for %s", r.code, r.stdout)
	}
	return rows
}

// again makes a watch read its configuration again.
func (p *process) again() {
	p.t.Helper()
	before := strings.Count(p.log.String(), "the configuration") + strings.Count(p.log.String(), "configuration read again")
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		p.t.Fatal(err)
	}
	eventually(p.t, "the configuration is read again", func() error {
		if strings.Count(p.log.String(), "the configuration")+strings.Count(p.log.String(), "configuration read again") == before {
			return errors.New("not yet")
		}
		return nil
	})
}
