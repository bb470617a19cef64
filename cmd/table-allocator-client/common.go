package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"

	"github.com/table-allocator/table-allocator/internal/cgroup"
	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/wire"
)

const defaultServer = "tas_socket"

func parseUser(name string) (uint32, error) {
	if u, err := user.Lookup(name); err == nil {
		name = u.Uid
	}
	uid, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, errors.New("no such user")
	}
	if uint32(uid) == wire.OverflowID() {
		return 0, errors.New("it stands for everybody of another user namespace, and is never trusted")
	}
	return uint32(uid), nil
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "table-allocator-client:", err)
	return cli.ExitError
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, "table-allocator-client:", err)
	return exitFailed
}

// tell says what the kernel lacks.
func tell(missing []cgroup.Missing) {
	for _, m := range missing {
		fmt.Fprintf(os.Stderr, "table-allocator-client: this kernel does not take BPF program %s, so %s: %v\n", m.Program, m.Lost, m.Err)
	}
}
