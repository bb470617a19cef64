package cgroup

import (
	"slices"
	"strings"
	"testing"
)

func TestCgroupMounts(t *testing.T) {
	const (
		v1      = "35 30 0:31 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n"
		hybrid  = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
		pure    = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
		asked   = "31 23 0:26 / /mnt/my\\040groups rw - cgroup2 none rw\n"
		readme  = "32 23 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
		docker  = "33 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
		foreign = "34 23 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
		proc    = "24 23 0:22 / /proc rw - proc proc rw\n"
	)
	for _, tt := range []struct {
		name, mountinfo string
		want            []Cgroups
	}{
		{"hybrid", proc + v1 + hybrid, []Cgroups{{dir: "/sys/fs/cgroup/unified", below: "/"}}},
		{"pure", proc + pure, []Cgroups{{dir: "/sys/fs/cgroup", below: "/"}}},
		{"v1 only", proc + v1, nil},
		{"none", "", nil},
		{"a place with a blank", asked, []Cgroups{{dir: "/mnt/my groups", below: "/"}}},
		{"read-only", readme + asked, []Cgroups{{dir: "/mnt/my groups", below: "/"}}},
		{"the larger one first", docker + hybrid, []Cgroups{{dir: "/sys/fs/cgroup/unified", below: "/"}, {dir: "/sys/fs/cgroup", below: "/docker/abc"}}},
		{"of a namespace outside", foreign, nil},
		{"damaged", "1 2 3\n - cgroup2 \n\n", nil},
	} {
		got, err := cgroupMounts(strings.NewReader(tt.mountinfo))
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %+v, %v, want %+v", tt.name, got, err, tt.want)
		}
	}
}

func TestParseCgroup(t *testing.T) {
	for _, tt := range []struct {
		name, text, want string
		ok               bool
	}{
		{"pure", "0::/user.slice/user-0.slice/session-1.scope\n", "/user.slice/user-0.slice/session-1.scope", true},
		{"hybrid", "9:name=systemd:/\n1:cpu:/a\n0::/\n", "/", true},
		{"v1 only", "9:name=systemd:/\n1:cpu:/a\n", "", false},
		{"nothing", "", "", false},
		{"a colon in the path", "0::/a:b/0::/\n", "/a:b/0::/", true},
		{"removed", "0::/a/ta-wan0 (deleted)\n", "/a/ta-wan0", true},
	} {
		if got, ok := parseCgroup(tt.text); got != tt.want || ok != tt.ok {
			t.Errorf("%s: got %q, %v, want %q, %v", tt.name, got, ok, tt.want, tt.ok)
		}
	}
}

func TestCutPath(t *testing.T) {
	for _, tt := range []struct {
		path, dir, want string
		ok              bool
	}{
		{"/a/b", "/", "/a/b", true},
		{"/", "/", "/", true},
		{"/a/b", "/a", "/b", true},
		{"/a", "/a", "/", true},
		{"/ab", "/a", "", false},
		{"/", "/a", "", false},
	} {
		if got, ok := cutPath(tt.path, tt.dir); ok != tt.ok || ok && got != tt.want {
			t.Errorf("%s in %s: got %q, %v, want %q, %v", tt.path, tt.dir, got, ok, tt.want, tt.ok)
		}
	}
}

func TestPlaces(t *testing.T) {
	wan0, wan1 := Uplink{Ifname: "wan0"}, Uplink{Ifname: "wan1"}
	soft := Uplink{Ifname: "wan0", Fallback: true}
	for _, tt := range []struct {
		cgroup  string
		uplink  Uplink
		child   string
		outside string
	}{
		{"/", wan0, "/ta-wan0", "/"},
		{"/", soft, "/ta-wan0:fallback", "/"},
		{"/system.slice/a.service", wan0, "/system.slice/a.service/ta-wan0", "/system.slice/a.service"},
		{"/a/ta-wan0", wan0, "/a/ta-wan0", "/a"},
		{"/a/ta-wan0", soft, "/a/ta-wan0:fallback", "/a"},
		{"/a/ta-wan0", wan1, "/a/ta-wan1", "/a"},
		{"/a/ta-wan0/ta-wan1", wan0, "/a/ta-wan0", "/a"},
		{"/a/ta-wan0/b", wan1, "/a/ta-wan0/b/ta-wan1", "/a/ta-wan0/b"},
		{"/table-allocator/wan0", wan0, "/table-allocator/wan0", "/"},
		{"/table-allocator/wan0", wan1, "/table-allocator/wan0/ta-wan1", "/"},
		{"/table-allocator/wan0/ta-wan1", wan1, "/table-allocator/wan0/ta-wan1", "/"},
		{"/table-allocators/wan0", wan0, "/table-allocators/wan0/ta-wan0", "/table-allocators/wan0"},
	} {
		if got := childOf(tt.cgroup, tt.uplink); got != tt.child {
			t.Errorf("%s bound to %s: got %s, want %s", tt.cgroup, tt.uplink, got, tt.child)
		}
		if got := outside(tt.cgroup); got != tt.outside {
			t.Errorf("%s without us: got %s, want %s", tt.cgroup, got, tt.outside)
		}
	}
	for name, want := range map[string]bool{
		"wan0": true, "wan0:fallback": true, "a.b-c_d": true, "enp0s31f6": true, "123456789012345": true,
		"": false, ".": false, "..": false, ":fallback": false, "wan0:": false, "a/b": false, "a b": false,
		"1234567890123456": false, "wan0:fallback:fallback": false,
	} {
		if u, ok := parseUplink(name); ok != want || ok && u.String() != name {
			t.Errorf("name %q: got %+v, %v, want %v", name, u, ok, want)
		}
	}
}
