-- A checksum of what decides in a row, all but the tag: SQLite does not notice when a value is
-- damaged. Rows of other programs have 0, and no Boot.
ALTER TABLE RtTables ADD COLUMN Sum INTEGER NOT NULL DEFAULT 0;
