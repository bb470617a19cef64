package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/inspect"
	"github.com/table-allocator/table-allocator/internal/outside"
)

// screen is the most columns of a line, where the output is no terminal and lines of prose are wrapped.
const screen = 80

// show prints rows of bound traffic and processes as JSON or as a table. With missing it returns errMissing.
func show[T any](rows []T, asJSON, missing bool, table func(out io.Writer, rows []T, colour bool) error) error {
	var err error
	rows = printable(rows)
	if asJSON {
		err = json.NewEncoder(os.Stdout).Encode(map[string]any{"version": 1, "bound": rows})
	} else {
		err = table(os.Stdout, rows, isTerminal(os.Stdout))
	}
	if err == nil && missing {
		err = errMissing
	}
	return err
}

// titles are those of the columns of status. The gateway is the last, as scripts know it; new columns come before
// the state, which has blanks.
var titles = []string{"ifname", "address", "table", "left", "mode", "pid", "state", "gateway"}

// probeTitles come before the state where uplinks are probed. An asterisk is at the one that unbound traffic uses.
var probeTitles = []string{"probe", "rtt", "loss", "since"}

// probeCells are the columns of probeTitles.
func probeCells(p *inspect.Probe) []string {
	if p == nil {
		return []string{"-", "-", "-", "-"}
	}
	rtt, loss, mark := "-", "-", ""
	if p.RTT > 0 {
		rtt = fmt.Sprintf("%.1fms", p.RTT)
	}
	if p.State != "off" && p.State != "unknown" {
		loss = fmt.Sprintf("%d%%", p.Loss)
	}
	if p.Used {
		mark = "*"
	}
	return []string{p.State + mark, rtt, loss, sinceText(p.Since)}
}

// printStatus prints the server, where unbound packets leave, and a line for each address; above several of one link and
// family, one that sums them up. width is that of the
// terminal; 0: it is none, so that lines may have any length, and no colour.
func printStatus(out io.Writer, report inspect.Report, legend bool, width int) error {
	w := bufio.NewWriter(out)
	t := table{width: width, titles: titles}
	probed := slices.ContainsFunc(report.Uplinks, func(r inspect.Row) bool { return r.Probe != nil })
	if probed {
		t.titles = slices.Insert(slices.Clone(titles), stateColumn, probeTitles...)
	}
	if legend {
		t.wrap(w, "", "server   "+serverText(report.Server))
		t.wrap(w, "", "unbound  "+unboundText(report.Unbound))
		fmt.Fprintln(w)
		t.lines = [][]string{nil}
		for _, title := range t.titles {
			t.lines[0] = append(t.lines[0], strings.ToUpper(title))
		}
		t.below = [][]string{nil}
	}
	said := make(map[string]bool)
	for _, rows := range families(report.Uplinks) {
		if legend && len(rows) > 1 {
			t.addFamily(rows, probed, said)
			continue
		}
		for _, r := range rows {
			t.add(cells(r, probed), whatToDo(r, said), legend)
		}
	}
	for _, r := range report.Others {
		t.add(cells(r, probed), whatToDo(r, said), legend)
	}
	t.print(w)
	if legend && len(report.Namespaces) > 0 {
		fmt.Fprintln(w)
		for _, n := range report.Namespaces {
			t.wrap(w, "", "namespace "+namespaceText(n))
		}
	}
	return w.Flush()
}

// namespaceText is a network namespace in one line.
func namespaceText(n inspect.Namespace) string {
	text := fmt.Sprintf("%s on %s, %s", n.Name, n.Ifname, n.OnLoss)
	if len(n.Tables) > 0 {
		text += fmt.Sprintf(", tables %s", strings.Trim(fmt.Sprint(n.Tables), "[]"))
	}
	if n.VPN != "" {
		text += ", VPN " + n.VPN
	}
	text += fmt.Sprintf(", %d programs", n.Programs)
	if n.Missing != "" {
		text += ": misses " + n.Missing
	}
	return text
}

// whatToDo are the lines below an address that has faults: the first is in the line of the address. What has been said of
// an address before, as that the server is stopped, is not said again.
func whatToDo(r inspect.Row, said map[string]bool) (lines []string) {
	if r.Since != 0 {
		lines = append(lines, time.Unix(r.Since, 0).Format("since "+moment))
	}
	for i, f := range r.Findings {
		if i > 0 {
			lines = append(lines, "and "+f.What)
		}
		if once := f.Evidence + "\x00" + f.Cure; slices.Contains([]string{"server-stopped", "no-lease", "silent"}, f.Name) {
			if said[once] {
				continue
			}
			said[once] = true
		}
		if f.IsFault() && f.Evidence != "" {
			lines = append(lines, "why "+f.Evidence)
		}
		if f.IsFault() && f.Cure != "" {
			lines = append(lines, "do  "+f.Cure)
		}
	}
	return lines
}

func serverText(s inspect.Server) string {
	switch s.State {
	case inspect.Running:
		text := fmt.Sprintf("running, pid %d", s.PID)
		if s.Since != 0 {
			text += time.Unix(s.Since, 0).Format(", since 2006-01-02 15:04:05")
		}
		if s.Version != "" {
			text += ", version " + s.Version
		}
		return text
	case inspect.Waiting:
		return "not running: systemd starts it with the first request"
	case inspect.Stopped:
		text := "stopped"
		if s.Since != 0 {
			text += time.Unix(s.Since, 0).Format(" since " + moment)
		}
		return text + ": " + outside.Service("start", "table-allocator-server")
	case inspect.Stranger:
		return fmt.Sprintf("stopped: pid %d of uid %d has its name, and is not trusted", s.PID, s.UID)
	}
	return s.State
}

func unboundText(all []inspect.Unbound) string {
	var texts []string
	for _, u := range all {
		text := map[string]string{"inet": "IPv4", "inet6": "IPv6"}[u.Family]
		switch {
		case u.Ifname == "":
			text += " no route"
			if u.Why != "" && u.Chosen == "" {
				text += " (" + u.Why + ")"
			}
		case u.Gateway == "":
			text += " by " + u.Ifname
		default:
			text += " by " + u.Ifname + " through " + u.Gateway
		}
		if u.Table != 0 && u.Table != unix.RT_TABLE_MAIN {
			text += fmt.Sprintf(" (table %d)", u.Table)
		}
		if u.Chosen != "" {
			text += fmt.Sprintf(" (chosen: %s; %s)", u.Chosen, u.Why)
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, ", ")
}

// table is lines of columns, and lines of prose below some.
type table struct {
	titles []string
	lines  [][]string
	below  [][]string
	width  int // the most columns of a line; 0: any
}

// print prints the columns that there is room for. The others go to lines of their own.
func (t table) print(w io.Writer) {
	if len(t.lines) == 0 {
		return
	}
	widths := make([]int, len(t.lines[0]))
	for c := range widths {
		for _, line := range t.lines {
			widths[c] = max(widths[c], len(line[c]))
		}
	}
	shown := len(widths) // gateway and state leave the line first, then all columns but link and address
	for _, fewer := range []int{len(widths) - 2, 2} {
		if t.width > 0 && sum(widths[:shown])+2*(shown-1) > t.width {
			shown = fewer
		}
	}
	for i, line := range t.lines {
		text := ""
		var rest []string
		for c, cell := range line {
			switch {
			case c < shown:
				text += fmt.Sprintf("%-*s  ", widths[c], cell)
			case cell != "-" && cell != strings.ToUpper(t.titles[c]):
				rest = append(rest, t.titles[c]+" "+cell)
			}
		}
		t.wrap(w, "", strings.TrimRight(text, " "))
		t.wrap(w, "    ", strings.Join(rest, "  "))
		for _, text := range t.below[i] {
			t.wrap(w, "    ", text)
		}
	}
}

func sum(numbers []int) (total int) {
	for _, n := range numbers {
		total += n
	}
	return total
}

// wrap prints text in lines that begin with indent, and are no wider than the terminal. What goes on in the next line has
// more indent.
func (t table) wrap(w io.Writer, indent, text string) {
	for text != "" {
		line := text
		if room := t.width - len(indent); t.width > 0 && len(line) > room {
			at := strings.LastIndexByte(line[:room+1], ' ')
			if at <= 0 {
				at = room
			}
			line = line[:at]
		}
		text = strings.TrimLeft(text[len(line):], " ")
		fmt.Fprintln(w, indent+strings.TrimRight(line, " "))
		indent = "        "
	}
}

// width is how many columns a terminal has; 0: f is none.
func width(f *os.File) int {
	if !isTerminal(f) {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return screen
	}
	return max(int(size.Col), 40)
}

// printBound prints a line for each process and for each kind of traffic.
func printBound(out io.Writer, rows []bind.Row, colour bool) error {
	const format = "%-15s %-8s %-12s %s\n"
	if _, err := fmt.Fprintf(out, format, "IFNAME", "ON-LOSS", "TABLES", "WHAT"); err != nil {
		return err
	}
	for _, r := range printable(rows) {
		tables := strings.Trim(strings.ReplaceAll(fmt.Sprint(r.Tables), " ", ","), "[]")
		var what []string
		if r.Cgroup == "" {
			what = []string{unbindWords(r.Traffic)}
		}
		for _, p := range r.Processes {
			text := fmt.Sprintf("%d (%s)", p.PID, p.Name)
			if p.Is32Bit() {
				text += " 32-bit: options that it sets are not seen, see table-allocator-run(8)"
			}
			what = append(what, text)
		}
		if len(what) == 0 {
			what = []string{"cgroup " + r.Cgroup}
		}
		for _, w := range what {
			if _, err := fmt.Fprintf(out, format, orDefault(r.Ifname, "-"), r.OnLoss, orDefault(tables, "-"), w); err != nil {
				return err
			}
		}
		if r.Missing != "" {
			printMissing(out, r.Missing, colour)
		}
	}
	return nil
}

// unbindWords are the options of bind and unbind for traffic; another traffic is as `ip rule` writes it.
func unbindWords(traffic string) string {
	options := map[string]string{"uidrange": "--uid", "ipproto": "--proto", "dport": "--dport"}
	words := strings.Fields(traffic)
	for i := 0; i+1 < len(words); i += 2 {
		option := options[words[i]]
		if option == "" {
			return traffic
		}
		words[i] = option
		if first, last, is := strings.Cut(words[i+1], "-"); is && first == last && option == "--uid" {
			words[i+1] = first
		}
	}
	return strings.Join(words, " ")
}

func printMissing(w io.Writer, missing string, colour bool) {
	const red, plain, indent = "\x1b[31m", "\x1b[0m", "    "
	line := indent + "misses"
	flush := func() {
		if colour {
			line = red + line + plain
		}
		fmt.Fprintln(w, line)
	}
	for _, word := range strings.Fields(missing) {
		if len(line)+1+len(word) > screen {
			flush()
			line = indent + " "
		}
		line += " " + word
	}
	flush()
}

// leaseLeft returns a duration in its two largest units, as in 2h05m.
func leaseLeft(seconds int64) string {
	const minute, hour, day = 60, 60 * 60, 24 * 60 * 60
	switch {
	case seconds >= day:
		return fmt.Sprintf("%dd%02dh", seconds/day, seconds%day/hour)
	case seconds >= hour:
		return fmt.Sprintf("%dh%02dm", seconds/hour, seconds%hour/minute)
	}
	return fmt.Sprintf("%dm%02ds", seconds/minute, seconds%minute)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func orDefault(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}
