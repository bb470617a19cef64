//go:build integration

// Package integration has the tests that take long or need much: packages, and machines that boot a Debian with
// its systemd. make integration runs them.
package integration

import (
	"crypto/sha256"
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

// debianArch is what Debian calls the architecture of this machine.
var debianArch = map[string]string{"amd64": "amd64", "arm64": "arm64", "arm": "armhf"}[runtime.GOARCH]

func TestMain(m *testing.M) {
	if !nettest.InSandbox() && os.Geteuid() == 0 {
		if err := nettest.MakeDebian("", roots()...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	nettest.Main(m, "lintian", "rpm")
}

// copyModule copies the module to a directory.
func copyModule(dir string) error {
	const script = `git -C ../.. ls-files -z --cached --others --exclude-standard | tar -C ../.. --null -T - -c | tar -C "$0" -x`
	if out, err := exec.Command("sh", "-ec", script, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the module: %w\n%s", err, out)
	}
	return nil
}

// packages makes packages of the kinds in a copy of the module below dir, and returns the files.
func packages(dir, version string, kinds ...string) (files []string, err error) {
	if err := copyModule(dir); err != nil {
		return nil, err
	}
	args := append([]string{"-C", dir, "PACKAGE_ARCHES=" + debianArch, "PACKAGE_VERSION=" + version, "SOURCE_DATE_EPOCH=1700000000"}, kinds...)
	if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make %q: %w\n%s", kinds, err, out)
	}
	for _, kind := range kinds {
		found, err := filepath.Glob(filepath.Join(dir, "bin/*."+kind))
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("packages: got %q, %w", found, err)
		}
		files = append(files, found[0])
	}
	return files, nil
}

// TestPackages: packages from two folders are the same, small, and what the distributions want.
func TestPackages(t *testing.T) {
	t.Parallel()
	var made [2][]string
	for i := range made {
		var err error
		if made[i], err = packages(t.TempDir(), "0.1.0~test", "deb", "rpm"); err != nil {
			t.Fatal(err)
		}
	}
	deb, rpm := made[0][0], made[0][1]
	for i, path := range made[0] {
		one, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		other, err := os.ReadFile(made[1][i])
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(one) != sha256.Sum256(other) {
			t.Errorf("%s is different when it is made again", path)
		}
		if len(one) > 6<<20 {
			t.Errorf("%s has %d bytes", path, len(one))
		}
	}
	out, err := exec.Command("lintian", "--tag-display-limit", "0", "--allow-root", deb).CombinedOutput()
	if err != nil || strings.Contains(string(out), "E: ") {
		t.Errorf("lintian: %v\n%s", err, out)
	}
	names := regexp.MustCompile(`(?m)^/usr/(sbin/table-allocator-server|libexec/dhcpcd-hooks/60-table-allocator|lib/NetworkManager/dispatcher.d/table-allocator)$`)
	if out, err := exec.Command("rpm", "-qlp", rpm).CombinedOutput(); err != nil || len(names.FindAll(out, -1)) != 3 {
		t.Errorf("rpm -qlp: %v\n%s", err, out)
	}
	t.Run("life", func(t *testing.T) { packageLife(t, deb) })
	t.Run("life of the rpm", func(t *testing.T) { rpmLife(t, rpm) })
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
