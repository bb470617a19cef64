package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"

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
	Dir string `json:"dir"` // in which the holder was started: paths of the command line may begin there
}

// startDir is the working directory of the start.
var startDir string

// handedOver returns what a holder that executed this program has handed over.
func handedOver() (text string, found bool) {
	text, found = os.LookupEnv(handoverVariable)
	os.Unsetenv(handoverVariable)
	return text, found
}

// goOn holds a lease whose rules stand. The caller has its answer.
func (h *holdFlags) goOn(text string) error {
	var from handover
	wrong := json.Unmarshal([]byte(text), &from)
	startDir = from.Dir
	h.log.Syslog = h.log.Syslog || !h.foreground
	log, err := h.logAt(from.Dir)
	if err != nil { // its directory may be gone; rules and lease are there all the same
		h.log.Path = ""
		if log, err = cli.NewLogger(h.log); err != nil {
			return err
		}
	}
	if wrong != nil {
		log.Error("going on with the settings of the command line", "err", fmt.Errorf("%s: %w", handoverVariable, wrong))
	} else if u, err := from.Accept(h.config.Uplink); err != nil {
		log.Error("going on with the settings of the command line", "err", err)
	} else {
		h.config.Uplink = u
	}
	key := h.config.Uplink.Key
	log.Info("going on with a lease", "version", cli.Version(), "ifname", key.Ifname, "addr", key.Address)
	if goesOn, err := h.follow(from.Index, log); !goesOn {
		return err
	}
	return h.holdLease(func(uint32, string) {}, log)
}

// follow takes back what was there for an address that went during the exec, and goes on with the link if that has
// another name since. It reports whether there is an address to go on with.
func (h *holdFlags) follow(index int, log *slog.Logger) (goesOn bool, err error) {
	u := &h.config.Uplink
	name, err := h.linkNow(index)
	if err != nil || name == u.Key.Ifname {
		return true, nil // without an answer of the kernel, the client waits for the address
	}
	log.Info("the address went meanwhile: what was there for it is taken back", "ifname", u.Key.Ifname, "addr", u.Key.Address, "now", name)
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
	kernel, err := route.Dial()
	if err != nil {
		return "", err
	}
	defer kernel.Close()
	links, addresses, err := kernel.HostAddresses()
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
	text, err := json.Marshal(handover{to, startDir})
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
	return fmt.Errorf("execute %s: %w", path, syscall.Exec(path, os.Args, append(os.Environ(), handoverVariable+"="+string(text))))
}

// checkOwnProgram says why ownProgram must not be executed.
func checkOwnProgram() error {
	_, err := ownProgram()
	return err
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
