package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/remember"
)

// DoorPath is the socket of the service. table-allocator-enter has the same path.
const DoorPath = remember.Root + "/netns.sock"

// DefaultGroup is the group whose users may enter namespaces, unless the configuration names another one.
const DefaultGroup = "table-allocator"

const (
	doorPatience = 2 * time.Second // for one question and its answer
	maxDoors     = 8               // connections of one user at once
	maxQuestion  = 64              // bytes
)

// A door answers users of a group: it hands out the descriptors of namespaces.
type door struct {
	host  *Host
	log   *slog.Logger
	group string

	mu    sync.Mutex
	users map[uint32]int // connections of each
}

// openDoor makes the socket, which root alone and the group can open. Without such a group root alone can.
func openDoor(group string, log *slog.Logger) (*net.UnixListener, error) {
	if err := os.MkdirAll(remember.Root, 0o755); err != nil {
		return nil, err
	}
	if err := removeFile(DoorPath); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: DoorPath, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	gid, mode, err := 0, os.FileMode(0o600), error(nil)
	if g, lookErr := user.LookupGroup(group); lookErr == nil {
		mode = 0o660
		gid, err = strconv.Atoi(g.Gid)
	} else {
		log.Warn("only root can enter namespaces: there is no such group (groupadd --system "+group+", then systemctl restart table-allocator-netns)", "group", group, "err", lookErr)
	}
	if err = errors.Join(err, os.Chown(DoorPath, 0, gid), os.Chmod(DoorPath, mode)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// serve answers until the listener is closed.
func (d *door) serve(l *net.UnixListener) {
	var answers sync.WaitGroup
	defer answers.Wait()
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // too many open files, say, which ends
			d.log.Warn("cannot answer who wants to enter a namespace", "err", err)
			time.Sleep(settle)
			continue
		}
		answers.Go(func() {
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(doorPatience)); err == nil {
				d.answer(conn)
			}
		})
	}
}

// A visitor is who asks, as the kernel says.
type visitor struct {
	uid    uint32
	pid    int32
	groups []uint32
}

// answer answers one question: the word enter or leased, and a name.
func (d *door) answer(conn *net.UnixConn) {
	v, err := visitorOf(conn)
	if err != nil {
		d.log.Warn("cannot tell who wants to enter a namespace", "err", err)
		return
	}
	if !d.admit(v.uid, 1) {
		return // with too many connections already
	}
	defer d.admit(v.uid, -1)
	question := make([]byte, maxQuestion)
	n, err := conn.Read(question)
	if err != nil {
		return // silent, or gone
	}
	text, files, err := d.decide(v, string(question[:n]))
	if err != nil {
		text = err.Error()
	}
	var fds []int
	for _, f := range files {
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	if _, _, err := conn.WriteMsgUnix([]byte(text), unix.UnixRights(fds...), nil); err != nil {
		d.log.Debug("who wanted to enter a namespace has gone", "pid", v.pid, "uid", v.uid, "err", err)
	}
}

// admit counts connections of a user, and reports whether there may be one more.
func (d *door) admit(uid uint32, change int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if change > 0 && d.users[uid] >= maxDoors {
		return false
	}
	if d.users[uid] += change; d.users[uid] == 0 {
		delete(d.users, uid)
	}
	return true
}

// decide returns the answer to a question, and the descriptors of a namespace to enter: its mounts and its network.
func (d *door) decide(v visitor, question string) (text string, files []*os.File, err error) {
	verb, name, _ := strings.Cut(question, " ")
	if err := CheckName(name); err != nil {
		return "", nil, err
	}
	s, err := d.host.known(name)
	if err == nil && !allowed(v, d.group, s.Allow) {
		d.log.Warn("a user may not enter a namespace", "namespace", name, "pid", v.pid, "uid", v.uid)
		err = ErrUnknown // which says nothing of namespaces of others
	}
	if err != nil {
		return "", nil, err
	}
	switch verb {
	case "leased":
		h, err := Open(d.host.Server, nil) // that of the loop is not for two at once
		if err != nil {
			return "", nil, err
		}
		defer h.Close()
		row, err := h.row(s, nil)
		return strconv.FormatBool(err == nil && len(row.Tables) > 0), nil, nil
	case "enter":
		text := "ok"
		for _, kind := range []string{"user", "mnt", "pid", "net"} {
			id, err := os.Readlink("/proc/self/ns/" + kind)
			if err != nil {
				return "", nil, err
			}
			text += "\n" + id
		}
		for _, path := range []string{d.host.memory.mountPin(name), netPin(name)} {
			f, err := os.Open(path)
			if err != nil {
				return "", files, err
			}
			files = append(files, f)
		}
		d.log.Info("a user enters a namespace", "namespace", name, "pid", v.pid, "uid", v.uid)
		return text, files, nil
	}
	return "", nil, errors.New("want enter or leased, and a name")
}

// allowed reports whether a user may enter a namespace: root, and who is in the group and in the namespace's list, if it has
// one, by name or as @GROUP.
func allowed(v visitor, group string, list []string) bool {
	if v.uid == 0 {
		return true
	}
	if !isMember(v, group) {
		return false
	}
	return len(list) == 0 || slices.ContainsFunc(list, func(who string) bool {
		if of, isGroup := strings.CutPrefix(who, "@"); isGroup {
			return isMember(v, of)
		}
		u, err := user.Lookup(who)
		return err == nil && u.Uid == fmt.Sprint(v.uid)
	})
}

func isMember(v visitor, group string) bool {
	g, err := user.LookupGroup(group)
	return err == nil && slices.ContainsFunc(v.groups, func(gid uint32) bool { return g.Gid == fmt.Sprint(gid) })
}

// visitorOf asks the kernel who is at the other end, with all groups.
func visitorOf(conn *net.UnixConn) (v visitor, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return v, err
	}
	var callErr error
	err = raw.Control(func(fd uintptr) {
		var peer *unix.Ucred
		if peer, callErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); callErr != nil {
			return
		}
		v = visitor{uid: peer.Uid, pid: peer.Pid}
		v.groups, callErr = peerGroups(fd)
		v.groups = append(v.groups, peer.Gid)
	})
	return v, errors.Join(err, callErr)
}

// peerGroups returns the supplementary groups of the other end of a socket, as they were when it connected.
func peerGroups(fd uintptr) ([]uint32, error) {
	for groups := make([]uint32, 64); ; {
		size := uint32(4 * len(groups))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size) > 4*len(groups):
			groups = make([]uint32, size/4)
		case errno != 0:
			return nil, fmt.Errorf("the groups of a peer: %w", errno)
		default:
			return groups[:size/4], nil
		}
	}
}

// Leased asks the service whether the uplink of a namespace has a lease, for users who cannot look.
func Leased(ctx context.Context, name string) (bool, error) {
	conn, err := (&net.Dialer{Timeout: doorPatience}).DialContext(ctx, "unixpacket", DoorPath)
	if err != nil {
		return false, fmt.Errorf("ask the service of namespaces: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * doorPatience)); err != nil {
		return false, err
	}
	if _, err := conn.Write([]byte("leased " + name)); err != nil {
		return false, err
	}
	answer := make([]byte, 1024)
	n, err := conn.Read(answer)
	if err != nil {
		return false, fmt.Errorf("the service of namespaces does not answer: %w", err)
	}
	leased, err := strconv.ParseBool(string(answer[:n]))
	if err != nil {
		return false, named(name, errors.New(string(answer[:n])))
	}
	return leased, nil
}

// EntererPath is the path of table-allocator-enter, which is installed beside this program.
func EntererPath() (string, error) {
	self, err := os.Executable()
	return filepath.Join(filepath.Dir(self), "table-allocator-enter"), err
}
