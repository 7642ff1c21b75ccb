//! The store in SQL, the same for SQLite and PostgreSQL. What differs between them is in their schemas (a view that is the clock, an order of ids) and in
//! [`Dialect`].
//!
//! What comes at the same time is written by one statement ([`Together`]). Each operation is one statement where it can be: a transaction of SQLite that a full disk ends is not over for the driver, which takes what is written
//! after it for committed. Each has a bound in time. One that fails may have been done: who asks again finds out, by the version, the id or the amount.

use std::collections::{BTreeMap, BTreeSet};
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::FutureExt;
use jiff::Timestamp;
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::pool::PoolConnection;
use sqlx::query::Query;
use sqlx::{ColumnIndex, Database, Decode, Encode, Executor, IntoArguments, Pool, SqlSafeStr, Type};
use tracing::error;

use super::together::Together;
use super::{Error, Filter, HOOK_RUNS_MOST, HookRun, Inserted, Result, SPENT_KEPT, SUMS_HOLD, Store, Within};
use crate::lifecycle::Phase;
use crate::session::{Session, SessionId, Wanted};

/// What waits for its connection, for a lock and for the disk in turn is given up after this.
const BOUND: Duration = Duration::from_secs(20);
/// How long a connection is waited for: a thousand who write at once wait for each other on a slow disk.
pub(super) const CONNECTION: Duration = Duration::from_secs(10);
/// How long somebody else's lock is waited for.
pub(super) const LOCK: Duration = Duration::from_secs(5);
/// How many rows are forgotten at a time: the others need the store too.
const PRUNED_AT_ONCE: i64 = 200;
/// What no lease and no delay is longer than, in milliseconds: sums of two still fit.
const LONGEST: i64 = 1 << 52;

/// What the two say differently.
pub(super) trait Dialect: Database {
    /// By version, from 1.
    const SCHEMA: &'static [&'static str];
    /// Leases what is free and due: by whom, for how many milliseconds, at most how many. Which these are.
    const CLAIM: &'static str;
    /// The sessions in an array of JSON.
    const READ: &'static str;
    /// Makes who reserves for a tenant in a period wait for who does, to the end of the transaction. `None`: one statement sees what all others have done.
    const LOCK: Option<&'static str>;
    /// Renews the leases of one, for so many milliseconds, of the sessions in an array of JSON.
    const RENEW: &'static str;
    /// Writes sessions ([`Put`] in an array of JSON) whose version is the one that was read. Which these are. Those that are written, released or renewed
    /// together are locked in the order of their ids, and who claims waits for no lock: these do not wait for each other in a circle.
    const PUT: &'static str;
    /// Writes two whose versions are those that were read, or neither, locked in the same order: their ids and versions, and by turns what is written of them.
    const BOTH: &'static str;
    /// Forgets what is over and has not changed for so many milliseconds (less than nothing), at most how many, locked in the same order.
    const PRUNE: &'static str;
    /// Lets go of what is held ([`Release`] in an array of JSON).
    const RELEASE: &'static str;
    /// Of amounts ([`Amount`] in an array of JSON): what is there in their place, in all, by tenant and period; writes them; and the sums of those tenants
    /// and periods.
    const BOOKED: &'static str;
    const BOOK: &'static str;
    const SUMS: &'static str;

    /// Said before a statement whose writing is on the disk when it is done; and before one whose is with the next that is. `None`: there is nothing to say.
    const DURABLY: Option<&'static str>;
    const BY_AND_BY: Option<&'static str>;

    /// Writes into a document, of the session: what is wanted, why (or nothing), and what time it is.
    const WANT: &'static str;
    /// When the first schema came, in whole seconds since 1970, rounded down.
    const BORN: &'static str;

    fn rows(result: &Self::QueryResult) -> u64;
}

pub(super) struct Sql<DB: Database> {
    /// Where it is written, and where it is read: SQLite has one writer, who does not keep readers waiting.
    pub(super) write: Pool<DB>,
    pub(super) read: Pool<DB>,
    /// What each has claimed and has not let go of. Nothing else is renewed: a claim whose answer was lost, and a release that did not come through, end with
    /// their leases.
    held: Mutex<BTreeMap<String, BTreeSet<SessionId>>>,
    puts: Together<Put, Result<bool>>,
    releases: Together<Release, Result<()>>,
    books: Together<Vec<Amount>, Result<Vec<i64>>>,
    /// What is set aside and spent, by tenant and period, and when that was read. Only who has the turn of `books` writes amounts, and these.
    sums: Mutex<BTreeMap<(String, String), (i64, Instant)>>,
}

/// A session as it is written, in the place of the version that was read.
#[derive(Clone, serde::Serialize)]
pub(super) struct Put {
    id: String,
    version: i64,
    phase: &'static str,
    tenant: String,
    owner: String,
    provider: String,
    over: bool,
    spare: Option<String>,
    document: String,
    durably: bool,
}

/// That one lets go of a session, which is due after so many milliseconds.
#[derive(Clone, serde::Serialize)]
pub(super) struct Release {
    id: String,
    fleet: String,
    wake: Option<i64>,
}

/// What a session has spent in a period.
#[derive(Clone, serde::Serialize)]
pub(super) struct Amount {
    tenant: String,
    period: String,
    session: String,
    nanos: i64,
}

impl<DB: Database> Sql<DB> {
    pub(super) fn new(write: Pool<DB>, read: Pool<DB>) -> Self {
        let (puts, releases, books) = (Together::new(), Together::new(), Together::new());
        Self { write, read, held: Mutex::default(), puts, releases, books, sums: Mutex::default() }
    }

    /// A connection that writes so.
    async fn so(&self, mode: Option<&'static str>) -> sqlx::Result<PoolConnection<DB>>
    where
        for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
        DB::Arguments: IntoArguments<DB>,
    {
        let mut connection = self.write.acquire().await?;
        if let Some(mode) = mode {
            // Always said, as who wrote before may have been given up half-way.
            sqlx::query::<DB>(mode).execute(&mut *connection).await?;
        }
        Ok(connection)
    }

    /// Writes what somebody is told of, or what is done about it, when it is written: it is on the disk then.
    async fn durably<'q>(&self, write: Query<'q, DB, DB::Arguments>) -> Result<u64>
    where
        DB: Dialect,
        for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
        DB::Arguments: IntoArguments<DB>,
    {
        bounded(async { Ok(DB::rows(&write.execute(&mut *self.so(DB::DURABLY).await?).await?)) }).await
    }

    /// Writes what is found out again if it is lost: leases, what was seen, sums of what is kept elsewhere. A machine that loses its power, or a server that
    /// crashes, may lose the last of it, and never what is older than something that was kept durably; a process of ours that dies loses nothing. With a server
    /// leases last: it may come back while who has them lives.
    async fn by_and_by<'q>(&self, write: Query<'q, DB, DB::Arguments>) -> Result<u64>
    where
        DB: Dialect,
        for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
        DB::Arguments: IntoArguments<DB>,
    {
        bounded(async { Ok(DB::rows(&write.execute(&mut *self.so(DB::BY_AND_BY).await?).await?)) }).await
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, BTreeSet<SessionId>>> {
        // Whole in every state.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sums(&self) -> MutexGuard<'_, BTreeMap<(String, String), (i64, Instant)>> {
        // Likewise.
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings the schema up to ours.
pub(super) async fn migrate<DB>(pool: &Pool<DB>) -> Result<()>
where
    DB: Dialect,
    DB::Connection: sqlx::migrate::Migrate,
{
    let ours = DB::SCHEMA
        .iter()
        .zip(1..)
        .map(|(sql, version)| Migration::new(version, "agent-fleet".into(), MigrationType::Simple, (*sql).into_sql_str(), false));
    let migrator = Migrator::with_migrations(ours.collect());
    let newest = DB::SCHEMA.len();
    match tokio::time::timeout(BOUND, migrator.run(pool)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(MigrateError::VersionMissing(theirs))) => Err(Error::Store(format!(
            "its schema is version {theirs}, of a newer agent-fleet; this one knows {newest} and does not go back"
        ))),
        Ok(Err(error)) => Err(Error::Store(format!("its schema cannot be brought to version {newest}: {error}"))),
        Err(_) => Err(late()),
    }
}

fn late() -> Error {
    Error::Store(format!("no answer within {} s", BOUND.as_secs()))
}

async fn bounded<T>(work: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    match tokio::time::timeout(BOUND, work).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(late()),
    }
}

fn failed(error: sqlx::Error) -> Error {
    Error::Store(message(error))
}

fn message(error: sqlx::Error) -> String {
    match error {
        sqlx::Error::PoolTimedOut => format!("no connection within {} s", CONNECTION.as_secs()),
        error => error.to_string(),
    }
}

fn read_session((version, document): (i64, String)) -> Result<Session> {
    let mut session: Session = serde_json::from_str(&document).map_err(|error| unreadable(&error))?;
    session.version = version;
    Ok(session)
}

fn unreadable(error: &serde_json::Error) -> Error {
    Error::Store(format!("a document in it has not the shape that this agent-fleet knows: {error}"))
}

fn document(what: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(what).map_err(|error| Error::Store(format!("cannot be written as JSON: {error}")))
}

/// What a new session is written with.
fn written<'q, DB: Database>(sql: &'static str, session: &'q Session) -> Result<Query<'q, DB, DB::Arguments>>
where
    for<'b> i64: Encode<'b, DB> + Type<DB>,
    for<'b> bool: Encode<'b, DB> + Type<DB>,
    for<'b> &'b str: Encode<'b, DB> + Type<DB>,
    for<'b> String: Encode<'b, DB> + Type<DB>,
    for<'b> Option<&'b str>: Encode<'b, DB> + Type<DB>,
{
    Ok(sqlx::query::<DB>(sql)
        .bind(session.id.as_str())
        .bind(session.version)
        .bind(session.phase.as_str())
        .bind(session.tenant.as_str())
        .bind(session.owner.as_str())
        .bind(session.provider.as_str())
        .bind(session.is_over())
        .bind(session.spare())
        .bind(document(session)?))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).map_or(LONGEST, |millis| millis.min(LONGEST))
}

/// From now, rounded up: what is due then is not due before. Times come by the caller's clock and are kept by the store's; what passes between is the same.
fn until(at: Timestamp) -> i64 {
    let nanos = at.as_nanosecond() - Timestamp::now().as_nanosecond();
    // The store's clock tells whole milliseconds, and may be behind by one.
    let millis = nanos.div_euclid(1_000_000) + i128::from(nanos.rem_euclid(1_000_000) != 0) + i128::from(nanos > 0);
    // More than a thousand years of milliseconds fit many times.
    i64::try_from(millis).unwrap_or(LONGEST)
}

/// Less than nothing, and what is no number, is nothing; more than a billion is a billion, so that sums of some are numbers.
#[expect(clippy::cast_possible_truncation, reason = "a billion of billionths fits nine times")]
fn nanos(usd: f64) -> i64 {
    (usd.clamp(0.0, 1e9) * 1e9).round() as i64
}

#[expect(clippy::cast_precision_loss, reason = "billionths of a USD are exact up to nine million")]
fn dollars(nanos: i64) -> f64 {
    nanos as f64 / 1e9
}

impl<DB> Sql<DB>
where
    DB: Dialect,
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
    usize: ColumnIndex<DB::Row>,
    for<'q> i64: Encode<'q, DB> + Decode<'q, DB> + Type<DB>,
    for<'q> bool: Encode<'q, DB> + Type<DB>,
    for<'q> &'q str: Encode<'q, DB> + Type<DB>,
    for<'q> String: Encode<'q, DB> + Decode<'q, DB> + Type<DB>,
    for<'q> Option<i64>: Encode<'q, DB> + Type<DB>,
    for<'q> Option<&'q str>: Encode<'q, DB> + Type<DB>,
{
    async fn put(&self, session: &mut Session, durably: bool) -> Result<()> {
        let next = Session { version: session.version + 1, ..session.clone() };
        let put = Put {
            id: next.id.to_string(),
            version: session.version,
            phase: next.phase.as_str(),
            spare: next.spare().map(str::to_owned),
            over: next.is_over(),
            document: document(&next)?,
            tenant: next.tenant,
            owner: next.owner,
            provider: next.provider,
            durably,
        };
        if together(self.puts.add(&session.id, put, |puts| self.put_all(puts).boxed())).await? {
            session.version = next.version;
            return Ok(());
        }
        Err(match self.get(&session.id).await? {
            Some(_) => Error::Conflict(session.id.clone()),
            None => Error::Missing(session.id.clone()),
        })
    }

    async fn put_all(&self, puts: Vec<Put>) -> Vec<Result<bool>> {
        if let Some(answers) = of_all(self.put_some(&puts).await, puts.len()) {
            return answers;
        }
        let mut answers = Vec::new();
        for put in &puts {
            answers.push(of_one(self.put_some(slice::from_ref(put)).await));
        }
        answers
    }

    /// Whether each was the version that was read, and is written.
    async fn put_some(&self, puts: &[Put]) -> sqlx::Result<Vec<bool>> {
        let mode = if puts.iter().any(|put| put.durably) { DB::DURABLY } else { DB::BY_AND_BY };
        let rows = sqlx::query_as::<DB, (String,)>(DB::PUT).bind(array(puts)).fetch_all(&mut *self.so(mode).await?).await?;
        let written: BTreeSet<String> = rows.into_iter().map(|(id,)| id).collect();
        Ok(puts.iter().map(|put| written.contains(&put.id)).collect())
    }

    async fn release_all(&self, releases: Vec<Release>) -> Vec<Result<()>> {
        if let Some(answers) = of_all(self.release_some(&releases).await, releases.len()) {
            return answers;
        }
        let mut answers = Vec::new();
        for release in &releases {
            answers.push(of_one(self.release_some(slice::from_ref(release)).await));
        }
        answers
    }

    async fn release_some(&self, releases: &[Release]) -> sqlx::Result<Vec<()>> {
        sqlx::query::<DB>(DB::RELEASE).bind(array(releases)).execute(&mut *self.so(DB::BY_AND_BY).await?).await?;
        Ok(vec![(); releases.len()])
    }

    async fn book_all(&self, books: Vec<Vec<Amount>>) -> Vec<Result<Vec<i64>>> {
        if let Some(answers) = of_all(self.book_some(&books).await, books.len()) {
            return answers;
        }
        let mut answers = Vec::new();
        for book in &books {
            answers.push(of_one(self.book_some(slice::from_ref(book)).await));
        }
        answers
    }

    /// The sums after it, of each.
    async fn book_some(&self, books: &[Vec<Amount>]) -> sqlx::Result<Vec<Vec<i64>>> {
        let key = |amount: &Amount| (amount.tenant.clone(), amount.period.clone());
        let amounts: Vec<&Amount> = books.iter().flatten().collect();
        let wanted: BTreeSet<(String, String)> = amounts.iter().map(|amount| key(amount)).collect();
        // Nothing is known of them until it is known what was written.
        let mut known: BTreeMap<_, _> = {
            let mut sums = self.sums();
            sums.retain(|_, (_, read)| read.elapsed() < SUMS_HOLD);
            wanted.iter().filter_map(|key| sums.remove_entry(key)).collect()
        };
        let mut connection = self.so(DB::BY_AND_BY).await?;
        let rows = array(&amounts);
        if !known.is_empty() {
            let booked = sqlx::query_as::<DB, (String, String, i64)>(DB::BOOKED).bind(rows.clone());
            let booked = booked.fetch_all(&mut *connection).await?;
            let less = booked.into_iter().map(|(tenant, period, nanos)| ((tenant, period), -nanos));
            for (key, more) in less.chain(amounts.iter().map(|amount| (key(amount), amount.nanos))) {
                if let Some((sum, _)) = known.get_mut(&key) {
                    *sum = sum.saturating_add(more);
                }
            }
        }
        sqlx::query::<DB>(DB::BOOK).bind(rows).execute(&mut *connection).await?;
        let unknown = wanted.into_iter().filter(|key| !known.contains_key(key));
        let unknown: Vec<_> = unknown.map(|(tenant, period)| serde_json::json!({"tenant": tenant, "period": period})).collect();
        if !unknown.is_empty() {
            let read = Instant::now();
            let sums = sqlx::query_as::<DB, (String, String, i64)>(DB::SUMS).bind(array(&unknown));
            let sums = sums.fetch_all(&mut *connection).await?;
            known.extend(sums.into_iter().map(|(tenant, period, nanos)| ((tenant, period), (nanos, read))));
        }
        let sum = |amount: &Amount| known.get(&key(amount)).map_or(0, |(nanos, _)| *nanos);
        let answers = books.iter().map(|book| book.iter().map(sum).collect()).collect();
        self.sums().extend(known);
        Ok(answers)
    }
}

/// `None`: the database has said no, and has written nothing of it. What cannot be written is no reason for the others not to be: then each goes alone.
fn of_all<R>(written: sqlx::Result<Vec<R>>, n: usize) -> Option<Vec<Result<R>>> {
    match written {
        Ok(answers) => Some(answers.into_iter().map(Ok).collect()),
        Err(sqlx::Error::Database(_)) if n > 1 => None,
        Err(error) => {
            let what = message(error);
            Some((0..n).map(|_| Err(Error::Store(what.clone()))).collect())
        }
    }
}

fn of_one<R>(written: sqlx::Result<Vec<R>>) -> Result<R> {
    written.map_err(failed)?.pop().ok_or_else(late)
}

/// What is written with others', within the bound.
async fn together<R>(added: impl Future<Output = Option<Result<R>>>) -> Result<R> {
    match tokio::time::timeout(BOUND, added).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Err(Error::Store(String::from("who wrote it was given up"))),
        Err(_) => Err(late()),
    }
}

fn array<T: serde::Serialize>(rows: &[T]) -> String {
    // Strings and numbers can always be written.
    serde_json::to_string(rows).unwrap_or_default()
}

#[async_trait]
impl<DB> Store for Sql<DB>
where
    DB: Dialect,
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
    usize: ColumnIndex<DB::Row>,
    for<'q> i64: Encode<'q, DB> + Decode<'q, DB> + Type<DB>,
    for<'q> bool: Encode<'q, DB> + Type<DB>,
    for<'q> &'q str: Encode<'q, DB> + Type<DB>,
    for<'q> String: Encode<'q, DB> + Decode<'q, DB> + Type<DB>,
    for<'q> Option<i64>: Encode<'q, DB> + Type<DB>,
    for<'q> Option<&'q str>: Encode<'q, DB> + Type<DB>,
{
    async fn insert(&self, session: &Session) -> Result<Inserted> {
        let write = written(
            "INSERT INTO sessions (id, version, phase, tenant, owner, provider, over, spare, changed, document)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, (SELECT now FROM clock), $9)
             ON CONFLICT (id) DO NOTHING",
            session,
        )?;
        if self.durably(write).await? == 1 {
            return Ok(Inserted::New);
        }
        // Nobody sees it if it was pruned in between.
        let known = self.get(&session.id).await?.ok_or_else(|| Error::Conflict(session.id.clone()))?;
        Ok(Inserted::Known(Box::new(known)))
    }

    async fn insert_within(&self, session: &Session, within: Within<'_>) -> Result<Option<Inserted>> {
        // What nobody has asked for has no owner.
        let (write, of) = match within {
            Within::Tenant(most) => {
                let write = written(
                    "INSERT INTO sessions (id, version, phase, tenant, owner, provider, over, spare, changed, document)
                     SELECT $1, $2, $3, $4, $5, $6, $7, $8, (SELECT now FROM clock), $9
                     WHERE $10 > (SELECT count(*) FROM sessions
                                  WHERE tenant = $4 AND over = FALSE AND owner <> '' AND phase NOT IN ('destroyed', 'failed'))
                     ON CONFLICT (id) DO NOTHING",
                    session,
                )?;
                (write.bind(i64::try_from(most).unwrap_or(i64::MAX)), session.tenant.as_str())
            }
            Within::Beside(known) => {
                let write = written(
                    "INSERT INTO sessions (id, version, phase, tenant, owner, provider, over, spare, changed, document)
                     SELECT $1, $2, $3, $4, $5, $6, $7, $8, (SELECT now FROM clock), $9
                     WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE spare = $8 AND $10 NOT LIKE '%,' || id || ',%')
                     ON CONFLICT (id) DO NOTHING",
                    session,
                )?;
                let known: String = known.iter().map(|id| format!(",{id},")).collect();
                (write.bind(known), session.spare().unwrap_or_default())
            }
        };
        let rows = match DB::LOCK {
            None => self.durably(write).await?,
            Some(lock) => {
                let locked = async {
                    let mut transaction = self.write.begin().await?;
                    // No period is called so.
                    sqlx::query::<DB>(lock).bind(of).bind("sessions").execute(&mut *transaction).await?;
                    let written = write.execute(&mut *transaction).await?;
                    transaction.commit().await?;
                    Ok(DB::rows(&written))
                };
                bounded(locked).await?
            }
        };
        if rows == 1 {
            return Ok(Some(Inserted::New));
        }
        Ok(self.get(&session.id).await?.map(|known| Inserted::Known(Box::new(known))))
    }

    async fn get(&self, id: &SessionId) -> Result<Option<Session>> {
        let found = sqlx::query_as("SELECT version, document FROM sessions WHERE id = $1").bind(id.as_str());
        bounded(found.fetch_optional(&self.read)).await?.map(read_session).transpose()
    }

    async fn update(&self, session: &mut Session) -> Result<()> {
        self.put(session, true).await
    }

    async fn note(&self, session: &mut Session) -> Result<()> {
        self.put(session, false).await
    }

    async fn want(&self, id: &SessionId, wanted: Wanted, why: &str, now: Timestamp) -> Result<bool> {
        let (wanted, why) = match wanted {
            Wanted::Running => ("running", ""),
            Wanted::Paused => ("paused", ""),
            Wanted::Gone => ("gone", why),
        };
        let write = sqlx::query::<DB>(DB::WANT).bind(id.as_str()).bind(wanted).bind(why).bind(now.to_string());
        Ok(self.durably(write).await? == 1)
    }

    async fn update_both(&self, one: &mut Session, other: &mut Session) -> Result<()> {
        let next = |session: &Session| Session { version: session.version + 1, ..session.clone() };
        let (this, that) = (next(one), next(other));
        let write = sqlx::query::<DB>(DB::BOTH)
            .bind(one.id.as_str())
            .bind(one.version)
            .bind(other.id.as_str())
            .bind(other.version)
            .bind(this.phase.as_str())
            .bind(that.phase.as_str())
            .bind(this.is_over())
            .bind(that.is_over())
            .bind(this.spare())
            .bind(that.spare())
            .bind(document(&this)?)
            .bind(document(&that)?);
        let rows = self.durably(write).await?;
        if rows != 2 {
            return Err(Error::Conflict(one.id.clone()));
        }
        (one.version, other.version) = (this.version, that.version);
        Ok(())
    }

    async fn spares(&self, kind: &str, most: usize) -> Result<Vec<Session>> {
        let found = sqlx::query_as("SELECT version, document FROM sessions WHERE spare = $1 ORDER BY random() LIMIT $2")
            .bind(kind)
            .bind(i64::try_from(most).unwrap_or(i64::MAX));
        bounded(found.fetch_all(&self.read)).await?.into_iter().map(read_session).collect()
    }

    async fn list(&self, filter: &Filter, after: Option<&SessionId>, most: usize) -> Result<Vec<Session>> {
        let phases: String = filter.phases.iter().map(|phase| format!(",{phase},")).collect();
        let found = sqlx::query_as(
            "SELECT version, document FROM sessions
             WHERE id > $1 AND (over = FALSE OR $2)
               AND ($3 IS NULL OR owner = $3) AND ($4 IS NULL OR tenant = $4) AND ($5 IS NULL OR provider = $5)
               AND ($6 = '' OR $6 LIKE '%,' || phase || ',%')
             ORDER BY id LIMIT $7",
        )
        .bind(after.map_or("", SessionId::as_str))
        .bind(filter.over)
        .bind(filter.owner.as_deref())
        .bind(filter.tenant.as_deref())
        .bind(filter.provider.as_deref())
        .bind(phases)
        .bind(i64::try_from(most).unwrap_or(i64::MAX));
        bounded(found.fetch_all(&self.read)).await?.into_iter().map(read_session).collect()
    }

    async fn count(&self) -> Result<Vec<(Phase, String, String, u64)>> {
        let found = sqlx::query_as::<DB, (String, String, String, i64)>(
            "SELECT phase, provider, tenant, count(*) FROM sessions GROUP BY phase, provider, tenant ORDER BY phase, provider, tenant",
        );
        let known = |word: &str| Phase::ALL.into_iter().find(|phase| phase.as_str() == word);
        bounded(found.fetch_all(&self.read))
            .await?
            .into_iter()
            .map(|(word, provider, tenant, n)| {
                let phase = known(&word).ok_or_else(|| Error::Store(format!("there is no phase `{word}`")))?;
                Ok((phase, provider, tenant, n.unsigned_abs()))
            })
            .collect()
    }

    async fn claim(&self, fleet: &str, lease: Duration, most: usize) -> Result<Vec<Session>> {
        let free = sqlx::query_as::<DB, (String,)>(DB::CLAIM)
            .bind(fleet)
            .bind(millis(lease))
            .bind(i64::try_from(most).unwrap_or(i64::MAX));
        let claimed = bounded(async {
            let mut connection = self.so(DB::BY_AND_BY).await?;
            let claimed: Vec<String> = free.fetch_all(&mut *connection).await?.into_iter().map(|(id,)| id).collect();
            if claimed.is_empty() {
                return Ok(Vec::new());
            }
            // Read when they are ours: whoever was woken before that is seen as who woke it has left it.
            sqlx::query_as::<DB, (i64, String)>(DB::READ).bind(array(&claimed)).fetch_all(&mut *connection).await
        });
        let claimed = claimed.await?;
        // One that a newer fleet has written, and we cannot read, is left to it: the others are driven.
        let read = |row| read_session(row).inspect_err(|error| error!(%error, "a session is not driven")).ok();
        let claimed: Vec<Session> = claimed.into_iter().filter_map(read).collect();
        self.held().entry(fleet.to_owned()).or_default().extend(claimed.iter().map(|session| session.id.clone()));
        Ok(claimed)
    }

    async fn renew(&self, fleet: &str, lease: Duration) -> Result<u64> {
        let held = document(&self.held().get(fleet).into_iter().flatten().collect::<Vec<_>>())?;
        let write = sqlx::query::<DB>(DB::RENEW).bind(fleet).bind(millis(lease)).bind(held);
        Ok(self.by_and_by(write).await?)
    }

    async fn release(&self, fleet: &str, id: &SessionId, wake: Option<Timestamp>) -> Result<()> {
        if let Some(held) = self.held().get_mut(fleet) {
            held.remove(id);
        }
        let release = Release { id: id.to_string(), fleet: fleet.to_owned(), wake: wake.map(until) };
        together(self.releases.add(id, release, |releases| self.release_all(releases).boxed())).await
    }

    async fn wake(&self, id: &SessionId) -> Result<()> {
        // What is due already keeps its place among the others.
        let write = sqlx::query::<DB>(
            "UPDATE leases
             SET woken = TRUE, due = CASE WHEN due <= (SELECT now FROM clock) THEN due ELSE (SELECT now FROM clock) END
             WHERE id = $1",
        )
        .bind(id.as_str());
        match self.by_and_by(write).await? {
            0 => Err(Error::Missing(id.clone())),
            _ => Ok(()),
        }
    }

    async fn reserve(&self, tenant: &str, period: &str, session: &SessionId, usd: f64, limit_usd: f64) -> Result<bool> {
        let reserve = sqlx::query::<DB>(
            "INSERT INTO amounts (tenant, period, session, nanos, changed)
             SELECT $1, $2, $3, $4, (SELECT now FROM clock)
             WHERE $4 + (SELECT COALESCE(SUM(nanos), 0) FROM amounts WHERE tenant = $1 AND period = $2 AND session <> $3) <= $5
             ON CONFLICT (tenant, period, session) DO UPDATE SET nanos = excluded.nanos, changed = excluded.changed",
        )
        .bind(tenant)
        .bind(period)
        .bind(session.as_str())
        .bind(nanos(usd))
        .bind(nanos(limit_usd));
        // Nobody books meanwhile: what is known of the sum is no longer so.
        let turn = tokio::time::timeout(BOUND, self.books.hold()).await.map_err(|_| late())?;
        self.sums().remove(&(tenant.to_owned(), period.to_owned()));
        let reserved = match DB::LOCK {
            None => self.durably(reserve).await?,
            Some(lock) => {
                let locked = async {
                    let mut transaction = self.write.begin().await?;
                    sqlx::query::<DB>(lock).bind(tenant).bind(period).execute(&mut *transaction).await?;
                    let reserved = reserve.execute(&mut *transaction).await?;
                    transaction.commit().await?;
                    Ok(DB::rows(&reserved))
                };
                bounded(locked).await?
            }
        };
        drop(turn);
        Ok(reserved == 1)
    }

    async fn spend(&self, tenant: &str, period: &str, session: &SessionId, usd: f64) -> Result<()> {
        self.book(tenant, session, &[(period.to_owned(), usd)]).await.map(drop)
    }

    async fn book(&self, tenant: &str, session: &SessionId, spent: &[(String, f64)]) -> Result<Vec<f64>> {
        if spent.is_empty() {
            return Ok(Vec::new());
        }
        let amounts = spent.iter().map(|(period, usd)| Amount {
            tenant: tenant.to_owned(),
            period: period.clone(),
            session: session.to_string(),
            nanos: nanos(*usd),
        });
        let sums = together(self.books.add(session, amounts.collect(), |books| self.book_all(books).boxed())).await?;
        Ok(sums.into_iter().map(dollars).collect())
    }

    async fn spent(&self, tenant: &str, period: &str) -> Result<f64> {
        let sum = sqlx::query_as::<DB, (i64,)>(
            "SELECT CAST(COALESCE(SUM(nanos), 0) AS BIGINT) FROM amounts WHERE tenant = $1 AND period = $2",
        )
        .bind(tenant)
        .bind(period);
        let (nanos,) = bounded(sum.fetch_one(&self.read)).await?;
        Ok(dollars(nanos))
    }

    async fn born(&self) -> Result<Timestamp> {
        let (second,) = bounded(sqlx::query_as::<DB, (i64,)>(DB::BORN).fetch_one(&self.read)).await?;
        Timestamp::from_second(second).map_err(|error| Error::Store(format!("when it was made: {error}")))
    }

    async fn duty(&self, name: &str, fleet: &str, lease: Duration) -> Result<bool> {
        let write = sqlx::query::<DB>(
            "INSERT INTO duties (name, held_by, held_until) VALUES ($1, $2, (SELECT now FROM clock) + $3)
             ON CONFLICT (name) DO UPDATE SET held_by = excluded.held_by, held_until = excluded.held_until
             WHERE duties.held_by = excluded.held_by OR duties.held_until <= (SELECT now FROM clock)",
        )
        .bind(name)
        .bind(fleet)
        .bind(millis(lease));
        Ok(self.by_and_by(write).await? == 1)
    }

    async fn drain(&self, provider: &str, until: Option<Timestamp>) -> Result<()> {
        let write = match until {
            Some(until) => sqlx::query::<DB>(
                "INSERT INTO drains (provider, until) VALUES ($1, $2) ON CONFLICT (provider) DO UPDATE SET until = excluded.until",
            )
            .bind(provider)
            .bind(until.to_string()),
            None => sqlx::query::<DB>("DELETE FROM drains WHERE provider = $1").bind(provider),
        };
        self.durably(write).await.map(drop)
    }

    async fn drains(&self) -> Result<BTreeMap<String, Timestamp>> {
        let found = sqlx::query_as::<DB, (String, String)>("SELECT provider, until FROM drains");
        let read = |(provider, until): (String, String)| {
            let until = until.parse().map_err(|error| Error::Store(format!("until when `{provider}` is drained: {error}")))?;
            Ok((provider, until))
        };
        bounded(found.fetch_all(&self.read)).await?.into_iter().map(read).collect()
    }

    async fn log_hook(&self, run: &HookRun) -> Result<()> {
        let log = sqlx::query::<DB>("INSERT INTO hook_runs (session, document) SELECT id, $2 FROM sessions WHERE id = $1")
            .bind(run.session.as_str())
            .bind(document(run)?);
        if self.durably(log).await? == 0 {
            return Err(Error::Missing(run.session.clone()));
        }
        let forget = sqlx::query::<DB>(
            "DELETE FROM hook_runs WHERE session = $1
             AND seq <= (SELECT seq FROM hook_runs WHERE session = $1 ORDER BY seq DESC LIMIT 1 OFFSET $2)",
        )
        .bind(run.session.as_str())
        .bind(HOOK_RUNS_MOST);
        self.durably(forget).await.map(drop)
    }

    async fn hook_runs(&self, id: &SessionId) -> Result<Vec<HookRun>> {
        let found =
            sqlx::query_as::<DB, (String,)>("SELECT document FROM hook_runs WHERE session = $1 ORDER BY seq").bind(id.as_str());
        let read = |(document,): (String,)| serde_json::from_str(&document).map_err(|error| unreadable(&error));
        bounded(found.fetch_all(&self.read)).await?.into_iter().map(read).collect()
    }

    async fn with_dead_letters(&self, owner: Option<&str>, most: usize) -> Result<Vec<SessionId>> {
        // Quotes in what a hook has said are written with a backslash.
        let found = sqlx::query_as::<DB, (String,)>(
            r#"SELECT id FROM sessions WHERE ($1 IS NULL OR owner = $1) AND EXISTS (
                 SELECT 1 FROM hook_runs WHERE session = sessions.id AND document LIKE '%"outcome":"dead-letter"%')
               ORDER BY id LIMIT $2"#,
        )
        .bind(owner)
        .bind(i64::try_from(most).unwrap_or(i64::MAX));
        let found = bounded(found.fetch_all(&self.read)).await?;
        found.into_iter().map(|(id,)| id.parse().map_err(Error::Store)).collect()
    }

    async fn changed(&self, after: Option<(i64, &str)>, owner: Option<&str>, most: usize) -> Result<Vec<(i64, Session)>> {
        let found = match after {
            Some((at, id)) => sqlx::query_as::<DB, (i64, i64, String)>(
                "SELECT changed, version, document FROM sessions
                 WHERE changed >= $1 AND (changed > $1 OR id > $2) AND ($3 IS NULL OR owner = $3)
                 ORDER BY changed, id LIMIT $4",
            )
            .bind(at)
            .bind(id)
            .bind(owner)
            .bind(i64::try_from(most).unwrap_or(i64::MAX)),
            None => sqlx::query_as("SELECT changed, version, document FROM sessions ORDER BY changed DESC, id DESC LIMIT 1"),
        };
        let found = bounded(found.fetch_all(&self.read)).await?;
        found.into_iter().map(|(changed, version, document)| Ok((changed, read_session((version, document))?))).collect()
    }

    async fn prune(&self, before: Timestamp) -> Result<u64> {
        let mut pruned = 0;
        loop {
            let write = sqlx::query::<DB>(DB::PRUNE).bind(until(before)).bind(PRUNED_AT_ONCE);
            let some = self.durably(write).await?;
            pruned += some;
            if some < PRUNED_AT_ONCE.unsigned_abs() {
                break;
            }
        }
        // Who is called the same after that begins at nothing, and what was spent stays spent.
        let rename = sqlx::query::<DB>(
            "UPDATE amounts SET session = session || '~' || CAST(random() AS TEXT)
             WHERE changed < (SELECT now FROM clock) + $1 AND session NOT LIKE '%~%'
               AND NOT EXISTS (SELECT 1 FROM sessions WHERE sessions.id = amounts.session)",
        )
        .bind(until(before));
        self.durably(rename).await?;
        let forget = sqlx::query::<DB>("DELETE FROM amounts WHERE changed < (SELECT now FROM clock) + $1 - $2")
            .bind(until(before))
            .bind(millis(SPENT_KEPT));
        self.durably(forget).await?;
        Ok(pruned)
    }
}
