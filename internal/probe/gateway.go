package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lookAfter and lookEvery are the first and the longest time between looks at what the kernel knows of the gateway.
	lookAfter, lookEvery = 10 * time.Millisecond, 200 * time.Millisecond

	nudReachable, nudFailed = 0x02, 0x20 // NUD_* and NTF_* of linux/neighbour.h
	nudProbe, nudFixed      = 0x10, 0xc0
	nudValid                = 0xde
	ntfUse                  = 0x01
	ndaDst                  = 1
)

// fixed says that nobody is asked, since the kernel takes the gateway for granted: on a link without ARP and neighbour
// discovery, or because the administrator says where it is. It is an ErrUnable.
type fixed struct{}

func (fixed) Error() string {
	return `the kernel asks for no gateway on such a link, so "targets" have to be named`
}
func (fixed) Is(target error) bool { return target == ErrUnable }

// errNoNeighbour says that the gateway does not answer ARP or neighbour discovery.
var errNoNeighbour = errors.New("the gateway does not answer on the link")

// askGateway has the kernel ask by ARP or neighbour discovery whether a gateway is on the link. It needs no target beyond, and
// CAP_NET_ADMIN.
func askGateway(ctx context.Context, u Uplink, gateway netip.Addr) (bytes int, err error) {
	const ethernet, arp, discovery = 14, 28, 72
	bytes = ethernet + discovery
	if gateway.Is4() {
		bytes = ethernet + arp
	}
	n, err := dialNeighbour(u.Ifname, gateway)
	if err != nil {
		return 0, unasked(err)
	}
	defer unix.Close(n.fd)
	state, err := n.state()
	if state&nudFixed != 0 {
		return 0, fixed{}
	}
	if err == nil {
		err = n.ask(state)
	}
	if err != nil {
		return 0, unasked(fmt.Errorf("look for the gateway: %w", err))
	}
	for pause, first := lookAfter, true; ; pause, first = min(2*pause, lookEvery), false {
		state, err = n.state()
		switch {
		case err != nil:
			return bytes, unasked(fmt.Errorf("look for the gateway: %w", err))
		case state&nudFixed != 0: // the kernel knew nothing of it before
			return 0, fixed{}
		case state&nudReachable != 0:
			return 2 * bytes, nil
		case state&nudFailed != 0 && !first:
			return bytes, errNoNeighbour
		}
		select {
		case <-ctx.Done():
			return bytes, errNoNeighbour
		case <-time.After(pause):
		}
	}
}

// neighbour is what the kernel knows of an address on a link.
type neighbour struct {
	fd    int
	index int
	addr  netip.Addr
}

func dialNeighbour(ifname string, addr netip.Addr) (neighbour, error) {
	link, err := unix.NewIfreq(ifname)
	if err != nil {
		return neighbour{}, fmt.Errorf("link %q: %w", ifname, err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return neighbour{}, os.NewSyscallError("socket", err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, link); err != nil {
		unix.Close(fd)
		return neighbour{}, fmt.Errorf("link %q: %w", ifname, err)
	}
	return neighbour{fd, int(link.Uint32()), addr}, nil
}

// request sends a message with a struct ndmsg, and returns the first answer.
func (n neighbour) request(typ, flags, state uint16, use byte) (answer syscall.NetlinkMessage, err error) {
	family := byte(unix.AF_INET6)
	if n.addr.Is4() {
		family = unix.AF_INET
	}
	raw := n.addr.AsSlice()
	const header = unix.SizeofNlMsghdr + 12 + 4 // with the header of one attribute
	b := binary.NativeEndian.AppendUint32(nil, uint32(header+len(raw)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = append(b, make([]byte, 8)...) // sequence, port
	b = append(b, family, 0, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, uint32(n.index))
	b = binary.NativeEndian.AppendUint16(b, state)
	b = append(b, use, 0)
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(raw)))
	b = binary.NativeEndian.AppendUint16(b, ndaDst)
	b = append(b, raw...)
	if err := unix.Sendto(n.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return answer, os.NewSyscallError("sendto", err)
	}
	buf := make([]byte, 4096)
	size, _, err := unix.Recvfrom(n.fd, buf, 0)
	if err != nil {
		return answer, os.NewSyscallError("recvfrom", err)
	}
	messages, err := syscall.ParseNetlinkMessage(buf[:size])
	if err != nil || len(messages) == 0 {
		return answer, errors.Join(errors.New("unexpected answer of the kernel"), err)
	}
	answer = messages[0]
	if answer.Header.Type == unix.NLMSG_ERROR && len(answer.Data) >= 4 {
		if code := int32(binary.NativeEndian.Uint32(answer.Data)); code != 0 {
			return answer, syscall.Errno(-code)
		}
	}
	return answer, nil
}

// state returns the NUD_* bits; 0: the kernel does not know the address.
func (n neighbour) state() (uint16, error) {
	const at = 8 // of ndm_state in struct ndmsg
	answer, err := n.request(unix.RTM_GETNEIGH, 0, 0, 0)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil || len(answer.Data) < at+2 {
		return 0, errors.Join(errors.New("the kernel does not say what it knows of a neighbour"), err)
	}
	return binary.NativeEndian.Uint16(answer.Data[at:]), nil
}

// ask has the kernel send a request now. What it knows no link-layer address of it can only be made to use.
func (n neighbour) ask(state uint16) error {
	if state&nudValid != 0 {
		_, err := n.request(unix.RTM_NEWNEIGH, unix.NLM_F_ACK|unix.NLM_F_REPLACE, nudProbe, 0)
		if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // it has failed meanwhile
			return err
		}
	}
	_, err := n.request(unix.RTM_NEWNEIGH, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, 0, ntfUse)
	return err
}
