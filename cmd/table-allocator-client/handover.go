package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
)

// handoverVariable names the environment variable by which a program that was executed in place of a holder knows what
// to go on with.
const handoverVariable = "TABLE_ALLOCATOR_CLIENT_HANDOVER"

// handover is what the environment variable has.
type handover struct {
	client.Handover
	Dir   string `json:"dir"`   // in which the holder was started: paths of the command line may begin there
	FD    int    `json:"fd"`    // of the socket
	Check bool   `json:"check"` // only print canGoOn, if the program can go on
}

// canGoOn is what a program prints that can go on. One that knows of no handover prints something else.
const canGoOn = "can go on"

// checkPatience is how long the installed program may take to look whether it can go on.
const checkPatience = 5 * time.Second

// startDir is the working directory of the start.
var startDir string

// handedOver returns what a holder that executed this program has handed over; nil: none did.
func handedOver() (*handover, error) {
	text, found := os.LookupEnv(handoverVariable)
	if !found {
		return nil, nil
	}
	os.Unsetenv(handoverVariable)
	from := new(handover)
	if err := json.Unmarshal([]byte(text), from); err != nil {
		return nil, fmt.Errorf("%s: %w", handoverVariable, err)
	}
	if !from.Check {
		unix.CloseOnExec(from.FD)
		from.Socket = os.NewFile(uintptr(from.FD), "socket of the holder")
	}
	startDir = from.Dir
	return from, nil
}

// check says whether this program can go on.
func (h *holdFlags) check() error {
	if _, err := h.from.Accept(h.config.Uplink); err != nil {
		return err
	}
	fmt.Println(canGoOn)
	return nil
}

// goOn holds a lease whose rules stand. The first caller has its answer; who asked for the handover gets his.
func (h *holdFlags) goOn() error {
	from := &h.from.Handover
	if !h.foreground {
		dropHangups()
		h.log.Syslog = true
	}
	log, err := h.logAt(startDir)
	if err != nil { // its directory may be gone; rules and lease are there all the same
		h.log.Path = ""
		if log, err = cli.NewLogger(h.log); err != nil {
			return err
		}
	}
	if u, err := from.Accept(h.config.Uplink); err != nil {
		log.Error("cannot read the settings of the program before; going on with those of the command line", "err", err)
	} else {
		h.config.Uplink = u
	}
	key := h.config.Uplink.Key
	log.Info("going on with a lease", "version", cli.Version(), "ifname", key.Ifname, "addr", key.Address)
	report := func(table uint32, why string) {
		if err := from.Answer(table, why); err != nil { // whoever asked does not wait any more
			log.Debug("nobody waits for the answer", "err", err)
		}
	}
	h.config.From = from
	if goesOn, err := h.follow(log); !goesOn {
		report(0, "the address went meanwhile")
		return err
	}
	return h.holdLease(report, log)
}

// follow takes back what was there for an address that went during the exec, and goes on with the link if that has
// another name since. It reports whether there is an address to go on with.
func (h *holdFlags) follow(log *slog.Logger) (goesOn bool, err error) {
	u := &h.config.Uplink
	name, err := h.linkNow(h.config.From.Index)
	if err != nil || name == u.Key.Ifname {
		return true, nil // without an answer of the kernel, the client waits for the address
	}
	log.Info("the address left its link while the program was executed: its rules and routes are deleted", "ifname", u.Key.Ifname, "addr", u.Key.Address, "now", name)
	h.config.From.Socket.Close() // it has the name of what is taken back
	h.config.From.Socket = nil
	err = client.Release(h.config, log)
	u.Key.Ifname = name
	return name != "", err
}

// linkNow returns the name of the link that has the address, which is that of index or one of the same name; empty: none has.
func (h *holdFlags) linkNow(index int) (string, error) {
	u := h.config.Uplink
	if !u.IsAddress() {
		return u.Key.Ifname, nil
	}
	links, addresses, err := route.HostAddresses()
	name := ""
	for _, a := range addresses {
		if a.Addr != u.Addr() {
			continue
		}
		switch link := links[a.Index]; {
		case link.Name == u.Key.Ifname:
			return link.Name, nil
		case a.Index == index:
			name = link.Name
		}
	}
	return name, err
}

// logAt opens the log as from another working directory.
func (h *holdFlags) logAt(dir string) (*slog.Logger, error) {
	before, err := os.Getwd()
	if err == nil {
		err = os.Chdir(dir)
	}
	if err != nil { // it may be gone
		h.log.Path = ""
		return cli.NewLogger(h.log)
	}
	log, err := cli.NewLogger(h.log)
	return log, errors.Join(err, os.Chdir(before))
}

// executeOwnProgram executes the program that is now where this one was at its start. It returns only if it cannot.
func executeOwnProgram(to client.Handover) error {
	fd := int(to.Socket.Fd())
	text, err := json.Marshal(handover{Handover: to, Dir: startDir, FD: fd})
	if err != nil {
		return err
	}
	path, err := ownProgram()
	if err != nil {
		return err
	}
	if err := closeOnExec(); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil { // inherited
		return fmt.Errorf("fcntl F_SETFD: %w", err)
	}
	err = syscall.Exec(path, os.Args, append(os.Environ(), handoverVariable+"="+string(text)))
	unix.CloseOnExec(fd)
	return fmt.Errorf("execute %s: %w", path, err)
}

// checkOwnProgram says why the program that is now where this one was at its start cannot go on: others can write it,
// it is another program, or it refuses the command line or the settings.
func checkOwnProgram(to client.Handover) error {
	path, err := ownProgram()
	if err != nil {
		return err
	}
	text, err := json.Marshal(handover{Handover: to, Dir: startDir, Check: true})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), checkPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path)
	cmd.Args, cmd.Env, cmd.WaitDelay = os.Args, append(os.Environ(), handoverVariable+"="+string(text)), time.Second
	var out, says strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &says
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s cannot go on with the lease: %w: %q", path, err, says.String())
	}
	if strings.TrimSpace(out.String()) != canGoOn {
		return fmt.Errorf("%s is another program", path)
	}
	return nil
}

// ownProgram returns the program that is now where this one was at its start. It returns an error if anybody else can
// write it: he would get the rights of this process.
func ownProgram() (string, error) {
	path, err := os.Executable() // as it was at the start
	if err != nil {
		return "", err
	}
	if path, err = remember.RootsFile(path); err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err == nil && (!info.Mode().IsRegular() || info.Mode()&0o111 == 0) {
		err = fmt.Errorf("%s is no program", path)
	}
	return path, err
}
