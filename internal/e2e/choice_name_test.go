package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestChoiceName: a process that chooses while a user who is not trusted has the name of the command uplinks takes the name when it
// is free. Whether that user accepts connections delays no choice.
func TestChoiceName(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
		hung bool // the user accepts no connection, and has room for no more
	}{
		{"a watch", []string{"watch"}, false},
		{"without a watch", []string{"uplinks", "--run"}, false},
		{"a watch, and the user accepts nothing", []string{"watch"}, true},
		{"without a watch, and the user accepts nothing", []string{"uplinks", "--run"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newChooserHost(t, routed(0), routed(1))
			free := make(chan struct{})
			var taken []int
			var err error
			c.as(stranger, func(ready func()) {
				taken, err = takeChoiceName(tt.hung)
				ready()
				<-free
			})
			if err != nil {
				t.Fatal(err)
			}
			file := c.watchFile(strings.Replace(chooserConfig(copyLinks), "{", `{"reconcile_seconds": 1, `, 1))
			c.watch = c.start(c.command(append(tt.args, "--config", file, "--debug")...))
			c.watch.waitLog("the command uplinks cannot ask this process, since another one has its name")
			for n := range c.isps {
				c.address(n)
				if tt.args[0] != "watch" {
					inet, inet6 := at(n)
					c.lease(inet, fmt.Sprint("wan", n), "--routes", "copy")
					c.lease6(inet6, fmt.Sprint("wan", n), "--routes", "copy")
				}
			}
			c.waitUnbound(0)
			c.fault(0, noInternet)
			c.waitUnbound(1)
			if tt.hung {
				c.waitSwitchWhileAsking()
			}
			for _, fd := range taken {
				unix.Close(fd)
			}
			close(free)
			c.watch.waitLog("the command uplinks asks this process from now on")
			c.mend(0)
			c.waitUsed("wan0")
			c.waitUnbound(0)
			c.wantOwnOnly()
		})
	}
}

// takeChoiceName listens at the name of the command uplinks and accepts nothing. If full, no more connections can wait there.
func takeChoiceName(full bool) (fds []int, err error) {
	name := &unix.SockaddrUnix{Name: "@table-allocator-uplinks"}
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		fds = append(fds, l)
		err = unix.Bind(l, name)
	}
	room := 0
	if !full {
		room = unix.SOMAXCONN
	}
	if err == nil {
		err = unix.Listen(l, room)
	}
	for full && err == nil {
		var fd int
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			break
		}
		fds = append(fds, fd)
		if err = unix.Connect(fd, name); errors.Is(err, unix.EAGAIN) {
			return fds, nil
		}
	}
	return fds, err
}

// waitSwitchWhileAsking makes uplinks fail by turns, provider 0 first to be mended, until the choice changes between the begin and
// the end of a question to the process that has the name.
func (c *chooser) waitSwitchWhileAsking() {
	c.t.Helper()
	failed := true // provider 0
	eventually(c.t, "a switch while the process that has the name is asked", func() error {
		asking := false
		for line := range strings.Lines(c.watch.log.String()) {
			switch {
			case strings.Contains(line, "asking who has the name"):
				asking = true
			case strings.Contains(line, "asked who has the name"):
				asking = false
			case asking && strings.Contains(line, "unbound traffic uses another uplink") && !strings.Contains(line, `from=""`):
				if !failed {
					c.fault(0, noInternet)
					c.waitUnbound(1)
				}
				return nil
			}
		}
		if failed {
			c.mend(0)
			c.waitUnbound(0)
		} else {
			c.fault(0, noInternet)
			c.waitUnbound(1)
		}
		failed = !failed
		return errors.New(c.watch.log.String())
	})
}

// TestChoiceMacvlan: the address of a macvlan that another process serves is not chosen where its table has the gateway of the
// link below, which works and fails with that.
func TestChoiceMacvlan(t *testing.T) {
	c := newChooserHost(t, routed(0), routed(1))
	for n := range c.isps {
		c.address(n)
	}
	c.ns.Batch(t, "link add link wan0 name vip0 type macvlan mode bridge", "link set vip0 up", "address add 10.1.0.9/24 dev vip0")
	file := c.watchFile(chooserConfig(`{"ifname": "vip0", "rank": 1}, {"ifname": "*", "rank": 2}`))
	c.watch = c.start(c.command("uplinks", "--run", "--debug", "--config", file))
	c.watch.waitLog("choosing the uplink of unbound traffic")
	c.uplinks.watch("--config", file)
	eventually(t, "the macvlan is served and asked, and wan0 is used", func() error {
		states := make(map[string]string)
		for _, u := range c.report().Uplinks {
			states[fmt.Sprintf("%s %s %v", u.Ifname, u.Family, u.Used)] = u.State
		}
		for _, want := range []string{"vip0 inet false", "wan0 inet true", "wan1 inet false"} {
			if states[want] != "alive" {
				return fmt.Errorf("%v", states)
			}
		}
		return nil
	})
	if r := c.run(bin(t, clientBin), "uplinks"); !outputHas(r, "not used: its table has no default route of its own") {
		t.Errorf("uplinks: %+v", r)
	}
	c.fault(0, noInternet)
	c.waitUnbound(1)
	c.wantOwnOnly()
}
