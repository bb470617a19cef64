package netns

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// A dhcpd is dnsmasq at the far end of a link.
type dhcpd struct {
	t   *testing.T
	ns  *nettest.Namespace
	cmd *exec.Cmd
	log string
}

// serveDHCP starts one for a network such as 10.5.0.
func serveDHCP(t *testing.T, ns *nettest.Namespace, network string) *dhcpd {
	t.Helper()
	d := &dhcpd{t: t, ns: ns, log: filepath.Join(t.TempDir(), "log")}
	ns.IP(t, "address flush dev lan")
	ns.IP(t, "address add "+network+"1/24 dev lan")
	log, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.cmd = exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-", "--log-dhcp", "--port=0", "--interface=lan",
		"--dhcp-range="+network+"100,"+network+"150,255.255.255.0,1h", "--dhcp-authoritative", "--no-ping", "--dhcp-leasefile="+d.log+".leases")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := ns.Start(d.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.end)
	d.wait("", "DHCP, IP range")
	return d
}

func (d *dhcpd) end() {
	_ = d.cmd.Process.Kill() // it may have ended
	_ = d.cmd.Wait()
}

// said is what it logged from somewhere on.
func (d *dhcpd) said(since string) string {
	d.t.Helper()
	text, err := os.ReadFile(d.log)
	if err != nil {
		d.t.Fatal(err)
	}
	return strings.TrimPrefix(string(text), since)
}

func (d *dhcpd) wait(since, what string) {
	d.t.Helper()
	eventually(d.t, "dnsmasq says "+what, func() error {
		if said := d.said(since); !strings.Contains(said, what) {
			return errors.New(said)
		}
		return nil
	})
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	err := check()
	for deadline := time.Now().Add(time.Minute); err != nil && time.Now().Before(deadline); err = check() {
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("%s: never: %v", what, err)
	}
}

// TestLeaseConfirmed: a link that got its carrier back may be at another network. Its client asks at once whether the lease
// holds, keeps the address where nobody answers, and takes another one where it does not hold.
func TestLeaseConfirmed(t *testing.T) {
	ns, isp := nettest.New(t, "inside"), nettest.New(t, "isp")
	nettest.Veth(t, ns, inner, isp, "lan")
	first := serveDHCP(t, isp, "10.5.0.")
	text, err := os.Create(filepath.Join(t.TempDir(), "client"))
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go ns.Do(func() {
		ended <- Lease(ctx, slog.New(slog.NewTextHandler(text, &slog.HandlerOptions{Level: slog.LevelDebug})))
	})
	defer func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the client ended: %v", err)
		}
	}()
	address := func() string { return ns.Run(t, "ip", "-4", "-br", "address", "show", "dev", inner) }
	has := func(network string) {
		t.Helper()
		eventually(t, "it has an address of "+network, func() error {
			if have := address(); !strings.Contains(have, " "+network) {
				return errors.New(have)
			}
			return nil
		})
	}
	said := func(what string) int {
		t.Helper()
		log, err := os.ReadFile(text.Name())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(log), what)
	}
	flap := func() {
		isp.IP(t, "link set lan down")
		isp.IP(t, "link set lan up")
	}
	has("10.5.0.")
	given := address()
	before := first.said("")
	flap()
	first.wait(before, "DHCPACK(lan)")
	if said := first.said(before); strings.Contains(said, "DHCPDISCOVER") || !strings.Contains(said, "DHCPREQUEST(lan) 10.5.0.") {
		t.Errorf("a link that has its carrier again asks for another address:\n%s", said)
	}
	if now := address(); now != given || said("asks whether the lease holds") != 1 {
		t.Errorf("it has %s, and before %s", now, given)
	}
	first.end()
	flap()
	eventually(t, "it asks in vain", func() error {
		if said("nobody says whether the lease holds") == 0 {
			return errors.New("it did not")
		}
		return nil
	})
	if now := address(); now != given {
		t.Errorf("it has %s while no server answers, and before %s", now, given)
	}
	second := serveDHCP(t, isp, "10.6.0.")
	flap()
	has("10.6.0.")
	if said := second.said(""); !strings.Contains(said, "DHCPNAK") {
		t.Errorf("the lease of another network was not asked for:\n%s", said)
	}
}

// TestPlace: what makes a client doubt its lease.
func TestPlace(t *testing.T) {
	then := place{changes: 2, carrier: true, asleep: time.Minute}
	for name, c := range map[string]struct {
		now  place
		want bool
	}{
		"nothing happened":              {then, false},
		"two clocks, a moment apart":    {place{2, true, time.Minute + time.Millisecond}, false},
		"the machine slept":             {place{2, true, 2 * time.Minute}, true},
		"the carrier went, and is back": {place{4, true, time.Minute}, true},
	} {
		if got := c.now.differs(then); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	// A lease of an hour that was slept through has ended.
	if now := termOf(time.Hour, time.Minute); now.ends != time.Hour+time.Minute || now.next != 31*time.Minute {
		t.Errorf("a lease of an hour: %+v", now)
	}
}
