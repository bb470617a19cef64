package netns

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// legacies are the programs for the tables of iptables that nftables does not show, and the files that name their tables. The
// service has no right to execute them, for which they need raw sockets: commands of root do it.
var legacies = map[string]string{"iptables-legacy": "/proc/net/ip_tables_names", "ip6tables-legacy": "/proc/net/ip6_tables_names"}

// A legacyReader reads rules of such tables. No event tells of a change there, so the service, which looks at each event of
// others, reads them once in a while: each reading is a process.
type legacyReader struct {
	keep time.Duration // how long an answer counts; 0: what a command reads is what is there

	mu   sync.Mutex
	last map[string]legacyAnswer // by program
}

type legacyAnswer struct {
	rules string
	err   error
	at    time.Time
}

// read returns the rules of FORWARD, as iptables -S prints them.
func (l *legacyReader) read(command string) (rules string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, found := l.last[command]
	if !found || time.Since(a.at) >= l.keep {
		a.rules, a.err = helper(command, "-w", "-S", "FORWARD")
		a.at = time.Now()
		if l.last == nil {
			l.last = make(map[string]legacyAnswer)
		}
		l.last[command] = a
	}
	return a.rules, a.err
}

// forget has the next read be one, since this process changes the rules.
func (l *legacyReader) forget(command string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.last, command)
}

// legacyFilters are those that have a table filter now.
func legacyFilters() (commands []string) {
	for command, path := range legacies {
		text, err := os.ReadFile(path)
		if err == nil && slices.Contains(strings.Fields(string(text)), "filter") {
			commands = append(commands, command)
		}
	}
	slices.Sort(commands)
	return commands
}

// legacyUnread are those whose program is not installed: nobody can tell what such a table does, nor change it.
func legacyUnread(s State) (commands []string) {
	for _, command := range legacyFilters() {
		if s.IPv6 || command == "iptables-legacy" {
			if helperProgram(command) == "" {
				commands = append(commands, command)
			}
		}
	}
	return commands
}

// unsureOf says what a namespace may miss where nobody can tell; "": nothing.
func unsureOf(s State) string {
	unread := legacyUnread(s)
	if !s.routed() || s.Firewall == FirewallNone || len(unread) == 0 {
		return ""
	}
	return "a way through the packet filter of another program: there is a table filter of " + strings.Join(unread, " and ") +
		", which is not installed here: nobody can tell whether it drops what is forwarded (apt-get install iptables)"
}

// leftOf says which rules a namespace that is deleted may leave where nobody can tell; "": none.
func leftOf(s State) string {
	unread := legacyUnread(s)
	if !s.routed() || s.Firewall != FirewallAccept || len(unread) == 0 {
		return ""
	}
	return fmt.Sprintf("namespace %s is deleted, but rules of %s for its link, %s, may be left from when the program was installed (apt-get install iptables; %s -S FORWARD)",
		s.Name, strings.Join(unread, " and "), linkOf(s.Number), unread[0])
}

// legacyDrops are the chains of such tables that drop packets of a namespace, as far as this process may look.
func (h *Host) legacyDrops(s State, link string) (names []string) {
	for _, command := range legacyFilters() {
		rules, err := h.legacy.read(command)
		if err == nil && strings.Contains(rules, "-P FORWARD DROP") && !strings.Contains(rules, " "+link+" ") && (s.IPv6 || command == "iptables-legacy") {
			names = append(names, command+" FORWARD")
		}
	}
	return names
}

// changeLegacies adds rules for a link to such tables, where they drop what is forwarded, or deletes them.
func (h *Host) changeLegacies(link string, accept bool) error {
	var errs []error
	for _, command := range legacyFilters() {
		if helperProgram(command) == "" {
			continue // as unsureOf says
		}
		rules, err := h.legacy.read(command)
		switch {
		case err != nil && !accept: // this process has added none either
			continue
		case err == nil && (accept && strings.Contains(rules, "-P FORWARD DROP") || !accept && strings.Contains(rules, " "+link+" ")):
			err = changeRules(command, "FORWARD", link, accept)
			h.legacy.forget(command)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("change %s FORWARD, which is for netns add and del and not for the service: %w", command, err))
		}
	}
	return errors.Join(errs...)
}
