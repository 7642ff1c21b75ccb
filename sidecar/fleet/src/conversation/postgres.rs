//! PostgreSQL: for a fleet that has one anyhow, and conversations that are not large. In pieces, in tables of its own.

use std::io::{Read, Write};
use std::path::Path;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::OnceCell;

use super::directory::gone;
use super::{Error, Result, Shelf, private};

/// A row.
const PIECE: usize = 1 << 20;
const CONNECTIONS: u32 = 4;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS agent_fleet_conversations (name TEXT PRIMARY KEY COLLATE \"C\", pieces INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS agent_fleet_conversation_pieces (
        name TEXT NOT NULL COLLATE \"C\" REFERENCES agent_fleet_conversations ON DELETE CASCADE, piece INTEGER NOT NULL, bytes BYTEA NOT NULL,
        PRIMARY KEY (name, piece));
    -- It is compressed already.
    ALTER TABLE agent_fleet_conversation_pieces ALTER COLUMN bytes SET STORAGE EXTERNAL";

pub struct Postgres {
    pool: PgPool,
    made: OnceCell<()>,
}

fn failed(error: sqlx::Error) -> Error {
    Error::Passing(format!("PostgreSQL: {error}"))
}

/// # Errors
/// What is wrong with a URL, without the URL.
pub fn check(url: &str) -> std::result::Result<PgConnectOptions, String> {
    crate::store::postgres::options(url)
}

impl Postgres {
    /// Connects when it is first needed.
    ///
    /// # Errors
    /// What is wrong with the URL, without the URL.
    pub fn new(url: &str) -> std::result::Result<Self, String> {
        let options = check(url)?;
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS).connect_lazy_with(options.disable_statement_logging());
        Ok(Self { pool, made: OnceCell::new() })
    }

    async fn pool(&self) -> Result<&PgPool> {
        let make = || async {
            let mut connection = self.pool.acquire().await?;
            let mut transaction = connection.begin().await?;
            // Two that make a table at once are told that it is there, as a mistake.
            sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('agent-fleet conversations', 0))")
                .execute(&mut *transaction)
                .await?;
            sqlx::raw_sql(SCHEMA).execute(&mut *transaction).await?;
            transaction.commit().await
        };
        self.made.get_or_try_init(make).await.map_err(failed)?;
        Ok(&self.pool)
    }
}

/// The next piece of a file; nothing at its end. They are small, and the disk is near.
fn piece(file: &mut std::fs::File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(PIECE);
    file.take(PIECE as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[async_trait]
impl Shelf for Postgres {
    async fn put(&self, name: &str, file: &Path) -> Result<()> {
        let mut file = std::fs::File::open(file)?;
        let mut transaction = self.pool().await?.begin().await.map_err(failed)?;
        let new = "INSERT INTO agent_fleet_conversations (name, pieces) VALUES ($1, 0) ON CONFLICT DO NOTHING";
        if sqlx::query(new).bind(name).execute(&mut *transaction).await.map_err(failed)?.rows_affected() == 0 {
            // Its name has its digest in it: it is the same.
            return Ok(());
        }
        let mut pieces = 0_i32;
        loop {
            let bytes = piece(&mut file)?;
            if bytes.is_empty() {
                break;
            }
            let one = "INSERT INTO agent_fleet_conversation_pieces (name, piece, bytes) VALUES ($1, $2, $3)";
            sqlx::query(one).bind(name).bind(pieces).bind(bytes).execute(&mut *transaction).await.map_err(failed)?;
            pieces += 1;
        }
        let all = "UPDATE agent_fleet_conversations SET pieces = $2 WHERE name = $1";
        sqlx::query(all).bind(name).bind(pieces).execute(&mut *transaction).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    async fn get(&self, name: &str, to: &Path) -> Result<()> {
        let pool = self.pool().await?;
        let pieces: Option<i32> = sqlx::query_scalar("SELECT pieces FROM agent_fleet_conversations WHERE name = $1")
            .bind(name)
            .fetch_optional(pool)
            .await
            .map_err(failed)?;
        let pieces = pieces.ok_or_else(gone)?;
        let mut to = private(to)?;
        for piece in 0..pieces {
            let one = "SELECT bytes FROM agent_fleet_conversation_pieces WHERE name = $1 AND piece = $2";
            let bytes: Option<Vec<u8>> =
                sqlx::query_scalar(one).bind(name).bind(piece).fetch_optional(pool).await.map_err(failed)?;
            to.write_all(&bytes.ok_or_else(gone)?)?;
        }
        Ok(())
    }

    async fn list(&self, beginning: &str) -> Result<Vec<String>> {
        let all = "SELECT name FROM agent_fleet_conversations WHERE starts_with(name, $1) ORDER BY name";
        sqlx::query_scalar(all).bind(beginning).fetch_all(self.pool().await?).await.map_err(failed)
    }

    async fn delete(&self, name: &str) -> Result<()> {
        let pool = self.pool().await?;
        sqlx::query("DELETE FROM agent_fleet_conversations WHERE name = $1").bind(name).execute(pool).await.map_err(failed)?;
        Ok(())
    }
}
