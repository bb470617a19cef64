package client

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/table-allocator/table-allocator/internal/remember"
)

func TestMemory(t *testing.T) {
	m := remember.Dir(filepath.Join(t.TempDir(), "4026531840"))
	if err := os.Mkdir(string(m), 0o700); err != nil {
		t.Fatal(err)
	}
	key := cable().Key.String()
	read := func(m remember.Dir) (got remembered, err error) {
		err = m.Read(key, &got)
		return got, err
	}
	if _, err := read(m); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing was told: %v", err)
	}
	want := remembered{Link: 7, Created: 1234, Tag: "dhclient", Settings: `{"routes":"copy"}`, Profile: "{}"}
	put := func(text string, mode fs.FileMode) {
		t.Helper()
		if err := errors.Join(os.RemoveAll(m.Path(key)), os.WriteFile(m.Path(key), []byte(text), mode), os.Chmod(m.Path(key), mode)); err != nil {
			t.Fatal(err)
		}
	}
	const text = `{"link":7,"created":1234,"tag":"dhclient","settings":"{\"routes\":\"copy\"}","profile":"{}"}`
	put(text, 0o600)
	if got, err := read(m); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for name, text := range map[string]string{
		"empty":       "",
		"cut":         text[:40],
		"unknown key": strings.Replace(text, "link", "lnk", 1),
		"wrong type":  strings.Replace(text, "7", `"7"`, 1),
		"too long":    strings.Replace(text, "dhclient", strings.Repeat("x", remember.MaxFile), 1),
	} {
		put(text, 0o600)
		if _, err := read(m); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	put(text, 0o622)
	if _, err := read(m); err == nil {
		t.Error("read what others may write to")
	}
	// No link is followed, and a pipe is not waited for.
	put(text, 0o600)
	if err := errors.Join(os.Rename(m.Path(key), m.Path(key)+"2"), os.Symlink(m.Path(key)+"2", m.Path(key))); err != nil {
		t.Fatal(err)
	}
	if _, err := read(m); err == nil {
		t.Error("followed a link")
	}

	if err := m.Remove(key); err != nil {
		t.Error(err)
	}
	if err := m.Remove(key); err != nil {
		t.Errorf("nothing is there: %v", err)
	}
	put(text, 0o600)
	if err := os.WriteFile(m.Path(".temp"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stale, err := staleNames(m, []string{key, "wan9-10.9.9.9-2"}, time.Now())
	if want := []string{key + "2"}; err != nil || !slices.Equal(stale, want) {
		t.Errorf("stale: got %q, %v, want %q", stale, err, want)
	}
	if stale, err := staleNames(m, nil, time.Now().Add(time.Hour)); err != nil || len(stale) != 3 {
		t.Errorf("of nobody, an hour later: got %q, %v", stale, err)
	}
	none := remember.Dir("")
	if _, err := read(none); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
	if err := errors.Join(none.Remove(key)); err != nil {
		t.Errorf("without a directory: %v", err)
	}
	if err := none.Write(key, want); err == nil {
		t.Error("written into no directory")
	}
}
