//! Where the CLI exports its own telemetry to: an OTLP/HTTP receiver on loopback, which hands it to the monitor, and forwards it to
//! where its user wanted it.
//!
//! ```text
//!   CLI ─► POST /<token>/v1/{metrics,logs} ─┬─► decode ─► the monitor (Input::Native)
//!                                           └─► forward, byte for byte, if the user has a destination of his own
//! ```
//!
//! Tools of the agent can reach loopback, too. Who does not know the token is told that nothing is here; who has found it out can make
//! the agent look more expensive, and nothing else: what is too large, too much, or makes no sense is refused.

mod decode;
mod forward;
mod plan;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use agent_sidecar_core::{Input, metric};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, mpsc as channel};
use tokio::task::{AbortHandle, JoinSet};

use crate::supervise::{self, Handle};
use decode::Encoding;
pub(crate) use plan::{Choice, Decision, Plan, Surroundings, decide};

/// A body, packed or not. The CLI's own are ten kilobytes; with prompts in its events it may be some hundred times that.
const BODY: usize = 8 * 1024 * 1024;
/// Connections at once; one more, and the oldest goes. The CLI has two, and comes again when it is cut off.
const CONNECTIONS: usize = 32;
/// Reports that the monitor has not taken yet.
const REPORTS: usize = 8;
/// A body has this long to arrive, and a report to find room.
const SLOW: Duration = Duration::from_secs(10);

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Signal {
    Metrics,
    Logs,
}

impl Signal {
    pub(crate) const ALL: [Signal; 2] = [Signal::Metrics, Signal::Logs];

    /// As the path names it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Signal::Metrics => "metrics",
            Signal::Logs => "logs",
        }
    }
}

/// A receiver that is bound but not served yet.
#[derive(Debug)]
pub(crate) struct Receiver {
    listener: TcpListener,
    address: SocketAddr,
    token: String,
}

impl Receiver {
    pub(crate) fn bind() -> std::io::Result<Receiver> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let token = format!("{:016x}{:016x}", supervise::random(), supervise::random());
        Ok(Receiver { listener, address, token })
    }

    /// What a signal's path is appended to.
    pub(crate) fn base(&self) -> String {
        format!("http://{}/{}", self.address, self.token)
    }

    /// Serves until the process ends.
    pub(crate) fn serve(self, handle: Handle, plan: &Plan) -> std::io::Result<Served> {
        let (queue, send) = forward::queue(handle.clone(), plan.authorities().to_vec());
        let site = Site {
            prefix: format!("/{}/v1/", self.token),
            destinations: Signal::ALL.map(|signal| plan.destination(signal).cloned().map(Arc::new)),
            queue: queue.clone(),
            room: Arc::new(Semaphore::new(REPORTS)),
            handle,
        };
        let (settle, settles) = channel::unbounded_channel();
        std::thread::Builder::new().name(String::from("native")).stack_size(512 * 1024).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let served = runtime.and_then(|runtime| {
                runtime.block_on(async {
                    tokio::task::spawn(send);
                    accept(self.listener, Arc::new(site), settles).await
                })
            });
            if let Err(error) = served {
                tracing::error!(%error, "the CLI's telemetry is no longer received; the agent goes on");
            }
        })?;
        Ok(Served { settle, queue })
    }
}

/// Somebody who wants to know when all that was sent has been read.
type Settle = (Duration, mpsc::Sender<()>);

/// A receiver at work.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    settle: channel::UnboundedSender<Settle>,
    queue: forward::Queue,
}

impl Served {
    /// The CLI is gone: waits until what it had sent is with the monitor, at most so long.
    pub(crate) fn settle(&self, timeout: Duration) {
        let (say, hear) = mpsc::channel();
        if self.settle.send((timeout, say)).is_ok() {
            // Late or never, there is nothing else to do.
            hear.recv_timeout(timeout * 2).ok();
        }
    }

    /// Waits until all is forwarded, at most so long.
    pub(crate) fn flush(&self, timeout: Duration) {
        if !self.queue.flush(timeout) {
            tracing::warn!(?timeout, "the last of the CLI's telemetry was not forwarded in time");
        }
    }
}

struct Site {
    /// Of every path that is answered.
    prefix: String,
    /// By the number of the signal.
    destinations: [Option<Arc<hyper::Uri>>; 2],
    queue: forward::Queue,
    room: Arc<Semaphore>,
    handle: Handle,
}

async fn accept(listener: TcpListener, site: Arc<Site>, mut settles: channel::UnboundedReceiver<Settle>) -> std::io::Result<()> {
    // Asks the kernel itself who is still waiting.
    let plain = listener.try_clone()?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut tasks = JoinSet::new();
    let mut open: VecDeque<AbortHandle> = VecDeque::with_capacity(CONNECTIONS);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    while tasks.try_join_next().is_some() {}
                    open.retain(|connection| !connection.is_finished());
                    if open.len() >= CONNECTIONS {
                        open.pop_front().inspect(AbortHandle::abort);
                    }
                    open.push_back(tasks.spawn(serve(stream, Arc::clone(&site))));
                }
                // Out of descriptors, most likely the agent's doing: others need them more.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some((timeout, say)) = settles.recv() => {
                while let Ok((stream, _)) = plain.accept() {
                    stream.set_nonblocking(true)?;
                    tasks.spawn(serve(tokio::net::TcpStream::from_std(stream)?, Arc::clone(&site)));
                }
                // A connection ends when the CLI's end of it did and all was read; a tool may hold one of its own.
                let all = async { while tasks.join_next().await.is_some() {} };
                tokio::time::timeout(timeout, all).await.ok();
                say.send(()).ok();
            }
        }
    }
}

async fn serve(stream: tokio::net::TcpStream, site: Arc<Site>) {
    let service = hyper::service::service_fn(|request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(answer(request, &site).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // Between two exports nothing comes: an idle connection is not a slow one.
        .header_read_timeout(None)
        // Whoever was killed behind his last word is heard to the end.
        .half_close(true)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    // Whoever hangs up has hung up.
    connection.await.ok();
}

async fn answer(request: Request<Incoming>, site: &Site) -> Response<Full<Bytes>> {
    let signal = request.uri().path().strip_prefix(&site.prefix);
    let Some(signal) = signal.and_then(|name| Signal::ALL.into_iter().find(|signal| signal.as_str() == name)) else {
        return status(StatusCode::NOT_FOUND);
    };
    let answered = take(request, signal, site).await;
    let outcome = if answered.is_ok() { "taken" } else { "refused" };
    site.handle.visit(move |monitor, _| monitor.meters_mut().add(&metric::NATIVE_REPORTS, &[signal.as_str(), outcome], 1));
    match answered {
        Ok(encoding) => {
            let (content_type, body) = match encoding {
                Encoding::Protobuf => ("application/x-protobuf", &b""[..]),
                Encoding::Json => ("application/json", &b"{}"[..]),
            };
            let mut response = Response::new(Full::new(Bytes::from_static(body)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            response
        }
        Err(code) => status(code),
    }
}

/// Reads a POST, sends it on its way, and hands in what it says.
async fn take(request: Request<Incoming>, signal: Signal, site: &Site) -> Result<Encoding, StatusCode> {
    if request.method() != Method::POST {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let encoding = encoding(request.headers()).ok_or(StatusCode::UNSUPPORTED_MEDIA_TYPE)?;
    let packed = match request.headers().get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        Some(_) => return Err(StatusCode::UNSUPPORTED_MEDIA_TYPE),
    };
    let (head, body) = request.into_parts();
    let body = match tokio::time::timeout(SLOW, Limited::new(body, BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => return Err(StatusCode::PAYLOAD_TOO_LARGE),
        Ok(Err(_)) => return Err(StatusCode::BAD_REQUEST),
        Err(_) => return Err(StatusCode::REQUEST_TIMEOUT),
    };
    if let Some(to) = &site.destinations[signal as usize] {
        let post = forward::Post { to: Arc::clone(to), headers: head.headers, body: body.clone() };
        if !site.queue.put(post) {
            site.handle.visit(|monitor, _| monitor.meters_mut().add(&metric::NATIVE_FORWARDS, &["dropped"], 1));
        }
    }
    let plain = if packed { decode::unpack(&body, BODY) } else { Ok(body) };
    let report = plain.and_then(|plain| decode::report(signal, encoding, &plain)).map_err(|error| {
        tracing::debug!(%error, signal = signal.as_str(), "a report of the CLI was not understood");
        StatusCode::BAD_REQUEST
    })?;
    // Whoever floods waits here, and not in the monitor's queue.
    let Ok(Ok(room)) = tokio::time::timeout(SLOW, Arc::clone(&site.room).acquire_owned()).await else {
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    };
    // Before the answer: the CLI may end as soon as it has that, and its end must not be heard of first.
    site.handle.visit(move |monitor, now| {
        monitor.handle(now, Input::Native(&report));
        drop(room);
    });
    Ok(encoding)
}

fn encoding(headers: &HeaderMap) -> Option<Encoding> {
    let kind = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    match kind.split(';').next()?.trim() {
        "application/x-protobuf" => Some(Encoding::Protobuf),
        "application/json" => Some(Encoding::Json),
        _ => None,
    }
}

fn status(code: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = code;
    response
}

#[cfg(test)]
mod tests;
