package route

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Neighbour is an entry of the kernel's table of neighbours.
type Neighbour struct {
	Index int // of the link
	Addr  netip.Addr
	State uint16        // bits NUD_* of linux/neighbour.h
	Used  time.Duration // since a packet was to be sent to it
}

// States of a neighbour, of linux/neighbour.h.
const (
	NeighbourIncomplete = 0x01 // it is asked, and has not answered
	NeighbourFailed     = 0x20 // it did not answer
)

const neighbourState = 8 // where ndm_state is in struct ndmsg

// Neighbours returns those of a family.
func (c *Conn) Neighbours(family int) ([]Neighbour, error) {
	request := make([]byte, neighbourSize)
	request[0] = byte(family)
	messages, err := c.dump(unix.RTM_GETNEIGH, unix.RTM_NEWNEIGH, request)
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	all := make([]Neighbour, len(messages))
	for i, m := range messages {
		if all[i], err = parseNeighbour(m); err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
	}
	return all, nil
}

// parseNeighbour reads the body of a message.
func parseNeighbour(body []byte) (n Neighbour, err error) {
	const (
		info = 3 // NDA_CACHEINFO: confirmed, used, updated, references
		tick = 10 * time.Millisecond
	)
	if len(body) < neighbourSize {
		return n, errMalformed
	}
	n.Index, n.State = int(int32(native.Uint32(body[4:]))), native.Uint16(body[neighbourState:])
	err = eachAttribute(body[neighbourSize:], func(typ uint16, value []byte) {
		switch {
		case typ == neighbourDst:
			n.Addr, _ = netip.AddrFromSlice(value)
		case typ == info && len(value) >= 8:
			n.Used = time.Duration(native.Uint32(value[4:])) * tick
		}
	})
	return n, err
}

// WatchFailedNeighbours subscribes to neighbours that answer no more. The kernel looks at the notifications, so that a host
// with many neighbours does not wake the process for others.
func WatchFailedNeighbours() (*Watcher, error) {
	w, err := Watch(1 << (unix.RTNLGRP_NEIGH - 1))
	if err != nil {
		return nil, err
	}
	err = w.attach([]unix.SockFilter{
		{Code: bpfLoad | unix.BPF_H | unix.BPF_ABS, K: typeAt},
		{Code: bpfEqual, K: short(unix.RTM_NEWNEIGH), Jf: 3},
		{Code: bpfLoad | unix.BPF_H | unix.BPF_ABS, K: unix.SizeofNlMsghdr + neighbourState},
		{Code: bpfEqual, K: short(NeighbourFailed), Jf: 1},
		{Code: bpfAnswer, K: 1<<32 - 1}, // all of it
		{Code: bpfAnswer, K: 0},
	})
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}
