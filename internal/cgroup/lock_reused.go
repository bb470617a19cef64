package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// EmptyReused empties the lock of this network namespace if the lock may be that of a namespace that ended: its name is an
// inode number, which is used again, and unused says that nothing is bound here. Before Linux 5.14 there is no better name.
func EmptyReused(unused func() (bool, error)) error {
	name, namespace, err := lockName()
	if err != nil || !strings.HasPrefix(name, inodePrefix) {
		return err
	}
	l, err := OpenLock()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if empty, err := unused(); err != nil || !empty {
		return err
	}
	var old []lockKey
	if err := l.each(func(k lockKey, _ uint32) { old = append(old, k) }); err != nil {
		return fmt.Errorf("read the lock: %w", err)
	}
	for _, k := range old {
		if err := l.remove(k); err != nil {
			return err
		}
	}
	return l.m.Put(namespaceKey(namespace), pidNamespace())
}
