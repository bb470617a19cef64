package inspect

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// lookFilter looks for packet filters that drop all that leaves by an uplink or from its address, or all that arrives by it or
// for it, answers too.
func lookFilter(p *patient) (all []symptom) {
	seen := make(map[string]bool) // of a link one is told for each way
	for _, way := range []struct{ hook, key, what, of string }{
		{"type filter hook output", "oifname", "leaves by", "from"},
		{"type filter hook postrouting", "oifname", "leaves by", "from"},
		{"type filter hook egress", "oifname", "leaves by", "from"},
		{"type filter hook input", "iifname", "arrives by", "for"},
		{"type filter hook prerouting", "iifname", "arrives by", "for"},
		{"type filter hook ingress", "iifname", "arrives by", "for"},
	} {
		for _, c := range p.chains(way.hook) {
			for _, l := range p.leases {
				family := map[string]string{"inet": "ip", "inet6": "ip6"}[l.Family]
				what := fmt.Sprintf("a packet filter drops what %s %s", way.what, l.Ifname)
				if !c.concerns(family, l.Ifname) || seen[what] {
					continue
				}
				if line, ofAddress := c.drops(way.key, l.Ifname, l.Address); line != "" {
					if ofAddress {
						what += fmt.Sprintf(" %s %s", way.of, l.Address)
					}
					if seen[what] {
						continue
					}
					seen[what] = true
					all = append(all, symptom{what, fmt.Sprintf("chain %s %s %s: %s", c.family, c.table, c.name, line),
						fmt.Sprintf("accept it there (%s %s), if it is to pass", way.key, l.Ifname)})
				}
			}
		}
	}
	return all
}

// concerns reports whether packets of a family on a link pass a chain. One of the family netdev names its links.
func (c chain) concerns(family, ifname string) bool {
	var head string // type filter hook egress device "wan0" priority ...
	for line := range strings.Lines(c.body) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "type ") {
			head, _, _ = strings.Cut(line, " priority ")
			break
		}
	}
	_, devices, some := strings.Cut(head, " device")
	return (c.family == family || c.family == "inet" || c.family == "netdev") && (!some || strings.Contains(devices, `"`+ifname+`"`))
}

// filterSyntax is of nft's text, for lines of a chain.
type filterSyntax struct {
	ofLinks  *regexp.Regexp
	idle     *regexp.Regexp // what a rule has that decides nothing
	unmarked *regexp.Regexp // is true of every packet without a mark
	abroad   *regexp.Regexp // is true of every packet to other hosts
	decides  *regexp.Regexp // says that other things than links may let a packet pass
	answers  *regexp.Regexp // accepts packets of connections that exist
}

var nftSyntax = sync.OnceValue(func() filterSyntax {
	return filterSyntax{
		ofLinks:  regexp.MustCompile(`^(oifname|iifname|oif|iif) (!= )?(\{[^}]*\}|"[^"]*") *`),
		idle:     regexp.MustCompile(`^(counter packets \d+ bytes \d+|counter|comment "[^"]*"|log( prefix "[^"]*")?( (level|flags|group) \w+)*) *`),
		unmarked: regexp.MustCompile(`^(meta )?mark != 0x0*[1-9a-f][0-9a-f]* *`),
		abroad:   regexp.MustCompile(`^fib daddr type != local *`),
		decides:  regexp.MustCompile(`\b(accept|jump|goto|vmap|queue|return)\b`),
		answers:  regexp.MustCompile(`^ct state [{} a-z,]*established[{} a-z,]* accept$`),
	}
})

// drops returns the rule by which a chain drops all packets of a link, or its policy; "": it does not, or other things than links
// decide. key is oifname of a chain for what leaves, and iifname for what arrives. ofAddress says that the rule is for an address.
func (c chain) drops(key, ifname, addr string) (line string, ofAddress bool) {
	is := nftSyntax()
	host := map[string]string{"oifname": "saddr ", "iifname": "daddr "}[key] + addr + " "
	refuses := false
	usual := []*regexp.Regexp{is.idle}
	if key == "oifname" { // what arrives may be for this host, and have a mark of its connection
		usual = append(usual, is.abroad, is.unmarked)
	}
	for line := range strings.Lines(c.body) {
		line, ofAddress = strings.TrimSpace(line), false
		if strings.HasPrefix(line, "type ") {
			refuses = strings.Contains(line, "policy drop;")
			continue
		}
		if strings.Contains(line, "mark set ") {
			usual = slices.DeleteFunc(usual, func(r *regexp.Regexp) bool { return r == is.unmarked })
		}
		rest := line
		if found := is.ofLinks.FindStringSubmatch(line); found != nil {
			if strings.Contains(found[3], "*") {
				return "", false // a pattern
			}
			named := strings.Contains(found[3], `"`+ifname+`"`)
			if !strings.HasPrefix(found[1], key[:len("oif")]) || named != (found[2] == "") {
				continue
			}
			rest = strings.TrimPrefix(line, found[0])
		}
		for _, family := range []string{"ip ", "ip6 "} {
			if text, found := strings.CutPrefix(rest, family+host); found {
				rest, ofAddress = text, true
			}
		}
		for at := 0; at < len(usual); at++ {
			if found := usual[at].FindString(rest); found != "" {
				rest, at = rest[len(found):], -1 // any may follow
			}
		}
		switch {
		case strings.HasPrefix(rest, "drop"), strings.HasPrefix(rest, "reject"):
			return line, ofAddress
		case key == "oifname" && is.answers.MatchString(rest): // a connection begins without them
		case is.decides.MatchString(rest):
			return "", false
		}
	}
	if refuses {
		return "policy drop", false
	}
	return "", false
}
