package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	webPort   = 80
	chunk     = "a part of a long download\n"
	chunkEach = 50 * time.Millisecond
	// unanswered is how long a request waits for its answer, while nobody answers.
	unanswered = 300 * time.Millisecond
	// longest is how long the demo waits for what the watch and TCP do in their own time.
	longest = 3 * time.Minute
)

// config is that of the watch in the last act. Each system lets root send TCP; ICMP may be closed in a new namespace.
const config = `{ "links": [ { "ifname": "wan*" } ],
  "probe": { "targets": ["` + internet + `"], "kinds": ["tcp:80"] } }
`

// outage is the last act: the gateway of the first uplink is there and has no Internet any more.
func (s *session) outage() {
	u, other := uplinks[0], uplinks[1]
	say("A watch serves all addresses, and asks through each uplink whether it works:")
	s.sh("table-allocator-client release --all")
	for _, command := range []string{"address replace " + u.addr + "/24 dev " + u.ifname, "route replace default via " + u.gateway + " dev " + u.ifname + " metric 100"} {
		s.sh("ip " + command)
	}
	s.watch()
	s.waitUplinks(u.ifname)
	s.sh("table-allocator-client uplinks")

	d := s.download()
	say("A long download runs by %s. Then its gateway, which is alive, loses its Internet:", u.ifname)
	d.waitMore(s)
	gateway := s.far.Providers[0]
	for _, link := range []string{"lan", "net"} { // both ways, and what is for the gateway itself passes
		fmt.Printf("gateway$ ip rule add iif %s blackhole\n", link)
		gateway.IP(s, "rule add iif "+link+" blackhole")
	}
	s.requests(u.addr, other.addr)
	s.sh("table-allocator-client uplinks")
	say("The Internet is back. The download kept its source address, and goes on where it stood:")
	for _, link := range []string{"lan", "net"} {
		fmt.Printf("gateway$ ip rule delete iif %s blackhole\n", link)
		gateway.IP(s, "rule delete iif "+link+" blackhole")
	}
	d.waitMore(s)
	size, still := d.stop()
	fmt.Printf("the download from %s has %d kB, stood still for %.1f s, and misses nothing\n", u.addr, size/1000, still.Seconds())
}

// watch starts the watch as a person would, with a configuration that probes.
func (s *session) watch() {
	path := filepath.Join(state, "watch.json")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		s.Fatalf("%v", err)
	}
	fmt.Printf("$ cat watch.json\n%s$ table-allocator-client watch --config watch.json &\n", config)
	cmd := exec.Command(filepath.Join("bin", "table-allocator-client"), "watch", "--config", path)
	cmd.Env = s.env
	if err := s.host.Start(cmd); err != nil {
		s.Fatalf("start the watch: %v", err)
	}
}

// waitUplinks waits until it is known that all uplinks work, and unbound traffic uses one.
func (s *session) waitUplinks(ifname string) {
	var shown string
	for until := time.Now().Add(longest); time.Now().Before(until); time.Sleep(chunkEach) {
		shown = s.quiet("table-allocator-client uplinks 2>&1 || :") // the watch may not answer yet
		if strings.Contains(shown, "unbound traffic uses "+ifname+":") && strings.Count(shown, " alive (") == len(uplinks) {
			return
		}
	}
	s.Fatalf("not all uplinks work:\n%s", shown)
}

// requests sends requests, each from whatever address the kernel chooses, until one leaves from another address than
// before. That one has to be answered.
func (s *session) requests(before, after string) {
	begin := time.Now()
	for n := 1; time.Since(begin) < longest; n++ {
		var source, seen string
		var err error
		s.host.Do(func() { source, seen, err = request(before) })
		switch {
		case source == before && err == nil:
			s.Fatalf("request %d was answered through the gateway without Internet", n)
		case source == before && errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil || seen != after:
			s.Fatalf("request %d, from %q, came from %q: %v", n, source, seen, err)
		}
		fmt.Printf("%d requests without an answer; after %.1f s request %d is the first from %s, and is answered\n", n-1, time.Since(begin).Seconds(), n, after)
		return
	}
	s.Fatalf("requests go on to leave by the uplink without Internet")
}

// request sends one packet that is bound to nothing. It returns the source that the kernel chose, and that of the packet at
// the internet. One from slow may wait for its answer for a short time only.
func request(slow string) (source, seen string, err error) {
	conn, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.ParseIP(internet), Port: echoPort})
	if err != nil {
		return "", "", err
	}
	defer conn.Close()
	source = conn.LocalAddr().(*net.UDPAddr).IP.String()
	wait := patience
	if source == slow {
		wait = unanswered
	}
	if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return source, "", err
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return source, "", err
	}
	buf := make([]byte, 64)
	n, err := conn.Read(buf)
	return source, string(buf[:n]), err
}

// serveDownload sends text without an end to each connection, until its other end goes.
func serveDownload() error {
	listener, err := net.Listen("tcp4", net.JoinHostPort(internet, fmt.Sprint(webPort)))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for ; err == nil; time.Sleep(chunkEach) {
					_, err = conn.Write([]byte(chunk))
				}
			}()
		}
	}()
	return nil
}

// download is one that runs.
type download struct {
	conn net.Conn
	done chan struct{}

	mu    sync.Mutex
	size  int
	last  time.Time     // when something came
	still time.Duration // the longest time in which nothing came
	err   error
}

func (s *session) download() *download {
	d := &download{done: make(chan struct{}), last: time.Now()}
	s.host.Do(func() {
		d.conn, d.err = net.DialTimeout("tcp4", net.JoinHostPort(internet, fmt.Sprint(webPort)), patience)
	})
	if d.err != nil {
		s.Fatalf("download: %v", d.err)
	}
	go d.run()
	return d
}

func (d *download) run() {
	defer close(d.done)
	buf := make([]byte, 4096)
	for {
		n, err := d.conn.Read(buf)
		d.mu.Lock()
		for _, c := range buf[:n] { // each byte is the one that follows
			if c != chunk[d.size%len(chunk)] {
				err = fmt.Errorf("byte %d is %q", d.size, c)
			}
			d.size++
		}
		now := time.Now()
		d.still, d.last = max(d.still, now.Sub(d.last)), now
		if d.err = err; err != nil {
			d.mu.Unlock()
			return
		}
		d.mu.Unlock()
	}
}

// waitMore waits until more has come.
func (d *download) waitMore(s *session) {
	read := func() (int, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.size, d.err
	}
	before, _ := read()
	for until := time.Now().Add(longest); ; time.Sleep(chunkEach) {
		size, err := read()
		if err != nil {
			s.Fatalf("download: %v", err)
		}
		if size > before {
			return
		}
		if time.Now().After(until) {
			s.Fatalf("the download does not go on")
		}
	}
}

// stop ends the download.
func (d *download) stop() (size int, still time.Duration) {
	d.conn.Close()
	<-d.done
	return d.size, d.still
}
