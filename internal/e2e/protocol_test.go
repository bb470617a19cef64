package e2e

import (
	"strings"
	"testing"
)

// TestProtocolByHand: the examples of PROTOCOL.md work as they stand there.
func TestProtocolByHand(t *testing.T) {
	h := newHost(t)
	h.serve()
	_, text, _ := strings.Cut(readFile(t, "../wire/PROTOCOL.md"), "## By hand\n")
	text, _, _ = strings.Cut(text, "\n## ")
	_, program, _ := strings.Cut(text, "With python3:\n")
	shell, _, _ := strings.Cut(text, "With python3:\n")
	if r := h.run("python3", "-c", strings.ReplaceAll(program, "\n    ", "\n")); r.stdout != "10000\n0\n" {
		t.Errorf("python: %+v", r)
	}
	_, line, found := strings.Cut(shell, "\n    ")
	line, _, _ = strings.Cut(line, "\n")
	if r := h.run("sh", "-c", line); !found || !strings.Contains(r.stdout, `"table":10000`) {
		t.Errorf("socat: %+v", r)
	}
}
