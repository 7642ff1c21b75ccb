//! SQLite: one file beside its write-ahead log, for one fleet.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteQueryResult, SqliteSynchronous};
use sqlx::{ConnectOptions, Sqlite};

use super::sql::{self, CONNECTION, Dialect, LOCK, Sql};
use super::{Error, Result};

/// Those who read do not wait for who writes; more than these at a time wait for each other.
const READERS: u32 = 4;

impl Dialect for Sqlite {
    const SCHEMA: &'static [&'static str] =
        &[include_str!("schema/sqlite-1.sql"), include_str!("schema/sqlite-2.sql"), include_str!("schema/sqlite-3.sql")];
    const CLAIM: &'static str = "
        WITH free AS MATERIALIZED (
            SELECT id FROM leases
            WHERE due <= (SELECT now FROM clock) AND leased_until <= (SELECT now FROM clock)
            ORDER BY due, id LIMIT $3)
        UPDATE leases SET leased_by = $1, leased_until = (SELECT now FROM clock) + $2, woken = FALSE
        WHERE id IN (SELECT id FROM free) RETURNING id";
    const READ: &'static str = "SELECT version, document FROM sessions WHERE id IN (SELECT value FROM json_each($1))";
    const LOCK: Option<&'static str> = None;
    const RENEW: &'static str = "
        UPDATE leases SET leased_until = (SELECT now FROM clock) + $2
        WHERE leased_by = $1 AND id IN (SELECT value FROM json_each($3))";

    const PUT: &'static str = "
        WITH put AS MATERIALIZED (
            SELECT value->>'id' AS id, value->>'version' AS version, value->>'phase' AS phase, value->>'tenant' AS tenant, value->>'owner' AS owner,
                value->>'provider' AS provider, value->>'over' AS over, value->>'spare' AS spare, value->>'document' AS document
            FROM json_each($1))
        UPDATE sessions
        SET version = put.version + 1, phase = put.phase, tenant = put.tenant, owner = put.owner, provider = put.provider, over = put.over,
            spare = put.spare, changed = (SELECT now FROM clock), document = put.document
        FROM put WHERE sessions.id = put.id AND sessions.version = put.version RETURNING id";
    const BOTH: &'static str = "
        UPDATE sessions
        SET version = version + 1, changed = (SELECT now FROM clock),
            phase = CASE id WHEN $1 THEN $5 ELSE $6 END, over = CASE id WHEN $1 THEN $7 ELSE $8 END,
            spare = CASE id WHEN $1 THEN $9 ELSE $10 END, document = CASE id WHEN $1 THEN $11 ELSE $12 END
        WHERE (id = $1 AND version = $2 OR id = $3 AND version = $4)
          AND 2 = (SELECT count(*) FROM sessions WHERE id = $1 AND version = $2 OR id = $3 AND version = $4)";
    const PRUNE: &'static str = "
        DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE over AND changed < (SELECT now FROM clock) + $1 LIMIT $2)";
    const RELEASE: &'static str = "
        WITH released AS MATERIALIZED (
            SELECT value->>'id' AS id, value->>'fleet' AS fleet, value->>'wake' AS wake FROM json_each($1))
        UPDATE leases
        SET leased_by = NULL, leased_until = 0, woken = FALSE,
            due = CASE WHEN woken THEN (SELECT now FROM clock) ELSE (SELECT now FROM clock) + released.wake END
        FROM released WHERE leases.id = released.id AND leases.leased_by = released.fleet";
    const BOOKED: &'static str = "
        SELECT amounts.tenant, amounts.period, SUM(amounts.nanos) FROM json_each($1) AS booked
        CROSS JOIN amounts ON amounts.tenant = booked.value->>'tenant' AND amounts.period = booked.value->>'period'
            AND amounts.session = booked.value->>'session'
        GROUP BY amounts.tenant, amounts.period";
    const BOOK: &'static str = "
        INSERT INTO amounts (tenant, period, session, nanos, changed)
        SELECT value->>'tenant', value->>'period', value->>'session', value->>'nanos', (SELECT now FROM clock) FROM json_each($1) WHERE TRUE
        ON CONFLICT (tenant, period, session) DO UPDATE SET nanos = excluded.nanos, changed = excluded.changed";
    const SUMS: &'static str = "
        SELECT amounts.tenant, amounts.period, SUM(amounts.nanos) FROM json_each($1) AS wanted
        CROSS JOIN amounts ON amounts.tenant = wanted.value->>'tenant' AND amounts.period = wanted.value->>'period'
        GROUP BY amounts.tenant, amounts.period";

    // In the log of what is written both ways everything is in its order.
    const DURABLY: Option<&'static str> = Some("PRAGMA synchronous = FULL");
    const BY_AND_BY: Option<&'static str> = Some("PRAGMA synchronous = NORMAL");

    const WANT: &'static str = "
        UPDATE sessions SET version = version + 1, changed = (SELECT now FROM clock), document = json_set(document,
            '$.wanted', $2,
            '$.reason', COALESCE(NULLIF($3, ''), json_extract(document, '$.reason')),
            '$.idle_since', CASE WHEN $2 = 'running' AND json_extract(document, '$.idle_since') IS NOT NULL
                THEN $4 ELSE json_extract(document, '$.idle_since') END)
        WHERE id = $1 AND phase NOT IN ('destroyed', 'failed') AND json_extract(document, '$.wanted') <> 'gone'";
    const BORN: &'static str = "SELECT unixepoch(installed_on) FROM _sqlx_migrations WHERE version = 1";

    fn rows(result: &SqliteQueryResult) -> u64 {
        result.rows_affected()
    }
}

/// Nobody else's, and gone with its last user.
pub(super) async fn memory() -> Result<Sql<Sqlite>> {
    let options = SqliteConnectOptions::new().in_memory(true).disable_statement_logging();
    // The one connection is the database.
    let one = SqlitePoolOptions::new().max_connections(1).acquire_timeout(CONNECTION).idle_timeout(None).max_lifetime(None);
    let pool = one.connect_with(options).await.map_err(|error| Error::Store(error.to_string()))?;
    sql::migrate(&pool).await?;
    Ok(Sql::new(pool.clone(), pool))
}

pub(super) async fn file(path: &Path) -> Result<Sql<Sqlite>> {
    let cannot = |error: &dyn std::fmt::Display| Error::Store(format!("cannot open `{}`: {error}", path.display()));
    make(path).map_err(|error| cannot(&error))?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        // An intent is on the disk before what it leads to is done.
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(LOCK)
        .disable_statement_logging();
    let pool = SqlitePoolOptions::new().acquire_timeout(CONNECTION);
    let write = pool.clone().max_connections(1).connect_with(options.clone()).await.map_err(|error| cannot(&error))?;
    sql::migrate(&write).await?;
    let read = pool.max_connections(READERS).connect_with(options.read_only(true)).await.map_err(|error| cannot(&error))?;
    Ok(Sql::new(write, read))
}

/// What is made is its owner's alone: SQLite gives its log the mode of the file.
fn make(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::session::{Session, Wanted};
    use crate::store::Store;

    /// Whether its last statement waited for the disk.
    async fn waited(store: &Sql<Sqlite>) -> bool {
        let (mode,): (i64,) = sqlx::query_as("PRAGMA synchronous").fetch_one(&store.write).await.unwrap();
        mode == 2
    }

    #[tokio::test]
    async fn what_is_promised_waits_for_the_disk_and_what_is_found_out_again_does_not() {
        let store = memory().await.unwrap();
        let mut session: Session = serde_json::from_value(serde_json::json!({
            "id": "a", "tenant": "t", "owner": "ada", "pattern": "ephemeral", "provider": "docker", "generation": 1,
            "spec": { "key": "agent-1", "image": "agent:1", "ttl": { "secs": 600, "nanos": 0 } }, "wanted": "running", "phase": "requested",
            "since": "2026-11-26T12:00:00Z", "created": "2026-11-26T12:00:00Z", "ends": "2026-11-26T13:00:00Z",
        }))
        .unwrap();
        let (id, lease) = (session.id.clone(), Duration::from_secs(30));
        store.insert(&session).await.unwrap();
        assert!(waited(&store).await);
        assert_eq!(store.claim("one", lease, 1).await.unwrap().len(), 1);
        assert!(!waited(&store).await);
        store.update(&mut session).await.unwrap();
        assert!(waited(&store).await, "also after one that did not");
        store.note(&mut session).await.unwrap();
        assert!(!waited(&store).await);
        assert!(store.reserve("t", "2026-11", &id, 1.0, 2.0).await.unwrap());
        assert!(waited(&store).await);
        store.spend("t", "2026-11", &id, 0.5).await.unwrap();
        store.release("one", &id, None).await.unwrap();
        assert!(!waited(&store).await);
        assert!(store.want(&id, Wanted::Gone, "enough", session.created).await.unwrap());
        assert!(waited(&store).await);
    }
}
