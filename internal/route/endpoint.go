package route

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Endpoint is an address from which the kernel opens further subflows of MPTCP connections, see ip-mptcp(8).
type Endpoint struct {
	Addr  netip.Addr
	Index int    // of the link that the subflows leave by
	Port  uint16 // that the kernel accepts subflows at; 0: none
	ID    uint8
}

// Commands and attributes of linux/mptcp_pm.h.
const (
	endpointAdd    = 1
	endpointDelete = 2
	endpointGet    = 3

	endpointNested  = 1
	endpointFamily  = 1
	endpointID      = 2
	endpointAddr4   = 3
	endpointAddr6   = 4
	endpointPort    = 5
	endpointFlags   = 6
	endpointIndex   = 7
	endpointSubflow = 2
)

// The library notes the order of bytes at the first use of a netlink message, without a lock: before goroutines start.
var _ = nl.NativeEndian()

// ErrNoMPTCP says that the kernel has no MPTCP, or none with endpoints (Linux 5.7).
var ErrNoMPTCP = errors.New("this kernel has no MPTCP")

// Endpoints are those of this network namespace.
func Endpoints() ([]Endpoint, error) {
	answers, err := mptcp(endpointGet, unix.NLM_F_DUMP)
	if err != nil {
		return nil, fmt.Errorf("read MPTCP endpoints: %w", err)
	}
	var all []Endpoint
	for _, answer := range answers {
		e, err := parseEndpoint(answer)
		if err != nil {
			return nil, fmt.Errorf("read MPTCP endpoints: %w", err)
		}
		all = append(all, e)
	}
	return all, nil
}

func parseEndpoint(answer []byte) (e Endpoint, err error) {
	if len(answer) < nl.SizeofGenlmsg {
		return e, fmt.Errorf("an answer of %d bytes", len(answer))
	}
	outer, err := nl.ParseRouteAttr(answer[nl.SizeofGenlmsg:])
	if err != nil {
		return e, err
	}
	for _, attr := range outer {
		if attr.Attr.Type&^unix.NLA_F_NESTED != endpointNested {
			continue
		}
		inner, err := nl.ParseRouteAttr(attr.Value)
		if err != nil {
			return e, err
		}
		for _, a := range inner {
			switch {
			case a.Attr.Type == endpointID && len(a.Value) >= 1:
				e.ID = a.Value[0]
			case a.Attr.Type == endpointAddr4 && len(a.Value) >= 4:
				e.Addr = netip.AddrFrom4([4]byte(a.Value[:4]))
			case a.Attr.Type == endpointAddr6 && len(a.Value) >= 16:
				e.Addr = netip.AddrFrom16([16]byte(a.Value[:16]))
			case a.Attr.Type == endpointPort && len(a.Value) >= 2:
				e.Port = binary.NativeEndian.Uint16(a.Value)
			case a.Attr.Type == endpointIndex && len(a.Value) >= 4:
				e.Index = int(int32(binary.NativeEndian.Uint32(a.Value)))
			}
		}
	}
	return e, nil
}

// AddEndpoint adds an endpoint for further subflows. The kernel has one for each address: the error is unix.EEXIST if
// there is one.
func AddEndpoint(addr netip.Addr, index int) error {
	e := Endpoint{Addr: addr, Index: index}
	if _, err := mptcp(endpointAdd, unix.NLM_F_ACK, e.attribute()); err != nil {
		return fmt.Errorf("add the MPTCP endpoint %s: %w", addr, err)
	}
	return nil
}

// DeleteEndpoint deletes an endpoint that Endpoints returned.
func DeleteEndpoint(e Endpoint) error {
	_, err := mptcp(endpointDelete, unix.NLM_F_ACK, e.attribute())
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // both: there is none
		return fmt.Errorf("delete the MPTCP endpoint %s: %w", e.Addr, err)
	}
	return nil
}

func (e Endpoint) attribute() *nl.RtAttr {
	nested := nl.NewRtAttr(endpointNested|unix.NLA_F_NESTED, nil)
	family, kind := uint16(unix.AF_INET), endpointAddr4
	if e.Addr.Is6() {
		family, kind = unix.AF_INET6, endpointAddr6
	}
	nested.AddRtAttr(endpointFamily, binary.NativeEndian.AppendUint16(nil, family))
	nested.AddRtAttr(kind, e.Addr.AsSlice())
	if e.ID != 0 {
		nested.AddRtAttr(endpointID, []byte{e.ID})
	}
	nested.AddRtAttr(endpointFlags, nl.Uint32Attr(endpointSubflow))
	nested.AddRtAttr(endpointIndex, nl.Uint32Attr(uint32(e.Index)))
	return nested
}

// genericHeader is the header of a message of generic netlink, with its reserved bytes: a command and a version. nl.Genlmsg has
// not these bytes, and reads behind itself what belongs to others.
type genericHeader [nl.SizeofGenlmsg]byte

func (h genericHeader) Len() int          { return len(h) }
func (h genericHeader) Serialize() []byte { return h[:] }

// mptcp sends a command to the kernel's path manager, and returns the answers.
func mptcp(command uint8, flags int, attributes ...*nl.RtAttr) ([][]byte, error) {
	ask := nl.NewNetlinkRequest(nl.GENL_ID_CTRL, 0)
	ask.AddData(genericHeader{nl.GENL_CTRL_CMD_GETFAMILY, nl.GENL_CTRL_VERSION})
	ask.AddData(nl.NewRtAttr(nl.GENL_CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated("mptcp_pm")))
	answers, err := ask.Execute(unix.NETLINK_GENERIC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNoMPTCP
	}
	if err != nil {
		return nil, err
	}
	for _, answer := range answers {
		attrs, err := nl.ParseRouteAttr(answer[min(nl.SizeofGenlmsg, len(answer)):])
		if err != nil {
			return nil, err
		}
		for _, a := range attrs {
			if a.Attr.Type == nl.GENL_CTRL_ATTR_FAMILY_ID && len(a.Value) >= 2 {
				req := nl.NewNetlinkRequest(int(binary.NativeEndian.Uint16(a.Value)), flags)
				req.AddData(genericHeader{command, 1})
				for _, attribute := range attributes {
					req.AddData(attribute)
				}
				return req.Execute(unix.NETLINK_GENERIC, 0)
			}
		}
	}
	return nil, ErrNoMPTCP
}
