-- Times are milliseconds since 1970 by this database's own clock.
CREATE VIEW clock AS SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now;

CREATE TABLE sessions (
    id           TEXT    NOT NULL PRIMARY KEY,
    version      BIGINT  NOT NULL,
    phase        TEXT    NOT NULL,
    tenant       TEXT    NOT NULL,
    owner        TEXT    NOT NULL,
    provider     TEXT    NOT NULL,
    over         BOOLEAN NOT NULL,
    changed      BIGINT  NOT NULL,
    -- When it is to be driven; NULL: when somebody wakes it.
    due          BIGINT,
    -- Somebody has woken it since it was claimed.
    woken        BOOLEAN NOT NULL DEFAULT FALSE,
    leased_by    TEXT,
    leased_until BIGINT  NOT NULL DEFAULT 0,
    -- All of it, as JSON: the columns above are what is searched for.
    document     TEXT    NOT NULL
);
CREATE INDEX sessions_due ON sessions (due, leased_until) WHERE due IS NOT NULL;
CREATE INDEX sessions_leased ON sessions (leased_by) WHERE leased_by IS NOT NULL;
CREATE INDEX sessions_over ON sessions (changed) WHERE over;

CREATE TABLE hook_runs (
    seq      INTEGER PRIMARY KEY,
    session  TEXT    NOT NULL REFERENCES sessions ON DELETE CASCADE,
    document TEXT    NOT NULL
);
CREATE INDEX hook_runs_session ON hook_runs (session, seq);

-- What sessions have set aside and spent, in billionths of a USD: whole numbers, whose sums are exact.
CREATE TABLE amounts (
    tenant  TEXT   NOT NULL,
    period  TEXT   NOT NULL,
    session TEXT   NOT NULL,
    nanos   BIGINT NOT NULL,
    changed BIGINT NOT NULL,
    PRIMARY KEY (tenant, period, session)
);
CREATE INDEX amounts_changed ON amounts (changed);
