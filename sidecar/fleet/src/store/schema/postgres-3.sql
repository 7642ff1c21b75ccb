-- Who drives a session, and when it is to be driven: written more often than all else, and without the document. Who claims and renews touches no index, as
-- long as a page has room for another version of its rows.
CREATE TABLE leases (
    id           TEXT    COLLATE "C" NOT NULL PRIMARY KEY REFERENCES sessions ON DELETE CASCADE,
    -- NULL: when somebody wakes it.
    due          BIGINT,
    -- Somebody has woken it since it was claimed.
    woken        BOOLEAN NOT NULL DEFAULT FALSE,
    leased_by    TEXT,
    leased_until BIGINT  NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
INSERT INTO leases (id, due, woken, leased_by, leased_until) SELECT id, due, woken, leased_by, leased_until FROM sessions;
CREATE INDEX leases_due ON leases (due, id) WHERE due IS NOT NULL;

DROP INDEX sessions_due;
DROP INDEX sessions_leased;
ALTER TABLE sessions DROP COLUMN due, DROP COLUMN woken, DROP COLUMN leased_by, DROP COLUMN leased_until;

-- What is new is due at once.
CREATE FUNCTION sessions_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO leases (id, due) VALUES (NEW.id, (SELECT now FROM clock));
    RETURN NULL;
END $$;
CREATE TRIGGER sessions_new AFTER INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION sessions_new();

-- How many a tenant has is counted for each that it asks for.
CREATE INDEX sessions_tenant ON sessions (tenant) WHERE over = FALSE;

-- Rows that are written again and again, in the room that their last versions leave.
ALTER TABLE amounts SET (fillfactor = 70);
