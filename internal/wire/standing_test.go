package wire

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestStandingOf(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if got := StandingOf(int32(os.Getpid())); got != Root {
		t.Errorf("this process: got %v, want %v", got, Root)
	}
	for _, tt := range []struct {
		command string
		want    Standing
	}{
		{"sleep 60", Root},
		{"unshare --mount --ipc sleep 60", Root},
		{"setpriv --bounding-set -all --inh-caps -all sleep 60", NoRoot},
		{"setpriv --bounding-set -net_admin --inh-caps -net_admin sleep 60", NoRoot},
		{"unshare --user --map-root-user sleep 60", NoRoot},
	} {
		t.Run(tt.command, func(t *testing.T) {
			words := strings.Fields(tt.command)
			cmd := exec.Command(words[0], words[1:]...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			pid := int32(cmd.Process.Pid)
			for comm := ""; comm != "sleep\n"; { // it is root until then
				text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
				if err != nil {
					t.Fatal(err)
				}
				comm = string(text)
			}
			if got := StandingOf(pid); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
			_ = cmd.Process.Kill() // its end is what follows
			_ = cmd.Wait()
			if got := StandingOf(pid); got != Gone {
				t.Errorf("after its end: got %v, want %v", got, Gone)
			}
		})
	}
	if got := StandingOf(0); got != Hidden {
		t.Errorf("a process outside of the pid namespace: got %v, want %v", got, Hidden)
	}
}
