package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// peers compares the watch and the hooks with what people use instead, with the real daemons on machines that boot. A test
// of internal/integration does the work, since it has these machines; its table is printed here.
func peers(flaps int, original string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("-only peers boots machines in namespaces, which needs root")
	}
	if original != "" { // the test's machine has another /tmp, and the module in common with this one
		shared, err := os.MkdirTemp(".cache", "original")
		if err != nil {
			return err
		}
		defer os.RemoveAll(shared) // what is left is in the cache
		if original, err = share(original, shared); err != nil {
			return err
		}
	}
	cmd := exec.Command("go", "test", "-tags", "integration", "-count=1", "-timeout", "30m", "-v", "-run", "^TestPeers$", "./internal/integration")
	cmd.Env = append(os.Environ(), "PEERS_FLAPS="+strconv.Itoa(flaps), "PEERS_ORIGINAL="+original)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var rest []string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if row, ok := strings.CutPrefix(lines.Text(), "| "); ok {
			fmt.Println(row)
		} else {
			rest = append(rest, lines.Text())
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("compare with peers: %w\n%s", err, strings.Join(rest, "\n"))
	}
	return lines.Err()
}

// share copies the commands of the C original, and its hook of dhclient, to another directory, and returns its absolute path.
func share(dir, to string) (string, error) {
	for _, name := range []string{"table_allocator_server", "table_allocator_client", "multihomed-routing.sh"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(to, name), text, 0o755); err != nil {
			return "", err
		}
	}
	return filepath.Abs(to)
}
