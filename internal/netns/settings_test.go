package netns

import (
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

// TestSettingsPutBack: settings of links that namespaces need are set, and put back by whoever comes next, unless somebody else has
// changed them. Those of other links are what they were, also after a process that was killed while it changed them.
func TestSettingsPutBack(t *testing.T) {
	ns, isp := nettest.New(t, "host"), nettest.New(t, "isp")
	nettest.Veth(t, ns, "wan0", isp, "lan0")
	nettest.Veth(t, ns, "wan1", isp, "lan1")
	const other, ra, forwards, proxies = "ipv6/conf/wan0/accept_ra", "ipv6/conf/wan1/accept_ra", "ipv6/conf/wan1/forwarding", "ipv6/conf/wan1/proxy_ndp"
	ns.Do(func() {
		m, err := openMemory()
		if err != nil {
			t.Fatal(err)
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(m.dir.Make())
		want := func(when, values string) {
			t.Helper()
			var have []string
			for _, path := range []string{other, ra, forwards, proxies} {
				have = append(have, readSetting(path))
			}
			changed, err := m.changedSettings()
			must(err)
			if got := strings.Join(have, " ") + ": " + strings.Join(changed, " "); got != values {
				t.Errorf("%s: %q, want %q", when, got, values)
			}
		}
		for path, value := range map[string]string{other: "1", ra: "1", forwards: "0", proxies: "0"} { // net.core.devconf_inherit_init_net may say others
			must(writeSetting(path, value))
		}
		paths := []string{ra, forwards, proxies}
		all := strings.Join(paths, " ")
		want("before", "1 1 0 0: ")
		must(m.openLinks(paths))
		want("open", "1 2 1 1: "+all)
		must(writeSetting(other, "2")) // a process has begun, and was killed
		must(m.dir.Write(settingsFile, append([]string{other}, paths...)))
		must(m.closeLinks(paths))
		want("the next process", "1 2 1 1: "+all)
		must(writeSetting(ra, "0")) // the administrator's
		must(m.closeLinks(nil))
		want("closed", "1 0 0 0: ")
		must(m.openLinks(paths))
		want("open again", "1 0 1 1: "+forwards+" "+proxies)
		must(m.closeLinks(nil))
		want("closed again", "1 0 0 0: ")
	})
}
