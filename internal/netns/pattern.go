package netns

import (
	"context"
	"errors"
	"log/slog"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// SetLink takes over the name of a link, or a pattern of path.Match for names.
func (c *Config) SetLink(text string) {
	c.Ifname, c.Pattern = text, ""
	if strings.ContainsAny(text, `*?[\`) {
		c.Ifname, c.Pattern = "", text
	}
}

// linkAndMarking chooses the link of a pattern, before what the namespace has now, and asks the server for its marking.
func (h *Host) linkAndMarking(ctx context.Context, cfg *Config, now string) (marking wire.Marking, err error) {
	if cfg.Pattern != "" {
		if cfg.Ifname, err = h.pick(cfg.Pattern, now); err != nil {
			return marking, err
		}
	}
	return bind.MarkingOf(ctx, h.binding(State{Config: *cfg}))
}

// pick returns the link of a pattern: the one so far as long as it has a lease, else the first that has one, by name. Without
// any it stays what it is, and is else the first link of the pattern, or the first that may come.
func (h *Host) pick(pattern, now string) (ifname string, err error) {
	matches := func(name string) bool { ok, _ := path.Match(pattern, name); return ok } // Check has looked at the pattern
	links, err := h.kernel.Links()
	if err != nil {
		return "", err
	}
	var names []string
	for _, l := range links {
		if matches(l.Name) && l.Name != uplink.Loopback && (Config{Name: "any", Ifname: l.Name, Resolv: Uplink}).Check() == nil {
			names = append(names, l.Name)
		}
	}
	slices.Sort(names)
	if matches(now) {
		names = append([]string{now}, names...)
	}
	for _, name := range names {
		if leased, err := h.leased(name); leased || err != nil {
			return name, err
		}
	}
	if len(names) > 0 {
		return names[0], nil
	}
	first := strings.NewReplacer("*", "0", "?", "0", "[", "", "]", "", `\`, "").Replace(pattern)
	return first[:min(len(first), unix.IFNAMSIZ-1)], nil
}

// followPatterns gives namespaces another link of their pattern where the one so far has no lease any more. What could not be
// done is in refused, until when.
func (h *Host) followPatterns(ctx context.Context, log *slog.Logger, warned map[string]string, refused map[string]time.Time) {
	states, err := h.memory.all()
	if err != nil {
		return // syncAll has said so
	}
	for _, s := range states {
		what := s.Name + " of " + s.Pattern
		if s.Pattern == "" || s.Phase != Up || time.Now().Before(refused[what]) {
			continue
		}
		delete(refused, what)
		ifname, err := h.pick(s.Pattern, s.Ifname)
		if err == nil && ifname != s.Ifname {
			limited, cancel := context.WithTimeout(ctx, patience)
			_, err = h.change(limited, s.Config, &s.Config)
			cancel()
			switch {
			case errors.Is(err, errOvertaken): // the next look is at what it is now
				continue
			case err == nil:
				log.Info("namespace is on another link of its pattern", "namespace", s.Name, "ifname", ifname, "before", s.Ifname)
			default:
				refused[what] = time.Now().Add(tryAgain)
			}
		}
		h.warn(log, warned, what, err)
	}
}
