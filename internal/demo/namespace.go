package main

import "fmt"

// namespace shows a shell in a network namespace on the second uplink, which main does not prefer.
func (s *session) namespace() {
	u := uplinks[1]
	say("A shell in a network namespace on %s, which is its only way out, though main prefers %s:", u.ifname, uplinks[0].ifname)
	s.sh("ip route get " + internet)
	s.sh("table-allocator-client netns add work --ifname " + u.ifname + " --resolv " + u.gateway + " --no-ipv6")
	before := s.received()
	s.sh(fmt.Sprintf("table-allocator-client netns exec work bash -c 'exec 3<>/dev/udp/%s/%d; printf ? >&3; dd bs=64 count=1 <&3 2>/dev/null; echo'", internet, echoPort))
	after := s.received()
	for i, u := range uplinks {
		fmt.Printf("%d packets of the namespace were seen at %s, the gateway of %s\n", after[i]-before[i], u.gateway, u.ifname)
	}
	s.sh("table-allocator-client netns list")
	s.sh("table-allocator-client netns del work")
}
