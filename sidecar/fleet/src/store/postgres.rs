//! PostgreSQL: for several fleets, which share its sessions by leases.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions, PgQueryResult};
use sqlx::{ConnectOptions, Connection, Executor, Postgres};

use super::sql::{self, CONNECTION, Dialect, Sql};
use super::{Error, Result};

/// Of the hundred that a server gives by default; fleets share them.
const CONNECTIONS: u32 = 8;

/// How long after it was used a connection is taken for granted.
const TRUSTED: Duration = Duration::from_secs(1);

/// How long one more try may take, which only asks what is wrong.
const ASKED_WHY: Duration = Duration::from_secs(2);

/// What a parameter of the URL may be called. The driver would log what it does not know, with its value.
const PARAMETERS: [&str; 15] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "ssl-mode",
    "statement-cache-capacity",
    "user",
];

/// Said on each connection and not at its start, which connection poolers refuse. Less than the bound of ours: the server gives up first. What is reserved
/// relies on each statement seeing what was committed before it.
const SETTINGS: &str = "SET statement_timeout = '10s'; SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = '15s';
     SET default_transaction_isolation = 'read committed'; SET client_min_messages = 'warning'";

impl Dialect for Postgres {
    const SCHEMA: &'static [&'static str] =
        &[include_str!("schema/postgres-1.sql"), include_str!("schema/postgres-2.sql"), include_str!("schema/postgres-3.sql")];
    // Arrays and subqueries where a join would do: a planner that knows nothing yet of a table, or what it was an hour ago, reads all of it to join some rows.
    const CLAIM: &'static str = "
        WITH free AS MATERIALIZED (
            SELECT id FROM leases
            WHERE due <= (SELECT now FROM clock) AND leased_until <= (SELECT now FROM clock)
            ORDER BY due, id LIMIT $3 FOR UPDATE SKIP LOCKED)
        UPDATE leases SET leased_by = $1, leased_until = (SELECT now FROM clock) + $2, woken = FALSE
        WHERE id = ANY (ARRAY(SELECT id FROM free)) RETURNING id";
    const READ: &'static str = "
        SELECT version, document FROM sessions WHERE id = ANY (ARRAY(SELECT json_array_elements_text(CAST($1 AS json))))";
    const LOCK: Option<&'static str> = Some("SELECT pg_advisory_xact_lock(hashtextextended($1, hashtextextended($2, 0)))");
    const RENEW: &'static str = "
        WITH held AS MATERIALIZED (
            SELECT id FROM leases WHERE leased_by = $1 AND id = ANY (ARRAY(SELECT json_array_elements_text(CAST($3 AS json))))
            ORDER BY id FOR UPDATE)
        UPDATE leases SET leased_until = (SELECT now FROM clock) + $2
        WHERE leased_by = $1 AND id = ANY (ARRAY(SELECT id FROM held))";

    const PUT: &'static str = "
        WITH put AS MATERIALIZED (
            SELECT * FROM json_to_recordset(CAST($1 AS json)) AS put (
                id TEXT, version BIGINT, phase TEXT, tenant TEXT, owner TEXT, provider TEXT, over BOOLEAN, spare TEXT, document TEXT,
                durably BOOLEAN)),
        locked AS MATERIALIZED (
            SELECT id FROM sessions
            WHERE id = ANY (ARRAY(SELECT id FROM put))
              AND ((SELECT bool_or(durably) FROM put) OR (SELECT set_config('synchronous_commit', 'off', TRUE)) IS NOT NULL)
            ORDER BY id FOR UPDATE)
        UPDATE sessions
        SET version = put.version + 1, phase = put.phase, tenant = put.tenant, owner = put.owner, provider = put.provider, over = put.over,
            spare = put.spare, changed = (SELECT now FROM clock), document = put.document
        FROM put
        WHERE sessions.id = ANY (ARRAY(SELECT id FROM locked)) AND sessions.id = put.id AND sessions.version = put.version
        RETURNING sessions.id";
    const BOTH: &'static str = "
        WITH locked AS MATERIALIZED (
            SELECT id FROM sessions WHERE id = $1 AND version = $2 OR id = $3 AND version = $4 ORDER BY id FOR UPDATE)
        UPDATE sessions
        SET version = version + 1, changed = (SELECT now FROM clock),
            phase = CASE id WHEN $1 THEN $5 ELSE $6 END, over = CASE id WHEN $1 THEN $7 ELSE $8 END,
            spare = CASE id WHEN $1 THEN $9 ELSE $10 END, document = CASE id WHEN $1 THEN $11 ELSE $12 END
        WHERE id = ANY (ARRAY(SELECT id FROM locked)) AND 2 = (SELECT count(*) FROM locked)";
    const PRUNE: &'static str = "
        WITH old AS MATERIALIZED (
            SELECT id FROM sessions WHERE over AND changed < (SELECT now FROM clock) + $1 LIMIT $2),
        locked AS MATERIALIZED (
            SELECT id FROM sessions WHERE id = ANY (ARRAY(SELECT id FROM old)) ORDER BY id FOR UPDATE)
        DELETE FROM sessions WHERE id = ANY (ARRAY(SELECT id FROM locked))";
    const RELEASE: &'static str = "
        WITH released AS MATERIALIZED (
            SELECT * FROM json_to_recordset(CAST($1 AS json)) AS released (id TEXT, fleet TEXT, wake BIGINT)),
        locked AS MATERIALIZED (
            SELECT id FROM leases
            WHERE id = ANY (ARRAY(SELECT id FROM released)) AND (SELECT set_config('synchronous_commit', 'off', TRUE)) IS NOT NULL
            ORDER BY id FOR UPDATE)
        UPDATE leases
        SET leased_by = NULL, leased_until = 0, woken = FALSE,
            due = CASE WHEN woken THEN (SELECT now FROM clock) ELSE (SELECT now FROM clock) + released.wake END
        FROM released
        WHERE leases.id = ANY (ARRAY(SELECT id FROM locked)) AND leases.id = released.id AND leases.leased_by = released.fleet";
    const BOOKED: &'static str = "
        SELECT tenant, period, CAST(SUM(was.nanos) AS BIGINT)
        FROM json_to_recordset(CAST($1 AS json)) AS booked (tenant TEXT, period TEXT, session TEXT)
        CROSS JOIN LATERAL (
            SELECT nanos FROM amounts
            WHERE amounts.tenant = booked.tenant AND amounts.period = booked.period AND amounts.session = booked.session LIMIT 1) AS was
        GROUP BY tenant, period";
    // For a minute it stays as old as it was: who writes it again then touches no index.
    const BOOK: &'static str = "
        INSERT INTO amounts (tenant, period, session, nanos, changed)
        SELECT tenant, period, session, nanos, (SELECT now FROM clock)
        FROM json_to_recordset(CAST($1 AS json)) AS booked (tenant TEXT, period TEXT, session TEXT, nanos BIGINT)
        WHERE (SELECT set_config('synchronous_commit', 'off', TRUE)) IS NOT NULL
        ORDER BY tenant, period, session
        ON CONFLICT (tenant, period, session) DO UPDATE SET nanos = excluded.nanos,
            changed = CASE WHEN excluded.changed < amounts.changed + 60000 THEN amounts.changed ELSE excluded.changed END";
    const SUMS: &'static str = "
        SELECT tenant, period, CAST(sum.nanos AS BIGINT)
        FROM json_to_recordset(CAST($1 AS json)) AS wanted (tenant TEXT, period TEXT)
        CROSS JOIN LATERAL (
            SELECT SUM(nanos) AS nanos FROM amounts WHERE amounts.tenant = wanted.tenant AND amounts.period = wanted.period) AS sum
        WHERE sum.nanos IS NOT NULL";

    // It waits for the disk once for all who write at the same time. What is written by and by, and is not a lease, says so itself, for its own transaction:
    // said of a connection it would stay with one that is pooled.
    const DURABLY: Option<&'static str> = None;
    const BY_AND_BY: Option<&'static str> = None;

    const WANT: &'static str = "
        UPDATE sessions SET version = version + 1, changed = (SELECT now FROM clock), document = (document::jsonb || jsonb_build_object(
            'wanted', $2::text,
            'reason', COALESCE(NULLIF($3::text, ''), document::jsonb->>'reason'),
            'idle_since', CASE WHEN $2::text = 'running' AND document::jsonb->>'idle_since' IS NOT NULL
                THEN $4::text ELSE document::jsonb->>'idle_since' END))::text
        WHERE id = $1 AND phase NOT IN ('destroyed', 'failed') AND document::jsonb->>'wanted' <> 'gone'";
    const BORN: &'static str =
        "SELECT CAST(floor(extract(epoch FROM installed_on)) AS BIGINT) FROM _sqlx_migrations WHERE version = 1";

    fn rows(result: &PgQueryResult) -> u64 {
        result.rows_affected()
    }
}

/// # Errors
/// What is wrong with it, without it: a password may be in it.
pub(crate) fn options(url: &str) -> std::result::Result<PgConnectOptions, String> {
    if let Some(unknown) = unknown_parameter(url) {
        return Err(format!("PostgreSQL has no parameter `{unknown}`"));
    }
    let options: PgConnectOptions =
        url.parse().map_err(|error: sqlx::Error| format!("cannot read the URL of PostgreSQL: {error}"))?;
    Ok(options.disable_statement_logging())
}

pub(super) async fn connect(url: &str) -> Result<Sql<Postgres>> {
    let options = options(url).map_err(Error::Store)?;
    let place = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(CONNECTION)
        // Not before each statement: one that was just used is there.
        .test_before_acquire(false)
        .before_acquire(|connection, used| {
            Box::pin(async move {
                if used.idle_for >= TRUSTED {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .after_connect(|connection, _| Box::pin(async move { connection.execute(SETTINGS).await.map(drop) }));
    let pool = match pool.connect_with(options.clone()).await {
        Ok(pool) => pool,
        Err(error) => {
            let why = why(error, &options).await;
            return Err(Error::Store(format!("cannot connect to PostgreSQL at {place}: {why}")));
        }
    };
    sql::migrate(&pool).await?;
    Ok(Sql::new(pool.clone(), pool))
}

/// A pool tries again until its time is over, and knows no more than that then: one that is asked alone says why.
async fn why(error: sqlx::Error, options: &PgConnectOptions) -> String {
    if !matches!(error, sqlx::Error::PoolTimedOut) {
        return error.to_string();
    }
    match tokio::time::timeout(ASKED_WHY, PgConnection::connect_with(options)).await {
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(_)) | Err(_) => format!("no answer within {} s", CONNECTION.as_secs()),
    }
}

fn unknown_parameter(url: &str) -> Option<&str> {
    let (_, query) = url.split_once('?')?;
    let names = query.split('&').map(|pair| pair.split('=').next().unwrap_or(pair));
    names.into_iter().find(|name| !name.is_empty() && !PARAMETERS.contains(name) && !name.starts_with("options["))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn why_nobody_can_be_reached_is_said_and_not_only_that_a_pool_has_waited() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let options = options(&format!("postgres://fleet@{}/fleet?sslmode=disable", taken.local_addr().unwrap())).unwrap();
        drop(taken);
        let said = why(sqlx::Error::PoolTimedOut, &options).await;
        assert!(said.contains("Connection refused"), "{said}");
    }
}
