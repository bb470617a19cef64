package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const wgKeyText = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

// TestParseWireGuard: a configuration for wg-quick in the words of wireguard-go's socket, and what is no such configuration.
func TestParseWireGuard(t *testing.T) {
	good := "[Interface]\nAddress = 10.0.0.2/24, fd00::2\nlistenport=51820\nPrivateKey=" + wgKeyText + "\nDNS=10.0.0.1, example.org\nMTU=1400\nPostUp=rm -rf /\nTable=off\n" +
		"[Peer] \nPublicKey=" + wgKeyText + " # who\nAllowedIPs=0.0.0.0/0,::/0,10.1.2.3/8\nEndpoint=vpn.example:51820\nPersistentKeepalive=25\n"
	w, err := parseWireGuard(good)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(w.tunnel), "{[10.0.0.2/24 fd00::2/128] 1400 [10.0.0.1] }"; got != want {
		t.Errorf("tunnel %s, want %s", got, want)
	}
	digits := "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	want := "set=1\nprivate_key=" + digits + "\nlisten_port=51820\nreplace_peers=true\npublic_key=" + digits +
		"\nendpoint=192.0.2.1:51820\nallowed_ip=0.0.0.0/0\nallowed_ip=::/0\nallowed_ip=10.0.0.0/8\npersistent_keepalive_interval=25\n\n"
	if got := w.request([]string{"192.0.2.1:51820"}, false); got != want {
		t.Errorf("request\n%s\nwant\n%s", got, want)
	}
	if got, want := w.request([]string{"192.0.2.1:51820"}, true), "set=1\npublic_key="+digits+"\nupdate_only=true\nendpoint=192.0.2.1:51820\n\n"; got != want {
		t.Errorf("request of the endpoint\n%s\nwant\n%s", got, want)
	}
	if strings.Join(w.left, " ") != "postup table" {
		t.Errorf("left out: %q", w.left)
	}
	for name, text := range map[string]string{
		"nothing": "", "no address": "[Interface]\nPrivateKey=" + wgKeyText, "no key": "[Interface]\nAddress=10.0.0.1", "a short key": "[Interface]\nPrivateKey=AAAA\nAddress=10.0.0.1",
		"a peer without a key": strings.Replace(good, "PublicKey", "# PublicKey", 1), "no endpoint": strings.Replace(good, "vpn.example:51820", "vpn.example", 1),
		"a key of nobody": good + "Colour=red\n", "a large MTU": strings.Replace(good, "1400", "140000", 1), "a line within a value": strings.Replace(good, "51820\nPr", "51820\rx\nPr", 1),
	} {
		if w, err := parseWireGuard(text); err == nil {
			t.Errorf("%s: %+v", name, w)
		}
	}
}

// FuzzParseWireGuard: whatever a configuration says, it tells the socket no line of its own.
func FuzzParseWireGuard(f *testing.F) {
	f.Add("[Interface]\nAddress = 10.0.0.2/24\nPrivateKey=" + wgKeyText + "\n[Peer]\nPublicKey=" + wgKeyText + "\nEndpoint=192.0.2.1:1\nAllowedIPs=::/0\n")
	f.Fuzz(func(t *testing.T, text string) {
		w, err := parseWireGuard(text)
		if err != nil {
			return
		}
		endpoints := make([]string, len(w.peers)) // addresses, which the caller has looked up
		for line := range strings.Lines(w.request(endpoints, false)) {
			key, _, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
			if !strings.Contains(" set private_key listen_port replace_peers public_key preshared_key allowed_ip persistent_keepalive_interval  ", " "+key+" ") {
				t.Errorf("%q becomes %q", text, line)
			}
		}
	})
}

// TestTunnelOf: what OpenVPN tells its script.
func TestTunnelOf(t *testing.T) {
	for _, tt := range []struct {
		name        string
		environment map[string]string
		want, err   string
	}{
		{"subnet", map[string]string{"ifconfig_local": "10.8.0.2", "ifconfig_netmask": "255.255.255.0", "tun_mtu": "1500", "foreign_option_1": "dhcp-option DNS 10.8.0.1",
			"foreign_option_2": "dhcp-option DOMAIN example.org", "foreign_option_3": "dhcp-option DNS6 fd00::53"}, "{[10.8.0.2/24] 1500 [10.8.0.1 fd00::53] }", ""},
		{"peer to peer", map[string]string{"ifconfig_local": "10.8.0.6", "ifconfig_remote": "10.8.0.5"}, "{[10.8.0.6/32] 0 [] }", ""},
		{"IPv6 alone", map[string]string{"ifconfig_ipv6_local": "fd97::1000", "ifconfig_ipv6_netbits": "64"}, "{[fd97::1000/64] 0 [] }", ""},
		{"a server that is no address", map[string]string{"ifconfig_local": "10.8.0.6", "foreign_option_1": "dhcp-option DNS $(id)"}, "{[10.8.0.6/32] 0 [] }", ""},
		{"nothing", nil, "", "names no address"},
		{"no address", map[string]string{"ifconfig_local": "x"}, "", "ifconfig_local"},
	} {
		got, err := tunnelOf(func(key string) string { return tt.environment[key] })
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) || tt.err == "" && (err != nil || fmt.Sprint(got) != tt.want) {
			t.Errorf("%s: got %v, %v", tt.name, got, err)
		}
	}
}

// TestVPNCommand: OpenVPN gets the file that was checked, and not a link to it, and stays the process that was started.
func TestVPNCommand(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "work.conf"), filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, text, err string }{
		{"a client", "client\n# daemon\nremote vpn.example 1194\nverb 3 daemon\n", ""},
		{"daemon", "client\n  daemon work\n", `line 2: "daemon"`},
		{"in quotes", "\"daemon\"\n", `line 1: "daemon"`},
		{"as an argument", "--inetd nowait", `line 1: "inetd"`},
	} {
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		args, err := new(Host).vpnCommand(State{Config: Config{Name: "work", VPN: link}, Number: 1})
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %q, %v", tt.name, args, err)
			}
			continue
		}
		if text := strings.Join(args, " "); err != nil || !strings.Contains(text, "--cd "+dir+" --config "+file+" ") {
			t.Errorf("%s: %q, %v", tt.name, args, err)
		}
	}
}
