package server

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// original is the example file of the original.
const original = `{
	"socket_path" : "tas_socket",
	"table_offset" : 10000,
	"num_tables" : 40,
	"table_timeout" : 3600, // seconds
	"db_path" : "/tmp/table_allocator_server.db",
	"do_syslog" : true,
	"addr_families" : { "inet" : true, "inet6" : false, "unspec" : false }
}`

// parse is LoadConfig for a reader.
func parse(r io.Reader) (Config, error) {
	cfg := Default()
	if err := jsonc.Read(r, cfg.set); err != nil {
		return Config{}, err
	}
	return cfg, cfg.validate()
}

func TestParseConfig(t *testing.T) {
	with := func(change func(*Config)) Config {
		c := Default()
		change(&c)
		return c
	}
	for _, tt := range []struct {
		name, text string
		want       Config
	}{
		{"an empty object", "{}", Default()},
		{"the original's", original, with(func(c *Config) {
			c.Database, c.Syslog, c.Families = "/tmp/table_allocator_server.db", true, []wire.Family{wire.Inet}
		})},
		{"comments and trailing commas", "// first\n{ /* second */ \"num_tables\": 3, // third\n}\n", with(func(c *Config) { c.Tables = 3 })},
		{"a name of 106 bytes", `{"socket_path":"` + strings.Repeat("n", 106) + `"}`,
			with(func(c *Config) { c.SocketName = strings.Repeat("n", 106) })},
		{"one table", `{"num_tables":1}`, with(func(c *Config) { c.Tables = 1 })},
		{"a second", `{"table_timeout":1}`, with(func(c *Config) { c.Timeout = 1 })},
		{"more seconds than 16 bits have", `{"table_timeout":100000}`, with(func(c *Config) { c.Timeout = 100000 })},
		{"all tables behind the reserved ones", `{"table_offset":256,"num_tables":4294967040}`,
			with(func(c *Config) { c.FirstTable, c.Tables = 256, 4294967040 })},
		{"all tables before the reserved ones", `{"table_offset":1,"num_tables":252}`,
			with(func(c *Config) { c.FirstTable, c.Tables = 1, 252 })},
		{"the last table", `{"table_offset":4294967295,"num_tables":1}`,
			with(func(c *Config) { c.FirstTable, c.Tables = 4294967295, 1 })},
		{"families", `{"addr_families":{"unspec":true,"inet6":true}}`,
			with(func(c *Config) { c.Families = []wire.Family{wire.Unspec, wire.Inet6} })},
		{"a log", `{"log_path":"/var/log/x","do_syslog":false}`, with(func(c *Config) { c.LogPath = "/var/log/x" })},
		{"users by name and number", `{"allowed_users":["root",7,"8"],"allowed_groups":["root",9]}`,
			with(func(c *Config) { c.AllowedUIDs, c.AllowedGIDs = []uint32{0, 7, 8}, []uint32{0, 9} })},
		{"marks", `{"bind_mark_mask":"0xff0000","bind_priority":8000,"bind_fallback_priority":9000}`,
			with(func(c *Config) { c.Marking = marking{0xff0000, 8000, 9000} })},
		{"space in front", `{"bind_mark_mask" : "0xff0000"}`, with(func(c *Config) { c.Marking.mask = 0xff0000 })},
		{"a mask as a number", `{"bind_mark_mask":6}`, with(func(c *Config) { c.Marking.mask = 6 })},
		{"all bits", `{"bind_mark_mask":4294967295}`, with(func(c *Config) { c.Marking.mask = 0xffffffff })},
		{"more than the original's 1,024 bytes", `{"num_tables":3` + strings.Repeat(" ", 100_000) + "}", with(func(c *Config) { c.Tables = 3 })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parse(strings.NewReader(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

// TestParseConfigRefuses: an error names the key.
func TestParseConfigRefuses(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"nothing", "", "EOF"},
		{"a number", "1", "not a JSON object"},
		{"a list", "[]", "not a JSON object"},
		{"a string", `"x"`, "not a JSON object"},
		{"null", "null", "not a JSON object"},
		{"half", `{"num_tables":3`, "EOF"},
		{"two objects", "{}{}", "after top-level value"},
		{"single quotes", `{'num_tables':3}`, "invalid character"},
		{"larger than any", "{" + strings.Repeat(" ", jsonc.MaxSize) + "}", "larger than 1048576 bytes"},
		{"too deep", strings.Repeat("[", jsonc.MaxSize), "more than 10000 brackets"},
		{"deep", strings.Repeat("[", jsonc.MaxBrackets), "EOF"},
		{"unknown key", `{"num_table":3}`, "num_table: unknown key"},
		{"key in capitals", `{"Num_Tables":3}`, "Num_Tables: unknown key"},
		{"key twice", `{"num_tables":3,"num_tables":3}`, "num_tables: given twice"},
		{"name is a number", `{"socket_path":1}`, "socket_path: want a string, have 1"},
		{"name is null", `{"socket_path":null}`, "socket_path: want a string, have null"},
		{"no name", `{"socket_path":""}`, "socket_path: "},
		{"name of 107 bytes", `{"socket_path":"` + strings.Repeat("n", 107) + `"}`, "socket_path: "},
		{"NUL in the name", `{"socket_path":"a\u0000b"}`, "socket_path: contains a NUL"},
		{"offset is a string", `{"table_offset":"10000"}`, `table_offset: want a table number, have "10000"`},
		{"offset is negative", `{"table_offset":-1}`, "table_offset: want a table number"},
		{"offset is beyond all tables", `{"table_offset":4294967296}`, "table_offset: want a table number"},
		{"offset is a fraction", `{"table_offset":1.5}`, "table_offset: want a table number"},
		{"table 0", `{"table_offset":0}`, "table_offset: tables 0 to 39 contain 0"},
		{"the kernel's tables in the middle", `{"table_offset":250}`, "table_offset: tables 250 to 289 contain 253"},
		{"the first of them last", `{"table_offset":252,"num_tables":2}`, "contain 253"},
		{"the last of them first", `{"table_offset":255,"num_tables":1}`, "contain 255"},
		{"no tables", `{"num_tables":0}`, "num_tables: want at least 1"},
		{"fewer than none", `{"num_tables":-1}`, "num_tables: want a number of tables"},
		{"beyond the last table", `{"table_offset":4294967256}`, ""},
		{"wrap-around", `{"table_offset":4294967257}`, "num_tables: 40 tables from table_offset 4294967257 on go beyond the last table"},
		{"wrap-around of 64 bits", `{"num_tables":18446744073709551615}`, "num_tables: "},
		{"more than 64 bits", `{"num_tables":18446744073709551616}`, "num_tables: want a number of tables"},
		{"no time", `{"table_timeout":0}`, "table_timeout: 0, want 1 to"},
		{"negative time", `{"table_timeout":-5}`, "table_timeout: -5, want 1 to"},
		{"endless", `{"table_timeout":9223372036854775807}`, "table_timeout: 9223372036854775807, want 1 to"},
		{"time with an exponent", `{"table_timeout":1e3}`, "table_timeout: want a number of seconds"},
		{"no database", `{"db_path":""}`, "db_path: not a path"},
		{"NUL in the database", `{"db_path":"/x\u0000y"}`, "db_path: not a path"},
		{"database is a list", `{"db_path":["/x"]}`, "db_path: want a string"},
		{"syslog is a number", `{"do_syslog":1}`, "do_syslog: want true or false, have 1"},
		{"syslog is null", `{"do_syslog":null}`, "do_syslog: want true or false"},
		{"mask with a hole", `{"bind_mark_mask":"0xff00ff00"}`, "bind_mark_mask: 0xff00ff00, want at least two bits side by side, as in 0xff000000"},
		{"mask of one bit", `{"bind_mark_mask":"0x80000000"}`, "bind_mark_mask: 0x80000000, want at least two bits"},
		{"no mask", `{"bind_mark_mask":0}`, "bind_mark_mask: 0x0, want at least two bits"},
		{"mask of 33 bits", `{"bind_mark_mask":"0x1ff000000"}`, `bind_mark_mask: want a number, or a string like "0xff000000", have "0x1ff000000"`},
		{"mask is no text", `{"bind_mark_mask":""}`, `bind_mark_mask: want a number, or a string like "0xff000000", have ""`},
		{"mask is text", `{"bind_mark_mask":"high"}`, `bind_mark_mask: want a number, or a string like "0xff000000", have "high"`},
		{"mask is true", `{"bind_mark_mask":true}`, `bind_mark_mask: want a number`},
		{"mask is null", `{"bind_mark_mask":null}`, `bind_mark_mask: want a number`},
		{"guards behind leases", `{"bind_priority":9995}`, "bind_priority: 9995, want 1 to 9994: the rules of leases begin at 9998"},
		{"guards before local", `{"bind_priority":0}`, "bind_priority: 0, want 1 to 9994"},
		{"fallback before block", `{"bind_fallback_priority":9004}`, "bind_fallback_priority: 9004, want 9005 to 32762"},
		{"fallback behind main", `{"bind_fallback_priority":32763}`, "bind_fallback_priority: 32763, want 9005 to 32762"},
		{"log is true", `{"log_path":true}`, "log_path: want a string"},
		{"families are a list", `{"addr_families":["inet"]}`, "addr_families: not a JSON object"},
		{"no families", `{"addr_families":{}}`, "addr_families: none is true"},
		{"all families off", `{"addr_families":{"inet":false}}`, "addr_families: none is true"},
		{"unknown family", `{"addr_families":{"inet4":true}}`, "addr_families.inet4: unknown key"},
		{"family twice", `{"addr_families":{"inet":true,"inet":false}}`, "addr_families: inet: given twice"},
		{"family is a number", `{"addr_families":{"inet":1}}`, "addr_families.inet: want true or false, have 1"},
		{"users are a string", `{"allowed_users":"root"}`, "allowed_users: want a list"},
		{"unknown user", `{"allowed_users":["no such user"]}`, "allowed_users: \"no such user\" is neither a name on this host nor a number"},
		{"empty user", `{"allowed_users":[""]}`, "allowed_users: "},
		{"user is null", `{"allowed_users":[null]}`, "allowed_users: "},
		{"user is a list", `{"allowed_users":[[0]]}`, "allowed_users: "},
		{"user is negative", `{"allowed_users":[-1]}`, "allowed_users: -1 is neither"},
		{"user is a fraction", `{"allowed_users":[0.5]}`, "allowed_users: 0.5 is neither"},
		{"user beyond 32 bits", `{"allowed_users":[4294967296]}`, "allowed_users: 4294967296 is neither"},
		{"user -1 of 32 bits", `{"allowed_users":[4294967295]}`, "allowed_users: 4294967295 is neither"},
		{"overflow uid", fmt.Sprintf(`{"allowed_users":[%d]}`, wire.OverflowID()), "never permitted"},
		{"unknown group", `{"allowed_groups":["no such group"]}`, `allowed_groups: "no such group" is neither`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parse(strings.NewReader(tt.text))
			if tt.want == "" {
				if err != nil {
					t.Errorf("got %v, want no error", err)
				}
				return
			}
			if err == nil {
				t.Fatalf("got %+v, want an error", got)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, want %q in it", err, tt.want)
			}
		})
	}
}

func TestRelativeDatabase(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"leases.db":        wd + "/leases.db",
		":memory:":         wd + "/:memory:",
		"file:x?mode=ro":   wd + "/file:x?mode=ro",
		"/var/lib/x/y.db":  "/var/lib/x/y.db",
		"../../x/leases.d": strings.Join(strings.Split(wd, "/")[:strings.Count(wd, "/")-1], "/") + "/x/leases.d",
	} {
		cfg, err := parse(strings.NewReader(fmt.Sprintf(`{"db_path":%q}`, text)))
		if err != nil || cfg.Database != want {
			t.Errorf("db_path %q: got %q, %v, want %q", text, cfg.Database, err, want)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(original))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := parse(bytes.NewReader(text))
		if err != nil {
			if err.Error() == "" || len(err.Error()) > len(text)*6+1000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		first, last := uint64(cfg.FirstTable), uint64(cfg.FirstTable)+cfg.Tables-1
		switch {
		case cfg.Tables == 0 || last > maxTable || first == 0 || first <= 255 && last >= 253:
			t.Errorf("tables %d to %d were let through", first, last)
		case cfg.Timeout < 1 || cfg.Timeout > maxTimeout:
			t.Errorf("timeout %d was let through", cfg.Timeout)
		case len(cfg.SocketName) < 1 || len(cfg.SocketName) > 106 || strings.Contains(cfg.SocketName, "\x00"):
			t.Errorf("name %q was let through", cfg.SocketName)
		case !strings.HasPrefix(cfg.Database, "/") || strings.Contains(cfg.Database, "\x00"):
			t.Errorf("database %q was let through", cfg.Database)
		case len(cfg.Families) == 0 || len(cfg.Families) > 3:
			t.Errorf("families %v were let through", cfg.Families)
		}
	})
}
