package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// attacker is a local user who is not permitted anything, and does what he can.
type attacker struct {
	sockets []*rawPeer
	ending  atomic.Bool
	sent    atomic.Int64
	running sync.WaitGroup
}

// attack floods the server, and the holders of names, from many sockets of which none is ever
// read, on as many threads as there are kinds of datagrams. stop ends it.
func (h *host) attack(uid, sockets int, datagrams []string, holders []string) (stop func() (sent int64)) {
	h.t.Helper()
	a := &attacker{}
	for range sockets {
		a.sockets = append(a.sockets, h.rawPeer(sockaddr{unix.AF_UNIX, 0})) // the kernel finds a name
	}
	targets := []sockaddr{paddedName("tas_socket"), exactName("tas_socket")}
	for _, name := range holders {
		targets = append(targets, paddedName(name))
	}
	errs := make([]error, len(datagrams))
	for n, datagram := range datagrams {
		a.running.Go(func() {
			errs[n] = asUser(uid, uid, func() error {
				for i := n; !a.ending.Load(); i += len(datagrams) {
					p := *a.sockets[i%len(a.sockets)] // with an aim of its own
					p.to = targets[i/len(datagrams)%len(targets)]
					err := p.trySend(datagram)
					if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ECONNREFUSED) {
						return err
					}
					a.sent.Add(1)
				}
				return nil
			})
		})
	}
	return func() int64 {
		a.ending.Store(true)
		a.running.Wait()
		if err := errors.Join(errs...); err != nil {
			h.t.Error(err)
		}
		return a.sent.Load()
	}
}

// latencies are how long renewals take, one after the other by each of some peers of root's.
func latencies(peers []*rawPeer, each int) []time.Duration {
	all := make([][]time.Duration, len(peers))
	var running sync.WaitGroup
	for n, p := range peers {
		running.Go(func() {
			for range each {
				begun := time.Now()
				if err := p.trySend(acquire(n)); err != nil {
					p.t.Errorf("renewal: %v", err)
					return
				}
				buf := make([]byte, 512)
				size, _, err := unix.Recvfrom(p.fd, buf, 0)
				for err == unix.EINTR {
					size, _, err = unix.Recvfrom(p.fd, buf, 0)
				}
				if err != nil {
					p.t.Errorf("renewal: no answer: %v", err)
					return
				}
				all[n] = append(all[n], time.Since(begun))
				if r, err := wire.ParseReply(buf[:size]); err != nil || r.Table != uint32(10000+n) {
					p.t.Errorf("renewal of %d: got %s", 10000+n, buf[:size])
				}
			}
		})
	}
	running.Wait()
	sorted := slices.Concat(all...)
	slices.Sort(sorted)
	return sorted
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[int(q*float64(len(sorted)-1))].Round(10 * time.Microsecond)
}

// TestSoakHostileUser: a local user who floods the server and root's clients from a
// thousand sockets, never reads, forges requests, replies and families and takes the names
// of clients first keeps no client of root's from its lease, and no answer from it: each comes
// within the patience of this test, and how much later than in peace is printed.
func TestSoakHostileUser(t *testing.T) {
	h := newHost(t)
	h.besiege(func() (stop func() int64) {
		h.bound(uidNobodyKnows, padded(t, "wan0-10.77.0.3-2"))
		return h.attack(uidNobodyKnows, 1000, hostileDatagrams(""), hostileHolders)
	})
}

// hostileHolders are names that attackers send to, and one that nobody has.
var hostileHolders = []string{"wan0-10.77.0.2-2", "eth0-10.9.0.9-2"}

// hostileDatagrams are what attackers send, of whom file would be written.
func hostileDatagrams(file string) []string {
	return []string{
		acquire(1), release(2), // of root's leases
		request(2, "wan0", "10.77.0.2", 0), request(2, "wan0", "10.77.0.2", int(wire.End)),
		request(10, "eth0", "10.9.0.1", 1), request(0, "eth0", "10.9.0.1", 0), request(258, "eth0", "10.9.0.1", 1), // of other families
		strings.Replace(request(2, "wan0", "10.77.0.2", int(wire.Replace)), "}",
			fmt.Sprintf(`,"settings":{"routes":"copy","on_loss":"fallback","gateways":["10.77.0.66"],"nameservers":["10.77.0.66"],"servers_file":%q,"pid_file":%q}}`, file, file), 1),
		request(2, "wan0", "10.77.0.2", int(wire.Query)), `{"ifname":"wan0","cmd":16,"version":1}`,
		`{"version":1,"cmd":2,"table":10007,"lease_expires":1}`, // a reply
		strings.Repeat("{", 512), "",
	}
}

// flood sends each line of its input to each name of its arguments, but for the first one, from many sockets that it
// never reads, until it is killed. It has the first name.
const flood = `
import itertools, socket, sys
padded = lambda name: (b"\0" + name.encode()).ljust(108, b"\0")
squatter = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
squatter.bind(padded(sys.argv[1]))
sockets = []
for _ in range(300):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.setblocking(False)
    s.bind("")
    sockets.append(s)
lines = [line.rstrip("\n").encode() for line in sys.stdin]
names = [padded(n) for n in sys.argv[2:]] + [b"\0tas_socket"]
sent = 0
for s, (name, line) in zip(itertools.cycle(sockets), itertools.cycle(itertools.product(names, lines))):
    try: s.sendto(line, name)
    except OSError: continue
    sent += 1
    if sent % 100 == 1: print("sent", sent, flush=True)
`

// TestSoakHostileContainer: root of a container that has the network of the host, and no capability there, does the same.
// Calls of its change nothing of a holder, and no file.
func TestSoakHostileContainer(t *testing.T) {
	h := newHost(t)
	victim := filepath.Join(h.dir, "shadow")
	if err := os.WriteFile(victim, []byte("root:secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.besiege(func() (stop func() int64) {
		argv := append(strings.Fields(container+powerless), "python3", "-c", flood, "wan0-10.77.0.3-2")
		cmd := exec.Command(argv[0], append(argv[1:], append(hostileHolders, "tas_socket")...)...)
		cmd.Stdin = strings.NewReader(strings.Join(hostileDatagrams(victim), "\n"))
		p := h.start(cmd)
		p.waitLog("sent")
		return func() (sent int64) {
			p.kill()
			lines := strings.Fields(p.log.String())
			_, err := fmt.Sscan(lines[len(lines)-1], &sent)
			if err != nil {
				t.Error(err)
			}
			return sent
		}
	})
	info, err := os.Stat(victim)
	if err != nil || info.Mode().Perm() != 0o600 || readFile(t, victim) != "root:secret\n" {
		t.Errorf("the file of the datagrams was written: %v, %v", info, err)
	}
}

// besiege has root's clients and programs work before and while begin's attack goes on.
func (h *host) besiege(begin func() (stop func() int64)) {
	t, each := h.t, 60
	t.Helper()
	if fullSize() {
		each = 5000
	}
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	server := h.serve(`"table_timeout":4`)
	var peers []*rawPeer
	for n := range 4 {
		p := h.cPeer(fmt.Sprintf("eth0-10.9.0.%d-2", n))
		wantTable(t, p.ask(acquire(n)), uint32(10000+n))
		peers = append(peers, p)
	}
	if got := h.lease("10.77.0.2", "wan0"); got != 10004 {
		t.Fatalf("table: got %d", got)
	}
	rules := clientRules("10.77.0.2", "10.77.0.0/24", 10004)
	h.wantRules(rules...)

	quiet := latencies(peers, each)
	renewals := func() int {
		return strings.Count(server.log.String(), `msg="lease renewed" ifname=wan0 addr=10.77.0.2`)
	}
	before := renewals()
	stop := begin()
	hard := latencies(peers, each)
	// Who comes now, and whose name is taken, gets a lease all the same.
	if got := h.lease("10.77.0.3", "wan0"); got != 10005 {
		t.Errorf("table beside a squatter: got %d", got)
	}
	rules = append(rules, clientRules("10.77.0.3", "10.77.0.0/24", 10005)...)
	eventually(t, "a client renews twice meanwhile", func() error {
		if n := renewals(); n < before+2 {
			return fmt.Errorf("%d renewals, %d before", n, before)
		}
		return nil
	})
	sent := stop()
	h.wantRules(rules...)
	if log := server.log.String(); strings.Contains(log, "lease released") || strings.Contains(log, "msg=\"lease expired\" ifname=wan0") {
		t.Error("a lease ended")
	}
	// An answer that finds the client's queue full is lost, and asked for again.
	if log := h.clientLog(); strings.Contains(log, "finished") {
		t.Error("a client ended")
	}
	h.wantTables("10.77.0.2", "10.77.0.3")
	if len(hard) == 0 || len(quiet) == 0 {
		t.Fatal("no renewals")
	}
	factor := float64(quantile(hard, 0.99)) / float64(max(quantile(quiet, 0.99), 10*time.Microsecond))
	t.Logf("renewals of root: %d in peace, median %v, p99 %v; %d under %d datagrams, median %v, p99 %v, slowest %v: p99 is %.1f times as long",
		len(quiet), quantile(quiet, 0.5), quantile(quiet, 0.99), len(hard), sent,
		quantile(hard, 0.5), quantile(hard, 0.99), quantile(hard, 1), factor)
}

// wantTables fails unless the database has a lease of each address on wan0.
func (h *host) wantTables(addrs ...string) {
	h.t.Helper()
	all := strings.Join(h.leases(), "\n")
	for _, addr := range addrs {
		if !strings.Contains(all, "|inet|wan0|"+addr+"|") {
			h.t.Errorf("%s has no lease:\n%s", addr, all)
		}
	}
}
