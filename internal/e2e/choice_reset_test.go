package e2e

import (
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// standBy is a connection whose socket is bound to a link, or with "" to none.
func (c *chooser) standBy(ifname, far string) *standing {
	c.t.Helper()
	one := &standing{}
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		ctlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, ifname) })
		return errors.Join(ctlErr, err)
	}}
	var err error
	c.ns.Do(func() { one.Conn, err = d.Dial("tcp", far) })
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { one.Close() })
	if one.seen, err = one.who(); err != nil {
		c.t.Fatal(err)
	}
	return one
}

// TestChoiceReset: with "reset": "dead" connections of an uplink that died end when another one is used. Those to neighbours and
// those that were bound to the uplink do not, nor do those of an uplink that works and is left to others, and without it none does.
func TestChoiceReset(t *testing.T) {
	t.Parallel()
	const excluded = "excluded"
	for _, tt := range []struct {
		name, reset, fault string
		cut                bool
	}{
		{"never", `"reset": "never"`, noInternet, false},
		{"dead behind the gateway", `"reset": "dead"`, noInternet, true},
		{"no carrier", `"reset": "dead"`, "", true},
		{excluded, `"reset": "dead"`, excluded, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newChooser(t, copyLinks, tt.reset)
			c.waitUsed("wan0")
			c.waitUnbound(0)
			c.isps[0].ns.Do(func() { serveWho(t, "10.1.0.1:7") })
			c.internet.Do(func() { serveWho(t, internet+":8") })
			if r := c.run(bin(t, clientBin), "bind", "--ifname", "wan0", "--proto", "tcp", "--dport", "8"); r.code != 0 {
				t.Fatalf("bind: %+v", r)
			}
			far := []*standing{c.stand(internet), c.stand("[" + internet6 + "]")}
			others := []*standing{c.standBy("wan0", internet+":7"), c.stand("10.1.0.1"), c.standBy("wan1", internet+":7"), c.standBy("", internet+":8")}
			if far[0].seen != "10.1.0.2" || others[2].seen != "10.2.0.2" {
				t.Fatalf("connections from %s and %s", far[0].seen, others[2].seen)
			}
			switch tt.fault {
			case "":
				c.ns.IP(t, "link set wan0 down")
			case excluded:
				c.watchFile(chooserConfig(`{"ifname": "wan1"}`, tt.reset))
				if err := c.watch.cmd.Process.Signal(syscall.SIGHUP); err != nil {
					t.Fatal(err)
				}
			default:
				c.fault(0, tt.fault)
			}
			c.waitUnbound(1)
			if tt.cut {
				for _, family := range []string{"inet", "inet6"} {
					c.watch.waitLog(fmt.Sprintf("connections of a dead uplink reset\" ifname=wan0 family=%s count=1", family))
				}
				for _, one := range far {
					if _, err := one.who(); !errors.Is(err, unix.ECONNABORTED) {
						t.Errorf("the connection from %s: %v, want ECONNABORTED", one.seen, err)
					}
				}
				far = nil
			}
			switch tt.fault {
			case "":
				c.ns.IP(t, "link set wan0 up")
				c.address(0)
			case excluded:
				c.watchFile(chooserConfig(copyLinks, tt.reset))
				if err := c.watch.cmd.Process.Signal(syscall.SIGHUP); err != nil {
					t.Fatal(err)
				}
				c.waitUnbound(0)
			default:
				c.mend(0)
			}
			for _, one := range append(far, others...) {
				if seen, err := one.who(); err != nil || seen != one.seen {
					t.Errorf("the connection from %s is seen as %q (%v)", one.seen, seen, err)
				}
			}
			c.wantOwnOnly()
		})
	}
}
