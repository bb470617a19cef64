-- A database that is damaged is replaced as a whole, so rows need no sums. Rows of RtTables that make
-- no sense are deleted.
ALTER TABLE RtTables DROP COLUMN Sum;
DROP TABLE rejected;

-- Until this second of CLOCK_MONOTONIC_RAW a free table is leased to its last holder only: the row comes
-- from a damaged database, and the holder may still use the table.
ALTER TABLE history ADD COLUMN Reserved INTEGER NOT NULL DEFAULT 0 CHECK (typeof(Reserved) = 'integer');
