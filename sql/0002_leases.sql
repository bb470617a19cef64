-- Our columns have defaults, so that an INSERT that knows the original's six still works.
-- Owner is a uid. Boot and Netns (SO_NETNS_COOKIE) say where the lease is worth something:
-- the rules and routes that it protects die with either of them.
ALTER TABLE RtTables ADD COLUMN Owner INTEGER NOT NULL DEFAULT 0;
ALTER TABLE RtTables ADD COLUMN Boot  TEXT    NOT NULL DEFAULT '';
ALTER TABLE RtTables ADD COLUMN Netns INTEGER NOT NULL DEFAULT 0;

-- Who held a free table last. Ended grows with every end of a lease: the smallest number is
-- the table unused for longest. Boot is '' for a lease that ended elsewhere.
CREATE TABLE history (
    RtTable    INTEGER NOT NULL CHECK (typeof(RtTable) = 'integer' AND RtTable BETWEEN 0 AND 4294967295),
    AddrFamily INTEGER NOT NULL CHECK (AddrFamily IN (0, 2, 10)),
    Ifname     TEXT    NOT NULL CHECK (typeof(Ifname) = 'text'),
    Addr       TEXT    NOT NULL CHECK (typeof(Addr) = 'text'),
    Ended      INTEGER NOT NULL CHECK (typeof(Ended) = 'integer' AND Ended > 0),
    Boot       TEXT    NOT NULL CHECK (typeof(Boot) = 'text'),
    Netns      INTEGER NOT NULL CHECK (typeof(Netns) = 'integer'),
    PRIMARY KEY (RtTable, AddrFamily)
) WITHOUT ROWID;

-- Rows found in RtTables that make no sense, as they were; nothing reads them again.
CREATE TABLE rejected (RtTable, AddrFamily, Ifname, Addr, LeaseExpires, Tag, Owner, Boot, Netns, reason TEXT NOT NULL);

-- One row that pairs the clock of the leases with UTC: sqlite3 knows no monotonic clock.
CREATE TABLE clock (
    id        INTEGER PRIMARY KEY CHECK (id = 1),
    boot      TEXT    NOT NULL,
    netns     INTEGER NOT NULL,
    monotonic INTEGER NOT NULL,
    utc       INTEGER NOT NULL
);

CREATE VIEW leases AS
SELECT r.RtTable AS "table",
       CASE r.AddrFamily WHEN 2 THEN 'inet' WHEN 10 THEN 'inet6' ELSE 'unspec' END AS family,
       r.Ifname AS ifname,
       r.Addr AS address,
       coalesce(r.Tag, '') AS tag,
       r.Owner AS owner,
       datetime(r.LeaseExpires - c.monotonic + c.utc, 'unixepoch') AS expires_at,
       r.LeaseExpires - c.monotonic + c.utc - CAST(strftime('%s', 'now') AS INTEGER) AS seconds_left
  FROM RtTables AS r
  JOIN clock AS c ON c.boot = r.Boot AND c.netns = r.Netns
 ORDER BY family, "table";
