package e2e

import (
	"os/exec"
	"strings"
	"testing"
)

// sending sends a packet from an address of both families again and again, until the test ends.
const sending = `import socket, time
while True:
    for family, source, to in (socket.AF_INET, "10.78.0.2", "9.9.9.9"), (socket.AF_INET6, "2001:db8:78::2", "2600::9"):
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.bind((source, 0))
        try: s.sendto(b"x", (to, 9))
        except OSError: pass
        s.close()
    time.sleep(0.3)`

// TestDoctorGateway: a gateway that is asked for and does not answer is said, in each family, until it answers.
func TestDoctorGateway(t *testing.T) {
	h := twoUplinks(t)
	h.isp.Batch(t, "address add 10.78.0.1/24 dev wan1", "address add 2001:db8:78::1/64 dev wan1 nodad")
	h.waitDiagnosis("")
	h.start(exec.Command("python3", "-c", sending))
	h.waitDiagnosis("")
	for _, addr := range []string{"10.78.0.1/24", "2001:db8:78::1/64"} {
		h.isp.IP(t, "address del "+addr+" dev wan1")
		gateway, _, _ := strings.Cut(addr, "/")
		h.ns.Run(t, "sh", "-c", "ip neighbour delete "+gateway+" dev wan1 || :") // as if it had never answered
		h.waitDiagnosis("", "gateway-silent")
		h.isp.IP(t, "address add "+addr+" dev wan1"+map[bool]string{true: " nodad"}[strings.Contains(addr, "::")])
		h.waitDiagnosis("")
	}
}
