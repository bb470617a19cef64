package nat

import (
	"context"
	"os/exec"
	"strings"
	"time"
)

// A Chain is one of nftables, whoever made it, as the command nft prints it: rules of iptables are in the words of that, too, which
// the kernel does not know.
type Chain struct{ Family, Table, Name, Body string }

// Listed lists all chains. Without nft, or without the right to list, there are none.
func Listed() (all []Chain) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	text, _ := exec.CommandContext(ctx, "nft", "list", "ruleset").Output() // there is no nft, or no right to list
	var c *Chain
	family, table := "", ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch fields := strings.Fields(line); {
		case len(fields) == 4 && fields[0] == "table":
			family, table = fields[1], fields[2]
		case len(fields) == 3 && fields[0] == "chain":
			all = append(all, Chain{Family: family, Table: table, Name: fields[1]})
			c = &all[len(all)-1]
		case line == "}":
			c = nil
		case c != nil:
			c.Body += line + "\n"
		}
	}
	return all
}
