package route

import (
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// change is a request that changes something.
type change struct {
	typ, flags uint16
	body       []byte
}

// atOnce is how many messages go to the kernel in one send. Should it refuse all of them, its answers fit into a
// socket's queue of the default size.
const atOnce = 64

// changeTogether sends messages, many in one send, which the kernel takes one after the other, and reports of each
// whether it succeeded for certain. What did not the caller sends alone, and learns why. A system call or two for each
// of thousands of routes take longer than the kernel does.
func (c *Conn) changeTogether(messages []change) (done []bool) {
	done = make([]bool, len(messages))
	for from := 0; from < len(messages); from += atOnce {
		to := min(from+atOnce, len(messages))
		if err := c.sendTogether(messages[from:to], done[from:to]); err != nil {
			clear(done[from:to])
			// What is left of the answer would be taken for the next one. If no other socket can be opened, the next
			// request says why this one does not work.
			_ = c.reopen(&c.changing, changingSocket)
		}
	}
	return done
}

// sendTogether asks for an acknowledgement of the last message only: the kernel says which of the others failed, and
// the acknowledgement comes after that.
func (c *Conn) sendTogether(messages []change, done []bool) error {
	c.meanwhile()
	first := c.requests + 1
	last := c.requests + uint32(len(messages))
	var b []byte
	for i, m := range messages {
		done[i] = true
		req := nl.NetlinkRequest{
			NlMsghdr: unix.NlMsghdr{Type: m.typ, Flags: unix.NLM_F_REQUEST | m.flags, Seq: first + uint32(i)},
			RawData:  m.body,
		}
		if req.Seq == last {
			req.Flags |= unix.NLM_F_ACK
		}
		b = append(b, req.Serialize()...)
		b = append(b, make([]byte, align(len(b))-len(b))...)
	}
	c.requests = last
	if err := unix.Sendto(c.changing.GetFd(), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		answers, _, err := c.changing.Receive()
		if err != nil {
			return err
		}
		for _, a := range answers {
			at := a.Header.Seq - first
			if at >= uint32(len(messages)) { // of an earlier request
				continue
			}
			if a.Header.Type != unix.NLMSG_ERROR {
				return fmt.Errorf("answer of type %d: %w", a.Header.Type, errMalformed)
			}
			done[at] = uint32Of(a.Data) == 0
			if a.Header.Seq == last {
				return nil
			}
		}
	}
}

// routesTogether adds or deletes those of routes that may be, and reports of each whether it did.
func (c *Conn) routesTogether(typ, flags uint16, routes []Route, may func(Route) bool) (done []bool) {
	done = make([]bool, len(routes))
	var messages []change
	var at []int
	for i, r := range routes {
		if may(r) {
			messages, at = append(messages, change{typ, flags, r.normal().encode()}), append(at, i)
		}
	}
	if len(messages) < 2 {
		return done
	}
	for i, ok := range c.changeTogether(messages) {
		done[at[i]] = ok
	}
	return done
}
