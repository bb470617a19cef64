package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/wire"
)

// sockaddr is a struct sockaddr_un, byte for byte. It does without package wire, so that the tests find
// mistakes of that package.
type sockaddr []byte

func paddedName(text string) sockaddr {
	a := make(sockaddr, 110)
	a[0] = unix.AF_UNIX
	copy(a[3:], text)
	return a
}

func exactName(text string) sockaddr { return paddedName(text)[:3+len(text)] }

func pathName(path string) sockaddr { return append(append(sockaddr{unix.AF_UNIX, 0}, path...), 0) }

// rawPeer is a client of the test's own, with the system calls of a C program.
type rawPeer struct {
	t  *testing.T
	fd int
	to sockaddr // of the server
}

// rawPeer makes a client on the host that asks the server at its padded name. It binds to addr, unless
// that is nil.
func (h others) rawPeer(addr sockaddr) *rawPeer {
	h.t.Helper()
	p := &rawPeer{t: h.t, to: paddedName("tas_socket")}
	var err error
	h.ns.Do(func() { p.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { unix.Close(p.fd) })
	if addr != nil {
		if err := bindRaw(p.fd, addr); err != nil {
			h.t.Fatal(err)
		}
	}
	tv := unix.NsecToTimeval(int64(patience))
	err = errors.Join(
		unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20))
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

func bindRaw(fd int, addr sockaddr) error {
	_, _, errno := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&addr[0])), uintptr(len(addr)))
	if errno != 0 {
		return fmt.Errorf("bind %q: %w", addr, errno)
	}
	return nil
}

// cPeer makes a client with a padded name, as the original's client has.
func (h others) cPeer(name string) *rawPeer {
	h.t.Helper()
	return h.rawPeer(paddedName(name))
}

// waitLease waits until a request is granted and returns the table.
func (p *rawPeer) waitLease(datagram string) (table uint32) {
	p.t.Helper()
	eventually(p.t, "a table is free", func() error {
		reply := p.ask(datagram)
		if strings.Contains(reply, `"code":"exhausted"`) {
			return errors.New(reply)
		}
		table, _ = granted(p.t, reply)
		return nil
	})
	return table
}

func (p *rawPeer) send(datagram string) {
	p.t.Helper()
	if err := p.trySend(datagram); err != nil {
		p.t.Fatalf("send %.100q: %v", datagram, err)
	}
}

func (p *rawPeer) trySend(datagram string) error {
	var data unsafe.Pointer
	if len(datagram) > 0 {
		data = unsafe.Pointer(unsafe.StringData(datagram))
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(p.fd), uintptr(data), uintptr(len(datagram)), 0,
			uintptr(unsafe.Pointer(&p.to[0])), uintptr(len(p.to)))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// receive returns the next datagram and its sender.
func (p *rawPeer) receive() (string, sockaddr) {
	p.t.Helper()
	buf, from := make([]byte, 4096), make(sockaddr, 110)
	for {
		size := uint32(len(from))
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(p.fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0,
			uintptr(unsafe.Pointer(&from[0])), uintptr(unsafe.Pointer(&size)))
		switch errno {
		case 0:
			return string(buf[:n]), from[:min(int(size), len(from))]
		case unix.EINTR:
		default:
			p.t.Fatalf("no answer: %v", errno)
		}
	}
}

// answered reports whether a datagram comes within a time.
func (p *rawPeer) answered(wait time.Duration) bool {
	p.t.Helper()
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(wait.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			p.t.Fatalf("poll: %v", err)
		}
		return n > 0
	}
}

// nothing fails the test if a datagram is waiting.
func (p *rawPeer) nothing() {
	p.t.Helper()
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(p.fd, buf, unix.MSG_DONTWAIT)
	if !errors.Is(err, unix.EAGAIN) {
		p.t.Errorf("got %q, %v, want no datagram", buf[:max(n, 0)], err)
	}
}

// ask sends a datagram and returns the answer.
func (p *rawPeer) ask(datagram string) string {
	p.t.Helper()
	p.send(datagram)
	answer, from := p.receive()
	if !bytes.Equal(from, p.to) {
		p.t.Errorf("asked at %q, answered from %q", p.to, from)
	}
	return answer
}

// askAs is ask as another user.
func (p *rawPeer) askAs(uid, gid int, datagram string) string {
	p.t.Helper()
	if err := asUser(uid, gid, func() error { return p.trySend(datagram) }); err != nil {
		p.t.Fatalf("send as uid %d: %v", uid, err)
	}
	answer, _ := p.receive()
	return answer
}

// asUser runs f on a thread with another real uid and gid, which the kernel passes as credentials. The
// thread ends with f.
func asUser(uid, gid int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		// The raw calls change this thread; those of the library change all threads.
		for _, call := range [][4]uintptr{
			{unix.SYS_SETGROUPS, 0, 0, 0},
			{unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)},
			{unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)},
		} {
			if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
				done <- fmt.Errorf("become uid %d: %w", uid, errno)
				return
			}
		}
		done <- f()
	}()
	return <-done
}

// request is a datagram of the original for a lease (cmd 0) or its release (cmd 1).
func request(family int, ifname, addr string, cmd int) string {
	return fmt.Sprintf(`{"address":%q,"ifname":%q,"addr_family":%d,"cmd":%d,"version":1}`, addr, ifname, family, cmd)
}

// acquire and release are requests for the n-th of many IPv4 addresses.
func acquire(n int) string { return request(2, "eth0", fmt.Sprintf("10.9.0.%d", n), 0) }

func release(n int) string { return request(2, "eth0", fmt.Sprintf("10.9.0.%d", n), 1) }

// released is the answer to a release.
const released = `{"version":1,"cmd":2,"table":0,"lease_expires":0}`

// granted reads a reply, which must be exactly the original's bytes.
func granted(t *testing.T, reply string) (table uint32, expires int64) {
	t.Helper()
	const format = `{"version":1,"cmd":2,"table":%d,"lease_expires":%d}`
	_, err := fmt.Sscanf(reply, format, &table, &expires)
	if err != nil || fmt.Sprintf(format, table, expires) != reply || table == 0 {
		t.Fatalf("got %s, want a lease", reply)
	}
	return table, expires
}

// wantTable fails the test unless reply grants table.
func wantTable(t *testing.T, reply string, table uint32) {
	t.Helper()
	if got, _ := granted(t, reply); got != table {
		t.Errorf("table: got %d, want %d", got, table)
	}
}

// wantRefusal fails the test unless reply is a refusal with this code whose reason
// contains text.
func wantRefusal(t *testing.T, reply string, code wire.Code, text string) {
	t.Helper()
	var r struct {
		Version, Cmd  int
		Table         *int
		LeaseExpires  *int `json:"lease_expires"`
		Error, Source string
		Code          wire.Code
	}
	err := json.Unmarshal([]byte(reply), &r)
	switch {
	case err != nil:
		t.Errorf("reply %s: %v", reply, err)
	case r.Version != 1 || r.Cmd != 2 || r.Table == nil || *r.Table != 0 || r.LeaseExpires == nil || *r.LeaseExpires != 0:
		t.Errorf("got %s, want a refusal", reply)
	case r.Code != code || r.Error == "" || !strings.Contains(r.Error, text):
		t.Errorf("got %s, want code %q and %q in the error", reply, code, text)
	}
	if len(reply) > 254 {
		t.Errorf("reply of %d bytes, want at most 254: %s", len(reply), reply)
	}
}

// exactPeer makes a client with an exact name, as Python has.
func (h others) exactPeer(name string) *rawPeer {
	h.t.Helper()
	p := h.rawPeer(exactName(name))
	p.to = exactName("tas_socket")
	return p
}
