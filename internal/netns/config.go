package netns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/remember"
	"github.com/table-allocator/table-allocator/internal/uplink"
)

// ConfigPath is the file of the namespaces that the service makes.
const ConfigPath = "/etc/table-allocator/netns.json"

// File is the configuration of the service.
type File struct {
	Group      string       // whose users may enter namespaces
	Max        int          // namespaces
	Pool4      netip.Prefix // of IPv4 addresses, of 23 bits at most
	Namespaces []Config
}

// Named returns the namespace of a name.
func (f File) Named(name string) (c Config, found bool) {
	at := slices.IndexFunc(f.Namespaces, func(c Config) bool { return c.Name == name })
	if at < 0 {
		return c, false
	}
	return f.Namespaces[at], true
}

// Load reads a configuration, which root alone can write to. None is one without namespaces.
func Load(path string) (File, error) {
	file := File{Group: DefaultGroup, Max: DefaultMax, Pool4: DefaultInet}
	real, err := remember.RootsFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return file, err
	}
	f, err := os.Open(real)
	if err != nil {
		return file, err
	}
	defer f.Close()
	if err := file.read(f); err != nil {
		return file, fmt.Errorf("configuration %s: %w", path, err)
	}
	return file, nil
}

func (f *File) read(r io.Reader) error {
	return jsonc.Read(r, func(key string, value []byte) error {
		switch key {
		case "group":
			return decodeName(key, value, &f.Group)
		case "max":
			const want = "a number from 1 to 255"
			if err := jsonc.Decode(key, value, &f.Max, want); err != nil {
				return err
			}
			if f.Max < 1 || f.Max > maxNumber {
				return fmt.Errorf("%s: want %s", key, want)
			}
			return nil
		case "pool4":
			return f.readPool(key, value)
		case "namespaces":
			return jsonc.EachElement(key, value, "a list of namespaces", func(i int, element []byte) error {
				c := Config{OnLoss: uplink.Block, IPv6: true, Start: AtBoot}
				name := fmt.Sprintf("%s[%d]", key, i)
				if err := c.read(name, element); err != nil {
					return err
				}
				if slices.ContainsFunc(f.Namespaces, func(o Config) bool { return o.Name == c.Name }) {
					return fmt.Errorf("%s: there is another namespace %s", name, c.Name)
				}
				f.Namespaces = append(f.Namespaces, c)
				return nil
			})
		}
		return fmt.Errorf("%s: unknown key: want group, max, pool4 or namespaces", key)
	})
}

func (f *File) readPool(key string, value []byte) error {
	const want = "a network of IPv4, as \"172.24.0.0/16\", with room for 255 namespaces: 23 bits at most"
	if err := jsonc.Decode(key, value, &f.Pool4, want); err != nil {
		return err
	}
	if !f.Pool4.Addr().Is4() || f.Pool4.Bits() > maxPoolBits || f.Pool4 != f.Pool4.Masked() {
		return fmt.Errorf("%s: want %s, have %s", key, want, f.Pool4)
	}
	return nil
}

// read reads a namespace. name is for errors.
func (c *Config) read(name string, text []byte) error {
	link := ""
	keys := []struct {
		name string
		into any
		want string
	}{
		{"name", &c.Name, "a name"},
		{"ifname", &link, "the name of a link, or a pattern"},
		{"on_loss", &c.OnLoss, `"block" or "fallback"`},
		{"resolv", &c.Resolv, `"uplink", addresses with commas, or the absolute path of a file`},
		{"ipv6", (*wayOf)(c), `true, false, or one of "auto", "nat", "prefix", "proxy", "npt" and "off"`},
		{"allow", &c.Allow, "a list of users and @groups"},
		{"host_access", &c.HostAccess, `a list of ports, as "tcp:631"`},
		{"mask", &c.Mask, `a list of "nscd", "resolved" and "avahi"`},
		{"start", &c.Start, `"boot", "on-demand" or "manual"`},
		{"firewall", &c.Firewall, `"accept" or "none"`},
		{"wiring", &c.Wiring, wirings},
		{"vpn", &c.VPN, "the absolute path of a configuration of OpenVPN or WireGuard"},
		{"run", &c.Run, "a list of commands, each a list of a path and its arguments"},
		{"run_as", &c.RunAs, "the name of a user"},
	}
	err := jsonc.Each(text, func(key string, value []byte) error {
		for _, k := range keys {
			if k.name == key {
				return jsonc.Decode(name+"."+key, value, k.into, k.want)
			}
		}
		return fmt.Errorf("%s.%s: unknown key: want %s", name, key, keyNames)
	})
	if err != nil {
		return err
	}
	c.SetLink(link)
	if c.Resolv == "" {
		c.Resolv = Uplink
		if c.VPN != "" {
			c.Resolv = VPN
		}
	}
	if err := c.Check(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

const keyNames = "name, ifname, on_loss, resolv, ipv6, allow, host_access, mask, start, firewall, wiring, vpn, run or run_as"

func decodeName(key string, value []byte, into *string) error {
	if err := jsonc.Decode(key, value, into, "the name of a group"); err != nil {
		return err
	}
	if !accountSyntax().MatchString(*into) {
		return fmt.Errorf("%s: %q is no name of a group", key, *into)
	}
	return nil
}

// apply adds the namespaces of a configuration that are missing, and changes those that differ. It deletes none. What it
// warns of it says once. What could not be done is in refused, until when: a failure has events itself.
func (h *Host) apply(ctx context.Context, file File, log *slog.Logger, warned map[string]string, refused map[string]time.Time) {
	h.Max, h.Pool4 = file.Max, file.Pool4
	h.warn(log, warned, "pool4", h.poolDiffers(file.Pool4))
	for _, cfg := range file.Namespaces {
		if time.Now().Before(refused[cfg.Name]) {
			continue
		}
		delete(refused, cfg.Name)
		s, err := h.known(cfg.Name)
		var do func(context.Context, Config) ([]string, error)
		switch {
		case errors.Is(err, ErrUnknown) && cfg.Start != AtBoot:
			err = nil
		case errors.Is(err, ErrUnknown):
			do, err = h.Add, nil
		case err == nil && !s.equal(cfg):
			do = h.Change
		}
		if do != nil {
			limited, cancel := context.WithTimeout(ctx, patience)
			if _, err = do(limited, cfg); err == nil {
				log.Info("namespace is as the configuration says", "namespace", cfg.Name, "ifname", cfg.Ifname)
			} else {
				refused[cfg.Name] = time.Now().Add(tryAgain)
			}
			cancel()
		}
		h.warn(log, warned, cfg.Name, err)
	}
}

// warn warns once of what is not as the configuration says.
func (h *Host) warn(log *slog.Logger, warned map[string]string, what string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if key := "configuration " + what; text != warned[key] {
		if warned[key] = text; text != "" {
			log.Warn("namespace is not as the configuration says", "namespace", what, "err", text)
		}
	}
}

// poolDiffers is the error that another pool is in use.
func (h *Host) poolDiffers(want netip.Prefix) error {
	if pools, err := h.memory.pools(); err == nil && pools.Inet != want {
		if states, err := h.memory.all(); err == nil && len(states) > 0 {
			return fmt.Errorf("%s stays the pool of addresses until all namespaces are deleted", pools.Inet)
		}
	}
	return nil
}

func (c Config) equal(o Config) bool {
	same := func(a, b []string) bool { return slices.Equal(a, b) }
	return c.Name == o.Name && c.Pattern == o.Pattern && (c.Pattern != "" || c.Ifname == o.Ifname) && c.OnLoss == o.OnLoss && c.Resolv == o.Resolv && c.IPv6 == o.IPv6 && cmp.Or(c.Way, WayAuto) == cmp.Or(o.Way, WayAuto) && same(c.Allow, o.Allow) &&
		same(c.HostAccess, o.HostAccess) && same(c.Mask, o.Mask) && (c.Mask == nil) == (o.Mask == nil) && slices.EqualFunc(c.Run, o.Run, same) && c.RunAs == o.RunAs && c.VPN == o.VPN && cmp.Or(c.Wiring, WiringNAT) == cmp.Or(o.Wiring, WiringNAT) && c.Firewall == o.Firewall
}
