//go:build integration

package integration

import (
	"os"
	"strings"
	"testing"
)

// recipe is a machine behind two providers with the package as /root/table-allocator.deb, and a recipe's text.
func recipe(t *testing.T, suite, file string) (m *machine, i *internet, text string) {
	t.Helper()
	files, err := debs()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("../../packaging/recipes/" + file)
	if err != nil {
		t.Fatal(err)
	}
	m = boot(t, debian(suite, clouds))
	i = m.behind(2)
	m.uplink(1)
	m.uplink(2)
	m.copy(files[0], "/root/table-allocator.deb")
	return m, i, string(b)
}

// served waits until the recipe's watch serves both uplinks.
func (i *internet) served() {
	i.m.t.Helper()
	i.waitUplinks()
	i.m.wait("status finds no fault", `table-allocator-client status`)
	i.m.want(`systemctl is-enabled table-allocator-watch; grep -c lan /etc/table-allocator/watch.json; systemctl --failed --plain --no-legend`, "enabled", "1")
}

// eachSuite runs a test of a recipe on each Debian.
func eachSuite(t *testing.T, test func(t *testing.T, suite string)) {
	t.Parallel()
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			test(t, suite)
		})
	}
}

// TestAnsible runs the playbook, and again, when it has nothing to change.
func TestAnsible(t *testing.T) { eachSuite(t, ansible) }

func ansible(t *testing.T, suite string) {
	m, i, text := recipe(t, suite, "ansible.yml")
	m.write("/root/ansible.yml", text, 0o644)
	const play = `export LC_ALL=C.UTF-8; ansible-playbook -i localhost, -c local -e deb=/root/table-allocator.deb /root/ansible.yml `
	m.sh(play + `--syntax-check`)
	m.sh(play)
	i.served()
	if out := m.sh(play); !strings.Contains(out, "changed=0") {
		t.Errorf("the second time: %s", out)
	}
}

// TestCloudInit boots with the recipe as user data.
func TestCloudInit(t *testing.T) { eachSuite(t, cloudInit) }

func cloudInit(t *testing.T, suite string) {
	m, i, text := recipe(t, suite, "cloud-init.yml")
	const address = "https://packages.example.net/table-allocator_amd64.deb"
	if !strings.Contains(text, address) {
		t.Fatalf("%s is missing", address)
	}
	m.write("/var/lib/cloud/seed/nocloud/user-data", strings.Replace(text, address, "file:///root/table-allocator.deb", 1), 0o644)
	m.write("/var/lib/cloud/seed/nocloud/meta-data", "instance-id: one\n", 0o644)
	m.write("/etc/cloud/cloud.cfg.d/99-test.cfg", "datasource_list: [ NoCloud ]\nnetwork: { config: disabled }\nlocale: false\n", 0o644)
	m.sh(`cloud-init schema --config-file /var/lib/cloud/seed/nocloud/user-data`)
	m.sh(`cloud-init init --local; cloud-init init; cloud-init modules --mode=config; cloud-init modules --mode=final`)
	i.served()
}
