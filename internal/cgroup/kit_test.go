package cgroup

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestMain also is the program that tests bind: what it reads are commands for sockets.
func TestMain(m *testing.M) {
	if os.Getenv(subjectEnv) != "" {
		subject(os.Stdin)
		return
	}
	nettest.Main(m)
}

const subjectEnv = "BIND_TEST_SUBJECT"

var (
	testMark  = Mark{Value: 0x02000000, Mask: 0xff000000}
	otherMark = Mark{Value: 0x06000000, Mask: 0xff000000}
	wan0      = Uplink{Ifname: "wan0"}
	wan1      = Uplink{Ifname: "wan1"}
)

// testCgroups is a hierarchy of the test's own.
func testCgroups(t *testing.T) *Cgroups {
	t.Helper()
	t.Parallel()
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if c.dir, err = os.MkdirTemp(c.dir, t.Name()); err != nil {
		t.Fatal(err)
	}
	c.below = "/" + filepath.Base(c.dir)
	return c
}

// testHooks are the programs for a mark that may use no other uplink.
func testHooks(t *testing.T, m Mark) []hook {
	t.Helper()
	lock, err := MakeLock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lock.Close)
	return hooks(m, lock)
}

// A process in a cgroup, that makes sockets as it is told.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

func startIn(t *testing.T, dir string) *child {
	t.Helper()
	cgroup, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	c := &child{t: t, cmd: exec.Command("/proc/self/exe")}
	c.cmd.Env = append(os.Environ(), subjectEnv+"=1")
	c.cmd.Stderr = os.Stderr
	c.cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = c.cmd.Wait() // its answers are what counts
	})
	return c
}

// do returns the answer to a command.
func (c *child) do(format string, args ...any) string {
	c.t.Helper()
	fmt.Fprintf(c.in, format+"\n", args...)
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.t.Fatalf("%s: %v", fmt.Sprintf(format, args...), err)
	}
	return strings.TrimSpace(line)
}

// want fails the test unless the answer to a command is this.
func (c *child) want(want, format string, args ...any) {
	c.t.Helper()
	if got := c.do(format, args...); got != want {
		c.t.Errorf("%s: got %q, want %q", fmt.Sprintf(format, args...), got, want)
	}
}

// subject carries out commands: "NAME socket tcp4", "NAME bind ADDR", "NAME connect ADDR:PORT",
// "NAME send ADDR:PORT", "NAME listen", "NAME set MARK", "NAME mark", "NAME join OPTION,HEX". It answers with the mark of the socket, or an error.
func subject(in io.Reader) {
	sockets := make(map[string]int)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if err := subjectDo(sockets, f[0], f[1], append(f[2:], "")[0]); err != nil {
			fmt.Println(err)
			continue
		}
		mark, err := unix.GetsockoptInt(sockets[f[0]], unix.SOL_SOCKET, unix.SO_MARK)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Printf("%#x\n", uint32(mark))
	}
}

func subjectDo(sockets map[string]int, name, what, arg string) (err error) {
	fd := sockets[name]
	switch what {
	case "socket":
		kind := map[string][3]int{
			"tcp4": {unix.AF_INET, unix.SOCK_STREAM, 0}, "tcp6": {unix.AF_INET6, unix.SOCK_STREAM, 0},
			"udp4": {unix.AF_INET, unix.SOCK_DGRAM, 0}, "udp6": {unix.AF_INET6, unix.SOCK_DGRAM, 0},
			"raw4": {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}, "raw6": {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6},
			"mptcp4": {unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP},
		}[arg]
		sockets[name], err = unix.Socket(kind[0], kind[1], kind[2])
	case "bind", "connect", "send":
		sa, err := subjectAddress(fd, arg)
		if err != nil {
			return err
		}
		switch what {
		case "bind":
			return unix.Bind(fd, sa)
		case "send":
			return unix.Sendto(fd, []byte("?"), 0, sa)
		}
		return unix.Connect(fd, sa)
	case "listen":
		err = unix.Listen(fd, 1)
	case "close":
		err = unix.Close(fd)
	case "set":
		mark, parseErr := strconv.ParseUint(arg, 0, 32)
		if parseErr != nil {
			return parseErr
		}
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
	case "setshort":
		err = unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_MARK, "ab")
	case "setlong": // an option longer than a page
		value := binary.NativeEndian.AppendUint32(nil, 1<<20)
		err = unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, string(append(value, make([]byte, 1<<16)...)))
	case "join": // with a value as it is
		option, value, _ := strings.Cut(arg, ",")
		number, numberErr := strconv.Atoi(option)
		raw, rawErr := hex.DecodeString(value)
		if err := errors.Join(numberErr, rawErr); err != nil {
			return err
		}
		domain, domainErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		level := map[int]int{unix.AF_INET: unix.SOL_IP, unix.AF_INET6: unix.SOL_IPV6}[domain]
		err = errors.Join(domainErr, unix.SetsockoptString(fd, level, number, string(raw)))
	case "mark":
	default:
		err = errors.New("no such command")
	}
	return err
}

func subjectAddress(fd int, text string) (unix.Sockaddr, error) {
	addr, err := net.ResolveUDPAddr("udp", text)
	if err != nil {
		return nil, err
	}
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if domain == unix.AF_INET6 {
		return &unix.SockaddrInet6{Port: addr.Port, Addr: [16]byte(addr.IP.To16())}, err
	}
	return &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}, err
}

// addresses are the sandbox's, on a link that leads nowhere.
func addresses(t *testing.T) {
	t.Helper()
	for _, args := range []string{
		"link set lo up", "link add bind0 type veth peer name bind1", "link set bind0 up", "link set bind1 up", "address add 192.0.2.1/24 dev bind0",
		"address add 2001:db8::1/64 dev bind0 nodad",
	} {
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "exists") && !strings.Contains(string(out), "already assigned") {
			t.Fatalf("ip %s: %v\n%s", args, err, out)
		}
	}
}
