package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// Whatever is in the settings, whoever runs a hook goes on, as it was: also if they never end.
func TestHooksBadSettings(t *testing.T) {
	s := newSite(t)
	s.serve()
	bad := map[string]string{
		"loop":   "while :; do :; done",
		"sleep":  "trap '' TERM; while :; do sleep 1; done",
		"exit":   "exit 7",
		"eval":   "eval 'if then fi ('",
		"unset":  "set -eu; echo $no_such_variable",
		"kill":   "kill -9 $$",
		"exec":   "exec sleep 1000",
		"closed": "exec <&- >&- 2>&-; nothing",
		"output": "yes",
	}
	settings, names := "case $interface$IFACE in\n", []string{}
	for name, text := range bad {
		settings += name + ") " + text + " ;;\n"
		names = append(names, name)
	}
	s.configure(settings + "esac")
	const script = `
		run() {
			case $1 in
			dash | bash) "$1" -euc 'export interface=$0 reason=BOUND new_ip_address=192.0.2.7 new_subnet_mask=255.255.255.0 IFACE=
				set -- a b
				. /etc/dhcp/dhclient-enter-hooks.d/table-allocator
				echo "dhclient by '"$1"' goes on: $0 $*"' "$2" ;;
			*) interface='' IFACE=$2 MODE=start ADDRFAM=inet METHOD=static IF_ADDRESS=192.0.2.7 /etc/network/if-up.d/table-allocator && echo "ifup goes on: $2" ;;
			esac
		}
		for name; do
			for by in dash bash ifup; do run $by "$name" & done
		done
		wait`
	out := s.sh(script, names...)
	for name := range bad {
		for _, want := range []string{"dhclient by dash goes on: " + name + " a b\n", "dhclient by bash goes on: " + name + " a b\n", "ifup goes on: " + name + "\n"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %q is missing in %q", name, want, out)
			}
		}
	}
	if diff := unordered(s.leases(), []string{"10000|inet|closed|192.0.2.7|dhclient|0"}); diff != "" {
		t.Errorf("leases: %s", diff)
	}
	eventually(t, "nothing of the settings runs on", func() error {
		if out := s.sh(`ps -eo args | grep -E 'hook\.sh|sleep 1000' | grep -v grep || true`); out != "" {
			return errors.New(out)
		}
		return nil
	})
}

// Settings may depend on the link, set arguments, and have variables of their own.
func TestHooksSettingsAreAScript(t *testing.T) {
	s := newSite(t, `set -- x y
		interface=$interface
		unset LEAVE_ALONE
		mine=7
		case $interface in
		wan0) ROUTES=copy ;;
		wan2) CLIENT_OPTIONS="$CLIENT_OPTIONS --priority 10000,19000,95000" ;;
		esac`)
	s.serve()
	for _, n := range []int{0, 2} {
		s.sh(`export reason=BOUND interface=$1 new_ip_address=$2 new_subnet_mask=255.255.255.0 new_routers=$3; /sbin/dhclient-script`,
			s.isps[n].ifname, given[n], s.isps[n].gateway)
		s.waitFilled(given[n], "default via "+s.isps[n].gateway, s.isps[n].network)
		s.waitUplink(n, given[n])
	}
	s.waitMain("wan0", "default via 192.168.1.1", "192.168.1.0/24")
	s.waitMain("wan2")
	if rules := strings.Join(s.rules(), "\n"); !strings.Contains(rules, "19000:") || !strings.Contains(rules, "95000:") {
		t.Errorf("rules: %s", rules)
	}
	for _, n := range []int{0, 2} {
		s.sh(`export reason=RELEASE interface=$1 old_ip_address=$2; /sbin/dhclient-script`, s.isps[n].ifname, given[n])
		s.waitGone(given[n])
	}
}

// What a server tells and cannot be right is left out: the address has its table all the same.
func TestDhclientOddValues(t *testing.T) {
	s := newSite(t)
	s.serve()
	for name, odd := range map[string]string{
		"option 121 cut short":   "new_rfc3442_classless_static_routes='0 192 168 1 1 16 10 99 192'",
		"option 121 out of bits": "new_rfc3442_classless_static_routes='33 10 99 192 168 1 1' new_routers=192.168.1.1",
		"a loopback router":      "new_routers='192.168.1.1 127.0.0.1'",
		"a multicast router":     "new_routers='224.0.0.1 192.168.1.1'",
		"name servers":           "new_routers=192.168.1.1 new_domain_name_servers='224.0.0.251 255.255.255.255 192.168.1.1'",
		"a metric":               "new_routers=192.168.1.1 IF_METRIC=many",
		"words":                  "new_routers='192.168.1.1 --release $(touch /run/bad) -a' new_domain_name_servers='; touch /run/bad'",
	} {
		t.Run(name, func(t *testing.T) {
			said := s.try(`export reason=BOUND interface=wan0 new_ip_address=$1 new_subnet_mask=255.255.255.0 `+odd+`; /sbin/dhclient-script`, given[0]).stderr
			if !strings.Contains(said, "is left out") {
				t.Errorf("it says %q", said)
			}
			table := s.served(given[0])
			eventually(t, "the table has a default", func() error {
				routes := s.routes(table)
				for _, r := range routes {
					if strings.HasPrefix(r, "default via 192.168.1.1 dev wan0") {
						return nil
					}
				}
				return fmt.Errorf("routes: %q", routes)
			})
			s.waitUplink(0, given[0])
			s.sh(`export reason=RELEASE interface=wan0 old_ip_address=$1; /sbin/dhclient-script; [ ! -e /run/bad ]`, given[0])
			s.waitGone(given[0])
		})
	}
}

// What hooks of the version before kept in /run counts, once.
func TestHooksUpgrade(t *testing.T) {
	h := newHookedHome(t, 2)
	h.advertise(0, auto6(0))
	addr := h.waitAddress("wan0", prefix6(0, 0), slaac)
	old := "/run/table-allocator/"
	h.write(old+"prefix.wan0", delegated+"\n")
	h.write(old+"prefix.wan1", "2000::/x\n")
	bound := `export interface=$1 reason=BOUND6 new_ip6_address=$2 new_ip6_prefixlen=128 new_max_life=600 new_preferred_life=300; /sbin/dhclient-script`
	h.sh(bound, "wan0", addr)
	h.waitServed(0, addr, h.routesOf(0)...)
	h.waitRulesOfDelegated(h.tableOf(addr))
	h.sh(bound, "wan0", addr) // told again, it is remembered elsewhere
	h.waitRulesOfDelegated(h.tableOf(addr))
	said := h.try(bound, "wan1", given6(1, 0)).stderr
	if !strings.Contains(said, "prefix.wan1") {
		t.Errorf("of what cannot be read it says %q", said)
	}
	h.served(given6(1, 0))
	h.sh(`export interface=wan0 reason=RELEASE6 old_ip6_prefix=$1; /sbin/dhclient-script || true`, delegated)
	h.waitRulesOfDelegated()
	const release = `export interface=$1 reason=RELEASE6 old_ip6_address=$2; /sbin/dhclient-script || true`
	h.sh(release, "wan0", addr)
	h.sh(release, "wan1", given6(1, 0))
	h.waitNothing(addr)
	h.waitNothing(given6(1, 0))

	// A watch that runs is one, and ends with the link; one that was killed leaves nothing.
	h.write("/etc/network/interfaces", "iface wan0 inet6 auto\n")
	args := "watch -6 --ifname wan0 --exclude= --routes move -t ifupdown --clean --syslog"
	h.sh(`start-stop-daemon --start --background --make-pidfile --pidfile ` + old + `watch.wan0.pid \
		--startas /usr/local/sbin/table-allocator-client -- ` + args)
	h.ns.IP(t, "address add 2001:db8:1000::77/64 dev wan0 nodad")
	h.waitServed(0, "2001:db8:1000::77", h.routesOf(0)...)
	h.sh("ifup wan0 >&2")
	if pids := h.pids(clientBin); len(pids) != 1 {
		t.Errorf("clients: %v", pids)
	}
	h.sh("ifdown wan0 >&2")
	h.waitNoClient()
	h.waitRules6()
	if left := h.sh("ls " + old + " | grep -E 'prefix|watch' || true"); left != "" {
		t.Errorf("left: %s", left)
	}
}
