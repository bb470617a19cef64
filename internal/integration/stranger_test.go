//go:build integration

package integration

import (
	"strings"
	"testing"
)

// way is a way in which packets of an address leave by another link than its own or not at all, or in which that is near.
type way struct {
	name, provoke string
	state         string // in the first line of status about it
	why           string // in a line below
	since         bool   // it says since when
	code          string // of status
	doctor        string // a line of doctor, by its severity and name
	do            string // a stranger's command; "": the one behind "do", to the letter
	line          string // what begins the line of status; "": the address
}

// ways are for the address 10.2.0.2 of wan2, while wan1 has the better default route.
var ways = []way{
	{"its default route is gone", `ip route delete default dev wan2`, "no route (leaves by wan1)", "has no route to the Internet", true, "1", "error table-empty",
		`ip route add default via 10.2.0.1 dev wan2 metric 200`, ""},
	{"a rule of another program comes first", `ip route add default via 10.1.0.1 dev wan1 table 77; ip rule add priority 5270 lookup 77`, "shadowed by rule 5270 (lookup 77)", "comes before the rules", true, "1",
		"warning rule-before-ours", "", ""},
	{"a rule of another program takes a port", `ip route replace default via 10.1.0.1 dev wan1 table 77; ip rule add priority 5270 dport 443 lookup 77`, "partly shadowed by rule 5270 (lookup 77): dport 443 (leaves by wan1)",
		"comes before the rules", true, "1", "warning rule-before-ours", "", ""},
	{"another program fills the table", `ip route add default via 10.1.0.1 dev wan1 table $(table 10.2.0.2)`, "no route (leaves by wan1)", "default via 10.1.0.1 dev wan1", true, "1", "warning table-shared",
		"", ""},
	{"the link is down", `ip link set wan2 down`, "link down", "wan2 is down", true, "1", "warning carrier",
		`ip link set wan2 up; ip route replace default via 10.2.0.1 dev wan2 metric 200; ip address replace fd02::2/64 dev wan2 nodad; ip -6 route replace default via fd02::1 dev wan2 metric 200`, ""},
	{"the watch has ended, and an address is new", `systemctl stop table-allocator-watch; table-allocator-client release wan2 >/dev/null`, "not served: systemctl enable --now table-allocator-watch", "", false, "0", "",
		`systemctl enable --now table-allocator-watch`, ""},
	{"the server has ended", `systemctl stop table-allocator-server.socket table-allocator-server`, "server stopped, lease ends in ", "no process has the name of the server", true, "1", "error server-stopped",
		"", "wan1 +10.1.0.2 "}, // where it is said first
	{"the server has ended: its line", `systemctl stop table-allocator-server.socket table-allocator-server`, "stopped since 20", "", false, "1", "error server-stopped",
		`systemctl start table-allocator-server`, "server"},
}

// TestStranger: on a machine as README sets it up, whoever types tactl, and does what it says, knows what is wrong, since
// when, and has it mended.
func TestStranger(t *testing.T) {
	t.Parallel()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range plain {
		t.Run(d.Suite, func(t *testing.T) {
			m := boot(t, d)
			i := m.behind(2)
			m.install(files[0])
			m.sh(`systemctl enable --now table-allocator-server table-allocator-watch`)
			m.uplink(1)
			m.uplink(2)
			i.waitUplinks()
			const table = `table() { sqlite3 /var/lib/table-allocator/leases.db "select \"table\" from leases where address = '$1'"; }; `
			for _, w := range ways {
				m.wait("nothing is wrong before "+w.name, `tactl && tactl doctor`)
				m.sh(table + w.provoke)
				begin := w.line
				if begin == "" {
					begin = "wan2 +10.2.0.2 "
				}
				// From the line of the address to that of the next one.
				shown := `tactl >/tmp/status || code=$?; test "${code:-0}" = ` + w.code + `; awk -v begin="^` + begin + `" '$0 ~ begin { on = 1; print; next } /^[^ ]/ { on = 0 } on' /tmp/status >/tmp/rows; cat /tmp/rows; `
				m.wait("status says of: "+w.name, shown+`head -n 1 /tmp/rows | grep -F -- "$1" && grep -F -- "$2" /tmp/rows`, w.state, w.why)
				if w.since {
					m.wait("status says since when: "+w.name, shown+`grep -E '^ +since 20[0-9][0-9]-' /tmp/rows`)
				}
				if severity, name, ok := strings.Cut(w.doctor, " "); ok {
					m.wait("doctor says of: "+w.name, `tactl doctor >/tmp/doctor || :; cat /tmp/doctor; grep -E "^$1 +$2 " /tmp/doctor`, severity, name)
				}
				cure := w.do
				if cure == "" {
					cure = strings.TrimSpace(m.sh(`sed -n 's/^ *do  *//p' /tmp/rows | head -n 1`))
					cure, _, _ = strings.Cut(cure, ";") // the next one shows the journal
				}
				t.Logf("%s: %s", w.name, cure)
				m.sh(cure)
				i.waitUplinks()
			}
			m.wait("nothing is wrong at the end", `tactl && tactl doctor`)

			// A configuration that is wrong: the reload fails and says why, and a restart is not tried for ever.
			m.sh(`cp /etc/table-allocator/watch.json /root/right.json; echo '{"links": [{"ifnmae": "*"}]}' >/etc/table-allocator/watch.json`)
			if out, err := m.try(`systemctl reload table-allocator-watch`); err == nil {
				t.Errorf("a wrong file is reloaded: %s", out)
			}
			m.wait("the journal says why", `journalctl --no-pager -u table-allocator-watch | grep 'line 1: links\[0\].ifnmae: unknown key'`)
			m.sh(`tactl`)
			m.wait("a restart ends with 78", `systemctl restart table-allocator-watch || :; test "$(systemctl show -P ExecMainStatus table-allocator-watch)" = 78; systemctl is-failed table-allocator-watch`)
			m.sh(`mv /root/right.json /etc/table-allocator/watch.json; systemctl restart table-allocator-watch`)
			m.wait("all is well again", `tactl && tactl doctor`)
			m.sh(`tactl history wan2 >/tmp/history; cat /tmp/history; grep -F 'lost its default route, leaves by wan1' /tmp/history; grep -F 'another rule comes first' /tmp/history`)
		})
	}
}
