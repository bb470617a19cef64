package netns

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// legacies are the programs for the tables of iptables that nftables does not show, and the files that name their tables. The
// service has no right to execute them, for which they need raw sockets: commands of root do it.
var legacies = map[string]string{"iptables-legacy": "/proc/net/ip_tables_names", "ip6tables-legacy": "/proc/net/ip6_tables_names"}

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

// legacyDrops are the chains of such tables that drop packets of a namespace, as far as this process may look.
func legacyDrops(s State, link string) (names []string) {
	for _, command := range legacyFilters() {
		rules, err := helper(command, "-w", "-S", "FORWARD")
		if err == nil && strings.Contains(rules, "-P FORWARD DROP") && !strings.Contains(rules, " "+link+" ") && (s.IPv6 || command == "iptables-legacy") {
			names = append(names, command+" FORWARD")
		}
	}
	return names
}

// changeLegacies adds rules for a link to such tables, where they drop what is forwarded, or deletes them.
func changeLegacies(link string, accept bool) error {
	var errs []error
	for _, command := range legacyFilters() {
		rules, err := helper(command, "-w", "-S", "FORWARD")
		switch {
		case err != nil && !accept: // this process has added none either
			continue
		case err == nil && (accept && strings.Contains(rules, "-P FORWARD DROP") || !accept && strings.Contains(rules, " "+link+" ")):
			err = changeRules(command, "FORWARD", link, accept)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("change %s FORWARD, which is for netns add and del and not for the service: %w", command, err))
		}
	}
	return errors.Join(errs...)
}
