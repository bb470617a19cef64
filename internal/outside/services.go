package outside

import "sync"

// manager is what manages the services of this host. A process asks once: that does not change while it runs.
var manager = sync.OnceValue(func() string {
	for _, m := range []struct{ dir, name string }{{"/run/systemd/system", systemd}, {"/run/openrc", openRC}} {
		if _, err := Stat(m.dir); err == nil {
			return m.name
		}
	}
	return ""
})

const (
	systemd = "systemd"
	openRC  = "OpenRC"
)

// HasSystemd reports whether systemd manages the services of this host.
func HasSystemd() bool { return manager() == systemd }

// Service is what to do with one of our services, as a message says it. verb is that of systemctl: start, restart, reload, or
// "enable --now" to start it now and with the host.
func Service(verb, name string) string { return serviceBy(manager(), verb, name) }

// Journal is where to read what one of our services says, as a message says it.
func Journal(name string) string { return journalBy(manager(), name) }

func serviceBy(manager, verb, name string) string {
	const enable = "enable --now"
	switch {
	case manager == systemd:
		return "systemctl " + verb + " " + name
	case manager == openRC && verb == enable:
		return "rc-update add " + name + " && rc-service " + name + " start"
	case manager == openRC:
		return "rc-service " + name + " " + verb
	case verb == enable: // by a manager whose commands are not known
		verb = "enable and start"
	}
	return verb + " the service " + name
}

func journalBy(manager, name string) string {
	if manager == systemd {
		return "journalctl -u " + name
	}
	return "the log of " + name
}
