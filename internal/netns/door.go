package netns

import (
	"context"
	"encoding/json"
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

	"github.com/table-allocator/table-allocator/internal/outside"
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
	file  File           // the configuration
}

// open opens the host for one question: that of the loop is not for two at once.
func (d *door) open() (*Host, error) {
	h, err := Open(d.host.Server, d.host.ServerUIDs)
	if err == nil {
		h.legacy = d.host.legacy
	}
	return h, err
}

// configure gives the door another configuration.
func (d *door) configure(file File) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.file = file
}

func (d *door) configuration() File {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.file
}

// openDoor makes the socket, which root alone and the group can open. Without such a group root alone can.
func openDoor(group string, log *slog.Logger) (*net.UnixListener, error) {
	if err := os.MkdirAll(remember.Root, 0o755); err != nil {
		return nil, err
	}
	l, err := givenDoor()
	if err == nil && l == nil {
		if err := removeFile(DoorPath); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: DoorPath, Net: "unixpacket"})
	}
	if err != nil {
		return nil, err
	}
	gid, mode, err := 0, os.FileMode(0o600), error(nil)
	if g, lookErr := user.LookupGroup(group); lookErr == nil {
		mode = 0o660
		gid, err = strconv.Atoi(g.Gid)
	} else {
		log.Warn("only root can enter namespaces: there is no such group (groupadd --system "+group+", then "+outside.Service("restart", "table-allocator-netns")+")", "group", group, "err", lookErr)
	}
	if err = errors.Join(err, os.Chown(DoorPath, 0, gid), os.Chmod(DoorPath, mode)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// givenDoor is the socket that systemd hands to the service (sd_listen_fds(3)), nil without one.
func givenDoor() (*net.UnixListener, error) {
	const first = 3
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || os.Getenv("LISTEN_FDS") != "1" {
		return nil, nil
	}
	f := os.NewFile(first, DoorPath)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("the socket of systemd: %w", err)
	}
	if door, ok := l.(*net.UnixListener); ok && door.Addr().String() == DoorPath {
		return door, nil
	}
	return nil, errors.Join(fmt.Errorf("the socket of systemd is at %s", l.Addr()), l.Close())
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
			d.log.Warn("cannot accept the call of a user who wants to enter a namespace", "err", err)
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

// answer answers one question: the word enter or leased, and a name; or list or ps, with a name or none.
func (d *door) answer(conn *net.UnixConn) {
	v, err := visitorOf(conn)
	if err != nil {
		d.log.Warn("cannot find out which user wants to enter a namespace", "err", err)
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
	verb, name, _ := strings.Cut(string(question[:n]), " ")
	if verb == "list" || verb == "ps" {
		if err := d.tell(conn, v, verb, name); err != nil {
			_, _ = conn.Write([]byte(err.Error())) // who asked may be gone
		}
		return
	}
	text, files, err := d.decide(v, verb, name)
	if err != nil {
		text = err.Error()
	}
	var fds []int
	for _, f := range files {
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	if err := conn.SetDeadline(time.Now().Add(doorPatience)); err != nil { // a namespace may have been made
		return
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
func (d *door) decide(v visitor, verb, name string) (text string, files []*os.File, err error) {
	if err := CheckName(name); err != nil {
		return "", nil, err
	}
	if cfg, found := d.configuration().Named(name); found && allowed(v, d.group, cfg.Allow) {
		if err := d.demand(name); err != nil {
			return "", nil, err
		}
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
		h, err := d.open()
		if err != nil {
			return "", nil, err
		}
		defer h.Close()
		row, err := h.row(s, nil)
		return strconv.FormatBool(err == nil && row.Leads()), nil, nil
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

// demand makes a namespace that is made on demand.
func (d *door) demand(name string) error {
	h, err := d.open()
	if err != nil {
		return err
	}
	defer h.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return h.Demand(ctx, d.configuration(), name)
}

// theEnd is the last message of an answer of several.
const theEnd = "ok"

// maxCommand is how much of a command line a user is told, in bytes.
const maxCommand = 4096

// tell sends the namespaces that a user may enter, or that user's own programs in them: a message for each, and theEnd.
func (d *door) tell(conn *net.UnixConn, v visitor, verb, name string) error {
	if name != "" && CheckName(name) != nil {
		return CheckName(name)
	}
	h, err := d.open()
	if err != nil {
		return err
	}
	defer h.Close()
	states, err := h.memory.all()
	if err != nil {
		return err
	}
	states = slices.DeleteFunc(states, func(s State) bool { return name != "" && s.Name != name || !allowed(v, d.group, s.Allow) })
	if name != "" && len(states) == 0 {
		return ErrUnknown
	}
	var rows []any
	for _, s := range states {
		if verb == "list" {
			row, err := h.row(s, nil)
			if err != nil {
				return err
			}
			rows = append(rows, row)
			continue
		}
		programs, err := h.Programs(s.Name)
		if err != nil && !errors.Is(err, ErrUnknown) { // it goes now
			return err
		}
		for _, p := range programs {
			if p.UID == v.uid || v.uid == 0 {
				p.Command = p.Command[:min(len(p.Command), maxCommand)]
				rows = append(rows, p)
			}
		}
	}
	for _, row := range append(rows, nil) {
		text, err := json.Marshal(row)
		if row == nil {
			text = []byte(theEnd)
		}
		if err == nil {
			err = conn.SetDeadline(time.Now().Add(doorPatience)) // each message has its time
		}
		if err == nil {
			_, err = conn.Write(text)
		}
		if err != nil {
			return err
		}
	}
	return nil
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

// EntererPath is the path of table-allocator-enter, which is installed beside this program.
func EntererPath() (string, error) {
	self, err := os.Executable()
	return filepath.Join(filepath.Dir(self), "table-allocator-enter"), err
}
