package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestChoiceOnChange: the program of on_change is executed when the kernel has the choice, and for each state.
func TestChoiceOnChange(t *testing.T) {
	dir, err := os.MkdirTemp("/etc", "changed") // a program in /tmp is refused
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program, out := filepath.Join(dir, "changed"), filepath.Join(dir, "out")
	const script = `#!/bin/sh
if [ "$TA_EVENT" = unbound ]; then
	rules=$(ip -f "$TA_FAMILY" rule show priority 90000 | tr -s ' \t' ' ')
	echo "unbound $TA_FAMILY $TA_FROM-$TA_TO $TA_IFNAME $TA_ADDRESS $TA_GATEWAY $TA_TABLE: $rules" >>OUT
else
	echo "$TA_EVENT $TA_FAMILY $TA_IFNAME $TA_ADDRESS $TA_OLD_STATE-$TA_STATE" >>OUT
fi
`
	if err := nettest.WriteExecutable(program, []byte(strings.ReplaceAll(script, "OUT", out))); err != nil {
		t.Fatal(err)
	}
	c := newChooser(t, copyLinks, fmt.Sprintf(`"on_change": %q`, program))
	report := c.waitUsed("wan0")
	tables := make(map[string]uint32)
	for _, u := range report.Uplinks {
		tables[u.Address] = u.Table
	}
	wait := func(line string) {
		t.Helper()
		eventually(t, "the program was told "+line, func() error {
			text, err := os.ReadFile(out)
			if err == nil && !strings.Contains(string(text), line) {
				err = fmt.Errorf("it has %q", text)
			}
			return err
		})
	}
	unbound := func(family, from, to, addr, gateway string) {
		t.Helper()
		wait(fmt.Sprintf("unbound %s %s-%s %s %s %s %d: 90000: from all iif lo lookup %d", family, from, to, to, addr, gateway, tables[addr], tables[addr]))
	}
	c.fault(0, noInternet)
	unbound("inet", "wan0", "wan1", "10.2.0.2", "10.2.0.1")
	unbound("inet6", "wan0", "wan1", "fd02::2", "fd02::1")
	wait("state inet wan0 10.1.0.2 alive-dead")
	before := len(readFile(t, out))
	// One that others can write is not executed, and the log says so.
	if err := os.Chmod(program, 0o777); err != nil {
		t.Fatal(err)
	}
	c.mend(0)
	c.watch.waitLog("is writable for others than root")
	c.waitUnbound(0)
	if text := readFile(t, out)[before:]; strings.Contains(text, "wan1-wan0") {
		t.Errorf("a program that others can write was executed: %s", text)
	}
}
