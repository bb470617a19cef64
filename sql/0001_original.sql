-- The one table of the original table allocator, as its databases have it.
-- LeaseExpires is a second of CLOCK_MONOTONIC_RAW.
CREATE TABLE IF NOT EXISTS RtTables (
    RtTable      INTEGER NOT NULL,
    AddrFamily   INTEGER NOT NULL,
    Ifname       TEXT    NOT NULL,
    Addr         TEXT    NOT NULL,
    LeaseExpires INTEGER NOT NULL,
    Tag          TEXT,
    PRIMARY KEY (RtTable, AddrFamily) ON CONFLICT REPLACE
);
