package cgroup

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
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
	otherMark = Mark{Value: 0x05000000, Mask: 0xff000000}
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
// "NAME send ADDR:PORT", "NAME listen", "NAME set MARK", "NAME mark". It answers with the mark of the socket, or an error.
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
		"link add bind0 type veth peer name bind1", "link set bind0 up", "link set bind1 up", "address add 192.0.2.1/24 dev bind0",
		"address add 2001:db8::1/64 dev bind0 nodad",
	} {
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "exists") && !strings.Contains(string(out), "already assigned") {
			t.Fatalf("ip %s: %v\n%s", args, err, out)
		}
	}
}

func TestPrograms(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	if _, err := c.place(-1, "/ta-wan0", testMark); err != nil {
		t.Fatal(err)
	}
	const m, none = "0x2000000", "0x0"
	p := startIn(t, c.file("/ta-wan0"))
	for _, kind := range []string{"tcp4", "tcp6", "udp4", "udp6", "raw4", "raw6", "mptcp4"} {
		p.want(m, "%s socket %s", kind, kind)
	}
	for _, tt := range []struct{ kind, addr, want string }{
		{"udp4", "192.0.2.1:0", none},
		{"udp4", "0.0.0.0:0", m},
		{"udp4", "127.0.0.1:0", m},
		{"udp4", "127.1.2.3:0", m},
		{"udp4", "224.0.0.251:0", m},
		{"udp4", "255.255.255.255:0", m},
		{"tcp4", "192.0.2.1:0", none},
		{"udp6", "[2001:db8::1]:0", none},
		{"udp6", "[::]:0", m},
		{"udp6", "[::1]:0", m},
		{"udp6", "[ff0e::fb]:0", m},
		{"udp6", "[::ffff:192.0.2.1]:0", none},
		{"udp6", "[::ffff:127.0.0.1]:0", m},
		{"udp6", "[::ffff:224.0.0.251]:0", m},
		{"tcp6", "[2001:db8::1]:0", none},
		{"raw4", "192.0.2.1:0", m},   // the kernel asks nobody
		{"mptcp4", "192.0.2.1:0", m}, // it has the address and no mark where it counts, in the subflow
	} {
		p.want(m, "b socket %s", tt.kind)
		if got := p.do("b bind %s", tt.addr); got != tt.want {
			t.Errorf("%s bound to %s: got %s, want %s", tt.kind, tt.addr, got, tt.want)
		}
	}

	// A mark of the program's own shares the socket with ours.
	p.want("0x2000099", "tcp4 set 0x99")
	p.want("0x2080000", "tcp4 set 0x7080000")
	p.want(m, "tcp4 set 0")
	p.want("invalid argument", "tcp4 setshort")
	p.want(m, "tcp4 setlong")
	// It gets nothing into our bits, whether they are set or not.
	p.want(m, "b socket udp4")
	p.want(none, "b bind 192.0.2.1:0")
	p.want("0x99", "b set 0xff000099")

	p.want(m, "l socket tcp4")
	p.want(m, "l bind 0.0.0.0:0")
	p.want(none, "l listen")
	p.want("0x99", "l set 0x99")
	p.want(m, "l6 socket tcp6")
	p.want(none, "l6 listen")

	// Connections keep what they have.
	p.want(m, "c socket udp4")
	p.want(m, "c connect 127.0.0.1:9")
	p.want(m, "c socket udp6")
	p.want(m, "c connect [::1]:9")
}

// A socket whose bind to an address failed has lost its mark, and gets it back before anything is sent.
func TestFailedBind(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	const none, refused = "0x0", "operation not permitted"
	for _, tt := range []struct {
		mark        Mark
		have, first string // what a socket gets, and what becomes of the first datagram
	}{{testMark, "0x2000000", refused}, {Mark{0x03000000, 0xff000000}, "0x3000000", "0x3000000"}} {
		dir := "/ta-" + tt.have
		if _, err := c.place(-1, dir, tt.mark); err != nil {
			t.Fatal(err)
		}
		p := startIn(t, c.file(dir))
		for _, s := range []struct{ kind, absent, here, to string }{
			{"udp4", "192.0.2.77:0", "192.0.2.1:0", "127.0.0.1:9"},
			{"udp6", "[2001:db8::77]:0", "[2001:db8::1]:0", "[::1]:9"},
			{"udp6", "[::ffff:192.0.2.77]:0", "[::ffff:192.0.2.1]:0", "[::ffff:127.0.0.1]:9"},
		} {
			p.want(tt.have, "f socket %s", s.kind)
			p.want("cannot assign requested address", "f bind %s", s.absent)
			p.want(none, "f mark")
			p.want(tt.first, "f send %s", s.to)
			p.want(tt.have, "f mark")
			p.want(tt.have, "f send %s", s.to)
			p.want("invalid argument", "f bind %s", s.here) // it has a port by now
			p.want(none, "f mark")
			p.want(tt.have, "f connect %s", s.to)

			// One that has the address sends as ever, and so does one that was taken out.
			p.want(tt.have, "f socket %s", s.kind)
			p.want(none, "f bind %s", s.here)
			p.want(none, "f send %s9", strings.TrimSuffix(s.here, "0"))
		}
		p.want(tt.have, "out socket udp4")
		if _, err := c.Detach(p.cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		p.want("0x1000000", "out send 127.0.0.1:9")
	}
}

// A kernel that does not ask the programs is noticed.
func TestVerify(t *testing.T) {
	if err := verify(testMark); err == nil || !strings.Contains(err.Error(), "net_cls") {
		t.Errorf("in no cgroup of ours: %v", err)
	}
}

func TestNested(t *testing.T) {
	c := testCgroups(t)
	inner := Mark{Value: 0x04000000, Mask: 0xff000000}
	if _, err := c.place(-1, "/table-allocator/wan0", testMark); err != nil {
		t.Fatal(err)
	}
	child := childOf("/table-allocator/wan0", wan1)
	if _, err := c.place(-1, child, inner); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file(child))
	p.want("0x4000000", "a socket tcp4")
	p.want("0x4000099", "a set 0x99")
	p.want("0x4000000", "b socket udp6")
	if err := os.Mkdir(c.file(child)+"/below", 0o755); err != nil {
		t.Fatal(err)
	}
	startIn(t, c.file(child)+"/below").want("0x4000000", "a socket tcp4")
}

// programIDs are the programs of ours in a cgroup, at each hook.
func programIDs(t *testing.T, dir string) (ids []ebpf.ProgramID) {
	t.Helper()
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, h := range hooks(testMark) {
		have, err := attached(int(file.Fd()), h.spec.AttachType, h.spec.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range have {
			id, _ := p.info.ID() // any kernel that tests run on has it
			ids = append(ids, id)
		}
		have.close()
	}
	return ids
}

func TestInstallTwice(t *testing.T) {
	c := testCgroups(t)
	place := func(m Mark) []ebpf.ProgramID {
		t.Helper()
		missing, err := c.place(-1, "/ta-wan0", m)
		if err != nil || missing != nil {
			t.Fatal(missing, err)
		}
		return programIDs(t, c.file("/ta-wan0"))
	}
	first := place(testMark)
	all := len(hooks(testMark))
	if len(first) != all {
		t.Errorf("programs: %d, want %d", first, all)
	}
	if again := place(testMark); !slices.Equal(first, again) {
		t.Errorf("the same again: got programs %d, want %d", again, first)
	}
	// For another mark those that set it are replaced. One that came twice goes.
	second := place(otherMark)
	const sets = 5 // create, connect, sendmsg
	if len(second) != all || !slices.Equal(first[sets:], second[sets:]) ||
		slices.ContainsFunc(first[:sets], func(id ebpf.ProgramID) bool { return slices.Contains(second, id) }) {
		t.Errorf("another mark: got programs %d, before %d", second, first)
	}
	startIn(t, c.file("/ta-wan0")).want("0x5000000", "a socket tcp4")
	for _, m := range []Mark{otherMark, testMark} {
		file, err := os.Open(c.file("/ta-wan0"))
		if err != nil {
			t.Fatal(err)
		}
		double := hooks(otherMark)[0]
		program, err := load(&double.spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := attachTwice(file, program, &double); err != nil {
			t.Fatal(err)
		}
		program.Close()
		file.Close()
		if ids := programIDs(t, c.file("/ta-wan0")); len(ids) != all+1 {
			t.Fatalf("programs: %d, want %d", ids, all+1)
		}
		if ids := place(m); len(ids) != all {
			t.Errorf("programs after one too many: %d, want %d", ids, all)
		}
	}
}

func TestMissing(t *testing.T) {
	c := testCgroups(t)
	refused := func(at int) []hook {
		all := hooks(testMark)
		all[at].spec.Instructions = asm.Instructions{asm.Mov.Imm(asm.R0, 7), asm.Return()} // only 0 and 1 are answers
		all[at].spec.Instructions[0].Constant = 7
		return all
	}
	all := hooks(testMark)
	for at := range all {
		dir := c.file("/ta-wan" + strconv.Itoa(at))
		missing, err := c.placeOnce(-1, dir, refused(at))
		if at == 0 {
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("without %s: got %v, want %v", all[at].spec.Name, err, ErrUnsupported)
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the cgroup is left: %v", err)
			}
			continue
		}
		if err != nil || len(missing) != 1 || missing[0].Program != all[at].spec.Name || missing[0].Lost == "" || missing[0].Err == nil {
			t.Errorf("without %s: got %+v, %v", all[at].spec.Name, missing, err)
		}
		if ids := programIDs(t, dir); len(ids) != len(all)-1 {
			t.Errorf("without %s: %d programs", all[at].spec.Name, len(ids))
		}
		startIn(t, dir).want("0x2000000", "a socket tcp4")
		// It was told when the cgroup was made.
		if missing, err := c.placeOnce(-1, dir, refused(at)); err != nil || missing != nil {
			t.Errorf("without %s, again: got %+v, %v", all[at].spec.Name, missing, err)
		}
	}
}

func TestAttachDetach(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	if err := os.Mkdir(c.file("/unit"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := startIn(t, c.file("/unit"))
	pid := p.cmd.Process.Pid
	for name, commands := range map[string][]string{
		"idle": {"socket tcp4"}, "udp": {"socket udp6", "set 0x77"}, "raw": {"socket raw4"},
		"bound": {"socket udp4", "bind 192.0.2.1:0"}, "connected": {"socket udp4", "connect 192.0.2.9:9"},
		"listening": {"socket tcp6", "listen"}, "local": {"socket udp4", "bind 127.0.0.1:0"},
		"multicast": {"socket udp4", "bind 224.0.0.251:0"}, "mptcp": {"socket mptcp4"},
	} {
		for _, command := range commands {
			p.do("%s %s", name, command)
		}
	}
	marks := func(want map[string]string) {
		t.Helper()
		for name, mark := range want {
			p.want(mark, "%s mark", name)
		}
	}
	const m, none = "0x2000000", "0x0"

	report, err := c.Attach(pid, wan0, testMark, false)
	if err != nil {
		t.Fatal(err)
	}
	if report.Cgroup != "/unit/ta-wan0" || report.Name == "" {
		t.Errorf("report: %+v", report)
	}
	var said []string
	for _, s := range report.Sockets {
		said = append(said, s.Kind+" "+s.Done)
	}
	slices.Sort(said)
	wantSaid := []string{
		"mptcp bound", "raw icmp bound", "tcp bound", "tcp left alone: listening", "udp bound", "udp bound", "udp bound",
		"udp left alone: bound to an address", "udp left alone: connected",
	}
	if !slices.Equal(said, wantSaid) {
		t.Errorf("sockets:\n%s\nwant:\n%s", strings.Join(said, "\n"), strings.Join(wantSaid, "\n"))
	}
	marks(map[string]string{
		"idle": m, "udp": "0x2000077", "raw": m, "local": m, "multicast": m, "mptcp": m,
		"bound": none, "connected": none, "listening": none,
	})
	p.want(m, "new socket tcp4")

	// To another one: what was made in the first cgroup follows, too.
	if report, err = c.Attach(pid, wan1, otherMark, false); err != nil || report.Cgroup != "/unit/ta-wan1" {
		t.Fatal(report, err)
	}
	marks(map[string]string{"idle": "0x5000000", "new": "0x5000000", "udp": "0x5000077"})
	p.want("0x5000000", "newer socket udp4")
	if _, err := os.Stat(c.file("/unit/ta-wan0")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the first cgroup is left: %v", err)
	}

	if report, err = c.Detach(pid); err != nil || report.Cgroup != "/unit" {
		t.Fatal(report, err)
	}
	// Free, also of the programs of the cgroup that they were made in.
	marks(map[string]string{"idle": "0x1000000", "new": "0x1000000", "udp": "0x1000077", "newer": "0x1000000", "bound": none})
	p.want("0x1000000", "newer connect 192.0.2.9:9")
	p.want(none, "newest socket tcp4")
	if entries, err := filepath.Glob(c.file("/unit") + "/ta-*"); err != nil || len(entries) != 0 {
		t.Errorf("cgroups left: %q, %v", entries, err)
	}
	if report, err := c.Detach(pid); err != nil || report.Sockets != nil {
		t.Errorf("detached twice: %+v, %v", report, err)
	}
	// And back.
	if _, err := c.Attach(pid, wan0, testMark, false); err != nil {
		t.Fatal(err)
	}
	marks(map[string]string{"idle": m, "new": m, "connected": none})
}

func TestAttachNobody(t *testing.T) {
	c := testCgroups(t)
	gone := exec.Command("/bin/true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[int]error{gone.Process.Pid: unix.ESRCH, -1: unix.EINVAL} {
		if _, err := c.Attach(pid, wan0, testMark, false); !errors.Is(err, want) {
			t.Errorf("attach %d: got %v, want %v", pid, err, want)
		}
		if _, err := c.Detach(pid); !errors.Is(err, want) {
			t.Errorf("detach %d: got %v, want %v", pid, err, want)
		}
	}
	elsewhere := exec.Command("unshare", "--net", "sleep", "60")
	if err := elsewhere.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = elsewhere.Process.Kill() // it has not ended
		_ = elsewhere.Wait()
	}()
	for {
		own, err1 := os.Readlink("/proc/self/ns/net")
		its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", elsewhere.Process.Pid))
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if own != its {
			break
		}
	}
	if _, err := c.Attach(elsewhere.Process.Pid, wan0, testMark, false); err == nil || !strings.Contains(err.Error(), "another network namespace") {
		t.Errorf("attach in another network namespace: %v", err)
	}
}

func TestBound(t *testing.T) {
	c := testCgroups(t)
	bound := func() (lines []string) {
		t.Helper()
		all, err := c.Bound()
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range all {
			lines = append(lines, fmt.Sprintf("%s %s %s %d", b.Cgroup, b.Uplink, b.Mark, b.PIDs))
		}
		return lines
	}
	want := func(want ...string) {
		t.Helper()
		if got := bound(); !slices.Equal(got, want) {
			t.Errorf("bound:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	want()
	for cgroup, m := range map[string]Mark{
		"/a/b/ta-wan0": testMark, "/a/ta-wan1:fallback": {0x05000000, 0xff000000}, "/ta-wan9": testMark, "/table-allocator/wan1": otherMark,
	} {
		if _, err := c.place(-1, cgroup, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"/a/ta-mine", "/a/b/ta-wan0/deep/er", "/a/b/ta-wan0/ta-wan7"} { // without our programs
		if err := os.MkdirAll(c.file(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	first := startIn(t, c.file("/a/b/ta-wan0")).cmd.Process.Pid
	second := startIn(t, c.file("/a/b/ta-wan0/deep/er")).cmd.Process.Pid
	third := startIn(t, c.file("/a/ta-wan1:fallback")).cmd.Process.Pid
	both := []int{first, second}
	slices.Sort(both)
	want(
		fmt.Sprintf("/a/b/ta-wan0 wan0 0x2000000/0xff000000 %d", both),
		fmt.Sprintf("/a/ta-wan1:fallback wan1:fallback 0x5000000/0xff000000 %d", []int{third}),
		"/table-allocator/wan1 wan1 0x5000000/0xff000000 []",
	)
	for dir, there := range map[string]bool{"/ta-wan9": false, "/a/ta-mine": true, "/table-allocator/wan1": true} {
		if _, err := os.Stat(c.file(dir)); errors.Is(err, os.ErrNotExist) == there {
			t.Errorf("%s: %v", dir, err)
		}
	}

	inside := startIn(t, c.file("/table-allocator/wan1"))
	if err := c.RemoveInterface(wan1); err != nil {
		t.Fatal(err)
	}
	if cgroup, err := c.of(inside.cmd.Process.Pid); err != nil || cgroup != "/" {
		t.Errorf("who was in the interface's cgroup is in %q, %v", cgroup, err)
	}
	if _, err := os.Stat(c.file(rootName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", rootName, err)
	}
	if err := c.RemoveInterface(wan1); err != nil {
		t.Errorf("removed twice: %v", err)
	}
}

// Many that come and go at once in one cgroup: each is bound, and nothing is left.
func TestTogether(t *testing.T) {
	c := testCgroups(t)
	const runs = 40
	cgroup, err := os.Open(c.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	errs := make(chan error, runs)
	for range runs {
		go func() {
			cmd := exec.Command("sleep", "60")
			cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
			err := cmd.Start()
			if err == nil {
				_, err = c.Attach(cmd.Process.Pid, wan0, testMark, false)
				_ = cmd.Process.Kill() // it has not ended
				_ = cmd.Wait()
			}
			c.sweepIn("/")
			errs <- err
		}()
	}
	for range runs {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	dir := path.Join(c.dir, "ta-wan0")
	var parallel []chan error
	for range runs {
		done := make(chan error)
		parallel = append(parallel, done)
		go func() {
			_, err := c.place(-1, "/ta-wan0", testMark)
			c.sweepIn("/")
			done <- err
		}()
	}
	for _, done := range parallel {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	c.sweepIn("/")
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", dir, err)
	}
}

func TestPin(t *testing.T) {
	c := testCgroups(t)
	if err := exec.Command("mount", "-t", "bpf", "bpf", "/sys/fs/bpf").Run(); err != nil {
		t.Fatal(err)
	}
	soft := Uplink{Ifname: "wan0", Fallback: true}
	for _, m := range []Mark{otherMark, testMark} { // the second takes the place of the first
		for _, u := range []Uplink{wan0, soft} {
			values, missing, err := Pin(u, m)
			if err != nil || len(missing) != 0 || len(values) != len(hooks(m)) {
				t.Fatal(values, missing, err)
			}
			if want := "sock_create:/sys/fs/bpf/table-allocator/" + u.String() + "/sock_create"; values[0] != want {
				t.Errorf("got %q, want %q", values[0], want)
			}
		}
	}
	if got, err := Pinned(); err != nil || !slices.Equal(got, []Uplink{wan0, soft}) {
		t.Errorf("pinned: %v, %v", got, err)
	}

	// What systemd does with it, and what detach then has to say.
	if err := os.Mkdir(c.file("/some.service"), 0o755); err != nil {
		t.Fatal(err)
	}
	unit, err := os.Open(c.file("/some.service"))
	if err != nil {
		t.Fatal(err)
	}
	defer unit.Close()
	for at, name := range pinNames {
		program, err := ebpf.LoadPinnedProgram(filepath.Join(PinRoot, "wan0", name), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := attachTwice(unit, program, &hook{spec: ebpf.ProgramSpec{AttachType: at}}); err != nil {
			t.Fatal(err)
		}
		program.Close()
	}
	if err := errors.Join(Unpin(wan0), Unpin(soft), Unpin(wan0)); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(PinRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", PinRoot, err)
	}
	p := startIn(t, c.file("/some.service"))
	p.want("0x2000000", "a socket tcp4")
	bound, err := c.Bound()
	if err != nil || len(bound) != 1 || bound[0].Uplink != (Uplink{}) || bound[0].Mark != testMark || !slices.Equal(bound[0].PIDs, []int{p.cmd.Process.Pid}) {
		t.Errorf("bound: %+v, %v", bound, err)
	}
	if _, err := c.Detach(p.cmd.Process.Pid); err == nil || !strings.Contains(err.Error(), "BPFProgram=") {
		t.Errorf("detach from a unit that is bound: %v", err)
	}
}

// BenchmarkInstall is what the first `run` in a cgroup pays, and each later one.
func BenchmarkInstall(b *testing.B) {
	c, err := Open()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.place(-1, "/ta-bench", testMark); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := os.Remove(c.file("/ta-bench")); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	b.Run("again", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.place(-1, "/ta-bench", testMark); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.Remove(c.file("/ta-bench")); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkConnect is what a program pays for being bound, beside one that is not. Nobody answers;
// datagrams without a connection end on the loopback.
func BenchmarkConnect(b *testing.B) {
	c, err := Open()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	if _, err := c.place(-1, "/ta-bench", testMark); err != nil {
		b.Fatal(err)
	}
	defer os.Remove(c.file("/ta-bench"))
	if err := os.Mkdir(c.file("/plain"), 0o755); err != nil {
		b.Fatal(err)
	}
	defer os.Remove(c.file("/plain"))
	for _, where := range []string{"/plain", "/ta-bench"} {
		if err := move(0, c.file(where)); err != nil {
			b.Fatal(err)
		}
		for _, family := range []struct {
			name string
			of   int
			to   unix.Sockaddr
		}{
			{"IPv4", unix.AF_INET, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}},
			{"IPv6", unix.AF_INET6, &unix.SockaddrInet6{Port: 9, Addr: [16]byte{15: 1}}},
		} {
			b.Run("connect/"+family.name+where, func(b *testing.B) {
				fd, err := unix.Socket(family.of, unix.SOCK_DGRAM, 0)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Close(fd)
				for b.Loop() {
					if err := unix.Connect(fd, family.to); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("sendto/"+family.name+where, func(b *testing.B) {
				fd, err := unix.Socket(family.of, unix.SOCK_DGRAM, 0)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Close(fd)
				for b.Loop() {
					if err := unix.Sendto(fd, []byte("?"), 0, family.to); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("socket/"+family.name+where, func(b *testing.B) {
				for b.Loop() {
					fd, err := unix.Socket(family.of, unix.SOCK_STREAM, 0)
					if err != nil {
						b.Fatal(err)
					}
					unix.Close(fd)
				}
			})
		}
	}
	if err := move(0, c.file("/")); err != nil {
		b.Fatal(err)
	}
}

// What another thread starts has our open files until it executes something; a cgroup is not in use
// for that.
func TestSweepBesideFork(t *testing.T) {
	c := testCgroups(t)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
				_ = exec.Command("/bin/true").Run() // that it starts is enough
			}
		}
	}()
	defer func() { close(stop); <-ended }()
	for round := range 100 {
		if _, err := c.place(-1, "/ta-wan0", testMark); err != nil {
			t.Fatal(err)
		}
		c.sweepIn("/")
		if _, err := os.Stat(c.file("/ta-wan0")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("round %d: the cgroup is left: %v", round, err)
		}
	}
}
