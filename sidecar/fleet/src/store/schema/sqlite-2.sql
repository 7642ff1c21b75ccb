-- Whose containers were made ahead and wait: which sessions they fit.
ALTER TABLE sessions ADD COLUMN spare TEXT;
CREATE INDEX sessions_spare ON sessions (spare) WHERE spare IS NOT NULL;

-- What one fleet does for all of them.
CREATE TABLE duties (
    name       TEXT   NOT NULL PRIMARY KEY,
    held_by    TEXT   NOT NULL,
    held_until BIGINT NOT NULL
);

-- Where nothing new is made, and until when what works there may go on.
CREATE TABLE drains (
    provider TEXT NOT NULL PRIMARY KEY,
    until    TEXT NOT NULL
);

-- What has changed since: who listens to events asks all the time.
CREATE INDEX sessions_changed ON sessions (changed, id);
