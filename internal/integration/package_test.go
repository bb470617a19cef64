//go:build integration

// Package integration has the tests that take long or need much: packages, and machines that boot a Debian with
// its systemd. make integration runs them.
package integration

import (
	"bytes"
	"debug/buildinfo"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// An arch is an architecture for which packages are made, by the names that Go, Debian, rpm and ELF have for it.
type arch struct {
	golang, debian, rpm string
	elf                 elf.Machine
}

var arches = []arch{
	{"amd64", "amd64", "x86_64", elf.EM_X86_64},
	{"arm64", "arm64", "aarch64", elf.EM_AARCH64},
	{"arm", "armhf", "armv7hl", elf.EM_ARM},
}

// own is the place of this machine's architecture in the list.
var own = slices.IndexFunc(arches, func(a arch) bool { return a.golang == runtime.GOARCH })

func TestMain(m *testing.M) {
	if !nettest.InSandbox() && os.Geteuid() == 0 {
		err := nettest.MakeDebian("", roots()...)
		if err == nil && full {
			err = buildTailscale()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	nettest.Main(m, "lintian", "rpm", "rpmlint")
}

// copyModule copies the module to a directory.
func copyModule(dir string) error {
	const script = `git -C ../.. ls-files -z --cached --others --exclude-standard | tar -C ../.. --null -T - -c | tar -C "$0" -x`
	if out, err := exec.Command("sh", "-ec", script, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the module: %w\n%s", err, out)
	}
	return nil
}

// lightly are settings of make with which packages are made in a fifth of the time, half as large again.
var lightly = []string{"DEB_LEVEL=-z0", "RPM_PAYLOAD=w0.xzdio"}

// packages makes packages of the kinds for some architectures in a copy of the module below dir, with settings of make, and
// returns the files of each kind.
func packages(dir, version string, settings []string, arches []arch, kinds ...string) (files map[string][]string, err error) {
	if err := copyModule(dir); err != nil {
		return nil, err
	}
	var names []string
	for _, a := range arches {
		names = append(names, a.debian)
	}
	args := append([]string{"-C", dir, "PACKAGE_ARCHES=" + strings.Join(names, " "), "PACKAGE_VERSION=" + version, "SOURCE_DATE_EPOCH=1700000000"}, settings...)
	args = append(args, kinds...)
	if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make %q: %w\n%s", kinds, err, out)
	}
	files = map[string][]string{}
	for _, kind := range kinds {
		for _, a := range arches {
			files[kind] = append(files[kind], filepath.Join(dir, "bin", map[string]string{
				"deb": fmt.Sprintf("table-allocator_%s_%s.deb", version, a.debian), "rpm": fmt.Sprintf("table-allocator-%s-1.%s.rpm", version, a.rpm),
			}[kind]))
		}
	}
	return files, nil
}

// TestPackages: packages from two folders are the same, small, and what the distributions want. Whether they are the same does
// not depend on the architecture, so the second folder makes those of one. It comes after the first, which has left what it
// compiled: -trimpath leaves the folder out of what Go's cache asks for.
func TestPackages(t *testing.T) {
	t.Parallel()
	made, err := packages(t.TempDir(), "0.1.0~test", lightly, arches, "deb", "rpm")
	if err != nil {
		t.Fatal(err)
	}
	again, err := packages(t.TempDir(), "0.1.0~test", lightly, arches[own:own+1], "deb", "rpm")
	if err != nil {
		t.Fatal(err)
	}
	debs, rpms := made["deb"], made["rpm"]
	for kind, files := range made {
		wantSame(t, files[own], again[kind][0])
		for _, path := range files {
			if err := small(path, 9<<20); err != nil {
				t.Error(err)
			}
		}
	}
	out, err := exec.Command("lintian", append([]string{"--tag-display-limit", "0", "--allow-root"}, debs...)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "E: ") {
		t.Errorf("lintian: %v\n%s", err, out)
	}
	out, err = exec.Command("rpmlint", append([]string{"--config", "../../packaging/package/rpmlint.toml"}, rpms...)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "E: ") || !strings.Contains(string(out), " 3 packages ") {
		t.Errorf("rpmlint: %v\n%s", err, out)
	}
	for i, a := range arches {
		t.Run(a.debian, func(t *testing.T) {
			wantPrograms(t, a, debs[i])
			wantRPM(t, a, rpms[i])
		})
	}
	t.Run("life", func(t *testing.T) { packageLife(t, debs[own]) })
	t.Run("life of the rpm", func(t *testing.T) { rpmLife(t, rpms[own]) })
}

// TestPackageVersion: versions come from tags, and sort in the order of commits; what was before the first tag comes first.
func TestPackageVersion(t *testing.T) {
	t.Parallel()
	const script = `cd "$0"; git init -q; export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.net GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.net
		version() { make -s -f "$1" --eval 'version: ; @echo $(PACKAGE_VERSION)' version; }
		commit() { GIT_COMMITTER_DATE="$1" git commit -q --allow-empty -m commit; }
		commit 2026-01-02T03:04:05+01:00; version "$1"
		commit 2026-01-02T04:04:05+01:00; version "$1"
		git tag v0.1.0; version "$1"
		commit 2026-01-03T00:00:00Z; version "$1"
		git tag other; git tag v0.2.0; version "$1"`
	module, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	versions := strings.Fields(query(t, "sh", "-ec", script, t.TempDir(), filepath.Join(module, "packaging/package/build.mk")))
	patterns := []string{`0\.1\.0~git202601020204\.[0-9a-f]{7}`, `0\.1\.0~git202601020304\.[0-9a-f]{7}`, `0\.1\.0`, `0\.1\.0\+1\.g[0-9a-f]{7,}`, `0\.2\.0`}
	if len(versions) != len(patterns) {
		t.Fatalf("versions: got %q", versions)
	}
	for i, pattern := range patterns {
		if !regexp.MustCompile("^" + pattern + "$").MatchString(versions[i]) {
			t.Errorf("version %d: got %q, want %q", i, versions[i], pattern)
		}
		if i > 0 {
			query(t, "dpkg", "--compare-versions", versions[i-1], "lt", versions[i])
			if got := query(t, "rpm", "--eval", fmt.Sprintf(`%%{lua: print(rpm.vercmp("%s", "%s"))}`, versions[i-1], versions[i])); strings.TrimSpace(got) != "-1" {
				t.Errorf("rpm has %s before %s", versions[i], versions[i-1])
			}
		}
	}
}

// wantSame fails the test unless two files are the same.
func wantSame(t *testing.T, path, path2 string) {
	t.Helper()
	one, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.ReadFile(path2)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one, other) {
		t.Errorf("%s is different when it is made again", path)
	}
}

// small returns an error if a file has more bytes than these.
func small(path string, most int64) error {
	info, err := os.Stat(path)
	if err == nil && info.Size() > most {
		err = fmt.Errorf("%s has %d bytes", path, info.Size())
	}
	return err
}

// query runs a program that reads a package, and returns what it writes.
func query(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).Output()
	if err != nil {
		t.Fatalf("%q: %v", argv, err)
	}
	return string(out)
}

// wantPrograms fails the test unless a package of Debian has static programs of its architecture, and the licences of what they
// are made of.
func wantPrograms(t *testing.T, a arch, deb string) {
	if got := strings.TrimSpace(query(t, "dpkg-deb", "--field", deb, "Architecture")); got != a.debian {
		t.Errorf("the package is for %s", got)
	}
	dir := t.TempDir()
	query(t, "dpkg-deb", "--extract", deb, dir)
	programs, err := filepath.Glob(filepath.Join(dir, "usr/sbin/table-allocator-*"))
	if err != nil || len(programs) != 3 {
		t.Errorf("programs %q, %v", programs, err)
	}
	copyright, err := os.ReadFile(filepath.Join(dir, "usr/share/doc/table-allocator/copyright"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range programs {
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, module := range info.Deps {
			if !strings.Contains(string(copyright), "\nFiles: "+module.Path+"\nCopyright: see the text\nLicense: ") {
				t.Errorf("%s has %s, whose licence is missing", path, module.Path)
			}
		}
		program, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if program.Machine != a.elf || program.Section(".interp") != nil {
			t.Errorf("%s is for %v, or not static", path, program.Machine)
		}
		_ = program.Close() // it was read
	}
}

// rpmTags are what rpm keeps the scripts of a package as, and the files that they are made of.
var rpmTags = map[string]string{"POSTIN": "rpm-post", "PREUN": "rpm-preun", "POSTUN": "rpm-postun"}

// wantRPM fails the test unless a package of Fedora has the files, capabilities and scripts that it should have.
func wantRPM(t *testing.T, a arch, path string) {
	if got := query(t, "rpm", "-qp", "--queryformat", "%{ARCH} %{OS}", path); got != a.rpm+" linux" {
		t.Errorf("the package is for %s", got)
	}
	files := query(t, "rpm", "-qp", "--queryformat", "[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILECAPS}\n]", path)
	for _, want := range []string{
		"/usr/sbin/table-allocator-server -rwxr-xr-x root:root ",
		"/usr/sbin/tactl lrwxrwxrwx root:root ",
		"/usr/libexec/dhcpcd-hooks/60-table-allocator -rw-r--r-- root:root ",
		"/usr/lib/NetworkManager/dispatcher.d/table-allocator -rwxr-xr-x root:root ",
		"/usr/lib/systemd/system/table-allocator-watch.service -rw-r--r-- root:root ",
		"/usr/sbin/table-allocator-enter -rwxr-x--- root:table-allocator cap_sys_chroot,cap_sys_admin=ep",
	} {
		if !strings.Contains(files, want+"\n") {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Count(files, "=ep\n") != 1 || strings.Contains(files, "/usr/lib/dhcpcd") || strings.Contains(files, "/etc/network") {
		t.Errorf("too much is in\n%s", files)
	}
	conffiles := "/etc/default/table-allocator\n/etc/iproute2/rt_protos.d/table-allocator.conf\n/etc/table-allocator/netns.json\n/etc/table-allocator/server.json\n/etc/table-allocator/watch.json\n"
	if got := query(t, "rpm", "-qp", "--configfiles", path); got != conffiles {
		t.Errorf("configuration: got %q, want %q", got, conffiles)
	}
	for tag, file := range rpmTags {
		text, err := os.ReadFile("../../packaging/package/" + file)
		if err != nil {
			t.Fatal(err)
		}
		got := query(t, "rpm", "-qp", "--queryformat", "%{"+tag+"PROG} %{"+tag+"}", path)
		if want := "/bin/sh " + strings.TrimSpace(string(text)); strings.TrimSpace(got) != want {
			t.Errorf("%s: got\n%s\nwant\n%s", tag, got, want)
		}
	}
	if got := query(t, "rpm", "-qp", "--queryformat", "%{PREIN}", path); !strings.Contains(got, "groupadd -r table-allocator") {
		t.Errorf("nothing makes the group: %s", got)
	}
}

// ownRoot gives a script a root of its own, the directory $0, below an overlay, and an uplink.
const ownRoot = `
	mkdir "$0"; mount -t tmpfs none "$0"; cp "$1" "$0/package.${1##*.}"; package=$0/package.${1##*.}
	for d in etc usr var; do
		mkdir -p "$0/$d/upper" "$0/$d/work"
		mount -t overlay none -o "lowerdir=/$d,upperdir=$0/$d/upper,workdir=$0/$d/work" "/$d"
	done
	mount -t tmpfs none /run
	ip link set lo up; ip link add wan0 type veth peer name lan0; ip link set wan0 up; ip link set lan0 up
	ip address add 192.0.2.2/24 dev wan0; ip route add default via 192.0.2.1
	set -x
`

// rpmLife installs the other package, installs it once more as an upgrade does, and erases it. Nothing here is a Fedora, so it
// has no dependencies.
func rpmLife(t *testing.T, rpm string) {
	const script = ownRoot + `
		rpm -U --nodeps "$package" >&2
		rpm -V --nodeps table-allocator # modes, owners and capabilities
		sed -i "1i // mine" /etc/table-allocator/server.json
		mkdir -p /usr/local/lib/systemd/system; touch /usr/local/lib/systemd/system/table-allocator-watch.service
		rpm -U --nodeps --replacepkgs "$package" 2>"$0/warnings" >&2; cat "$0/warnings" >&2; grep -o "hides the unit" "$0/warnings"
		rm -r /usr/local/lib/systemd/system
		head -n 1 /etc/table-allocator/server.json
		table-allocator-server 2>/dev/null & until grep -a -q tas_socket /proc/net/unix; do sleep 0.1; done
		table-allocator-client -4 -a 192.0.2.2 -i wan0 --routes copy
		rpm -e table-allocator >&2; kill $!; wait
		ip rule | grep -c "proto 116" || :
		find /etc /usr /var /run -xdev -name "*table[-_]allocator*"; ls /etc/table-allocator`
	wantLines(t, script, rpm, "hides the unit", "// mine", "10000", "0", "/etc/table-allocator", "/var/lib/table-allocator", "server.json.rpmsave")
}

// wantLines runs a script with a package, in namespaces of its own, and fails the test unless it writes these lines.
func wantLines(t *testing.T, script, file string, want ...string) {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "--net", "--propagation", "private", "sh", "-ec", script, filepath.Join(t.TempDir(), "overlay"), file)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	got := slices.DeleteFunc(strings.Split(string(out), "\n"), func(line string) bool { return line == "" })
	if err != nil || fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("got %q, %v, want %q\n%s", got, err, want, stderr.String())
	}
}

// packageLife installs a package, upgrades, removes and purges it in a root of its own, without systemd.
func packageLife(t *testing.T, deb string) {
	const script = ownRoot + `
		dpkg -i "$package" >&2
		table-allocator-server --version
		sed -i "1i // mine" /etc/table-allocator/server.json
		mkdir -p /usr/local/lib/systemd/system; touch /usr/local/lib/systemd/system/table-allocator-watch.service
		dpkg -i "$package" 2>"$0/warnings" >&2; cat "$0/warnings" >&2; grep -o "hides the unit" "$0/warnings"
		rm -r /usr/local/lib/systemd/system
		head -n 1 /etc/table-allocator/server.json
		table-allocator-server 2>/dev/null & until grep -a -q tas_socket /proc/net/unix; do sleep 0.1; done
		table-allocator-client -4 -a 192.0.2.2 -i wan0 --routes copy; ip rule | grep -c 192.0.2.2
		dpkg -r table-allocator >&2; kill $!; wait
		ip rule | grep -c "proto 116" || :
		IFACE=wan0 MODE=start ADDRFAM=inet METHOD=static IF_ADDRESS=192.0.2.2 /etc/network/if-up.d/table-allocator
		(interface=wan0 reason=BOUND; . /etc/dhcp/dhclient-enter-hooks.d/table-allocator)
		IFNAME=wan0 IPLOCAL=192.0.2.2 USEPEERDNS=1 /etc/ppp/ip-up.d/table-allocator
		dpkg -P table-allocator >&2
		find /etc /usr /var /run -xdev -name "*table[-_]allocator*"`
	wantLines(t, script, deb, "0.1.0~test", "hides the unit", "// mine", "10000", "1", "0")
}
