package cgroup

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Features returns what the kernel lacks for bound processes: it loads each program, and attaches none. The error says why
// it cannot be tried, for who has no right to load programs.
func Features() (missing []Missing, err error) {
	m := Mark{Value: 2, Mask: 3}
	lockMap, err := newLockMap()
	if errors.Is(err, unix.EPERM) {
		return nil, err
	}
	if err != nil {
		return []Missing{{"ta_lock", ErrUnsupported.Error(), err}}, nil
	}
	lock := &Lock{lockMap}
	defer lock.Close()
	all := hooks(m, lock)
	for i := range all {
		program, err := load(&all[i].spec)
		switch {
		case err == nil:
			program.Close()
		case errors.Is(err, unix.EPERM):
			return nil, err
		default:
			lost := all[i].lost
			if all[i].needed != nil {
				lost = all[i].needed.Error()
			}
			missing = append(missing, Missing{all[i].spec.Name, lost, fmt.Errorf("try a feature: %w", err)})
		}
	}
	return missing, nil
}
