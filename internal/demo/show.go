package main

import (
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	_ "github.com/table-allocator/table-allocator/internal/allocator" // the SQLite driver
	"github.com/table-allocator/table-allocator/internal/nettest"
)

const (
	internet = nettest.Far4 // behind both gateways
	echoPort = 7
	probes   = 3
	patience = 10 * time.Second
	// state is the server's directory: a tmpfs is mounted over it, which ends with the mount namespace.
	// Every system has /dev/shm, and nothing in the demo needs what is in there.
	state = "/dev/shm"
)

// uplinks of the host, each with the gateway at its other end.
var uplinks = []struct{ ifname, addr, network, gateway, tag string }{
	{"wan0", "192.0.2.2", "192.0.2.0/24", "192.0.2.1", "cable"},
	{"wan1", "203.0.113.2", "203.0.113.0/24", "203.0.113.1", "mobile"},
}

// session is the terminal session that the demo shows.
type session struct {
	*nettest.Session
	host *nettest.Namespace
	far  *nettest.Internet
	env  []string
}

func show(program *nettest.Session) error {
	for dir, mode := range map[string]string{state: "0700", "/run": "0755"} { // the clients keep files in /run
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode="+mode); err != nil {
			return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
		}
	}
	s := &session{Session: program}
	s.build()
	s.play()
	return nil
}

// build makes the machines of the demo: the host, two gateways, and the internet behind them.
func (s *session) build() {
	commands, err := filepath.Abs("bin")
	if err != nil {
		s.Fatalf("%v", err)
	}
	s.env = append(os.Environ(), "STATE_DIRECTORY="+state, "PATH="+commands+":"+os.Getenv("PATH"))
	s.host = nettest.New(s, "host")
	var providers []*nettest.Provider
	for _, u := range uplinks {
		providers = append(providers, &nettest.Provider{Ifname: u.ifname, Routers: []string{u.gateway + "/24"}, Routed: []string{u.network}})
	}
	s.far = nettest.NewInternet(s, s.host, providers...)
	for i, u := range uplinks {
		s.host.IP(s, "address add "+u.addr+"/24 dev "+u.ifname)
		s.host.IP(s, fmt.Sprintf("route add default via %s dev %s metric %d", u.gateway, u.ifname, 100*(i+1)))
	}
	s.far.Do(func() { err = errors.Join(echo(), serveDownload()) })
	if err != nil {
		s.Fatalf("serve %s: %v", internet, err)
	}
}

// echo answers each packet with the packet's source address.
func echo() error {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(internet), Port: echoPort})
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 64)
		for {
			_, from, err := conn.ReadFromUDP(buf)
			if err != nil {
				return
			}
			if _, err := conn.WriteToUDP([]byte(from.IP.String()), from); err != nil {
				return
			}
		}
	}()
	return nil
}

func (s *session) play() {
	say("A host with two uplinks, each with its gateway, and %s behind both:", internet)
	s.sh("ip -br -4 address show up scope global")
	say("The server leases table numbers. A client per address gets one and installs the rules:")
	s.serve()
	tables := make([]string, len(uplinks))
	for i, u := range uplinks {
		command := fmt.Sprintf("table-allocator-client -a %s -i %s -t %s --routes copy", u.addr, u.ifname, u.tag)
		tables[i] = strings.TrimSpace(s.sh(command))
	}
	s.sh("ip rule")
	s.sh("ip route show table " + tables[1])
	say("From an address, neighbours are reached on its link, and all others through its gateway:")
	s.sh("ip route get 203.0.113.77 from " + uplinks[1].addr)
	s.sh("ip route get " + internet + " from " + uplinks[1].addr)
	s.sh("table-allocator-client status --no-legend")
	s.leases()
	say("Packets leave by the uplink that their source address belongs to:")
	for _, u := range uplinks {
		s.probe(u.addr)
	}
	s.namespace()
	gone := uplinks[0]
	say("An address goes, and all that was made for it goes with it:")
	s.sh("ip address del " + gone.addr + "/24 dev " + gone.ifname)
	s.waitGone(tables[0])
	s.sh("ip rule")
	s.leases()
	s.probe(uplinks[1].addr)
	s.outage()
}

func say(format string, args ...any) { fmt.Printf("\n# "+format+"\n", args...) }

// sh runs a command on the host, and prints it and its output as a terminal shows them.
func (s *session) sh(command string) string {
	fmt.Println("$ " + command)
	out := s.quiet(command)
	fmt.Print(out)
	return out
}

func (s *session) quiet(command string) string {
	cmd := exec.Command("sh", "-c", command)
	cmd.Env = s.env
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	err := s.host.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		s.Fatalf("%s: %v\n%s", command, err, out.String())
	}
	return out.String()
}

// serve starts the server as a person would, and waits until it serves.
func (s *session) serve() {
	fmt.Println("$ table-allocator-server &")
	path := filepath.Join("bin", "table-allocator-server")
	cmd := exec.Command(path)
	cmd.Env = s.env
	log, err := cmd.StderrPipe()
	if err == nil {
		err = s.host.Start(cmd)
	}
	if err != nil {
		s.Fatalf("start %s: %v", path, err)
	}
	buf := make([]byte, 4096)
	n, err := log.Read(buf)
	if err != nil || !strings.Contains(string(buf[:n]), "msg=serving") {
		s.Fatalf("the server does not serve: %s", buf[:n])
	}
	go func() { // read on, or the pipe fills and the server waits
		for err == nil {
			_, err = log.Read(buf)
		}
	}()
}

// leases prints the database with sqlite3, or, without that program, as sqlite3 does.
func (s *session) leases() {
	const statement = "select * from leases"
	database := filepath.Join(state, "leases.db")
	fmt.Printf("$ sqlite3 -column -header leases.db '%s'\n", statement)
	if _, err := exec.LookPath("sqlite3"); err == nil {
		fmt.Print(s.quiet("sqlite3 -column -header " + database + " '" + statement + "'"))
		return
	}
	if err := printTable(database, statement); err != nil {
		s.Fatalf("%s: %v", statement, err)
	}
}

func printTable(database, statement string) error {
	db, err := sql.Open("sqlite", "file:"+database+"?mode=ro")
	if err != nil {
		return err
	}
	defer db.Close()
	rows, err := db.Query(statement)
	if err != nil {
		return err
	}
	defer rows.Close()
	names, err := rows.Columns()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	line := strings.Join(names, "\t")
	for {
		fmt.Fprintln(w, line)
		if !rows.Next() {
			return errors.Join(rows.Err(), w.Flush())
		}
		values := make([]any, len(names))
		for i := range values {
			values[i] = new(sql.NullString)
		}
		if err := rows.Scan(values...); err != nil {
			return err
		}
		line = ""
		for _, v := range values {
			line += v.(*sql.NullString).String + "\t"
		}
	}
}

// probe sends packets from a source address, and prints how many left by which uplink.
func (s *session) probe(source string) {
	before := s.received()
	var seen string
	var err error
	s.host.Do(func() { seen, err = ask(source) })
	if err != nil {
		s.Fatalf("packets from %s to %s: %v", source, internet, err)
	}
	after := s.received()
	for i, u := range uplinks {
		if n := after[i] - before[i]; n > 0 {
			fmt.Printf("%d packets from %s to %s: %d left by %s through %s; %s saw them come from %s\n",
				probes, source, internet, n, u.ifname, u.gateway, internet, seen)
		}
	}
}

// ask sends the packets one by one, and returns the source address that the internet saw.
func ask(source string) (seen string, err error) {
	conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(source)}, &net.UDPAddr{IP: net.ParseIP(internet), Port: echoPort})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	for range probes {
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
		n, err := conn.Read(buf)
		if err != nil {
			return "", err
		}
		seen = string(buf[:n])
	}
	return seen, nil
}

// received is how many UDP packets each gateway has forwarded for the host.
func (s *session) received() []int {
	counts := make([]int, len(uplinks))
	for i, gateway := range s.far.Providers {
		gateway.Do(func() { counts[i] = forwarded() })
	}
	return counts
}

// forwarded returns how many packets were forwarded for the host: half of ForwDatagrams in
// /proc/net/snmp, since a gateway forwards each packet and its answer.
func forwarded() int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/net/snmp", os.Getpid(), unix.Gettid()))
	if err != nil {
		return 0
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "Ip:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i, name := range names {
			if name == "ForwDatagrams" && i < len(fields) {
				n, _ := strconv.Atoi(fields[i]) // what is no number is printed as no packets
				return n / 2
			}
		}
	}
	return 0
}

// waitGone waits until no rule refers to a table.
func (s *session) waitGone(table string) {
	for until := time.Now().Add(patience); ; runtime.Gosched() {
		if !strings.Contains(s.quiet("ip rule"), "lookup "+table) {
			return
		}
		if time.Now().After(until) {
			s.Fatalf("table %s still has rules", table)
		}
	}
}
