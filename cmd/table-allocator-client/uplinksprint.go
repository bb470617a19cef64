package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/uplinks"
)

// printUplinks prints a line for each uplink, and what unbound traffic uses. width is that of the terminal; 0: it is none.
func printUplinks(out io.Writer, report uplinks.Report, width int) error {
	w := bufio.NewWriter(out)
	if !report.Probing {
		fmt.Fprintln(w, `not probing: the configuration of the watch has no "probe"`)
	}
	lines := [][]string{{"IFNAME", "ADDRESS", "TABLE", "RANK", "RTT", "LOSS", "SINCE", "STATE"}}
	for _, u := range report.Uplinks {
		lines = append(lines, uplinkLine(u))
	}
	widths := make([]int, len(lines[0]))
	for _, line := range lines {
		for c, cell := range line {
			widths[c] = max(widths[c], len(cell))
		}
	}
	for i, line := range lines {
		mark := "  "
		if i > 0 && report.Uplinks[i-1].Used {
			mark = "* "
		}
		text := mark
		for c, cell := range line {
			text += fmt.Sprintf("%-*s  ", widths[c], cell)
		}
		fmt.Fprintln(w, strings.TrimRight(text, " "))
		if i > 0 && width > 0 && isUTF8() {
			printHour(w, report.Uplinks[i-1].Hour)
		}
	}
	for _, c := range report.Unbound {
		fmt.Fprintln(w, choiceText(c))
	}
	return w.Flush()
}

func uplinkLine(u uplinks.Uplink) []string {
	rtt, loss := "-", "-"
	if u.RTT > 0 {
		rtt = fmt.Sprintf("%.1fms", u.RTT)
	}
	if u.State != "off" && u.State != "unknown" {
		loss = fmt.Sprintf("%d%%", u.Loss)
	}
	state := u.State + " (" + u.Reason + ")"
	if u.Metered {
		state += ", metered"
	}
	if u.Unused != "" && (u.State == "alive" || u.State == "degraded" || u.State == "off") {
		state += ", not used: " + u.Unused
	}
	if u.Bytes > 0 {
		state += fmt.Sprintf(", %s of probes", byteText(u.Bytes))
	}
	return []string{u.Ifname, u.Address, fmt.Sprint(u.Table), fmt.Sprint(u.Rank), rtt, loss, sinceText(u.Since), state}
}

func byteText(n uint64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1000:
		return fmt.Sprintf("%d kB", n/1000)
	}
	return fmt.Sprintf("%d B", n)
}

// sinceText is a duration in seconds, in its largest unit.
func sinceText(seconds int64) string {
	d := time.Duration(seconds) * time.Second
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d >= 2*time.Minute:
		return fmt.Sprintf("%dm", d/time.Minute)
	}
	return fmt.Sprintf("%ds", seconds)
}

func choiceText(c uplinks.Choice) string {
	family := map[string]string{"inet": "IPv4", "inet6": "IPv6"}[c.Family]
	if c.Ifname == "" {
		return fmt.Sprintf("%s  unbound traffic goes as without a choice: %s", family, c.Why)
	}
	text := fmt.Sprintf("%s  unbound traffic uses %s: %s", family, c.Ifname, c.Why)
	if c.Warn != "" {
		text += "\n      but " + c.Warn + ": " + c.Cure
	}
	return text
}

// isUTF8 reports whether the locale of the user shows more than ASCII.
func isUTF8() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if value := os.Getenv(name); value != "" {
			value = strings.ToUpper(strings.ReplaceAll(value, "-", ""))
			return strings.HasSuffix(value, "UTF8")
		}
	}
	return false
}

// printHour draws round trip and loss of the last hour, a character for each minute.
func printHour(w io.Writer, hour []uplinks.Minute) {
	longest := 0.0
	for _, m := range hour {
		longest = max(longest, m.RTT)
	}
	var rtt, loss strings.Builder
	for _, m := range hour {
		rtt.WriteRune(level(m.RTT, longest, m.Loss >= 0 && m.RTT > 0))
		loss.WriteRune(level(float64(m.Loss), 100, m.Loss > 0))
	}
	if longest > 0 {
		fmt.Fprintf(w, "    rtt   %s  to %.1fms\n", rtt.String(), longest)
	}
	if strings.TrimSpace(loss.String()) != "" {
		fmt.Fprintf(w, "    loss  %s  to 100%%\n", loss.String())
	}
}

// level is a bar for a value up to most.
func level(value, most float64, any bool) rune {
	const bars = "▁▂▃▄▅▆▇█"
	if !any || most <= 0 {
		return ' '
	}
	all := []rune(bars)
	return all[min(int(value/most*float64(len(all))), len(all)-1)]
}
