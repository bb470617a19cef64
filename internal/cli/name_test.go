package cli

import (
	"os"
	"strings"
	"testing"
)

func TestNameProcess(t *testing.T) {
	before, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile("/proc/self/comm", before, 0); err != nil {
			t.Error(err)
		}
	})
	for _, tt := range []struct{ argument, command, want string }{
		{"/usr/sbin/table-allocator-server", "", "ta-server"},
		{"table-allocator-client", "", "ta-client"},
		{"/usr/sbin/table-allocator-client", "watch", "ta-watch"},
		{"/usr/bin/tactl", "watch", "ta-watch"},
		{"tactl", "status", "ta-client"},
		{"/usr/sbin/table_allocator_client", "", "table_allocator"},
		{"table_allocator_server", "", "table_allocator"},
		{"", "", "ta-client"},
	} {
		// Any thread of the process may call it.
		done := make(chan struct{})
		go func() {
			defer close(done)
			NameProcess(tt.argument, tt.command)
		}()
		<-done
		text, err := os.ReadFile("/proc/self/comm")
		if err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSpace(string(text))
		if got != tt.want {
			t.Errorf("%q %q: got %q, want %q", tt.argument, tt.command, got, tt.want)
		}
	}
}
