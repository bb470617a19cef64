package allocator

import (
	"fmt"
	"slices"
	"testing"
)

func TestFortyOneForForty(t *testing.T) {
	h := start(t, config(t, inet(10000, 40)))
	var all []Op
	for n := range 41 {
		all = append(all, get(n))
	}
	got := h.do(all...)
	for n := range 40 {
		if want := fmt.Sprint("granted ", 10000+n); got[n] != want {
			t.Errorf("request %d: got %q, want %q", n, got[n], want)
		}
	}
	if want := "refused: no table is free"; got[40] != want {
		t.Errorf("got %q, want %q", got[40], want)
	}
	h.wantPool(40, 0, 0)
}

func TestAvoid(t *testing.T) {
	cached, fresh := map[uint32]bool{}, map[uint32]bool{}
	var holders []Key
	cfg := config(t, inet(10000, 3))
	cfg.Avoid = func(table uint32, _, last Key, now bool) bool {
		holders = append(holders, last)
		if now {
			return fresh[table]
		}
		return cached[table]
	}
	h := start(t, cfg)
	cached[10000] = true
	h.want(ops(get(1), get(2), get(3)), "granted 10001", "granted 10002", "granted 10000")

	fresh[10000] = true
	h.do(give(3))
	h.want(ops(get(4)), "refused: no table is free")
	cached[10000], fresh[10000] = false, false
	holders = nil
	h.want(ops(get(4)), "granted 10000")
	if want := []Key{key(3)}; !slices.Equal(holders, want) {
		t.Errorf("last holder %v, want %v", holders, want)
	}

	h.do(give(4))
	h.stop()
	h.cfg.Epoch.Boot = "another"
	h.open()
	holders = nil
	h.want(ops(get(4)), "granted 10000")
	if want := []Key{{}}; !slices.Equal(holders, want) {
		t.Errorf("last holder after a reboot %v, want nobody", holders)
	}
}

func TestAvoidEverywhereEnds(t *testing.T) {
	cfg := config(t, inet(256, 4_000_000_000))
	cfg.Avoid = func(uint32, Key, Key, bool) bool { return true }
	h := start(t, cfg)
	h.want(ops(get(1)), "refused: no table is free")
}

// A database can know tables at the far end of a pool of four billion.
func TestHugePool(t *testing.T) {
	const last = 1<<32 - 1
	h := start(t, config(t, inet(last-1, 2)))
	h.want(ops(get(1), get(2), give(2)), "granted 4294967294", "granted 4294967295", "released 4294967295")
	h.stop()
	h.cfg.Pools = inet(256, 1<<32-256)
	h.open()
	h.want(ops(get(1), get(2), get(3)), "renewed 4294967294", "granted 4294967295", "granted 256")
	h.wantPool(3, 1<<32-256-3, 0)
}

func TestPoolMoves(t *testing.T) {
	h := start(t, config(t, inet(10000, 3)))
	h.do(Op{Key: key(1), UID: 1000}, get(2), get(3))
	h.stop()
	h.cfg.Pools = inet(10002, 2)
	h.open()
	h.wantPool(1, 1, 2)
	h.want(ops(get(1)), "granted 10003")
	h.want(ops(get(2)), "renewed 10001") // exhausted: the old one stays
	h.want(ops(get(3)), "renewed 10002")
	wantRows(t, peer(t, h.cfg.Path), "SELECT RtTable, Owner FROM RtTables ORDER BY 1", "10001|0", "10002|0", "10003|0")
	h.now += timeout
	if expired, err := h.Tick(h.now); err != nil || len(expired) != 3 {
		t.Errorf("expired %v, %v, want three", expired, err)
	}
	h.want(ops(get(2), get(4), get(5)), "granted 10002", "granted 10003", "refused: no table is free")

	h.stop()
	h.cfg.Pools = map[Family]Pool{Inet6: {First: 10000, Count: 3}}
	h.open()
	h.want(ops(get(2), give(4)), "refused: family is not served", "released 10003")
	h.wantPool(0, 0, 1)

	h.stop()
	h.cfg.Pools = inet(10000, 4)
	h.open()
	h.want(ops(get(1), get(2), get(4), get(5)), "granted 10000", "renewed 10002", "granted 10003", "granted 10001")
}

func TestManyFreeTablesAreForgotten(t *testing.T) {
	h := start(t, config(t, inet(10000, 1_000_000)))
	h.pools[Inet].enough = 5
	for n := range 5 {
		h.do(get(n), give(n))
	}
	h.want(ops(get(11), get(12)), "granted 10000", "granted 10005")
	h.do(give(11))
	h.want(ops(get(13), get(14)), "granted 10001", "granted 10006")
}
