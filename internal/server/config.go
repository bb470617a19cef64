package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/table-allocator/table-allocator/internal/allocator"
	"github.com/table-allocator/table-allocator/internal/jsonc"
	"github.com/table-allocator/table-allocator/internal/outside"
	"github.com/table-allocator/table-allocator/internal/wire"
)

// Config is a validated configuration. Default and LoadConfig make one.
type Config struct {
	SocketName  string // text of the abstract name, both forms of which the server holds
	FirstTable  uint32
	Tables      uint64 // how many, for each family
	Timeout     int64  // seconds that a lease lasts
	Database    string // path
	Families    []wire.Family
	Syslog      bool
	LogPath     string   // empty: standard error
	AllowedUIDs []uint32 // may lease, besides root and the server's own uid
	AllowedGIDs []uint32
	RootTables  *uint64 // of each family, for root and the server's own user; other users share the rest. nil: half
	UserTables  uint64  // that each other user may hold of a family; 0: all of the rest
	TableNames  bool    // iproute2 knows tables by names of links
	Marking     marking // for traffic that is bound to an interface
}

const (
	databaseName = "leases.db"
	maxTable     = math.MaxUint32
	noID         = math.MaxUint32 // (uid_t)-1, which no user has
	maxTimeout   = 1 << 32        // seconds; any sum with the lease clock stays in the range of lease_expires
)

var families = []wire.Family{wire.Inet, wire.Inet6, wire.Unspec}

// reservedTables are the kernel's: RT_TABLE_UNSPEC, DEFAULT, MAIN and LOCAL.
var reservedTables = []uint64{0, 253, 254, 255}

// Default is the configuration without a file.
func Default() Config {
	return Config{
		SocketName: "tas_socket",
		FirstTable: 10000,
		Tables:     40,
		Timeout:    3600,
		Database:   defaultDatabase(),
		Families:   slices.Clone(families),
		Marking:    defaultMarking,
	}
}

// rootTables is the share of each pool that is kept for root and the server's own user.
func (c *Config) rootTables() uint64 {
	if c.RootTables == nil {
		return c.Tables / 2
	}
	return *c.RootTables
}

// limits are those of leases.
func (c *Config) limits() allocator.Limits {
	return allocator.Limits{Timeout: c.Timeout, RootTables: c.rootTables(), UserTables: c.UserTables}
}

// defaultDatabase is below the state directory of the service, of the system or of a
// user other than root, in that order.
func defaultDatabase() string {
	if dir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":"); filepath.IsAbs(dir) {
		return filepath.Join(dir, databaseName)
	}
	if os.Geteuid() == 0 {
		return filepath.Join("/var/lib/table-allocator", databaseName)
	}
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		dir = filepath.Join("/", os.Getenv("HOME"), ".local", "state") // never below the working directory
	}
	return filepath.Join(dir, "table-allocator", databaseName)
}

// LoadConfig reads the configuration from a file: the original's keys and our additions.
// Keys that are left out keep their default, except that naming any family switches off
// those that are not named. Unknown, repeated and ill-typed keys are errors which name
// the key, as are values that cannot be.
func LoadConfig(path string) (Config, error) {
	cfg := Default()
	if err := jsonc.Load(path, cfg.set); err != nil {
		return Config{}, err
	}
	if err := cfg.validate(); err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	return cfg, nil
}

func (c *Config) set(key string, value []byte) (err error) {
	decode, ok := map[string]func(key string, value []byte) error{
		"socket_path":            into(&c.SocketName, "a string"),
		"table_offset":           into(&c.FirstTable, "a table number"),
		"num_tables":             into(&c.Tables, "a number of tables"),
		"table_timeout":          into(&c.Timeout, "a number of seconds"),
		"db_path":                into(&c.Database, "a string"),
		"do_syslog":              into(&c.Syslog, "true or false"),
		"log_path":               into(&c.LogPath, "a string"),
		"addr_families":          c.setFamilies,
		"allowed_users":          ids(&c.AllowedUIDs, lookupUser),
		"allowed_groups":         ids(&c.AllowedGIDs, lookupGroup),
		"root_tables":            into(&c.RootTables, "a number of tables"),
		"user_tables":            into(&c.UserTables, "a number of tables"),
		"table_names":            into(&c.TableNames, "true or false"),
		"bind_mark_mask":         c.setMask,
		"bind_priority":          into(&c.Marking.block, "a priority"),
		"bind_fallback_priority": into(&c.Marking.fallback, "a priority"),
	}[key]
	if !ok {
		return fmt.Errorf("%s: unknown key", key)
	}
	return decode(key, value)
}

// into decodes a value that needs no more than the right type.
func into[T any](to *T, want string) func(key string, value []byte) error {
	return func(key string, value []byte) error { return jsonc.Decode(key, value, to, want) }
}

func (c *Config) setFamilies(name string, value []byte) error {
	c.Families = nil
	err := jsonc.Each(value, func(key string, value []byte) error {
		full := name + "." + key
		i := slices.IndexFunc(families, func(f wire.Family) bool { return f.String() == key })
		if i < 0 {
			return fmt.Errorf("%s: unknown key (there are inet, inet6 and unspec)", full)
		}
		var on bool
		if err := jsonc.Decode(full, value, &on, "true or false"); err != nil {
			return err
		}
		if on {
			c.Families = append(c.Families, families[i])
		}
		return nil
	})
	if err == nil && len(c.Families) == 0 {
		err = fmt.Errorf("%s: none is true, so nothing would be served", name)
	} else if err != nil && !strings.HasPrefix(err.Error(), name) {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return err
}

// ids decodes a list of names and numbers.
func ids(to *[]uint32, lookup func(string) (string, error)) func(key string, value []byte) error {
	const want = "a list of names or numbers"
	return func(key string, value []byte) error {
		var list []json.RawMessage
		if err := jsonc.Decode(key, value, &list, want); err != nil {
			return err
		}
		for _, entry := range list {
			text := string(entry)
			if entry[0] == '"' {
				if err := jsonc.Decode(key, entry, &text, want); err != nil {
					return err
				}
			}
			id, err := strconv.ParseUint(text, 10, 32)
			if err != nil && entry[0] == '"' {
				if text, err = lookup(text); err == nil {
					id, err = strconv.ParseUint(text, 10, 32)
				}
			}
			switch {
			case errors.Is(err, outside.ErrSilent):
				return fmt.Errorf("%s: look up %s: %w", key, entry, err)
			case err != nil || id == noID:
				return fmt.Errorf("%s: %s is neither a name on this host nor a number", key, entry)
			case uint32(id) == wire.OverflowID():
				return fmt.Errorf("%s: %s stands for everybody of another user namespace and is never permitted", key, entry)
			}
			*to = append(*to, uint32(id))
		}
		return nil
	}
}

// namesLimit is how long a name service may take for a name of the configuration.
const namesLimit = 5 * time.Second

func lookupUser(name string) (string, error) {
	return outside.Ask("name services", namesLimit, func() (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
}

func lookupGroup(name string) (string, error) {
	return outside.Ask("name services", namesLimit, func() (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
}

func (c *Config) validate() error {
	if _, err := wire.Padded(c.SocketName); err != nil {
		return fmt.Errorf("socket_path: %w", err)
	}
	if strings.IndexByte(c.SocketName, 0) >= 0 {
		return errors.New("socket_path: contains a NUL")
	}
	if c.Tables == 0 {
		return errors.New("num_tables: want at least 1")
	}
	first := uint64(c.FirstTable)
	if c.Tables > maxTable || first+c.Tables-1 > maxTable {
		return fmt.Errorf("num_tables: %d tables from table_offset %d on go beyond the last table, %d", c.Tables, first, uint64(maxTable))
	}
	for _, table := range reservedTables {
		if first <= table && table < first+c.Tables {
			return fmt.Errorf("table_offset: tables %d to %d contain %d, which is the kernel's (0 and 253 to 255 are)", first, first+c.Tables-1, table)
		}
	}
	if c.Timeout < 1 || c.Timeout > maxTimeout {
		return fmt.Errorf("table_timeout: %d, want 1 to %d seconds", c.Timeout, int64(maxTimeout))
	}
	if err := c.Marking.validate(); err != nil {
		return err
	}
	if c.rootTables() > c.Tables {
		return fmt.Errorf("root_tables: %d, want at most num_tables, which is %d", c.rootTables(), c.Tables)
	}
	if c.Database == "" || strings.IndexByte(c.Database, 0) >= 0 {
		return errors.New("db_path: not a path")
	}
	if !filepath.IsAbs(c.Database) {
		// A service may have any working directory, and SQLite would take a URI or ":memory:" for
		// something else.
		abs, err := filepath.Abs(c.Database)
		if err != nil {
			return fmt.Errorf("db_path: %w", err)
		}
		c.Database = abs
	}
	return nil
}
