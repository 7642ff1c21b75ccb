//! Conversations that are put away: what the sidecar of a container gives of one is kept, and brought into the next container of its session.
//!
//! ```text
//!   GET sidecar ─ tar ─► gzip, digest ─► spool ─► shelf        put away
//!   PUT sidecar ◄─ tar ─ gunzip ◄─ digest is right ─ spool ◄── shelf        fetched
//! ```
//!
//! What it is called says all that is known of it: whose it is, which one, and its digest. So nothing is kept beside it, and what was damaged is
//! known before it is used. Where it is kept is a [`Shelf`].

pub mod credentials;
pub mod directory;
pub mod postgres;
pub mod s3;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures_util::StreamExt;
use jiff::Timestamp;
use reqwest::StatusCode;
use reqwest::header::HeaderValue;
use ring::digest::{Context, SHA256};
use tokio::sync::mpsc;

use crate::lifecycle::Phase;
use crate::provider::Endpoint;
use crate::session::{Session, SessionId};
use crate::store::Store;

/// Where the sidecar serves it; and below one of several sessions in a container, `agent-sidecar serve`.
const PATH: &str = "/v1/conversation";
pub(crate) const OF_SESSION: &str = "/conversation";
const NAMED: &str = "agent-conversation";
/// How far it has come, by the sidecar's word.
const MARK: &str = "agent-conversation-mark";
const ENDING: &str = ".tar.gz";
/// A container that does not answer within this has no sidecar that listens yet.
const CONNECT: Duration = Duration::from_secs(5);
/// However large it is; the sidecar gives it as long.
const LONGEST: Duration = Duration::from_secs(30 * 60);
/// How long what was put away of a session that has failed is kept at least: somebody may still want it.
const FAILED_KEPT: Duration = Duration::from_secs(7 * 86_400);
/// What was begun so long ago is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(86_400);
const SPOOLED: &str = "agent-fleet-";
const BROKEN_OFF: &str = "the sidecar has not given all of it";
/// What a whole tar ends with: zeros.
const TAR_END: usize = 1024;
/// What a sidecar says that listens and is not well. A gateway before it says the same status when nobody listens.
const UNWELL: [&str; 3] = ["the agent survives", "the sidecar's own loop", "no agent of this container"];
/// So much at once, and so many of these on their way.
const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 16;

/// Whether the CLI can have called a conversation so. It becomes a word of a command line.
pub fn is_conversation(name: &str) -> bool {
    (1..=64).contains(&name.len()) && !name.starts_with('-') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

/// What keeps files by their names, which have `/` in them, letters, digits, `-`, `_` and `.`.
#[async_trait]
pub trait Shelf: Send + Sync {
    /// Puts a file there: whole, or not at all. The same name is the same file.
    async fn put(&self, name: &str, file: &Path) -> Result<()>;
    /// Writes it into a file of ours.
    async fn get(&self, name: &str, to: &Path) -> Result<()>;
    /// All names that begin so, in their order.
    async fn list(&self, beginning: &str) -> Result<Vec<String>>;
    /// It is gone. It is no mistake if it was.
    async fn delete(&self, name: &str) -> Result<()>;
    /// Something is there already, by the store's word: where nothing is found, it is not the right place.
    fn expects(&self) {}
    /// Removes what was begun before a time, below a beginning, and never came to be there. How many.
    async fn tidy(&self, _beginning: &str, _before: SystemTime) -> Result<usize> {
        Ok(0)
    }
}

/// What went wrong, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers there yet.
    #[error("{0}")]
    NotYet(String),
    /// Trying again may help.
    #[error("{0}")]
    Passing(String),
    /// It will not.
    #[error("{0}")]
    Lasting(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Error {
        Error::Passing(format!("a file of the fleet's cannot be read or written: {error}"))
    }
}

fn passing(what: &str, error: &reqwest::Error) -> Error {
    // The URL may be signed.
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    Error::Passing(format!("{what}: {cause}"))
}

/// What one is called: `FLEET/SESSION/GENERATION-MILLISECONDS-DIGEST.tar.gz`. Generations begin anew with a new session of the same id: what is the
/// last says the time alone.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    session: SessionId,
    generation: u32,
    unix_ms: i64,
    digest: String,
}

impl Name {
    fn written(&self, fleet: &str) -> String {
        let Name { session, generation, unix_ms, digest } = self;
        format!("{fleet}/{session}/{generation:010}-{unix_ms:015}-{digest}{ENDING}")
    }

    fn read(fleet: &str, text: &str) -> Option<Name> {
        let (session, file) = text.strip_prefix(fleet)?.strip_prefix('/')?.split_once('/')?;
        let mut parts = file.strip_suffix(ENDING)?.splitn(3, '-');
        let (generation, unix_ms, digest) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.to_owned());
        Some(Name { session: session.parse().ok()?, generation, unix_ms, digest })
    }
}

/// See the module's head.
pub struct Conversations {
    /// Whose they are.
    pub fleet: String,
    pub shelf: Arc<dyn Shelf>,
    pub client: reqwest::Client,
    /// Where one is for as long as it is on its way.
    pub spool: PathBuf,
    /// So many of a session are kept.
    pub keep: usize,
    /// How long they are kept when it is over. `None`: not at all.
    pub keep_for: Option<Duration>,
    /// How large one may be, compressed.
    pub max_size: u64,
}

/// One that was put away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub name: String,
    /// What the CLI calls it, if the sidecar knows.
    pub conversation: Option<String>,
}

/// A file that is gone when nobody needs it.
struct Spooled(PathBuf);

impl Drop for Spooled {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

impl Conversations {
    fn spooled(&self) -> Spooled {
        Spooled(self.spool.join(format!("{SPOOLED}{}{ENDING}", uuid::Uuid::now_v7())))
    }

    /// Takes what the container has, and keeps it.
    ///
    /// # Errors
    /// An agent works there, it is too large, or something does not answer.
    pub async fn put_away(&self, session: &Session, at: &Endpoint, token: &str, now: Timestamp) -> Result<Kept> {
        let path = path_of(session);
        let asked = self.request(reqwest::Method::GET, at, &path, token);
        let answer = answered(asked.send().await).await?;
        let conversation = answer.headers().get(NAMED).and_then(|name| name.to_str().ok());
        let conversation = conversation.filter(|name| is_conversation(name)).map(str::to_owned);
        let mark = answer.headers().get(MARK).cloned();
        let spooled = self.spooled();
        let (say, hear) = mpsc::channel::<Vec<u8>>(CHUNKS);
        let (file, most) = (spooled.0.clone(), self.max_size);
        let packing = tokio::task::spawn_blocking(move || pack(&file, hear, most));
        let mut parts = answer.bytes_stream();
        let mut whole = Ok(());
        while let Some(part) = parts.next().await {
            match part {
                // Who does not hear it has found something wrong.
                Ok(part) if say.send(part.to_vec()).await.is_err() => break,
                Ok(_) => {}
                Err(error) => {
                    whole = Err(passing(BROKEN_OFF, &error));
                    break;
                }
            }
        }
        drop(say);
        let digest = packing.await.map_err(|_| Error::Passing(String::from("packing it has panicked")))?;
        whole?;
        let digest = digest?;
        let (generation, unix_ms) = (session.generation, now.as_millisecond());
        let name = Name { session: session.id.clone(), generation, unix_ms, digest }.written(&self.fleet);
        self.shelf.put(&name, &spooled.0).await?;
        // That has taken a while, and the container is destroyed next.
        if self.has_gone_on(mark, at, (&path, token)).await {
            self.shelf.delete(&name).await?;
            return Err(Error::Passing(String::from("an agent has worked since it was taken")));
        }
        // What is too much is in nobody's way: it is tried again with the next.
        if let Err(error) = self.thin(session, &name).await {
            tracing::warn!(session = %session.id, %error, "what was put away before cannot be removed");
        }
        Ok(Kept { name, conversation })
    }

    /// Whether what was taken is not all of it any more. Where nobody answers, it is all there is.
    async fn has_gone_on(&self, mark: Option<HeaderValue>, at: &Endpoint, (path, token): (&str, &str)) -> bool {
        let Some(mark) = mark else { return false };
        let asked = self.request(reqwest::Method::HEAD, at, path, token).timeout(CONNECT).send().await;
        asked.is_ok_and(|answer| match answer.status() {
            StatusCode::CONFLICT => true,
            status => status.is_success() && answer.headers().get(MARK) != Some(&mark),
        })
    }

    /// Brings what was put away into the container of a session.
    ///
    /// # Errors
    /// Nobody listens there yet, it is damaged, or something does not answer.
    pub async fn bring(&self, session: &Session, name: &str, at: &Endpoint, token: &str) -> Result<()> {
        // Before it is fetched: a container takes a while to listen. One of several has spoken already.
        if session.place.is_none() {
            self.listens(at).await?;
        }
        let known =
            Name::read(&self.fleet, name).ok_or_else(|| Error::Lasting(format!("`{name}` is no name of what was put away")))?;
        let spooled = self.spooled();
        self.shelf.get(name, &spooled.0).await?;
        let path = spooled.0.clone();
        let digest = tokio::task::spawn_blocking(move || digest(&path)).await;
        if digest.map_err(|_| Error::Passing(String::from("reading it has panicked")))?? != known.digest {
            return Err(Error::Lasting(String::from("what was put away is not what it was: its digest is another")));
        }
        let (say, hear) = mpsc::channel(CHUNKS);
        let path = spooled.0.clone();
        let unpacking = tokio::task::spawn_blocking(move || unpack(&path, &say));
        let parts = futures_util::stream::unfold(hear, |mut hear| async move { hear.recv().await.map(|part| (part, hear)) });
        let asked = self.request(reqwest::Method::PUT, at, &path_of(session), token).body(reqwest::Body::wrap_stream(parts));
        let answer = answered(asked.send().await).await;
        drop(unpacking.await);
        answer.map(drop)
    }

    /// Whether it is the sidecar that answers, and not who stands before it.
    async fn listens(&self, at: &Endpoint) -> Result<()> {
        let not_yet = |error: reqwest::Error| Error::NotYet(error.without_url().to_string());
        let asked = self.client.get(format!("{}/livez", at.url)).timeout(CONNECT);
        let answer = headers(asked, at).send().await.map_err(not_yet)?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let unwell = status == StatusCode::SERVICE_UNAVAILABLE && {
            let said = answer.text().await.map_err(not_yet)?;
            UNWELL.iter().any(|words| said.starts_with(words))
        };
        if unwell { Ok(()) } else { Err(Error::NotYet(format!("something says {}, and is not the sidecar", status.as_u16()))) }
    }

    fn request(&self, method: reqwest::Method, at: &Endpoint, path: &str, token: &str) -> reqwest::RequestBuilder {
        headers(self.client.request(method, format!("{}{path}", at.url)).bearer_auth(token).timeout(LONGEST), at)
    }

    async fn of(&self, session: &SessionId) -> Result<Vec<String>> {
        self.shelf.list(&format!("{}/{session}/", self.fleet)).await
    }

    /// Removes all but the last, but never `put`, nor what the session still goes on with: nobody may have written down yet that there is another.
    async fn thin(&self, session: &Session, put: &str) -> Result<()> {
        let names = self.of(&session.id).await?.into_iter();
        let mut names: Vec<(i64, String)> =
            names.filter_map(|text| Some((Name::read(&self.fleet, &text)?.unix_ms, text))).collect();
        names.sort();
        names.truncate(names.len().saturating_sub(self.keep.max(1)));
        for (_, name) in names.iter().filter(|(_, name)| name != put && Some(name) != session.archive.as_ref()) {
            self.shelf.delete(name).await?;
        }
        Ok(())
    }

    /// Removes all of a session.
    ///
    /// # Errors
    /// The shelf does not answer: [`Self::sweep`] finds them later.
    pub async fn forget(&self, session: &SessionId) -> Result<()> {
        for name in self.of(session).await? {
            self.shelf.delete(&name).await?;
        }
        Ok(())
    }

    /// Removes what was kept long enough of sessions that are over, or that nobody knows. How many. What is older than the store is left alone: it may be the
    /// wrong store.
    ///
    /// # Errors
    /// The shelf or the store does not answer.
    pub async fn sweep(&self, store: &Arc<dyn Store>, now: Timestamp) -> Result<usize> {
        self.tidy(now).await;
        let unread = |error: crate::store::Error| Error::Passing(error.to_string());
        let born = store.born().await.map_err(unread)?;
        let mut sessions: BTreeMap<SessionId, Vec<(Name, String)>> = BTreeMap::new();
        for text in self.shelf.list(&format!("{}/", self.fleet)).await? {
            if let Some(name) = Name::read(&self.fleet, &text) {
                sessions.entry(name.session.clone()).or_default().push((name, text));
            }
        }
        let mut removed = 0;
        for (id, names) in sessions {
            let session = store.get(&id).await.map_err(unread)?;
            if session.as_ref().is_some_and(|session| !session.is_over()) {
                continue;
            }
            let failed = session.as_ref().is_some_and(|session| session.phase == Phase::Failed);
            let least = if failed { FAILED_KEPT } else { Duration::ZERO };
            let kept = self.keep_for.unwrap_or_default().max(least);
            for (name, text) in names {
                let at = Timestamp::from_millisecond(name.unix_ms).unwrap_or(now);
                let over = session.as_ref().map_or(at, |session| session.since);
                if over + kept <= now && (session.is_some() || at >= born) {
                    self.shelf.delete(&text).await?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }

    /// Removes what somebody who was killed has left half done: it is as private as what is whole.
    async fn tidy(&self, now: Timestamp) {
        let before = UNIX_EPOCH + Duration::from_millis(now.as_millisecond().unsigned_abs()) - ABANDONED;
        if let Err(error) = self.shelf.tidy(&format!("{}/", self.fleet), before).await {
            tracing::warn!(%error, "conversations that were put away by half cannot be removed now");
        }
        let spool = self.spool.clone();
        let swept = tokio::task::spawn_blocking(move || {
            let is_ours = |name: &str| name.starts_with(SPOOLED) && name.ends_with(ENDING);
            for entry in std::fs::read_dir(spool)?.flatten() {
                if entry.file_name().to_str().is_some_and(is_ours) && is_older(&entry, before) {
                    std::fs::remove_file(entry.path())?;
                }
            }
            Ok::<_, std::io::Error>(())
        });
        if let Ok(Err(error)) = swept.await {
            tracing::warn!(%error, "conversations that were on their way cannot be removed now");
        }
    }
}

/// Where a session's is served.
fn path_of(session: &Session) -> String {
    session.place.as_ref().map_or_else(|| PATH.to_owned(), |_| format!("/sessions/{}{OF_SESSION}", session.id))
}

/// Whether it is a file, last written before then.
fn is_older(entry: &std::fs::DirEntry, before: SystemTime) -> bool {
    entry.metadata().is_ok_and(|file| file.is_file() && file.modified().is_ok_and(|written| written < before))
}

fn headers(asked: reqwest::RequestBuilder, at: &Endpoint) -> reqwest::RequestBuilder {
    at.headers.iter().fold(asked, |asked, (name, value)| asked.header(name, value))
}

/// What the sidecar says to it.
async fn answered(answer: std::result::Result<reqwest::Response, reqwest::Error>) -> Result<reqwest::Response> {
    let answer = answer.map_err(|error| passing("the sidecar does not answer", &error))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let said = answer.text().await.unwrap_or_default();
    let said: String = said.lines().next().unwrap_or_default().chars().take(200).collect();
    let what = format!("the sidecar says {}: {said}", status.as_u16());
    let lasting = status.is_client_error() && !matches!(status.as_u16(), 408 | 409 | 425 | 429);
    Err(if lasting { Error::Lasting(what) } else { Error::Passing(what) })
}

/// Digests what goes by.
struct Digesting<W> {
    to: W,
    context: Context,
    bytes: u64,
    most: u64,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.to.write(buf)?;
        self.context.update(&buf[..n]);
        self.bytes += n as u64;
        if self.bytes > self.most {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

fn hex(context: Context) -> String {
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compresses what comes into a file. Its digest.
fn pack(path: &Path, mut parts: mpsc::Receiver<Vec<u8>>, most: u64) -> Result<String> {
    let mut end = Vec::new();
    let mut pack = || -> std::io::Result<String> {
        let file = private(path)?;
        let to = Digesting { to: std::io::BufWriter::new(file), context: Context::new(&SHA256), bytes: 0, most };
        let mut gzip = flate2::write::GzEncoder::new(to, flate2::Compression::fast());
        while let Some(part) = parts.blocking_recv() {
            gzip.write_all(&part)?;
            end.extend_from_slice(&part[part.len().saturating_sub(TAR_END)..]);
            end.drain(..end.len().saturating_sub(TAR_END));
        }
        let mut digesting = gzip.finish()?;
        digesting.flush()?;
        Ok(hex(digesting.context))
    };
    let digest = pack().map_err(|error| match error.kind() {
        std::io::ErrorKind::FileTooLarge => Error::Lasting(format!("it is larger than `conversations.max_size`, {most} bytes")),
        _ => error.into(),
    })?;
    // Its container is destroyed after this: that the connection has ended well is not enough.
    let whole = end.len() == TAR_END && end.iter().all(|byte| *byte == 0);
    if whole { Ok(digest) } else { Err(Error::Passing(String::from(BROKEN_OFF))) }
}

fn digest(path: &Path) -> Result<String> {
    let mut context = Context::new(&SHA256);
    let mut file = std::fs::File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex(context)),
            n => context.update(&chunk[..n]),
        }
    }
}

/// Sends what is in a file, and an error in the place of what cannot be read: the request breaks off then.
fn unpack(path: &Path, say: &mpsc::Sender<std::io::Result<Vec<u8>>>) {
    let unpack = || -> std::io::Result<()> {
        let mut gzip = flate2::read::GzDecoder::new(std::io::BufReader::new(std::fs::File::open(path)?));
        loop {
            let mut chunk = vec![0; CHUNK];
            let n = gzip.read(&mut chunk)?;
            chunk.truncate(n);
            // Nobody listens any more: that is said elsewhere.
            if n == 0 || say.blocking_send(Ok(chunk)).is_err() {
                return Ok(());
            }
        }
    };
    if let Err(error) = unpack() {
        say.blocking_send(Err(error)).ok();
    }
}

/// A new file, for nobody else.
fn private(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}
