package netns

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestConvert: the configuration of RUNNS as one of the service, which reads it, and what is left out.
func TestConvert(t *testing.T) {
	for _, tt := range []struct {
		name, content string
		want          string // the namespaces: name, link, VPN, name servers
		left          []string
	}{
		{name: "none", content: "# nothing\n; nothing\n\n"},
		{name: "one", content: "[work]\nint=wan1\nresolve = /etc/resolv.work\n", want: "work wan1  /etc/resolv.work\n"},
		{name: "any case", content: "[ Work ]\r\nNAME=Office\r\nINT=\"wan1\"\r\nResolve='/etc/r'\r\n", want: "Office wan1  /etc/r\n"},
		{name: "the link by default", content: "[a]\n", want: "a eth0  uplink\n"},
		{name: "several VPNs", content: "[a]\nvpn=/etc/a.conf\nVPN=/etc/b.conf\n", want: "a eth0 /etc/a.conf uplink\na2 eth0 /etc/b.conf uplink\n"},
		{name: "what runs a shell", content: "[a]\nint=$(touch /tmp/x)\nname=`id`\n", left: []string{"no name of a namespace"}},
		{name: "names that attack", content: "[../../x]\n[-h]\n[a\x1b[31m]\n[aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]\n", left: []string{"no name", "no name", "no name", "no name"}},
		{name: "what is left out", content: "x=1\n[a]\nout=vpn0\ncolour=red\nint=w0\nint=w1\nnonsense\n[a]\n", want: "a w0  uplink\n",
			left: []string{"line 1", "line 7", "unknown key", "another int=w1", "chooses names of links", "another namespace a"}},
		{name: "a path that is none", content: "[a]\nvpn=a.conf\n[b]\nresolve=b\n", left: []string{"absolute path", "name servers"}},
	} {
		text, left, err := convert(tt.content)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		var file File
		if err := file.read(strings.NewReader(string(text))); err != nil {
			t.Errorf("%s: the service does not read it: %v\n%s", tt.name, err, text)
		}
		got := ""
		for _, c := range file.Namespaces {
			got += strings.Join([]string{c.Name, c.Ifname, c.VPN, c.Resolv}, " ") + "\n"
			if c.Start != Manual {
				t.Errorf("%s: start %q", tt.name, c.Start)
			}
		}
		// The name servers of a namespace with a VPN are those of the VPN unless the file says more.
		if want := strings.ReplaceAll(tt.want, ".conf uplink", ".conf vpn"); got != want {
			t.Errorf("%s: got %q, want %q", tt.name, got, want)
		}
		all := strings.Join(left, "\n")
		if len(left) != len(tt.left) {
			t.Errorf("%s: left out %q", tt.name, left)
		}
		for _, want := range tt.left {
			if !strings.Contains(all, want) {
				t.Errorf("%s: left out %q, want %q", tt.name, left, want)
			}
		}
	}
}

// TestImportRefuses: a file that others can write is not read.
func TestImportRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "runns.conf")
	if err := os.WriteFile(path, []byte("[a]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Import(path); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Import(path); err == nil || !strings.Contains(err.Error(), "root alone must be able to write it") {
		t.Errorf("a file that others can write: %v", err)
	}
}

// FuzzConvert: whatever the file says, the service reads what it becomes.
func FuzzConvert(f *testing.F) {
	f.Add("[a]\nint=wan1\nvpn=/a\nvpn=/b\n[b]\nname=\"x\"\n")
	f.Fuzz(func(t *testing.T, content string) {
		text, _, err := convert(content)
		if err != nil {
			t.Fatal(err)
		}
		var file File
		if err := file.read(strings.NewReader(string(text))); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
	})
}
