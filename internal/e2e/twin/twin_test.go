// Package twin asks random hosts where packets go, and compares with an oracle that knows nothing
// of the product: the twin. Where a packet from an address must go is what a host does whose only
// uplink is the link of that address. The kernel itself says it, in a namespace that has this link
// and what main says of it. All other packets go as on the plain host, which is the same without
// the product. (With move any default will do for those that main leads by a default.)
//
//	host, generate, rich  hosts, made up from a seed as ip commands; changes of them
//	world                 the namespaces real (with the product) and plain, the processes
//	moved                 commands for both with move, where main has other defaults than on plain
//	oracle                which routes a twin has; the twins
//	questions, compare    where packets go, and whether that is right
//	run, shrink           the phases of a host's life; the smallest host with a wrong answer
//	reports               hosts as people report them
//	chosen                hosts with a chosen uplink for what is bound to none
//	netlink, objects      rtnetlink, which the test speaks by itself
//	notice                does the comparison find what was broken on purpose?
//
// Run it as root:
//
//	make build; export TABLE_ALLOCATOR_STATIC_BIN=$PWD/bin
//	go test ./internal/e2e/twin -count=1 -v -args -hosts 1000 -looks rich        # kinds of wrong answers
//	go test ./internal/e2e/twin -count=1 -v -run 'TestTwin$' -args -hosts 1 -seed 4711 -looks rich -more
//
// The last one is the host of a seed. "-shrink 10" makes the hosts of the ten most frequent kinds of
// wrong answers as small as they get, and prints them as commands to type. The first one comes
// with the rules, routes and status of the real host and the end of the log of its watch; "-more" adds these to all, with
// the whole log. "-phases all" goes through a whole life. With "-special" all hosts have a VLAN, a bond, a VRF or another link
// that not every kernel has: Debian's have them all, in a virtual machine say.
// With -break "a default is left out", or another name of notice_test.go, the test has to fail.
//
// Where the real programs are tried that make such hosts, and what no generator makes:
//
//	radvd       e2e: TestWatchManagersRenumbering (several prefixes, lifetimes), ...OffLink (L=0), ...TwoRouters, ...Temporary
//	keepalived  integration: neighbours (an address of its own, and its vmac)
//	bird, FRR   integration: neighbours (krt_prefsrc and replaced routes as ip commands in rich_test.go and changes_test.go)
//	tun         vpn in rich_test.go makes real ones
//	bridge      intoBridge in changes_test.go; bond, VLAN, VRF and dummy links where the kernel has them
//	rename      rename in changes_test.go; e2e: TestClientRename, TestManyRenames
//	MPTCP       e2e: TestMPTCP
package twin

import (
	"cmp"
	"flag"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

var (
	hosts   = flag.Int("hosts", 0, "how many hosts to make up (0: as many as the test wants)")
	seed    = flag.Uint64("seed", 0, "the seed of the first host (0: the same every time, or by the clock with SOAK=full)")
	looks   = flag.String("looks", "plain", `"plain" or "rich" hosts`)
	phases  = flag.String("phases", "", `phases to go through, with commas, or "all" ("": by the seed)`)
	workers = flag.Int("workers", 4, "how many hosts at once")
	smaller = flag.Int("shrink", 3, "how many kinds of wrong answers to shrink")
	special = flag.Bool("special", false, "only hosts with a link of a kind that kernels may lack, of those that this one has")
	breakIt = flag.String("break", "", "what to break on each host: a name of notice_test.go")
	verbose = flag.Bool("more", false, "show rules, routes and log of each wrong host")
)

func TestMain(m *testing.M) { nettest.Main(m) }

// patience is how long a machine that may be busy is given, time after time: what is right at last was not settled.
var patience = []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second, 3 * time.Second, 10 * time.Second,
	30 * time.Second, time.Minute}

// TestTwin makes up hosts and asks each, in one or two phases of its life, where packets go.
func TestTwin(t *testing.T) {
	n := 20
	if *looks == "rich" {
		n = 200
	}
	wantPhases(t, twin(t, cmp.Or(*hosts, n), phasesToGo()))
}

// TestTwinRich has rich hosts of the same seeds every time.
func TestTwinRich(t *testing.T) {
	const first, n = 7100, 200
	wantPhases(t, twinOf(t, first, n, true, nil))
}

// wantPhases fails the test unless each phase had its share of many hosts, which drew their phases.
func wantPhases(t *testing.T, sum *tally) {
	t.Helper()
	for _, phase := range allPhases {
		if len(sum.phases) > 1 && *phases == "" && sum.hosts >= 200 && sum.phases[phase] < 30 {
			t.Errorf("phase %s: %d hosts, want 30", phase, sum.phases[phase])
		}
	}
}

// TestTwinSoak has many more rich hosts, which go through all phases.
func TestTwinSoak(t *testing.T) {
	n := 3
	if os.Getenv("SOAK") == "full" {
		n = 10000
	}
	phases := phasesToGo()
	if phases == nil {
		phases = allPhases
	}
	twinOf(t, firstSeed(), cmp.Or(*hosts, n), true, phases)
}

func twin(t *testing.T, n int, phases []string) *tally {
	t.Helper()
	return twinOf(t, firstSeed(), n, *looks == "rich", phases)
}

func twinOf(t *testing.T, base uint64, n int, rich bool, phases []string) *tally {
	t.Helper()
	t.Logf("seed %d", base)
	var all []*host
	k := probe(t)
	if *special && !slices.Contains(slices.Collect(maps.Values(k)), true) {
		t.Fatal("-special: this kernel has no kind of link that others may lack")
	}
	for s := base; len(all) < n; s++ {
		if h := generate(s, rich, phases, k); !*special || h.special != "" {
			all = append(all, h)
		}
	}
	begin := time.Now()
	sum, err := live(all, *workers, func(h *host, stock *twins) (finding, error) { return life(h, stock, patience) })
	if err != nil {
		t.Error(err)
	}
	took := time.Since(begin)
	t.Logf("%d hosts in %v (%.1f a second), %d answers, %d wrong in %d hosts", sum.hosts, took.Round(time.Second/10), float64(sum.hosts)/took.Seconds(), sum.answers, sum.wrong, sum.bad)
	t.Logf("hosts in each phase: %v; links left out, since this kernel has none of the kind: %v", sum.phases, sum.without)
	if sum.bad > 0 {
		t.Logf("seeds of the hosts: %d", sum.badSeeds)
	}
	if *breakIt != "" {
		t.Errorf("on %d of %d hosts that were broken an answer is wrong; on the others something else stands in", sum.bad, sum.hosts)
	}
	report(t, sum)
	return sum
}

// firstSeed is the seed of the first host; those behind it have the next ones. A run of the tests makes up the same hosts
// every time, so that it fails by what changed; a soak looks for others.
func firstSeed() uint64 {
	switch {
	case *seed != 0:
		return *seed
	case os.Getenv("SOAK") != "full":
		return 7000
	}
	return uint64(time.Now().UnixNano()) / 1e6 % 1e9
}

// phasesToGo are those that the flag names; none: the seed draws them.
func phasesToGo() []string {
	switch *phases {
	case "":
		return nil
	case "all":
		return allPhases
	}
	return strings.Split(*phases, ",")
}

// report shows each kind of wrong answer, the most frequent first, with its smallest host.
func report(t *testing.T, sum *tally) {
	kinds := sum.sorted()
	for _, k := range kinds {
		t.Errorf("%4d answers, %3d hosts: %s (seed %d, %s)\n%s", k.answers, k.hosts, k.signature, k.first.host.seed, k.first.phase, k.first.sample(k.signature, 1))
	}
	stock := &twins{}
	defer stock.close()
	for i, k := range kinds {
		f := k.first
		if i == 0 {
			t.Logf("seed %d, phase %s, before anything is left out:\n%s\nlog:\n%s", f.host.seed, f.phase, f.state, lastLines(f.log, 80))
		}
		switch {
		case i < *smaller:
			f = shrink(f, k.signature, stock)
		case i > 0 || !*verbose: // with "-shrink 0 -more" one host as it is
			return
		}
		t.Logf("%s\nseed %d, phase %s\n%s%s", k.signature, f.host.seed, f.phase, f.host.text(), f.sample(k.signature, 4))
		if *verbose {
			t.Logf("rules, routes, status:\n%s\nlog:\n%s", f.state, f.log)
		}
	}
}

// lastLines are the last n lines of a text.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
