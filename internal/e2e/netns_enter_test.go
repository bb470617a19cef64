package e2e

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// capabilities is cap_sys_admin,cap_sys_chroot=ep as a file has it.
const capabilities = "\x01\x00\x00\x02" + "\x00\x00\x24\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"

// A visited host is one with a service of namespaces, as a package installs it: the group leasers may enter.
type visited struct {
	*crossing
	service *process
}

const enterConfig = `{ // what the administrator wants
	"group": "leasers",
	"namespaces": [
		{"name": "work", "ifname": "wan1", "resolv": "192.0.2.53"},
		{"name": "boss", "ifname": "wan0", "resolv": "192.0.2.54", "allow": ["carl"]},
	],
}`

func newVisited(t *testing.T) *visited {
	t.Helper()
	if err := addUsers(); err != nil {
		t.Fatal(err)
	}
	v := &visited{crossing: newNamespaces(t)}
	from := staticDir(t)
	v.sh(fmt.Sprintf(`mkdir -p /run/sbin /etc/table-allocator; cp %s/table-allocator-client %[1]s/table-allocator-enter /run/sbin
		chown 0:%d /run/sbin/table-allocator-enter; chmod 750 /run/sbin/table-allocator-enter
		cat >/etc/table-allocator/netns.json <<'end'`+"\n%s\nend", from, gidLeasers, enterConfig))
	v.setCapabilities(capabilities)
	v.service = v.start(v.here(bin(t, clientBin), "netns", "serve"))
	v.waitNamespaces(2)
	return v
}

func (v *visited) setCapabilities(value string) {
	v.t.Helper()
	path := filepath.Join("/proc", v.inner, "root/run/sbin/table-allocator-enter")
	err := unix.Removexattr(path, "security.capability")
	if value != "" {
		err = unix.Setxattr(path, "security.capability", []byte(value), 0)
	}
	if err != nil && !errors.Is(err, unix.ENODATA) {
		v.t.Fatal(err)
	}
}

func (v *visited) waitNamespaces(n int) {
	v.t.Helper()
	eventually(v.t, "the service has made the namespaces", func() error {
		rows := v.namespaces()
		if len(rows) != n || slices.ContainsFunc(rows, func(r namespaceRow) bool { return r.Missing != "" }) {
			return fmt.Errorf("%+v", rows)
		}
		return nil
	})
}

// command is a command line of a user, in group leasers or not.
func (v *visited) command(uid int, member bool, argv ...string) *exec.Cmd {
	groups := "--clear-groups"
	if member {
		groups = fmt.Sprintf("--groups=%d", gidLeasers)
	}
	return v.here("setpriv", append([]string{fmt.Sprintf("--reuid=%d", uid), fmt.Sprintf("--regid=%d", uid), groups}, argv...)...)
}

// enter runs a program in a namespace as a user.
func (v *visited) enter(uid int, member bool, args ...string) result {
	v.t.Helper()
	cmd := v.command(uid, member, append([]string{"/run/sbin/table-allocator-client", "netns", "exec"}, args...)...)
	return v.run(cmd.Args[0], cmd.Args[1:]...)
}

// TestNetnsEnter: a user of the group is in the namespace with nothing but the user's own rights; others are not.
func TestNetnsEnter(t *testing.T) {
	v := newVisited(t)
	const asks = `import socket; s = socket.create_connection(("198.51.100.1", 7)); s.send(b"x"); print(s.recv(64).decode().strip())`
	inet, _ := at(1)
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"who it is", []string{"work", "sh", "-c", "id -u; id -G; grep Cap /proc/self/status"}, 0,
			"21002\n21002 22001\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n"},
		{"what it reads", []string{"work", "sh", "-c", "cat /etc/resolv.conf; ls /sys/class/net"}, 0, "nameserver 192.0.2.53\neth0\nlo\n"},
		{"where it comes out", []string{"work", "python3", "-c", asks}, 0, inet + "\n"},
		{"exit code", []string{"work", "sh", "-c", "exit 42"}, 42, ""},
		{"its terminal", []string{"work", "--pty", "--", "sh", "-c", ": >/dev/tty && echo mine"}, 0, "mine"},
		{"a lease that is there", []string{"work", "--wait", "5", "true"}, 0, ""},
		{"a lease of another's namespace", []string{"boss", "--wait", "5", "true"}, 125, "there is no namespace of this name"},
		{"not found", []string{"work", "/nonexistent"}, 127, "/nonexistent"},
		{"not executable", []string{"work", "/etc/passwd"}, 126, "/etc/passwd"},
		{"another user", []string{"work", "--user", "root", "id"}, 125, "--user needs root"},
		{"the namespace of others", []string{"boss", "id"}, 125, "there is no namespace of this name"},
		{"no namespace", []string{"nowhere", "id"}, 125, "there is no namespace of this name"},
		{"a name that leads elsewhere", []string{"../../x", "id"}, 125, "no name of a namespace"},
		{"back", []string{"work", "nsenter", "--net=/proc/1/ns/net", "id"}, 1, ""},
	} {
		if r := v.enter(uidBert, true, tt.args...); r.code != tt.code || !strings.Contains(r.stdout+r.stderr, tt.want) {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
	serve := v.command(uidBert, true, "/run/sbin/table-allocator-client", "netns", "serve")
	if r := v.run(serve.Args[0], serve.Args[1:]...); r.code != 78 || !strings.Contains(r.stderr, "a User= of the unit is in the way") {
		t.Errorf("a service that is not root: %+v", r)
	}
	// What the caller gave it goes with it, and nothing else.
	gives := func(to string) result {
		t.Helper()
		cmd := v.command(uidBert, true, "sh", "-ec", `umask 027; ulimit -n 300; cd /usr; X="a  b"; export X; exec 7</etc/passwd; exec `+to+` sh -c "$0"`,
			`umask; ulimit -n; pwd; echo "$X"; ls /proc/self/fd | tr '\n' ' '`)
		return v.run(cmd.Args[0], cmd.Args[1:]...)
	}
	if got, want := gives("/run/sbin/table-allocator-client netns exec work"), gives(""); got != want || !strings.HasPrefix(got.stdout, "0027\n300\n/usr\na  b\n") || !strings.Contains(got.stdout, " 7 ") {
		t.Errorf("what goes with a program: %+v, and outside %+v", got, want)
	}
	if r := v.enter(uidCarl, true, "boss", "id", "-u"); r.stdout != "21003\n" {
		t.Errorf("who is in the list: %+v", r)
	}
	if r := v.enter(uidAnna, false, "work", "id"); r.code != 125 || !strings.Contains(r.stderr, "only root enters namespaces here") {
		t.Errorf("who is not in the group: %+v", r)
	}
	// The program itself, of whoever can execute it.
	v.sh("chmod 755 /run/sbin/table-allocator-enter")
	for _, tt := range []struct {
		name    string
		command []string
		member  bool
		want    string
	}{
		{"not in the group", []string{"work", "/bin/id", "id"}, false, "permission denied"},
		{"a name that leads elsewhere", []string{"../../x", "/bin/id", "id"}, true, "no name of a namespace"},
		{"an option", []string{"-h", "/bin/id", "id"}, true, "no name of a namespace"},
		{"control characters", []string{"a\x1b[31m\nb", "/bin/id", "id"}, true, `\x1b`},
		{"a long name", []string{strings.Repeat("a", 5000), "/bin/id", "id"}, true, "no name of a namespace"},
		{"no program", []string{"work"}, true, "Usage"},
	} {
		cmd := v.command(uidBert, tt.member, append([]string{"/run/sbin/table-allocator-enter"}, tt.command...)...)
		if r := v.run(cmd.Args[0], cmd.Args[1:]...); r.code != 125 || !strings.Contains(r.stderr, tt.want) || strings.Contains(r.stderr, "\x1b") || r.stdout != "" {
			t.Errorf("%s: %+v", tt.name, r)
		}
	}
	entering := []string{"/run/sbin/table-allocator-enter", "work", "/bin/id", "id"}
	for name, tt := range map[string]struct {
		prefix []string
		want   string
	}{
		"no_new_privs":   {[]string{"setpriv", "--no-new-privs"}, "no_new_privs"},
		"user namespace": {[]string{"unshare", "--user", "--map-root-user"}, "is not root's"},
	} {
		cmd := v.command(uidBert, true, append(tt.prefix, entering...)...)
		if r := v.run(cmd.Args[0], cmd.Args[1:]...); r.code != 125 || !strings.Contains(r.stderr, tt.want) || r.stdout != "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
	setpriv := v.command(uidBert, true, entering...).Args[len(v.here("").Args)-1:]
	for script, want := range map[string]string{
		`mkdir -m 700 /run/secret && cd /run/secret && exec "$@"`:         "/run/secret",
		`mkdir /run/gone && cd /run/gone && rmdir /run/gone && exec "$@"`: "directory",
		`exec unshare --mount "$@"`:                                       "sandbox or container: its mnt namespace",
		`exec unshare --net "$@"`:                                         "sandbox or container: its net namespace",
		`exec unshare --pid --fork "$@"`:                                  "sandbox or container: its pid namespace",
		`mkdir /run/root && cd /run/root && for d in usr proc run etc; do mkdir $d; mount --rbind /$d $d; done; ln -s usr/bin usr/lib usr/lib64 .; exec chroot . "$@"`: "another root directory",
	} {
		cmd := v.here("sh", append([]string{"-ec", script, "sh"}, setpriv...)...)
		if r := v.run(cmd.Args[0], cmd.Args[1:]...); r.code != 125 || !strings.Contains(r.stderr, want) || r.stdout != "" {
			t.Errorf("%s: %+v", script, r)
		}
	}
	v.sh("mkdir -p /etc/netns/third/over /etc/over")
	v.must("netns", "add", "third", "--ifname", "wan1", "--resolv", "192.0.2.53", "--allow", "bert")
	cmd := v.here("sh", append([]string{"-ec", `cd /etc/over && exec "$@"`, "sh"}, slices.Replace(slices.Clone(setpriv), len(setpriv)-3, len(setpriv)-2, "third")...)...)
	if r := v.run(cmd.Args[0], cmd.Args[1:]...); r.code != 125 || !strings.Contains(r.stderr, "is another one in it") {
		t.Errorf("a directory that is another one: %+v", r)
	}
	v.setCapabilities("")
	if r := v.enter(uidBert, true, "work", "id"); r.code != 125 || !strings.Contains(r.stderr, "cap_sys_admin") || r.stdout != "" {
		t.Errorf("without capabilities: %+v", r)
	}
	v.service.kill()
	if r := v.enter(uidBert, true, "work", "id"); r.code != 125 || !strings.Contains(r.stderr, "start the service table-allocator-netns") {
		t.Errorf("without the service: %+v", r)
	}
	if r := v.do("netns", "exec", "work", "true"); r.code != 0 {
		t.Errorf("root without the service: %+v", r)
	}
}

// TestNetnsDoor: a user who says nothing on the socket, or asks without end, keeps nobody else out.
func TestNetnsDoor(t *testing.T) {
	v := newVisited(t)
	path := filepath.Join("/proc", v.inner, "root/run/table-allocator/netns.sock")
	for range 40 { // of root, who is limited as others are
		conn, err := net.Dial("unixpacket", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if r := v.enter(uidBert, true, "work", "id", "-u"); r.stdout != "21002\n" {
		t.Errorf("beside silent connections: %+v", r)
	}
	for _, question := range []string{"", "enter", "enter ", "leased ../x", "enter work\x00", strings.Repeat("x", 4000), "\n\n"} {
		eventually(t, fmt.Sprintf("an answer to %q", question), func() error {
			conn, err := net.Dial("unixpacket", path)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, _ = conn.Write([]byte(question)) // it may be over the limit, and closed
			answer := make([]byte, 1024)
			n, err := conn.Read(answer)
			if question != "" && err != nil || strings.HasPrefix(string(answer[:n]), "ok") {
				return fmt.Errorf("%q, %w", answer[:n], err)
			}
			return nil
		})
	}
}

// TestNetnsGroups: the groups of the process that asks count, as the kernel has them, and not those that name services have of
// its user.
func TestNetnsGroups(t *testing.T) {
	v := newVisited(t)
	v.sh("chmod 755 /run/sbin/table-allocator-enter; echo crew:x:22002: >>/etc/group")
	v.must("netns", "add", "crew", "--ifname", "wan1", "--resolv", "192.0.2.53", "--allow", "@crew")
	many := "22001"
	for n := range 200 {
		many = fmt.Sprintf("%d,%s", 30000+n, many)
	}
	const refused = "there is no namespace of this name"
	tests := []struct {
		who       string
		uid       int
		groups    string
		namespace string
		want      string
	}{
		{"a member by the process alone", uidAnna, "--groups=22001", "work", "21001\n"},
		{"a member by the primary group of the process", uidAnna, "--regid=22001 --clear-groups", "work", "21001\n"},
		{"a member, in 200 groups more", uidAnna, "--groups=" + many, "work", "21001\n"},
		{"in both groups", uidAnna, "--groups=22001,22002", "crew", "21001\n"},
		{"a member by name services alone", uidBert, "--clear-groups", "work", "permission denied"},
		{"in the group of the namespace alone", uidAnna, "--groups=22002", "crew", "permission denied"},
		{"not in the group of the namespace", uidBert, "--groups=22001", "crew", refused},
	}
	check := func() {
		t.Helper()
		for _, tt := range tests {
			args := []string{fmt.Sprintf("--reuid=%d", tt.uid), fmt.Sprintf("--regid=%d", tt.uid)}
			if strings.Contains(tt.groups, "regid") {
				args = args[:1]
			}
			args = slices.Concat(args, strings.Fields(tt.groups), []string{"/run/sbin/table-allocator-enter", tt.namespace, "/usr/bin/id", "id", "-u"})
			cmd := v.here("setpriv", args...)
			r := v.run(cmd.Args[0], cmd.Args[1:]...)
			if refused := r.code == 125 && r.stdout == ""; !strings.Contains(r.stdout+r.stderr, tt.want) || refused == strings.HasSuffix(tt.want, "\n") {
				t.Errorf("%s: %+v", tt.who, r)
			}
		}
	}
	check()
	// The service looks, too, and does not rely on who may open its socket.
	v.sh("chmod 666 /run/table-allocator/netns.sock")
	for n := range tests {
		tests[n].want = strings.Replace(tests[n].want, "permission denied", refused, 1)
	}
	check()
}

// silentConnections opens as many connections to the service as one user may have, tells that there is no other one then, and waits
// until the service has closed them.
const silentConnections = `import socket, time
def connect():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect("/run/table-allocator/netns.sock")
    return s
def ask():
    s = connect()
    try:
        s.send(b"leased work")
        return s.recv(99)
    except OSError:
        return b""
held = [connect() for _ in range(7)]
print("beside seven", ask(), flush=True)
answer = b"x"
while answer: # the service needs a moment to count them
    for s in held:
        s.close()
    time.sleep(0.2)
    held = [connect() for _ in range(8)]
    time.sleep(0.2)
    answer = ask()
print("beside eight", answer, flush=True)
print("closed", all(s.recv(99) == b"" for s in held), flush=True)
while not answer:
    time.sleep(0.2)
    answer = ask()
print("afterwards", answer, flush=True)
while True:
    for s in held:
        s.close()
    time.sleep(0.2)
    held = [connect() for _ in range(8)]
    time.sleep(1.5)
`

// TestNetnsSilent: a user has at most eight connections at once; those on which the user says nothing the service closes, and they
// keep nobody else out.
func TestNetnsSilent(t *testing.T) {
	v := newVisited(t)
	silent := v.start(v.command(uidBert, true, "/usr/bin/python3", "-c", silentConnections))
	for _, line := range []string{"beside seven b'true'", "beside eight b''", "closed True", "afterwards b'true'"} {
		silent.waitLog(line)
	}
	eventually(t, "the user is refused who has eight", func() error {
		if r := v.enter(uidBert, true, "work", "id", "-u"); r.code != 125 || !strings.Contains(r.stderr, "8 others of this user") || r.stdout != "" {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	for range 4 {
		if r := v.enter(uidCarl, true, "work", "id", "-u"); r.stdout != "21003\n" {
			t.Errorf("another user: %+v", r)
		}
	}
	silent.kill()
	eventually(t, "the user enters", func() error {
		if r := v.enter(uidBert, true, "work", "id", "-u"); r.stdout != "21002\n" {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
}

// TestNetnsConfig: the service adds what its configuration names and changes what it changes, and deletes nothing.
func TestNetnsConfig(t *testing.T) {
	v := newVisited(t)
	v.sh(`cat >/etc/table-allocator/netns.json <<'end'
{"group": "leasers", "max": 3, "namespaces": [{"name": "work", "ifname": "wan0", "on_loss": "fallback", "resolv": "192.0.2.55"}, {"name": "more", "ifname": "wan1", "resolv": "192.0.2.53", "ipv6": false}]}
end`)
	v.must("netns", "check")
	if err := v.service.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	v.waitNamespaces(3)
	eventually(t, "work is changed", func() error {
		for _, r := range v.namespaces() {
			if r.Name == "work" && (r.Ifname != "wan0" || r.OnLoss != "fallback" || r.Resolv != "192.0.2.55") {
				return fmt.Errorf("%+v", r)
			}
		}
		return nil
	})
	if r := v.do("netns", "add", "fourth", "--ifname", "wan1", "--resolv", "192.0.2.53"); r.code != 1 || !strings.Contains(r.stderr, `"max"`) {
		t.Errorf("one too many: %+v", r)
	}
	for text, want := range map[string]string{
		`{"groups": "x"}`: "want group, max, pool4 or namespaces", `{"max": 0}`: "from 1 to 255", `{"namespaces": [{"name": "a"}]}`: "no name of an uplink",
		`{"namespaces": [{"name": "a", "ifname": "w", "allow": ["-x"]}]}`: "no name of a user", `{"namespaces": [{"name": "a", "ifname": "w", "on_loss": "x"}]}`: "block",
		`{"namespaces": [{"name": "a", "ifname": "w"}, {"name": "a", "ifname": "w"}]}`: "another namespace a",
	} {
		v.sh("cat >/run/wrong.json <<'end'\n" + text + "\nend")
		if r := v.do("netns", "check", "/run/wrong.json"); r.code != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("%s: %+v", text, r)
		}
	}
	v.sh("chmod 666 /run/wrong.json")
	if r := v.do("netns", "check", "/run/wrong.json"); r.code != 1 || !strings.Contains(r.stderr, "root alone must be able to write it") {
		t.Errorf("a file that others can write: %+v", r)
	}
}
