package nat

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Comment is that of each rule of ours in the tables of others.
const Comment = TableName

// A Foreign chain is one of another program that packets of namespaces pass.
type Foreign struct {
	Family, Table, Name string // family as nft prints it: ip, ip6, inet
	Drops               bool   // by its policy
	table               *nftables.Table
	chain               *nftables.Chain
}

func (f Foreign) String() string { return f.Family + " " + f.Table + " " + f.Name }

// DockerUser is the chain that docker calls first and leaves to the administrator.
const DockerUser = "DOCKER-USER"

// Firewalld is the table of firewalld. It rejects what no zone of its lets pass.
const Firewalld = "firewalld"

// Foreigners lists the chains of other programs with hook forward, and each DockerUser.
func Foreigners() (all []Foreign, err error) {
	c, err := open()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	families := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet"}
	for _, chain := range chains {
		family := families[chain.Table.Family]
		forwards := chain.Hooknum != nil && *chain.Hooknum == *nftables.ChainHookForward && chain.Type == nftables.ChainTypeFilter
		if family == "" || chain.Table.Name == TableName || !forwards && chain.Name != DockerUser {
			continue
		}
		all = append(all, Foreign{family, chain.Table.Name, chain.Name, forwards && chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop, chain.Table, chain})
	}
	return all, nil
}

// Names reports whether a rule of a chain, whoever added it, names a link, or is for all whose name begins as its.
func (f Foreign) Names(link string) (bool, error) {
	c, err := open()
	if err != nil {
		return false, err
	}
	all, err := c.GetRules(f.table, f.chain)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("list rules of %s: %w", f, err)
	}
	for _, r := range all {
		isName := false // what the next expression compares
		for _, e := range r.Exprs {
			switch e := e.(type) {
			case *expr.Meta:
				isName = e.Key == expr.MetaKeyIIFNAME || e.Key == expr.MetaKeyOIFNAME
			case *expr.Cmp:
				if isName && e.Op == expr.CmpOpEq && matches(e.Data, link) {
					return true, nil
				}
			}
		}
	}
	return false, nil
}

// matches reports whether the name that a rule compares is that of a link: it ends with a zero, unless it is a beginning.
func matches(name []byte, link string) bool {
	whole, _, ends := bytes.Cut(name, []byte{0})
	if ends || len(name) == unix.IFNAMSIZ {
		return string(whole) == link
	}
	return len(name) > 0 && strings.HasPrefix(link, string(name))
}

// ours lists our rules in a chain for a link.
func (f Foreign) ours(link string) (c *nftables.Conn, rules []*nftables.Rule, err error) {
	if c, err = open(); err != nil {
		return nil, nil, err
	}
	all, err := c.GetRules(f.table, f.chain)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("list rules of %s: %w", f, err)
	}
	for _, r := range all {
		if text, _ := userdata.GetString(r.UserData, userdata.TypeComment); text != Comment {
			continue
		}
		for _, e := range r.Exprs {
			if cmp, ok := e.(*expr.Cmp); ok && bytes.Equal(cmp.Data, padded(link)) {
				rules = append(rules, r)
			}
		}
	}
	return c, rules, nil
}

// Accept puts rules first in a chain that let pass what comes from a link, and replies to it.
func (f Foreign) Accept(link string) error {
	c, rules, err := f.ours(link)
	const both = 2
	if err != nil || len(rules) == both {
		return err
	}
	for _, r := range rules {
		if err := c.DelRule(r); err != nil {
			return err
		}
	}
	for _, exprs := range [][][]expr.Any{{arrivesBy(link), verdict(expr.VerdictAccept)}, {leavesBy(link), isReply(), verdict(expr.VerdictAccept)}} {
		var whole []expr.Any
		for _, part := range exprs {
			whole = append(whole, part...)
		}
		c.InsertRule(&nftables.Rule{Table: f.table, Chain: f.chain, Exprs: whole, UserData: userdata.AppendString(nil, userdata.TypeComment, Comment)})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("add rules to %s: %w", f, err)
	}
	return nil
}

// Retract deletes our rules for a link from a chain.
func (f Foreign) Retract(link string) error {
	c, rules, err := f.ours(link)
	if err != nil || len(rules) == 0 {
		return err
	}
	for _, r := range rules {
		if err := c.DelRule(r); err != nil {
			return err
		}
	}
	if err := c.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete rules of %s: %w", f, err)
	}
	return nil
}
