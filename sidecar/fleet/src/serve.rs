//! Callers over HTTP/1: so many connections, each with so long to say what it wants. Who is slow takes no place from who asks.
//!
//! ```text
//!   accepted ──► head within HEAD ──► asks, for as long as its answer takes ──► head … ──► closed
//!                  └── where there are too many, the oldest of these goes
//! ```

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower::ServiceExt;

/// Connections at once: streams, and several times as many sidecars and callers that ask for a moment.
const CONNECTIONS: u32 = 4096;
/// How long a caller has to say what it wants, also with the next request of its connection.
const HEAD: Duration = Duration::from_secs(30);
/// Who takes nothing of what was sent for so long has hung up.
const TAKES: Duration = Duration::from_secs(30);
/// How long an answer may take to leave at the end, when all of it is there.
const FLUSHES: Duration = Duration::from_secs(2);
/// Of a head.
const HEAD_MOST: usize = 64 << 10;

/// Serves until it has ended, and then for as long as answers are on their way.
pub async fn serve(listener: TcpListener, router: Router, ended: watch::Receiver<bool>) {
    so_many(listener, router, ended, CONNECTIONS).await;
}

async fn so_many(listener: TcpListener, router: Router, ended: watch::Receiver<bool>, most: u32) {
    let mut connections = Connections::new(router, ended.clone(), most);
    let mut ends = ended;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ends.wait_for(|ended| *ended) => break,
        };
        match accepted {
            Ok((stream, _)) => connections.serve(stream).await,
            // Out of descriptors: somebody has to hang up first.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    drop(listener);
    connections.room.acquire_many(most).await.ok();
}

struct Connections {
    router: Router,
    ended: watch::Receiver<bool>,
    room: Arc<Semaphore>,
    /// Oldest first, with some that are over.
    open: VecDeque<Connection>,
    /// So many of them are looked through for those.
    many: usize,
}

struct Connection {
    task: tokio::task::JoinHandle<()>,
    asks: Arc<AtomicBool>,
}

impl Connections {
    fn new(router: Router, ended: watch::Receiver<bool>, most: u32) -> Self {
        Self { router, ended, room: Arc::new(Semaphore::new(most as usize)), open: VecDeque::new(), many: 0 }
    }

    async fn serve(&mut self, stream: TcpStream) {
        if self.open.len() >= self.many {
            self.tidy();
        }
        if self.room.available_permits() == 0 {
            self.make_room().await;
        }
        let Ok(place) = Arc::clone(&self.room).try_acquire_owned() else { return };
        let place = Stays(Arc::new(place));
        let within = u32::try_from(TAKES.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(&stream, within).ok();
        stream.set_nodelay(true).ok();
        let asks = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(talk(stream, self.router.clone(), self.ended.clone(), Arc::clone(&asks), place));
        self.open.push_back(Connection { task, asks });
    }

    fn tidy(&mut self) {
        self.open.retain(|connection| !connection.task.is_finished());
        self.many = 2 * self.open.len() + 16;
    }

    /// The oldest that asks for nothing has to go: a crowd that says nothing must not keep a probe out.
    async fn make_room(&mut self) {
        self.tidy();
        let oldest = self.open.iter().position(|connection| !connection.asks.load(Relaxed));
        if let Some(Connection { task, .. }) = oldest.and_then(|oldest| self.open.remove(oldest)) {
            task.abort();
            task.await.ok();
        }
    }
}

async fn talk(stream: TcpStream, router: Router, mut ended: watch::Receiver<bool>, asks: Arc<AtomicBool>, place: Stays) {
    let service = hyper::service::service_fn(|mut request: Request<Incoming>| {
        let router = router.clone();
        request.extensions_mut().insert(place.clone());
        asks.store(true, Relaxed);
        let asks = Asks(Arc::clone(&asks));
        async move {
            let answer = router.oneshot(request.map(Body::new)).await.unwrap_or_else(|never| match never {});
            Ok::<_, Infallible>(answer.map(|body| Answered { body, _asks: asks }))
        }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_MOST);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    // Whoever hangs up has hung up.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = ended.wait_for(|ended| *ended) => connection.as_mut().graceful_shutdown(),
    }
    // Nobody waits for a head that comes slowly; what was answered last may still be on its way.
    while tokio::time::timeout(FLUSHES, connection.as_mut()).await.is_err() {
        if !asks.load(Relaxed) {
            return;
        }
    }
}

/// A connection's place, with each of its requests: who makes something else of the connection is waited for as long as this is held.
#[derive(Clone)]
pub(crate) struct Stays(#[expect(dead_code, reason = "it is held")] Arc<OwnedSemaphorePermit>);

/// A request that is being answered.
struct Asks(Arc<AtomicBool>);

impl Drop for Asks {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

/// What it is answered, to its end.
struct Answered {
    body: Body,
    _asks: Asks,
}

impl hyper::body::Body for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const ASK: &[u8] = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n";

    struct Server {
        at: SocketAddr,
        /// One for each that has asked for `/wait`, and one for each that is to be answered.
        asked: Arc<Semaphore>,
        go: Arc<Semaphore>,
        end: watch::Sender<bool>,
        task: tokio::task::JoinHandle<()>,
    }

    /// With room for so many.
    async fn served(most: u32) -> Server {
        let (asked, go, (end, ended)) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)), watch::channel(false));
        let (asks, waits) = (Arc::clone(&asked), Arc::clone(&go));
        let wait = async move || {
            asks.add_permits(1);
            drop(waits.acquire().await);
        };
        let router = Router::new().route("/", get(async || "here")).route("/wait", get(wait));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        Server { at, asked, go, end, task: tokio::spawn(so_many(listener, router, ended, most)) }
    }

    async fn says(at: SocketAddr, what: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(what).await.unwrap();
        stream
    }

    /// What is heard until it is closed.
    async fn rest(mut stream: TcpStream) -> String {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.ok();
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn who_says_nothing_makes_room_and_who_asks_does_not() {
        let Server { at, asked, go, end, task } = served(3).await;
        let asks = says(at, b"GET /wait HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").await;
        asked.acquire().await.unwrap().forget();
        let mut slow = Vec::new();
        for _ in 0..20 {
            slow.push(says(at, b"GET / HTTP/1.1\r\nHost: h").await);
            // In its turn.
            let mut probe = says(at, ASK).await;
            let mut answer = [0; 12];
            probe.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200");
            slow.push(probe);
        }
        go.add_permits(1);
        assert!(rest(asks).await.starts_with("HTTP/1.1 200"), "through all of it");
        end.send(true).unwrap();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn who_asks_for_something_has_the_answer_before_the_end() {
        let Server { at, asked, go, end, task } = served(2).await;
        let mut idle = says(at, ASK).await;
        idle.read_exact(&mut [0; 12]).await.unwrap();
        let asks = says(at, b"GET /wait HTTP/1.1\r\nHost: here\r\n\r\n").await;
        asked.acquire().await.unwrap().forget();
        end.send(true).unwrap();
        // Who does not ask is not waited for, and nobody else is heard.
        rest(idle).await;
        while TcpStream::connect(at).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(!task.is_finished());
        go.add_permits(1);
        assert!(rest(asks).await.starts_with("HTTP/1.1 200"));
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_say_what_it_wants_is_not_waited_for() {
        let Server { at, end: _end, .. } = served(8).await;
        let began = tokio::time::Instant::now();
        assert!(rest(says(at, b"GET / HTTP/1.1\r\n").await).await.is_empty());
        assert!(began.elapsed() >= HEAD);
    }
}
