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

	"golang.org/x/sys/unix"
)

// Packages lists the Debian packages that a sandbox has installed.
var Packages = []string{
	"avahi-daemon",
	"avahi-utils",
	"curl",
	"dbus",
	"dhcpcd-base",
	"dnsmasq-base",
	"ifupdown",
	"iproute2",
	"iputils-ping",
	"isc-dhcp-client",
	"isc-dhcp-server",
	"lintian",
	"network-manager",
	"nftables",
	"passt",
	"procps",
	"python3",
	"radvd",
	"rpm",
	"rpmlint",
	"socat",
	"sqlite3",
	"strace",
	"systemd",
	"tcpdump",
	"udev",
	"wireguard-go",
	"wireguard-tools",
}

// systemDirs are the directories in "/" that packages write to.
var systemDirs = []string{"bin", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr", "var"}

// layerRecipe is part of a layer's key. Raise it with each change of how layers
// are built.
const layerRecipe = 1

// BuildLayer installs Packages into an overlay over the host's root. It keeps
// the files that the installation wrote, the layer, in .cache of the module, or
// in XDG_CACHE_HOME if that is set. It builds a layer only if the list or the
// host's own packages have changed since the last one. It changes nothing on
// the host, and starts and stops none of the host's services. It needs root,
// apt-get and the network.
//
// Main builds the layer if it is missing. The command
// go run ./internal/nettest/layer does so without the time limit of a test.
func BuildLayer() error {
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	layer, err := openLayer(cache)
	if err != nil {
		return err
	}
	return layer.Close()
}

// cacheDir returns the directory for layers; it need not exist.
func cacheDir() (string, error) {
	if dir := os.Getenv("XDG_CACHE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "table-allocator", "nettest"), nil
	}
	module, err := moduleDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(module, ".cache", "nettest"), nil
}

// openLayer returns the open directory of the layer for this host. It builds the
// layer if that is missing. Nobody removes the layer until the directory is
// closed.
func openLayer(cache string) (*os.File, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("installing the packages for the tests into an overlay needs root")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	defer lock.Close() // and so unlock
	if err := flock(lock, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		fmt.Fprintln(os.Stderr, "nettest: waiting for another build of the package layer")
		err = flock(lock, unix.LOCK_EX)
		if err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	key, err := layerKey()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(cache, "layer-"+key)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := buildLayer(cache, path); err != nil {
			return nil, fmt.Errorf("build the package layer: %w", err)
		}
	} else if err != nil {
		return nil, err
	}
	layer, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := flock(layer, unix.LOCK_SH); err != nil {
		layer.Close()
		return nil, err
	}
	return layer, nil
}

// layerKey returns a hash of all that a layer depends on.
func layerKey() (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, layerRecipe, Packages)
	for _, name := range []string{"/etc/debian_version", "/var/lib/dpkg/status"} {
		b, err := os.ReadFile(name)
		if err != nil {
			return "", fmt.Errorf("the tests take dhclient, NetworkManager and the like from Debian packages, so they need a Debian or Ubuntu machine: %w", err)
		}
		fmt.Fprintln(h, name, len(b))
		h.Write(b)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// buildLayer builds the layer path. The caller holds the lock of the cache.
func buildLayer(cache, path string) error {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("the tests take dhclient, NetworkManager and the like from Debian packages: %w", err)
	}
	fmt.Fprintf(os.Stderr, "nettest: installing the packages for the tests, once, into %s, not into this system\n", path)
	if err := removeOldLayers(cache); err != nil {
		return err
	}
	// removeOldLayers has removed what an interrupted build left. A directory becomes a layer by the
	// rename below, when it is complete.
	s := stage{Name: "layer", Dir: filepath.Join(cache, "new")}
	if err := os.Mkdir(s.Dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(s.Dir)
	// The network namespace is the host's: apt-get needs the network.
	code, err := s.run(nil, unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC)
	if err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("apt-get, in an overlay, ended with status %d", code)
	}
	upper := filepath.Join(s.Dir, "upper")
	for _, dir := range []string{"var/cache/apt", "var/lib/apt", "var/log"} {
		if err := os.RemoveAll(filepath.Join(upper, dir)); err != nil {
			return err
		}
	}
	return os.Rename(upper, path)
}

// removeOldLayers removes the layers that no sandbox uses from the cache.
func removeOldLayers(cache string) error {
	old, err := filepath.Glob(filepath.Join(cache, "layer-*"))
	if err != nil {
		return err
	}
	for _, path := range append(old, filepath.Join(cache, "new")) {
		dir, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := flock(dir, unix.LOCK_EX|unix.LOCK_NB); err == nil {
			err = os.RemoveAll(path)
			if err != nil {
				dir.Close()
				return err
			}
		}
		dir.Close()
	}
	return nil
}

// layer installs Packages into the overlay directory s.Dir/upper.
func (s stage) layer() error {
	if err := s.enterInstaller(); err != nil {
		return err
	}
	return apt([]string{"update"}, slices.Concat([]string{"install", "--yes", "--no-install-recommends"}, Packages))
}

// enterInstaller makes an overlay over the host's root in s.Dir, into which packages can be installed, the
// root of the process.
func (s stage) enterInstaller(shared ...bind) error {
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	r := root{
		dir:   filepath.Join(s.Dir, "root"),
		upper: filepath.Join(s.Dir, "upper"),
		work:  filepath.Join(s.Dir, "work"),
		only:  systemDirs,
	}
	if err := r.mount(); err != nil {
		return err
	}
	for _, b := range shared {
		if err := r.share(b); err != nil {
			return err
		}
	}
	// /etc/resolv.conf may be a link to a file in /run, and the new /run is empty.
	if real, err := filepath.EvalSymlinks("/etc/resolv.conf"); err == nil && strings.HasPrefix(real, "/run/") {
		if err := os.MkdirAll(filepath.Dir(r.path(real)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(r.path(real), resolv, 0o644); err != nil {
			return err
		}
	}
	if err := r.pivot(); err != nil {
		return err
	}
	// Packages ask this program before they start a service; 101 means no.
	if err := os.WriteFile("/usr/sbin/policy-rc.d", []byte("#!/bin/sh\nexit 101\n"), 0o755); err != nil {
		return err
	}
	return os.Chmod("/usr/sbin/policy-rc.d", 0o755) // the file may have existed with another mode
}

// flock locks a whole file or directory.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		return nil
	}
}
