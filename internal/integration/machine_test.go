//go:build integration

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// patience is how long an event may take before a test fails. It is longer than two leases of DHCP, after which a daemon that
// lost an address by a race of its own has it again, and the machine may be busy. A script of a machine that takes longer than
// scriptLimit hangs.
const patience, scriptLimit = 6 * time.Minute, 15 * time.Minute

// base are the packages of every machine.
var base = []string{"systemd", "systemd-sysv", "udev", "dbus", "iproute2", "curl", "procps", "sqlite3", "nftables"}

// A machine is a host that booted a Debian with its systemd. All that it runs ends with the test.
type machine struct {
	t    *testing.T
	ns   *nettest.Namespace
	cmd  *exec.Cmd
	pid  int    // of its systemd
	root string // its root directory, seen from here
	tell func() // if the test has failed, log how the machine stands, once
}

// bootScript becomes the systemd of a machine, in namespaces of its own. $1 is its root directory. The kernel's
// settings are the host's, but for those of the network. A read-only /sys says that no udevd sees the links. $2 is the directory
// that keeps what is written to the root, if another boot is to find it.
const bootScript = `
	if [ -n "$2" ]; then mount --bind "$2" /mnt; else mount -t tmpfs -o mode=755 machine /mnt; fi
	mkdir -p /mnt/upper /mnt/work /mnt/root
	mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" machine /mnt/root
	cd /mnt/root
	mkdir -p .old proc sys dev run tmp
	mount -t proc proc proc
	for setting in proc/sys/*; do
		[ "$setting" = proc/sys/net ] || { mount --bind "$setting" "$setting"; mount -o remount,bind,ro "$setting"; }
	done
	mount -t sysfs -o ro sysfs sys
	mount -t cgroup2 cgroup2 sys/fs/cgroup
	mount -t bpf -o mode=700 bpf sys/fs/bpf
	mount -t tmpfs -o mode=755 tmpfs dev
	for device in null zero full random urandom tty net/tun ppp; do
		mkdir -p dev/net; touch "dev/$device"; mount --bind "/dev/$device" "dev/$device"
	done
	mkdir dev/pts dev/shm
	mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
	ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
	mount -t tmpfs -o mode=755 tmpfs run
	mount -t tmpfs -o mode=1777 tmpfs tmp
	rm -f usr/sbin/policy-rc.d etc/resolv.conf
	echo nameserver 127.0.0.1 >etc/resolv.conf
	echo "127.0.0.1 localhost machine" >etc/hosts
	: >etc/machine-id
	echo machine >etc/hostname; hostname machine
	pivot_root . .old; cd /; umount -l /.old
	exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=multi-user.target --show-status=no --log-target=journal`

// stateScript says, about a machine on which a test has failed, what its programs and its kernel say, and last what ours do.
const stateScript = `exec 2>&1; set +e
	journalctl --no-pager --lines=150 --output=short-monotonic
	for unit in $(systemctl --failed --plain --no-legend | cut -d" " -f1); do
		echo "failed: $unit"; systemctl status --no-pager --lines=0 "$unit"; journalctl --no-pager --lines=40 --output=short-monotonic --unit="$unit"
	done
	for command in "address" "neighbour" "rule" "-6 rule" "route show table all" "-6 route show table all"; do echo "ip $command"; ip $command | grep -v "table local"; done
	journalctl --no-pager --lines=60 --output=short-monotonic --unit="table-allocator-*"
	for command in status history doctor; do echo "$command:"; timeout 30 table-allocator-client "$command" | tail -n 40; done`

// boot boots a machine with a root of the list in roots.
func boot(t *testing.T, d nettest.Debian) *machine {
	t.Helper()
	return bootFrom(t, d, "")
}

// bootFrom is boot for a machine whose root has what was written to it when it was booted from the same directory before.
func bootFrom(t *testing.T, d nettest.Debian, disk string) *machine {
	t.Helper()
	dir, err := d.Dir()
	if err != nil {
		t.Fatalf("the root of %s: %v", d.Suite, err)
	}
	m := &machine{t: t, ns: nettest.New(t, "host")}
	cgroup, err := os.Open(nettest.Cgroup(t))
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("unshare", "--cgroup", "sh", "-ec", bootScript, "sh", dir, disk)
	var console bytes.Buffer
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		UseCgroupFD: true, CgroupFD: int(cgroup.Fd()), Setsid: true,
	}
	if err := m.ns.Start(cmd); err != nil {
		t.Fatalf("boot %s: %v", d.Suite, err)
	}
	m.cmd, m.pid, m.root = cmd, cmd.Process.Pid, fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)
	m.tell = sync.OnceFunc(func() {
		if t.Failed() {
			state, err := m.try(stateScript)
			t.Logf("the machine: %v\n%s", err, state)
		}
	})
	t.Cleanup(func() {
		m.tell()
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // killed
		if t.Failed() && console.Len() > 0 {
			t.Logf("its console:\n%s", &console)
		}
	})
	m.wait("systemd has booted", `case $(systemctl is-system-running) in running | degraded) ;; *) false ;; esac`)
	return m
}

// awaitEnd waits until a machine that was told to end has ended.
func (m *machine) awaitEnd() {
	m.t.Helper()
	limit := time.AfterFunc(patience, func() { _ = m.cmd.Process.Kill() }) // it may have ended
	_ = m.cmd.Wait()                                                       // a machine that ends has no exit code that counts
	if !limit.Stop() {
		m.t.Fatal("the machine does not end")
	}
}

// command is a script with arguments, run by the machine's sh.
func (m *machine) command(script string, args ...string) *exec.Cmd {
	argv := []string{"--target", fmt.Sprint(m.pid), "--mount", "--net", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd", "env", "-i", "HOME=/root",
		"DEBIAN_FRONTEND=noninteractive", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-ec", script, "sh"}
	return exec.Command("nsenter", append(argv, args...)...)
}

// try runs a script, and returns what it wrote to stdout, and in the error to stderr.
func (m *machine) try(script string, args ...string) (string, error) {
	cmd := m.command(script, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second // a daemon may keep stdout
	err := cmd.Start()
	if err == nil {
		limit := time.AfterFunc(scriptLimit, func() { _ = cmd.Process.Kill() }) // it may have ended
		err = cmd.Wait()
		if !limit.Stop() {
			err = fmt.Errorf("it hangs for %v: %w", scriptLimit, err)
		}
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return stdout.String(), fmt.Errorf("%w\n%s", err, &stderr)
	}
	return stdout.String(), nil
}

// sh is try for a script that has to succeed.
func (m *machine) sh(script string, args ...string) string {
	m.t.Helper()
	out, err := m.try(script, args...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// want runs a script until it succeeds and writes these lines, trimmed and without empty ones: a process that was told to end,
// or a service that was told what to do, may take a moment. It fails the test if the script does not.
func (m *machine) want(script string, want ...string) {
	m.t.Helper()
	var first string
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		out, err := m.try(script)
		lines := trimmed(out)
		if err == nil && slices.Equal(lines, want) {
			return
		}
		got := fmt.Sprintf("%q, %v", lines, err)
		if first == "" {
			first = got
		}
		if time.Now().After(deadline) {
			m.t.Errorf("%s: got %s, want %q; the first time: %s", script, got, want, first)
			return
		}
	}
}

// once is want for a script that changes something: it runs a single time.
func (m *machine) once(script string, want ...string) {
	m.t.Helper()
	if got := trimmed(m.sh(script)); !slices.Equal(got, want) {
		m.t.Errorf("%s: got %q, want %q", script, got, want)
	}
}

// trimmed returns the lines of a text, trimmed and without empty ones.
func trimmed(text string) (lines []string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// wait runs a script again and again until it succeeds.
func (m *machine) wait(what, script string, args ...string) {
	m.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		out, err := m.try(script, args...)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: %s: %v\n%s", what, script, err, out)
		}
	}
}

// write makes a file of the machine.
func (m *machine) write(path, text string, mode os.FileMode) {
	m.t.Helper()
	path = m.root + path
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = nettest.WriteExecutable(path, []byte(text))
	}
	if err == nil {
		err = os.Chmod(path, mode) // whatever the umask
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// copy copies a file to the machine.
func (m *machine) copy(from, to string) {
	m.t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		m.t.Fatal(err)
	}
	m.write(to, string(text), 0o644)
}

// install installs a package of make deb.
func (m *machine) install(deb string) {
	m.t.Helper()
	m.copy(deb, "/root/table-allocator.deb")
	m.sh("dpkg --force-confold -i /root/table-allocator.deb 2>&1")
}

// A record is what a program has written so far.
type record struct {
	mu   sync.Mutex
	text []byte
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.text = append(r.text, p...)
	return len(p), nil
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.text)
}

// ruleEvents returns a function that ends the record of changes of rules, and returns them. Rules of its own mark
// the begin and the end, so that no event is late.
func (m *machine) ruleEvents() func() []string {
	m.t.Helper()
	var events record
	cmd := exec.Command("ip", "-N", "monitor", "rule")
	cmd.Stdout = &events
	if err := m.ns.Start(cmd); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // killed
	})
	mark := func(name string) {
		m.t.Helper()
		for deadline := time.Now().Add(patience); !strings.Contains(events.String(), "iif "+name); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				m.t.Fatal("ip monitor does not say what changes")
			}
			m.ns.Batch(m.t, "rule add priority 32000 iif "+name+" lookup main", "rule delete priority 32000 iif "+name+" lookup main")
		}
	}
	mark("begin")
	return func() (changes []string) {
		m.t.Helper()
		mark("end")
		for line := range strings.Lines(events.String()) {
			if !strings.Contains(line, "iif begin") && !strings.Contains(line, "iif end") {
				changes = append(changes, strings.TrimSpace(line))
			}
		}
		return changes
	}
}

// internet puts the machine behind providers: uplink n has the link wanN, the networks 10.N.0.0/24 and fd0N::/64,
// N from 1, and the router at their first addresses. A provider drops packets that do not come from its networks,
// of which fd0N::/48 is the largest, and a web server in the internet answers with the address that asks.
type internet struct {
	*nettest.Internet
	m *machine
}

func (m *machine) behind(uplinks int) *internet {
	m.t.Helper()
	var providers []*nettest.Provider
	for n := 1; n <= uplinks; n++ {
		net4, net6 := fmt.Sprintf("10.%d.0.", n), fmt.Sprintf("fd0%d::", n)
		providers = append(providers, &nettest.Provider{
			Ifname: fmt.Sprint("wan", n), Routers: []string{net4 + "1/24", net6 + "1/64", "fe80::1/64"}, Routed: []string{net4 + "0/24", net6 + "/48"},
		})
	}
	i := &internet{nettest.NewInternet(m.t, m.ns, providers...), m}
	m.t.Cleanup(m.tell) // before its links go
	for n, p := range providers {
		rules := fmt.Sprintf(`
			table inet provider {
				chain raw {
					type filter hook prerouting priority raw
					iifname != lan accept
					ip saddr { 0.0.0.0, 10.%[1]d.0.0/24 } accept
					ip6 saddr { ::, fe80::/10, fd0%[1]d::/48 } accept
					drop
				}
			}
`, n+1)
		path := filepath.Join(m.t.TempDir(), "provider.nft")
		if err := os.WriteFile(path, []byte(rules), 0o644); err != nil {
			m.t.Fatal(err)
		}
		p.Run(m.t, "nft", "-f", path)
	}
	for _, addr := range []string{nettest.Far4, nettest.Far6} {
		m.web(i.Namespace, addr)
	}
	return i
}

// web runs a web server at an address of a namespace, or at all of them, until the test ends. It answers with the address that asks.
func (m *machine) web(ns *nettest.Namespace, addr string) {
	m.t.Helper()
	ns.Do(func() {
		l, err := net.Listen("tcp", net.JoinHostPort(addr, "80"))
		if err != nil {
			m.t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(who)}
		go server.Serve(l) // until Close
		m.t.Cleanup(func() { _ = server.Close() })
	})
}

func who(w http.ResponseWriter, r *http.Request) {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("X-NetworkManager-Status", "online")
	w.Header().Set("Connection", "close")
	_, _ = io.WriteString(w, host+"\n") // the client may have gone
}

// waitUplinks waits until packets of each address of the links wan1 to wanN, or of those in only, pass through
// their providers: an address of each family on each uplink. What ends with a dot or a colon in only is the begin of an address.
// The links to namespaces have addresses of a random network, which may begin like an uplink's.
func (i *internet) waitUplinks(only ...string) {
	i.m.t.Helper()
	if len(only) == 0 {
		for n := range i.Providers {
			only = append(only, fmt.Sprintf("10.%d.0.", n+1), fmt.Sprintf("fd0%d:", n+1))
		}
	}
	for _, prefix := range only {
		i.m.wait("packets of "+prefix+" pass", `
			case $1 in *[.:]) pattern=^$1 ;; *) pattern=^$1$ ;; esac
			addr=$(ip -o address show scope global | awk '$2 !~ /^tav/ { print $4 }' | cut -d/ -f1 | grep "$pattern" | head -n 1)
			[ -n "$addr" ]
			case $addr in *:*) far="[`+nettest.Far6+`]" ;; *) far=`+nettest.Far4+` ;; esac
			got=$(curl --globoff --silent --max-time 3 --interface "$addr" "http://$far/")
			[ "$got" = "$addr" ]`, prefix)
	}
}
