//! Stores that go away, and those that write when they die.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_fleet::lifecycle::Phase;
use agent_fleet::session::{Session, Wanted};
use agent_fleet::store::{self, Error, Filter, Store, Within};
use jiff::{SignedDuration, Timestamp};
use sqlx::migrate::{Migrate, Migration, MigrationType, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection, Executor, SqlSafeStr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::{Directory, Fresh, LONG, OVER, SERVER, claimed, file, id, insert, postgres, run, schema_of_its_own, session};

/// Beyond every bound of a store, on the slowest machine.
const AT_LAST: Duration = Duration::from_secs(60);

/// Whether it says within its bounds that the store is away.
async fn is_away(store: &dyn Store) -> bool {
    let asked = tokio::time::timeout(AT_LAST, store.insert(&session("away"))).await.expect("an answer, or an error");
    matches!(asked, Err(Error::Store(_)))
}

/// Whether it is back, after connections that are still broken.
async fn comes_back(store: &dyn Store) -> bool {
    let back = async { while store.claim("nobody", LONG, 0).await.is_err() {} };
    tokio::time::timeout(AT_LAST, back).await.is_ok()
}

/// Not a test of its own: what the tests below run in a process that may die. It says what it has written when that is acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writer() {
    let Ok(url) = std::env::var("AGENT_FLEET_TEST_WRITER") else { return };
    let store = store::open(&url).await.unwrap();
    let failed = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, failed) = (store.clone(), failed.clone());
            tokio::spawn(async move {
                for n in 0.. {
                    let name = format!("w{writer}-{n}");
                    let write = async {
                        let mut new = session(&name);
                        store.insert(&new).await?;
                        new.reason = Some("x".repeat(2000));
                        store.update(&mut new).await?;
                        store.log_hook(&run(&name, 1)).await?;
                        store.spend("blue", &name, &new.id, 1.5).await
                    };
                    match write.await {
                        Ok(()) => println!("\nwrote {name}"),
                        Err(Error::Store(error)) => {
                            failed.store(true, Ordering::Relaxed);
                            return println!("\nfailed {error}");
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(failed.load(Ordering::Relaxed));
    assert!(!store.list(&Filter::default(), None, 1).await.unwrap().is_empty(), "what is full can be read");
    println!("\nread");
}

/// Runs the writer after these words of a shell, and kills it when it has written so much. What it has said.
fn written(url: &str, shell: &str, enough: usize) -> Vec<String> {
    let me = std::env::current_exe().unwrap();
    let mut child = Command::new("bash")
        .args(["-c", &format!("{shell} exec \"$@\""), "bash"])
        .arg(me)
        .args(["--exact", "death::writer", "--nocapture"])
        .env("AGENT_FLEET_TEST_WRITER", url)
        .env_remove("RUST_TEST_THREADS")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said: Vec<String> = lines.by_ref().map(Result::unwrap).take(enough).collect();
    child.kill().unwrap();
    // What was in the pipe when it died was acknowledged, too.
    said.extend(lines.map_while(Result::ok));
    child.wait_with_output().unwrap();
    said
}

async fn all_that_was_written_is_there(url: &str, said: &[String]) {
    let store = store::open(url).await.unwrap();
    let wrote: Vec<&str> = said.iter().filter_map(|line| line.strip_prefix("wrote ")).collect();
    assert!(wrote.len() > 7, "{said:?}");
    for name in wrote {
        let kept = store.get(&id(name)).await.unwrap().unwrap_or_else(|| panic!("{name} is lost"));
        assert_eq!((kept.version, kept.reason.unwrap().len()), (1, 2000));
        assert_eq!(store.hook_runs(&id(name)).await.unwrap(), [run(name, 1)]);
        assert_eq!(store.spent("blue", name).await.unwrap(), 1.5);
    }
    insert(&*store, &["after"]).await;
    let mut connection = sqlx::SqliteConnection::connect(url).await.unwrap();
    let (whole,) = sqlx::query_as::<_, (String,)>("PRAGMA integrity_check").fetch_one(&mut connection).await.unwrap();
    assert_eq!(whole, "ok");
}

#[tokio::test]
async fn what_was_acknowledged_outlives_a_kill() {
    let directory = Directory::new();
    let url = format!("sqlite:{}/fleet.db", directory.0.display());
    let said = written(&url, "", 150);
    all_that_was_written_is_there(&url, &said).await;
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_loses_nothing() {
    let directory = Directory::new();
    let url = format!("sqlite:{}/fleet.db", directory.0.display());
    // No file grows beyond a megabyte, and who tries is told.
    let said = written(&url, "trap '' XFSZ; ulimit -f 1024;", usize::MAX);
    assert_eq!(said.iter().filter(|line| line.starts_with("failed ")).count(), 4, "{said:?}");
    assert!(said.iter().any(|line| line == "read"), "{said:?}");
    all_that_was_written_is_there(&url, &said).await;
}

#[tokio::test]
async fn a_file_that_somebody_locks_is_an_error_while_it_is_locked() {
    let Fresh { store, url, .. } = &file().await.unwrap();
    insert(&**store, &["a", "b"]).await;
    assert_eq!(claimed(&**store, "one", OVER).await, ["a", "b"]);
    let mut other = sqlx::SqliteConnection::connect(url).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    assert!(is_away(&**store).await);
    assert!(store.get(&id("a")).await.unwrap().is_some(), "who writes keeps no reader waiting");
    assert!(matches!(store.release("one", &id("a"), None).await, Err(Error::Store(_))));
    other.execute("ROLLBACK").await.unwrap();
    insert(&**store, &["away"]).await;
    // What could not be let go of is not held for ever.
    assert_eq!(store.renew("one", LONG).await.unwrap(), 1);
    assert_eq!(claimed(&**store, "two", LONG).await, ["a", "away"]);
}

#[tokio::test]
async fn a_file_is_its_owners_alone_and_every_write_is_on_the_disk() {
    let directory = Directory::new();
    let parent = directory.0.join("var/lib");
    let path = parent.join("fleet.db");
    let store = store::open(&format!("sqlite://{}", path.display())).await.unwrap();
    insert(&*store, &["a"]).await;
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&parent), 0o700);
    for name in ["fleet.db", "fleet.db-wal", "fleet.db-shm"] {
        assert_eq!(mode(&parent.join(name)), 0o600, "{name}");
    }
    // What was written is in the log, which is written through before it is acknowledged.
    assert!(parent.join("fleet.db-wal").metadata().unwrap().size() > 0);
    // A mode that somebody has chosen stays.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    store::open(&format!("sqlite:{}", path.display())).await.unwrap();
    assert_eq!(mode(&path), 0o640);
}

#[tokio::test]
async fn a_copy_that_is_made_while_it_is_written_is_whole() {
    let Fresh { store, url, .. } = &file().await.unwrap();
    insert(&**store, &["a", "b"]).await;
    let copy = format!("{url}.copy");
    let mut connection = sqlx::SqliteConnection::connect(url).await.unwrap();
    connection.execute(AssertSqlSafe(format!("VACUUM INTO '{}'", copy.strip_prefix("sqlite:").unwrap()))).await.unwrap();
    insert(&**store, &["c"]).await;
    let copy = store::open(&copy).await.unwrap();
    assert_eq!(claimed(&*copy, "one", LONG).await, ["a", "b"]);
    assert_eq!(claimed(&**store, "one", LONG).await, ["a", "b", "c"]);
}

#[tokio::test]
async fn what_cannot_be_opened_is_said() {
    let directory = Directory::new();
    let path = directory.0.display();
    std::fs::write(directory.0.join("text"), "it is no database, ".repeat(100)).unwrap();
    for (url, expected) in [
        ("mysql://root:s3cret@localhost/x".to_owned(), "a store is `sqlite:PATH`, `sqlite::memory:` or `postgres://…`"),
        ("sqlite:".to_owned(), "wants a path"),
        (format!("sqlite:{path}/a?mode=s3cret"), "no parameters"),
        (format!("sqlite:{path}"), "cannot open"),
        (format!("sqlite:{path}/text"), "not a database"),
        (format!("sqlite:{path}/text/below"), "cannot open"),
        ("postgres://fleet:s3cret@127.0.0.1:port/x".to_owned(), "cannot read the URL"),
        ("postgres://fleet:s3cret@127.0.0.1/x?pasword=s3cret".to_owned(), "no parameter `pasword`"),
        ("postgres://fleet:s3cret@127.0.0.1:1/x".to_owned(), "PostgreSQL at 127.0.0.1:1"),
        ("postgres://fleet:s3cret@localhost/x?host=/none".to_owned(), "PostgreSQL at /none"),
    ] {
        let error = store::open(&url).await.err().expect(&url).to_string();
        assert!(error.contains(expected) && !error.contains("s3cret"), "{url}: {error}");
    }
}

async fn a_newer_schema_is_refused<C>(fresh: Fresh)
where
    C: Connection,
    for<'c> &'c mut C: Executor<'c, Database = C::Database>,
{
    insert(&*fresh.store, &["a"]).await;
    let mut connection = C::connect(&fresh.url).await.unwrap();
    let newer = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) SELECT 99, 'x', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1";
    connection.execute(newer).await.unwrap();
    let error = store::open(&fresh.url).await.err().unwrap().to_string();
    assert!(error.contains("schema is version 99, of a newer agent-fleet"), "{error}");
    connection.execute("DELETE FROM _sqlx_migrations WHERE version = 99").await.unwrap();
    assert!(store::open(&fresh.url).await.unwrap().get(&id("a")).await.unwrap().is_some());
    // Nor one that was begun and has failed, or that is another's.
    connection.execute("UPDATE _sqlx_migrations SET success = FALSE").await.unwrap();
    assert!(store::open(&fresh.url).await.is_err());
}

#[tokio::test]
async fn a_newer_file_is_refused() {
    a_newer_schema_is_refused::<sqlx::SqliteConnection>(file().await.unwrap()).await;
}

#[tokio::test]
async fn a_newer_postgres_is_refused() {
    if let Some(fresh) = postgres().await {
        a_newer_schema_is_refused::<sqlx::PgConnection>(fresh).await;
    }
}

/// Made by the migrations of version 2, as it was left by a fleet of its time.
async fn an_older_schema_goes_on<C>(url: &str, versions: [&'static str; 2])
where
    C: Connection + Migrate,
    for<'c> &'c mut C: Executor<'c, Database = C::Database>,
{
    let mut connection = C::connect(url).await.unwrap();
    let made = |(sql, version): (&'static str, i64)| {
        Migration::new(version, "agent-fleet".into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    let migrations = versions.into_iter().zip(1..).map(made).collect();
    Migrator::with_migrations(migrations).run_direct(None, &mut connection, false).await.unwrap();
    for (name, due, woken, by, until) in [
        ("asleep", "NULL", false, "NULL", "0"),
        ("dropped", "1", true, "'dead'", "1"),
        ("due", "1", false, "NULL", "0"),
        ("held", "1", false, "'other'", "now + 3600000"),
        ("later", "now + 3600000", false, "NULL", "0"),
    ] {
        let document = serde_json::to_string(&session(name)).unwrap();
        let insert = format!(
            "INSERT INTO sessions (id, version, phase, tenant, owner, provider, over, changed, due, woken, leased_by, leased_until, document)
             SELECT '{name}', 0, 'requested', 'blue', 'ada', 'docker', FALSE, now, {due}, {woken}, {by}, {until}, '{document}' FROM clock"
        );
        connection.execute(AssertSqlSafe(insert)).await.unwrap();
    }
    connection.execute("INSERT INTO amounts SELECT 'blue', '2026', 'due', 1500000000, now FROM clock").await.unwrap();
    connection.close().await.unwrap();

    let store = store::open(url).await.unwrap();
    assert_eq!(claimed(&*store, "one", LONG).await, ["dropped", "due"]);
    assert_eq!(store.get(&id("asleep")).await.unwrap().unwrap(), session("asleep"));
    for name in ["dropped", "due"] {
        store.release("one", &id(name), None).await.unwrap();
    }
    store.wake(&id("asleep")).await.unwrap();
    // It is held, and due when it is not.
    store.wake(&id("held")).await.unwrap();
    insert(&*store, &["new"]).await;
    assert_eq!(claimed(&*store, "one", LONG).await, ["asleep", "new"]);
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 1.5);
    assert_eq!(store.insert_within(&session("sixth"), Within::Tenant(6)).await.unwrap(), None);
    let mut over = Session { phase: Phase::Destroyed, ..session("new") };
    store.update(&mut over).await.unwrap();
    assert_eq!(store.prune(Timestamp::now() + SignedDuration::from_hours(1)).await.unwrap(), 1);
    insert(&*store, &["new"]).await;
    assert_eq!(claimed(&*store, "one", LONG).await, ["new"], "who is called the same is another");
}

#[tokio::test]
async fn an_older_file_goes_on() {
    let directory = Directory::new();
    let url = format!("sqlite:{}/fleet.db", directory.0.display());
    std::fs::write(directory.0.join("fleet.db"), "").unwrap();
    let schema = [include_str!("../../src/store/schema/sqlite-1.sql"), include_str!("../../src/store/schema/sqlite-2.sql")];
    an_older_schema_goes_on::<sqlx::SqliteConnection>(&url, schema).await;
}

#[tokio::test]
async fn an_older_postgres_goes_on() {
    let Ok(server) = std::env::var("AGENT_FLEET_TEST_POSTGRES") else { return };
    let _guard = SERVER.read().await;
    let schema = [include_str!("../../src/store/schema/postgres-1.sql"), include_str!("../../src/store/schema/postgres-2.sql")];
    an_older_schema_goes_on::<sqlx::PgConnection>(&schema_of_its_own(&server).await, schema).await;
}

/// A document that is not ours to read stops neither the others nor the list.
#[tokio::test]
async fn one_that_cannot_be_read_keeps_nobody_from_the_others() {
    let Fresh { store, url, .. } = &file().await.unwrap();
    insert(&**store, &["a", "b", "c"]).await;
    let mut connection = sqlx::SqliteConnection::connect(url).await.unwrap();
    connection.execute("UPDATE sessions SET document = replace(document, 'requested', 'dreaming') WHERE id = 'b'").await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, ["a", "c"]);
    // Who lists must not believe that it is not there: its container would be nobody's.
    assert!(matches!(store.list(&Filter::default(), None, 10).await, Err(Error::Store(_))));
    assert!(matches!(store.get(&id("b")).await, Err(Error::Store(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fleets_that_start_together_make_one_schema() {
    let Ok(server) = std::env::var("AGENT_FLEET_TEST_POSTGRES") else { return };
    let _guard = SERVER.read().await;
    let url = schema_of_its_own(&server).await;
    let fleets: Vec<_> = (0..6)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move { store::open(&url).await.map(drop) })
        })
        .collect();
    for fleet in fleets {
        fleet.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn postgres_is_asked_for_by_tls_and_must_be_who_it_is() {
    let Ok(url) = std::env::var("AGENT_FLEET_TEST_POSTGRES_TLS") else { return };
    let _guard = SERVER.read().await;
    let own = schema_of_its_own(&url).await;
    insert(&*store::open(&own).await.unwrap(), &["a"]).await;
    // A store has no way to say how it is connected; its options do.
    let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
    let asked = sqlx::query_as::<_, (bool,)>("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()");
    assert!(asked.fetch_one(&mut connection).await.unwrap().0);
    let unknown = url.split("&sslrootcert").next().unwrap();
    let error = store::open(unknown).await.err().unwrap().to_string();
    assert!(error.contains("certificate") && !error.contains("of-the-tests"), "{error}");
    let wrong = url.replace("of-the-tests", "s3cret");
    let error = store::open(&wrong).await.err().unwrap().to_string();
    assert!(error.contains("password authentication failed") && !error.contains("s3cret"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_crashes_is_an_error_until_it_is_back() {
    let Ok(server) = std::env::var("AGENT_FLEET_TEST_POSTGRES") else { return };
    let Ok(crash) = std::env::var("AGENT_FLEET_TEST_POSTGRES_CRASH") else { return };
    // Nobody else's test is about this.
    let _guard = SERVER.write().await;
    let store = store::open(&schema_of_its_own(&server).await).await.unwrap();
    let (stop, stopped) = watch::channel(false);
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, stopped) = (store.clone(), stopped.clone());
            tokio::spawn(async move {
                let (mut wrote, mut failed) = (Vec::new(), 0);
                for n in 0.. {
                    let name = format!("w{writer}-{n}");
                    let asked =
                        tokio::time::timeout(AT_LAST, store.insert(&session(&name))).await.expect("an answer, or an error");
                    match asked {
                        Ok(_) => wrote.push(name),
                        Err(Error::Store(_)) => failed += 1,
                        Err(error) => panic!("{error}"),
                    }
                    // Each has gone on after the crash.
                    if *stopped.borrow() && wrote.last().is_some_and(|last| last.ends_with(&format!("-{n}"))) {
                        break;
                    }
                }
                (wrote, failed)
            })
        })
        .collect();
    while store.count().await.unwrap().first().is_none_or(|(.., n)| *n < 50) {}
    let crashed = tokio::task::spawn_blocking(move || Command::new("bash").args(["-c", &crash]).status()).await.unwrap().unwrap();
    assert!(crashed.success());
    assert!(comes_back(&*store).await);
    stop.send(true).unwrap();
    let mut broke = 0;
    for writer in writers {
        let (wrote, failed) = writer.await.unwrap();
        broke += failed;
        for name in wrote {
            assert!(store.get(&id(&name)).await.unwrap().is_some(), "{name} is lost");
        }
    }
    assert!(broke > 0, "nobody has seen it crash");
}

/// What is between us and a server: it carries, or is silent, or cuts.
#[derive(Clone, Copy, PartialEq)]
enum Line {
    Up,
    Silent,
    Cut,
}

/// Carries what comes to its port to where the server is.
async fn carry(server: String, line: watch::Receiver<Line>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((ours, _)) = listener.accept().await {
            let (server, mut line) = (server.clone(), line.clone());
            tokio::spawn(async move {
                let (from_us, to_us) = ours.into_split();
                let (from_them, to_them) = TcpStream::connect(&server).await.unwrap().into_split();
                tokio::select! {
                    () = piped(from_us, to_them, line.clone()) => {}
                    () = piped(from_them, to_us, line.clone()) => {}
                    _ = line.wait_for(|line| *line == Line::Cut) => {}
                }
            });
        }
    });
    port
}

async fn piped(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut line: watch::Receiver<Line>) {
    let mut chunk = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut chunk).await {
        if line.wait_for(|line| *line != Line::Silent).await.is_err() || to.write_all(&chunk[..n]).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_falls_silent_is_an_error_until_it_speaks() {
    let Ok(server) = std::env::var("AGENT_FLEET_TEST_POSTGRES_TLS") else { return };
    let _guard = SERVER.read().await;
    let options: PgConnectOptions = server.parse().unwrap();
    let (say, line) = watch::channel(Line::Up);
    let port = carry(format!("{}:{}", options.get_host(), options.get_port()), line).await;
    let behind = server.replace(&format!(":{}/", options.get_port()), &format!(":{port}/"));
    let store = store::open(&schema_of_its_own(&behind).await).await.unwrap();
    insert(&*store, &["a"]).await;
    for wrong in [Line::Cut, Line::Silent] {
        say.send(wrong).unwrap();
        assert!(is_away(&*store).await);
        let error = store.get(&id("a")).await.unwrap_err().to_string();
        assert!(!error.contains("of-the-tests"), "{error}");
        say.send(Line::Up).unwrap();
        assert!(comes_back(&*store).await);
        assert!(store.get(&id("a")).await.unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_somebody_locks_keeps_only_who_wants_it_waiting() {
    let Some(Fresh { store, url, .. }) = &postgres().await else { return };
    insert(&**store, &["a", "b"]).await;
    let mut other = sqlx::PgConnection::connect(url).await.unwrap();
    other.execute("BEGIN; SELECT * FROM leases WHERE id = 'a' FOR UPDATE").await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, ["b"]);
    let woken = tokio::time::timeout(AT_LAST, store.wake(&id("a"))).await.expect("an answer, or an error");
    assert!(matches!(woken, Err(Error::Store(_))), "{woken:?}");
    other.execute("ROLLBACK").await.unwrap();
    store.wake(&id("a")).await.unwrap();
    assert_eq!(claimed(&**store, "two", LONG).await, ["a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_writes_two_takes_them_in_the_order_of_all_others() {
    let Some(Fresh { store, url, .. }) = &postgres().await else { return };
    let mut other = sqlx::PgConnection::connect(url).await.unwrap();
    let mut watch = sqlx::PgConnection::connect(url).await.unwrap();
    // Whichever lies before the other, and is named before it.
    for (n, turned) in [(0, false), (1, true), (2, false), (3, true)] {
        let mut names = [format!("a{n}"), format!("b{n}")];
        let [first, last] = names.clone();
        if n < 2 {
            names.reverse();
        }
        insert(&**store, &[&names[0], &names[1]]).await;
        let take = |name: &str| AssertSqlSafe(format!("SELECT id FROM sessions WHERE id = '{name}' FOR UPDATE"));
        loop {
            other.execute("BEGIN").await.unwrap();
            other.execute(take(&first)).await.unwrap();
            let (store, [one, two]) =
                (store.clone(), if turned { [&last, &first] } else { [&first, &last] }.map(|name| id(name)));
            let writes = tokio::spawn(async move {
                let (mut one, mut two) = (store.get(&one).await?.unwrap(), store.get(&two).await?.unwrap());
                store.update_both(&mut one, &mut two).await
            });
            wait_for_us(&mut other, &mut watch, || writes.is_finished()).await;
            other.execute(take(&last)).await.expect("nobody who waits for the first has the last");
            other.execute("COMMIT").await.unwrap();
            match writes.await.unwrap() {
                Ok(()) => break,
                // Where all is slow nobody waits for us so long.
                Err(Error::Store(error)) if error.contains("lock timeout") => {}
                Err(error) => panic!("{n}: {error}"),
            }
        }
        assert_eq!(store.get(&id(&first)).await.unwrap().unwrap().version, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_forgets_takes_them_in_the_order_of_all_others() {
    let Some(Fresh { store, url, .. }) = &postgres().await else { return };
    let mut other = sqlx::PgConnection::connect(url).await.unwrap();
    let mut watch = sqlx::PgConnection::connect(url).await.unwrap();
    let names = ["a", "b", "c"];
    loop {
        // The last lies before the first.
        for name in names.iter().rev() {
            store.insert(&Session { phase: Phase::Destroyed, ..session(name) }).await.unwrap();
        }
        other.execute("BEGIN").await.unwrap();
        other.execute("SELECT id FROM sessions WHERE id = 'a' FOR UPDATE").await.unwrap();
        let forgets = tokio::spawn({
            let store = store.clone();
            async move { store.prune(Timestamp::now() + SignedDuration::from_hours(1)).await }
        });
        wait_for_us(&mut other, &mut watch, || forgets.is_finished()).await;
        other
            .execute("SELECT id FROM sessions WHERE id = 'c' FOR UPDATE")
            .await
            .expect("nobody who waits for the first has the last");
        other.execute("COMMIT").await.unwrap();
        match forgets.await.unwrap() {
            Ok(forgotten) => return assert_eq!(forgotten, 3),
            // Where all is slow nobody waits for us so long.
            Err(Error::Store(error)) if error.contains("lock timeout") => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Up to where somebody waits for what a connection has locked, or has given up.
async fn wait_for_us(us: &mut sqlx::PgConnection, watch: &mut sqlx::PgConnection, over: impl Fn() -> bool) {
    let waits = "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid)))";
    let (us,): (i32,) = sqlx::query_as("SELECT pg_backend_pid()").fetch_one(us).await.unwrap();
    while !over() && !sqlx::query_as::<_, (bool,)>(waits).bind(us).fetch_one(&mut *watch).await.unwrap().0 {}
}

/// Each of the two stands still in the middle of its writing until the other is through.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wish_in_the_middle_of_a_claim_and_a_claim_in_the_middle_of_a_wish_lose_nothing_in_postgres() {
    let Some(Fresh { store, url, .. }) = &postgres().await else { return };
    let mut other = sqlx::PgConnection::connect(url).await.unwrap();
    let mut watch = sqlx::PgConnection::connect(url).await.unwrap();
    // As long as somebody has this lock.
    other
        .execute(
            "CREATE FUNCTION stand_still() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN PERFORM pg_advisory_xact_lock_shared(hashtext(current_schema())); RETURN NULL; END $$;
             CREATE TRIGGER stand_still AFTER UPDATE ON leases FOR EACH ROW
                 WHEN (OLD.leased_by IS NULL AND NEW.leased_by = 'stands still') EXECUTE FUNCTION stand_still();
             CREATE TRIGGER stand_still AFTER UPDATE ON sessions FOR EACH ROW
                 WHEN (NEW.document LIKE '%stands still%') EXECUTE FUNCTION stand_still()",
        )
        .await
        .unwrap();
    let (lock, take) = ("SELECT pg_advisory_xact_lock(hashtext(current_schema()))", "stands still");
    let mut wish_stands = false;
    for n in 0.. {
        let id = id(&format!("s{n}"));
        insert(&**store, &[id.as_str()]).await;
        other.execute("BEGIN").await.unwrap();
        other.execute(lock).await.unwrap();
        let (fleet, why) = if wish_stands { ("one", take) } else { (take, "enough") };
        let claim = {
            let store = store.clone();
            async move { store.claim(fleet, LONG, 1).await }
        };
        let wish = {
            let (store, id) = (store.clone(), id.clone());
            async move {
                assert!(store.want(&id, Wanted::Gone, why, Timestamp::now()).await?);
                Ok::<_, Error>(())
            }
        };
        // Where all is slow nobody waits for us so long: then once more, with another.
        let claimed = if wish_stands {
            let wishes = tokio::spawn(wish);
            wait_for_us(&mut other, &mut watch, || wishes.is_finished()).await;
            let claimed = claim.await.unwrap().remove(0);
            assert_eq!(claimed.wanted, Wanted::Running, "what is being written is not there yet");
            other.execute("COMMIT").await.unwrap();
            wishes.await.unwrap().map(|()| claimed)
        } else {
            let claims = tokio::spawn(claim);
            wait_for_us(&mut other, &mut watch, || claims.is_finished()).await;
            wish.await.unwrap();
            other.execute("COMMIT").await.unwrap();
            claims.await.unwrap().map(|mut claimed| claimed.remove(0))
        };
        let mut claimed = match claimed {
            Ok(claimed) => claimed,
            Err(Error::Store(error)) if error.contains("lock timeout") => {
                super::claimed(&**store, "nobody", LONG).await;
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(claimed.id, id);
        store.wake(&id).await.unwrap();
        // Who was claimed before the wish was there is not written over it, and who was claimed after it has it.
        if wish_stands {
            assert!(matches!(store.update(&mut claimed).await, Err(Error::Conflict(of)) if of == id));
        } else {
            assert_eq!((claimed.wanted, claimed.reason.as_deref()), (Wanted::Gone, Some("enough")));
        }
        // Whoever drove it, it is thought over again at once.
        store.release(fleet, &id, Some(Timestamp::MAX)).await.unwrap();
        let again = store.claim("two", LONG, 1).await.unwrap().remove(0);
        assert_eq!((again.id, again.wanted), (id, Wanted::Gone));
        if wish_stands {
            return;
        }
        wish_stands = true;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_promised_and_who_leases_waits_for_the_disk_of_postgres() {
    let Some(Fresh { store, url, .. }) = &postgres().await else { return };
    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
    connection
        .execute(
            "CREATE TABLE seen (seq BIGINT GENERATED ALWAYS AS IDENTITY, mode TEXT);
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO seen (mode) VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
             CREATE TRIGGER see AFTER INSERT OR UPDATE ON sessions FOR EACH ROW EXECUTE FUNCTION see();
             CREATE TRIGGER see AFTER UPDATE ON leases FOR EACH ROW EXECUTE FUNCTION see();
             CREATE TRIGGER see AFTER INSERT OR UPDATE ON amounts FOR EACH ROW EXECUTE FUNCTION see()",
        )
        .await
        .unwrap();
    let waited = async |connection: &mut sqlx::PgConnection| {
        let (mode,): (String,) =
            sqlx::query_as("SELECT mode FROM seen ORDER BY seq DESC LIMIT 1").fetch_one(connection).await.unwrap();
        mode == "on"
    };
    let mut one = session("a");
    store.insert(&one).await.unwrap();
    assert!(waited(&mut connection).await);
    assert_eq!(claimed(&**store, "one", LONG).await, ["a"]);
    assert!(waited(&mut connection).await, "two fleets would drive it");
    store.note(&mut one).await.unwrap();
    assert!(!waited(&mut connection).await);
    store.update(&mut one).await.unwrap();
    assert!(waited(&mut connection).await, "also after one that did not");
    store.spend("blue", "2026", &one.id, 1.0).await.unwrap();
    assert!(!waited(&mut connection).await);
    assert!(store.reserve("blue", "2026", &one.id, 1.0, 2.0).await.unwrap());
    assert!(waited(&mut connection).await);
    store.release("one", &one.id, None).await.unwrap();
    assert!(!waited(&mut connection).await);
    assert!(store.want(&one.id, Wanted::Gone, "enough", one.created).await.unwrap());
    assert!(waited(&mut connection).await);
}
