package nettest

import (
	"errors"
	"os"
	"syscall"
)

// WriteExecutable writes a program that can be executed at once. A child that this process forks while the file is open for
// writing has it open, too, until it executes its own program, and the kernel refuses to execute the file meanwhile (ETXTBSY).
// No program begins meanwhile, so the file is no FIFO, for whose reader it would wait.
func WriteExecutable(path string, text []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return errors.Join(os.WriteFile(path, text, 0o755), os.Chmod(path, 0o755)) // whatever the umask
}
