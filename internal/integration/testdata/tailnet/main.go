// Command tailnet is the server that tailscaled asks who is in its network, and the relay for packets of those who do not reach
// each other: Tailscale's own, from the tests of its module. Each node gets an address, and routes the networks that it advertises.
package main

import (
	"crypto/tls"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

const controlPort, relayPort = 8080, 8443

func main() {
	addr := os.Args[1]
	relay := httptest.NewUnstartedServer(derphttp.Handler(derp.NewServer(key.NewNode(), log.Printf)))
	relay.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	relay.Listener = listen(addr, relayPort)
	relay.StartTLS()
	node := &tailcfg.DERPNode{
		Name: "relay", RegionID: 1, HostName: addr, IPv4: addr, IPv6: "none", STUNPort: -1, DERPPort: relayPort, InsecureForTests: true,
	}
	control := &testcontrol.Server{
		DERPMap:         &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, RegionCode: "relay", Nodes: []*tailcfg.DERPNode{node}}}},
		DNSConfig:       &tailcfg.DNSConfig{},
		ExplicitBaseURL: "http://" + net.JoinHostPort(addr, strconv.Itoa(controlPort)),
	}
	go func() {
		told := map[key.NodePublic]bool{}
		for ; ; time.Sleep(100 * time.Millisecond) {
			for _, n := range control.AllNodes() {
				if routes := n.Hostinfo.RoutableIPs().AsSlice(); len(routes) > 0 && !told[n.Key] {
					told[n.Key] = true
					control.SetSubnetRoutes(n.Key, routes)
				}
			}
		}
	}()
	log.Fatal(http.Serve(listen(addr, controlPort), control))
}

func listen(addr string, port int) net.Listener {
	l, err := net.Listen("tcp", net.JoinHostPort(addr, strconv.Itoa(port)))
	if err != nil {
		log.Fatal(err)
	}
	return l
}
