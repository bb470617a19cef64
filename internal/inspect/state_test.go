package inspect

import (
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/route"
)

func TestGiveDefault(t *testing.T) {
	for kind, want := range map[string]string{"ppp": "defaultroute-metric", "": "DHCP", "wwan": "DHCP"} {
		if got := giveDefault(route.Link{Name: "ppp0", Kind: kind}); !strings.Contains(got, want) || !strings.Contains(got, "over ppp0") {
			t.Errorf("%q: got %q, want %q", kind, got, want)
		}
	}
}
