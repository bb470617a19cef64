package install

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/route"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// The kernel has one endpoint for each address and does not say whose it is. Ours are those with a note: a file for
// each address, which is there before the endpoint is.
type endpointNote struct {
	Namespace uint64 `json:"namespace"` // see remember.Namespace
	Index     int    `json:"index"`     // of the link
}

const endpointNotes = "mptcp"

// notedEndpoint returns what is noted for the endpoint of an address, and whether there is one of ours.
func notedEndpoint(addr string) (dir remember.Dir, note endpointNote, noted bool, err error) {
	if _, err := netip.ParseAddr(addr); err != nil {
		return dir, note, false, nil // a key of another kind is no name of a file
	}
	if dir, err = remember.Own(endpointNotes); err != nil {
		return dir, note, false, err
	}
	err = dir.Read(addr, &note)
	if errors.Is(err, fs.ErrNotExist) {
		return dir, note, false, nil
	}
	namespace, namespaceErr := remember.Namespace()
	return dir, note, err == nil && note.Namespace == namespace, errors.Join(err, namespaceErr)
}

// SyncEndpoint adds the MPTCP endpoint of an address that is served, or deletes the one that it no longer has to have.
func (i *Installation) SyncEndpoint() {
	switch {
	case i.Index == 0:
	case i.Uplink.Settings.MPTCP && i.Installed && i.Uplink.IsAddress():
		i.warn("add the MPTCP endpoint", i.addEndpoint())
	default:
		i.warn("delete the MPTCP endpoint", i.env.deleteEndpoint(i.Uplink.Key.Address, i.Index))
	}
}

func (i *Installation) addEndpoint() error {
	addr := i.Uplink.Addr()
	dir, note, noted, err := notedEndpoint(i.Uplink.Key.Address)
	if err != nil {
		return err
	}
	all, err := route.Endpoints()
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Addr == addr && e.Index == i.Index {
			return nil // ours, or that of another program
		}
	}
	if other := endpointManager(i.Index); other != "" {
		i.log.Debug("no MPTCP endpoint of ours: another program manages them", "program", other)
		return nil
	}
	if noted && note.Index != i.Index {
		if shared, err := i.env.OtherHolder(i.Uplink.Key); err != nil || shared {
			return err // the link that came first keeps it
		}
		if err := i.env.deleteEndpoint(i.Uplink.Key.Address, 0); err != nil {
			return err
		}
	}
	if note.Namespace, err = remember.Namespace(); err != nil {
		return err
	}
	note.Index = i.Index
	if err := dir.Write(i.Uplink.Key.Address, note); err != nil {
		return err
	}
	err = route.AddEndpoint(addr, i.Index)
	if err != nil {
		err = errors.Join(err, dir.Remove(i.Uplink.Key.Address))
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("another program has one for this address on another link: %w", err)
	}
	if err == nil {
		i.log.Debug("MPTCP endpoint added")
	}
	return err
}

// deleteEndpoint deletes the endpoint of an address on a link, 0 for any, if it is ours.
func (e *Env) deleteEndpoint(addr string, index int) error {
	dir, note, noted, err := notedEndpoint(addr)
	if err != nil || !noted || index != 0 && note.Index != index {
		return err
	}
	all, err := route.Endpoints()
	if err != nil {
		return err
	}
	for _, found := range all {
		if found.Addr.String() == addr && found.Index == note.Index {
			if err := route.DeleteEndpoint(found); err != nil {
				return err
			}
		}
	}
	return dir.Remove(addr)
}

// removeEndpoint deletes the endpoint of an address whose client was killed.
func (e *Env) removeEndpoint(u uplink.Uplink) error {
	if shared, err := e.OtherHolder(u.Key); err != nil || shared {
		return err
	}
	return e.deleteEndpoint(u.Key.Address, 0)
}

// CollectEndpoints deletes the endpoints of ours of addresses that nobody serves.
func (e *Env) CollectEndpoints(served Served) error {
	dir, err := remember.Own(endpointNotes)
	if err != nil {
		return err
	}
	files, err := dir.Files()
	errs := []error{err}
	for _, file := range files {
		addr, err := netip.ParseAddr(file.Name())
		if err != nil {
			continue
		}
		isServed, err := served(addr)
		if err == nil && !isServed {
			err = e.deleteEndpoint(file.Name(), 0)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// endpointManager names the program that manages the endpoints of a link, "" if there is none: NetworkManager has them
// for each of its links, mptcpd for all.
func endpointManager(index int) string {
	if managedByNetworkManager(index) {
		return "NetworkManager"
	}
	text, err := outside.ReadFile("/proc/net/netlink")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) { // sk Eth Pid ...
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[1] != fmt.Sprint(unix.NETLINK_GENERIC) {
			continue
		}
		if comm, err := outside.ReadFile("/proc/" + fields[2] + "/comm"); err == nil && strings.TrimSpace(string(comm)) == "mptcpd" && mayConfigure(fields[2]) {
			return "mptcpd"
		}
	}
	return ""
}

func managedByNetworkManager(index int) bool {
	state, err := readOutside(filepath.Join("/run/NetworkManager/devices", strconv.Itoa(index)))
	return err == nil && (strings.Contains(string(state), "managed=full") || strings.Contains(string(state), "managed=true"))
}

// mayConfigure reports whether a process has CAP_NET_ADMIN: anybody can take the name of another program.
func mayConfigure(pid string) bool {
	text, err := outside.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(text), "\nCapEff:\t")
	line, _, _ := strings.Cut(rest, "\n")
	effective, err := strconv.ParseUint(line, 16, 64)
	return err == nil && effective&(1<<unix.CAP_NET_ADMIN) != 0
}
