//! What a session is that goes on in another container: the CLI's config directory, with its transcripts, and the workspace.
//!
//! ```text
//!   GET /v1/conversation ──► a tar of both, while no agent works
//!   HEAD                 ──► what a GET would begin with: whether it is still what was taken
//!   PUT /v1/conversation ◄── the same, into a container in which none has worked yet
//! ```
//!
//! Where [`crate::serve`] has a directory for each session, each has such a conversation of its own.
//!
//! Closed unless somebody opens it (`conversation.serve`), and then for whoever knows the container's token. When the conversation is put away
//! and where it is kept is not known here.

mod pack;
mod unpack;

pub(crate) use unpack::unlock_all;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request, StatusCode};
use tokio::sync::mpsc;

use crate::files;
use crate::http::{Answer, Body, Line, reply, text};
use crate::hub::gate::{Gate, Keys, Peer, Token};
use pack::Opened;
use unpack::Unpacker;

pub(crate) const PATH: &str = "/v1/conversation";
/// What names the CLI's session that spoke last.
const NAMED: &str = "agent-conversation";
/// What says how far it has come: another word, and somebody has worked since.
const MARK: &str = "agent-conversation-mark";
/// What our own directories begin with: never part of a conversation.
const STAGING: &str = ".agent-sidecar-";
/// So much at once, and so many of these on their way.
const CHUNK: usize = 64 * 1024;
const CHUNKS: usize = 16;
/// A client that neither takes nor sends anything for so long is gone.
const STALLS: Duration = Duration::from_secs(60);
/// However large it is.
const LONGEST: Duration = Duration::from_secs(30 * 60);
/// Of a body that nobody wants so much is read, and for so long: whoever is still sending would see a reset, and no answer.
const UNWANTED: usize = 1 << 20;
const UNWANTED_FOR: Duration = Duration::from_secs(2);
/// How often a start that waits looks whether it may go on.
const LOOK: Duration = Duration::from_millis(50);

/// A directory that is part of it, under its name in the tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    pub(crate) name: &'static str,
    /// Without a link in it.
    pub(crate) path: PathBuf,
}

/// What the configuration says of it.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) token: Token,
    pub(crate) roots: Vec<Root>,
    /// Names that are left out, wherever they are, or paths below a root.
    pub(crate) exclude: Vec<String>,
    pub(crate) max_size: u64,
    /// What this container is called, for those who wait.
    pub(crate) container: String,
}

/// Why it is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Large(String),
    #[error("{0}")]
    Unfit(String),
    // Without a path: it is the agent's business.
    #[error("a file of the conversation cannot be read or written: {}", .0.kind())]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for Wrong {
    fn from(error: rustix::io::Errno) -> Wrong {
        Wrong::Io(error.into())
    }
}

impl Wrong {
    fn status(&self) -> StatusCode {
        match self {
            Wrong::Busy(_) => StatusCode::CONFLICT,
            Wrong::Large(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Wrong::Unfit(_) => StatusCode::BAD_REQUEST,
            Wrong::Io(error) if error.kind() == io::ErrorKind::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
            Wrong::Io(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub(crate) fn answer(&self) -> Answer {
        text(self.status(), format!("{self}\n"))
    }
}

/// That it was fetched into this container: for this process, and for others that have the same place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fetched {
    file: Option<PathBuf>,
    done: Arc<AtomicBool>,
    /// An agent is to be started, and waits: none works yet.
    waits: Arc<AtomicBool>,
}

impl Fetched {
    pub(crate) fn new(file: Option<PathBuf>) -> Fetched {
        Fetched { file, ..Fetched::default() }
    }

    fn is(&self, container: &str) -> bool {
        self.done.load(Relaxed)
            || self.file.as_deref().and_then(|file| files::read_to_string(file).ok()).is_some_and(|said| said == container)
    }

    fn say(&self, container: &str) -> io::Result<()> {
        self.done.store(true, Relaxed);
        self.file.as_deref().map_or(Ok(()), |file| files::write(file, container.as_bytes()))
    }

    /// Waits until it was, or for so long, or until `stop`. Whether it was.
    pub(crate) fn wait(&self, container: &str, most: Duration, stop: &AtomicBool) -> bool {
        self.waits.store(true, Relaxed);
        let deadline = Instant::now() + most;
        let mut is = self.is(container);
        while !is && !stop.load(Relaxed) && Instant::now() < deadline {
            std::thread::sleep(LOOK);
            is = self.is(container);
        }
        self.waits.store(false, Relaxed);
        is
    }
}

/// See the module's head.
pub(crate) struct Conversation {
    options: Arc<Options>,
    gate: Gate,
    fetched: Fetched,
    /// So many transfers at a time.
    taken: Arc<tokio::sync::Semaphore>,
}

/// `None` if nobody knows.
pub(crate) type Works = Option<Work>;

/// What agents do, at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) busy: bool,
    /// Those that are over: one may begin and end between two looks.
    pub(crate) turns: u64,
}

impl Work {
    pub(crate) fn new(busy: bool, status: &serde_json::Value) -> Work {
        Work { busy, turns: status["totals"]["turns"].as_u64().unwrap_or_default() }
    }
}

impl Conversation {
    pub(crate) fn new(options: Options, fetched: Fetched) -> Conversation {
        Conversation::beside(options, fetched, &Arc::new(tokio::sync::Semaphore::new(1)))
    }

    /// One of several, which are taken and brought as far as there is room.
    pub(crate) fn beside(options: Options, fetched: Fetched, room: &Arc<tokio::sync::Semaphore>) -> Conversation {
        Conversation { gate: gate(&options), options: Arc::new(options), fetched, taken: Arc::clone(room) }
    }

    /// `works` is asked before, and after. Each has a connection of its own: nobody waits for what more may come on it.
    pub(crate) async fn answer<W, F>(&self, request: Request<Incoming>, peer: Peer, line: &Line, works: W) -> Answer
    where
        W: Fn() -> F + Send + 'static,
        F: Future<Output = Works> + Send,
    {
        let (parts, body) = request.into_parts();
        match self.admit(&parts, peer) {
            Ok(what) => {
                line.lasts_for(LONGEST);
                self.transfer(what, body, works).await
            }
            Err((status, why)) => last(text(status, why), body).await,
        }
    }

    /// The same, of whoever was let in.
    pub(crate) async fn transfer<W, F>(&self, what: What, mut body: Incoming, works: W) -> Answer
    where
        W: Fn() -> F + Send + 'static,
        F: Future<Output = Works> + Send,
    {
        let answer = self.admitted(what, &mut body, works).await;
        last(answer, body).await
    }

    /// What is wanted, of whom may want it.
    fn admit(&self, asked: &Parts, peer: Peer) -> Result<What, (StatusCode, &'static str)> {
        let judged = self.gate.judge(peer, &asked.headers, Instant::now());
        if let Some(refusal) = judged.refusal() {
            return Err(refusal);
        }
        What::of(&asked.method).ok_or((StatusCode::METHOD_NOT_ALLOWED, "take it with GET, bring it with PUT\n"))
    }

    /// Whether it was brought into this container.
    pub(crate) fn is_here(&self) -> bool {
        self.fetched.is(&self.options.container)
    }

    /// What the CLI calls the session in it that spoke last.
    pub(crate) async fn newest(&self) -> Option<String> {
        self.blocking(|options| Ok(written(&options.roots))).await.ok()?.newest
    }

    async fn admitted<W, F>(&self, what: What, body: &mut Incoming, works: W) -> Answer
    where
        W: Fn() -> F + Send + 'static,
        F: Future<Output = Works> + Send,
    {
        let busy = Wrong::Busy(String::from("an agent works here, or may"));
        if what == What::Look {
            let written = self.blocking(|options| Ok(written(&options.roots))).await;
            return match (written, works().await) {
                (Err(wrong), _) => wrong.answer(),
                (Ok(_), None | Some(Work { busy: true, .. })) => busy.answer(),
                (Ok(written), Some(work)) => named(&written, work),
            };
        }
        let Ok(taken) = Arc::clone(&self.taken).try_acquire_owned() else {
            return Wrong::Busy(String::from("somebody else takes or brings it just now")).answer();
        };
        // Whose answer was lost asks again: by now an agent may work with it.
        if what == What::Bring && self.is_here() {
            drop(taken);
            while let Ok(Some(Ok(_))) = tokio::time::timeout(STALLS, body.frame()).await {}
            return text(StatusCode::OK, "it was here already\n");
        }
        let idle = match works().await {
            Some(work) => !work.busy,
            // Nothing runs yet, and so nothing can be asked.
            None => what == What::Bring && self.fetched.waits.load(Relaxed),
        };
        if !idle {
            return busy.answer();
        }
        if what == What::Bring { self.bring(taken, body).await } else { self.take(taken, works).await }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Options) -> Result<T, Wrong> + Send + 'static,
    ) -> Result<T, Wrong> {
        let options = Arc::clone(&self.options);
        let asked = tokio::task::spawn_blocking(move || ask(&options));
        asked.await.unwrap_or_else(|_| Err(io::Error::other("it failed").into()))
    }

    async fn take<W, F>(&self, taken: tokio::sync::OwnedSemaphorePermit, works: W) -> Answer
    where
        W: Fn() -> F + Send + 'static,
        F: Future<Output = Works> + Send,
    {
        let measured = self.blocking(|options| {
            Opened::open(&options.roots)?.measure(&options.exclude, options.max_size)?;
            Ok(written(&options.roots))
        });
        let before = match (measured.await, works().await) {
            (Ok(written), Some(work)) if !work.busy => (written, work),
            (Ok(_), _) => return Wrong::Busy(String::from("an agent may work here")).answer(),
            (Err(wrong), _) => return wrong.answer(),
        };
        let mut answer = named(&before.0, before.1);
        let (say, hear) = mpsc::channel::<io::Result<Bytes>>(CHUNKS);
        let options = Arc::clone(&self.options);
        tokio::spawn(async move {
            let _taken = taken;
            let out = say.clone();
            let packed = tokio::task::spawn_blocking(move || {
                let out = io::BufWriter::with_capacity(CHUNK, Out { out, handle: tokio::runtime::Handle::current() });
                Opened::open(&options.roots)?.pack(&options.exclude, options.max_size, out)?;
                Ok(written(&options.roots))
            });
            let packed = packed.await.unwrap_or_else(|_| Err(io::Error::other("it failed").into()));
            let packed = match packed {
                // One whose turn is over by now has worked, too.
                Ok(written) if works().await != Some(before.1) || written != before.0 => {
                    Err(Wrong::Busy(String::from("an agent has worked meanwhile")))
                }
                packed => packed,
            };
            if let Err(wrong) = packed {
                tracing::warn!(%wrong, "the conversation was not put away");
                // Breaks the answer off: what was sent is not all of it.
                say.send(Err(io::Error::other(wrong.to_string()))).await.ok();
            }
        });
        *answer.body_mut() = Body::Parts(hear);
        answer
    }

    async fn bring(&self, taken: tokio::sync::OwnedSemaphorePermit, body: &mut Incoming) -> Answer {
        let (say, hear) = mpsc::channel::<io::Result<Bytes>>(CHUNKS);
        let brought = Brought { options: Arc::clone(&self.options), fetched: self.fetched.clone(), taken };
        let unpacked = tokio::task::spawn_blocking(move || brought.unpack(In { hear, rest: Bytes::new() }));
        loop {
            let part = match tokio::time::timeout(STALLS, body.frame()).await {
                Ok(None) => break,
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Ok(data),
                    Err(_) => continue,
                },
                Ok(Some(Err(_))) => Err(io::Error::from(io::ErrorKind::ConnectionReset)),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            };
            let last = part.is_err();
            // Whoever does not read on has found something wrong.
            if say.send(part).await.is_err() || last {
                break;
            }
        }
        drop(say);
        match unpacked.await.unwrap_or_else(|_| Err(io::Error::other("it failed").into())) {
            Ok(()) => text(StatusCode::OK, "it is here\n"),
            Err(wrong) => wrong.answer(),
        }
    }
}

/// One that is on its way in, to its end: whether or not anybody waits for the answer.
struct Brought {
    options: Arc<Options>,
    fetched: Fetched,
    taken: tokio::sync::OwnedSemaphorePermit,
}

impl Brought {
    fn unpack(self, from: impl Read) -> Result<(), Wrong> {
        let mut unpacker = Unpacker::new(&self.options.roots, &self.options.exclude, self.options.max_size);
        let done = unpacker.read(from).and_then(|()| unpacker.finish());
        let done = done.and_then(|()| Ok(self.fetched.say(&self.options.container)?));
        match &done {
            Ok(()) => tracing::info!("the conversation is here"),
            Err(wrong) => tracing::warn!(%wrong, "the conversation was not taken back"),
        }
        drop(self.taken);
        done
    }
}

/// What is wanted of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Take,
    /// How far it has come.
    Look,
    Bring,
}

impl What {
    pub(crate) fn of(method: &Method) -> Option<What> {
        match *method {
            Method::GET => Some(What::Take),
            Method::HEAD => Some(What::Look),
            Method::PUT => Some(What::Bring),
            _ => None,
        }
    }
}

/// The last answer on a connection: nobody waits for what more may come on it.
pub(crate) async fn last(mut answer: Answer, body: Incoming) -> Answer {
    if !answer.status().is_success() {
        drop(tokio::time::timeout(UNWANTED_FOR, Limited::new(body, UNWANTED).collect()).await);
    }
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Who is let in: whoever knows the container's token.
pub(crate) fn gate(options: &Options) -> Gate {
    Gate::new(Keys { control: true, tcp: true, token: options.token.clone() })
}

/// How far the transcripts have come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Written {
    /// The session that was written to last.
    newest: Option<String>,
    /// Of all names, sizes and times: not of what is in them.
    hash: u64,
}

fn written(roots: &[Root]) -> Written {
    let Some(config) = roots.iter().find(|root| root.name == "config") else { return Written::default() };
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
    let transcripts = entries(&config.path.join("projects")).into_iter().flat_map(|project| entries(&project.path()));
    let read = transcripts.filter_map(|entry| {
        let about = entry.metadata().ok().filter(|about| about.is_file())?;
        let session = entry.file_name().into_string().ok()?.strip_suffix(".jsonl")?.to_owned();
        Some((about.modified().ok()?, about.len(), session))
    });
    let mut all: Vec<_> = read.collect();
    all.sort_unstable();
    let mut hash = DefaultHasher::new();
    all.hash(&mut hash);
    // Of a session's own: what its subagents say has other names.
    let newest = all.into_iter().rev().map(|(_, _, session)| session).find(|session| is_uuid(session));
    Written { newest, hash: hash.finish() }
}

/// An answer that says which conversation it is, and how far it has come.
fn named(written: &Written, work: Work) -> Answer {
    let mut answer = reply(StatusCode::OK, "application/x-tar", Vec::new());
    let mark = format!("{}-{:016x}", work.turns, written.hash);
    for (name, value) in [(NAMED, written.newest.as_ref()), (MARK, Some(&mark))] {
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(value).ok()) {
            answer.headers_mut().insert(name, value);
        }
    }
    answer
}

fn is_uuid(text: &str) -> bool {
    let dashes = [8, 13, 18, 23];
    text.len() == 36 && text.char_indices().all(|(at, c)| if dashes.contains(&at) { c == '-' } else { c.is_ascii_hexdigit() })
}

/// Without links, as far as it is there: before an agent can make some.
pub(crate) fn settled(path: &Path) -> PathBuf {
    let mut there = path.to_owned();
    let mut below = Vec::new();
    loop {
        if let Ok(found) = there.canonicalize() {
            return below.iter().rev().fold(found, |path, name| path.join(name));
        }
        match (there.file_name().map(std::ffi::OsStr::to_owned), there.parent().map(Path::to_owned)) {
            (Some(name), Some(parent)) => {
                below.push(name);
                there = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

/// To whoever takes it.
struct Out {
    out: mpsc::Sender<io::Result<Bytes>>,
    handle: tokio::runtime::Handle,
}

impl Write for Out {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let part = Bytes::copy_from_slice(buf);
        let sent = self.handle.block_on(tokio::time::timeout(STALLS, self.out.send(Ok(part))));
        match sent {
            Ok(Ok(())) => Ok(buf.len()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// From whoever brings it.
struct In {
    hear: mpsc::Receiver<io::Result<Bytes>>,
    rest: Bytes,
}

impl Read for In {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.hear.blocking_recv() {
                None => return Ok(0),
                Some(part) => self.rest = part?,
            }
        }
        let n = self.rest.len().min(buf.len());
        buf[..n].copy_from_slice(&self.rest.split_to(n));
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
