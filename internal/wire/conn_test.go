package wire

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// name is a name that no other test has.
func name(t *testing.T) string {
	return "wire-test-" + strconv.Itoa(os.Getpid()) + "-" + strings.ReplaceAll(t.Name(), "/", "-")
}

func listen(t *testing.T, addr Addr, err error) *Conn {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	c, err := Listen(addr, MaxRequest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		name string
		len  int
		ok   bool
	}{{"none", 0, false}, {"one", 1, true}, {"longest", 106, true}, {"too long", 107, false}} {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Repeat("n", tt.len)
			padded, err := Padded(text)
			if (err == nil) != tt.ok {
				t.Fatalf("got %v", err)
			}
			exact, _ := Exact(text)
			if tt.ok && (padded == exact || padded.len != 110 || exact.len != uint32(3+tt.len)) {
				t.Errorf("padded %d bytes, exact %d", padded.len, exact.len)
			}
		})
	}
}

// TestBothForms: to the kernel they are two names, and an answer reaches the one that
// asked.
func TestBothForms(t *testing.T) {
	paddedAddr, err := Padded(name(t))
	padded := listen(t, paddedAddr, err)
	exactAddr, err := Exact(name(t))
	exact := listen(t, exactAddr, err)
	asker, err := Padded(name(t) + "-asker")
	c := listen(t, asker, err)
	for _, to := range []*Conn{padded, exact} {
		if errs := c.Send(Message{[]byte("hello"), to.Addr()}); errs != nil {
			t.Fatal(errs)
		}
		got, err := to.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || string(got[0].Data) != "hello" || got[0].From != asker || got[0].Truncated {
			t.Errorf("received %+v", got)
		}
		want := Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
		if got[0].Cred != want {
			t.Errorf("credentials: got %+v, want %+v", got[0].Cred, want)
		}
	}
	if padded.Addr().String() != exact.Addr().String() {
		t.Errorf("for people they are one: %s, %s", padded.Addr(), exact.Addr())
	}
}

func TestShorterNameBehindLonger(t *testing.T) {
	serverAddr, err := Exact(name(t))
	server := listen(t, serverAddr, err)
	long, err := Padded(name(t) + "-long")
	listen(t, long, err).Send(Message{[]byte("1"), serverAddr})
	short, err := Exact(name(t) + "-s")
	listen(t, short, err).Send(Message{[]byte("2"), serverAddr})
	for range 2 {
		got, err := server.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range got {
			want := map[string]Addr{"1": long, "2": short}[string(d.Data)]
			if d.From != want {
				t.Errorf("%s came from %v, want %v", d.Data, d.From, want)
			}
		}
		if len(got) == 2 {
			break
		}
	}
}

func TestTruncated(t *testing.T) {
	addr, err := Padded(name(t))
	server := listen(t, addr, err)
	from, err := Padded(name(t) + "-from")
	c := listen(t, from, err)
	for _, size := range []int{MaxRequest, MaxRequest + 1, 100_000} {
		if errs := c.Send(Message{bytes.Repeat([]byte("x"), size), addr}); errs != nil {
			t.Fatal(errs)
		}
		got, err := server.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if got[0].Truncated != (size > MaxRequest) || len(got[0].Data) != min(size, MaxRequest) {
			t.Errorf("%d bytes: got %d, truncated %v", size, len(got[0].Data), got[0].Truncated)
		}
	}
}

// TestFullQueue: whoever does not read costs nobody anything.
func TestFullQueue(t *testing.T) {
	deafAddr, err := Padded(name(t) + "-deaf")
	listen(t, deafAddr, err)
	readerAddr, err := Padded(name(t) + "-reader")
	reader := listen(t, readerAddr, err)
	from, err := Padded(name(t))
	c := listen(t, from, err)
	gone, err := Padded(name(t) + "-gone")
	if err != nil {
		t.Fatal(err)
	}
	var messages []Message
	for range 600 {
		messages = append(messages, Message{[]byte("x"), deafAddr})
	}
	messages = append(messages, Message{[]byte("y"), gone}, Message{[]byte("z"), readerAddr})
	errs := c.Send(messages...)
	if errs == nil || !errors.Is(errs[599], syscall.EAGAIN) || !errors.Is(errs[600], syscall.ECONNREFUSED) || errs[601] != nil {
		t.Fatalf("got %v", errs)
	}
	if got, err := reader.Receive(); err != nil || string(got[0].Data) != "z" {
		t.Errorf("behind them: got %v, %v", got, err)
	}
}

// TestDescriptorsClosed: the kernel finds no room for them.
// TestDescriptorsClosed: descriptors that a sender passes along stay with nobody. At the socket of a holder they may take the
// room of what says who the sender is; then it is nobody.
func TestDescriptorsClosed(t *testing.T) {
	for _, tt := range []struct{ size, descriptors int }{{MaxRequest, 1}, {MaxReplace, 0}, {MaxReplace, 1}, {MaxReplace, 2}, {MaxReplace, 200}} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			addr, err := Exact(name(t))
			if err != nil {
				t.Fatal(err)
			}
			server, err := Listen(addr, tt.size)
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			var passed []int
			for range tt.descriptors {
				passed = append(passed, int(w.Fd()))
			}
			var rights []byte
			if len(passed) > 0 {
				rights = unix.UnixRights(passed...)
			}
			if err := unix.Sendmsg(fd, []byte("x"), rights, &unix.SockaddrUnix{Name: "@" + name(t)}, 0); err != nil {
				t.Fatal(err)
			}
			got, err := server.Receive()
			if err != nil {
				t.Fatal(err)
			}
			cred, self := got[0].Cred, ProcessOf(int32(os.Getpid()))
			known := Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
			if tt.size > MaxRequest {
				known.Process = self
			}
			nobody := Cred{UID: OverflowID(), GID: OverflowID()}
			if cred != known && (tt.descriptors == 0 || self == 0 || cred != nobody) {
				t.Errorf("received %+v", got[0])
			}
			w.Close()
			// With every copy of the writing end closed, the reading end ends.
			r.SetReadDeadline(time.Now().Add(30 * time.Second))
			if _, err := r.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a descriptor that came along is still open")
			}
		})
	}
}

func TestReceiveEnds(t *testing.T) {
	addr, err := Exact(name(t))
	c := listen(t, addr, err)
	c.SetReadDeadline(time.Unix(1, 0))
	if _, err := c.Receive(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline: got %v", err)
	}
	c.SetReadDeadline(time.Time{})
	done := make(chan error)
	go func() {
		_, err := c.Receive()
		done <- err
	}()
	c.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("close: got %v", err)
	}
}

func TestFindOwner(t *testing.T) {
	addr, err := Padded(name(t))
	if err != nil {
		t.Fatal(err)
	}
	// The same name for sockets of another type is another name.
	stream, err := net.Listen("unix", "@"+name(t)+strings.Repeat("\x00", MaxName+1-len(name(t))))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if _, err := FindOwner(addr); !errors.Is(err, ErrNobody) {
		t.Errorf("of a free name: got %v", err)
	}
	listen(t, addr, nil)
	owner, err := FindOwner(addr)
	if err != nil || owner.PID != os.Getpid() || owner.UID != uint32(os.Getuid()) || owner.Command == "" {
		t.Errorf("got %+v, %v", owner, err)
	}
	names, err := PaddedNames(func(uid uint32) bool { return uid == uint32(os.Getuid()) })
	if err != nil || !strings.Contains(strings.Join(names, "\n"), name(t)) {
		t.Errorf("padded names: %q, %v", names, err)
	}
	if names, err := PaddedNames(func(uint32) bool { return false }); err != nil || len(names) > 0 {
		t.Errorf("padded names of nobody: %q, %v", names, err)
	}
	if _, err := Listen(addr, 1); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("bind again: got %v", err)
	}
}

// TestPassedSocket: what was queued before credentials were asked for has none.
func TestPassedSocket(t *testing.T) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@" + name(t)}); err != nil {
		t.Fatal(err)
	}
	to, err := Exact(name(t))
	if err != nil {
		t.Fatal(err)
	}
	// Without SO_PASSCRED, which on the sender's side would do as well.
	sender, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sender)
	send := func(text string) {
		if err := unix.Sendto(sender, []byte(text), 0, &unix.SockaddrUnix{Name: "@" + name(t)}); err != nil {
			t.Fatal(err)
		}
	}
	send("early")
	c, err := FromFile(os.NewFile(uintptr(fd), "passed"), MaxRequest)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Addr() != to {
		t.Errorf("its name: got %s, want %s", c.Addr(), to)
	}
	send("late")
	for want := []string{"early", "late"}; len(want) > 0; {
		got, err := c.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range got {
			if string(d.Data) != want[0] || d.Cred.Anonymous() != (want[0] == "early") {
				t.Errorf("got %q of %+v, want %q", d.Data, d.Cred, want[0])
			}
			want = want[1:]
		}
	}
	if r, _, err := os.Pipe(); err != nil {
		t.Fatal(err)
	} else if _, err := FromFile(r, MaxRequest); err == nil {
		t.Error("a pipe was taken for a socket")
	}
}

func BenchmarkSendReceive(b *testing.B) {
	to, _ := Exact("wire-bench")
	c, err := Listen(to, MaxRequest)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	m := Message{[]byte(`{"version":1,"cmd":2,"table":10000,"lease_expires":4933}`), to}
	b.ReportAllocs()
	for b.Loop() {
		if errs := c.Send(m); errs != nil {
			b.Fatal(errs)
		}
		if _, err := c.Receive(); err != nil {
			b.Fatal(err)
		}
	}
}

// TestCharge: what messages of a few sizes take of the send buffer is what the kernel says, or a little more.
func TestCharge(t *testing.T) {
	to, err := Exact(name(t))
	listen(t, to, err)
	from, err := Exact(name(t) + "-sender")
	sender := listen(t, from, err)
	for _, n := range []int{1, 100, 192, 193, 704, 705, 1000} {
		before, _ := sender.Backlog()
		if errs := sender.Send(Message{Data: make([]byte, n), To: to}); errs != nil {
			t.Fatal(errs)
		}
		after, size := sender.Backlog()
		if got, want := Charge(n), after-before; got < want || got > 2*want {
			t.Errorf("a message of %d bytes: got %d, the kernel takes %d of %d", n, got, want, size)
		}
	}
}

// TestHandedOn: a socket keeps its name and what waits in it while its process executes another program, which gets a
// duplicate and the address of who asked.
func TestHandedOn(t *testing.T) {
	addr, err := Exact(name(t))
	if err != nil {
		t.Fatal(err)
	}
	before, err := Listen(addr, MaxRequest)
	if err != nil {
		t.Fatal(err)
	}
	text, err := addr.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	var to Addr
	if err := to.UnmarshalText(text); err != nil || to != addr {
		t.Fatalf("%s became %s, %v", addr, to, err)
	}
	if err := SendApart(Message{Data: []byte("waits"), To: to}); err != nil {
		t.Fatal(err)
	}
	file, err := before.File()
	if err != nil {
		t.Fatal(err)
	}
	before.Close()
	after, err := FromFile(file, MaxRequest)
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	if got, err := after.ReceiveNow(); err != nil || len(got) != 1 || string(got[0].Data) != "waits" || after.Addr() != addr {
		t.Errorf("at %s: %v, %v", after.Addr(), got, err)
	}
	for _, wrong := range []string{"%", strings.Repeat("AAAA", 40)} {
		if err := to.UnmarshalText([]byte(wrong)); err == nil {
			t.Errorf("%q was taken as %s", wrong, to)
		}
	}
}
