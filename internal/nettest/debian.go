package nettest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Debian is a root directory with a release of Debian and some of its packages, all of whose services are
// disabled. Tests boot it, or run programs in it, below an overlay.
type Debian struct {
	Suite    string // bookworm
	Packages []string
	Set      string // "" or the name of the set that the root belongs to: MakeDebian makes and removes the roots of one
}

// debianRecipe is part of the key of a root. Raise it with each change of how roots are made.
const debianRecipe = 1

// path returns the directory of the root, made or not.
func (d Debian) path(cache string) string {
	key := sha256.Sum256(fmt.Appendf(nil, "%d {%s %v}", debianRecipe, d.Suite, d.Packages))
	return filepath.Join(cache, fmt.Sprintf("debian%s-%s-%x", d.Set, d.Suite, key[:8]))
}

// Dir returns the directory of a root that Make made.
func (d Debian) Dir() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	path := d.path(cache)
	_, err = os.Stat(path)
	return path, err
}

// MakeDebian makes the roots that are missing in the cache, and removes those of the set that are not in the list.
// It installs mmdebstrap into an overlay for that, and nothing on the host. It needs root, apt-get and the
// network, so it is called before a sandbox is entered.
func MakeDebian(set string, roots ...Debian) error {
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "debian-lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close() // and so unlock
	if err := flock(lock, unix.LOCK_EX); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(cache, "debian"+set+"-*-*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if !slices.ContainsFunc(roots, func(d Debian) bool { return d.path(cache) == path }) {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	for _, d := range roots {
		if _, err := os.Stat(d.path(cache)); err == nil {
			continue
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		err := d.make(cache)
		for range 2 { // an archive may be changed under its reader
			if err != nil {
				time.Sleep(10 * time.Second)
				err = d.make(cache)
			}
		}
		if err != nil {
			return fmt.Errorf("make a root of Debian's %s: %w", d.Suite, err)
		}
	}
	return nil
}

// make makes a root. A directory becomes one by the rename, when it is complete.
func (d Debian) make(cache string) error {
	path := d.path(cache)
	fmt.Fprintf(os.Stderr, "nettest: making a root of Debian's %s, once, in %s\n", d.Suite, path)
	s := stage{Name: "debian", Dir: filepath.Join(cache, "debian-new"), Debian: d}
	if err := os.RemoveAll(s.Dir); err != nil {
		return err
	}
	if err := os.Mkdir(s.Dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(s.Dir)
	code, err := s.run(nil, unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC)
	if err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("apt-get and mmdebstrap, in an overlay, ended with status %d", code)
	}
	return os.Rename(filepath.Join(s.Dir, "made"), path)
}

// debian makes s.Debian in s.Dir/made.
func (s stage) debian() error {
	made := filepath.Join(s.Dir, "made")
	if err := os.Mkdir(made, 0o755); err != nil {
		return err
	}
	if err := s.enterInstaller(bind{made, true}); err != nil {
		return err
	}
	if err := apt([]string{"update"}, []string{"install", "--yes", "--no-install-recommends", "mmdebstrap"}); err != nil {
		return err
	}
	// Each test starts the services that it needs. For the roots that have systemd.
	const disable = `--customize-hook=[ ! -e "$1/usr/bin/systemctl" ] || { mkdir -p "$1/etc/systemd/system-preset"
		echo "disable *" >"$1/etc/systemd/system-preset/00.preset"; systemctl --root="$1" preset-all; rm "$1/etc/systemd/system-preset/00.preset"; }`
	return run("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", "--skip=output/dev",
		"--aptopt=Acquire::Retries 3", "--dpkgopt=force-unsafe-io", disable, "--include="+strings.Join(s.Debian.Packages, ","), s.Debian.Suite, made)
}

// run runs a program of the installer's overlay.
func run(argv ...string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	code, err := runAndReap(path, argv, append(sandboxEnv(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8"))
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: exit status %d", strings.Join(argv[:2], " "), code)
	}
	return err
}

// apt runs apt-get for each list of arguments.
func apt(commands ...[]string) error {
	for _, args := range commands {
		if err := run(slices.Concat([]string{"apt-get", "--quiet",
			"--option=Acquire::Retries=3", "--option=Dpkg::Use-Pty=0", "--option=Dpkg::Options::=--force-unsafe-io"}, args)...); err != nil {
			return err
		}
	}
	return nil
}
