package route

import "testing"

func TestTakesPolicies(t *testing.T) {
	const head = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n"
	for _, tt := range []struct {
		name, sockets string
		want          bool
	}{
		{"the kernel's", head + "0000000000000000 0   0          00000000 0        0        0     2        0        1080\n" +
			"0000000000000000 6   0          00000000 0        0        0     2        0        1585\n", true},
		{"none", head + "0000000000000000 0   6          00000000 0        0        0     2        0        6\n" +
			"0000000000000000 16  0          00000000 0        0        0     2        0        6\n", false},
		{"a program's alone", head + "0000000000000000 6   415        00000001 0        0        0     2        0        1585\n", false},
		{"nothing", "", false},
	} {
		if got := takesPolicies(tt.sockets); got != tt.want {
			t.Errorf("%s: got %t, want %t", tt.name, got, tt.want)
		}
	}
}
