package wire

import (
	"bytes"
	"encoding/hex"
	"testing"
)

// What unix_diag of kernel 6.18 says of two sockets, and its end.
const diagnosis = "" +
	"480000001400020000000000da0500000102070086e77b004ac8000000000000170000002f746d702f782e736f636b2e6661756c74730000" +
	"05000600000000000800070000000000a00000001400020000000000da0500000102070085e77b004bc80000000000006f0000000077616e" +
	"302d3139322e302e322e352d3200000000000000000000000000000000000000000000000000000000000000000000000000000000000000" +
	"0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000500060000000000" +
	"0800070000000000140000000300020000000000da05000000000000"

func FuzzUnixDiag(f *testing.F) {
	b, err := hex.DecodeString(diagnosis)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		whole := bytes.Clone(b)
		_, _ = answers(b, func(s socket) bool { // an error is as good
			if len(s.path) > len(b) {
				t.Errorf("a path of %d bytes in %d", len(s.path), len(b))
			}
			return s.inode%16 != 15
		})
		if !bytes.Equal(b, whole) {
			t.Error("the datagram was changed")
		}
	})
}
