//! Providers that do not exist: they keep what the real ones say they keep, judge each request by the real ones' contracts, run commands for real,
//! and fail when they are told to.

pub(crate) mod cloudflare;
pub(crate) mod contract;
pub(crate) mod daytona;
pub(crate) mod e2b;
pub(crate) mod fly;
pub(crate) mod grpc;
pub(crate) mod kubernetes;
pub(crate) mod machine;
pub(crate) mod modal;
pub(crate) mod vercel;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::Response;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::conformance::{Call, Fault};

pub(crate) const TOKEN: &str = "e2b_0000000000000000000000000000000000000000";

/// A connection that is about to be no HTTP any more.
pub(crate) type Upgraded = BoxFuture<'static, hyper::Result<hyper::upgrade::Upgraded>>;
type Serve = Box<dyn FnOnce(Upgraded) -> BoxFuture<'static, ()> + Send>;

pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: Vec<String>,
    pub(crate) query: Vec<(String, String)>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn segments(&self) -> Vec<&str> {
        self.path.iter().map(String::as_str).collect()
    }

    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(has, _)| has == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

pub(crate) enum Content {
    Json(Value),
    Bytes(&'static str, Vec<u8>),
    Stream(&'static str, mpsc::UnboundedReceiver<Vec<u8>>),
    /// The answer, and what is done with the connection then.
    Upgrade(Response, Serve),
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) content: Content,
}

impl Reply {
    pub(crate) fn json(status: u16, body: Value) -> Self {
        Self { status, headers: Vec::new(), content: Content::Json(body) }
    }

    pub(crate) fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), content: Content::Bytes("text/plain", Vec::new()) }
    }
}

/// One provider's own.
pub(crate) trait Api: Send + Sync + 'static {
    /// What this request is, for those that can be disturbed.
    fn call(&self, request: &Request) -> Option<Call>;
    /// Whether it may be asked like this.
    fn judge(&self, request: &Request) -> Result<(), String>;
    /// Whether the real one could answer like that.
    fn judge_reply(&self, request: &Request, reply: &Reply) -> Result<(), String>;
    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply>;
    /// How it says no.
    fn refuse(&self, status: u16, message: &str) -> Value;
    /// Makes the state in this answer one that nobody knows.
    fn unknown_state(&self, body: &mut Value);
}

/// The server of one.
pub(crate) struct Fake<A> {
    pub(crate) api: Arc<A>,
    pub(crate) address: String,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    faults: Mutex<VecDeque<(Call, Fault)>>,
    wrong: Mutex<Vec<String>>,
    seen: Mutex<Vec<(String, Vec<u8>)>>,
}

impl<A> Drop for Fake<A> {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl<A: Api> Fake<A> {
    pub(crate) async fn serve(make: impl FnOnce(&str) -> A) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let (api, shared) = (Arc::new(make(&address)), Arc::<Shared>::default());
        let (for_api, for_shared) = (api.clone(), shared.clone());
        let handler = move |method: Method, uri: Uri, headers: HeaderMap, upgrade: Upgrade, body: Bytes| {
            let (api, shared) = (for_api.clone(), for_shared.clone());
            async move { handle(&*api, &shared, read(&method, &uri, headers, &body), upgrade).await }
        };
        let app = axum::Router::new().fallback(handler).layer(axum::extract::DefaultBodyLimit::max(64 << 20));
        let server = tokio::spawn(async move { axum::serve(listener, app).await.expect("it serves") });
        Self { api, address, shared, server }
    }

    pub(crate) fn arm(&self, call: Call, fault: Fault) {
        self.shared.faults.lock().unwrap().push_back((call, fault));
    }

    pub(crate) fn armed(&self) -> usize {
        self.shared.faults.lock().unwrap().len()
    }

    /// Method and path of each request until now.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().iter().map(|(what, _)| what.clone()).collect()
    }

    /// The same, with what was sent.
    pub(crate) fn bodies(&self) -> Vec<(String, Vec<u8>)> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// What was asked or answered against the contract.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.shared.wrong.lock().unwrap().clone()
    }
}

/// What becomes of the connection, if it is to become anything else.
struct Upgrade(Option<hyper::upgrade::OnUpgrade>);

impl<S: Sync> FromRequestParts<S> for Upgrade {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self(parts.extensions.remove()))
    }
}

fn read(method: &Method, uri: &Uri, headers: HeaderMap, body: &[u8]) -> Request {
    let url = reqwest::Url::parse(&format!("http://fake{uri}")).expect("an address");
    let decode = |part: &str| {
        let fake = reqwest::Url::parse(&format!("query:?x={}", part.replace('+', "%2B"))).expect("a part of one");
        fake.query_pairs().next().expect("it has one").1.into_owned()
    };
    Request {
        method: method.to_string(),
        path: url.path().trim_start_matches('/').split('/').map(decode).collect(),
        query: url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect(),
        headers,
        body: body.to_vec(),
    }
}

async fn handle<A: Api>(api: &A, shared: &Shared, request: Request, upgrade: Upgrade) -> Response {
    let what = format!("{} /{}", request.method, request.path.join("/"));
    shared.seen.lock().unwrap().push((what.clone(), request.body.clone()));
    if let Err(why) = api.judge(&request) {
        shared.wrong.lock().unwrap().push(format!("{what}: {why}"));
        return respond(Reply::json(400, api.refuse(400, &why)));
    }
    let fault = {
        let mut faults = shared.faults.lock().unwrap();
        let call = api.call(&request);
        let at = faults.iter().position(|(about, _)| Some(*about) == call);
        at.and_then(|at| faults.remove(at)).map(|(_, fault)| fault)
    };
    match fault {
        Some(Fault::Status(status)) => return respond(Reply::json(status, api.refuse(status, "told to"))),
        Some(Fault::Limit(after)) => {
            let mut reply = Reply::json(429, api.refuse(429, "too often"));
            reply.headers.push(("retry-after", after.as_secs().to_string()));
            return respond(reply);
        }
        Some(Fault::LimitUntil(after)) => {
            let mut reply = Reply::json(429, api.refuse(429, "too often"));
            let at = std::time::SystemTime::now() + after;
            reply.headers.push(("retry-after", httpdate::fmt_http_date(at)));
            return respond(reply);
        }
        _ => {}
    }
    let mut reply = api.answer(&request).await;
    if let Err(why) = api.judge_reply(&request, &reply) {
        shared.wrong.lock().unwrap().push(format!("{what}: {why}"));
    }
    match (fault, &mut reply.content) {
        // What unwinds takes its connection along, and prints nothing.
        (Some(Fault::LoseAnswer), _) => std::panic::resume_unwind(Box::new("told to")),
        (Some(Fault::CutAnswer), Content::Json(body)) => {
            let body = body.to_string().into_bytes();
            let half = Bytes::copy_from_slice(&body[..body.len() / 2]);
            let pieces: [std::io::Result<Bytes>; 2] = [Ok(half), Err(std::io::Error::other("told to"))];
            let pieces = futures_util::stream::iter(pieces).then(|piece| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                piece
            });
            let answer = Response::builder().status(reply.status).header("content-type", "application/json");
            return answer.body(Body::from_stream(pieces)).expect("an answer");
        }
        (Some(Fault::UnknownState), Content::Json(body)) => api.unknown_state(body),
        (Some(Fault::UnknownField), Content::Json(body)) => {
            drop(body.as_object_mut().map(|body| body.insert("newer".into(), Value::from([1]))))
        }
        (Some(Fault::Garbled(n)), Content::Json(body)) => garble(one_of(body), n),
        (Some(Fault::Slow(late)), _) => tokio::time::sleep(late).await,
        (None, _) => {}
        (Some(other), _) => panic!("{other:?} cannot be done to {what}"),
    }
    if let Content::Upgrade(answer, serve) = reply.content {
        let upgraded = upgrade.0.expect("it was asked for");
        tokio::spawn(serve(upgraded.boxed()));
        return answer;
    }
    respond(reply)
}

/// The container in an answer; of a list the first.
fn one_of(body: &mut Value) -> &mut Value {
    let list = ["", "/items", "/sandboxes"].into_iter().find(|at| body.pointer(at).is_some_and(Value::is_array));
    match list {
        Some(at) => &mut body.pointer_mut(at).expect("it is there")[0],
        None => body,
    }
}

/// Makes something else of it, or of one of all that is in it.
fn garble(item: &mut Value, n: usize) {
    match n {
        0 => *item = Value::from("?"),
        1 => *item = serde_json::json!({}),
        n => {
            let mut left = (n - 2) % count(item);
            let changed = change(item, &mut left);
            assert!(changed, "it has fewer fields");
        }
    }
}

fn members(value: &mut Value) -> Box<dyn Iterator<Item = &mut Value> + '_> {
    match value {
        Value::Object(fields) => Box::new(fields.values_mut()),
        Value::Array(items) => Box::new(items.iter_mut()),
        _ => Box::new(std::iter::empty()),
    }
}

fn count(value: &mut Value) -> usize {
    members(value).map(|member| 1 + count(member)).sum()
}

fn change(value: &mut Value, left: &mut usize) -> bool {
    members(value).any(|member| {
        if *left == 0 {
            *member = if member.is_string() { Value::from(7) } else { Value::from("?") };
            return true;
        }
        *left -= 1;
        change(member, left)
    })
}

fn respond(reply: Reply) -> Response {
    let mut answer = Response::builder().status(StatusCode::from_u16(reply.status).expect("a status"));
    for (name, value) in reply.headers {
        answer = answer.header(name, value);
    }
    let (kind, body) = match reply.content {
        Content::Json(body) => ("application/json", Body::from(body.to_string())),
        Content::Bytes(kind, body) => (kind, Body::from(body)),
        Content::Stream(kind, pieces) => {
            let pieces = futures_util::stream::unfold(pieces, |mut pieces| async move {
                pieces.recv().await.map(|piece| (std::io::Result::Ok(Bytes::from(piece)), pieces))
            });
            (kind, Body::from_stream(pieces))
        }
        Content::Upgrade(..) => unreachable!("it has its own answer"),
    };
    answer.header("content-type", kind).body(body).expect("an answer")
}

/// Where [`TOKEN`] is found: a file, for tests that run side by side.
pub(crate) fn token() -> Value {
    static PATH: std::sync::LazyLock<std::path::PathBuf> = std::sync::LazyLock::new(|| file("token", TOKEN));
    serde_json::json!({ "file": *PATH })
}

/// A file with a line in it, the same for all runs: whoever reads it while another begins finds it whole.
pub(crate) fn file(name: &str, line: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("agent-fleet-fake-{name}"));
    let beside = path.with_extension(uuid::Uuid::now_v7().simple().to_string());
    std::fs::write(&beside, format!("{line}\n")).expect("a file");
    std::fs::rename(&beside, &path).expect("a file");
    path
}
