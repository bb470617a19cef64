package e2e

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/wire"
)

const holderName = "wan0-10.77.0.2-2"

// toHolder is a datagram for the holder of the tests' key.
func toHolder(cmd int, more string) string {
	return fmt.Sprintf(`{"address":"10.77.0.2","ifname":"wan0",%s"addr_family":2,"cmd":%d,"version":1}`, more, cmd)
}

// waitHolder waits until a holder of the tests' key answers.
func (h *host) waitHolder() {
	h.t.Helper()
	p := h.peer("asker", false)
	defer p.conn.Close()
	eventually(h.t, "there is a holder", func() error {
		if p.askAt(holderName, toHolder(17, ""), patience) == "" {
			return errors.New("no answer")
		}
		return nil
	})
}

// TestClientHolder: the protocol at the holder's name.
func TestClientHolder(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	if got := h.lease("10.77.0.2", "wan0", "-t", "cable"); got != 10000 {
		t.Fatalf("table %d", got)
	}
	pid := h.onlyClient()
	p := h.peer("somebody", true)
	expires := strings.TrimSpace(h.sqlite("select LeaseExpires from RtTables"))
	inForce := fmt.Sprintf(`{"version":1,"cmd":2,"table":10000,"lease_expires":%s,"pid":%d`, expires, pid) // and what later versions add
	if got := p.askAt(holderName, toHolder(17, ""), patience); !strings.HasPrefix(got, inForce) {
		t.Errorf("query: got %s, want %s", got, inForce)
	}
	// The address in another spelling cannot be for IPv4; other spaces and keys can.
	if got := p.askAt(holderName, " "+strings.Replace(toHolder(17, `"x":[1,{}],`), ":", " : ", 3), patience); !strings.HasPrefix(got, inForce) {
		t.Errorf("query with more to it: got %s, want %s", got, inForce)
	}
	for _, tt := range []struct{ name, datagram, want string }{
		{"another key", strings.Replace(toHolder(17, ""), "10.77.0.2", "10.77.0.3", 1), `"code":"wrong-key"`},
		{"another link's", strings.Replace(toHolder(19, ""), "wan0", "wan1", 1), `"code":"wrong-key"`},
		{"request", toHolder(0, ""), `"code":"malformed"`},
		{"release", toHolder(1, ""), `"code":"malformed"`},
	} {
		if got := p.askAt(holderName, tt.datagram, patience); !strings.Contains(got, tt.want) || !strings.Contains(got, `"table":0,`) {
			t.Errorf("%s: got %s", tt.name, got)
		}
	}
	// What is no request is not answered: the answer that comes is the next one's.
	for _, garbage := range []string{"", "{", "[]", "1", toHolder(3, ""), toHolder(2, ""),
		`{"version":1,"cmd":2,"table":20000,"lease_expires":999999}`} {
		if errs := p.conn.Send(wire.Message{Data: []byte(garbage), To: padded(t, holderName)}); errs != nil {
			t.Fatal(errs[0])
		}
		if got := p.askAt(holderName, toHolder(17, ""), patience); !strings.HasPrefix(got, inForce) {
			t.Errorf("after %.20q: got %s, want %s", garbage, got, inForce)
		}
	}
	// Replace, and as long as it may be.
	pad := strings.Repeat("x", wire.MaxReplace-len(toHolder(18, `"tag":"dsl","pad":"",`)))
	for _, more := range []string{`"tag":"fibre",`, `"tag":"dsl","pad":"` + pad + `",`} {
		if got := p.askAt(holderName, toHolder(18, more), patience); !strings.Contains(got, `"table":10000,`) {
			t.Errorf("replace: got %s", got)
		}
		tag, _, _ := strings.Cut(more[len(`"tag":"`):], `"`)
		eventually(t, "the lease has the new tag", func() error {
			if got := strings.Join(h.leases(), "\n"); got != "10000|inet|wan0|10.77.0.2|"+tag+"|0" {
				return errors.New(got)
			}
			return nil
		})
	}
	if got := p.askAt(holderName, toHolder(18, `"tag":"new","pad":"x`+pad+`",`), patience); !strings.Contains(got, "longer than 65536 bytes") {
		t.Errorf("too long: got %s", got)
	}
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.wantLeases("10000|inet|wan0|10.77.0.2|dsl|0")
	// End is answered when all is gone.
	if got, want := p.askAt(holderName, toHolder(19, ""), patience), fmt.Sprintf(`{"version":1,"cmd":2,"table":0,"lease_expires":0,"pid":%d`, pid); !strings.HasPrefix(got, want) {
		t.Errorf("end: got %s, want %s", got, want)
	}
	h.wantRules()
	h.wantLeases()
	h.waitNoClient()
}

// TestClientHolderOfOthers: a holder tells nothing to other users, and does nothing for
// them.
func TestClientHolderOfOthers(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0")
	var answers []string
	h.as(stranger, func(func()) {
		conn, err := wire.Listen(padded(t, "somebody"), wire.MaxRequest)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		p := &peer{t, conn}
		for _, cmd := range []int{17, 18, 19} {
			conn.Send(wire.Message{Data: []byte(toHolder(cmd, `"tag":"mine",`)), To: padded(t, holderName)})
			answer, err := p.receive(patience)
			answers = append(answers, fmt.Sprint(answer, err))
		}
	})
	for _, answer := range answers {
		if !strings.Contains(answer, `"table":0,"lease_expires":0,"code":"denied"`) {
			t.Errorf("got %s", answer)
		}
	}
	// The same through the client.
	if r := h.clientWith(asStranger, "-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, "only root") {
		t.Errorf("client: got %+v", r)
	}
	if r := h.clientWith(asStranger, "-r", "-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "0\n" || r.stderr == "" {
		t.Errorf("release: got %+v", r)
	}
	h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.wantLeases("10000|inet|wan0|10.77.0.2||0")
	h.onlyClient()
}

// TestClientTwice: a second call for the same key gets the table in force, and one
// process remains, also of many calls at the very same time.
func TestClientTwice(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	h.serve()
	h.lease("10.77.0.2", "wan0", "-t", "cable")
	first := h.onlyClient()
	for _, more := range [][]string{nil, {"-t", "cable"}, {"-f"}, {"-t", "dsl"}} {
		if got := h.lease("10.77.0.2", "wan0", more...); got != 10000 {
			t.Errorf("%q: table %d", more, got)
		}
		if pid := h.onlyClient(); pid != first {
			t.Errorf("%q: process %d instead of %d", more, pid, first)
		}
	}
	eventually(t, "the lease has the newest tag", func() error {
		if got := strings.Join(h.leases(), "\n"); got != "10000|inet|wan0|10.77.0.2|dsl|0" {
			return errors.New(got)
		}
		return nil
	})
	var cmds []*exec.Cmd
	for range 25 { // more than a queue holds
		cmds = append(cmds, h.command("-4", "-a", "10.77.0.3", "-i", "wan0"))
	}
	for _, got := range h.together(cmds) {
		if got.stdout != "10001\n" || got.code != 0 {
			t.Errorf("one of many: got %+v", got)
		}
	}
	h.waitClients(2)
	h.wantRules(append(clientRules("10.77.0.2", "10.77.0.0/24", 10000), clientRules("10.77.0.3", "10.77.0.0/24", 10001)...)...)
	h.signalClients(syscall.SIGTERM)
	h.waitClean()
}

// TestClientCanonical: an address is one key, however it is spelled.
func TestClientCanonical(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "fd00::2/64")
	h.serve()
	for _, spelling := range []string{"fd00::02", "fd00::2", "FD00:0:0:0::2", "fd00::0.0.0.2"} {
		if r := h.client("-6", "-a", spelling, "-i", "wan0"); r.stdout != "10000\n" {
			t.Errorf("%s: got %+v", spelling, r)
		}
		h.onlyClient()
	}
	h.wantLeases("10000|inet6|wan0|fd00::2||0")
	if r := h.client("-r", "-6", "-a", "fd00:0::2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 {
		t.Errorf("release: got %+v", r)
	}
	h.waitClean()
}

func TestClientRelease(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24", "10.77.0.3/24")
	server := h.serve()
	release := func(name string) {
		t.Helper()
		if r := h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, "10.77.0.2 on wan0: ") {
			t.Errorf("%s: got %+v", name, r)
		}
		h.wantRules()
		h.wantLeases()
		h.waitNoClient()
	}
	release("nothing held")
	h.lease("10.77.0.2", "wan0")
	release("held")
	h.lease("10.77.0.2", "wan0", "--priority", "1,2,3", "--forward")
	release("held with options that -r does not know")
	h.lease("10.77.0.2", "wan0", "--priority", "1,2,3")
	h.signalClients(syscall.SIGKILL)
	h.waitNoClient()
	h.ns.IP(t, "route add 198.51.100.0/24 dev wan0 table 10000 proto 116")
	release("killed")
	if got, err := h.ns.Output("ip", "route", "show", "table", "10000"); err == nil && strings.TrimSpace(got) != "" {
		t.Errorf("routes are left: %s", got)
	}
	h.addRules(originals("10.77.0.2", "10.77.0.2/24", 10000)...)
	release("killed") // the original's
	// Another one's are not touched.
	table := h.lease("10.77.0.3", "wan0")
	if r := h.client("-r", "-4", "-a", "10.77.0.2", "-i", "wan0"); r.stdout != "0\n" || r.code != 0 {
		t.Errorf("another's: got %+v", r)
	}
	h.wantRules(clientRules("10.77.0.3", "10.77.0.0/24", table)...)
	h.onlyClient()
	// Without a server the rules go all the same.
	server.kill()
	if r := h.client("-r", "-4", "-a", "10.77.0.3", "-i", "wan0"); r.stdout != "0\n" || !strings.Contains(r.stderr, "nobody has the name") {
		t.Errorf("without a server: got %+v", r)
	}
	h.wantRules()
	h.waitNoClient()
}

// TestClientSquattedHolder: whoever has the holder's name and does not answer, or may not
// be believed, is named, and does not keep anybody from a table.
func TestClientSquattedHolder(t *testing.T) {
	for _, tt := range []struct {
		name string
		uid  int
		take func(h *host)
	}{
		{"silent, a stranger", stranger, func(h *host) { h.bound(stranger, padded(h.t, holderName)) }},
		{"silent, root", 0, func(h *host) { h.bound(0, padded(h.t, holderName)) }},
		{"a stranger with an answer", stranger, func(h *host) {
			h.fakeServer(stranger, padded(h.t, holderName), alwaysGrant(20254, 3600))
		}},
		{"a full queue", stranger, func(h *host) {
			h.bound(stranger, padded(h.t, holderName))
			p := h.peer("somebody", true)
			for {
				errs := p.conn.Send(wire.Message{Data: []byte("x"), To: padded(h.t, holderName)})
				if errs != nil && errors.Is(errs[0], syscall.EAGAIN) {
					return
				}
			}
		}},
		{"a connected socket", stranger, func(h *host) {
			h.as(stranger, func(func()) {
				text := "@" + holderName + strings.Repeat("\x00", wire.MaxName+1-len(holderName))
				conn, err := net.DialUnix("unixgram", &net.UnixAddr{Net: "unixgram", Name: text}, &net.UnixAddr{Net: "unixgram", Name: "@tas_socket"})
				if err != nil {
					h.t.Error(err)
					return
				}
				h.t.Cleanup(func() { conn.Close() })
			})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.link("wan0", "10.77.0.2/24")
			h.serve()
			tt.take(h)
			r := h.client("-4", "-a", "10.77.0.2", "-i", "wan0")
			if r.stdout != "10000\n" || r.code != 0 || !strings.Contains(r.stderr, owner(tt.uid)) {
				t.Errorf("got %+v", r)
			}
			h.wantRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
			h.wantLeases("10000|inet|wan0|10.77.0.2||0")
			h.signalClients(syscall.SIGTERM)
			h.waitClean()
			r = h.run(bin(t, clientBin), "-r", "-4", "-a", "10.77.0.2", "-i", "wan0")
			if r.stdout != "0\n" || r.code != 0 || !strings.Contains(r.stderr, owner(tt.uid)) {
				t.Errorf("release: got %+v", r)
			}
		})
	}
}

// TestClientBusyHolder: a holder of ours that is out of breath is no squatter.
func TestClientBusyHolder(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	h.lease("10.77.0.2", "wan0")
	holder := h.onlyClient()
	h.freeze(holder)
	second := h.start(h.command("-f", "--debug", "-4", "-a", "10.77.0.2", "-i", "wan0"))
	// It asks again and again: until the holder's queue is full it could not be told.
	p := h.peer("somebody", true)
	eventually(t, "its requests fill the queue", func() error {
		errs := p.conn.Send(wire.Message{Data: []byte("x"), To: padded(t, holderName)})
		if errs == nil {
			return errors.New("there is room")
		}
		return nil
	})
	select {
	case <-second.done:
		t.Errorf("the second one did not wait; it wrote:\n%s", second.log.String())
	case <-time.After(500 * time.Millisecond): // time enough to make the mistake
	}
	if err := syscall.Kill(holder, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if code := second.wait(); code != 0 || second.log.String() != "10000\n" {
		t.Errorf("exit code %d; it wrote:\n%s", code, second.log.String())
	}
	if pid := h.onlyClient(); pid != holder {
		t.Errorf("process %d instead of %d", pid, holder)
	}
}

// TestClientHolderEnds: a call that meets a holder on its way out becomes the holder.
func TestClientHolderEnds(t *testing.T) {
	h := newHost(t)
	h.link("wan0", "10.77.0.2/24")
	h.serve()
	for range 5 {
		h.lease("10.77.0.2", "wan0")
		h.signalClients(syscall.SIGTERM)
	}
	if got := h.lease("10.77.0.2", "wan0"); got != 10000 {
		t.Errorf("table %d", got)
	}
	h.onlyClient()
	h.waitRules(clientRules("10.77.0.2", "10.77.0.0/24", 10000)...)
	h.wantLeases("10000|inet|wan0|10.77.0.2||0")
}
