package nettest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// marker exists in the root directory of every sandbox and nowhere else.
const marker = "/.nettest-sandbox"

// stageEnv hands a stage, as JSON, to the process that is to carry it out.
const stageEnv = "NETTEST_STAGE"

// A stage is the work of a process 1: this program starts itself again in a
// new pid namespace to carry it out.
type stage struct {
	Name  string // "sandbox", "layer" or "debian"
	Dir   string // a directory to mount things on, or that of what is built
	Layer string // the layer below the sandbox's root, or ""
	Binds []bind // what the sandbox shares with the host
	// Cgroup is the directory of the sandbox's cgroup, or "".
	Cgroup string
	Debian Debian // the root to make
}

// A bind is a path of the host that keeps its place in a sandbox.
type bind struct {
	Path     string
	Writable bool
}

// Main runs the tests of a package in a sandbox, and exits with their status.
// It is the only statement of a TestMain:
//
//	func TestMain(m *testing.M) { nettest.Main(m, "dnsmasq-base", "isc-dhcp-client") }
//
// All tests of the package share one sandbox: mount, pid, network, UTS and IPC
// namespaces, and an overlay of the host's root. A test may write to /etc,
// start daemons and add links. Nothing of that is left when the test binary
// ends, however it ends. The sandbox shares with the host only the module's
// directory, the Go build cache and the files that "go test" asks for. /tmp
// and /run are empty at first. The network has a loopback and nothing else. If
// the host has cgroup2, /sys/fs/cgroup shows the sandbox's own cgroup as the
// root. /etc/iproute2 is missing, so ip prints the same on every machine:
// numbers, and the names that it knows without a file.
//
// packages names the Debian packages that the tests run, of those in Packages.
// If it names any, the sandbox has all of Packages installed (see BuildLayer).
// The host gets none of them.
//
// A sandbox needs root. Without root the tests are skipped with a message, and
// with CI=true in the environment they fail. "go test" does not cache their
// result, because it does not know what else they depend on.
func Main(m *testing.M, packages ...string) {
	if InSandbox() {
		if signal.Ignored(unix.SIGHUP) { // under nohup; what a test starts is to heed it
			signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
		}
		os.Exit(m.Run())
	}
	NeedRoot()
	code, err := runInSandbox(packages)
	if err != nil {
		fatal(err)
	}
	exit(code)
}

// NeedRoot skips every test of a package without root, as Main does. It is for packages without a sandbox.
func NeedRoot() {
	if os.Geteuid() == 0 {
		return
	}
	const why = "needs root, for namespaces of its own"
	if ci, _ := strconv.ParseBool(os.Getenv("CI")); !ci { // what is no bool is false
		fmt.Printf("--- SKIP: every test of %s: %s\n", filepath.Base(os.Args[0]), why)
		os.Exit(0)
	}
	fatal(fmt.Errorf("%s %s, and CI=true allows no skip", filepath.Base(os.Args[0]), why))
}

// InSandbox reports whether the process runs in a sandbox made by Main.
func InSandbox() bool {
	_, err := os.Lstat(marker)
	return err == nil
}

// runInSandbox runs this program again, with the same arguments, in a new
// sandbox and returns its exit status.
func runInSandbox(packages []string) (int, error) {
	for _, p := range packages {
		if !slices.Contains(Packages, p) {
			return 0, fmt.Errorf("package %q is not in nettest.Packages", p)
		}
	}
	cache, err := cacheDir()
	if err != nil {
		return 0, err
	}
	s := stage{Name: "sandbox", Dir: filepath.Join(cache, "root")}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return 0, err
	}
	if len(packages) > 0 {
		layer, err := openLayer(cache)
		if err != nil {
			return 0, err
		}
		defer layer.Close() // which lets others remove it
		s.Layer = layer.Name()
	}
	if s.Binds, err = sharedPaths(os.Args[1:]); err != nil {
		return 0, err
	}
	cgroup, err := makeCgroup()
	if err != nil {
		return 0, err
	}
	if cgroup != nil {
		s.Cgroup = cgroup.Name()
		defer func() {
			defer cgroup.Close() // which lets others remove it
			if err := removeCgroup(s.Cgroup); err != nil {
				fmt.Fprintln(os.Stderr, "nettest:", err)
			}
		}()
	}
	// Without its test log "go test" does not cache a result.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(a string) bool {
		return strings.HasPrefix(a, "-test.testlogfile=")
	})
	return s.run(args, unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWNET|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC)
}

// run carries out s as process 1 of new namespaces, and returns its exit
// status. The process ends with the caller at the latest.
func (s stage) run(args []string, cloneflags uintptr) (int, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+string(text))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: cloneflags, Pdeathsig: unix.SIGKILL}

	// The kernel sends Pdeathsig when the thread that started the process ends, so that thread must
	// stay. This process ends in the same way when "go test" is killed.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return 0, fmt.Errorf("set the parent death signal: %w", err)
	}
	forwardTo, stop := forwardSignals()
	defer stop()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start namespaces: %w", err)
	}
	forwardTo(cmd.Process.Pid)
	if err := cmd.Wait(); err != nil && cmd.ProcessState == nil {
		return 0, err
	}
	return exitCode(unix.WaitStatus(cmd.ProcessState.Sys().(syscall.WaitStatus))), nil
}

// A process 1 carries out its stage and exits before any code of the test or
// command runs.
func init() {
	text := os.Getenv(stageEnv)
	if text == "" || os.Getpid() != 1 {
		return
	}
	os.Unsetenv(stageEnv)
	var s stage
	err := json.Unmarshal([]byte(text), &s)
	if err != nil {
		fatal(fmt.Errorf("%s: %w", stageEnv, err))
	}
	unix.Umask(0o022)
	// Mounts must not travel back to the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fatal(fmt.Errorf("make mounts private: %w", err))
	}
	code := 0
	switch s.Name {
	case "sandbox":
		code, err = s.sandbox()
	case "layer":
		err = s.layer()
	case "debian":
		err = s.debian()
	default:
		err = fmt.Errorf("no stage %q", s.Name)
	}
	if err != nil {
		fatal(err)
	}
	exit(code)
}

// sandbox builds the root of a sandbox, enters it and runs the tests as a
// child. Process 1 reaps the orphans of daemons; if it ran the tests itself, it
// would take the exit status of processes that the tests wait for.
func (s stage) sandbox() (int, error) {
	cwd, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 0, err
	}
	if err := unix.Mount("tmpfs", s.Dir, "tmpfs", 0, "mode=0755"); err != nil {
		return 0, fmt.Errorf("mount tmpfs on %s: %w", s.Dir, err)
	}
	r := root{
		dir:   filepath.Join(s.Dir, "root"),
		layer: s.Layer,
		upper: filepath.Join(s.Dir, "upper"),
		work:  filepath.Join(s.Dir, "work"),
	}
	if err := r.mount(); err != nil {
		return 0, err
	}
	// The kernel's settings belong to the host; those of the network belong to the namespace.
	if err := mountBind(r.path("/proc/sys/net"), r.path("/proc/sys/net"), true); err != nil {
		return 0, err
	}
	if s.Cgroup != "" {
		if err := enterCgroup(s.Cgroup, r.path("/sys/fs/cgroup")); err != nil {
			return 0, err
		}
	}
	for _, b := range s.Binds {
		if err := r.share(b); err != nil {
			return 0, err
		}
	}
	for path, text := range map[string]string{
		marker:             "",
		"/etc/hostname":    "sandbox\n",
		"/etc/hosts":       "127.0.0.1 localhost sandbox\n::1 localhost\n",
		"/etc/resolv.conf": "nameserver 127.0.0.1\n",
	} {
		// The file may be a link into /run, which is empty.
		if err := os.Remove(r.path(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		if err := os.WriteFile(r.path(path), []byte(text), 0o644); err != nil {
			return 0, err
		}
	}
	// These files give names to protocols and tables, which ip prints instead of numbers.
	if err := os.RemoveAll(r.path("/etc/iproute2")); err != nil {
		return 0, err
	}
	if err := r.pivot(); err != nil {
		return 0, err
	}
	if err := os.Chdir(cwd); err != nil {
		return 0, err
	}
	if err := unix.Sethostname([]byte("sandbox")); err != nil {
		return 0, fmt.Errorf("set hostname: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return 0, fmt.Errorf("set lo up: %w", err)
	}
	return runAndReap(exe, os.Args, sandboxEnv())
}

// sandboxEnv returns the environment of the tests: the host's without the
// variables that name places outside the sandbox. GORACE keeps programs with
// the race detector from waiting a second before they exit.
func sandboxEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "TMPDIR" || name == "XDG_RUNTIME_DIR" || name == "DBUS_SESSION_BUS_ADDRESS"
	})
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if !slices.Contains(filepath.SplitList(path), dir) {
			path += ":" + dir
		}
	}
	if os.Getenv("GORACE") == "" {
		env = append(env, "GORACE=atexit_sleep_ms=0")
	}
	return append(env, "PATH="+path)
}

// sharedPaths returns the paths that a sandbox shares with the host: the
// module, the test binary, what the go command needs to build, and the files
// that the arguments of the test binary name. A directory comes before the
// files in it.
func sharedPaths(args []string) ([]bind, error) {
	module, err := moduleDir()
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	binds := []bind{{module, true}, {filepath.Dir(exe), true}}
	if slices.Contains(private, strings.TrimPrefix(filepath.Dir(exe), "/")) {
		// In a directory such as /tmp, which the sandbox has for itself: a systemd that boots in there empties it.
		binds[1] = bind{exe, false}
	}
	// Without Go on the machine a compiled test runs all the same.
	if out, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE", "GOCACHE").Output(); err == nil {
		for i, path := range strings.Split(strings.TrimSpace(string(out)), "\n") {
			binds = append(binds, bind{path, i == 2}) // writable: GOCACHE
		}
	}
	for _, a := range args {
		name, path, ok := strings.Cut(a, "=")
		if !ok || !filepath.IsAbs(path) || filepath.Clean(path) == "/" {
			continue
		}
		switch name {
		case "-test.coverprofile", "-test.cpuprofile", "-test.memprofile",
			"-test.blockprofile", "-test.mutexprofile", "-test.trace":
			// Only a file that exists can be bound.
			f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
			if err != nil {
				return nil, err
			}
			f.Close()
		case "-test.gocoverdir", "-test.outputdir", "-test.fuzzcachedir":
			if err := os.MkdirAll(path, 0o755); err != nil {
				return nil, err
			}
		default:
			continue
		}
		binds = append(binds, bind{path, true})
	}
	binds = slices.DeleteFunc(binds, func(b bind) bool {
		_, err := os.Stat(b.Path)
		return err != nil
	})
	slices.SortStableFunc(binds, func(a, b bind) int { return strings.Compare(a.Path, b.Path) })
	return binds, nil
}

// moduleDir returns the directory with the go.mod above the working
// directory, or the working directory.
func moduleDir() (string, error) {
	cwd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := cwd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return cwd, nil
		}
	}
}

// runAndReap runs a program, passes signals on to it, reaps every process
// until the program ends, and returns its exit status. It is for process 1.
func runAndReap(path string, argv, env []string) (int, error) {
	forwardTo, stop := forwardSignals()
	defer stop()
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{Env: env, Files: []uintptr{0, 1, 2}})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", path, err)
	}
	forwardTo(pid)
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case got == pid:
			return exitCode(status), nil
		}
	}
}

// exitCode returns the exit status as a shell gives it: 128+n after signal n.
func exitCode(status unix.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// forwardSignals catches the signals that ask this process to end, and SIGQUIT, with which "go test" asks for goroutine
// traces at a timeout, and sends them on to a process once that is started.
func forwardSignals() (to func(pid int), stop func()) {
	c := make(chan os.Signal, 8)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	if !signal.Ignored(unix.SIGHUP) {
		signal.Notify(c, unix.SIGHUP)
	}
	var sending sync.WaitGroup
	to = func(pid int) {
		sending.Go(func() {
			for sig := range c {
				_ = unix.Kill(pid, sig.(unix.Signal)) // the process may have ended
			}
		})
	}
	return to, func() {
		signal.Stop(c)
		close(c)
		sending.Wait()
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "nettest:", err)
	exit(1)
}

// exit ends a process that ran no tests. os.Exit would wait a second for reports
// of the race detector.
func exit(code int) { syscall.Exit(code) }
