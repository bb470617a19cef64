package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// programIDs are the programs of ours in a cgroup, at each hook.
func programIDs(t *testing.T, dir string) (ids []ebpf.ProgramID) {
	t.Helper()
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, h := range testHooks(t, testMark) {
		have, err := attached(int(file.Fd()), h.spec.AttachType, h.spec.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range have {
			id, _ := p.info.ID() // any kernel that tests run on has it
			ids = append(ids, id)
		}
		have.close()
	}
	return ids
}

func TestInstallTwice(t *testing.T) {
	c := testCgroups(t)
	place := func(m Mark) []ebpf.ProgramID {
		t.Helper()
		missing, err := c.place(-1, "/ta-wan0", m)
		if err != nil || missing != nil {
			t.Fatal(missing, err)
		}
		return programIDs(t, c.file("/ta-wan0"))
	}
	first := place(testMark)
	all := len(testHooks(t, testMark))
	if len(first) != all {
		t.Errorf("programs: %d, want %d", first, all)
	}
	if again := place(testMark); !slices.Equal(first, again) {
		t.Errorf("the same again: got programs %d, want %d", again, first)
	}
	// For another mark they are replaced. One that came twice goes.
	second := place(otherMark)
	if len(second) != all || slices.ContainsFunc(first, func(id ebpf.ProgramID) bool { return slices.Contains(second, id) }) {
		t.Errorf("another mark: got programs %d, before %d", second, first)
	}
	startIn(t, c.file("/ta-wan0")).want("0x6000000", "a socket tcp4")
	for _, m := range []Mark{otherMark, testMark} {
		file, err := os.Open(c.file("/ta-wan0"))
		if err != nil {
			t.Fatal(err)
		}
		double := testHooks(t, otherMark)[0]
		program, err := load(&double.spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := attachTwice(file, program, &double); err != nil {
			t.Fatal(err)
		}
		program.Close()
		file.Close()
		if ids := programIDs(t, c.file("/ta-wan0")); len(ids) != all+1 {
			t.Fatalf("programs: %d, want %d", ids, all+1)
		}
		if ids := place(m); len(ids) != all {
			t.Errorf("programs after one too many: %d, want %d", ids, all)
		}
	}
}

func TestMissing(t *testing.T) {
	c := testCgroups(t)
	refused := func(at int) []hook {
		all := testHooks(t, testMark)
		all[at].spec.Instructions = asm.Instructions{asm.Mov.Imm(asm.R0, 7), asm.Return()} // only 0 and 1 are answers
		all[at].spec.Instructions[0].Constant = 7
		return all
	}
	all := testHooks(t, testMark)
	for at := range all {
		dir := c.file("/ta-wan" + strconv.Itoa(at))
		missing, err := c.placeOnce(-1, dir, refused(at), nil)
		if needed := all[at].needed; needed != nil {
			if !errors.Is(err, needed) {
				t.Errorf("without %s: got %v, want %v", all[at].spec.Name, err, needed)
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the cgroup is left: %v", err)
			}
			continue
		}
		if err != nil || len(missing) != 1 || missing[0].Program != all[at].spec.Name || missing[0].Lost == "" || missing[0].Err == nil {
			t.Errorf("without %s: got %+v, %v", all[at].spec.Name, missing, err)
		}
		if ids := programIDs(t, dir); len(ids) != len(all)-1 {
			t.Errorf("without %s: %d programs", all[at].spec.Name, len(ids))
		}
		startIn(t, dir).want("0x2000000", "a socket tcp4")
		// It was told when the cgroup was made.
		if missing, err := c.placeOnce(-1, dir, refused(at), nil); err != nil || missing != nil {
			t.Errorf("without %s, again: got %+v, %v", all[at].spec.Name, missing, err)
		}
	}
}

func TestPin(t *testing.T) {
	c := testCgroups(t)
	soft := Uplink{Ifname: "wan0", Fallback: true}
	for _, m := range []Mark{otherMark, testMark} { // the second takes the place of the first
		for _, u := range []Uplink{wan0, soft} {
			values, missing, err := Pin(u, m)
			if err != nil || len(missing) != 0 || len(values) != len(testHooks(t, m)) {
				t.Fatal(values, missing, err)
			}
			if want := "sock_create:/sys/fs/bpf/table-allocator/" + u.String() + "/sock_create"; values[0] != want {
				t.Errorf("got %q, want %q", values[0], want)
			}
		}
	}
	if got, err := Pinned(); err != nil || !slices.Equal(got, []Uplink{wan0, soft}) {
		t.Errorf("pinned: %v, %v", got, err)
	}

	// What systemd does with it, and what detach then has to say.
	if err := os.Mkdir(c.file("/some.service"), 0o755); err != nil {
		t.Fatal(err)
	}
	unit, err := os.Open(c.file("/some.service"))
	if err != nil {
		t.Fatal(err)
	}
	defer unit.Close()
	for at, name := range pinNames {
		program, err := ebpf.LoadPinnedProgram(filepath.Join(PinRoot, "wan0", name), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := attachTwice(unit, program, &hook{spec: ebpf.ProgramSpec{AttachType: at}}); err != nil {
			t.Fatal(err)
		}
		program.Close()
	}
	if err := errors.Join(Unpin(wan0), Unpin(soft), Unpin(wan0)); err != nil {
		t.Error(err)
	}
	if got, err := Pinned(); err != nil || len(got) != 0 {
		t.Errorf("pinned: %v, %v", got, err)
	}
	p := startIn(t, c.file("/some.service"))
	p.want("0x2000000", "a socket tcp4")
	bound, err := c.Bound()
	if err != nil || len(bound) != 1 || bound[0].Uplink != (Uplink{}) || bound[0].Mark != testMark || !slices.Equal(bound[0].PIDs, []int{p.cmd.Process.Pid}) {
		t.Errorf("bound: %+v, %v", bound, err)
	}
	if _, err := c.Detach(p.cmd.Process.Pid); err == nil || !strings.Contains(err.Error(), "BPFProgram=") {
		t.Errorf("detach from a unit that is bound: %v", err)
	}
}

// TestReplace: while programs are replaced, again and again, by those for another mark and of other code, each new socket has a
// mark, and nothing leaves that the lock does not allow.
func TestReplace(t *testing.T) {
	c := testCgroups(t)
	addresses(t)
	first, second := Mark{0x14000000, 0xff000000}, Mark{0x16000000, 0xff000000}
	syncLock(t, first.Value, 0) // closed for both
	syncLock(t, second.Value, 0)
	place := func(m Mark) {
		t.Helper()
		if _, err := c.place(-1, "/ta-wan0", m); err != nil {
			t.Fatal(err)
		}
	}
	place(first)
	p := startIn(t, c.file("/ta-wan0"))
	stop, ended := make(chan struct{}), make(chan struct{})
	rounds := 0
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if mark := p.do("s socket udp4"); mark != "0x14000000" && mark != "0x16000000" {
				t.Errorf("a new socket: %s", mark)
			}
			if sent := p.do("s send 192.0.2.9:9"); sent != refused {
				t.Errorf("it sends: %s", sent)
			}
			p.do("s close")
			rounds++
		}
	}()
	for range 10 {
		place(second)
		installOlder(t, c.file("/ta-wan0"), second)
		place(first)
	}
	close(stop)
	<-ended
	t.Logf("%d sockets", rounds)
}

// installOlder replaces the programs in a cgroup by such as another version has: with the same names, and other code.
func installOlder(t *testing.T, dir string, m Mark) {
	t.Helper()
	older := testHooks(t, m)
	for i := range older {
		code := join(asm.Instructions{asm.Mov.Imm(asm.R0, 0)}, older[i].spec.Instructions)
		h := program(older[i].spec.Name, older[i].spec.Type, older[i].spec.AttachType, code, older[i].needed, "")
		h.lock = older[i].lock
		older[i] = h
	}
	open, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if missing, err := install(open, older); err != nil || missing != nil {
		t.Fatal(missing, err)
	}
}
