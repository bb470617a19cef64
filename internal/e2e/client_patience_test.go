package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// TestClientAddressNeverComes: after a minute everything is taken back, and the log says
// why.
func TestClientAddressNeverComes(t *testing.T) {
	h := newHost(t)
	h.link("wan0")
	h.serve()
	if got := h.lease("10.77.0.2", "wan0", "-n", "24"); got != 10000 {
		t.Fatalf("table: got %d", got)
	}
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	for until := time.Now().Add(time.Minute + patience); len(h.pids(clientBin)) > 0 && time.Now().Before(until); {
		time.Sleep(100 * time.Millisecond)
	}
	h.waitClean()
	if log := h.clientLog(); !strings.Contains(log, "the address did not come within 1m0s") {
		t.Errorf("the log does not say why:\n%s", log)
	}
}

// traced starts a client in front under strace, and returns where its system calls are.
func (h *host) traced(calls string, args ...string) (p *process, trace string) {
	h.t.Helper()
	trace = filepath.Join(h.dir, "trace")
	args = append([]string{"-f", "-o", trace, "-e", "trace=" + calls, bin(h.t, clientBin), "-f"}, args...)
	return h.start(exec.Command("strace", args...)), trace
}

// TestClientListensFirst: nothing is missed between the look and the first event.
func TestClientListensFirst(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	_, trace := h.traced("bind,sendto,write", "-4", "-a", "10.77.0.2", "-n", "24", "-i", "wan0")
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	name := bytes.Index(text, []byte(`@"wan0-10.77.0.2-2\0`)) // of the holder: before it is the call, which looks for the network
	if name < 0 {
		t.Fatalf("no holder:\n%s", text)
	}
	text = text[name:]
	listens := regexp.MustCompile(`bind\([^\n]*AF_NETLINK[^\n]*nl_groups=0*x?0*[1-9a-f]`).FindIndex(text)
	looks := regexp.MustCompile(`RTM_GETADDR|RTM_GETLINK`).FindIndex(text)
	if listens == nil || looks == nil || listens[0] > looks[0] {
		t.Errorf("subscribed at %v, first look at %v:\n%s", listens, looks, text)
	}
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}

// TestClientFullQueue: a full queue is no failed try, of which there are five; it is tried
// again until there is room.
func TestClientFullQueue(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	server := h.serve()
	h.freeze(server.cmd.Process.Pid)
	filler := h.peer("filler", false)
	to := padded(t, "tas_socket")
	for full := false; !full; {
		errs := filler.conn.Send(wire.Message{Data: []byte("x"), To: to})
		full = errs != nil && errors.Is(errs[0], syscall.EAGAIN)
	}
	client, trace := h.traced("sendmmsg", "-4", "-a", "10.77.0.2", "-n", "24", "-i", "wan0")
	eventually(t, "it has tried more often than five times", func() error {
		text, err := os.ReadFile(trace)
		if n := strings.Count(string(text), "EAGAIN"); err == nil && n < 12 {
			err = fmt.Errorf("%d times", n)
		}
		return err
	})
	if err := server.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	client.waitLog("10000\n")
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}
