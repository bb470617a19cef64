package main

import (
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzParse: an answer that is none leads to an error, and one that is accepted has two descriptors and namespaces.
func FuzzParse(f *testing.F) {
	two := unix.UnixRights(3, 4)
	f.Add([]byte("ok\nuser:[1]\nmnt:[2]"), two)
	f.Add([]byte("ok"), two)
	f.Add([]byte("ok\nmnt:[2]"), unix.UnixRights(3))
	f.Add([]byte("ok\nmnt:[2]"), two[:len(two)-5])
	f.Add([]byte("ok\nmnt:[2]"), []byte{255, 255, 255, 255, 255, 255, 255, 255})
	f.Add([]byte("there is no namespace of this name"), []byte{})
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, text, control []byte) {
		host, mounts, network, err := parse(text, control)
		if (err == nil) != (len(host) > 0) {
			t.Errorf("%q: host's namespaces %q, descriptors %d and %d, %v", text, host, mounts, network, err)
		}
	})
}
