package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// attachAlone loads a BPF program that allows everything, and attaches it to a cgroup so that no other may be beside it.
const attachAlone = `
import ctypes, os, struct, sys
directory, kind, hook = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
def bpf(command, *words):
    attr = ctypes.create_string_buffer(b"".join(words), 128)
    got = libc.syscall(number, command, attr, 128)
    if got < 0: raise OSError(ctypes.get_errno(), "bpf")
    return got
allow = ctypes.create_string_buffer(bytes([0xb7, 0, 0, 0, 1, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0]))
mit = ctypes.create_string_buffer(b"MIT")
program = bpf(5, struct.pack("=IIQQ", kind, 2, ctypes.addressof(allow), ctypes.addressof(mit)), bytes(24), b"stranger".ljust(16, b"\0"), struct.pack("=II", 0, hook))
bpf(8, struct.pack("=IIII", os.open(directory, os.O_RDONLY), program, hook, 0))`

// TestBindExclusive: run below a cgroup where another program is attached alone names that program and the cgroup. Where the
// lock or the mark would be missing it does not start its command; where something else is, it says what.
func TestBindExclusive(t *testing.T) {
	c := newCrossing(t)
	for _, tt := range []struct {
		name, kind, hook string // of linux/bpf.h
		code             int
	}{{"sock_create", "9", "2", 125}, {"egress", "8", "1", 125}, {"ingress", "8", "0", 0}, {"setsockopt", "25", "22", 0}, {"connect4", "18", "10", 0}, {"connect6", "18", "11", 0}} {
		dir := filepath.Join(c.cgroup, tt.name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if r := c.run("python3", "-c", attachAlone, dir, tt.kind, tt.hook); r.code != 0 {
			t.Fatalf("%s: %+v", tt.name, r)
		}
		cmd := c.here("sh", "-c", `echo 0 >"/sys/fs/cgroup/$0/cgroup.procs" && exec "$@"`, tt.name, bin(t, clientBin), "run", "--ifname", "wan1", "echo", "executed")
		r := c.run(cmd.Args[0], cmd.Args[1:]...)
		if r.code != tt.code || (r.stdout == "executed\n") != (tt.code == 0) {
			t.Errorf("%s: %+v", tt.name, r)
		}
		for _, want := range []string{`"stranger"`, "/sys/fs/cgroup/" + tt.name, "alone"} {
			if !strings.Contains(r.stderr, want) {
				t.Errorf("%s: %q lacks %q", tt.name, r.stderr, want)
			}
		}
	}
}
