package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// makeIn runs make in the module's directory.
func makeIn(t *testing.T, args ...string) {
	t.Helper()
	dir, err := binDir()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("make", append([]string{"-C", "../..", "BIN=" + dir}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("make %q: %v\n%s", args, err, out)
	}
}

// files are the files below dir: mode and path, and where a link leads.
func files(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%o %s", info.Mode().Perm(), strings.TrimPrefix(path, dir))
		if d.Type() == fs.ModeSymlink {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line = strings.TrimPrefix(path, dir) + " -> " + target
		}
		list = append(list, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestInstall(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a folder")
	makeIn(t, "install", "DESTDIR="+dir)
	want := []string{
		"755 /usr/local/sbin/table-allocator-server",
		"755 /usr/local/sbin/table-allocator-client",
		"755 /usr/local/sbin/table-allocator-enter",
		"/usr/local/sbin/tactl -> table-allocator-client",
		"/usr/local/share/man/man8/tactl.8 -> table-allocator-client.8",
		"/usr/local/sbin/table_allocator_server -> table-allocator-server",
		"/usr/local/sbin/table_allocator_client -> table-allocator-client",
		"644 /usr/local/lib/table-allocator/hook.sh",
		"755 /usr/local/lib/table-allocator/udev-remove",
		"644 /usr/local/lib/udev/rules.d/90-table-allocator.rules",
		"644 /etc/dhcp/dhclient-enter-hooks.d/table-allocator",
		"644 /usr/lib/dhcpcd/dhcpcd-hooks/60-table-allocator",
		"755 /usr/local/lib/table-allocator/udhcpc",
		"755 /etc/ppp/ip-up.d/table-allocator",
		"755 /etc/network/if-up.d/table-allocator",
		"755 /etc/network/if-post-down.d/table-allocator",
		"755 /etc/NetworkManager/dispatcher.d/table-allocator",
		"644 /usr/local/share/doc/table-allocator/examples/dnsmasq.conf",
		"644 /usr/local/lib/systemd/system/table-allocator-server.service",
		"644 /usr/local/lib/systemd/system/table-allocator-server.socket",
		"644 /usr/local/lib/systemd/system/table-allocator-watch.service",
		"644 /usr/local/lib/systemd/system/table-allocator-netns.service",
		"644 /usr/local/lib/systemd/system/table-allocator-netns.socket",
		"644 /usr/local/lib/systemd/system/table-allocator-metrics.service",
		"644 /usr/local/lib/systemd/system/table-allocator-metrics.timer",
		"644 /etc/firewalld/zones/table-allocator.xml",
		"644 /usr/local/lib/systemd/networkd.conf.d/table-allocator.conf",
		"644 /usr/local/lib/sysctl.d/60-table-allocator.conf",
		"644 /usr/local/lib/sysusers.d/table-allocator.conf",
		"644 /etc/iproute2/rt_protos.d/table-allocator.conf",
		"/etc/iproute2/rt_tables.d/table-allocator.conf -> /run/table-allocator/rt_tables.conf",
		"644 /usr/local/share/man/man8/table-allocator-server.8",
		"644 /usr/local/share/man/man8/table-allocator-client.8",
		"644 /usr/local/share/man/man8/table-allocator-enter.8",
		"644 /usr/local/share/man/man8/table-allocator-run.8",
		"644 /usr/local/share/man/man8/table-allocator-status.8",
		"644 /usr/local/share/man/man5/table-allocator.conf.5",
		"644 /usr/local/share/man/man8/table-allocator-watch.8",
		"644 /usr/local/share/man/man8/table-allocator-explain.8",
		"644 /usr/local/share/man/man8/table-allocator-netns.8",
		"644 /usr/local/share/bash-completion/completions/tactl",
		"644 /etc/fish/completions/tactl.fish",
		"644 /usr/local/share/bash-completion/completions/table-allocator-server",
		"644 /usr/local/share/bash-completion/completions/table-allocator-client",
		"644 /usr/local/share/zsh/site-functions/_table-allocator",
		"644 /etc/fish/completions/table-allocator-server.fish",
		"644 /etc/fish/completions/table-allocator-client.fish",
		"644 /etc/table-allocator/server.json",
		"644 /etc/table-allocator/watch.json",
		"644 /etc/table-allocator/netns.json",
		"644 /etc/default/table-allocator",
	}
	if diff := unordered(files(t, dir), want); diff != "" {
		t.Errorf("installed: %s", diff)
	}
	placeholder := regexp.MustCompile(`@[A-Z]+@`)
	for _, line := range want {
		_, path, _ := strings.Cut(line, " ")
		if strings.HasPrefix(line, "/") || strings.Contains(path, "/sbin/") {
			continue
		}
		text, err := os.ReadFile(dir + path)
		if err != nil {
			t.Fatal(err)
		}
		if found := placeholder.Find(text); found != nil {
			t.Errorf("%s contains %s", path, found)
		}
	}

	config := filepath.Join(dir, "etc/default/table-allocator")
	const mine = "ROUTES=copy\n"
	if err := os.WriteFile(config, []byte(mine), 0o644); err != nil {
		t.Fatal(err)
	}
	makeIn(t, "install", "DESTDIR="+dir)
	if got, err := os.ReadFile(config); err != nil || string(got) != mine {
		t.Errorf("configuration after a second install: %q, %v", got, err)
	}
	makeIn(t, "uninstall", "DESTDIR="+dir)
	if diff := unordered(files(t, dir), []string{"644 /etc/default/table-allocator"}); diff != "" {
		t.Errorf("left by uninstall: %s", diff)
	}
	makeIn(t, "uninstall", "DESTDIR="+dir) // nothing is there, and that is fine
	for _, own := range []string{"/usr/local/lib/table-allocator", "/usr/local/share/doc/table-allocator", "/etc/table-allocator"} {
		if _, err := os.Stat(dir + own); err == nil {
			t.Errorf("uninstall leaves the empty directory %s", own)
		}
	}
}

// TestInstallReadOnly: where dhcpcd's directory cannot be written, as on a system with a read-only /usr, all else is installed.
func TestInstallReadOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/usr/lib/dhcpcd", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/sys/kernel", dir+"/usr/lib/dhcpcd/dhcpcd-hooks"); err != nil {
		t.Fatal(err)
	}
	makeIn(t, "install", "DESTDIR="+dir)
	if all := files(t, dir); !slices.Contains(all, "644 /etc/default/table-allocator") || !slices.Contains(all, "755 /etc/network/if-up.d/table-allocator") {
		t.Errorf("installed: %q", all)
	}
	makeIn(t, "uninstall", "DESTDIR="+dir)
	if diff := unordered(files(t, dir), []string{"/usr/lib/dhcpcd/dhcpcd-hooks -> /sys/kernel"}); diff != "" {
		t.Errorf("left by uninstall: %s", diff)
	}
}

// TestInstallSpaces: where a space would name other folders, nothing is installed, removed or built.
func TestInstallSpaces(t *testing.T) {
	t.Parallel()
	checkout := filepath.Join(t.TempDir(), "a checkout")
	for _, name := range []string{"Makefile", "packaging/package/build.mk"} {
		text, err := os.ReadFile("../../" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(checkout, name)), 0o755), os.WriteFile(filepath.Join(checkout, name), text, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ args, want string }{
		{"install PREFIX=/opt/a+b DESTDIR=/tmp/none", "PREFIX has a space"},
		{"uninstall PREFIX=/opt/a+b DESTDIR=/tmp/none", "PREFIX has a space"},
		{"install SYSCONFDIR=/etc/a+b DESTDIR=/tmp/none", "SYSCONFDIR has a space"},
		{"stage-amd64 --old-file=needs-go", "CURDIR has a space"},
	} {
		args := strings.Fields(tt.args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "+", " ")
		}
		out, err := exec.Command("make", append([]string{"-C", checkout}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), tt.want) || strings.Contains(string(out), "rm -") {
			t.Errorf("make %q: %v\n%s", args, err, out)
		}
	}
}

// The configuration that is installed is one, and it changes nothing.
func TestInstalledConfiguration(t *testing.T) {
	h := newHost(t)
	if r := h.run(bin(t, serverBin), "--check", "-c", "../../packaging/server.json"); r.code != 0 {
		t.Errorf("server.json: %s", r.stderr)
	}
	if r := h.run("sh", "-euc", ". ../../packaging/default; set | grep -E '^(ROUTES|DNSMASQ|LEAVE|CLIENT_OPT)' || true"); r.code != 0 || r.stdout != "" {
		t.Errorf("default: exit code %d, sets %q, %s", r.code, r.stdout, r.stderr)
	}
}

// What the host's programs read of ours says to them what it should.
func TestInstalledSnippets(t *testing.T) {
	s := newSite(t)
	s.ns.IP(t, "rule add from 192.0.2.1 lookup 10000 protocol 116")
	if got := s.sh("ip rule"); !strings.Contains(got, "proto table-allocator") {
		t.Errorf("ip does not know the mark: %s", got)
	}
	s.sh("sysctl --load /usr/local/lib/sysctl.d/60-table-allocator.conf")
	if got := strings.TrimSpace(s.sh("sysctl -n net.unix.max_dgram_qlen")); got != "512" {
		t.Errorf("net.unix.max_dgram_qlen is %s", got)
	}
	for _, name := range []string{"server", "client"} {
		if got, want := s.sh("table_allocator_"+name+" --version"), s.sh("table-allocator-"+name+" --version"); got != want {
			t.Errorf("table_allocator_%s is version %q, want %q", name, got, want)
		}
	}
}

// Every option is in the manual page and in the completions.
func TestInstalledOptions(t *testing.T) {
	h := newHost(t)
	option := regexp.MustCompile(`--[a-z][a-z-]*`)
	for _, command := range []struct {
		name string
		args []string
		page string
	}{
		{serverBin, nil, serverBin}, {clientBin, []string{"-4"}, clientBin},
		{clientBin, []string{"run"}, "table-allocator-run"}, {clientBin, []string{"attach"}, "table-allocator-run"},
		{clientBin, []string{"detach"}, "table-allocator-run"}, {clientBin, []string{"bound"}, "table-allocator-run"},
		{clientBin, []string{"bind"}, "table-allocator-run"}, {clientBin, []string{"unbind"}, "table-allocator-run"},
		{clientBin, []string{"watch"}, "table-allocator-watch"}, {clientBin, []string{"status"}, "table-allocator-status"}, {clientBin, []string{"uplinks"}, "table-allocator-watch"},
		{clientBin, []string{"release"}, clientBin}, {clientBin, []string{"reexec"}, clientBin}, {clientBin, []string{"history"}, "table-allocator-status"}, {clientBin, []string{"explain"}, "table-allocator-explain"}, {clientBin, []string{"doctor"}, "table-allocator-explain"},
	} {
		name := command.name
		help := h.run(bin(t, name), append(command.args, "--help")...).stdout
		options := option.FindAllString(help, -1)
		if len(options) < 4 {
			t.Fatalf("%s --help: %q", name, help)
		}
		for _, file := range []string{"man/" + command.page + ".8", "completion/bash", "completion/zsh", "completion/fish"} {
			text, err := os.ReadFile("../../packaging/" + file)
			if err != nil {
				t.Fatal(err)
			}
			text = bytes.ReplaceAll(text, []byte(`\-`), []byte("-"))
			for _, o := range options {
				spelled := regexp.MustCompile(regexp.QuoteMeta(o) + `([^a-z-]|$)`)
				if strings.HasSuffix(file, "fish") {
					spelled = regexp.MustCompile(`-l ` + strings.TrimPrefix(o, "--") + ` `)
				}
				if !spelled.Match(text) {
					t.Errorf("%s does not tell of %s %s", file, name, o)
				}
			}
		}
	}
}

// systemd, where the machine has it, finds nothing to say about the units, nor man about
// the manual pages.
func TestInstalledUnits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	makeIn(t, "install", "DESTDIR="+dir)
	units := filepath.Join(dir, "usr/local/lib/systemd/system")
	service := filepath.Join(units, "table-allocator-server.service")
	text, err := os.ReadFile(service)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"ExecStart=/usr/local/sbin/table-allocator-server -c /etc/table-allocator/server.json",
		"CapabilityBoundingSet=", "RestrictAddressFamilies=AF_UNIX AF_NETLINK",
		"Before=network-pre.target networking.service NetworkManager.service systemd-networkd.service",
	} {
		if !strings.Contains(string(text), line+"\n") {
			t.Errorf("the service lacks %s", line)
		}
	}
	check := func(name string, args ...string) {
		if _, err := exec.LookPath(name); err != nil {
			t.Logf("there is no %s here", name)
			return
		}
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Errorf("%s %q: %v\n%s", name, args, err, out)
		}
	}
	// It looks for the command in its place.
	if _, err := installed(); err != nil {
		t.Fatal(err)
	}
	check("systemd-analyze", "verify", "--man=no", service, filepath.Join(units, "table-allocator-server.socket"))
	pages, err := filepath.Glob(filepath.Join(dir, "usr/local/share/man/man?/*"))
	if err != nil || len(pages) != 10 { // and a link for tactl
		t.Fatalf("manual pages: %q, %v", pages, err)
	}
	for _, page := range pages {
		check("sh", "-c", `! command -v man >/dev/null || man --warnings -E UTF-8 -l -Tutf8 -Z "$1" >/dev/null`, "sh", page)
	}
}

// The scripts are for /bin/sh of Debian.
func TestHooksSyntax(t *testing.T) {
	t.Parallel()
	scripts, err := filepath.Glob("../../hooks/*/*")
	if err != nil {
		t.Fatal(err)
	}
	scripts = append(scripts, "../../hooks/hook.sh", "../../packaging/default")
	checked := 0
	for _, script := range scripts {
		if strings.HasSuffix(script, ".conf") || strings.HasSuffix(script, ".rules") {
			continue
		}
		checked++
		if out, err := exec.Command("dash", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("dash -n %s: %v\n%s", script, err, out)
		}
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"bash", "ipcalc", "mktemp", "/tmp"} {
			if strings.Contains(string(text), word) {
				t.Errorf("%s uses %s", script, word)
			}
		}
	}
	if checked != 9 {
		t.Errorf("checked %d scripts", checked)
	}
}
