package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/nettest"
)

const usage = `Usage: go run ./internal/bench [options]

Measures table-allocator-server and table-allocator-client of bin/ in network
namespaces of their own, or with -server a server that runs here, and checks
every answer. Ratios compare measurements that take turns in one run.

  -json          print JSON
  -runs N        print the median of N runs (5)
  -slice D       how long one measurement lasts (100ms); each run has three of a kind
  -only PART     server, client, watch, or mains: large main tables; or peers:
                 networkd and NetworkManager with what people use instead
  -clients N,N   how many ask at once (1,16,256)
  -short         small and quick: shows that it works, not how fast it is
  -dir DIR       where the databases are (below .cache); not on a tmpfs
  -original DIR  measure the two commands of the C original in DIR, too; with
                 -only peers also its hook of dhclient, multihomed-routing.sh
  -profile FILE  write CPU profiles of the server to FILE.1, FILE.16 and FILE.256

  -server NAME   measure the server at this abstract name, and release all leases
  -exact         ... NAME is as Python, Go and socat write it; C programs pad it
  -leases N      ... ask for N leases at most (40); its pool must have as many
`

// options are what the command line says.
type options struct {
	json    bool
	runs    int
	slice   time.Duration
	only    string
	clients []int
	dir     string
	profile string

	original string
	sizes

	server string
	exact  bool
	leases int
}

// sizes is how much is measured, and how long bench waits before it measures at rest.
type sizes struct {
	few, many int // held leases
	callers   int // of a boot storm
	links     int
	addresses int           // each with a client
	together  int           // clients that share memory when it is measured
	watched   int           // addresses that one watch serves
	settle    time.Duration // after a start, until Go's runtime has returned memory
	idle      time.Duration // during which wake-ups are counted
	atRest    time.Duration // after the last event, until the clients have returned memory
	probing   time.Duration // rounds of probes, before they are measured and while they are
	mains
}

var (
	full = sizes{
		few: 1000, many: 60_000, callers: 1024, links: 100, addresses: 100, together: 20, watched: 1000,
		settle: 12 * time.Second, idle: 15 * time.Second, atRest: 15 * time.Second, probing: 30 * time.Second,
		mains: mains{followed: 100_000, moved: 20_000, internet: 1_000_000, packets: 1500, prefixes: 40, refused: 4000, renames: 1000,
			changing: 10 * time.Second, settled: time.Minute, measuredAt: 15 * time.Second},
	}
	small = sizes{
		few: 100, many: 500, callers: 64, links: 4, addresses: 8, together: 4, watched: 20,
		settle: time.Second / 10, idle: time.Second / 10, atRest: time.Second / 10, probing: time.Second / 10,
		mains: mains{followed: 3000, moved: 3000, internet: 3000, packets: 10, prefixes: 40, refused: 100, renames: 10,
			changing: time.Second / 10, settled: time.Second / 10, measuredAt: time.Second / 10},
	}
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == echoCommand {
		fail(echo(os.Args[2]))
	}
	if len(os.Args) == 4 && os.Args[1] == serveCommand {
		fail(serveProfiled(os.Args[2], os.Args[3]))
	}
	var o options
	flag.BoolVar(&o.json, "json", false, "")
	flag.IntVar(&o.runs, "runs", 5, "")
	flag.DurationVar(&o.slice, "slice", 100*time.Millisecond, "")
	flag.StringVar(&o.only, "only", "", "")
	clients := flag.String("clients", "1,16,256", "")
	short := flag.Bool("short", false, "")
	flag.StringVar(&o.dir, "dir", ".cache", "")
	flag.StringVar(&o.original, "original", "", "")
	flag.StringVar(&o.profile, "profile", "", "")
	flag.StringVar(&o.server, "server", "", "")
	flag.BoolVar(&o.exact, "exact", false, "")
	flag.IntVar(&o.leases, "leases", 40, "")
	flag.Usage = func() { fmt.Fprint(flag.CommandLine.Output(), usage) }
	flag.Parse()
	o.sizes = full
	if *short {
		o.sizes = small
	}
	for text := range strings.SplitSeq(*clients, ",") {
		n, _ := strconv.Atoi(text) // what is no number is 0, and refused below
		o.clients = append(o.clients, n)
	}
	switch {
	case slices.Min(o.clients) < 1, flag.NArg() > 0 || o.runs < 1 || o.slice <= 0 || o.leases < 1 || o.leases > tablesMax,
		!slices.Contains([]string{"", "server", "client", "watch", "mains", "peers"}, o.only), o.server != "" && o.original != "":
		flag.Usage()
		os.Exit(2)
	case o.server != "":
		fail(foreign(o))
	case o.only == "peers" && *short:
		fail(peers(2, o.original))
	case o.only == "peers":
		fail(peers(100, o.original))
	}
	os.Exit(nettest.Program("bench", func(s *nettest.Session) error { return own(s, o) }))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// own measures our commands, and those of the original if it is given.
func own(session *nettest.Session, o options) error {
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) // an error leaves files in .cache
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	r := newReport(o)
	if o.only == "" || o.only == "server" {
		if err := measureServer(o, dir, r); err != nil {
			return err
		}
	}
	if o.only == "" || o.only == "mains" {
		if err := measureMains(session, o, dir, r); err != nil {
			return err
		}
	}
	if o.only != "server" && o.only != "mains" {
		if err := measureClient(session, o, dir, r); err != nil {
			return err
		}
	}
	return r.print(o)
}
