package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// PinRoot has a directory for each interface whose programs are pinned.
const PinRoot = "/sys/fs/bpf/table-allocator"

// pinNames are what systemd calls the hooks, in BPFProgram=.
var pinNames = map[ebpf.AttachType]string{
	ebpf.AttachCGroupInetSockCreate: "sock_create",
	ebpf.AttachCGroupInet4Connect:   "connect4",
	ebpf.AttachCGroupInet6Connect:   "connect6",
	ebpf.AttachCGroupInetEgress:     "egress",
	ebpf.AttachCGroupInetIngress:    "ingress",
	ebpf.AttachCGroupSetsockopt:     "setsockopt",
}

// Pin gives the programs for an uplink names in the bpf file system, until the next boot, for others
// who attach them: systemd does so for a unit before its first process runs. It returns values for the
// unit's BPFProgram=, "sock_create:/sys/fs/bpf/...".
func Pin(u Uplink, m Mark) (values []string, missing []Missing, err error) {
	if err := errors.Join(u.Check(), m.check()); err != nil {
		return nil, nil, err
	}
	if !isBPF(filepath.Dir(PinRoot)) {
		if _, err := mountBPF(); err != nil {
			return nil, nil, err
		}
	}
	lock, err := lockFor(m)
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	dir := filepath.Join(PinRoot, u.String())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	all := hooks(m, lock)
	for i := range all {
		h := &all[i]
		name := pinNames[h.spec.AttachType]
		if err := h.pin(filepath.Join(dir, name)); err != nil && h.needed != nil {
			return nil, nil, fmt.Errorf("%w: %w", h.needed, err)
		} else if err != nil {
			missing = append(missing, Missing{h.spec.Name, h.lost, err})
			continue
		}
		values = append(values, name+":"+filepath.Join(dir, name))
	}
	return values, missing, removeRetired(dir)
}

// removeRetired removes the programs that versions before this one pinned.
func removeRetired(dir string) error {
	for _, name := range []string{"bind4", "bind6", "sendmsg4", "sendmsg6", "sock_ops"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// pin puts the program at the path in place of whatever is there.
func (h *hook) pin(path string) error {
	program, err := load(&h.spec)
	if err != nil {
		return err
	}
	defer program.Close()
	fresh := path + "-new" // no dots: bpffs keeps names with them for itself
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := program.Pin(fresh); err != nil {
		return fmt.Errorf("pin BPF program at %s: %w", fresh, err)
	}
	return os.Rename(fresh, path)
}

// Unpin undoes Pin. Units that run keep the programs.
func Unpin(u Uplink) error {
	if err := u.Check(); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(filepath.Join(PinRoot, u.String())), removeIfEmpty(PinRoot))
}

func removeIfEmpty(dir string) error {
	err := os.Remove(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) {
		return nil
	}
	return err
}

// Pinned returns whose programs are pinned.
func Pinned() ([]Uplink, error) { return uplinksIn(PinRoot) }

// Interfaces returns which interfaces have a cgroup of their own.
func (c *Cgroups) Interfaces() ([]Uplink, error) { return uplinksIn(c.file(rootName)) }

// uplinksIn returns those that have a directory in dir.
func uplinksIn(dir string) ([]Uplink, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) { // none, or the host's: see bpfDir
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var uplinks []Uplink
	for _, e := range entries {
		if u, ok := parseUplink(e.Name()); ok && e.IsDir() {
			uplinks = append(uplinks, u)
		}
	}
	return uplinks, nil
}
