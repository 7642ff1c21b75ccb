//! gRPC without anybody's generated code: messages are read and written by a contract that says what each number means, strictly. What is not in the
//! contract is a mistake, of who asks and of the fake.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Uri};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use http_body_util::StreamBody;
use hyper::body::Frame;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use crate::conformance::{Call, Fault};

/// Name, type, what it is made of, and whether it is there more than once.
type Field = (String, String, String, bool);

#[derive(Deserialize)]
pub(crate) struct Contract {
    pub(crate) methods: BTreeMap<String, (String, String)>,
    pub(crate) messages: BTreeMap<String, BTreeMap<u64, Field>>,
    pub(crate) enums: BTreeMap<String, BTreeMap<String, i64>>,
}

impl Contract {
    /// What is not there is not in what comes out; bytes are in base64, and a map is a list of its entries.
    pub(crate) fn read(&self, message: &str, mut bytes: &[u8]) -> Result<Value, String> {
        let fields = &self.messages[message];
        let mut read = Map::new();
        while !bytes.is_empty() {
            let head = varint(&mut bytes)?;
            let (number, wire) = (head >> 3, head & 7);
            let (name, kind, of, many) = fields.get(&number).ok_or_else(|| format!("{message} has no field {number}"))?;
            let said = |what: &str| format!("{message}.{name}: {what}");
            let wanted = match kind.as_str() {
                "double" => 1,
                "string" | "bytes" | "message" => 2,
                "float" => 5,
                _ => 0,
            };
            if wire != wanted {
                return Err(said(&format!("wire type {wire} is not that of {kind}")));
            }
            let value = match wire {
                0 => number_of(kind, varint(&mut bytes)?),
                1 => json!(f64::from_le_bytes(take(&mut bytes, 8)?.try_into().expect("eight"))),
                5 => json!(f32::from_le_bytes(take(&mut bytes, 4)?.try_into().expect("four"))),
                _ => {
                    let length = varint(&mut bytes)? as usize;
                    let inner = take(&mut bytes, length)?;
                    match kind.as_str() {
                        "message" => self.read(of, inner)?,
                        "string" => json!(std::str::from_utf8(inner).map_err(|_| said("no UTF-8"))?),
                        _ => json!(BASE64.encode(inner)),
                    }
                }
            };
            if kind == "enum" && !self.enums[of].values().any(|known| value == *known) {
                return Err(said(&format!("{value} is none of {of}")));
            }
            if *many {
                read.entry(name).or_insert_with(|| json!([])).as_array_mut().expect("a list").push(value);
            } else if read.insert(name.clone(), value).is_some() {
                return Err(said("it is there twice"));
            }
        }
        Ok(Value::Object(read))
    }

    pub(crate) fn write(&self, message: &str, value: &Value) -> Vec<u8> {
        let fields = &self.messages[message];
        let members = value.as_object().unwrap_or_else(|| panic!("{message} is written as {value}"));
        let mut bytes = Vec::new();
        for (name, value) in members {
            let found = fields.iter().find(|(_, field)| field.0 == *name);
            let (number, (_, kind, of, many)) = found.unwrap_or_else(|| panic!("{message} has no `{name}`"));
            let all = if *many { value.as_array().expect("a list").as_slice() } else { std::slice::from_ref(value) };
            for value in all {
                let head = |bytes: &mut Vec<u8>, wire: u64| put(bytes, number << 3 | wire);
                let mut packed = |inner: &[u8]| {
                    head(&mut bytes, 2);
                    put(&mut bytes, inner.len() as u64);
                    bytes.extend_from_slice(inner);
                };
                match kind.as_str() {
                    "message" => packed(&self.write(of, value)),
                    "string" => packed(value.as_str().expect("text").as_bytes()),
                    "bytes" => packed(&BASE64.decode(value.as_str().expect("text")).expect("base64")),
                    "double" => {
                        head(&mut bytes, 1);
                        bytes.extend_from_slice(&value.as_f64().expect("a number").to_le_bytes());
                    }
                    "float" => {
                        head(&mut bytes, 5);
                        bytes.extend_from_slice(&(value.as_f64().expect("a number") as f32).to_le_bytes());
                    }
                    "bool" => {
                        head(&mut bytes, 0);
                        put(&mut bytes, value.as_bool().expect("yes or no").into());
                    }
                    _ => {
                        head(&mut bytes, 0);
                        // A negative one is as long as it can be.
                        put(&mut bytes, value.as_i64().expect("a number") as u64);
                    }
                }
            }
        }
        bytes
    }
}

fn number_of(kind: &str, varint: u64) -> Value {
    match kind {
        "bool" => json!(varint != 0),
        "uint32" | "uint64" => json!(varint),
        _ => json!(varint as i64),
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut number = 0;
    for at in 0..10 {
        let byte = *bytes.get(at).ok_or("a number without an end")?;
        number |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            *bytes = &bytes[at + 1..];
            return Ok(number);
        }
    }
    Err(String::from("a number of more than ten bytes"))
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], String> {
    let (taken, rest) = bytes.split_at_checked(length).ok_or("it is shorter than it says")?;
    *bytes = rest;
    Ok(taken)
}

pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// A code of gRPC's, and why.
#[derive(Clone, Debug)]
pub(crate) struct No(pub(crate) u8, pub(crate) String);

pub(crate) enum Reply {
    One(Value),
    Many(mpsc::UnboundedReceiver<Value>),
}

/// One service's own.
pub(crate) trait Api: Send + Sync + 'static {
    /// What this method does, for those that can be disturbed.
    fn call(&self, method: &str) -> Option<Call>;
    /// Whether this may be asked by whom asks.
    fn judge(&self, request: &Request) -> Result<(), String>;
    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Result<Reply, No>>;
    /// Makes the state in this answer one that nobody knows.
    fn unknown_state(&self, body: &mut Value);
}

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
    seen: Mutex<Vec<String>>,
}

impl<A> Drop for Fake<A> {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl<A: Api> Fake<A> {
    pub(crate) async fn serve(contract: &str, make: impl FnOnce(&str) -> A) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let contract: Arc<Contract> = Arc::new(serde_json::from_str(contract).expect("tests/specs holds JSON"));
        let (api, shared) = (Arc::new(make(&address)), Arc::<Shared>::default());
        let (for_api, for_contract, for_shared) = (api.clone(), contract, shared.clone());
        let handler = move |uri: Uri, headers: HeaderMap, body: Bytes| {
            let (api, contract, shared) = (for_api.clone(), for_contract.clone(), for_shared.clone());
            async move { handle(&*api, contract, &shared, uri.path(), headers, &body).await }
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

    /// The method of each request until now.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// What was asked against the contract.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.shared.wrong.lock().unwrap().clone()
    }
}

async fn handle<A: Api>(
    api: &A,
    contract: Arc<Contract>,
    shared: &Shared,
    path: &str,
    headers: HeaderMap,
    body: &[u8],
) -> Response {
    let method = path.rsplit('/').next().unwrap_or_default().to_owned();
    shared.seen.lock().unwrap().push(method.clone());
    // What their clients ask beside is not known, as methods are not that a server does not have; it is not a mistake.
    let Some((asked, answered)) = contract.methods.get(path).cloned() else {
        return refuse(&No(12, format!("there is no {path}")), &[]);
    };
    let read = message(body).and_then(|body| contract.read(&asked, body));
    let request = read.map(|body| Request { method: method.clone(), headers, body });
    let request = match request.and_then(|request| api.judge(&request).map(|()| request)) {
        Ok(request) => request,
        Err(why) => {
            shared.wrong.lock().unwrap().push(format!("{method}: {why}"));
            return refuse(&No(3, why), &[]);
        }
    };
    let fault = {
        let mut faults = shared.faults.lock().unwrap();
        let call = api.call(&method);
        let at = faults.iter().position(|(about, _)| Some(*about) == call);
        at.and_then(|at| faults.remove(at)).map(|(_, fault)| fault)
    };
    match fault {
        Some(Fault::Status(status)) => {
            return refuse(&No(if status == 503 { 14 } else { 13 }, String::from("told to")), &[]);
        }
        Some(Fault::Limit(after)) => {
            let policy = contract.write("modal.client.RPCRetryPolicy", &json!({ "retry_after_secs": after.as_secs_f32() }));
            let url = "type.modal.com/modal.client.RPCRetryPolicy";
            let details =
                json!({ "code": 8, "message": "too often", "details": [{ "type_url": url, "value": BASE64.encode(policy) }] });
            return refuse(&No(8, String::from("too often")), &contract.write("modal.client.RPCStatus", &details));
        }
        _ => {}
    }
    let mut reply = match api.answer(&request).await {
        Ok(reply) => reply,
        Err(no) => return refuse(&no, &[]),
    };
    let (mut more, mut garbled) = (Vec::new(), false);
    match (fault, &mut reply) {
        // What unwinds takes its connection along, and prints nothing.
        (Some(Fault::LoseAnswer), _) => std::panic::resume_unwind(Box::new("told to")),
        (Some(Fault::CutAnswer), Reply::One(body)) => {
            let whole = frame(&contract.write(&answered, body));
            let half = Bytes::copy_from_slice(&whole[..whole.len() / 2]);
            let pieces = futures_util::stream::iter([Ok(Frame::data(half)), Err(std::io::Error::other("told to"))]);
            let pieces = pieces.then(|piece| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                piece
            });
            return respond(Body::new(StreamBody::new(Box::pin(pieces))));
        }
        (Some(Fault::UnknownState), Reply::One(body)) => api.unknown_state(body),
        (Some(Fault::UnknownField), Reply::One(_)) => {
            // A number of a thousand, as text.
            put(&mut more, 1000 << 3 | 2);
            more.extend_from_slice(b"\x05newer");
        }
        (Some(Fault::Garbled(_)), Reply::One(_)) => garbled = true,
        (Some(Fault::Slow(late)), _) => tokio::time::sleep(late).await,
        (None, _) => {}
        (Some(other), _) => panic!("{other:?} cannot be done to {method}"),
    }
    let messages = match reply {
        Reply::One(body) => {
            let mut body = [contract.write(&answered, &body), more].concat();
            if garbled {
                garble(&mut body);
            }
            futures_util::stream::iter([body]).boxed()
        }
        Reply::Many(pieces) => futures_util::stream::unfold(pieces, move |mut pieces| {
            let (contract, answered) = (contract.clone(), answered.clone());
            async move { pieces.recv().await.map(|piece| (contract.write(&answered, &piece), pieces)) }
        })
        .boxed(),
    };
    let end = futures_util::stream::once(async {
        let mut end = HeaderMap::new();
        end.insert("grpc-status", "0".parse().expect("a header"));
        Ok::<_, std::io::Error>(Frame::trailers(end))
    });
    let pieces = messages.map(|message| Ok(Frame::data(Bytes::from(frame(&message))))).chain(end);
    respond(Body::new(StreamBody::new(Box::pin(pieces))))
}

/// In the first message of a list the first field: of a type that there is none of.
fn garble(list: &mut [u8]) {
    let inside = 1 + list.iter().skip(1).position(|byte| *byte < 0x80).expect("a length") + 1;
    assert_eq!(list[0], 0x0a, "its list does not begin with a message");
    list[inside] |= 7;
}

fn message(body: &[u8]) -> Result<&[u8], String> {
    let (head, body) = body.split_at_checked(5).ok_or("no message")?;
    let length = u32::from_be_bytes(head[1..].try_into().expect("four"));
    if head[0] != 0 || length as usize != body.len() {
        return Err(String::from("not one plain message"));
    }
    Ok(body)
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(message.len()).expect("short").to_be_bytes(), message].concat()
}

fn respond(body: Body) -> Response {
    Response::builder().header("content-type", "application/grpc").body(body).expect("an answer")
}

/// By the head alone.
fn refuse(no: &No, details: &[u8]) -> Response {
    let mut answer = respond(Body::empty());
    let head = answer.headers_mut();
    head.insert("grpc-status", no.0.to_string().parse().expect("a header"));
    head.insert("grpc-message", no.1.replace('%', "").parse().expect("a header"));
    if !details.is_empty() {
        head.insert("grpc-status-details-bin", BASE64.encode(details).parse().expect("a header"));
    }
    answer
}

#[test]
fn a_contract_judges() {
    let contract: Contract = serde_json::from_value(json!({
        "methods": {},
        "messages": {
            "m": { "1": ["text", "string", "", false], "2": ["inner", "message", "m", true], "3": ["kind", "enum", "e", false],
                   "4": ["whole", "int32", "", false], "5": ["part", "float", "", false], "6": ["raw", "bytes", "", false] }
        },
        "enums": { "e": { "A": 0, "B": 1 } },
    }))
    .unwrap();
    let whole = json!({ "text": "é", "inner": [{ "text": "a" }, {}], "kind": 1, "whole": -7, "part": 0.5, "raw": "AAE=" });
    assert_eq!(contract.read("m", &contract.write("m", &whole)), Ok(whole));
    // Another number, another wire type, another value, twice, cut.
    for wrong in [&b"\x3a\x00"[..], b"\x08\x01", b"\x18\x02", b"\x0a\x01a\x0a\x01b", b"\x0a\x05a"] {
        assert!(contract.read("m", wrong).is_err(), "{wrong:?}");
    }
}
