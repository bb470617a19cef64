package netns

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

func TestMain(m *testing.M) { nettest.Main(m, "nftables", "dnsmasq-base") }

// TestNeverOpen: in no moment between add and del an uplink forwards without the filter, which leaves its forwarding to
// namespaces.
func TestNeverOpen(t *testing.T) {
	ns, isp := nettest.New(t, "host"), nettest.New(t, "isp")
	nettest.Veth(t, ns, "wan1", isp, "lan")
	nettest.Veth(t, ns, "wan2", isp, "lan2")
	if err := os.WriteFile(resolvConf, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ns.Do(func() {
		h, err := Open("unused", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		opened := 0
		h.Step = func(what string) {
			text := ns.Run(t, "nft", "list", "ruleset")
			for _, link := range []string{"wan1", "wan2"} {
				if readSetting("ipv4/conf/"+link+"/forwarding") != "1" && readSetting("ipv6/conf/"+link+"/force_forwarding") != "1" {
					continue
				}
				opened++
				if !strings.Contains(text, `iifname "`+link+`" drop`) {
					t.Errorf("before %q the host forwards for %s:\n%s", what, link, text)
				}
			}
		}
		s := State{Config: Config{Name: "work", Ifname: "wan1", OnLoss: uplink.Block, Resolv: "192.0.2.53", IPv6: true}, Number: 1, Phase: Up}
		s.Marking = wire.Marking{Mark: 1 << 20, Mask: 0xff << 20, Block: 9002, Fallback: 15002}
		change := func(f func() error) {
			t.Helper()
			err := h.locked(func(swept error) error {
				if swept != nil {
					return swept
				}
				return f()
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		sync := func() error {
			if err := h.memory.put(s); err != nil {
				return err
			}
			_, err := h.sync(context.Background(), &s, asked)
			return err
		}
		change(sync)
		s.Ifname = "wan2"
		change(sync)
		change(func() error { return h.remove(s) })
		if opened == 0 {
			t.Error("no link ever forwarded")
		}
		h.Step("the end")
	})
}
