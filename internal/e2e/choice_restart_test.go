package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestChoiceRestart: a stop takes the route out of main, also before a restart, since a watch cannot tell. The next watch
// makes no other choice: the rule says which one stood, and the route is back before anything is asked.
func TestChoiceRestart(t *testing.T) {
	t.Parallel()
	eachMode(t, func(t *testing.T, links string) {
		c := newChooser(t, links)
		c.waitUsed("wan0")
		c.fault(0, noInternet)
		c.waitUnbound(1)
		c.waitState("wan0", "inet", "dead")
		c.waitState("wan0", "inet6", "dead")
		rules := c.choiceRules()
		if code := c.watch.stop(); code != 0 || c.mainRoutes() != "" || c.choiceRules() != rules {
			t.Errorf("exit code %d, main has %q, the rules are %q, want %q", code, c.mainRoutes(), c.choiceRules(), rules)
		}
		c.fault(1, noInternet) // nobody answers the next watch
		c.watch = c.uplinks.watch("--config", c.watchFile(chooserConfig(links)))
		eventually(t, "the next watch leads unbound traffic where the last one did", func() error {
			if at := c.used(); at != "inet wan1, inet6 wan1" || links == copyLinks && strings.Count(c.mainRoutes(), "dev wan1") != 2 {
				return fmt.Errorf("%s, main has %q", at, c.mainRoutes())
			}
			return nil
		})
		c.mend(1)
		c.waitUnbound(1)
		if n := c.switches(); n != 0 {
			t.Errorf("the next watch has made %d choices", n)
		}
		c.wantOwnOnly()
	})
}

// TestChoiceWakes: a watch without probes is not woken for them: in the time in which it probed it wakes a few times, to compare
// everything.
func TestChoiceWakes(t *testing.T) {
	c := newChooser(t, copyLinks)
	c.waitUsed("wan0")
	began, before := time.Now(), wakes(t, c.watch)
	c.waitAsked("wan0", 10)
	probing, took := wakes(t, c.watch)-before, time.Since(began)
	c.watchFile(`{"links": [` + copyLinks + `]}`)
	if err := c.watch.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is chosen any more", func() error {
		if routes := c.mainRoutes() + c.choiceRules(); routes != "" || c.report().Probing {
			return errors.New(routes)
		}
		return nil
	})
	eventually(t, "a watch without probes sleeps", func() error { // what it compares after the signal, or once a minute, wakes it, too
		before := wakes(t, c.watch)
		<-time.After(took / 4)
		n := wakes(t, c.watch) - before
		t.Logf("a watch woke %d times without probes in a quarter of the time in which it woke %d times with them", n, probing)
		if 8*n > probing {
			return errors.New("it is awake as often as with probes")
		}
		return nil
	})
}

// wakes is how often the threads of a process waited, and so were woken.
func wakes(t *testing.T, p *process) (total int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %v", p.cmd.Process.Pid, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) { // a thread that ended meanwhile
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(text), "\nvoluntary_ctxt_switches:")
		n := 0
		if _, err := fmt.Sscan(rest, &n); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		total += n
	}
	return total
}
