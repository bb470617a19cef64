package client

import (
	"reflect"
	"runtime"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/uplink"
)

func TestRests(t *testing.T) {
	t.Parallel()
	var r rests
	at := time.Hour
	if r.due(at, func() {}) {
		t.Error("rests before anything was done")
	}
	r.stir(at)
	r.stir(at + time.Second) // more to do does not put it off
	if r.due(at+restIn-1, func() {}) {
		t.Error("rests too early")
	}
	if at += restIn; !r.due(at, func() {}) || r.due(at, func() {}) {
		t.Error("does not rest once")
	}
	r.stir(at)
	if r.due(at+restEvery-1, func() {}) {
		t.Error("rests too often")
	}
	if !r.due(at+restEvery, func() {}) {
		t.Error("does not rest again")
	}
}

// What a rest gives back is what nobody refers to any more, at once or a while later.
func TestRestCollects(t *testing.T) {
	const much = 64 << 20
	var junk []byte
	fill := func() {
		done := make(chan bool)
		go func() { // on a stack of its own, which refers to it until it ends
			junk = make([]byte, much)
			for i := 0; i < len(junk); i += 4096 {
				junk[i] = 1
			}
			done <- true
		}()
		<-done
	}
	before := anonymous()
	fill()
	most := anonymous()
	if before == 0 || most < before+much*9/10 {
		t.Fatalf("%d bytes, and %d with %d more", before, most, much)
	}
	var r rests
	rest := func(at time.Duration) {
		t.Helper()
		r.stir(at)
		if !r.due(at+restIn, func() {}) {
			t.Fatal("does not rest")
		}
	}
	at := time.Hour
	junk = nil
	rest(at)
	if r.kept == 0 || anonymous() > most-much/2 {
		t.Errorf("%d bytes at most, %d after a rest, %d kept", most, anonymous(), r.kept)
	}
	kept := r.kept
	at += restEvery
	if rest(at); r.kept != kept {
		t.Errorf("collects again where there is nothing: kept %d, then %d", kept, r.kept)
	}

	// What is needed at one collection, and not at the next.
	fill()
	at += restEvery
	if rest(at); r.kept < much {
		t.Fatalf("%d bytes kept of those that are needed", r.kept)
	}
	runtime.KeepAlive(junk)
	junk = nil
	at += collectAgain
	if rest(at); anonymous() > most-much/2 {
		t.Errorf("%d bytes after they went", anonymous())
	}
}

// The code that runs is in an area of the program, the variables are in none.
func TestProgramAreas(t *testing.T) {
	t.Parallel()
	areas := programAreas()
	in := func(address uintptr) bool {
		for _, a := range areas {
			if a.from <= address && address < a.to {
				return true
			}
		}
		return false
	}
	if !in(reflect.ValueOf(TestProgramAreas).Pointer()) {
		t.Errorf("code is in none of %x", areas)
	}
	if in(reflect.ValueOf(&uplink.OriginalPriorities).Pointer()) {
		t.Errorf("a variable is in one of %x", areas)
	}
}
