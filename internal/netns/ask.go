package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/probe"
)

// serverPatience is how long a name server may take for its answer.
const serverPatience = 3 * time.Second

// AskServers asks the name servers of a namespace, each from inside, and returns what is wrong with those that programs in there
// get no answers from.
func (h *Host) AskServers(ctx context.Context, name string) error {
	s, err := h.known(name)
	if err != nil {
		return named(name, err)
	}
	text, err := os.ReadFile(h.memory.resolvFile(s.Name))
	if err != nil {
		return named(name, err)
	}
	servers := serversIn(string(text))
	if len(servers) == 0 {
		return named(name, errors.New("it has no name server: no name resolves in it (--resolv)"))
	}
	var errs []error
	for _, server := range servers {
		if err := askFrom(ctx, name, server); err != nil {
			errs = append(errs, named(name, fmt.Errorf("name server %s: %w", server, err)))
		}
	}
	return errors.Join(errs...)
}

// serversIn are the name servers of a resolv.conf.
func serversIn(text string) (servers []netip.Addr) {
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(words[1]); err == nil {
			servers = append(servers, addr)
		}
	}
	return servers
}

// askFrom asks a name server from inside of a namespace.
func askFrom(ctx context.Context, name string, server netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, serverPatience)
	defer cancel()
	from := probe.Uplink{Address: netip.IPv6Unspecified()}
	if server.Is4() {
		from.Address = netip.IPv4Unspecified()
	}
	kind, err := probe.ParseKind("dns")
	if err != nil {
		return err
	}
	var answer probe.Answer
	if err := inside(name, func() error {
		answer = probe.Ask(ctx, from, kind, server)
		return nil
	}); err != nil {
		return err
	}
	switch {
	case errors.Is(answer.Err, unix.ECONNREFUSED):
		return errors.New("port 53 is refused there, or by a filter on the way")
	case errors.Is(answer.Err, os.ErrDeadlineExceeded) || errors.Is(answer.Err, context.DeadlineExceeded):
		return fmt.Errorf("no answer within %s, or only that it failed", serverPatience)
	}
	return answer.Err
}
