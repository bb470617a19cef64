package cgroup

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkInstall is what the first `run` in a cgroup pays, and each later one.
func BenchmarkInstall(b *testing.B) {
	c, err := Open()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.place(-1, "/ta-bench", testMark); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := os.Remove(c.file("/ta-bench")); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	b.Run("again", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.place(-1, "/ta-bench", testMark); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.Remove(c.file("/ta-bench")); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkConnect is what a program pays for being bound, beside one that is not. Nobody answers;
// datagrams without a connection end on the loopback.
func BenchmarkConnect(b *testing.B) {
	c, err := Open()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	if _, err := c.place(-1, "/ta-bench", testMark); err != nil {
		b.Fatal(err)
	}
	defer os.Remove(c.file("/ta-bench"))
	if err := os.Mkdir(c.file("/plain"), 0o755); err != nil {
		b.Fatal(err)
	}
	defer os.Remove(c.file("/plain"))
	for _, where := range []string{"/plain", "/ta-bench"} {
		if err := move(0, c.file(where)); err != nil {
			b.Fatal(err)
		}
		for _, family := range []struct {
			name string
			of   int
			to   unix.Sockaddr
		}{
			{"IPv4", unix.AF_INET, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}},
			{"IPv6", unix.AF_INET6, &unix.SockaddrInet6{Port: 9, Addr: [16]byte{15: 1}}},
		} {
			b.Run("connect/"+family.name+where, func(b *testing.B) {
				fd, err := unix.Socket(family.of, unix.SOCK_DGRAM, 0)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Close(fd)
				for b.Loop() {
					if err := unix.Connect(fd, family.to); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("sendto/"+family.name+where, func(b *testing.B) {
				fd, err := unix.Socket(family.of, unix.SOCK_DGRAM, 0)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Close(fd)
				for b.Loop() {
					if err := unix.Sendto(fd, []byte("?"), 0, family.to); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("socket/"+family.name+where, func(b *testing.B) {
				for b.Loop() {
					fd, err := unix.Socket(family.of, unix.SOCK_STREAM, 0)
					if err != nil {
						b.Fatal(err)
					}
					unix.Close(fd)
				}
			})
		}
	}
	if err := move(0, c.file("/")); err != nil {
		b.Fatal(err)
	}
}
