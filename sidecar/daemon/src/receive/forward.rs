//! What the CLI exported, on its way to where its user wanted it: the same bytes under the same headers, in order.
//!
//! Nobody waits for it: the CLI has its answer long before. What a collector does not take for a while is given up, counted, and said.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use agent_sidecar_core::metric;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;

use crate::supervise::Handle;

/// Posts that wait: two minutes of an agent at work.
const POSTS: usize = 256;
/// And their bytes.
const BYTES: usize = 32 * 1024 * 1024;
/// Before each attempt.
const ATTEMPTS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(500), Duration::from_secs(2)];
/// What an exporter waits for a collector by default.
const ANSWER: Duration = Duration::from_secs(10);

/// One POST of the CLI, and where it goes.
#[derive(Debug)]
pub(super) struct Post {
    pub(super) to: Arc<Uri>,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// How much waits, and somebody who waits for it.
#[derive(Debug, Default)]
struct Waiting {
    /// Posts and bytes.
    now: Mutex<(usize, usize)>,
    less: Condvar,
}

/// The end of the queue that posts are put into.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    sender: mpsc::UnboundedSender<Post>,
    waiting: Arc<Waiting>,
}

impl Queue {
    /// Puts one in; false when there is no room.
    pub(super) fn put(&self, post: Post) -> bool {
        let mut waiting = self.waiting.now.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.0 >= POSTS || waiting.1.saturating_add(post.body.len()) > BYTES {
            return false;
        }
        *waiting = (waiting.0 + 1, waiting.1 + post.body.len());
        drop(waiting);
        self.sender.send(post).is_ok()
    }

    /// Waits until all is sent or given up, or for so long; says whether it is.
    pub(super) fn flush(&self, timeout: Duration) -> bool {
        let waiting = self.waiting.now.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, _) =
            self.waiting.less.wait_timeout_while(waiting, timeout, |left| left.0 > 0).unwrap_or_else(PoisonError::into_inner);
        left.0 == 0
    }
}

/// Makes the queue, and a future that sends what is put into it for ever.
pub(super) fn queue(handle: Handle, authorities: Vec<PathBuf>) -> (Queue, impl Future<Output = ()>) {
    let (sender, mut receiver) = mpsc::unbounded_channel::<Post>();
    let queue = Queue { sender, waiting: Arc::default() };
    let waiting = Arc::clone(&queue.waiting);
    let send = async move {
        let mut open = Open { connections: BTreeMap::new(), tls: None, authorities };
        let mut failing = false;
        while let Some(post) = receiver.recv().await {
            let outcome = match deliver(&mut open, &post).await {
                Ok(()) => {
                    failing = false;
                    "sent"
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        let to = post.to.authority().map_or("", |authority| authority.host());
                        tracing::warn!(%error, to, "the CLI's telemetry is not forwarded; said once until it is again");
                    }
                    "failed"
                }
            };
            handle.visit(move |monitor, _| monitor.meters_mut().add(&metric::NATIVE_FORWARDS, &[outcome], 1));
            let mut left = waiting.now.lock().unwrap_or_else(PoisonError::into_inner);
            *left = (left.0.saturating_sub(1), left.1.saturating_sub(post.body.len()));
            drop(left);
            waiting.less.notify_all();
        }
    };
    (queue, send)
}

/// Why something was not delivered.
#[derive(Debug, thiserror::Error)]
enum Undelivered {
    #[error("no connection")]
    Connect(#[from] std::io::Error),
    #[error("the connection broke")]
    Http(#[from] hyper::Error),
    #[error("no answer in time")]
    Late,
    #[error("it was refused with {0}")]
    Refused(StatusCode),
    #[error("the destination is no address")]
    NoAddress,
}

type Connection = SendRequest<Full<Bytes>>;

/// Connections that may be used again, by authority, and what new ones need.
struct Open {
    connections: BTreeMap<String, Connection>,
    tls: Option<TlsConnector>,
    authorities: Vec<PathBuf>,
}

impl Open {
    async fn connect(&mut self, to: &Uri) -> Result<Connection, Undelivered> {
        let host = to.host().ok_or(Undelivered::NoAddress)?.trim_start_matches('[').trim_end_matches(']');
        let secure = to.scheme_str() == Some("https");
        let stream = TcpStream::connect((host, to.port_u16().unwrap_or(if secure { 443 } else { 80 }))).await?;
        if !secure {
            return speak(stream).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| Undelivered::NoAddress)?;
        let authorities = &self.authorities;
        let tls = self.tls.get_or_insert_with(|| connector(authorities)).clone();
        speak(tls.connect(name, stream).await?).await
    }
}

async fn speak(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Connection, Undelivered> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // Whoever sends hears of its end.
    tokio::task::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// Trusts whom the CLI trusts.
fn connector(authorities: &[PathBuf]) -> TlsConnector {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for file in authorities {
        match CertificateDer::pem_file_iter(file) {
            Ok(certificates) => {
                roots.add_parsable_certificates(certificates.flatten());
            }
            Err(error) => tracing::warn!(%error, file = %file.display(), "certificates cannot be read"),
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring knows both versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

async fn deliver(open: &mut Open, post: &Post) -> Result<(), Undelivered> {
    let mut last = Undelivered::Late;
    for pause in ATTEMPTS {
        tokio::time::sleep(pause).await;
        match tokio::time::timeout(ANSWER, attempt(open, post)).await {
            Ok(Ok(status)) if status.is_success() => return Ok(()),
            Ok(Ok(status)) if !matches!(status.as_u16(), 429 | 502 | 503 | 504) => return Err(Undelivered::Refused(status)),
            Ok(Ok(status)) => last = Undelivered::Refused(status),
            Ok(Err(error)) => last = error,
            Err(_) => last = Undelivered::Late,
        }
    }
    Err(last)
}

async fn attempt(open: &mut Open, post: &Post) -> Result<StatusCode, Undelivered> {
    let authority = post.to.authority().ok_or(Undelivered::NoAddress)?;
    // Taken out: it goes back only when its answer was read to the end.
    let mut reused = open.connections.remove(authority.as_str());
    if let Some(connection) = &mut reused
        && connection.ready().await.is_err()
    {
        reused = None;
    }
    let mut connection = match reused {
        Some(connection) => connection,
        None => open.connect(&post.to).await?,
    };
    let mut request = Request::new(Full::new(post.body.clone()));
    *request.method_mut() = Method::POST;
    let path = post.to.path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse().map_err(|_| Undelivered::NoAddress)?;
    *request.headers_mut() = forwarded(&post.headers);
    let host = HeaderValue::from_str(authority.as_str()).map_err(|_| Undelivered::NoAddress)?;
    request.headers_mut().insert(header::HOST, host);
    let answer = connection.send_request(request).await?;
    let status = answer.status();
    answer.into_body().collect().await?;
    open.connections.insert(authority.as_str().to_owned(), connection);
    Ok(status)
}

/// All but what belongs to the connection.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    const OURS: [HeaderName; 9] = [
        header::HOST,
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::EXPECT,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
    ];
    headers.iter().filter(|(name, _)| !OURS.contains(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}
