package wire

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestSet: many connections, one reader.
func TestSet(t *testing.T) {
	s, err := NewSet()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const n = 200
	conns := make([]*Conn, n)
	for i := range conns {
		addr, err := Padded(name(t) + strings.Repeat("x", 1+i%5) + string(rune('a'+i/26)) + string(rune('a'+i%26)))
		if err != nil {
			t.Fatal(err)
		}
		if conns[i], err = Listen(addr, MaxReplace); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
		if err := s.Add(conns[i], i); err != nil {
			t.Fatal(err)
		}
	}
	type got struct {
		to   int
		data string
	}
	heard, ended := make(chan got, n), make(chan error)
	go func() {
		for {
			err := s.Receive(func(tag any, datagrams []Datagram) {
				for _, d := range datagrams {
					heard <- got{tag.(int), string(d.Data)}
				}
			})
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	peer := func() *Conn { addr, err := Exact(name(t) + "-peer"); return listen(t, addr, err) }()
	send := func(to int, text string) {
		t.Helper()
		if errs := peer.Send(Message{Data: []byte(text), To: conns[to].Addr()}); errs != nil {
			t.Fatal(errs[0])
		}
	}
	next := func() got {
		t.Helper()
		select {
		case g := <-heard:
			return g
		case <-time.After(30 * time.Second):
			t.Fatal("nothing comes")
			return got{}
		}
	}
	large := string(bytes.Repeat([]byte("l"), MaxReplace))
	for i := range n {
		send(i, large[:1+i])
	}
	var all []int
	for range n {
		g := next()
		if g.data != large[:1+g.to] {
			t.Errorf("datagram of %d bytes came to %d", len(g.data), g.to)
		}
		all = append(all, g.to)
	}
	slices.Sort(all)
	if all = slices.Compact(all); len(all) != n {
		t.Errorf("%d connections got one, want %d", len(all), n)
	}
	send(3, large)
	if g := next(); g.to != 3 || g.data != large {
		t.Errorf("to %d came %d bytes", g.to, len(g.data))
	}
	// One that was taken out gets nothing; its descriptor may be another's by now.
	if err := s.Remove(conns[3]); err != nil {
		t.Error(err)
	}
	send(3, "lost")
	conns[3].Close()
	send(4, "found")
	if g := next(); g != (got{4, "found"}) {
		t.Errorf("got %v", g)
	}
	s.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestWant(t *testing.T) {
	key := Key{Inet, "wan0", "192.0.2.5"}
	for _, r := range []Request{{Key: key, Want: 10017}, {Key: key, Want: tableMax, Tag: "x"}} {
		back, err := ParseRequest(r.Append(nil))
		if err != nil || back != r {
			t.Errorf("%s: got %+v, %v", r.Append(nil), back, err)
		}
	}
	const start = `{"address":"192.0.2.5","ifname":"wan0","addr_family":2,"version":1,`
	for text, ok := range map[string]bool{
		`"cmd":0,"want":0}`:            true,
		`"cmd":1,"want":7}`:            true, // and does not count
		`"cmd":0,"want":4294967296}`:   false,
		`"cmd":0,"want":-1}`:           false,
		`"cmd":0,"want":"7"}`:          false,
		`"cmd":0,"want":7,"want":7}`:   false,
		`"cmd":17,"want":1,"extra":1}`: true,
	} {
		r, err := ParseRequest([]byte(start + text))
		if (err == nil) != ok || r.Want != 0 && err == nil {
			t.Errorf("%s: got %d, %v", text, r.Want, err)
		}
	}
}
