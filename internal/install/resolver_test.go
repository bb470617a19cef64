package install

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestMain(m *testing.M) { nettest.Main(m) }

func TestSetServers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "servers")
	one, two := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.10")
	ns := []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("192.0.2.54")}
	set := func(addr netip.Addr, servers []netip.Addr, wantChanged bool, want ...string) {
		t.Helper()
		changed, err := lines{file: path, addr: addr, servers: servers}.write()
		if err != nil || changed != wantChanged {
			t.Errorf("changed %v, %v, want %v", changed, err, wantChanged)
		}
		text, err := os.ReadFile(path)
		if err != nil && len(want) > 0 {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(text)); got != strings.Join(want, "\n") {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	set(one, nil, false)
	set(one, ns, true, "server=192.0.2.53@10.0.0.1", "server=192.0.2.54@10.0.0.1")
	set(one, ns, false, "server=192.0.2.53@10.0.0.1", "server=192.0.2.54@10.0.0.1")
	set(two, ns[:1], true, "server=192.0.2.53@10.0.0.1", "server=192.0.2.54@10.0.0.1", "server=192.0.2.53@10.0.0.10")
	// 10.0.0.1 is not 10.0.0.10, and what others wrote stays.
	if err := os.WriteFile(path, []byte("# mine\nserver=/lan/10.0.0.1\nserver=192.0.2.53@10.0.0.1\nserver=192.0.2.53@10.0.0.10"), 0o644); err != nil {
		t.Fatal(err)
	}
	set(one, nil, true, "# mine", "server=/lan/10.0.0.1", "server=192.0.2.53@10.0.0.10")
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}
}

// TestLinesWait: lines of an address wait while another process has the lock, and only the last
// ones for it are written.
func TestLinesWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "servers")
	e := Env{Log: slog.New(slog.DiscardHandler)}
	one, two := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	set := func(addr netip.Addr, servers ...string) {
		t.Helper()
		l := lines{file: path, addr: addr, pidFile: path + ".pid", log: e.Log}
		for _, s := range servers {
			l.servers = append(l.servers, netip.MustParseAddr(s))
		}
		if err := e.setLines(l); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want string) {
		t.Helper()
		if text, err := os.ReadFile(path); string(text) != want || err != nil && want != "" {
			t.Errorf("got %q, %v, want %q", text, err, want)
		}
	}
	hold := func() (unlock func()) {
		t.Helper()
		unlock, err := remember.Lock(resolverLock)
		if err != nil {
			t.Fatal(err)
		}
		return unlock
	}
	unlock := hold()
	set(one, "192.0.2.53")
	set(two, "192.0.2.53")
	set(one, "192.0.2.54")
	want("")
	for range 2 * retryMost { // a holder that stands still costs less and less
		if e.RetryAt == 0 || e.RetryAt > wire.Now()+2*time.Second {
			t.Fatalf("next try at %v, now %v", e.RetryAt, wire.Now())
		}
		e.Retry()
	}
	want("")
	unlock()
	e.Retry()
	want("server=192.0.2.53@10.0.0.2\nserver=192.0.2.54@10.0.0.1\n")
	if e.RetryAt != 0 {
		t.Errorf("a try at %v of nothing", e.RetryAt)
	}

	// What comes later, at once, ends what waits.
	unlock = hold()
	set(one)
	unlock()
	set(one, "192.0.2.55")
	e.Retry()
	want("server=192.0.2.53@10.0.0.2\nserver=192.0.2.55@10.0.0.1\n")

	unlock = hold()
	set(two)
	time.AfterFunc(5*retryIn, unlock)
	e.Close()
	want("server=192.0.2.55@10.0.0.1\n")
	unlock = hold()
	set(one)
	e.Close() // does not wait for ever
	unlock()
	want("server=192.0.2.55@10.0.0.1\n")
}

// TestResolverFIFO: files that would make their reader wait are no files of dnsmasq.
func TestResolverFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := (lines{file: path, addr: netip.MustParseAddr("10.0.0.1")}).write(); err == nil || !strings.Contains(err.Error(), "want a regular file") {
		t.Errorf("servers-file: %v", err)
	}
	if err := tellDnsmasq(path); err != nil {
		t.Errorf("pid file: %v", err)
	}
}

// TestNoResolver: an address whose resolver is none gets no lines in a file that other uplinks use, and loses those that it had.
func TestNoResolver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "servers")
	const others = "server=192.0.2.53@192.0.2.9\n"
	if err := os.WriteFile(path, []byte(others+"server=192.0.2.54@192.0.2.5\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	u := uplink.Uplink{Key: wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "192.0.2.5"}}
	u.Settings = uplink.Settings{Resolver: uplink.NoResolver, ServersFile: path, Nameservers: []netip.Addr{netip.MustParseAddr("192.0.2.54")}}
	log := slog.New(slog.DiscardHandler)
	env := &Env{Log: log, OtherHolder: func(wire.Key) (bool, error) { return false, nil }}
	inst := env.New(u, log, func(what string, err error) {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
	inst.AdoptServers()
	inst.resolve()
	if text, err := os.ReadFile(path); err != nil || string(text) != others {
		t.Errorf("the file is %q, %v", text, err)
	}
}
