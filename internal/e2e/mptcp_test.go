package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// endpoints waits until the MPTCP endpoints of the host are those of the addresses, each on its link.
func (h *host) endpoints(want ...string) {
	h.t.Helper()
	eventually(h.t, "the MPTCP endpoints", func() error {
		got := make(map[string]bool)
		for line := range strings.Lines(h.ns.Run(h.t, "ip", "mptcp", "endpoint")) {
			fields := strings.Fields(line)
			got[fields[0]+" "+strings.Join(fields[3:], " ")] = true // without its number
		}
		for _, w := range want {
			if !got[w] {
				return fmt.Errorf("got %v, want %q", got, want)
			}
		}
		if len(got) != len(want) {
			return fmt.Errorf("got %v, want %q", got, want)
		}
		return nil
	})
}

// TestMPTCP: an address has its endpoint as long as it has its rules, and endpoints of others stay. A connection over
// one uplink gets a subflow over the other one.
func TestMPTCP(t *testing.T) {
	h := newHost(t)
	u := h.behind(routed(0), routed(1))
	h.serve()
	h.ns.Run(t, "ip", "mptcp", "endpoint", "add", "192.0.2.77", "dev", "lo", "signal")
	foreign := "192.0.2.77 signal dev lo"
	with, without := `{"links":[{"ifname":"wan*","mptcp":true}]}`, `{"links":[{"ifname":"wan*"}]}`
	p := h.watch("-c", h.watchFile(with))
	var ours []string
	for n := range u.isps {
		u.address(n)
		inet, inet6 := at(n)
		for _, addr := range []string{inet, inet6} {
			h.served(addr)
			ours = append(ours, fmt.Sprintf("%s subflow dev wan%d", addr, n))
		}
	}
	h.endpoints(append(ours, foreign)...)

	const connect = `
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_STREAM, 262)
s.connect((sys.argv[1], 7))
s.send(b"x")
s.recv(100)
sys.stdin.read()`
	for family, far := range map[string]string{"4": internet, "6": internet6} {
		cmd := exec.Command("python3", "-c", connect, far)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		client := h.start(cmd)
		eventually(t, "a subflow by each uplink", func() error {
			flows := u.internet.Run(t, "ss", "-Htn", "-"+family, "state", "established", "sport = :7")
			for n := range u.isps {
				inet, inet6 := at(n)
				if !strings.Contains(flows, inet+":") && !strings.Contains(flows, "["+inet6+"]:") {
					return fmt.Errorf("IPv%s: none of uplink %d in\n%s", family, n, flows)
				}
			}
			return nil
		})
		_ = in.Close() // ends the client
		client.wait()
	}

	// Whoever is killed leaves them to the next one, which deletes them if it is told to.
	p.kill()
	inet, _ := at(0)
	h.ns.IP(t, "address del "+inet+"/24 dev wan0")
	p = h.watch("-c", h.watchFile(with))
	h.endpoints(append(ours[1:], foreign)...)
	reload := func(config string) {
		t.Helper()
		h.watchFile(config)
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	reload(without)
	h.endpoints(foreign)
	reload(with)
	h.endpoints(append(ours[1:], foreign)...)
	if r := h.run(bin(t, clientBin), "release", "--all"); r.code != 0 {
		t.Errorf("release --all: exit code %d: %s", r.code, r.stderr)
	}
	h.endpoints(foreign)
}

// TestMPTCPForeign: an endpoint of another program for the same address stays, also when the address is no longer
// served.
func TestMPTCPForeign(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.ns.Run(t, "ip", "mptcp", "endpoint", "add", "10.77.0.2", "dev", "wan0", "subflow", "backup")
	h.lease("10.77.0.2", "wan0", "--mptcp")
	h.endpoints("10.77.0.2 subflow backup dev wan0")
	h.client("-r", "-a", "10.77.0.2", "-i", "wan0")
	h.waitClean()
	h.endpoints("10.77.0.2 subflow backup dev wan0")
}
