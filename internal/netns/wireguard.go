package netns

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// A wireGuard is a configuration for wg-quick, in the words of the socket of wireguard-go.
type wireGuard struct {
	tunnel tunnel
	device []string // lines for the link
	peers  []wgPeer
	left   []string // keys that are not used
}

type wgPeer struct {
	key      string // in hexadecimal digits
	endpoint string // HOST:PORT, "": it comes to us
	lines    []string
}

// parseWireGuard reads a configuration for wg-quick. Commands and tables in it are left out.
func parseWireGuard(text string) (w wireGuard, err error) {
	section := ""
	number := 0
	for line := range strings.Lines(text) {
		number++
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if strings.HasPrefix(line, "[") {
			if section = strings.ToLower(line); section == "[peer]" {
				w.peers = append(w.peers, wgPeer{})
			}
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		key, value = strings.ToLower(strings.TrimSpace(key)), strings.TrimSpace(value)
		if section == "[peer]" {
			err = w.peers[len(w.peers)-1].set(key, value)
		} else {
			err = w.set(key, value)
		}
		if err != nil {
			return w, fmt.Errorf("line %d: %w", number, err)
		}
	}
	if len(w.device) == 0 || len(w.tunnel.Addresses) == 0 {
		return w, errors.New("want an [Interface] with PrivateKey and Address")
	}
	for _, p := range w.peers {
		if p.key == "" {
			return w, errors.New("a [Peer] has no PublicKey")
		}
	}
	return w, nil
}

func (w *wireGuard) set(key, value string) error {
	switch key {
	case "privatekey":
		digits, err := wgKey(value)
		w.device = append([]string{"private_key=" + digits}, w.device...)
		return err
	case "listenport":
		port, err := strconv.ParseUint(value, 10, 16)
		w.device = append(w.device, fmt.Sprint("listen_port=", port))
		return err
	case "mtu":
		mtu, err := strconv.ParseUint(value, 10, 16)
		w.tunnel.MTU = int(mtu)
		return err
	case "address":
		for word := range strings.SplitSeq(value, ",") {
			prefix, err := prefixOf(strings.TrimSpace(word))
			if err != nil {
				return err
			}
			w.tunnel.Addresses = append(w.tunnel.Addresses, prefix)
		}
	case "dns":
		for word := range strings.SplitSeq(value, ",") {
			if server, err := netip.ParseAddr(strings.TrimSpace(word)); err == nil { // others are domains to search
				w.tunnel.Servers = append(w.tunnel.Servers, server)
			}
		}
	default:
		w.left = append(w.left, key)
	}
	return nil
}

func (p *wgPeer) set(key, value string) error {
	switch key {
	case "publickey":
		digits, err := wgKey(value)
		p.key = digits
		return err
	case "presharedkey":
		digits, err := wgKey(value)
		p.lines = append(p.lines, "preshared_key="+digits)
		return err
	case "endpoint":
		p.endpoint = value
		_, _, err := net.SplitHostPort(value)
		return err
	case "persistentkeepalive":
		seconds, err := strconv.ParseUint(value, 10, 16)
		if value == "off" {
			err = nil
		}
		p.lines = append(p.lines, fmt.Sprint("persistent_keepalive_interval=", seconds))
		return err
	case "allowedips":
		for word := range strings.SplitSeq(value, ",") {
			prefix, err := prefixOf(strings.TrimSpace(word))
			if err != nil {
				return err
			}
			p.lines = append(p.lines, "allowed_ip="+prefix.Masked().String())
		}
		return nil
	}
	return fmt.Errorf("unknown key %q of a [Peer]", key)
}

func prefixOf(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	return netip.ParsePrefix(text)
}

func wgKey(text string) (digits string, err error) {
	const size = 32
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(key) != size {
		return "", errors.New("want a key of WireGuard")
	}
	return hex.EncodeToString(key), nil
}

// request is what the socket of wireguard-go is told. again has it set the endpoints of known peers alone, which makes it
// forget by which address it sent.
func (w wireGuard) request(endpoints []string, again bool) string {
	lines := []string{"set=1"}
	if !again {
		lines = append(append(lines, w.device...), "replace_peers=true")
	}
	for i, p := range w.peers {
		lines = append(lines, "public_key="+p.key)
		if again {
			lines = append(lines, "update_only=true")
		}
		if endpoints[i] != "" {
			lines = append(lines, "endpoint="+endpoints[i])
		}
		if !again {
			lines = append(lines, p.lines...)
		}
	}
	return strings.Join(lines, "\n") + "\n\n"
}

// syncWireGuard sets a link of wireguard-go that waits outside up, and leads it in. After the addresses of the uplink
// changed it sets the endpoints again.
func (h *Host) syncWireGuard(s State, p plan, text string) error {
	w, err := parseWireGuard(text)
	if err != nil {
		return fmt.Errorf("%s: %w", s.VPN, err)
	}
	_, outside, err := h.kernel.LinkByName(p.link)
	if err != nil {
		return err
	}
	if w.tunnel.Via, err = h.addressesOf(s.Ifname); err != nil {
		return err
	}
	if !outside {
		var before tunnel
		if err := h.memory.dir.Read(tunnelFile(s.Name), &before); errors.Is(err, fs.ErrNotExist) {
			return nil // it has not come up yet
		} else if err != nil {
			return err
		}
		up, err := isUpInside(s.Name, p.link)
		if err != nil || !up || before.Via == w.tunnel.Via || w.tunnel.Via == "" {
			return err
		}
	}
	var endpoints []string
	for _, peer := range w.peers {
		endpoint, err := h.endpoint(s, peer.endpoint)
		if err != nil {
			return err
		}
		endpoints = append(endpoints, endpoint)
	}
	if _, err := askWireGuard(p.link, w.request(endpoints, !outside)); err != nil {
		return err
	}
	if !outside {
		return h.memory.dir.Write(tunnelFile(s.Name), w.tunnel)
	}
	return h.lead(s, p, w.tunnel)
}

// endpoint is the address of an endpoint. Its name is looked up over the uplink.
func (h *Host) endpoint(s State, endpoint string) (string, error) {
	host, port, err := net.SplitHostPort(endpoint)
	if endpoint == "" || err != nil {
		return "", err
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return endpoint, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	const patience = 3 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	args := []string{"run", "--ifname", s.Ifname, "--destination", h.Server, "--resolv", "uplink"}
	for _, uid := range h.ServerUIDs {
		args = append(args, "--server-user", strconv.FormatUint(uint64(uid), 10))
	}
	out, err := exec.CommandContext(ctx, self, append(args, "--", "getent", "ahosts", host)...).Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, printable(strings.TrimSpace(string(exit.Stderr))))
	}
	if err != nil {
		return "", fmt.Errorf("look up %s: %w", host, err)
	}
	addr, _, _ := strings.Cut(string(out), " ")
	if _, err := netip.ParseAddr(addr); err != nil {
		return "", fmt.Errorf("look up %s: %w", host, err)
	}
	return net.JoinHostPort(addr, port), nil
}

// askWireGuard sends a request to the socket of wireguard-go, which comes a moment after its link, and returns the answer.
func askWireGuard(link, request string) (answer string, err error) {
	var conn net.Conn
	for deadline := time.Now().Add(vpnPatience); ; time.Sleep(20 * time.Millisecond) {
		conn, err = net.Dial("unix", "/var/run/wireguard/"+link+".sock")
		if err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("ask wireguard-go: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * vpnPatience)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte(request)); err != nil {
		return "", fmt.Errorf("ask wireguard-go: %w", err)
	}
	buf := make([]byte, maxAnswer)
	for !strings.HasSuffix(answer, "\n\n") && len(answer) < maxAnswer {
		n, err := conn.Read(buf)
		if err != nil {
			return "", fmt.Errorf("wireguard-go does not answer: %w", err)
		}
		answer += string(buf[:n])
	}
	if !strings.Contains(answer, "errno=0\n") {
		return "", fmt.Errorf("wireguard-go refuses its configuration: %q", answer)
	}
	return answer, nil
}

// handshake is when WireGuard last agreed with a peer, in seconds since 1970; 0: never, or it is another VPN.
func handshake(link string) (last int64) {
	if _, err := os.Stat("/var/run/wireguard/" + link + ".sock"); err != nil {
		return 0
	}
	answer, err := askWireGuard(link, "get=1\n\n")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(answer) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "last_handshake_time_sec="); ok {
			if at, err := strconv.ParseInt(value, 10, 64); err == nil {
				last = max(last, at)
			}
		}
	}
	return last
}
