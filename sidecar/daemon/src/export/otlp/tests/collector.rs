//! A collector that does as it is told: real TCP, real HTTP, and it decodes what it gets.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Read;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use prost::Message;
use tokio::net::{TcpListener, TcpSocket};

use super::super::Signal;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to answer a request.
#[derive(Clone, Debug)]
pub(in super::super) enum Reply {
    Take,
    /// All but so many.
    Part(i64),
    /// An HTTP status, or with gRPC a gRPC status, and headers.
    Status(u16, &'static [(&'static str, &'static str)]),
    /// Never.
    Hang,
    /// Half of an answer, then the end of the connection.
    Cut,
    /// Taken, but the answer never ends.
    Dawdle,
    /// An answer of ten gigabytes.
    Endless,
    /// An answer in which nothing makes sense.
    Nonsense,
}

/// A request that came.
#[derive(Clone, Debug)]
pub(in super::super) struct Got {
    pub(in super::super) signal: Signal,
    /// The names of its spans, metrics or log records.
    pub(in super::super) names: Vec<String>,
    pub(in super::super) headers: HeaderMap,
    pub(in super::super) path: String,
    /// It was answered with [`Reply::Take`] or in part.
    pub(in super::super) taken: bool,
}

#[derive(Default)]
struct Desk {
    /// By signal; when they are used up, everything is taken.
    script: [VecDeque<Reply>; 3],
    always: [Option<Reply>; 3],
    got: Vec<Got>,
    /// Bytes of endless answers that somebody read.
    poured: u64,
}

pub(in super::super) struct Collector {
    pub(in super::super) address: SocketAddr,
    desk: Arc<(Mutex<Desk>, Condvar)>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Collector {
    pub(in super::super) fn start() -> Collector {
        Collector::on("127.0.0.1:0".parse().unwrap(), None)
    }

    /// On an address of its own choice, behind TLS if there is something to do it with.
    pub(in super::super) fn on(address: SocketAddr, tls: Option<rustls::ServerConfig>) -> Collector {
        let desk = Arc::new((Mutex::new(Desk::default()), Condvar::new()));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, address_of) = std::sync::mpsc::channel();
        let theirs = Arc::clone(&desk);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let socket = TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                socket.bind(address).unwrap();
                let listener = socket.listen(64).unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                let tls = tls.map(|config| tokio_rustls::TlsAcceptor::from(Arc::new(config)));
                tokio::select! {
                    () = accept(listener, tls, theirs) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Collector { address: address_of.recv().unwrap(), desk, stop: Some(stop), thread: Some(thread) }
    }

    pub(in super::super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// For the next requests of a signal.
    pub(in super::super) fn answer(&self, signal: Signal, replies: &[Reply]) {
        self.desk.0.lock().unwrap().script[signal as usize].extend(replies.iter().cloned());
    }

    /// For all others.
    pub(in super::super) fn always(&self, signal: Signal, reply: Reply) {
        self.desk.0.lock().unwrap().always[signal as usize] = Some(reply);
    }

    /// What came so far, once it is enough.
    pub(in super::super) fn wait(&self, enough: impl Fn(&[Got]) -> bool) -> Vec<Got> {
        let desk = self.desk.0.lock().unwrap();
        let (desk, waited) = self.desk.1.wait_timeout_while(desk, PATIENCE, |desk| !enough(&desk.got)).unwrap();
        assert!(!waited.timed_out(), "this is all that came: {:#?}", desk.got);
        desk.got.clone()
    }

    /// The names of what was taken of a signal.
    pub(in super::super) fn taken(&self, signal: Signal) -> Vec<String> {
        let got = &self.desk.0.lock().unwrap().got;
        got.iter().filter(|got| got.signal == signal && got.taken).flat_map(|got| got.names.clone()).collect()
    }

    pub(in super::super) fn poured(&self) -> u64 {
        self.desk.0.lock().unwrap().poured
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

type Shared = Arc<(Mutex<Desk>, Condvar)>;

async fn accept(listener: TcpListener, tls: Option<tokio_rustls::TlsAcceptor>, desk: Shared) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (tls, desk) = (tls.clone(), Arc::clone(&desk));
        tokio::spawn(async move {
            match tls {
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                        serve(TokioIo::new(stream), http2, desk).await;
                    }
                }
                None => {
                    // The preface of HTTP/2 gives it away.
                    let mut first = [0; 3];
                    let n = stream.peek(&mut first).await.unwrap_or(0);
                    serve(TokioIo::new(stream), &first[..n] == b"PRI", desk).await;
                }
            }
        });
    }
}

async fn serve<I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static>(io: I, http2: bool, desk: Shared) {
    let service = hyper::service::service_fn(move |request| handle(request, Arc::clone(&desk)));
    if http2 {
        drop(hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await);
    } else {
        drop(hyper::server::conn::http1::Builder::new().serve_connection(io, service).await);
    }
}

async fn handle(request: Request<Incoming>, desk: Shared) -> Result<Response<Pour>, Infallible> {
    let grpc = request.version() == Version::HTTP_2;
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let json = parts.headers.get("content-type").is_some_and(|kind| kind == "application/json");
    let (signal, names) = decode(parts.uri.path(), &plain(&body, grpc, &parts.headers), json);
    let reply = {
        let mut desk = desk.0.lock().unwrap();
        let usual = desk.always[signal as usize].clone();
        desk.script[signal as usize].pop_front().or(usual).unwrap_or(Reply::Take)
    };
    let taken = matches!(reply, Reply::Take | Reply::Part(_) | Reply::Dawdle);
    let got = Got { signal, names, headers: parts.headers, path: parts.uri.path().to_owned(), taken };
    desk.0.lock().unwrap().got.push(got);
    desk.1.notify_all();
    let mut response = Response::new(Pour::default());
    let mut grpc_status = HeaderMap::new();
    let mut message = Vec::new();
    match reply {
        Reply::Take => {}
        Reply::Part(rejected) => {
            let error_message = String::from("some are too old");
            let partial_success = Some(ExportTracePartialSuccess { rejected_spans: rejected, error_message });
            message = ExportTraceServiceResponse { partial_success }.encode_to_vec();
        }
        Reply::Status(status, headers) => {
            if grpc {
                grpc_status.insert("grpc-status", status.to_string().parse().unwrap());
            } else {
                *response.status_mut() = status.try_into().unwrap();
            }
            for (name, value) in headers {
                response.headers_mut().insert(*name, value.parse().unwrap());
                grpc_status.insert(*name, value.parse().unwrap());
            }
        }
        Reply::Hang => std::future::pending().await,
        Reply::Cut => {
            response.headers_mut().insert("content-length", "1000".parse().unwrap());
            response.body_mut().frames.push_back(Frame::data(Bytes::from_static(b"half")));
            response.body_mut().cut = true;
            return Ok(response);
        }
        Reply::Dawdle => {
            response.headers_mut().insert("content-length", "1000".parse().unwrap());
            response.body_mut().dawdles = true;
            return Ok(response);
        }
        Reply::Endless => {
            response.body_mut().endless = Some(desk);
            return Ok(response);
        }
        Reply::Nonsense => message = b"\xff\xfe<html>what?".to_vec(),
    }
    if grpc {
        message.splice(0..0, [0].into_iter().chain(u32::try_from(message.len()).unwrap().to_be_bytes()));
        grpc_status.entry("grpc-status").or_insert("0".parse().unwrap());
        response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    }
    response.body_mut().frames.push_back(Frame::data(Bytes::from(message)));
    if grpc {
        response.body_mut().frames.push_back(Frame::trailers(grpc_status));
    }
    Ok(response)
}

/// The message within its envelope.
fn plain(body: &[u8], grpc: bool, headers: &HeaderMap) -> Vec<u8> {
    let compressed = if grpc { body[0] == 1 } else { headers.get("content-encoding").is_some_and(|how| how == "gzip") };
    let message = if grpc { &body[5..] } else { body };
    if !compressed {
        return message.to_vec();
    }
    let mut whole = Vec::new();
    flate2::read::GzDecoder::new(message).read_to_end(&mut whole).unwrap();
    whole
}

fn message<T: Message + Default + serde::de::DeserializeOwned>(body: &[u8], json: bool) -> T {
    if json { serde_json::from_slice(body).unwrap() } else { T::decode(body).unwrap() }
}

fn decode(path: &str, body: &[u8], json: bool) -> (Signal, Vec<String>) {
    if path.contains("trace") {
        let request: ExportTraceServiceRequest = message(body, json);
        let scopes = request.resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        (Signal::Traces, scopes.flat_map(|scope| scope.spans).map(|span| span.name).collect())
    } else if path.contains("metrics") {
        let request: ExportMetricsServiceRequest = message(body, json);
        let scopes = request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics);
        (Signal::Metrics, scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name).collect())
    } else {
        let request: ExportLogsServiceRequest = message(body, json);
        let scopes = request.resource_logs.into_iter().flat_map(|resource| resource.scope_logs);
        (Signal::Logs, scopes.flat_map(|scope| scope.log_records).map(|record| record.event_name).collect())
    }
}

/// A body of frames, or of anything that a body should not be.
#[derive(Default)]
struct Pour {
    frames: VecDeque<Frame<Bytes>>,
    cut: bool,
    dawdles: bool,
    endless: Option<Shared>,
}

impl Body for Pour {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        const CHUNK: &[u8] = &[0x20; 64 * 1024];
        if let Some(desk) = &self.endless {
            let mut desk = desk.0.lock().unwrap();
            desk.poured += CHUNK.len() as u64;
            return Poll::Ready((desk.poured < 10 << 30).then(|| Ok(Frame::data(Bytes::from_static(CHUNK)))));
        }
        match self.frames.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None if self.dawdles => Poll::Pending,
            None if self.cut => Poll::Ready(Some(Err(std::io::Error::other("cut")))),
            None => Poll::Ready(None),
        }
    }
}
