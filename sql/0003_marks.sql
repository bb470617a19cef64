-- The mark of an interface, for traffic that is bound to it: the configured mask makes the bits
-- of idx. Used grows each time that one is asked for: the smallest number is the mark unused
-- for longest.
CREATE TABLE marks (
    ifname TEXT    NOT NULL PRIMARY KEY CHECK (typeof(ifname) = 'text'),
    idx    INTEGER NOT NULL UNIQUE CHECK (typeof(idx) = 'integer' AND idx BETWEEN 1 AND 4294967295),
    used   INTEGER NOT NULL CHECK (typeof(used) = 'integer' AND used > 0)
) WITHOUT ROWID;
