package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestBindResolv: a program on a link has a resolv.conf of its own if it is told so, and is told if the host's cannot
// work.
func TestBindResolv(t *testing.T) {
	c := newCrossingAlone(t)
	c.serve()
	c.watch("--config", c.watchFile(`{"links":[{"ifname":"wan1","nameservers":["10.2.0.53","fd02::53","fe80::53"]},{"ifname":"wan0"}]}`))
	c.waitTables(0)
	c.waitTables(1)
	dir := t.TempDir()
	host, file := filepath.Join(dir, "host"), filepath.Join(dir, "file")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(host, "nameserver 10.1.0.1\nsearch example\noptions timeout:1\n")
	write(file, "nameserver 192.0.2.53\n")
	if r := c.run(c.here("mount").Path, "--target="+c.inner, "--mount", "mount", "--bind", host, "/etc/resolv.conf"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	read := func(want string, stderr string, options ...string) {
		t.Helper()
		r := c.do(append(append([]string{"run", "--ifname", "wan1"}, options...), "cat", "/etc/resolv.conf")...)
		if r.code != 0 || r.stdout != want || !strings.Contains(r.stderr, stderr) || stderr == "" && r.stderr != "" {
			t.Errorf("%q: got %+v, want %q and %q", options, r, want, stderr)
		}
	}
	const hosts = "nameserver 10.1.0.1\nsearch example\noptions timeout:1\n"
	read("nameserver 10.2.0.53\nnameserver fd02::53\nnameserver fe80::53%wan1\nsearch example\noptions timeout:1\n", "", "--resolv", "uplink")
	read("nameserver 192.0.2.53\n", "", "--resolv", file)
	read(hosts, "10.1.0.1, which is behind wan0")
	for _, zone := range []string{"wan0", strconv.Itoa(c.ifindex("wan0"))} {
		text := "nameserver fe80::1%" + zone + "\n"
		write(host, text)
		read(text, "fe80::1%"+zone+", which is behind wan0")
	}
	for _, text := range []string{"nameserver fe80::1%wan1\n", "nameserver 127.0.0.53\n", "nameserver 10.2.0.1\n", "nameserver 9.9.9.9\n", "nameserver 10.1.0.1\nnameserver 9.9.9.9\n", "# none\n"} {
		write(host, text)
		read(text, "")
	}
	if left, err := filepath.Glob("/run/table-allocator-resolv-*"); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	for _, tt := range [][3]string{{"wan0", "uplink", "--resolv FILE"}, {"wan1", dir, "regular file"}, {"wan1", dir + "/none", "no such file"}} {
		r := c.do("run", "--ifname", tt[0], "--resolv", tt[1], "echo", "it runs")
		if r.code != 125 || r.stdout != "" || !strings.Contains(r.stderr, tt[2]) {
			t.Errorf("--resolv %s for %s: %+v, want %q", tt[1], tt[0], r, tt[2])
		}
	}
}
