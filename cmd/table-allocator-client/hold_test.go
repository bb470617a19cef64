package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/cli"
	"github.com/table-allocator/table-allocator/internal/client"
	"github.com/table-allocator/table-allocator/internal/uplink"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// parsed is what a command line says to the original's form.
type parsed struct {
	config              client.Config
	release, foreground bool
	log                 cli.LogConfig
}

func parse(args []string) (parsed, error) {
	h := newHoldFlags(newFlags(""))
	err := h.parse(args)
	if err == nil {
		err = h.complete(h.Args())
	}
	return parsed{h.config, h.release, h.foreground, h.log}, err
}

func TestParse(t *testing.T) {
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	const basic = "-4 -a 10.77.0.2 -n 24 -i wan0"
	for _, tt := range []struct {
		name string
		args string
		want func(*parsed) // beyond what basic says
	}{
		{"short", basic, func(*parsed) {}},
		{"long", "--inet --address 10.77.0.2 --netmask=24 --ifname wan0", func(*parsed) {}},
		{"one word", "-4a10.77.0.2 -n24 -iwan0", func(*parsed) {}},
		{"dotted mask", "-4 -a 10.77.0.2 -n 255.255.255.0 -i wan0", func(*parsed) {}},
		{"odd mask", "-4 -a 10.77.0.2 -n 255.255.255.254 -i wan0", func(o *parsed) {
			o.config.Uplink.Network = netip.MustParsePrefix("10.77.0.2/31")
		}},
		{"all ones", "-4 -a 10.77.0.2 -n 255.255.255.255 -i wan0", func(o *parsed) {
			o.config.Uplink.Network = netip.MustParsePrefix("10.77.0.2/32")
		}},
		{"one bit", "-4 -a 10.77.0.2 -n 128.0.0.0 -i wan0", func(o *parsed) {
			o.config.Uplink.Network = netip.MustParsePrefix("10.77.0.2/1")
		}},
		{"short options", basic + " -t cable -r -f -d tas2 -s -l /tmp/x.log", func(o *parsed) {
			o.config.Uplink.Tag, o.release, o.foreground, o.config.Server = "cable", true, true, "tas2"
			o.log.Syslog, o.log.Path = true, "/tmp/x.log"
		}},
		{"long options", basic + " --tag cable --release --foreground --destination tas2 --syslog --log-path x.log --debug", func(o *parsed) {
			o.config.Uplink.Tag, o.release, o.foreground, o.config.Server = "cable", true, true, "tas2"
			o.log.Syslog, o.log.Path, o.log.Debug = true, filepath.Join(cwd, "x.log"), true
		}},
		{"the original's spelling", basic + " --log_path /tmp/x.log", func(o *parsed) { o.log.Path = "/tmp/x.log" }},
		{"-r takes no word", "-r " + basic, func(o *parsed) { o.release = true }},
		{"priorities", basic + " --priority 1,32765,4294967295", func(o *parsed) {
			o.config.Uplink.Priorities = uplink.Priorities{Source: 1, Network: 32765, Unbound: 4294967295}
		}},
		{"no network rule", basic + " --no-network-rule", func(o *parsed) { o.config.Uplink.NoNetwork = true }},
		{"forward", basic + " --forward", func(o *parsed) { o.config.Uplink.Forward = true }},
		{"users by name and number", basic + " --server-user root --server-user=4711", func(o *parsed) {
			o.config.ServerUIDs = []uint32{0, 4711}
		}},
		{"inet6", "-6 -a fd00::02 -n 64 -i wan0", func(o *parsed) {
			o.config.Uplink.Key.Family, o.config.Uplink.Key.Address = wire.Inet6, "fd00::2"
			o.config.Uplink.Network = netip.MustParsePrefix("fd00::2/64")
		}},
		{"inet6 without a length", "-6 -a FD00:0:0::2 -i wan0", func(o *parsed) {
			o.config.Uplink.Key.Family, o.config.Uplink.Key.Address = wire.Inet6, "fd00::2"
			o.config.Uplink.Network = netip.MustParsePrefix("fd00::2/128")
		}},
		{"unspec", "-a anything/at-all -i wan0", func(o *parsed) {
			o.config.Uplink.Key.Family, o.config.Uplink.Key.Address = wire.Unspec, "anything/at-all"
			o.config.Uplink.Network = netip.Prefix{}
		}},
		{"release needs no mask", "-r -4 -a 10.77.0.2 -i wan0", func(o *parsed) {
			o.release = true
			o.config.Uplink.Network = netip.MustParsePrefix("10.77.0.2/32")
		}},
		{"longest names", "-4 -a 10.77.0.2 -n 24 -i " + strings.Repeat("i", 15) + " -t " + strings.Repeat("t", 127) +
			" -d " + strings.Repeat("d", 106), func(o *parsed) {
			o.config.Uplink.Key.Ifname = strings.Repeat("i", 15)
			o.config.Uplink.Tag, o.config.Server = strings.Repeat("t", 127), strings.Repeat("d", 106)
		}},
		{"routes", basic + " --routes move --gateway 10.77.0.1 --gateway 10.77.0.3 --metric 7 --route 10.99.0.0/16,10.77.0.9 --on-loss block --specific-first", func(o *parsed) {
			s := &o.config.Uplink.Settings
			s.Routes, s.OnLoss, s.SpecificFirst, s.Metric = uplink.MoveRoutes, uplink.Block, true, 7
			s.Gateways = []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("10.77.0.3")}
			s.Static = []uplink.StaticRoute{{Dst: netip.MustParsePrefix("10.99.0.0/16"), Via: netip.MustParseAddr("10.77.0.9")}}
		}},
		{"resolvers", basic + " --nameserver 192.0.2.53 --dnsmasq-servers /run/x --dnsmasq-pid /run/y", func(o *parsed) {
			s := &o.config.Uplink.Settings
			s.Nameservers = []netip.Addr{netip.MustParseAddr("192.0.2.53")}
			s.ServersFile, s.PIDFile = "/run/x", "/run/y"
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := parsed{log: cli.LogConfig{Command: "table-allocator-client"}, config: client.Config{
				Uplink: uplink.Uplink{
					Key:        wire.Key{Family: wire.Inet, Ifname: "wan0", Address: "10.77.0.2"},
					Network:    netip.MustParsePrefix("10.77.0.2/24"),
					Priorities: uplink.OriginalPriorities,
					Settings: uplink.Settings{
						Routes: uplink.NoRoutes, OnLoss: uplink.Fallback, ServersFile: uplink.DefaultServersFile,
					},
				},
				Server: "tas_socket",
			}}
			tt.want(&want)
			got, err := parse(strings.Fields(tt.args))
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		args string
		want string // in the message
	}{
		{"nothing", "", "-a ADDRESS and -i IFNAME are needed"},
		{"no address", "-4 -i wan0 -n 24", "-a ADDRESS"},
		{"no link", "-4 -a 10.77.0.2 -n 24", "-i IFNAME"},
		{"two families", "-4 -6 -a 10.77.0.2 -n 24 -i wan0", "-4 and -6"},
		{"unknown option", "-4 -a 10.77.0.2 -n 24 -i wan0 --frobnicate", "frobnicate"},
		{"unknown letter", "-4 -a 10.77.0.2 -n 24 -i wan0 -x", "'x'"},
		{"an option without its word", "-4 -a 10.77.0.2 -n 24 -i", "argument"},
		{"a word too many", "-4 -a 10.77.0.2 -n 24 -i wan0 dsl", `"dsl"`},
		{"no IPv4 address", "-4 -a fd00::2 -n 24 -i wan0", "inet"},
		{"no IPv6 address", "-6 -a 10.77.0.2 -i wan0", "inet6"},
		{"mapped address", "-6 -a ::ffff:10.77.0.2 -i wan0", "this is IPv4, written as IPv6: want 10.77.0.2"},
		{"mapped address as IPv4", "-4 -a ::ffff:10.77.0.2 -n 24 -i wan0", "this is IPv4, written as IPv6: want 10.77.0.2"},
		{"mapped address without a family", "-a ::ffff:a4d:2 -i wan0", "this is IPv4, written as IPv6: want 10.77.0.2"},
		{"mapped address with a length", "-a ::ffff:10.77.0.2/24 -i wan0", "this is IPv4, written as IPv6: want 10.77.0.2"},
		{"an address with a zone", "-a 2001:db8::1%wan0 -i wan0", "without its zone"},
		{"the unspecified address of IPv6", "-a :: -i wan0", "no host has this address"},
		{"multicast of IPv6", "-a ff02::1 -i wan0", "no host has this address"},
		{"no address at all", "-4 -a cable -n 24 -i wan0", `"cable"`},
		{"leading zeros", "-4 -a 10.077.0.2 -n 24 -i wan0", "10.077.0.2"},
		{"a zone", "-6 -a fe80::1%wan0 -i wan0", "fe80::1%wan0"},
		{"link-local", "-6 -a fe80::1 -i wan0", "link-local"},
		{"loopback", "-4 -a 127.0.0.1 -n 8 -i lo", "127.0.0.1"},
		{"the unspecified address", "-4 -a 0.0.0.0 -n 24 -i wan0", "0.0.0.0"},
		{"multicast", "-4 -a 224.0.0.1 -n 24 -i wan0", "224.0.0.1"},
		{"broadcast", "-4 -a 255.255.255.255 -n 24 -i wan0", "255.255.255.255"},
		{"mask of zeros", "-4 -a 10.77.0.2 -n 0.0.0.0 -i wan0", "-n 0.0.0.0"},
		{"mask with a hole", "-4 -a 10.77.0.2 -n 255.0.255.0 -i wan0", "-n 255.0.255.0"},
		{"mask from the wrong end", "-4 -a 10.77.0.2 -n 0.0.0.255 -i wan0", "-n 0.0.0.255"},
		{"length 0", "-4 -a 10.77.0.2 -n 0 -i wan0", "-n 0"},
		{"length 33", "-4 -a 10.77.0.2 -n 33 -i wan0", "-n 33"},
		{"length -1", "-4 -a 10.77.0.2 -n -1 -i wan0", "-n -1"},
		{"length 129", "-6 -a fd00::2 -n 129 -i wan0", "-n 129"},
		{"a mask of IPv6", "-4 -a 10.77.0.2 -n ffff:: -i wan0", "-n ffff::"},
		{"a mask for IPv6", "-6 -a fd00::2 -n 255.255.255.0 -i wan0", "-n 255.255.255.0"},
		{"two lengths", "-a 10.77.0.2/24 -n 25 -i wan0", "-a 10.77.0.2/24 and -n 25 are two prefix lengths"},
		{"no mask at all", "-4 -a 10.77.0.2 -n wide -i wan0", "-n wide"},
		{"a long link", "-4 -a 10.77.0.2 -n 24 -i 0123456789abcdef", "ifname"},
		{"a long address", "-a " + strings.Repeat("a", 46) + " -i wan0", "address"},
		{"a long tag", "-4 -a 10.77.0.2 -n 24 -i wan0 -t " + strings.Repeat("t", 128), "tag"},
		{"a tag that would break a line", "-4 -a 10.77.0.2 -n 24 -i wan0 -t a\x07b", "tag"},
		{"a tag that is no text", "-4 -a 10.77.0.2 -n 24 -i wan0 -t \xff", "tag"},
		{"a long server name", "-4 -a 10.77.0.2 -n 24 -i wan0 -d " + strings.Repeat("d", 107), "--destination"},
		{"two priorities", "-4 -a 10.77.0.2 -n 24 -i wan0 --priority 1,2", "--priority 1,2"},
		{"priority 0", "-4 -a 10.77.0.2 -n 24 -i wan0 --priority 0,2,3", "--priority 0,2,3"},
		{"a priority beyond 32 bits", "-4 -a 10.77.0.2 -n 24 -i wan0 --priority 1,2,4294967296", "4294967296"},
		{"no number", "-4 -a 10.77.0.2 -n 24 -i wan0 --priority 1,2,x", `"x"`},
		{"nobody", "-4 -a 10.77.0.2 -n 24 -i wan0 --server-user no-such-user", "no-such-user"},
		{"the overflow uid", "-4 -a 10.77.0.2 -n 24 -i wan0 --server-user 65534", "65534"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parse(strings.Fields(tt.args))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error that names %q", err, tt.want)
			}
		})
	}
}
