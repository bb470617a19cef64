package client

import (
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// A client does nothing for half an hour at a time, and a host may have many clients. So, two seconds after it did
// something, a client returns the memory which that took: unused heap, and the pages of the program itself, which the
// page cache keeps.
const (
	restIn    = 2 * time.Second
	restEvery = 10 * time.Second // at most, while there is always something to do

	// A client needs 1 MiB, and a collection makes Go keep a fifth of that for its own notes. So a client collects
	// only if it has collectFrom, and either collectAfter more than after the last collection or none for
	// collectAgain. More is a quarter of a large heap, whose collection costs more.
	collectFrom  = 3 << 19
	collectAfter = 1 << 19
	collectAgain = time.Minute
)

// rests is when a loop returns memory.
type rests struct {
	at, last  time.Duration
	collected time.Duration // the last time
	kept      uint64        // memory after it
	added     int           // sessions since the last rest
}

// A heap that may grow by a third only is collected after each few addresses of a thousand that come at once, which
// took a third of the time. So it may grow more while very many come, until the next rest.
const (
	gcPercent      = 30 // how much the heap may grow: a thousand addresses take 4 MiB
	gcPercentGrows = 150
	manySessions   = 100
)

// grow notes that a session was added.
func (r *rests) grow() {
	if r.added++; r.added == manySessions {
		debug.SetGCPercent(gcPercentGrows)
	}
}

// stir notes that something was done.
func (r *rests) stir(now time.Duration) {
	if r.at == 0 {
		r.at = now + restIn
		if r.last != 0 {
			r.at = max(r.at, r.last+restEvery)
		}
	}
}

// due reports whether the time has come, and returns memory then, also what forget gives up.
func (r *rests) due(now time.Duration, forget func()) bool {
	if r.at == 0 || now < r.at {
		return false
	}
	r.at, r.last = 0, now
	if r.added >= manySessions {
		debug.SetGCPercent(gcPercent)
	}
	r.added = 0
	forget()
	program := programAreas()
	if have := anonymous(); have >= collectFrom && (have >= r.kept+max(collectAfter, r.kept/4) || now >= r.collected+collectAgain) {
		debug.FreeOSMemory()
		r.collected, r.kept = now, anonymous()
	}
	for _, a := range program { // a failure costs memory only
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, a.from, a.to-a.from, unix.MADV_DONTNEED)
	}
	return true
}

// anonymous is how much memory the process has that no file backs, in bytes; 0 if the kernel
// does not tell.
func anonymous() uint64 {
	text, err := outside.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), "\nAnonymous:")
	rest, _, _ = strings.Cut(rest, " kB\n")
	kilobytes, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 64)
	if err != nil {
		return 0
	}
	return kilobytes << 10
}

type area struct{ from, to uintptr }

// programAreas are where the program's file is mapped and not written to: pages that are
// dropped there come back from the page cache when they are needed.
func programAreas() []area {
	maps, err := outside.ReadFile("/proc/self/maps")
	if err != nil {
		return nil
	}
	path, err := outside.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	var areas []area
	for line := range strings.Lines(string(maps)) {
		if a, ok := areaOf(line, path); ok {
			areas = append(areas, a)
		}
	}
	return areas
}

// areaOf reads a line of /proc/self/maps: from-to, rights, offset, device, inode, and the path behind spaces.
func areaOf(line, path string) (area, bool) {
	f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 6)
	if len(f) < 6 || strings.TrimLeft(f[5], " ") != path || !strings.HasPrefix(f[1], "r-") || !strings.HasSuffix(f[1], "p") {
		return area{}, false
	}
	first, last, _ := strings.Cut(f[0], "-")
	from, err := strconv.ParseUint(first, 16, 64)
	to, err2 := strconv.ParseUint(last, 16, 64)
	return area{uintptr(from), uintptr(to)}, err == nil && err2 == nil
}
