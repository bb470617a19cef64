package allocator

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestLeases(t *testing.T) {
	user := func(uid uint32, o Op) Op { o.UID = uid; return o }
	type step struct {
		wait int64
		ops  []Op
		want []string
	}
	for _, c := range []struct {
		name  string
		count uint64
		steps []step
	}{
		{"lowest number first", 3, []step{
			{0, ops(get(1), get(2)), []string{"granted 10000", "granted 10001"}},
			{0, ops(get(1)), []string{"renewed 10000"}},
		}},
		{"pool of one", 1, []step{
			{0, ops(get(1), get(2)), []string{"granted 10000", "refused: no table is free"}},
			{0, ops(give(1), get(2)), []string{"released 10000", "granted 10000"}},
		}},
		{"pool of three", 3, []step{
			{0, ops(get(1), get(2), get(3), get(4)), []string{"granted 10000", "granted 10001", "granted 10002", "refused: no table is free"}},
		}},
		{"unused for longest once all were used", 3, []step{
			{0, ops(get(1), get(2), get(3)), []string{"granted 10000", "granted 10001", "granted 10002"}},
			{0, ops(give(2), give(3), give(1)), []string{"released 10001", "released 10002", "released 10000"}},
			{0, ops(get(4), get(5), get(6)), []string{"granted 10001", "granted 10002", "granted 10000"}},
		}},
		{"same number again", 3, []step{
			{0, ops(get(1), get(2)), []string{"granted 10000", "granted 10001"}},
			{0, ops(give(1), give(2)), []string{"released 10000", "released 10001"}},
			{0, ops(get(2), get(3), get(1)), []string{"granted 10001", "granted 10002", "granted 10000"}},
		}},
		{"not the same number once another needed it", 1, []step{
			{0, ops(get(1), give(1), get(2), give(2), get(1)), []string{"granted 10000", "released 10000", "granted 10000", "released 10000", "granted 10000"}},
		}},
		{"in one batch", 3, []step{
			{0, ops(get(1), get(1), give(1), give(1), get(1)), []string{"granted 10000", "renewed 10000", "released 10000", "not held", "granted 10000"}},
		}},
		{"release of what is not held", 3, []step{
			{0, ops(give(1)), []string{"not held"}},
		}},
		{"families", 3, []step{
			{0, ops(Op{Key: Key{Inet6, "eth0", "2001:db8::1"}}), []string{"refused: family is not served"}},
			{0, ops(Op{Release: true, Key: Key{Inet6, "eth0", "2001:db8::1"}}), []string{"not held"}},
		}},
		{"owners", 3, []step{
			{0, ops(user(1000, get(1)), user(1001, get(1)), user(1001, give(1))), []string{"granted 10000",
				"refused: the lease belongs to another user", "refused: the lease belongs to another user"}},
			{0, ops(user(1000, get(1)), user(0, get(1))), []string{"renewed 10000", "granted 10000"}}, // root takes it over
			{0, ops(user(1000, get(1)), user(1000, give(1))), []string{"refused: the lease belongs to another user",
				"refused: the lease belongs to another user"}},
			{0, ops(user(0, give(1)), user(1001, get(1))), []string{"released 10000", "granted 10000"}},
			{0, ops(get(2), user(1000, get(2))), []string{"granted 10001", "refused: the lease belongs to another user"}},
		}},
		{"a due lease blocks nobody", 1, []step{
			{0, ops(get(1)), []string{"granted 10000"}},
			{timeout - 1, ops(get(2)), []string{"refused: no table is free"}},
			{1, ops(get(2), get(1)), []string{"granted 10000", "refused: no table is free"}},
		}},
		{"renewed in time", 1, []step{
			{0, ops(get(1)), []string{"granted 10000"}},
			{timeout - 1, ops(get(1)), []string{"renewed 10000"}},
			{timeout - 1, ops(get(1), get(2)), []string{"renewed 10000", "refused: no table is free"}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, c.count)))
			for _, s := range c.steps {
				h.now += s.wait
				h.want(s.ops, s.want...)
			}
		})
	}
}

// TestTakeOver: root gets another number while a rule names that of the user, and the same one where it may
// have had the lease before this run of the server.
func TestTakeOver(t *testing.T) {
	user := Sender{PID: 7}
	cfg := config(t, inet(10000, 2))
	named := true
	cfg.Named = func(Family, uint32) bool { return named }
	h := start(t, cfg)
	h.want(ops(Op{Key: key(1), UID: 1000, Sender: user}, get(1)), "granted 10000", "granted 10001")
	h.want(ops(Op{Key: key(1), UID: 1000}, get(1)), "refused: the lease belongs to another user", "renewed 10001")
	h.want(ops(Op{Key: key(2), UID: 1000, Sender: user}, get(2)), "granted 10000", "refused: no table is free")
	named = false
	h.want(ops(get(2), Op{Key: key(2), UID: 1000}), "granted 10000", "refused: the lease belongs to another user")
	h.want(ops(give(2), Op{Key: key(2), UID: 1000, Sender: user}), "released 10000", "granted 10000")
	h.stop()
	named = true
	h.open()
	h.want(ops(get(2), Op{Key: key(2), UID: 1000}), "granted 10000", "refused: the lease belongs to another user")
}

// TestShares: users get what root's share leaves, and each no more than user_tables.
func TestShares(t *testing.T) {
	of := func(uid uint32, n int) Op { return Op{Key: key(n), UID: uid} }
	cfg := config(t, inet(10000, 6))
	cfg.RootTables, cfg.UserTables, cfg.Self = 2, 3, 500
	h := start(t, cfg)
	h.want(ops(of(1000, 1), of(1000, 2), of(1000, 3), of(1000, 4)), "granted 10000", "granted 10001", "granted 10002",
		"refused: no table is free")
	h.want(ops(of(1001, 4), of(1001, 5)), "granted 10003", "refused: no table is free")
	h.want(ops(of(500, 5), of(0, 6), of(0, 7)), "granted 10004", "granted 10005", "refused: no table is free")
	h.stop()
	h.open() // the counts are of the database, too
	h.want(ops(of(1001, 4), of(1001, 8)), "renewed 10003", "refused: no table is free")
	release := of(1000, 1)
	release.Release = true
	h.want(ops(release, of(1001, 8)), "released 10000", "granted 10000")
	h.want(ops(of(0, 2), of(1001, 9)), "granted 10001", "refused: no table is free") // a take-over is root's
	h.now += timeout
	h.want(ops(of(1001, 9), of(1001, 10), of(1001, 11)), "granted 10000", "granted 10001", "granted 10002")
}

// TestSendersThatEnded: such a sender may release what it leased itself, by its pid or its name.
func TestSendersThatEnded(t *testing.T) {
	gone := func(release bool, n int, s Sender) Op {
		return Op{Release: release, Key: key(n), Sender: s, Gone: true}
	}
	h := start(t, config(t, inet(10000, 4)))
	for n := range 3 {
		h.do(Op{Key: key(n), Sender: Sender{PID: int32(n + 1), Name: uint64(n + 1)}})
	}
	h.do(Op{Key: key(3), UID: 1000, Sender: Sender{PID: 9}})
	const refused = "refused: the lease belongs to another user"
	h.want(ops(gone(true, 0, Sender{PID: 2, Name: 2}), gone(false, 0, Sender{PID: 1, Name: 1}), gone(true, 3, Sender{PID: 9})), refused, refused, refused)
	h.want(ops(gone(true, 0, Sender{PID: 1}), gone(true, 1, Sender{PID: 9, Name: 2})), "released 10000", "released 10001")
	h.want(ops(gone(true, 2, Sender{PID: 9})), refused) // neither has a name
	h.want(ops(gone(false, 5, Sender{PID: 9})), refused)
}

func TestResults(t *testing.T) {
	h := start(t, config(t, inet(10000, 2)))
	first := h.decide(Op{Key: key(1), Tag: "one", UID: 1000})
	want := Result{Outcome: Granted, Lease: Lease{key(1), 10000, "one", 1000, h.now + timeout}, Pending: true}
	if got := first[0]; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if err := h.Commit(h.now); err != nil {
		t.Fatal(err)
	}
	h.now += 10
	results := h.decide(
		Op{Key: key(1), Tag: "two", UID: 1000},
		get(2),
		get(2),
		Op{Key: key(2), UID: 1000},
		get(3),
		Op{Release: true, Key: key(1), UID: 1000},
		Op{Release: true, Key: key(1), UID: 1000},
		give(9),
	)
	lease1, lease2 := Lease{key(1), 10000, "two", 1000, h.now + timeout}, Lease{key(2), 10001, "", 0, h.now + timeout}
	for i, want := range []Result{
		{Outcome: Renewed, Lease: lease1},
		{Outcome: Granted, Lease: lease2, Pending: true},
		{Outcome: Renewed, Lease: lease2, Pending: true},
		{Outcome: Refused, Lease: Lease{Key: key(2)}, Err: ErrNotOwner, Pending: true},
		{Outcome: Refused, Lease: Lease{Key: key(3)}, Err: ErrExhausted, Pending: true},
		{Outcome: Released, Lease: lease1, Pending: true},
		{Outcome: NotHeld, Lease: Lease{Key: key(1)}, Pending: true},
		{Outcome: NotHeld, Lease: Lease{Key: key(9)}},
	} {
		if got := results[i]; got != want {
			t.Errorf("%d: got %+v, want %+v", i, got, want)
		}
	}
}

func TestRestart(t *testing.T) {
	for _, c := range []struct {
		name    string
		restart func(*host)
	}{
		{"clean", func(h *host) { h.stop(); h.open() }},
		{"crash", (*host).crash},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, 4)))
			h.do(get(1), get(2), get(3), get(4))
			h.do(give(3))
			h.do(give(2))
			h.now += 3 * timeout // nobody could renew meanwhile
			c.restart(h)
			if got, want := h.Next(), h.now+60; got != want {
				t.Errorf("next %d, want %d", got, want)
			}
			h.now += timeout - 1
			if expired, err := h.Tick(h.now); err != nil || len(expired) > 0 {
				t.Errorf("expired %v, %v", expired, err)
			}
			h.want(ops(get(1), get(5), get(4), get(6)), "renewed 10000", "granted 10002", "renewed 10003", "granted 10001")
		})
	}
}

func TestAnotherBootOrNamespace(t *testing.T) {
	for _, c := range []struct {
		name  string
		epoch Epoch
	}{
		{"boot", Epoch{"another", here.Netns}},
		{"namespace", Epoch{here.Boot, here.Netns + 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t, config(t, inet(10000, 3)))
			h.do(Op{Key: key(1), UID: 1000}, get(2), get(3))
			h.stop()
			h.cfg.Epoch, h.now = c.epoch, 50
			h.open()
			h.wantPool(0, 3, 0)
			wantRows(t, peer(t, h.cfg.Path), "SELECT * FROM leases")
			wantRows(t, peer(t, h.cfg.Path), "SELECT * FROM RtTables")
			h.want(ops(get(3), get(4), get(1)), "granted 10002", "granted 10000", "granted 10001")
		})
	}
}

func TestView(t *testing.T) {
	h := start(t, config(t, map[Family]Pool{Inet: {10000, 9}, Inet6: {10000, 9}, Unspec: {20000, 9}}))
	utc := time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)
	h.utc = func() time.Time { return utc }
	h.do(
		Op{Key: Key{Unspec, "wwan0", "modem"}, UID: 1000},
		Op{Key: Key{Inet6, "eth0", "2001:db8::1"}, Tag: "six"},
		Op{Key: key(1)}, Op{Key: key(2), Tag: "it's two"})
	h.now += 100
	utc = utc.Add(100 * time.Second)
	h.do(get(1), get(3))
	h.flush()
	const text = `SELECT "table", family, ifname, address, tag, owner, expires_at FROM leases`
	want := []string{
		"10000|inet|eth0|192.0.2.1||0|2031-05-06 08:09:49",
		"10001|inet|eth0|192.0.2.2|it's two|0|2031-05-06 08:08:09",
		"10002|inet|eth0|192.0.2.3||0|2031-05-06 08:09:49",
		"10000|inet6|eth0|2001:db8::1|six|0|2031-05-06 08:08:09",
		"20000|unspec|wwan0|modem||1000|2031-05-06 08:08:09",
	}
	db := peer(t, h.cfg.Path)
	wantRows(t, db, text, want...)
	if out, err := exec.LookPath("sqlite3"); err == nil {
		got, err := exec.Command(out, h.cfg.Path, text).CombinedOutput()
		if err != nil || string(got) != strings.Join(want, "\n")+"\n" {
			t.Errorf("sqlite3: %v\n%s", err, got)
		}
	}
	utc = time.Now()
	h.do(get(4))
	var left int
	if err := db.QueryRow("SELECT seconds_left FROM leases WHERE address = '192.0.2.4'").Scan(&left); err != nil || left < timeout-30 || left > timeout {
		t.Errorf("seconds_left %d, %v", left, err)
	}
	mustExec(t, db, "INSERT INTO RtTables (RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag) VALUES (10008, 2, 'eth9', '192.0.2.99', 9999, 'c')")
	if got := len(query(t, db, "SELECT * FROM leases")); got != 6 {
		t.Errorf("%d rows, want the 6 of this boot", got)
	}
}
