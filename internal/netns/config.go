package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
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
	Group      string // whose users may enter namespaces
	Max        int    // namespaces
	Namespaces []Config
}

// Load reads a configuration, which root alone can write to. None is one without namespaces.
func Load(path string) (File, error) {
	file := File{Group: DefaultGroup, Max: DefaultMax}
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
		case "namespaces":
			return jsonc.EachElement(key, value, "a list of namespaces", func(i int, element []byte) error {
				c := Config{OnLoss: uplink.Block, Resolv: Uplink, IPv6: true}
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
		return fmt.Errorf("%s: unknown key: want group, max or namespaces", key)
	})
}

// read reads a namespace. name is for errors.
func (c *Config) read(name string, text []byte) error {
	err := jsonc.Each(text, func(key string, value []byte) error {
		full := name + "." + key
		switch key {
		case "name":
			return jsonc.Decode(full, value, &c.Name, "a name")
		case "ifname":
			return jsonc.Decode(full, value, &c.Ifname, "the name of a link")
		case "resolv":
			return jsonc.Decode(full, value, &c.Resolv, `"uplink", addresses with commas, or the absolute path of a file`)
		case "ipv6":
			return jsonc.Decode(full, value, &c.IPv6, "true or false")
		case "allow":
			return jsonc.Decode(full, value, &c.Allow, "a list of users and @groups")
		case "on_loss":
			const want = `"block" or "fallback"`
			if err := jsonc.Decode(full, value, &c.OnLoss, want); err != nil {
				return err
			}
			if c.OnLoss != uplink.Block && c.OnLoss != uplink.Fallback {
				return fmt.Errorf("%s: want %s, have %q", full, want, c.OnLoss)
			}
			return nil
		}
		return fmt.Errorf("%s: unknown key: want name, ifname, on_loss, resolv, ipv6 or allow", full)
	})
	if err != nil {
		return err
	}
	if err := c.Check(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

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
	h.Max = file.Max
	for _, cfg := range file.Namespaces {
		if time.Now().Before(refused[cfg.Name]) {
			continue
		}
		delete(refused, cfg.Name)
		s, err := h.known(cfg.Name)
		var do func(context.Context, Config) ([]string, error)
		switch {
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
		text := ""
		if err != nil {
			text = err.Error()
		}
		if key := "configuration " + cfg.Name; text != warned[key] {
			if warned[key] = text; text != "" {
				log.Warn("namespace is not as the configuration says", "namespace", cfg.Name, "ifname", cfg.Ifname, "err", text)
			}
		}
	}
}

func (c Config) equal(o Config) bool {
	return c.Name == o.Name && c.Ifname == o.Ifname && c.OnLoss == o.OnLoss && c.Resolv == o.Resolv && c.IPv6 == o.IPv6 && slices.Equal(c.Allow, o.Allow)
}
