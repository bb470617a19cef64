// Package uplinks is what a watch says of its uplinks, and what it is told: which work, which one unbound traffic uses and
// why, and which one a user wants. It hides the socket: an abstract name, which is also the lock that one watch of a
// network namespace has; whom either side believes; and that a slow peer never holds the watch.
package uplinks

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/peer"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// name is the abstract name of the socket.
const name = "@table-allocator-uplinks"

// Version is that of Report.
const Version = 1

// Request is a question to a watch. With Use it is a wish.
type Request struct {
	Use    string      `json:"use,omitempty"`    // a link, or Auto
	Family wire.Family `json:"family,omitempty"` // Unspec is both
	Follow bool        `json:"follow,omitempty"` // events follow the report
}

// Event is a change of an uplink's state, or of the choice.
type Event struct {
	Time    time.Time `json:"time"`
	Event   string    `json:"event"` // state, unbound
	Ifname  string    `json:"ifname"`
	Family  string    `json:"family"`
	Address string    `json:"address"`
	Table   uint32    `json:"table"`
	Old     string    `json:"old"`   // of state
	State   string    `json:"state"` // of state
	From    string    `json:"from"`  // of unbound: a link
	To      string    `json:"to"`
	Gateway string    `json:"gateway"` // of unbound
	Reason  string    `json:"reason"`
	RTT     float64   `json:"rtt_ms"`
	Loss    int       `json:"loss"`
}

// Auto in Request.Use ends the wish of a user.
const Auto = "auto"

// Report is the answer.
type Report struct {
	Version int      `json:"version"`
	Probing bool     `json:"probing"`
	Targets []string `json:"targets"` // that the configuration names
	Kinds   []string `json:"kinds"`
	Uplinks []Uplink `json:"uplinks"`
	Unbound []Choice `json:"unbound"` // one for each family in which there is a choice
	Error   string   `json:"error,omitempty"`
}

// Uplink is one address in service.
type Uplink struct {
	Ifname      string   `json:"ifname"`
	Family      string   `json:"family"`
	Address     string   `json:"address"`
	Table       uint32   `json:"table"`
	Rank        int      `json:"rank"`
	Metered     bool     `json:"metered"`
	State       string   `json:"state"`
	Reason      string   `json:"reason"`
	Since       int64    `json:"since"` // seconds that it has been in this state
	RTT         float64  `json:"rtt_ms"`
	Loss        int      `json:"loss"`           // percent of the last rounds
	Next        int64    `json:"next,omitempty"` // seconds until the next round
	Bytes       uint64   `json:"bytes"`          // of probes, since the watch began
	Used        bool     `json:"used"`           // by unbound traffic
	Unused      string   `json:"unused"`         // why unbound traffic does not use it, where it uses another one
	Nameservers []string `json:"nameservers"`
	Hour        []Minute `json:"hour,omitempty"` // the oldest first; a minute without a round has a loss of -1
}

// Minute is what the rounds of one minute brought.
type Minute struct {
	RTT  float64 `json:"rtt_ms"`
	Loss int     `json:"loss"`
}

// Choice is which uplink the unbound traffic of a family uses.
type Choice struct {
	Family string   `json:"family"`
	Ifname string   `json:"ifname"` // "": none is chosen
	Table  uint32   `json:"table"`
	Why    string   `json:"why"`
	By     []string `json:"by"` // rule, main
	Pinned bool     `json:"pinned"`
	Warn   string   `json:"warn,omitempty"` // what stands against it
	Cure   string   `json:"cure,omitempty"` // what to do about that
}

const (
	patience    = 5 * time.Second
	maxRequest  = 4 << 10
	maxReport   = 16 << 20
	connections = 16 // at the same time
)

// ErrNoWatch says that no watch runs in the network namespace.
var ErrNoWatch = errors.New("no watch runs")

// Watch returns the process that is the watch of this network namespace; 0: there is none, or its user is not trusted.
func Watch() (pid int) {
	if pid, is, err := Chooser(); is && err == nil {
		return pid
	}
	return 0
}

// Chooser reports whether a process of a user that is trusted has the name of the watch, and which; 0: one of another pid namespace.
// An error says that this is not known.
func Chooser() (pid int, is bool, err error) {
	conn, err := dial()
	if errors.Is(err, ErrNoWatch) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer conn.Close()
	cred, trusted, err := believes(conn.(*net.UnixConn))
	return int(cred.PID), trusted, err
}

// Ask asks the watch of this network namespace.
func Ask(req Request) (Report, error) {
	report, conn, _, err := ask(req)
	if err == nil {
		conn.Close()
	}
	return report, err
}

// Follow calls each for every event from now on, as a line of JSON, until the watch ends or each returns an error.
func Follow(each func(line []byte) error) error {
	_, conn, more, err := ask(Request{Follow: true})
	if err != nil {
		return err
	}
	defer conn.Close()
	lines := bufio.NewScanner(more)
	for lines.Scan() {
		if err := each(lines.Bytes()); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("follow the watch: %w", err)
	}
	return errors.New("the watch has ended")
}

// ask returns what comes behind the report as more, some of which may have been read with it.
func ask(req Request) (report Report, conn net.Conn, more *bufio.Reader, err error) {
	if conn, err = dial(); err != nil {
		return Report{}, nil, nil, err
	}
	more = bufio.NewReaderSize(conn, 64<<10)
	if report, err = exchange(conn, more, req); err != nil {
		conn.Close()
		return report, nil, nil, err
	}
	return report, conn, more, nil
}

func dial() (net.Conn, error) {
	conn, err := net.DialTimeout("unix", name, patience)
	for until := time.Now().Add(patience); errors.Is(err, syscall.EAGAIN) && time.Now().Before(until); { // too many others wait
		time.Sleep(patience / 1000)
		conn, err = net.DialTimeout("unix", name, patience)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %s", ErrNoWatch, outside.Service("start", "table-allocator-watch"))
	}
	if err != nil {
		return nil, fmt.Errorf("ask the watch: %w", err)
	}
	return conn, nil
}

func exchange(conn net.Conn, answers *bufio.Reader, req Request) (report Report, err error) {
	_, trusted, err := believes(conn.(*net.UnixConn))
	if err == nil && !trusted {
		err = errors.New("the process that has the name of the watch is not trusted")
	}
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(patience))
	}
	if err == nil {
		err = json.NewEncoder(conn).Encode(req)
	}
	if err == nil {
		var line []byte
		if line, err = readLine(answers); err == nil {
			err = json.Unmarshal(line, &report)
		}
	}
	if err == nil && req.Follow {
		err = conn.SetDeadline(time.Time{})
	}
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return report, peer.ErrNotAsked
	}
	if err != nil {
		return report, fmt.Errorf("ask the watch: %w", err)
	}
	if report.Error != "" {
		return report, errors.New(report.Error)
	}
	return report, nil
}

// readLine reads a line of an answer.
func readLine(r *bufio.Reader) (line []byte, err error) {
	for len(line) < maxReport {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if err == nil {
			return line, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
	}
	return nil, errors.New("the answer is too long")
}

// believes reports whether the other end of a connection is trusted.
func believes(conn *net.UnixConn) (cred wire.Cred, trusted bool, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return cred, false, err
	}
	controlErr := raw.Control(func(fd uintptr) { cred, err = wire.PeerCred(int(fd)) })
	if err = errors.Join(controlErr, err); err != nil {
		return cred, false, err
	}
	return cred, peer.NewTrust(nil).Believes(cred), nil
}

// Listener answers requests at the name.
type Listener struct{ socket *net.UnixListener }

// Listen takes the name. EADDRINUSE says that another process has it.
func Listen() (*Listener, error) {
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return &Listener{socket}, nil
}

// Close ends Serve.
func (l *Listener) Close() error { return l.socket.Close() }

// Answer is what a request gets.
type Answer struct {
	Report
	Events <-chan Event // of a request to follow; its end ends the connection
	Done   func()       // called when nobody reads Events any more
}

// Serve answers the requests of users that are trusted until Close: answer is called for each, by several goroutines at
// once, and may wait. started is called to start each of these goroutines.
func (l *Listener) Serve(start func(func()), answer func(Request) (Answer, bool)) {
	room := make(chan struct{}, connections)
	for {
		conn, err := l.socket.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // too many files, say
			time.Sleep(patience / connections)
			continue
		}
		if _, trusted, err := believes(conn); err != nil || !trusted { // before it takes room from others
			conn.Close()
			continue
		}
		select {
		case room <- struct{}{}:
			start(func() {
				defer func() { <-room }()
				serve(conn, answer)
			})
		default:
			conn.Close()
		}
	}
}

func serve(conn *net.UnixConn, answer func(Request) (Answer, bool)) {
	defer conn.Close()
	if conn.SetDeadline(time.Now().Add(patience)) != nil {
		return
	}
	line, err := bufio.NewReader(io.LimitReader(conn, maxRequest)).ReadBytes('\n')
	if err != nil {
		return
	}
	var req Request
	got := Answer{Report: Report{Error: "the request is not understood"}}
	if json.Unmarshal(line, &req) == nil {
		ok := false
		if got, ok = answer(req); !ok {
			return
		}
	}
	got.Version = Version
	err = json.NewEncoder(conn).Encode(got.Report)
	if got.Events == nil {
		return // with an error the asker has gone
	}
	defer got.Done()
	if err == nil {
		stream(conn, got.Events)
	}
}

// stream sends events until there are no more, or the other end goes or does not read.
func stream(conn *net.UnixConn, events <-chan Event) {
	gone := make(chan struct{})
	if conn.SetReadDeadline(time.Time{}) != nil {
		return
	}
	go func() { // ends with conn
		_, _ = conn.Read(make([]byte, 1)) // nothing more comes from there
		close(gone)
	}()
	defer func() { conn.Close(); <-gone }()
	for {
		select {
		case e, ok := <-events:
			if !ok || conn.SetWriteDeadline(time.Now().Add(patience)) != nil || json.NewEncoder(conn).Encode(e) != nil {
				return
			}
		case <-gone:
			return
		}
	}
}
