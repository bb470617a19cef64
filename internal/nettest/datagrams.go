package nettest

import (
	"errors"
	"net"
)

// ServeDatagrams has answer told of each datagram to a UDP address, in the namespace of the calling thread, until the
// test ends. Who gets no answer asks again or reports that, so answer need not look at errors.
func ServeDatagrams(t TB, addr string, answer func(conn net.PacketConn, datagram []byte, from net.Addr)) {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatalf("serve datagrams: %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil { // else an earlier answer met nobody
				answer(conn, buf[:n], from)
			}
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
}
