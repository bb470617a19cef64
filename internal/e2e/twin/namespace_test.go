package twin

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// settings are what each namespace has before the commands of a host: packets are forwarded, the
// way back is not checked, addresses are there at once, and the far ends of links have none.
var settings = []string{
	"sysctl -qw net.ipv4.ip_forward=1",
	"sysctl -qw net.ipv6.conf.all.forwarding=1",
	"sysctl -qw net.ipv4.conf.all.rp_filter=0",
	"sysctl -qw net.ipv4.conf.default.rp_filter=0",
	"sysctl -qw net.ipv6.conf.all.accept_dad=0",
	"sysctl -qw net.ipv6.conf.default.accept_dad=0",
	"sysctl -qw net.ipv6.conf.default.addr_gen_mode=1",
}

// namespace is a network namespace with a socket to ask it.
type namespace struct {
	*nettest.Namespace
	*socket
}

func newNamespace(name string) (*namespace, error) {
	ns, err := nettest.Open(name)
	if err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	n := &namespace{Namespace: ns}
	if n.socket, err = dial(ns); err != nil {
		_ = ns.Close() // the error is the one to tell
		return nil, err
	}
	if _, err := n.run(settings); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *namespace) close() {
	n.socket.close()
	_ = n.Close() // a file that was only read
}

var failedLine = regexp.MustCompile(`(.*)\nCommand failed -:(\d+)`)

// run runs commands, all of them even if some fail, and returns the places of those that failed.
func (n *namespace) run(commands []string) (failed []int, err error) {
	reasons, err := n.runAll(commands)
	return slices.Sorted(maps.Keys(reasons)), err
}

// exists is why the kernel refuses to add what it has.
const exists = "File exists"

// runAll is run that also tells why commands failed. What "ip" is to do goes through one process as long as nothing else
// comes between.
func (n *namespace) runAll(commands []string) (failed map[int]string, err error) {
	failed = make(map[int]string)
	for i := 0; i < len(commands); {
		setting, ok := strings.CutPrefix(commands[i], "sysctl -qw ")
		if ok {
			if err := n.set(setting); err != nil {
				failed[i] = err.Error()
			}
			i++
			continue
		}
		first, family := i, familyFlag(commands[i])
		var batch strings.Builder
		for ; i < len(commands) && strings.HasPrefix(commands[i], "ip ") && familyFlag(commands[i]) == family; i++ {
			if endsBatch(commands[i]) && i > first {
				break
			}
			batch.WriteString(strings.TrimPrefix(commands[i][len("ip "):], family) + "\n")
			if endsBatch(commands[i]) {
				i++
				break
			}
		}
		if first == i {
			return nil, fmt.Errorf("command %q: neither ip nor sysctl", commands[i])
		}
		lines, err := n.batch(family, batch.String())
		if err != nil {
			return nil, err
		}
		for line, why := range lines {
			failed[first+line] = why
		}
		if takesCarrier(commands[i-1]) {
			if err := n.syncCarriers(); err != nil {
				return nil, err
			}
		}
	}
	return failed, nil
}

// takesCarrier reports whether a bridge may have lost its last port by a command.
func takesCarrier(command string) bool {
	return strings.HasPrefix(command, "ip link del ") || strings.HasSuffix(command, " down")
}

// syncCarriers has the kernel say at once what it says up to a second later: that links have no carrier any more. It deletes
// nexthop objects then, and what comes in between would find them on one host only.
func (n *namespace) syncCarriers() error {
	names, err := n.linkNames()
	if err != nil {
		return err
	}
	var fd int
	if n.Do(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) }); err != nil {
		return fmt.Errorf("open a socket to ask for carriers: %w", err)
	}
	defer unix.Close(fd)
	for _, name := range names {
		value := [2]uint32{unix.ETHTOOL_GLINK}
		request := struct {
			name  [unix.IFNAMSIZ]byte
			value *[2]uint32
			rest  [16]byte
		}{value: &value}
		copy(request.name[:], name)
		// The answer is of no use. A link may have none, and is none of a bridge then.
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	}
	return nil
}

// endsBatch reports whether "ip" leaves the rest of a batch out if it does not understand a command, whatever it was told:
// one with several next hops of which a link is gone, and a nexthop object or a master that is such a link. Behind others the
// kernel needs a hint, see syncCarriers.
func endsBatch(command string) bool {
	return takesCarrier(command) || strings.Contains(command, " nexthop via ") || strings.HasPrefix(command, "ip nexthop ") || strings.Contains(command, " master ")
}

// familyFlag is the "-6" of a command for "ip", which stands there for rules without an address.
func familyFlag(command string) string {
	if strings.HasPrefix(command, "ip -6 ") {
		return "-6"
	}
	return ""
}

// batch gives lines to "ip" and returns the indexes of those that it could not carry out, with the reasons.
func (n *namespace) batch(family, lines string) (failed map[int]string, err error) {
	failed = make(map[int]string)
	var stderr strings.Builder
	cmd := exec.Command("ip", "-force", "-batch", "-")
	if family != "" {
		cmd.Args = append(cmd.Args, family)
	}
	cmd.Stdin, cmd.Stderr = strings.NewReader(lines), &stderr
	if err := n.Start(cmd); err != nil {
		return nil, fmt.Errorf("start ip: %w", err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return nil, fmt.Errorf("run ip: %w", err)
	}
	if exit != nil && strings.Count(lines, "\n") == 1 {
		why, _, _ := strings.Cut(stderr.String(), "\nCommand failed ") // as below, or it was not understood
		return map[int]string{0: why}, nil
	}
	if exit != nil && exit.ExitCode() != 1 {
		return nil, fmt.Errorf("ip left out what followed on a command that it did not understand (see endsBatch):\n%s%s", lines, &stderr)
	}
	for _, match := range failedLine.FindAllStringSubmatch(stderr.String(), -1) {
		line, err := strconv.Atoi(match[2])
		if err != nil {
			return nil, err
		}
		failed[line-1] = match[1]
	}
	return failed, nil
}

// set changes one of the kernel's settings for the namespace.
func (n *namespace) set(setting string) (err error) {
	name, value, _ := strings.Cut(setting, "=")
	n.Do(func() {
		err = os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value), 0o644)
	})
	return err
}
