package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Ask asks one target by one kind, until ctx ends.
func Ask(ctx context.Context, u Uplink, kind Kind, target netip.Addr) Answer {
	begin := time.Now()
	var n int
	var err error
	switch kind.Name {
	case icmp:
		n, err = ping(ctx, u, target)
	case dns:
		n, err = askResolver(ctx, u, target)
	case gateway:
		n, err = askGateway(ctx, u, target)
	default:
		n, err = knock(ctx, u, netip.AddrPortFrom(target, kind.Port))
	}
	return Answer{Kind: kind, Target: target, RTT: time.Since(begin), Bytes: n, Err: err}
}

// errRefused says that a resolver refuses questions, as that of a router without the Internet does.
var errRefused = errors.New("the resolver refuses the question")

// askResolver asks for the name servers of the root, and where that is refused for those of arpa: some resolvers refuse the
// first question alone, since its answer is long.
func askResolver(ctx context.Context, u Uplink, target netip.Addr) (n int, err error) {
	for _, name := range []string{".", "arpa"} {
		question, refused := dnsQuestion(uint16(rand.Uint32()), name, typeNS), false
		size, err := exchange(ctx, u, unix.SOCK_DGRAM, 0, netip.AddrPortFrom(target, 53), question, func(b []byte) bool {
			refused = isDNSAnswer(question, b) && refuses(b)
			return refused || isDNSAnswer(question, b) && saysSomething(b)
		})
		n += size
		if err != nil || !refused {
			return n, err
		}
	}
	return n, errRefused
}

// ping sends an echo request by a socket that needs no capability, where net.ipv4.ping_group_range permits it.
func ping(ctx context.Context, u Uplink, target netip.Addr) (int, error) {
	return pingWith(ctx, u, target, echoHeader+8, false)
}

const echoHeader = 8 // of an echo request

// pingWith sends a request of size bytes. With whole no router may cut it into pieces.
func pingWith(ctx context.Context, u Uplink, target netip.Addr, size int, whole bool) (int, error) {
	protocol, request, reply := unix.IPPROTO_ICMPV6, byte(128), byte(129)
	if target.Is4() {
		protocol, request, reply = unix.IPPROTO_ICMP, 8, 0
	}
	b := make([]byte, size) // the kernel fills in the checksum and the identifier
	b[0] = request
	binary.BigEndian.PutUint64(b[echoHeader:], rand.Uint64())
	f, err := dial(ctx, u, unix.SOCK_DGRAM, protocol, netip.AddrPortFrom(target, 0))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if whole {
		if err := neverCut(f, target); err != nil {
			return 0, err
		}
	}
	return converse(ctx, f, ipHeader(target), b, func(a []byte) bool {
		return len(a) >= echoHeader && a[0] == reply && bytes.Equal(a[echoHeader:], b[echoHeader:])
	})
}

// knock opens a TCP connection and resets it. A refusal is no answer: a router without the Internet sends it in the name of any
// target.
func knock(ctx context.Context, u Uplink, to netip.AddrPort) (int, error) {
	f, err := open(ctx, u, to)
	opening := ipHeader(u.Address) + tcpOpen - tcpHeader
	if errors.Is(err, unix.ECONNREFUSED) {
		opening += ipHeader(u.Address) + tcpHeader
	}
	if err != nil {
		return opening, err
	}
	return 2*opening + 2*(ipHeader(u.Address)+tcpHeader), f.Close()
}

// errStatus says that a server did not answer as the configuration expects.
var errStatus = errors.New("the reply is not 204")

const maxReply = 4096 // bytes of an HTTP reply that are read

// fetch gets a page. The error is errStatus if a server answers, and not with status 204.
func fetch(ctx context.Context, u Uplink, page Page, servers []netip.Addr) (n int, err error) {
	addr, err := netip.ParseAddr(page.Host)
	if err != nil {
		if addr, n, err = resolve(ctx, u, page.Host, servers); err != nil {
			return n, err
		}
	}
	if addr.Is4() != u.Address.Is4() {
		return n, errNoAddress
	}
	f, err := open(ctx, u, netip.AddrPortFrom(addr, page.Port))
	if err != nil {
		return n, err
	}
	defer f.Close()
	defer interrupt(ctx, f)()
	host := page.Host
	if page.Port != 80 {
		host = net.JoinHostPort(host, strconv.Itoa(int(page.Port)))
	} else if addr.Is6() && page.Host == addr.String() {
		host = "[" + host + "]"
	}
	request := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: table-allocator\r\nConnection: close\r\n\r\n", page.Path, host)
	if _, err := io.WriteString(f, request); err != nil {
		return n, err
	}
	buf := make([]byte, maxReply)
	read, err := io.ReadAtLeast(f, buf, len("HTTP/1.1 204"))
	const packets = 8 // with a header
	n += len(request) + read + packets*(ipHeader(u.Address)+tcpHeader)
	if err != nil {
		return n, err
	}
	return n, checkStatus(buf[:read])
}

// checkStatus checks the first line of a reply.
func checkStatus(reply []byte) error {
	version, rest, _ := bytes.Cut(reply, []byte(" "))
	if bytes.HasPrefix(version, []byte("HTTP/1.")) && bytes.HasPrefix(rest, []byte("204")) {
		return nil
	}
	return errStatus
}

// resolve asks name servers through the uplink. The resolver of the host could ask through another one.
func resolve(ctx context.Context, u Uplink, name string, servers []netip.Addr) (addr netip.Addr, n int, err error) {
	kind := uint16(typeAAAA)
	if u.Address.Is4() {
		kind = typeA
	}
	err = errors.New("no name server to ask")
	for _, server := range servers {
		if server.Is4() != u.Address.Is4() {
			continue
		}
		question := dnsQuestion(uint16(rand.Uint32()), name, kind)
		var sent int
		sent, err = exchange(ctx, u, unix.SOCK_DGRAM, 0, netip.AddrPortFrom(server, 53), question, func(b []byte) bool {
			if !isDNSAnswer(question, b) {
				return false
			}
			addr, _ = dnsAddress(b, u.Address.Is4()) // the zero Addr says that there is none
			return true
		})
		n += sent
		if err == nil && addr.IsValid() {
			return addr, n, nil
		}
	}
	if err == nil {
		err = errNoAddress
	}
	return addr, n, err
}
