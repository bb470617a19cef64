package route

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// String returns the route as `ip route show table all` prints it, with numbers for links and
// protocols, and in brackets what it does not name:
// "default via 10.0.0.1 dev #3 table 10000 proto 116 src 10.0.0.2 metric 100".
func (r Route) String() string {
	r = r.shown()
	types := [...]string{"unspec", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit", "throw"}
	scopes := map[uint8]string{unix.RT_SCOPE_SITE: "site", unix.RT_SCOPE_LINK: "link", unix.RT_SCOPE_HOST: "host", unix.RT_SCOPE_NOWHERE: "nowhere"}
	prefs := map[uint8]string{PrefMedium: "medium", PrefHigh: "high", PrefLow: "low"}
	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	if int(r.Type) >= len(types) {
		add("type %d ", r.Type)
	} else if r.Type != unix.RTN_UNICAST {
		add("%s ", types[r.Type])
	}
	if r.Dst.Bits() == 0 {
		add("default")
	} else {
		add("%s", selector(r.Dst))
	}
	if r.From.IsValid() {
		add(" from %s", selector(r.From))
	}
	if r.TOS != 0 {
		add(" tos 0x%02x", r.TOS)
	}
	if r.NexthopID != 0 {
		add(" nhid %d", r.NexthopID)
	}
	if r.Gateway.IsValid() {
		add(" via ")
		if r.Family == unix.AF_INET && r.Gateway.Is6() {
			add("inet6 ")
		}
		add("%s", r.Gateway)
	}
	if r.Index != 0 {
		add(" dev #%d", r.Index)
	}
	if r.Table != unix.RT_TABLE_MAIN {
		add(" table %s", tableName(r.Table))
	}
	if r.Protocol != unix.RTPROT_BOOT {
		add(" proto %d", r.Protocol)
	}
	if name, ok := scopes[r.Scope]; ok {
		add(" scope %s", name)
	} else if r.Scope != unix.RT_SCOPE_UNIVERSE {
		add(" scope %d", r.Scope)
	}
	if r.Src.IsValid() {
		add(" src %s", r.Src)
	}
	if r.Metric != 0 || r.Family == unix.AF_INET6 {
		add(" metric %d", r.Metric)
	}
	for _, flag := range []struct {
		set  bool
		name string
	}{{r.Dead, "dead"}, {r.Onlink, "onlink"}, {r.LinkDown, "linkdown"}} {
		if flag.set {
			add(" %s", flag.name)
		}
	}
	if r.Expires != 0 {
		add(" expires %dsec", r.Expires)
	}
	named, other := r.describeRest()
	add("%s", named)
	if r.Family == unix.AF_INET6 {
		if name, ok := prefs[r.Pref]; ok {
			add(" pref %s", name)
		} else {
			add(" pref %d", r.Pref)
		}
	}
	if len(other) > 0 {
		add(" [%s]", strings.Join(other, " "))
	}
	return b.String()
}

// describeRest returns the metrics of r in the words of `ip route`, each after a space, and the
// attributes that have none as "name=hex".
func (r Route) describeRest() (named string, other []string) {
	attributes := map[uint16]string{unix.RTA_FLOW: "realms", unix.RTA_MULTIPATH: "nexthops", unix.RTA_ENCAP: "encap", unix.RTA_ENCAP_TYPE: "encap_type"}
	metrics := map[uint16]string{
		unix.RTAX_MTU: "mtu", unix.RTAX_WINDOW: "window", unix.RTAX_SSTHRESH: "ssthresh", unix.RTAX_CWND: "cwnd",
		unix.RTAX_ADVMSS: "advmss", unix.RTAX_REORDERING: "reordering", unix.RTAX_HOPLIMIT: "hoplimit",
		unix.RTAX_INITCWND: "initcwnd", unix.RTAX_INITRWND: "initrwnd", unix.RTAX_QUICKACK: "quickack",
	}
	// rest was read attribute by attribute, and a malformed metric ends the words.
	_ = eachAttribute([]byte(r.rest), func(typ uint16, value []byte) {
		if typ == unix.RTA_METRICS {
			var lock uint32
			_ = eachAttribute(value, func(typ uint16, value []byte) {
				if typ == unix.RTAX_LOCK {
					lock = uint32Of(value)
				}
			})
			_ = eachAttribute(value, func(typ uint16, value []byte) {
				switch name, ok := metrics[typ]; {
				case typ == unix.RTAX_LOCK:
				case typ == unix.RTAX_CC_ALGO:
					named += " congctl " + unix.ByteSliceToString(value)
				case !ok:
					other = append(other, fmt.Sprintf("metric%d=%x", typ, value))
				case lock&(1<<typ) != 0:
					named += fmt.Sprintf(" %s lock %d", name, uint32Of(value))
				default:
					named += fmt.Sprintf(" %s %d", name, uint32Of(value))
				}
			})
			return
		}
		name, ok := attributes[typ]
		if !ok {
			name = fmt.Sprintf("attribute%d", typ)
		}
		other = append(other, fmt.Sprintf("%s=%x", name, value))
	})
	return named, other
}
