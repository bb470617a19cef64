//go:build integration

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// tailscales has Tailscale's programs, and the server that testdata/tailnet makes of its module. No Debian has them.
const tailscales = "../../.cache/tailscale"

// buildTailscale builds them of the sources that testdata/tailnet/go.sum names.
func buildTailscale() error {
	dir, err := filepath.Abs(tailscales)
	if err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-C", "testdata/tailnet", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", ".", "tailscale.com/cmd/tailscale", "tailscale.com/cmd/tailscaled")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build tailscale: %w\n%s", err, out)
	}
	return nil
}

// full says that tests run that take very long, too.
var full = os.Getenv("SOAK") == "full"

// TestTailscaleSoak: beside the real tailscaled, whose rules come before ours, packets of both uplinks pass as long as its table
// has no default route. With an exit node all leads there; status and doctor say so, and rules with smaller priorities are the
// cure. Only with SOAK=full: building Tailscale takes minutes and a gigabyte.
func TestTailscaleSoak(t *testing.T) {
	t.Parallel()
	if !full {
		return
	}
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			tailscale(t, suite)
		})
	}
}

func tailscale(t *testing.T, suite string) {
	m, i := vpnMachine(t, suite, managers)
	for _, name := range []string{"tailscale", "tailscaled", "tailnet"} {
		m.copy(filepath.Join(tailscales, name), "/usr/local/bin/"+name)
	}
	m.sh(`chmod 755 /usr/local/bin/*; systemctl enable --now table-allocator-watch`)
	i.waitUplinks()
	i.serve(`exec tailnet ` + nettest.Far4 + ` >/run/tailnet.log 2>&1`)
	i.serve(`exec tailscaled --no-logs-no-support --tun=far --statedir=/var/lib/far --socket=/run/far.sock --port=41642 >/run/far.log 2>&1`)
	const (
		start = `systemd-run --quiet --unit=tailscaled tailscaled --no-logs-no-support --statedir=/var/lib/tailscale --socket=/run/tailscale.sock --port=41641`
		cli   = `timeout 60 tailscale --socket=/run/tailscale.sock `
		login = `up --accept-dns=false --login-server=http://` + nettest.Far4 + `:8080`
	)
	m.wait("the exit node is there", `timeout 60 tailscale --socket=/run/far.sock `+login+` --hostname=far --advertise-exit-node`)
	m.sh(start)
	m.wait("this host is there", cli+login)

	// Its rules stand, and the tunnel works.
	joined := func() {
		t.Helper()
		m.wait("its rules", `for rule in "5210:.*fwmark 0x80000/0xff0000" "5270:.*lookup 52"; do ip rule | grep "$rule"; ip -6 rule | grep "$rule"; done`)
		m.wait("the tunnel", cli+`ping --c 1 --until-direct=false "$(timeout 60 tailscale --socket=/run/far.sock ip -4)"; ping -c 1 -W 3 "$(timeout 60 tailscale --socket=/run/far.sock ip -4)"`)
		i.waitVPN(`10\.1\.0\.2$`, `fd01::2$`)
	}
	joined()
	m.sh(`systemctl restart table-allocator-watch`)
	joined()

	// All leaves by the exit node, and nothing of what is bound. With rules before Tailscale's it is as beside other VPNs.
	m.sh(cli + `set --exit-node="$(timeout 60 tailscale --socket=/run/far.sock ip -4)"`)
	m.wait("main leads to the exit node", `curl --silent --max-time 3 http://`+beyond+`/ | grep "^100[.]"`)
	m.wait("status names the rule", `! table-allocator-client status >/run/status; grep "10.2.0.2 .*shadowed by rule 5270" /run/status; table-allocator-client doctor | grep "rule-before-ours.*5270"`)
	m.wait("and its cure", `table-allocator-client status | grep -F '"priority": [5100, 20000, 91000]'`)
	m.wait("what is bound is held up, which is said", `! systemd-run --quiet --collect --wait --pipe table-allocator-client run wan2 curl --silent --max-time 3 http://`+beyond+`/ 2>/run/why; grep 'rule "5270: from all lookup 52" takes its inet traffic, and the lock drops it' /run/why`)
	m.sh(`sed -i '0,/^{/s//{ "bind_priority": 5000,/' /etc/table-allocator/server.json; echo '{"links": [{"ifname": "wan*", "priority": [5100, 20000, 91000]}]}' >/etc/table-allocator/watch.json
		systemctl restart table-allocator-server table-allocator-watch`)
	i.waitUplinks()
	m.wait("status finds no fault", `table-allocator-client status`)
	m.wait("what is bound leaves by its uplink", `systemd-run --quiet --wait --pipe table-allocator-client run wan2 curl --silent --max-time 3 http://`+beyond+`/ | grep "^10[.]2[.]0[.]2$"`)
	m.wait("in both families", `systemd-run --quiet --wait --pipe table-allocator-client run wan2 curl --silent --globoff --max-time 3 "http://[`+nettest.Far6+`]/" | grep "^fd02::2$"`)
	m.wait("main leads to the exit node", `curl --silent --max-time 3 http://`+beyond+`/ | grep "^100[.]"`)

	// Without it, and after it, all is as before.
	m.sh(cli + `set --exit-node=`)
	joined()
	m.sh(`systemctl stop tailscaled; ` + start)
	joined()
	m.sh(cli + `down; systemctl stop tailscaled`)
	m.wait("its rules are gone", `! ip rule | grep "^52[0-9][0-9]:"`)
	i.waitVPN(`10\.1\.0\.2$`, `fd01::2$`)
	m.want(`systemctl --failed --plain --no-legend`)
}
