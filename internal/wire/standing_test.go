package wire

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
)

func TestStandingOf(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if got := StandingOf(Cred{PID: int32(os.Getpid())}); got != Root {
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
			process := ProcessOf(pid)
			for _, cred := range []Cred{{PID: pid}, {PID: pid, Process: process}} {
				if got := StandingOf(cred); got != tt.want {
					t.Errorf("%+v: got %v, want %v", cred, got, tt.want)
				}
			}
			if other := ProcessOf(int32(os.Getpid())); other != 0 {
				if got := StandingOf(Cred{PID: pid, Process: other}); got != Gone {
					t.Errorf("of a pid that another process has now: got %v, want %v", got, Gone)
				}
			}
			_ = cmd.Process.Kill() // its end is what follows
			_ = cmd.Wait()
			if got := StandingOf(Cred{PID: pid}); got != Gone {
				t.Errorf("after its end: got %v, want %v", got, Gone)
			}
		})
	}
	if got := StandingOf(Cred{}); got != Hidden {
		t.Errorf("a process outside of the pid namespace: got %v, want %v", got, Hidden)
	}
}

// TestStandingOfEnding: a sender that ends while it is looked at has ended. It is not one of which /proc says nothing.
func TestStandingOfEnding(t *testing.T) {
	want := Gone
	if ProcessOf(int32(os.Getpid())) == 0 {
		want = Root // nobody can tell what was read of which process
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	got := standingBy(Cred{PID: int32(cmd.Process.Pid)}, func(int32) (Standing, error) {
		_ = cmd.Process.Kill() // its end is what follows
		_ = cmd.Wait()
		return Root, nil
	})
	if got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestSaidOfAnotherProcess: while /proc is silent, what it said counts for the process that it was said of.
func TestSaidOfAnotherProcess(t *testing.T) {
	pid := int32(os.Getpid())
	s := said[bool]{of: make(map[int32]answerOf[bool])}
	if is, process, _ := s.ask(pid, func(int32) (bool, error) { return true, nil }); is == nil || !*is || process != ProcessOf(pid) {
		t.Fatalf("got %v of %v", is, process)
	}
	release := make(chan struct{})
	defer close(release)
	if _, err := outside.Ask(outside.Proc, time.Nanosecond*100, func() (bool, error) { <-release; return false, nil }); err == nil {
		t.Fatal("/proc answered")
	}
	age := func(process Process) {
		of := s.of[pid]
		of.until, of.process = 0, process
		s.of[pid] = of
	}
	age(ProcessOf(pid))
	if is, _, _ := s.ask(pid, nil); is == nil || !*is {
		t.Errorf("of the process itself: got %v, want true", is)
	}
	if ProcessOf(pid) == 0 {
		return // this kernel does not tell processes of one pid apart
	}
	age(ProcessOf(pid) + 1)
	if is, _, _ := s.ask(pid, nil); is != nil {
		t.Errorf("of another process: got %v, want nothing", *is)
	}
}
