package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// Names that others choose: a terminal obeys what they say, or a script reads a line of its own in them.
const (
	reversed = "wan\u202e2"           // of a link that is served, with a character that has text run from right to left
	escaping = "w\x1b[31mx"           // of links that nobody can serve
	noUTF8   = "w\xff\xfe"            //
	comm     = "a\nINJECTED\x1b[2J"   // of a process
	dirName  = "dir\x1b[2J\xff\u009b" // of a directory
)

// wantPrints fails the test if an output has more than printable characters and the ends of its own lines.
func wantPrints(t *testing.T, what, output string) {
	t.Helper()
	if !utf8.ValidString(output) || strings.IndexFunc(output, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) >= 0 {
		t.Errorf("%s: %q", what, output)
	}
	for line := range strings.Lines(output) {
		if strings.HasPrefix(strings.TrimSpace(line), "INJECTED") {
			t.Errorf("%s: a line of another program's:\n%s", what, output)
		}
	}
}

// TestQuoting: every command quotes what others have named, also in JSON, and so do the logs.
func TestQuoting(t *testing.T) {
	c := newNamespaces(t)
	for i, name := range []string{reversed, escaping, noUTF8} {
		c.ns.Run(t, "ip", "link", "add", name, "type", "veth", "peer", "name", fmt.Sprint("plain", i))
		c.ns.IP(t, fmt.Sprintf("link set plain%d up", i))
		c.ns.Run(t, "ip", "link", "set", name, "up")
		c.ns.Run(t, "ip", "address", "add", fmt.Sprintf("10.5.%d.2/24", i), "dev", name)
		c.ns.Run(t, "ip", "route", "add", "default", "via", fmt.Sprintf("10.5.%d.1", i), "dev", name, "metric", fmt.Sprint(900+i))
	}
	c.served("10.5.0.2")
	dir := filepath.Join(c.dir, dirName)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, comm)
	c.sh(`cp /bin/sleep "` + program + `"`)
	odd := c.start(c.here(bin(t, clientBin), "run", "-i", reversed, "--on-loss", "block", "--", program, "1000"))
	loose := c.start(c.here(program, "1000"))
	c.must("netns", "add", "work", "--ifname", "wan1", "--resolv", "192.0.2.53")
	inside := c.start(c.here(bin(t, clientBin), "netns", "exec", "work", "--", program, "1000"))
	eventually(t, "the programs run", func() error {
		for _, p := range []*process{odd, loose, inside} {
			if name := readFile(t, fmt.Sprintf("/proc/%d/comm", p.cmd.Process.Pid)); name != comm+"\n" {
				return fmt.Errorf("%q", name)
			}
		}
		return nil
	})
	// The squatter of a holder's name, and a holder whose program was replaced.
	holder := filepath.Join(dir, "client")
	c.sh(`cp ` + bin(t, clientBin) + ` "` + holder + `"`)
	c.link("other0", "10.6.0.2/24")
	eventually(t, "another process holds the address", func() error {
		r := c.run(holder, "-4", "-a", "10.6.0.9", "-i", "other0", "-n", "24")
		if r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if err := os.Remove(holder); err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprint(loose.cmd.Process.Pid)
	commands := [][]string{
		{"status"}, {"status", "--json"}, {"status", "--no-legend"}, {"status", reversed}, {"status", escaping}, {"status", noUTF8},
		{"history"}, {"history", "--json"}, {"history", reversed}, {"uplinks"}, {"uplinks", "--json"}, {"uplinks", "use", escaping}, {"uplinks", "probe", reversed},
		{"explain", "9.9.9.9", "--all"}, {"explain", "9.9.9.9", "--from", "10.5.0.2"}, {"explain", "9.9.9.9", "--from", "10.5.1.2", "--json"},
		{"explain", "9.9.9.9", "-i", reversed}, {"explain", "9.9.9.9", "-i", escaping}, {"explain", "9.9.9.9", "--pid", pid},
		{"doctor"}, {"doctor", "--json"}, {"doctor", "--config", filepath.Join(dir, "none")},
		{"watch", "--check", filepath.Join(dir, "none")},
		{"bound"}, {"bound", "--json"}, {"bound", reversed}, {"bound", "--check", pid, fmt.Sprint(odd.cmd.Process.Pid)},
		{"netns", "list"}, {"netns", "list", "--json"}, {"netns", "ps"}, {"netns", "ps", "--json"}, {"netns", "add", escaping, "-i", noUTF8}, {"netns", "del", "work"},
		{"attach", "wan1", pid}, {"attach", escaping, pid}, {"detach", pid}, {"detach", noUTF8, pid},
		{"run", escaping, "true"}, {"run", "wan1", "--", filepath.Join(dir, "none")}, {"bind", "-i", escaping, "--uid", "7"}, {"unbind", "-i", noUTF8, "--uid", "7"},
		{"hook", dirName}, {"reexec"}, {"reexec", escaping}, {dirName}, {"help", escaping}, {"-4", "-a", "10.5.1.2", "-i", escaping}, {"-4", "-a", "10.5.2.2", "-i", noUTF8},
		{"-r", "-4", "-a", "10.5.0.2", "-i", reversed}, {"-t", "x" + dirName, "-4", "-a", "10.5.0.2", "-i", "wan0"},
		{"release", escaping}, {"release", reversed}, {"release", reversed, "--force"}, {"release", "--all"},
	}
	tried := make(map[string]bool)
	for _, args := range commands {
		tried[args[0]] = true
		r := c.do(args...)
		wantPrints(t, fmt.Sprintf("%q on standard output", args), r.stdout)
		wantPrints(t, fmt.Sprintf("%q on standard error", args), r.stderr)
	}
	for _, line := range regexp.MustCompile(`(?m)^  ([a-z]+) `).FindAllStringSubmatch(c.must("help"), -1) {
		if !tried[line[1]] {
			t.Errorf("the command %s is not tried", line[1])
		}
	}
	wantPrints(t, "the log of clients", c.clientLog())
}

// TestOddLinkNames: a link with any name that the kernel accepts is served, or a warning and status say why not.
func TestOddLinkNames(t *testing.T) {
	h := newHost(t)
	h.serve()
	served := []string{"$(reboot)", "a;b", "-h", "wän0", "*", "'", `"`, `\x`, "a|b&", "1", "main", "auto", reversed}
	refused := map[string]string{escaping: "contains the control character U+001B", noUTF8: "not UTF-8"}
	add := func(i int, name string) string {
		addr := fmt.Sprintf("10.5.%d.2", i)
		h.ns.Run(t, "ip", "link", "add", "name", name, "type", "veth", "peer", "name", fmt.Sprint("plain", i))
		h.ns.Batch(t, fmt.Sprintf("link set plain%d up", i))
		h.ns.Run(t, "ip", "link", "set", "dev", name, "up")
		h.ns.Run(t, "ip", "address", "add", addr+"/24", "dev", name)
		return addr
	}
	watch := h.watch("--exclude", "lo,plain*")
	for i, name := range served {
		h.served(add(i, name))
	}
	for name, why := range refused {
		addr := add(len(served), name)
		served = append(served, name)
		watch.waitLog(why)
		eventually(t, "status says why", func() error {
			r := h.run(bin(t, clientBin), "status")
			for line := range strings.Lines(r.stdout) {
				if strings.Contains(line, addr) && strings.Contains(line, why) {
					return nil
				}
			}
			return fmt.Errorf("%+v", r)
		})
	}
	for i := range served {
		h.ns.IP(t, fmt.Sprintf("link del plain%d", i))
	}
	watch.stop()
	wantPrints(t, "the log of the watch", watch.log.String())
}
