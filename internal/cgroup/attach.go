package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A Missing is a program that the kernel did not take.
type Missing struct {
	Program string
	Lost    string // what is not covered without it
	Err     error
}

// allowMulti lets programs of others, and those of cgroups above and below, run as well.
const allowMulti = 1 << 1 // BPF_F_ALLOW_MULTI

// install makes the programs of the cgroup equal to hooks and returns those that the kernel does not
// take. Without one that is needed it returns the error of that.
//
// They are attached without a link, whose end, or the end of its pin, would be theirs: so they stay
// whatever becomes of us, and go with the cgroup.
func install(cgroup *os.File, hooks []hook) ([]Missing, error) {
	var missing []Missing
	for i := range hooks {
		h := &hooks[i]
		err := h.install(int(cgroup.Fd()))
		if errors.Is(err, unix.EPERM) {
			err = h.blame(cgroup, err)
		}
		switch {
		case err == nil:
		case errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT): // the cgroup was removed
			return nil, err
		case h.needed == nil:
			missing = append(missing, Missing{h.spec.Name, h.lost, err})
		case errors.Is(err, errExclusive) && h.needed == ErrUnsupported:
			return nil, err
		default:
			return nil, fmt.Errorf("%w: %w", h.needed, err)
		}
	}
	for name, at := range retired { // now that the others are there
		have, err := attached(int(cgroup.Fd()), at, name)
		if err != nil {
			return nil, err
		}
		err = have.detach(int(cgroup.Fd()), at, -1)
		have.close()
		if err != nil {
			return nil, err
		}
	}
	return missing, nil
}

func installAt(dir string, hooks []hook) ([]Missing, error) {
	open, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer open.Close()
	return install(open, hooks)
}

func (h *hook) install(cgroup int) error {
	have, err := attached(cgroup, h.spec.AttachType, h.spec.Name)
	if err != nil {
		return err
	}
	defer have.close()
	for i, p := range have {
		if h.spec.Compatible(p.info) == nil && h.reads(p.info) {
			// Others of ours here would be of a process that attached at the same time.
			return have.detach(cgroup, h.spec.AttachType, i)
		}
	}
	program, err := load(&h.spec)
	if err != nil {
		return err
	}
	defer program.Close()
	options := link.RawAttachProgramOptions{Target: cgroup, Program: program, Attach: h.spec.AttachType, Flags: allowMulti}
	if len(have) > 0 {
		options.Anchor = link.ReplaceProgram(have[0].program)
	}
	if err := link.RawAttachProgram(options); err == nil {
		return have.detach(cgroup, h.spec.AttachType, 0)
	} else if len(have) == 0 {
		return fmt.Errorf("attach BPF program %s: %w", h.spec.Name, err)
	}
	// Before Linux 5.6 there is no replacing.
	options.Anchor = nil
	if err := link.RawAttachProgram(options); err != nil {
		return fmt.Errorf("attach BPF program %s: %w", h.spec.Name, err)
	}
	return have.detach(cgroup, h.spec.AttachType, -1)
}

// reads reports whether a program with the code of h reads the same map. The kernel's tag of a program leaves maps out.
func (h *hook) reads(info *ebpf.ProgramInfo) bool {
	maps, known := info.MapIDs()
	return h.lock == 0 || !known || slices.Contains(maps, h.lock)
}

// errExclusive says that another program wants to be alone.
var errExclusive = errors.New("another program is attached there alone (without BPF_F_ALLOW_MULTI), which keeps all others out")

// blame names the program because of which the kernel refused one of ours with EPERM: that of a cgroup above, or of
// the cgroup itself, which is attached alone.
func (h *hook) blame(cgroup *os.File, refused error) error {
	for dir := cgroup.Name(); ; dir = filepath.Dir(dir) {
		var stat unix.Statfs_t
		if err := unix.Statfs(dir, &stat); err != nil || stat.Type != unix.CGROUP2_SUPER_MAGIC {
			return refused
		}
		if name, alone := attachedAlone(dir, h.spec.AttachType); alone {
			return fmt.Errorf("BPF program %q of another program at hook %s of cgroup %s: %w", name, pinNames[h.spec.AttachType], dir, errExclusive)
		}
	}
}

// attachedAlone returns the name of the program that is at a hook of a cgroup without allowMulti.
func attachedAlone(dir string, at ebpf.AttachType) (name string, alone bool) {
	file, err := os.Open(dir)
	if err != nil {
		return "", false
	}
	defer file.Close()
	var id uint32
	query := struct { // of union bpf_attr
		target, at, flags, attached uint32
		programs                    uint64
		count, _                    uint32
		_                           [4]uint64
	}{target: uint32(file.Fd()), at: uint32(at), programs: uint64(uintptr(unsafe.Pointer(&id))), count: 1}
	const command = 16 // BPF_PROG_QUERY
	_, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(&query)), unsafe.Sizeof(query))
	runtime.KeepAlive(&id)
	if errno != 0 || query.count == 0 || query.attached&allowMulti != 0 {
		return "", false
	}
	program, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return fmt.Sprintf("number %d", id), true
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil || info.Name == "" {
		return fmt.Sprintf("number %d", id), true
	}
	return info.Name, true
}

// ours are programs of ours at one hook of a cgroup.
type ours []struct {
	program *ebpf.Program
	info    *ebpf.ProgramInfo
}

func (o ours) close() {
	for _, p := range o {
		p.program.Close()
	}
}

// detach takes all but one of them away.
func (o ours) detach(cgroup int, at ebpf.AttachType, but int) error {
	for i, p := range o {
		if i == but {
			continue
		}
		err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: cgroup, Program: p.program, Attach: at})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("detach BPF program %s: %w", p.info.Name, err)
		}
	}
	return nil
}

// attached returns the programs of that name at a hook of the cgroup itself.
func attached(cgroup int, at ebpf.AttachType, name string) (have ours, err error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: cgroup, Attach: at})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
		return nil, nil // the kernel does not know the hook: loading will tell
	}
	if err != nil {
		return nil, fmt.Errorf("list BPF programs: %w", err)
	}
	for _, p := range result.Programs {
		program, err := ebpf.NewProgramFromID(p.ID)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			have.close()
			return nil, fmt.Errorf("open BPF program %d: %w", p.ID, err)
		}
		info, err := program.Info()
		if err != nil {
			program.Close()
			have.close()
			return nil, fmt.Errorf("look at BPF program %d: %w", p.ID, err)
		}
		if info.Name != name {
			program.Close()
			continue
		}
		have = append(have, struct {
			program *ebpf.Program
			info    *ebpf.ProgramInfo
		}{program, info})
	}
	return have, nil
}

// load gives a program to the kernel.
func load(spec *ebpf.ProgramSpec) (*ebpf.Program, error) {
	findNames()
	program, err := ebpf.NewProgramWithOptions(spec, ebpf.ProgramOptions{LogDisabled: true})
	if errors.Is(err, unix.EPERM) {
		// Before Linux 5.11 programs count as locked memory of the user.
		if again := withMemory(func() error {
			program, err = ebpf.NewProgramWithOptions(spec, ebpf.ProgramOptions{LogDisabled: true})
			return nil
		}); again != nil {
			return nil, again
		}
	}
	if err != nil {
		return nil, fmt.Errorf("load BPF program %s: %w", spec.Name, err)
	}
	return program, nil
}

// findNames finds out whether programs of this kernel have names, by which ours are told from those of others. The library
// asks the kernel once in a process, and takes a refusal for lack of locked memory for a kernel without names.
var findNames = sync.OnceFunc(func() {
	_ = withMemory(func() error { // who may not raise the limit keeps it: then loading fails for the same reason
		m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ta_names", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			return err
		}
		return m.Close()
	})
})

var memory sync.Mutex

// withMemory calls f without a limit on locked memory. The limit is put back: what we execute
// inherits it.
func withMemory(f func() error) error {
	memory.Lock()
	defer memory.Unlock()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before); err != nil {
		return fmt.Errorf("get limit of locked memory: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		return fmt.Errorf("raise limit of locked memory: %w", err)
	}
	return errors.Join(f(), unix.Setrlimit(unix.RLIMIT_MEMLOCK, &before))
}
