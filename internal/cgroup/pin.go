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
	ebpf.AttachCGroupInet4Bind:      "bind4",
	ebpf.AttachCGroupInet6Bind:      "bind6",
	ebpf.AttachCGroupUDP4Sendmsg:    "sendmsg4",
	ebpf.AttachCGroupUDP6Sendmsg:    "sendmsg6",
	ebpf.AttachCGroupSockOps:        "sock_ops",
	ebpf.AttachCGroupSetsockopt:     "setsockopt",
}

// Pin gives the programs for an uplink names in the bpf file system, until the next boot, for others
// who attach them: systemd does so for a unit before its first process runs. It returns values for the
// unit's BPFProgram=, "sock_create:/sys/fs/bpf/...".
func Pin(u Uplink, m Mark) (values []string, missing []Missing, err error) {
	if err := errors.Join(u.Check(), m.check()); err != nil {
		return nil, nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(PinRoot), &fs); err != nil || uint32(fs.Type) != unix.BPF_FS_MAGIC {
		return nil, nil, fmt.Errorf("no bpf file system at %[1]s: mount one with `mount -t bpf bpf %[1]s`", filepath.Dir(PinRoot))
	}
	dir := filepath.Join(PinRoot, u.String())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	all := hooks(m)
	for i := range all {
		h := &all[i]
		name := pinNames[h.spec.AttachType]
		if err := h.pin(filepath.Join(dir, name)); err != nil && i == 0 {
			return nil, nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
		} else if err != nil {
			missing = append(missing, Missing{h.spec.Name, h.lost, err})
			continue
		}
		values = append(values, name+":"+filepath.Join(dir, name))
	}
	return values, missing, nil
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
	if errors.Is(err, fs.ErrNotExist) {
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
