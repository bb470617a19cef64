package netns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/nat"
	"github.com/table-allocator/table-allocator/internal/outside"
)

// What becomes of packets of a namespace in the tables of other programs.
const (
	FirewallAuto   = ""       // rules where others want them: DOCKER-USER, a zone of firewalld
	FirewallAccept = "accept" // and in each chain with policy drop
	FirewallNone   = "none"
)

// zone is our zone of firewalld, in a file that packages install.
const zone = "table-allocator"

// firewallPatience is how long a helper may take.
const firewallPatience = 10 * time.Second

// syncFirewalls has packets of a namespace pass the tables of other programs, as far as the configuration wants, and returns
// the chains that drop them all the same. What another program does not let us do is lacking, unless the user asked for it.
func (h *Host) syncFirewalls(s State, link string, lacking *[]string) error {
	if s.Firewall == FirewallNone {
		return h.leaveFirewalls(link)
	}
	all, err := nat.Foreigners()
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range all {
		errs = append(errs, change(f, link, passes(s, f, all))) // it may have passed before
		if f.Table == nat.Firewalld {
			errs = append(errs, setZone(link, true))
		}
	}
	if s.Firewall == FirewallAccept {
		if err := h.changeLegacies(link, true); err != nil {
			*lacking = append(*lacking, "a way through the packet filter of another program: "+strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	what, err := h.dropping(s, link, all)
	if err != nil {
		return err
	}
	if what != "" {
		*lacking = append(*lacking, what)
	}
	if err := errors.Join(errs...); err != nil && s.Firewall != FirewallAccept {
		*lacking = append(*lacking, "a way through the packet filter of another program: "+strings.ReplaceAll(err.Error(), "\n", "; "))
		return nil
	}
	return errors.Join(errs...)
}

// passes reports whether a chain gets rules of ours.
func passes(s State, f nat.Foreign, all []nat.Foreign) bool {
	return f.Name == nat.DockerUser || f.Drops && s.Firewall == FirewallAccept && !hasDocker(f, all)
}

// hasDocker reports whether a chain calls DOCKER-USER.
func hasDocker(f nat.Foreign, all []nat.Foreign) bool {
	return f.Name == "FORWARD" && slices.ContainsFunc(all, func(o nat.Foreign) bool {
		return o.Family == f.Family && o.Table == f.Table && o.Name == nat.DockerUser
	})
}

// dropping says which chains drop packets of a namespace, "" if none does. Who has a rule there that names its link has seen to it.
func (h *Host) dropping(s State, link string, all []nat.Foreign) (string, error) {
	var names []string
	for _, f := range all {
		if !f.Drops || passes(s, f, all) || hasDocker(f, all) || f.Family == "ip6" && !s.IPv6 {
			continue
		}
		named, err := f.Names(link)
		if err != nil {
			return "", err
		}
		if !named {
			names = append(names, f.String())
		}
	}
	names = append(names, h.legacyDrops(s, link)...)
	if len(names) == 0 {
		return "", nil
	}
	return "a way through the packet filter of another program: " + strings.Join(names, ", ") +
		` has policy drop (--firewall accept adds rules to it; of a namespace of netns.json "firewall": "accept", then ` + outside.Service("reload", "table-allocator-netns") + ")", nil
}

// leaveFirewalls deletes what is ours for a link in the tables of other programs.
func (h *Host) leaveFirewalls(link string) error {
	all, err := nat.Foreigners()
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range all {
		errs = append(errs, change(f, link, false))
		if f.Table == nat.Firewalld {
			errs = append(errs, setZone(link, false))
		}
	}
	return errors.Join(append(errs, h.changeLegacies(link, false))...)
}

// change adds rules for a link to a chain, or deletes them. The tables of iptables get theirs from iptables, which cannot read
// rules that it did not make.
func change(f nat.Foreign, link string, accept bool) error {
	command := map[string]string{"ip": "iptables", "ip6": "ip6tables"}[f.Family]
	if command == "" || f.Table != "filter" || f.Name != "FORWARD" && f.Name != nat.DockerUser {
		if accept {
			return f.Accept(link)
		}
		return f.Retract(link)
	}
	if !accept { // most chains have none of ours, and a process for each would be much
		if named, err := f.Names(link); err != nil || !named {
			return err
		}
	}
	if err := changeRules(command, f.Name, link, accept); err != nil {
		return fmt.Errorf("change %s: %w", f, err)
	}
	return nil
}

// changeRules adds the rules of iptables for a link to a chain, or deletes them.
func changeRules(command, chain, link string, accept bool) error {
	for _, match := range [][]string{{"-i", link}, {"-o", link, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"}} {
		rule := append(append([]string{chain}, match...), "-m", "comment", "--comment", nat.Comment, "-j", "ACCEPT")
		if err := changeRule(command, rule, accept); err != nil {
			return err
		}
	}
	return nil
}

// changeRule adds a rule of iptables unless it is there, or deletes it, as often as it is there.
func changeRule(command string, rule []string, accept bool) error {
	const absent, most = 1, 100 // exit code of -C; others are of iptables itself, as when its lock is taken
	for range most {
		_, err := helper(command, append([]string{"-w", "-C"}, rule...)...)
		exit := new(exec.ExitError)
		isAbsent := errors.As(err, &exit) && exit.ExitCode() == absent
		if err != nil && !isAbsent {
			return err
		}
		if isAbsent != accept {
			return nil
		}
		if accept {
			_, err = helper(command, append([]string{"-w", "-I"}, rule...)...)
			return err
		}
		if _, err = helper(command, append([]string{"-w", "-D"}, rule...)...); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s has our rule %d times and more", command, most)
}

// setZone puts a link into our zone of firewalld, or takes it out, unless it is so already.
func setZone(link string, in bool) error {
	const name, path, of = "org.fedoraproject.FirewallD1", "/org/fedoraproject/FirewallD1", "org.fedoraproject.FirewallD1.zone"
	call := func(method string, args ...string) (string, error) {
		return helper("busctl", append([]string{"--system", "--auto-start=no", "call", name, path, of, method}, args...)...)
	}
	have, err := call("getZoneOfInterface", "s", link)
	if err != nil {
		if in {
			return fmt.Errorf("firewalld is not told of %s: %w", link, err)
		}
		return nil // its daemon does not run, and begins without our links
	}
	ours := strings.Contains(have, `"`+zone+`"`)
	switch {
	case in && !ours:
		_, err = call("changeZoneOfInterface", "ss", zone, link)
	case !in && ours:
		_, err = call("removeInterface", "ss", zone, link)
	}
	if err != nil && strings.Contains(err.Error(), "INVALID_ZONE") {
		return fmt.Errorf("firewalld has not read its zone %s yet: firewall-cmd --reload", zone)
	}
	if err != nil {
		return fmt.Errorf("zone %s of firewalld, for %s: %w", zone, link, err)
	}
	return nil
}

// binaries is where programs of root are.
const binaries = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// helperProgram is the path of a program of another packet filter, also for who has a PATH without those of root; "": there is
// none.
func helperProgram(name string) string {
	for _, dir := range filepath.SplitList(binaries) {
		if path := filepath.Join(dir, name); exists(path) {
			return path
		}
	}
	return ""
}

// helper executes a program of another packet filter.
func helper(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), firewallPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, cmp.Or(helperProgram(name), name), args...)
	cmd.Env = append(os.Environ(), "PATH="+binaries, "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", name, err, printable(strings.TrimSpace(string(out))))
	}
	return string(out), err
}
