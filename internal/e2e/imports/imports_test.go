// Package imports_test keeps the direction of imports, and each outside
// library in the one package that hides it.
package imports_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/table-allocator/table-allocator/"

// allowed says which of our packages each package that ships may import. A new
// package needs a line here.
var allowed = map[string][]string{
	"cmd/table-allocator-server": {"internal/server", "internal/cli", "internal/cli/systemd"},
	"cmd/table-allocator-client": {"internal/client", "internal/events", "internal/bind", "internal/hook", "internal/inspect", "internal/netns", "internal/uplink", "internal/peer", "internal/cli", "internal/remember", "internal/wire", "internal/route", "internal/cgroup", "internal/probe", "internal/uplinks", "internal/outside"},
	"cmd/table-allocator-enter":  {},
	"internal/server":            {"internal/wire", "internal/allocator", "internal/route", "internal/jsonc", "internal/outside"},
	"internal/client":            {"internal/events", "internal/bind", "internal/uplink", "internal/peer", "internal/install", "internal/lock", "internal/nat", "internal/remember", "internal/wire", "internal/route", "internal/jsonc", "internal/choice", "internal/probe", "internal/uplinks", "internal/onchange", "internal/outside"},
	"internal/bind":              {"internal/uplink", "internal/peer", "internal/wire", "internal/route", "internal/cgroup", "internal/lock", "internal/outside"},
	"internal/events":            {"internal/remember", "internal/outside"},
	"internal/inspect":           {"internal/bind", "internal/cgroup", "internal/events", "internal/nat", "internal/probe", "internal/uplink", "internal/peer", "internal/uplinks", "internal/walk", "internal/wire", "internal/route", "internal/outside"},
	"internal/hook":              {"internal/uplink", "internal/remember", "internal/wire", "internal/route", "internal/outside"},
	"internal/install":           {"internal/uplink", "internal/wire", "internal/route", "internal/remember", "internal/outside"},
	"internal/uplink":            {"internal/wire", "internal/route"},
	"internal/allocator":         {"internal/outside", "sql"},
	"internal/cgroup":            {"internal/remember", "internal/route"},
	"internal/choice":            {},
	"internal/cli":               {},
	"internal/cli/systemd":       {},
	"internal/jsonc":             {},
	"internal/lock":              {"internal/uplink", "internal/wire", "internal/route", "internal/cgroup"},
	"internal/nat":               {},
	"internal/netns":             {"internal/bind", "internal/probe", "internal/jsonc", "internal/nat", "internal/remember", "internal/uplink", "internal/route", "internal/wire", "internal/outside"},
	"internal/onchange":          {"internal/outside"},
	"internal/outside":           {},
	"internal/peer":              {"internal/wire", "internal/outside"},
	"internal/probe":             {"internal/choice"},
	"internal/remember":          {"internal/outside"},
	"internal/route":             {"internal/outside"},
	"internal/uplinks":           {"internal/peer", "internal/wire", "internal/outside"},
	"internal/walk":              {"internal/route"},
	"internal/wire":              {"internal/outside"},
	"sql":                        {},
}

// forTests does not ship. It may import anything, and only forTests may import it.
var forTests = []string{"internal/bench", "internal/demo", "internal/e2e", "internal/nettest"}

// homes says which packages may import an outside library. Changing a library
// is then changing one package.
var homes = map[string][]string{
	"github.com/bits-and-blooms/bitset": {"internal/allocator"},
	"modernc.org/sqlite":                {"internal/allocator"},
	"github.com/google/nftables":        {"internal/nat"}, // NAT and filters without the nft command, which minimal systems lack
	"github.com/mdlayher/netlink":       {"internal/nat"}, // the sockets of google/nftables, whose buffers are too small for 32 namespaces
	"github.com/vishvananda/netlink":    {"internal/route", "internal/nettest"},
	"github.com/vishvananda/netns":      {"internal/nettest"},
	"github.com/spf13/pflag":            {"cmd/table-allocator-server", "cmd/table-allocator-client"},
	"github.com/tailscale/hujson":       {"internal/jsonc"},
	"github.com/cilium/ebpf":            {"internal/cgroup"}, // assembles and loads programs without clang, BTF or C
	"github.com/coreos/go-systemd/v22":  {"internal/cli/systemd"},
	"golang.org/x/sys":                  nil, // anywhere, like the standard library
	"golang.org/x/time":                 nil,
}

// notShipped lists what no command may depend on, however indirectly.
var notShipped = []string{"C", "runtime/cgo", "net/http", "testing"}

type pkg struct {
	ImportPath string
	Imports    []string
	CgoFiles   []string
}

// list returns what "go list" says about packages, without cgo, as they ship.
func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,CgoFiles"}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Dir = "../../.."
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// below reports whether path is dir or inside it.
func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

func TestImports(t *testing.T) {
	standard := map[string]bool{"C": true}
	for _, p := range list(t, "std") {
		standard[p.ImportPath] = true
	}
	for _, p := range list(t, "./...") {
		from := strings.TrimPrefix(p.ImportPath, module)
		test := slices.ContainsFunc(forTests, func(dir string) bool { return below(from, dir) })
		ours, known := allowed[from]
		if !known && !test {
			t.Errorf("%s: what may it import? It is not in the table of this test", from)
			continue
		}
		for _, path := range p.Imports {
			to, own := strings.CutPrefix(path, module)
			switch {
			case standard[path]:
			case own && !test && !slices.Contains(ours, to):
				t.Errorf("%s imports %s", from, to)
			case own:
			default:
				if err := atHome(from, path); err != "" {
					t.Error(err)
				}
			}
		}
	}
}

// atHome says what is wrong with package from importing path of another module.
func atHome(from, path string) string {
	for library, home := range homes {
		if !below(path, library) {
			continue
		}
		if home != nil && !slices.ContainsFunc(home, func(dir string) bool { return below(from, dir) }) {
			return from + " imports " + path + ", which is for " + strings.Join(home, " and ") + " only"
		}
		return ""
	}
	return from + " imports " + path + ", a library without a home in the table of this test"
}

func TestShippedDependencies(t *testing.T) {
	for _, p := range list(t, "-deps", "./cmd/...") {
		if len(p.CgoFiles) != 0 {
			t.Errorf("%s needs cgo", p.ImportPath)
		}
		if slices.Contains(notShipped, p.ImportPath) {
			t.Errorf("the commands depend on %s", p.ImportPath)
		}
	}
}

// TestFilterCommands: the tables of packet filters are internal/nat's. nft and iptables are called by those alone who have a
// reason that is named here.
func TestFilterCommands(t *testing.T) {
	callers := map[string]string{
		"internal/netns/firewall.go": "iptables does not read rules in its tables that another program made",
		"internal/netns/legacy.go":   "the kernel shows the tables of iptables-legacy to that program alone",
		"internal/nat/listed.go":     "nft and iptables alone have words for all rules of others; it changes nothing",
	}
	call := regexp.MustCompile(`"(nft|ip6?tables(-\w+)?|[ea]btables(-\w+)?|firewall-cmd)"`)
	eachSource(t, func(path string, text []byte) {
		called := call.Match(text)
		if called && callers[path] == "" {
			t.Errorf("%s calls a packet filter's command", path)
		}
		if called {
			delete(callers, path)
		}
	})
	for path := range callers {
		t.Errorf("%s calls none: it needs no line here", path)
	}
}

// TestWallClock: the wall clock may jump, so nothing is decided by it. time.Now counts on while only differences are used;
// what takes the date out of a time, or asks a file for one, is named here with the reason.
func TestWallClock(t *testing.T) {
	readers := map[string]string{
		"cmd/table-allocator-client/netns_list.go": "prints when programs began",
		"cmd/table-allocator-client/print.go":      "prints since when something is wrong",
		"internal/allocator/store.go":              "the database has the date beside the lease clock, for who reads it",
		"internal/client/memory.go":                "a file that a killed process left half written is deleted a minute later",
		"internal/hook/memory.go":                  "of too many files the oldest goes",
		"internal/inspect/doctor.go":               "prints since when something is wrong",
		"internal/inspect/server.go":               "since when the server runs, to print it",
		"internal/inspect/since.go":                "since when something is wrong, to print it",
		"internal/netns/programs.go":               "when programs began, to print it",
		"internal/probe/socket.go":                 "a deadline that is over",
	}
	dated := regexp.MustCompile(`\.Unix(Milli|Micro|Nano)?\(|\.ModTime\(|CLOCK_REALTIME|CLOCK_TAI|time\.Parse\(|unix\.Gettimeofday|\.Date\(\)`)
	eachSource(t, func(path string, text []byte) {
		found := dated.Find(text)
		if found != nil && readers[path] == "" {
			t.Errorf("%s reads the wall clock: %s", path, found)
		}
		if found != nil {
			delete(readers, path)
		}
	})
	for path := range readers {
		t.Errorf("%s does not read the wall clock: it needs no line here", path)
	}
}

// eachSource calls f with each file that ships.
func eachSource(t *testing.T, f func(path string, text []byte)) {
	t.Helper()
	for _, dir := range []string{"cmd", "internal"} {
		err := fs.WalkDir(os.DirFS("../../.."), dir, func(path string, d fs.DirEntry, err error) error {
			test := slices.ContainsFunc(forTests, func(dir string) bool { return below(path, dir) }) || below(path, "internal/integration")
			if err != nil || d.IsDir() || test || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile("../../../" + path)
			if err == nil {
				f(path, text)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
