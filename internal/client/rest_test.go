package client

import (
	"reflect"
	"testing"
	"time"
)

func TestRests(t *testing.T) {
	t.Parallel()
	var r rests
	at := time.Hour
	if r.due(at) {
		t.Error("rests before anything was done")
	}
	r.stir(at)
	r.stir(at + time.Second) // more to do does not put it off
	if r.due(at + restIn - 1) {
		t.Error("rests too early")
	}
	if at += restIn; !r.due(at) || r.due(at) {
		t.Error("does not rest once")
	}
	r.stir(at)
	if r.due(at + restEvery - 1) {
		t.Error("rests too often")
	}
	if !r.due(at + restEvery) {
		t.Error("does not rest again")
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
	if in(reflect.ValueOf(&OriginalPriorities).Pointer()) {
		t.Errorf("a variable is in one of %x", areas)
	}
}
