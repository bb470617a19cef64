package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/table-allocator/table-allocator/internal/inspect"
)

// The columns of titles that are treated on their own.
const (
	addressColumn = 1
	stateColumn   = 6 // without those of probeTitles, which come before it
)

// cells are the columns of an address. A dash stands for none.
func cells(r inspect.Row, probed bool) []string {
	line := []string{r.Ifname, r.Address, "-", "-", orDefault(r.Mode, "-"), "-", r.Text(), orDefault(r.Gateway, "-")}
	if r.Table != 0 {
		line[2], line[3] = fmt.Sprint(r.Table), leaseLeft(r.LeaseLeft)
	}
	if r.PID != 0 {
		line[5] = fmt.Sprint(r.PID)
	}
	if probed {
		line = slices.Insert(line, stateColumn, probeCells(r.Probe)...)
	}
	return line
}

// families returns the rows of each link and family, in their order.
func families(rows []inspect.Row) (all [][]inspect.Row) {
	for i, r := range rows {
		if i > 0 && rows[i-1].Ifname == r.Ifname && rows[i-1].Family == r.Family {
			all[len(all)-1] = append(all[len(all)-1], r)
		} else {
			all = append(all, []inspect.Row{r})
		}
	}
	return all
}

// add adds a line, and with prose what stands below it.
func (t *table) add(line, below []string, prose bool) {
	if !prose {
		below = nil
	}
	t.lines, t.below = append(t.lines, line), append(t.below, below)
}

// addFamily adds a line for all addresses of a link and family, with the worst state, why, and what to do. Below it comes each
// address, and of these lines those that are different there by more than the table. A column where they differ has a dash.
func (t *table) addFamily(rows []inspect.Row, probed bool, said map[string]bool) {
	worst := inspect.Worst(rows)
	all := make([][]string, len(rows))
	for i, r := range rows {
		all[i] = cells(r, probed)
	}
	sum := slices.Clone(all[0])
	for c := range sum {
		if slices.ContainsFunc(all, func(line []string) bool { return line[c] != sum[c] }) {
			sum[c] = "-"
		}
	}
	family := map[string]string{"inet": "IPv4", "inet6": "IPv6"}[rows[0].Family]
	sum[addressColumn] = fmt.Sprintf("%s(%d)", orDefault(family, rows[0].Family), len(rows))
	if state := &sum[len(sum)-2]; *state == "-" {
		as := slices.DeleteFunc(slices.Clone(rows), func(r inspect.Row) bool { return r.Text() != worst.Text() })
		*state = fmt.Sprintf("%s, %d of %d", worst.Text(), len(as), len(rows))
	}
	above := whatToDo(worst, said)
	t.add(sum, above, true)
	tableless := func(line string, table uint32) string {
		return strings.ReplaceAll(line, fmt.Sprint("table ", table), "table")
	}
	for i, r := range rows {
		all[i][addressColumn] = "  " + r.Address
		t.add(all[i], slices.DeleteFunc(whatToDo(r, said), func(line string) bool {
			return slices.ContainsFunc(above, func(other string) bool { return tableless(line, r.Table) == tableless(other, worst.Table) })
		}), true)
	}
}
