package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestProcessNames: ps and top show what a process is, in the foreground and in the background; arguments and
// executable stay.
func TestProcessNames(t *testing.T) {
	h := newHost(t)
	h.link("eth0", "10.9.0.1/24", "10.9.0.2/24", "10.9.0.3/24")
	server := h.serve()
	link := filepath.Join(h.dir, "table_allocator_client")
	if err := os.Symlink(bin(t, clientBin), link); err != nil {
		t.Fatal(err)
	}
	h.shell("$CLIENT -4 -a 10.9.0.1 -n 255.255.255.0 -i eth0; " + link + " -4 -a 10.9.0.2 -n 255.255.255.0 -i eth0")
	watch := h.watch("--ifname", "eth0")
	h.served("10.9.0.3")
	got := make(map[string]int)
	for _, pid := range append(h.waitClients(3), server.cmd.Process.Pid) {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			t.Fatal(err)
		}
		got[strings.TrimSpace(string(comm))]++
		if pid != watch.cmd.Process.Pid {
			continue
		}
		if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || !strings.HasPrefix(string(args), bin(t, clientBin)+"\x00watch\x00") {
			t.Errorf("arguments of the watch: %q, %v", args, err)
		}
	}
	if want := map[string]int{"ta-server": 1, "ta-watch": 1, "ta-client": 1, "table_allocator": 1}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("names of processes: got %v, want %v", got, want)
	}
	if r := h.run(bin(t, clientBin), "status", "--no-legend"); strings.Count(r.stdout, "10.9.0.") != 3 {
		t.Errorf("status: %+v", r)
	}
}
