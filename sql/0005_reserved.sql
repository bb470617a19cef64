-- SQLite is damaged or it is not: no sum tells of single rows any more, and rows that make no
-- sense are deleted.
ALTER TABLE RtTables DROP COLUMN Sum;
DROP TABLE rejected;

-- Until that second of CLOCK_MONOTONIC_RAW a free table goes to its last holder only: its row was
-- found in a damaged database, and the holder may use it still.
ALTER TABLE history ADD COLUMN Reserved INTEGER NOT NULL DEFAULT 0 CHECK (typeof(Reserved) = 'integer');
