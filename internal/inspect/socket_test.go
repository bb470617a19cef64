package inspect

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
)

// TestConnectInUse: that another socket has the port is no matter of who asks.
func TestConnectInUse(t *testing.T) {
	other, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	at := netip.MustParseAddrPort(other.LocalAddr().String())
	_, err = connect(route.Question{Src: at.Addr(), Dst: at.Addr(), Sport: at.Port(), UID: uint32(os.Geteuid())})
	if !errors.Is(err, errCannotAsk) || err.Error() != "another socket has this source port" {
		t.Errorf("%v, want that the port is in use", err)
	}
}
