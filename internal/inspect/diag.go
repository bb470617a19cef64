package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/table-allocator/table-allocator/internal/route"
)

// SocketsOf lists the sockets of a process that have a far end.
func SocketsOf(pid int) (own []route.Socket, err error) {
	if _, err := UserOf(pid); err != nil { // it checks the namespace, too
		return nil, err
	}
	all, err := route.Sockets()
	if err != nil {
		return nil, err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	for _, e := range entries {
		var inode uint32
		text, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(text, "socket:[") {
			continue // it was closed meanwhile, or is no socket
		}
		if _, err := fmt.Sscanf(text, "socket:[%d]", &inode); err != nil {
			continue
		}
		at := slices.IndexFunc(all, func(s route.Socket) bool { return s.Inode == inode })
		if at >= 0 && all[at].Connected() && !slices.Contains(own, all[at]) {
			own = append(own, all[at])
		}
	}
	return own, nil
}

// ErrNoSocket says that there is no such socket.
var ErrNoSocket = errors.New("no TCP or UDP socket of this network namespace has these ends (see ss -tun)")

// SocketOf finds the socket with two ends.
func SocketOf(local, remote netip.AddrPort) (route.Socket, error) {
	all, err := route.Sockets()
	if err != nil {
		return route.Socket{}, err
	}
	same := func(a, b netip.AddrPort) bool {
		return a.Port() == b.Port() && a.Addr().WithZone("") == b.Addr().WithZone("")
	}
	at := slices.IndexFunc(all, func(s route.Socket) bool { return same(s.Local, local) && same(s.Remote, remote) })
	if at < 0 {
		return route.Socket{}, fmt.Errorf("%s-%s: %w", local, remote, ErrNoSocket)
	}
	return all[at], nil
}
