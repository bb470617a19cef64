package netns

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/remember"
)

// A section is one of the configuration of RUNNS: the options of its build-net.
type section struct {
	name string
	keys map[string][]string // values by key, in lower case
}

// Import reads the configuration of RUNNS (runns.conf), which root alone can write to, and returns what it means as one of the
// service, and what that leaves out. Nothing of the file is executed.
func Import(path string) (text []byte, left []string, err error) {
	real, err := remember.RootsFile(path)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.Open(real)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, jsonc.MaxSize))
	if err != nil {
		return nil, nil, err
	}
	text, left, err = convert(string(content))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return text, left, nil
}

// sections reads a file of sections. Lines that are none are left out.
func sections(content string) (all []section, left []string) {
	number := 0
	for line := range strings.Lines(content) {
		number++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		if name, ok := strings.CutPrefix(line, "["); ok && strings.HasSuffix(name, "]") {
			all = append(all, section{strings.TrimSpace(strings.TrimSuffix(name, "]")), make(map[string][]string)})
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.ToLower(strings.TrimSpace(key)), strings.TrimSpace(value)
		if !ok || key == "" || len(all) == 0 {
			left = append(left, fmt.Sprintf("line %d: %q is no [SECTION], and no KEY=VALUE in one", number, line))
			continue
		}
		if quote := value[:min(1, len(value))]; len(value) > 1 && (quote == `"` || quote == "'") && strings.HasSuffix(value, quote) {
			value = value[1 : len(value)-1]
		}
		keys := all[len(all)-1].keys
		keys[key] = append(keys[key], value)
	}
	return all, left
}

// imported is a namespace as the printed configuration has it.
type imported struct {
	Name   string `json:"name"`
	Ifname string `json:"ifname"`
	VPN    string `json:"vpn,omitempty"`
	Resolv string `json:"resolv,omitempty"`
	Start  string `json:"start"`
}

// convert makes a configuration of the service from one of RUNNS.
func convert(content string) (text []byte, left []string, err error) {
	all, left := sections(content)
	list := []imported{}
	known := make(map[string]bool)
	for _, s := range all {
		for _, key := range slices.Sorted(maps.Keys(s.keys)) {
			values := s.keys[key]
			switch key {
			case "vpn":
			case "name", "int", "resolve":
				for _, value := range values[1:] {
					left = append(left, fmt.Sprintf("section %q: another %s=%s: the first one counts", s.name, key, value))
				}
			case "out", "forward":
				left = append(left, fmt.Sprintf("section %q: %s=: the service chooses names of links, and lets only links of namespaces forward", s.name, key))
			default:
				left = append(left, fmt.Sprintf("section %q: unknown key %q", s.name, key))
			}
		}
		first := func(key, otherwise string) string {
			if values := s.keys[key]; len(values) > 0 && values[0] != "" {
				return values[0]
			}
			return otherwise
		}
		n := imported{Name: first("name", s.name), Ifname: first("int", "eth0"), Resolv: first("resolve", ""), Start: Manual}
		vpns := s.keys["vpn"]
		if len(vpns) == 0 {
			vpns = []string{""}
		}
		for i, vpn := range vpns {
			one := n
			if one.VPN = vpn; i > 0 {
				one.Name += strconv.Itoa(i + 1)
			}
			c := Config{Name: one.Name, Ifname: one.Ifname, Resolv: first("resolve", Uplink), VPN: vpn, Start: Manual}
			err := c.Check()
			if err == nil && known[one.Name] {
				err = fmt.Errorf("there is another namespace %s", one.Name)
			}
			if err != nil {
				left = append(left, fmt.Sprintf("section %q: %v", s.name, err))
				continue
			}
			known[one.Name] = true
			list = append(list, one)
		}
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "\t")
	err = e.Encode(map[string]any{"namespaces": list})
	return out.Bytes(), left, err
}
