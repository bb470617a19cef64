package allocator

import (
	"fmt"
	"log/slog"
	"testing"
)

func benchmark(b *testing.B, cfg Config) *Allocator {
	a, err := Open(cfg, 1000, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := a.Close(1000); err != nil {
			b.Error(err)
		}
	})
	return a
}

func decide(b *testing.B, a *Allocator, now int64, ops []Op) {
	for i := range ops {
		a.Decide(now, &ops[i])
	}
	if err := a.Commit(now); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkGrant(b *testing.B) {
	for _, size := range []int{1, 8, 64} {
		b.Run(fmt.Sprint("batch=", size), func(b *testing.B) {
			a := benchmark(b, config(b, inet(256, 1<<32-256)))
			batch := make([]Op, size)
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				for i := range batch {
					batch[i] = Op{Key: Key{Inet, "eth0", fmt.Sprint(n*size + i)}}
				}
				decide(b, a, 1000, batch)
			}
		})
	}
}

func BenchmarkRenew(b *testing.B) {
	for _, held := range []int{64, 5000} {
		for _, size := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("held=%d/batch=%d", held, size), func(b *testing.B) {
				a := benchmark(b, config(b, inet(10000, uint64(held))))
				all := make([]Op, held)
				for i := range all {
					all[i] = Op{Key: Key{Inet, "eth0", fmt.Sprint(i)}}
				}
				decide(b, a, 1000, all)
				all = append(all, all...)
				b.ReportAllocs()
				for n := 0; b.Loop(); n++ {
					from := n * size % held
					decide(b, a, 1000+int64(n%60), all[from:from+size])
				}
			})
		}
	}
}

func BenchmarkTick(b *testing.B) {
	a := benchmark(b, config(b, inet(10000, 5000)))
	all := make([]Op, 5000)
	for i := range all {
		all[i] = Op{Key: Key{Inet, "eth0", fmt.Sprint(i)}}
	}
	decide(b, a, 1000, all)
	b.ReportAllocs()
	for n := int64(0); b.Loop(); n++ {
		decide(b, a, 1000+2*n, all)
		if _, err := a.Tick(1000 + 2*n + 1); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen is a restart with as many leases as anybody has.
func BenchmarkOpen(b *testing.B) {
	cfg := config(b, inet(10000, 60_000))
	a, err := Open(cfg, 1000, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	all := make([]Op, 60_000)
	for i := range all {
		all[i] = Op{Key: Key{Inet, "eth0", fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)}}
	}
	decide(b, a, 1000, all)
	for b.Loop() {
		b.StopTimer()
		if err := a.Close(1000); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if a, err = Open(cfg, 1000, slog.New(slog.DiscardHandler)); err != nil {
			b.Fatal(err)
		}
	}
	if err := a.Close(1000); err != nil {
		b.Fatal(err)
	}
}
