//! What a session is that goes on in another container: the CLI's config directory, with its transcripts, and the workspace.
//!
//! ```text
//!   GET /v1/conversation ──► a tar of both, while no agent works
//!   PUT /v1/conversation ◄── the same, into a container in which none has worked yet
//! ```
//!
//! Closed unless somebody opens it (`conversation.serve`), and then for whoever knows the container's token. When the conversation is put away
//! and where it is kept is not known here.

mod pack;
mod unpack;

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{Method, Request, StatusCode};
use tokio::sync::mpsc;

use crate::files;
use crate::http::{Answer, Body, reply, text};
use crate::hub::gate::{Gate, Keys, Peer, Token};
use pack::Opened;
use unpack::Unpacker;

pub(crate) const PATH: &str = "/v1/conversation";
/// What names the CLI's session that spoke last.
const NAMED: &str = "agent-conversation";
/// What our own directories begin with: never part of a conversation.
const STAGING: &str = ".agent-sidecar-";
/// So much at once, and so many of these on their way.
const CHUNK: usize = 64 * 1024;
const CHUNKS: usize = 16;
/// A client that neither takes nor sends anything for so long is gone.
const STALLS: Duration = Duration::from_secs(60);
/// However large it is.
const LONGEST: Duration = Duration::from_secs(30 * 60);
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
pub(super) enum Wrong {
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

    fn answer(&self) -> Answer {
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
    /// One transfer at a time.
    taken: Arc<tokio::sync::Semaphore>,
}

/// Whether an agent works; `None` if nobody knows.
pub(crate) type Works = Option<bool>;

impl Conversation {
    pub(crate) fn new(options: Options, fetched: Fetched) -> Conversation {
        let gate = Gate::new(Keys { control: true, tcp: true, token: options.token.clone() });
        Conversation { options: Arc::new(options), gate, fetched, taken: Arc::new(tokio::sync::Semaphore::new(1)) }
    }

    /// `works` is asked before, and after.
    pub(crate) async fn answer<W, F>(
        &self,
        request: Request<Incoming>,
        peer: Peer,
        cut: Arc<tokio::sync::Notify>,
        works: W,
    ) -> Answer
    where
        W: Fn() -> F + Send + 'static,
        F: Future<Output = Works> + Send,
    {
        let judged = self.gate.judge(peer, request.headers(), Instant::now());
        if let Some((status, why)) = judged.refusal() {
            return text(status, why);
        }
        let get = match *request.method() {
            Method::GET => true,
            Method::PUT => false,
            _ => return text(StatusCode::METHOD_NOT_ALLOWED, "take it with GET, bring it with PUT\n"),
        };
        let Ok(taken) = Arc::clone(&self.taken).try_acquire_owned() else {
            return Wrong::Busy(String::from("somebody else takes or brings it just now")).answer();
        };
        // Whose answer was lost asks again: by now an agent may work with it.
        if !get && self.fetched.is(&self.options.container) {
            drop(taken);
            let mut body = request.into_body();
            while let Ok(Some(Ok(_))) = tokio::time::timeout(STALLS, body.frame()).await {}
            return text(StatusCode::OK, "it was here already\n");
        }
        let idle = match works().await {
            Some(works) => !works,
            // Nothing runs yet, and so nothing can be asked.
            None => !get && self.fetched.waits.load(Relaxed),
        };
        if !idle {
            return Wrong::Busy(String::from("an agent works here, or may")).answer();
        }
        tokio::spawn(async move {
            tokio::time::sleep(LONGEST).await;
            cut.notify_one();
        });
        let mut answer = if get { self.take(taken, works).await } else { self.bring(taken, request.into_body()).await };
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        answer
    }

    async fn take<W, F>(&self, taken: tokio::sync::OwnedSemaphorePermit, works: W) -> Answer
    where
        W: Fn() -> F + Send + 'static,
        F: Future<Output = Works> + Send,
    {
        let options = Arc::clone(&self.options);
        let measured = tokio::task::spawn_blocking(move || {
            Opened::open(&options.roots)?.measure(&options.exclude, options.max_size)?;
            Ok::<_, Wrong>(newest(&options.roots))
        });
        let newest = match measured.await.unwrap_or_else(|_| Err(io::Error::other("it failed").into())) {
            Ok(newest) => newest,
            Err(wrong) => return wrong.answer(),
        };
        let (say, hear) = mpsc::channel::<io::Result<Bytes>>(CHUNKS);
        let options = Arc::clone(&self.options);
        tokio::spawn(async move {
            let _taken = taken;
            let out = say.clone();
            let packed = tokio::task::spawn_blocking(move || {
                let out = io::BufWriter::with_capacity(CHUNK, Out { out, handle: tokio::runtime::Handle::current() });
                Opened::open(&options.roots)?.pack(&options.exclude, options.max_size, out)
            });
            let mut packed = packed.await.unwrap_or_else(|_| Err(io::Error::other("it failed").into()));
            if packed.is_ok() && works().await != Some(false) {
                packed = Err(Wrong::Busy(String::from("an agent has begun to work")));
            }
            if let Err(wrong) = packed {
                tracing::warn!(%wrong, "the conversation was not put away");
                // Breaks the answer off: what was sent is not all of it.
                say.send(Err(io::Error::other(wrong.to_string()))).await.ok();
            }
        });
        let mut answer = reply(StatusCode::OK, "application/x-tar", Vec::new());
        *answer.body_mut() = Body::Parts(hear);
        if let Some(name) = newest.and_then(|name| HeaderValue::from_str(&name).ok()) {
            answer.headers_mut().insert(NAMED, name);
        }
        answer
    }

    async fn bring(&self, taken: tokio::sync::OwnedSemaphorePermit, mut body: Incoming) -> Answer {
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

/// The session of the transcript that was written to last.
fn newest(roots: &[Root]) -> Option<String> {
    let projects = roots.iter().find(|root| root.name == "config")?.path.join("projects");
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
    let transcripts = entries(&projects).into_iter().flat_map(|project| entries(&project.path()));
    let last = transcripts.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let session = name.strip_suffix(".jsonl")?;
        // Of a session's own: what its subagents say has other names.
        let plain = is_uuid(session);
        let about = entry.metadata().ok().filter(|about| about.is_file())?;
        plain.then(|| Some((about.modified().ok()?, session.to_owned())))?
    });
    last.max().map(|(_, session)| session)
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
