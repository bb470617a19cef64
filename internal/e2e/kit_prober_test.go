package e2e

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// probeVariable in the environment makes the test binary a prober.
const probeVariable = "E2E_PROBE"

// A prober carries out commands about sockets, which have names. Each line of its input is a command,
// and it answers each with a line: what it received, "ok", or the error.
//
//	new NAME KIND          tcp4 tcp6 udp4 udp6 ping4 ping6 raw4 raw6 mptcp4 mptcp6
//	bind NAME ADDR:PORT    device NAME LINK    setmark NAME MARK
//	send NAME ADDR:PORT    which nobody answers
//	info NAME ADDR:PORT,IFINDEX,SOURCE: send by a link and from an address that PKTINFO names; 0 or an unspecified one: none
//	connect NAME ADDR:PORT start NAME ADDR:PORT: the same, for which nobody waits long
//	unconnect NAME         connect(2) to AF_UNSPEC
//	fast NAME ADDR:PORT    ask by TCP Fast Open, without connect(2)
//	ask NAME [ADDR:PORT]   the address that the far end saw; "reply" of a ping
//	try NAME [ADDR:PORT]   the same, for which nobody waits long
//	local NAME             listen NAME: the port    accept NAME NEW: both ends
//	serve NAME             answer a datagram, from the address it was sent to
//	option NAME LEVEL,OPTION,HEX
//	close NAME
type prober struct{ sockets map[string]int }

const (
	probePatience = 10 * time.Second       // of ask
	probeSilence  = 500 * time.Millisecond // of try
)

func runProber(in io.Reader) {
	p := prober{make(map[string]int)}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		f := append(strings.Fields(lines.Text()), "", "", "")
		answer, err := p.do(f[0], f[1], f[2])
		var errno unix.Errno
		switch {
		case errors.As(err, &errno):
			answer = unix.ErrnoName(errno)
		case err != nil:
			answer = err.Error()
		case answer == "":
			answer = "ok"
		}
		fmt.Println(answer)
	}
}

func (p *prober) do(what, name, arg string) (string, error) {
	fd := p.sockets[name]
	switch what {
	case "new":
		return "", p.open(name, arg)
	case "close":
		return "", unix.Close(fd)
	case "device":
		return "", unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, arg)
	case "setmark":
		mark, err := strconv.ParseUint(arg, 0, 32)
		if err != nil {
			return "", err
		}
		return "", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
	case "option":
		f := strings.Split(arg, ",")
		level, err1 := strconv.Atoi(f[0])
		option, err2 := strconv.Atoi(f[1])
		value, err3 := hex.DecodeString(f[2])
		if err := errors.Join(err1, err2, err3); err != nil {
			return "", err
		}
		return "", unix.SetsockoptString(fd, level, option, string(value))
	case "bind", "connect":
		to, err := probeAddr(fd, arg)
		if err != nil {
			return "", err
		}
		if what == "bind" {
			return "", unix.Bind(fd, to)
		}
		return "", p.wait(fd, probePatience, func() error { return unix.Connect(fd, to) })
	case "start":
		to, err := probeAddr(fd, arg)
		if err != nil {
			return "", err
		}
		return "", p.wait(fd, probeSilence, func() error { return unix.Connect(fd, to) })
	case "send":
		to, err := probeAddr(fd, arg)
		if err != nil {
			return "", err
		}
		return "", unix.Sendto(fd, []byte("?"), 0, to)
	case "unconnect":
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unix.RawSockaddr{})), unix.SizeofSockaddrInet6)
		if errno != 0 {
			return "", errno
		}
		return "", nil
	case "fast":
		to, err := probeAddr(fd, arg)
		if err == nil {
			err = p.wait(fd, probePatience, func() error { return unix.Sendto(fd, []byte("?"), unix.MSG_FASTOPEN, to) })
		}
		if err != nil {
			return "", err
		}
		buf := make([]byte, 64)
		n := 0
		err = p.wait(fd, probePatience, func() (err error) {
			n, err = unix.Read(fd, buf)
			return err
		})
		return strings.TrimSpace(string(buf[:max(n, 0)])), err
	case "info":
		return "", sendInfo(fd, strings.Split(arg, ","))
	case "ask":
		return p.ask(fd, arg, probePatience)
	case "try":
		return p.ask(fd, arg, probeSilence)
	case "local":
		sa, err := unix.Getsockname(fd)
		return host4or6(sa), err
	case "listen":
		if err := unix.Listen(fd, 8); err != nil {
			return "", err
		}
		return port(fd)
	case "port":
		return port(fd)
	case "accept":
		var conn int
		var from unix.Sockaddr
		err := p.wait(fd, probePatience, func() (err error) {
			conn, from, err = unix.Accept(fd)
			return err
		})
		if err != nil {
			return "", err
		}
		p.sockets[arg] = conn
		_, err = unix.Write(conn, []byte(host4or6(from)+"\n"))
		return host4or6(from), err
	case "serve":
		return "", p.serve(fd)
	}
	return "", errors.New("no command " + what)
}

// sendInfo sends a datagram to an address, by a link, from a source.
func sendInfo(fd int, f []string) error {
	to, err := probeAddr(fd, f[0])
	if err != nil {
		return err
	}
	index, err := strconv.ParseInt(f[1], 10, 32)
	if err != nil {
		return err
	}
	source, err := netip.ParseAddr(f[2])
	if err != nil {
		return err
	}
	info := unix.PktInfo6(&unix.Inet6Pktinfo{Addr: source.As16(), Ifindex: uint32(index)})
	if source.Is4() {
		info = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: source.As4(), Ifindex: int32(index)})
	}
	return unix.Sendmsg(fd, []byte("?"), info, to, 0)
}

func (p *prober) open(name, kind string) (err error) {
	domain := unix.AF_INET
	if strings.HasSuffix(kind, "6") {
		domain = unix.AF_INET6
	}
	icmp := map[int]int{unix.AF_INET: unix.IPPROTO_ICMP, unix.AF_INET6: unix.IPPROTO_ICMPV6}[domain]
	of := map[string][2]int{
		"tcp": {unix.SOCK_STREAM, 0}, "udp": {unix.SOCK_DGRAM, 0}, "mptcp": {unix.SOCK_STREAM, unix.IPPROTO_MPTCP},
		"ping": {unix.SOCK_DGRAM, icmp}, "raw": {unix.SOCK_RAW, icmp},
	}[kind[:len(kind)-1]]
	p.sockets[name], err = unix.Socket(domain, of[0]|unix.SOCK_CLOEXEC, of[1])
	return err
}

// wait limits a call on a socket.
func (p *prober) wait(fd int, patience time.Duration, call func() error) error {
	limit := unix.NsecToTimeval(int64(patience))
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &limit); err != nil {
			return err
		}
	}
	for {
		err := call()
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINPROGRESS):
			return errors.New("timeout")
		default:
			return err
		}
	}
}

const pingID = 0x7461

func (p *prober) ask(fd int, to string, patience time.Duration) (string, error) {
	message := []byte("?")
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return "", err
	}
	echo, reply := byte(0), byte(0)
	switch protocol {
	case unix.IPPROTO_ICMP:
		echo, reply = 8, 0
	case unix.IPPROTO_ICMPV6:
		echo, reply = 128, 129
	}
	if echo != 0 {
		message = []byte{echo, 0, 0, 0, pingID >> 8, pingID & 0xff, 0, 1}
		binary.BigEndian.PutUint16(message[2:], ^(uint16(echo)<<8 + pingID + 1)) // the kernel computes that of IPv6
	}
	buf := make([]byte, 1500)
	n := 0
	err = p.wait(fd, patience, func() error {
		if to == "" {
			_, err = unix.Write(fd, message)
			return err
		}
		addr, err := probeAddr(fd, to)
		if err != nil {
			return err
		}
		return unix.Sendto(fd, message, 0, addr)
	})
	if err != nil {
		return "", err
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		err := p.wait(fd, patience, func() (err error) {
			n, err = unix.Read(fd, buf)
			return err
		})
		if err != nil {
			return "", err
		}
		if echo == 0 {
			return strings.TrimSpace(string(buf[:n])), nil
		}
		got := buf[:n]
		if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
			return "", err
		} else if typ == unix.SOCK_RAW && protocol == unix.IPPROTO_ICMP && n > 0 {
			got = got[min(n, int(got[0]&15)*4):]
		}
		if len(got) > 7 && got[0] == reply {
			return "reply", nil
		}
	}
	return "", errors.New("timeout")
}

// serve answers one datagram, from the address to which the datagram was sent.
func (p *prober) serve(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1); err != nil {
		return err
	}
	buf, oob := make([]byte, 64), make([]byte, 256)
	var oobn int
	var from unix.Sockaddr
	if err := p.wait(fd, probePatience, func() (err error) {
		_, oobn, _, from, err = unix.Recvmsg(fd, buf, oob, 0)
		return err
	}); err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d control messages, %v", len(messages), err)
	}
	info := messages[0].Data               // struct in_pktinfo: interface, source, destination
	binary.NativeEndian.PutUint32(info, 0) // by whichever interface
	return unix.Sendmsg(fd, []byte(host4or6(from)), oob[:oobn], from, 0)
}

func probeAddr(fd int, text string) (unix.Sockaddr, error) {
	addr, err := net.ResolveUDPAddr("udp", text)
	if err != nil {
		return nil, err
	}
	if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil && typ == unix.SOCK_RAW {
		addr.Port = 0 // would be the protocol
	}
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if domain == unix.AF_INET6 {
		var zone uint32
		if link, linkErr := net.InterfaceByName(addr.Zone); linkErr == nil {
			zone = uint32(link.Index)
		}
		return &unix.SockaddrInet6{Port: addr.Port, Addr: [16]byte(addr.IP.To16()), ZoneId: zone}, err
	}
	if addr.IP.To4() == nil {
		return nil, errors.New("an IPv4 socket cannot talk to " + text)
	}
	return &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}, err
}

func host4or6(sa unix.Sockaddr) string {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return net.IP(sa.Addr[:]).String()
	case *unix.SockaddrInet6:
		return net.IP(sa.Addr[:]).String()
	}
	return ""
}

func port(fd int) (string, error) {
	sa, err := unix.Getsockname(fd)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return strconv.Itoa(sa.Port), err
	case *unix.SockaddrInet6:
		return strconv.Itoa(sa.Port), err
	}
	return "", err
}

// isProbe reports whether this process is to be a prober, and if so runs it to its end.
func isProbe() bool {
	if os.Getenv(probeVariable) == "" {
		return false
	}
	runProber(os.Stdin)
	return true
}
