package netns

import (
	"fmt"
	"strings"
)

// Unit returns the lines for a unit of systemd whose programs are to be in a namespace. While there is no namespace, the unit
// does not start.
func (h *Host) Unit(name string) (string, error) {
	s, err := h.known(name)
	if err != nil {
		return "", named(name, err)
	}
	var empty []string
	for _, dir := range s.masks() {
		empty = append(empty, dir+":ro")
	}
	return fmt.Sprintf(`# For /etc/systemd/system/UNIT.service.d/netns.conf: its programs are in the namespace %s. Print it again after another kernel
# was installed, since a number in the path of resolv.conf may change.
[Unit]
Wants=table-allocator-netns.service
After=table-allocator-netns.service

[Service]
NetworkNamespacePath=%s
BindReadOnlyPaths=%s:%s
TemporaryFileSystem=%s
`, name, netPin(name), h.memory.resolvFile(name), resolvConf, strings.Join(empty, " ")), nil
}
