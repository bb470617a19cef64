package allocator

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

func TestExpiry(t *testing.T) {
	h := start(t, config(t, inet(10000, 2)))
	h.do(get(1))
	h.now += 5
	h.do(get(2))
	for _, c := range []struct {
		at   int64
		want []uint32
		next int64
	}{
		{1005 + 60, nil, 1005 + 120},
		{1000 + timeout - 1, nil, 1000 + timeout},
		{1000 + timeout, []uint32{10000}, 1000 + timeout + 5},
		{1000 + timeout + 5, []uint32{10001}, 1000 + timeout + 65},
	} {
		expired, err := h.Tick(c.at)
		if err != nil {
			t.Fatal(err)
		}
		var got []uint32
		for _, l := range expired {
			got = append(got, l.Table)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("at %d: expired %v, want %v", c.at, got, c.want)
		}
		if got := h.Next(); got != c.next {
			t.Errorf("at %d: next %d, want %d", c.at, got, c.next)
		}
	}
	wantRows(t, peer(t, h.cfg.Path), "SELECT count(*) FROM RtTables", "0")
}

// What Decide finds to be over is still reported, at once, by the next Tick.
func TestExpiryOnDemandIsReported(t *testing.T) {
	h := start(t, config(t, inet(10000, 1)))
	h.do(get(1))
	h.now += timeout
	h.want(ops(get(2)), "granted 10000")
	if got := h.Next(); got > h.now {
		t.Errorf("next %d, want no later than %d", got, h.now)
	}
	expired, err := h.Tick(h.now)
	if err != nil || len(expired) != 1 || expired[0].Key != key(1) {
		t.Errorf("got %+v, %v, want the lease of %+v", expired, err, key(1))
	}
}

// The wall clock is for people: however it jumps, over a suspended night too, in which the
// clock of leases stands still, leases last as long as before.
func TestWallClockJumps(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	utc := time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)
	h.utc = func() time.Time { return utc }
	h.do(get(1), get(2))
	db := peer(t, h.cfg.Path)
	jumps := []struct {
		name string
		to   time.Time
	}{
		{"years ahead", utc.AddDate(40, 0, 0)},
		{"years back", utc.AddDate(-10, 0, 0)},
		{"no battery", time.Unix(0, 0)},
		{"before 1970", time.Date(1901, 12, 13, 0, 0, 0, 0, time.UTC)},
		{"past 32 bits", time.Date(2038, 1, 19, 3, 14, 8, 0, time.UTC)},
		{"past the year 9999", time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC)},
		{"a night of suspend", utc.Add(9 * time.Hour)},
	}
	for i, c := range jumps {
		utc = c.to
		h.now += timeout / 20
		granted := fmt.Sprint("granted ", 10002+i)
		h.want(ops(get(1), get(3+i), give(99)), "renewed 10000", granted, "not held")
		h.flush()
		if expired, err := h.Tick(h.now); err != nil || len(expired) > 0 {
			t.Errorf("%s: expired %v, %v", c.name, expired, err)
		}
		if got, want := h.Next(), h.now+60; got > want {
			t.Errorf("%s: next %d, want %d at most", c.name, got, want)
		}
		if c.to.Year() <= 9999 {
			wantRows(t, db, "SELECT expires_at FROM leases WHERE address = '192.0.2.1'", c.to.Add(timeout*time.Second).Format(time.DateTime))
		}
		if i == 3 { // and at the start of a server
			h.stop()
			h.open()
			h.utc = func() time.Time { return utc }
		}
	}
	t.Logf("%d jumps, from the year 1901 to 12000", len(jumps))
	h.now = 1000 + timeout/20*4 + timeout // of the restart, from which on all had their time again
	expired, err := h.Tick(h.now)
	if err != nil || len(expired) != 5 { // the one never renewed, and those of the first four jumps
		t.Errorf("expired %v, %v, want five", expired, err)
	}
	h.want(ops(get(1)), "renewed 10000")
}

// TestMonth: a holder renews for a month, while others come, go, and die without a word.
func TestMonth(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	h.do(get(1), get(2))
	const renewals = 31 * 24 * 3600 / (timeout / 2)
	ended := 0
	for n := range renewals {
		h.now += timeout / 2
		h.want(ops(get(1), get(2)), "renewed 10000", "renewed 10001")
		switch n % 5 {
		case 0:
			h.want(ops(get(3)), "granted 10002")
		case 1:
			h.want(ops(get(3), get(4)), "renewed 10002", "granted 10003") // the last that is heard of 4
		case 2, 3:
			h.want(ops(get(3)), "renewed 10002")
		case 4:
			h.want(ops(give(3)), "released 10002")
		}
		expired, err := h.Tick(h.now)
		if err != nil {
			t.Fatal(err)
		}
		if ended += len(expired); len(expired) > 0 && (len(expired) != 1 || expired[0].Key != key(4)) {
			t.Fatalf("renewal %d: expired %+v", n, expired)
		}
		if n%48 == 47 { // once a day
			h.stop()
			h.open()
		}
	}
	t.Logf("%d renewals each half hour, %d leases ended by themselves", renewals, ended)
	if ended < renewals/5-1 {
		t.Errorf("%d leases ended by themselves, want one in %d", ended, renewals/5)
	}
	if got := h.Held(); got > 4 {
		t.Errorf("%d leases are left, want 4 at most", got)
	}
}

func TestClockRow(t *testing.T) {
	h := start(t, config(t, inet(10000, 9)))
	db := peer(t, h.cfg.Path)
	const clock = "SELECT boot, netns, monotonic FROM clock"
	wantRows(t, db, clock, here.Boot+"|7|1000")
	for _, c := range []struct{ at, want int64 }{{1059, 1000}, {1060, 1060}, {1070, 1060}, {1200, 1200}} {
		if _, err := h.Tick(c.at); err != nil {
			t.Fatal(err)
		}
		wantRows(t, db, clock, fmt.Sprint(here.Boot, "|7|", c.want))
	}
}
