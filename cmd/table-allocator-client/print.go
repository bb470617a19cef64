package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/bind"
	"github.com/table-allocator/table-allocator/internal/inspect"
)

// screen is the most columns of a line.
const screen = 80

// show prints rows as JSON or as a table. With missing it returns errMissing.
func show[T any](rows []T, asJSON, missing bool, table func(out io.Writer, rows []T, colour bool) error) error {
	var err error
	if asJSON {
		err = json.NewEncoder(os.Stdout).Encode(rows)
	} else {
		err = table(os.Stdout, rows, isTerminal(os.Stdout))
	}
	if err == nil && missing {
		err = errMissing
	}
	return err
}

// printRows prints a line for each address. If a line would be wider than the screen, its last columns
// go to lines of their own below it.
func printRows(out io.Writer, rows []inspect.Row, colour bool) error {
	table := [][]string{{"IFNAME", "ADDRESS", "TABLE", "LEFT", "MODE", "PID", "GATEWAY"}}
	for _, r := range rows {
		line := []string{r.Ifname, r.Address, "-", "-", orDefault(r.Mode, "-"), "-", orDefault(r.Gateway, "-")}
		if r.Table != 0 {
			line[2], line[3] = fmt.Sprint(r.Table), leaseLeft(r.LeaseLeft)
		}
		if r.PID != 0 {
			line[5] = fmt.Sprint(r.PID)
		}
		table = append(table, line)
	}
	w := bufio.NewWriter(out)
	widths := make([]int, len(table[0]))
	total := -2
	for c := range widths {
		for _, line := range table {
			widths[c] = max(widths[c], len(line[c]))
		}
		total += widths[c] + 2
	}
	// The gateway leaves the line first, then all columns but link and address.
	first := len(widths)
	if total > screen {
		first--
		total -= widths[first] + 2
	}
	if total > screen {
		first = 2
	}
	for i, line := range table {
		text := ""
		for c := range first {
			text += fmt.Sprintf("%-*s  ", widths[c], line[c])
		}
		fmt.Fprintln(w, strings.TrimRight(text, " "))
		if i == 0 {
			continue
		}
		var rest []string
		for c := first; c < len(line); c++ {
			if line[c] != "-" {
				rest = append(rest, strings.ToLower(table[0][c])+" "+line[c])
			}
		}
		for len(rest) > 0 {
			line := "    " + rest[0]
			for rest = rest[1:]; len(rest) > 0 && len(line)+2+len(rest[0]) <= screen; rest = rest[1:] {
				line += "  " + rest[0]
			}
			fmt.Fprintln(w, line)
		}
		if missing := rows[i-1].Missing; missing != "" {
			printMissing(w, missing, colour)
		}
	}
	return w.Flush()
}

// printBound prints a line for each process and for each kind of traffic.
func printBound(out io.Writer, rows []bind.Row, colour bool) error {
	const format = "%-15s %-8s %-12s %s\n"
	if _, err := fmt.Fprintf(out, format, "IFNAME", "ON-LOSS", "TABLES", "WHAT"); err != nil {
		return err
	}
	for _, r := range rows {
		tables := strings.Trim(strings.ReplaceAll(fmt.Sprint(r.Tables), " ", ","), "[]")
		what := []string{r.Traffic}
		if r.Cgroup != "" {
			what = what[:0]
			for _, p := range r.Processes {
				what = append(what, fmt.Sprintf("%d (%s)", p.PID, p.Name))
			}
			if len(what) == 0 {
				what = []string{"cgroup " + r.Cgroup}
			}
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
