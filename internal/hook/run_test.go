package hook

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/remember"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// recorder is a client that writes down how it is called.
type recorder struct {
	calls, warnings []string
}

func (r *recorder) runner() *Runner {
	call := func(name string, args []string) error {
		r.calls = append(r.calls, strings.TrimSpace(name+" "+strings.Join(args, " ")))
		return nil
	}
	return &Runner{
		Warn: func(text string) { r.warnings = append(r.warnings, text) },
		Client: Client{
			Hold:       func(args []string, _ time.Duration) error { return call("hold", args) },
			Release:    func(args, options []string) error { return call("release", append(args, options...)) },
			Behind:     func(args []string) (int, error) { return os.Getpid(), call("start", args) },
			CheckWatch: func([]string) error { return nil },
			Watch:      func(_ context.Context, args []string) error { return call("clean", args) },
		},
	}
}

func (r *recorder) want(t *testing.T, want ...string) {
	t.Helper()
	if !slices.Equal(r.calls, want) || len(r.warnings) > 0 {
		t.Errorf("got %q, warnings %q, want %q", r.calls, r.warnings, want)
	}
	r.calls, r.warnings = nil, nil
}

// What a later event needs is remembered for each link: addresses that were held, and a prefix.
func TestRemembered(t *testing.T) {
	var r recorder
	do := func(calls ...Call) {
		t.Helper()
		if err := r.runner().Run(calls); err != nil {
			t.Error(err)
		}
	}
	lease := func(ifname, addr string) Lease {
		return Lease{Ifname: ifname, Addr: netip.MustParseAddr(addr), Tag: "t", Routes: "copy"}
	}
	const args = " --routes copy -t t"
	do(Delegate{"eth0", netip.MustParsePrefix("2001:db8:1::/48")}, Hold{Lease: lease("eth0", "2001:db8::1"), Delegated: true},
		Hold{Lease: lease("eth1", "2001:db8::2"), Delegated: true}, Hold{Lease: lease("eth0", "192.0.2.1"), Delegated: false})
	r.want(t, "hold -6 -a 2001:db8::1 -i eth0"+args+" --prefix 2001:db8:1::/48", "hold -6 -a 2001:db8::2 -i eth1"+args, "hold -4 -a 192.0.2.1 -i eth0"+args)
	do(Undelegate{"eth0"}, Hold{Lease: lease("eth0", "2001:db8::1"), Delegated: true})
	r.want(t, "hold -6 -a 2001:db8::1 -i eth0"+args)
	do(Release{"eth0", netip.MustParseAddr("192.0.2.1"), []string{"-d", "x"}})
	r.want(t, "release -4 -r -a 192.0.2.1 -i eth0 -d x")
	do(Delegate{"eth0", netip.MustParsePrefix("2001:db8:1::/48")}, ReleaseAll{"eth0", nil}, ReleaseAll{"eth0", nil},
		Hold{Lease: lease("eth0", "2001:db8::1"), Delegated: true})
	r.want(t, "release -6 -r -a 2001:db8::1 -i eth0", "hold -6 -a 2001:db8::1 -i eth0"+args)

	// Not for ever.
	for i := range 2 * maxAddresses {
		do(Hold{Lease: lease("eth2", fmt.Sprintf("192.0.2.%d", i))})
	}
	r.calls = nil
	do(ReleaseAll{"eth2", nil})
	if newest := "release -4 -r -a 192.0.2.127 -i eth2"; len(r.calls) != maxAddresses || !slices.Contains(r.calls, newest) {
		t.Errorf("%d addresses are remembered: %q", len(r.calls), r.calls)
	}
}

// What is left out is said once, until the address is released or the link goes.
func TestSaidOnce(t *testing.T) {
	var r recorder
	renewal := func(environment string, want int) {
		t.Helper()
		calls, warnings, err := Calls("dhclient", nil, environ(environment))
		if err != nil {
			t.Fatal(err)
		}
		runner := r.runner()
		runner.Tell(warnings)
		if err := runner.Run(calls); err != nil {
			t.Error(err)
		}
		if len(r.warnings) != want {
			t.Errorf("%s\nwarnings: got %d, want %d: %q", environment, len(r.warnings), want, r.warnings)
		}
		r.warnings = nil
	}
	const told = "interface=said0\nnew_ip_address=192.0.2.7\nnew_subnet_mask=255.255.255.0\n"
	const odd = told + "new_routers=127.0.0.1\nnew_domain_name_servers=224.0.0.251 192.0.2.53\n"
	renewal(odd+"reason=BOUND", 2)
	renewal(odd+"reason=RENEW", 0)
	renewal(odd+"reason=RENEW\nnew_routers=127.0.0.2", 1)
	renewal(told+"reason=RENEW", 0)
	renewal(odd+"reason=RENEW", 0)
	renewal(odd+"reason=BOUND\ninterface=said1", 2)
	renewal("interface=said0\nold_ip_address=192.0.2.7\nreason=RELEASE", 0)
	renewal(odd+"reason=BOUND", 2)
	if err := r.runner().Run([]Call{ReleaseAll{"said0", nil}}); err != nil {
		t.Error(err)
	}
	renewal(odd+"reason=BOUND", 2)
	for range 2 {
		renewal("interface=a/b\nreason=BOUND\nnew_ip_address=192.0.2.7", 1) // of no link
	}
}

// A holder that cannot be started, and one that has no table yet, have their address remembered.
func TestHoldFails(t *testing.T) {
	var r recorder
	runner := r.runner()
	runner.Hold = func([]string, time.Duration) error { return errors.New("no table") }
	if err := runner.Run([]Call{Hold{Lease: Lease{Ifname: "eth3", Addr: netip.MustParseAddr("192.0.2.1")}}}); err == nil || !strings.Contains(err.Error(), "192.0.2.1") {
		t.Errorf("got %v", err)
	}
	if err := runner.Run([]Call{ReleaseAll{"eth3", nil}}); err != nil {
		t.Error(err)
	}
	r.want(t, "release -4 -r -a 192.0.2.1 -i eth3")
}

// An old address that is not given back in time does not cost the new one its table.
func TestReleaseHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		runner := r.runner()
		end := make(chan struct{})
		runner.Release = func([]string, []string) error { <-end; return nil }
		addr := netip.MustParseAddr("192.0.2.1")
		begun := time.Now()
		err := runner.Run([]Call{Release{"eth4", addr, nil}, Hold{Lease: Lease{Ifname: "eth4", Addr: addr.Next()}},
			Release{"eth4", addr, nil}, Release{"eth4", addr, nil}, Release{"eth4", addr, nil}})
		if took := time.Since(begun); took != patience || err == nil {
			t.Errorf("it took %s, %v", took, err)
		}
		r.want(t, "hold -4 -a 192.0.2.2 -i eth4 --routes  -t")
		close(end)
	})
}

// The process that is remembered as a watch may have ended, or be somebody else's by now.
func TestWatchProcess(t *testing.T) {
	var r recorder
	runner := r.runner()
	args := []string{"watch", "--ifname", "eth5"}
	m := runner.memory("eth5")
	sleep := func() *exec.Cmd {
		t.Helper()
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() }) // it may have ended
		return cmd
	}
	run := func(c Call) {
		t.Helper()
		if err := runner.Run([]Call{c}); err != nil {
			t.Error(err)
		}
	}
	run(EndWatch{"eth5", args}) // there is none
	r.want(t)
	run(StartWatch{"eth5", args})
	run(StartWatch{"eth5", args}) // it goes on: this process
	r.want(t, "start watch --ifname eth5")

	cmd := sleep()
	if err := m.setWatch(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	reaped := make(chan error, 1)
	go func() { reaped <- cmd.Wait() }()
	run(EndWatch{"eth5", args})
	r.want(t)
	if err := <-reaped; err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("the watch ended with %v", err)
	}
	if _, err := m.watchRead(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is remembered: %v", err)
	}

	// Another process has its pid.
	other := sleep()
	if err := m.Write(watchName, watchRecord{other.Process.Pid, 1}); err != nil {
		t.Fatal(err)
	}
	run(EndWatch{"eth5", args})
	r.want(t, "clean watch --ifname eth5")
	if p, err := openProcess(other.Process.Pid); err != nil {
		t.Errorf("the other process: %v", err)
	} else {
		p.close()
	}
}

// Files of the version before are read once, whatever they hold.
func TestTakeOver(t *testing.T) {
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Process.Kill()
	for name, tt := range map[string]struct {
		prefix, pid string
		watch       bool // there was one
		warnings    int
	}{
		"nothing":    {},
		"both":       {"2001:db8::/56\n", "2147483647\n", true, 0},
		"stranger":   {"", fmt.Sprintln(other.Process.Pid), true, 0},
		"unreadable": {"x", "y", false, 2},
		"empty":      {" ", " ", false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.MkdirAll(remember.Root, 0o755); err != nil {
				t.Fatal(err)
			}
			files := map[string]string{remember.Root + "/prefix.eth6": tt.prefix, remember.Root + "/watch.eth6.pid": tt.pid}
			for path, text := range files {
				if text != "" {
					if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			var r recorder
			m := r.runner().memory("eth6")
			if got := len(strings.Split(strings.Join(r.warnings, ""), "\n")); len(r.warnings) > 0 && got != tt.warnings || len(r.warnings) == 0 && tt.warnings > 0 {
				t.Errorf("warnings: %q", r.warnings)
			}
			prefix, _ := netip.ParsePrefix(strings.TrimSpace(tt.prefix))
			if got := m.prefix(); got != prefix {
				t.Errorf("prefix: got %s, want %s", got, prefix)
			}
			_, err := m.watchRead()
			if p, runs := m.watch(); runs || (err == nil) != tt.watch {
				t.Errorf("watch: %v, runs %v, process %d", err, runs, p.pid)
			}
			for path := range files {
				if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s: %v", path, err)
				}
			}
			if err := errors.Join(m.Remove(prefixName), m.Remove(watchName)); err != nil {
				t.Error(err)
			}
		})
	}
}
