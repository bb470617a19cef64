package nettest

import (
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
)

func hostNamespace(t *testing.T) string {
	t.Helper()
	link, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func TestNamespace(t *testing.T) {
	t.Parallel()
	n := New(t, "host")
	if got := n.IP(t, "-o link"); !strings.HasPrefix(got, "1: lo:") || !strings.Contains(got, "LOWER_UP") || strings.Count(got, "\n") != 1 {
		t.Errorf("links of a fresh namespace:\n%swant lo alone, up", got)
	}
	host, inside := hostNamespace(t), ""
	n.Do(func() { inside = hostNamespace(t) })
	if inside == host {
		t.Error("Do ran outside of the namespace")
	}
	if got, err := os.Readlink(n.Path()); err != nil || got != inside {
		t.Errorf("Path leads to %q, %v; want %q", got, err, inside)
	}
	if out, err := n.Output("ip", "link", "show", "nolink"); err == nil || !strings.Contains(out, "nolink") {
		t.Errorf("Output of a failing command: %q, %v", out, err)
	}
	if err := n.Start(exec.Command("/nonexistent")); err == nil {
		t.Error("Start of a missing program: no error")
	}
}

// No goroutine may ever find itself in a namespace that it did not enter.
func TestNamespaceThreads(t *testing.T) {
	host := hostNamespace(t)
	var wg sync.WaitGroup
	for range 8 {
		n := New(t, "busy")
		for range 4 {
			wg.Go(func() {
				for range 25 {
					n.Do(func() {
						if hostNamespace(t) == host {
							t.Error("Do ran outside of the namespace")
						}
					})
					if got := hostNamespace(t); got != host {
						t.Errorf("a thread was left in %s", got)
					}
					if out, err := n.Output("true"); err != nil {
						t.Errorf("true: %v %s", err, out)
					}
				}
			})
		}
	}
	wg.Wait()
}

func TestNamespaceDoEndsTheTest(t *testing.T) {
	t.Parallel()
	n := New(t, "host")
	after := make(chan bool, 1)
	go func() {
		defer close(after)
		n.Do(runtime.Goexit) // as t.Fatal does
		after <- true
	}()
	if <-after {
		t.Error("the caller of Do went on although f had ended the test")
	}
}

func TestVeth(t *testing.T) {
	t.Parallel()
	a, b := New(t, "a"), New(t, "b")
	Veth(t, a, "eth0", b, "wan0")
	a.IP(t, "addr add 192.0.2.1/24 dev eth0")
	b.IP(t, "addr add 192.0.2.2/24 dev wan0")
	var listener net.Listener
	var err error
	b.Do(func() { listener, err = net.Listen("tcp4", "192.0.2.2:0") })
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	a.Do(func() {
		conn, err := net.Dial("tcp4", listener.Addr().String())
		if err != nil {
			t.Fatalf("from a to b: %v", err)
		}
		conn.Close()
	})
}
