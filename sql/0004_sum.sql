-- A checksum of what decides in a row, all but the tag: SQLite does not notice when a value is
-- damaged. 0 is for rows that other programs write.
ALTER TABLE RtTables ADD COLUMN Sum INTEGER NOT NULL DEFAULT 0;
