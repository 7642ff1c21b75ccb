-- Who drives a session, and when it is to be driven: written more often than all else, and without the document.
CREATE TABLE leases (
    id           TEXT    NOT NULL PRIMARY KEY REFERENCES sessions ON DELETE CASCADE,
    -- NULL: when somebody wakes it.
    due          BIGINT,
    -- Somebody has woken it since it was claimed.
    woken        BOOLEAN NOT NULL DEFAULT FALSE,
    leased_by    TEXT,
    leased_until BIGINT  NOT NULL DEFAULT 0
) WITHOUT ROWID;
INSERT INTO leases (id, due, woken, leased_by, leased_until) SELECT id, due, woken, leased_by, leased_until FROM sessions;
CREATE INDEX leases_due ON leases (due, id) WHERE due IS NOT NULL;

DROP INDEX sessions_due;
DROP INDEX sessions_leased;
ALTER TABLE sessions DROP COLUMN due;
ALTER TABLE sessions DROP COLUMN woken;
ALTER TABLE sessions DROP COLUMN leased_by;
ALTER TABLE sessions DROP COLUMN leased_until;

-- What is new is due at once.
CREATE TRIGGER sessions_new AFTER INSERT ON sessions BEGIN
    INSERT INTO leases (id, due) VALUES (new.id, (SELECT now FROM clock));
END;

-- How many a tenant has is counted for each that it asks for.
CREATE INDEX sessions_tenant ON sessions (tenant) WHERE over = FALSE;
