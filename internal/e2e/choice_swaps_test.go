package e2e

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestChoiceSwaps: while the choice goes to and fro 60 times, half of them in each mode, no connection and no datagram is lost, and a connection that
// stands keeps its source. A firewall that drops what it knows no connection of would end that if it were forgotten.
func TestChoiceSwaps(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		swaps := 30
		if fullSize() {
			swaps = 1000
		}
		c := newChooser(t, links)
		c.waitUsed("wan0")
		c.waitUnbound(0)
		c.ns.Run(t, "nft", "table inet firewall { chain out { type filter hook output priority 0; tcp flags & syn == 0 ct state new,invalid drop; }; }")
		conns := []*standing{c.stand(internet), c.stand("[" + internet6 + "]")}
		stop := make(chan struct{})
		var load sync.WaitGroup
		counts := make([]map[string]int, 4)
		for i := range counts {
			counts[i] = make(map[string]int)
			network, far := []string{"udp", "tcp"}[i/2], []string{internet, "[" + internet6 + "]"}[i%2]
			load.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					time.Sleep(2 * time.Millisecond) // else a fast machine runs out of ports
					c.ns.Do(func() {
						one, err := dialWho(network, far)
						seen := ""
						if err == nil {
							seen, err = one.who()
							one.Close()
						}
						if err != nil {
							seen = "an error: " + err.Error()
						}
						counts[i][seen]++
					})
				}
			})
		}
		before := c.switches()
		for n := range swaps {
			if r := c.run(bin(t, clientBin), "uplinks", "use", fmt.Sprint("wan", (n+1)%2)); r.code != 0 {
				t.Errorf("uplinks use: %+v", r)
			}
			for _, one := range conns {
				if seen, err := one.who(); err != nil || seen != one.seen {
					t.Errorf("the connection from %s is seen as %q (%v)", one.seen, seen, err)
				}
			}
		}
		close(stop)
		load.Wait()
		eventually(t, "the log says of each swap", func() error { // it is written beside the loop
			if n := c.switches() - before; n < 2*swaps {
				return fmt.Errorf("%d switches of both families, want %d", n, 2*swaps)
			}
			return nil
		})
		if n := c.switches() - before; n != 2*swaps {
			t.Errorf("%d switches of both families, want %d", n, 2*swaps)
		}
		for i, seen := range counts {
			total := 0
			for source, n := range seen {
				total += n
				if want := [][]string{{"10.1.0.2", "10.2.0.2"}, {"fd01::2", "fd02::2"}}[i%2]; source != want[0] && source != want[1] {
					t.Errorf("%d times %s", n, source)
				}
			}
			if len(seen) < 2 {
				t.Errorf("%d packets, all seen as %v", total, seen)
			}
		}
		c.wantOwnOnly()
	})
}

// whoConn is a connection to the internet, which answers with the source that it sees.
type whoConn struct{ net.Conn }

func dialWho(network, far string) (whoConn, error) {
	conn, err := net.Dial(network, far+":7")
	return whoConn{conn}, err
}

func (c whoConn) who() (string, error) {
	buf := make([]byte, 64)
	err := c.SetDeadline(time.Now().Add(time.Minute))
	if err == nil {
		_, err = c.Write([]byte("?"))
	}
	n := 0
	if err == nil {
		n, err = c.Read(buf)
	}
	return strings.TrimSpace(string(buf[:n])), err
}

// standing is a connection that goes on.
type standing struct {
	whoConn
	seen string
}

func (c *chooser) stand(far string) *standing {
	c.t.Helper()
	one := &standing{}
	var err error
	c.ns.Do(func() { one.whoConn, err = dialWho("tcp", far) })
	if err == nil {
		c.t.Cleanup(func() { one.Close() })
		one.seen, err = one.who()
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return one
}
