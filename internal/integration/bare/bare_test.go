//go:build integration

// Package bare tries on bare Debians what README says first: the line that builds and installs, and make demo, with
// Debian's own Go and without any. These roots have the network of the machine, since Go downloads a newer Go and
// modules: that is why no sandbox of nettest runs the tests, whose network is empty.
package bare

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// set is the name of the roots of these tests in the cache.
const set = "bare"

// roots have what README and the Makefile tell to install: "apt-get install golang-go make git". sudo is there for
// README's line, and iproute2 for the demo; apt-get installs ca-certificates with git.
var roots = []nettest.Debian{root("bookworm"), root("trixie")}

func root(suite string) nettest.Debian {
	return nettest.Debian{Suite: suite, Set: set, Packages: []string{"golang-go", "make", "git", "ca-certificates", "sudo", "iproute2"}}
}

func TestMain(m *testing.M) {
	nettest.NeedRoot()
	if err := nettest.MakeDebian(set, roots...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// enterScript runs the script $2 in an overlay of the root $1, which is gone afterwards, or in the copy $4 if that has a
// name. The name servers and the certificates are the machine's: those of a bare root do not know a proxy of the machine.
const enterScript = `
	mount --make-rprivate /
	mount -t tmpfs bare /mnt
	mkdir /mnt/upper /mnt/work /mnt/root
	if [ -n "$4" ]; then cp -a "$1/." "$4"; mount --bind "$4" /mnt/root
	else mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" bare /mnt/root; fi
	root=/mnt/root
	cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
	[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
	mkdir -p "$root/src"
	git -c safe.directory='*' ls-files -z --cached --others --exclude-standard >/mnt/files
	tar --null -T /mnt/files -c -f /mnt/files.tar; tar -C "$root/src" -x -f /mnt/files.tar
	mount -t proc proc "$root/proc"
	mount -t sysfs -o ro sysfs "$root/sys"; mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
	mount --rbind /dev "$root/dev"
	mount -t tmpfs tmpfs "$root/tmp"; mount -t tmpfs tmpfs "$root/run"
	mkdir -p "$root/built" "$root/.old"; mount --bind "$3" "$root/built"
	cd "$root"; pivot_root . .old; umount -l /.old
	cd /src; eval "$2"`

// full says that all tests run in the roots. Their sandbox has overlays, which none of the roots can be then.
var full = os.Getenv("SOAK") == "full"

// in runs a script in an overlay of a root, at a copy of the module, and returns what it writes. built is for Go's cache.
func in(t *testing.T, d nettest.Debian, built, script string) (string, error) {
	t.Helper()
	dir, err := d.Dir()
	if err != nil {
		t.Fatal(err)
	}
	whole := ""
	if full {
		whole = t.TempDir()
	}
	cmd := exec.Command("sh", "-exc", enterScript, "sh", dir, script, built, whole)
	cmd.Dir = "../../.."
	cmd.Env = append(environment(t), "HOME=/root", "GOCACHE=/built", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC, Pdeathsig: syscall.SIGKILL}
	var out strings.Builder
	cmd.Stdout = io.MultiWriter(&out, testLog{t})
	cmd.Stderr = cmd.Stdout
	err = cmd.Run()
	return out.String(), err
}

// environment is how this machine reaches a proxy, for HTTP and for Go modules.
func environment(t *testing.T) (env []string) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(strings.ToLower(v), "="); strings.HasSuffix(name, "_proxy") {
			env = append(env, v)
		}
	}
	for _, name := range []string{"GOPROXY", "GOSUMDB"} {
		value, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatalf("go env %s: %v", name, err)
		}
		env = append(env, name+"="+strings.TrimSpace(string(value)))
	}
	return env
}

// testLog shows what a build says while it runs.
type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// readme returns the line of README that builds and installs.
func readme(t *testing.T) string {
	text, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^ {4}(make build .*)$`).FindSubmatch(text)
	if line == nil {
		t.Fatal("README has no line that builds")
	}
	return string(line[1])
}

// TestBare: on a bare Debian README's line builds and installs commands that work, the demo plays, and tests run. With
// SOAK=full all tests do.
func TestBare(t *testing.T) {
	script := readme(t) + `
		table-allocator-server --version; table-allocator-client --help >/dev/null
		make demo
		go version; PATH=$PWD/.cache/go:$PATH go test -count=1 ./internal/wire`
	if full { // procps and netbase are in every Debian that is no container's; the tests want a host without hooks
		script += `
		apt-get -qq update; apt-get -qq install --yes --no-install-recommends gcc libc6-dev procps netbase
		make uninstall
		make test MINUTES=60`
	}
	built := t.TempDir() // both build the same with the same Go
	for _, d := range roots {
		t.Run(d.Suite, func(t *testing.T) {
			out, err := in(t, d, built, script)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"and misses nothing", "ok  \tgithub.com/table-allocator/table-allocator/internal/wire"} {
				if !strings.Contains(out, want) {
					t.Errorf("%q is missing", want)
				}
			}
		})
	}
}

// TestBareWithoutGo: without Go make says what to install, and that is a package that the Debian has.
func TestBareWithoutGo(t *testing.T) {
	t.Parallel()
	for _, d := range roots {
		t.Run(d.Suite, func(t *testing.T) {
			t.Parallel()
			const script = `dpkg --purge --force-depends golang-go; if make build; then exit 1; fi; make demo`
			out, err := in(t, d, t.TempDir(), script)
			if err == nil || strings.Count(out, "this needs Go: sudo apt-get install golang-go\n") != 2 {
				t.Errorf("got %v", err)
			}
		})
	}
}
