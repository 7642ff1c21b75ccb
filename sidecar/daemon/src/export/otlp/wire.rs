//! One request to a collector, over http/protobuf or gRPC: the same client, the same bytes, another envelope. For http/json they are
//! translated on the way out.
//!
//! gRPC is five bytes of framing and two trailers over HTTP/2, which the client speaks anyway; tonic would add tower and a second
//! set of connection settings for that.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Signal;
use super::answer::{self, Answer, Blame};
use super::environment::{Protocol, Target};
use crate::proxy::Way;

/// An answer says "taken", and perhaps how much was not. Longer ones are not read.
const ANSWER_BYTES: usize = 64 * 1024;
/// The rest of an answer whose beginning says all that matters.
const REST: Duration = Duration::from_secs(1);
/// In a row.
const REDIRECTS: usize = 3;
/// A connection is kept for the next batch this long; then a load balancer has forgotten it, too.
const IDLE: Duration = Duration::from_secs(60);

/// Sends a batch and says what became of it.
pub(super) trait Wire {
    async fn send(&mut self, payload: &Bytes) -> Answer;
}

type Http = Client<HttpsConnector<Way>, Full<Bytes>>;

/// The client for one target; made when it is first needed, and again after a failure, with the files as they are then.
pub(super) struct Collector {
    target: Target,
    client: Option<Http>,
}

impl Collector {
    pub(super) fn new(target: Target) -> Collector {
        Collector { target, client: None }
    }

    async fn exchange(&mut self, mut request: Request<Full<Bytes>>) -> Answer {
        let client = match &self.client {
            Some(client) => client,
            None => match client(&self.target) {
                Ok(client) => self.client.insert(client),
                Err(error) => return Answer::again(error, Blame::Collector),
            },
        };
        let mut redirects = 0;
        let response = loop {
            let response = match client.request(request.clone()).await {
                Ok(response) => response,
                Err(error) => {
                    let blame = if error.is_connect() { Blame::Collector } else { Blame::Unclear };
                    return Answer::again(chain(&error), blame);
                }
            };
            match elsewhere(request.uri(), response.status(), response.headers()) {
                Some(uri) if redirects < REDIRECTS => *request.uri_mut() = uri,
                _ => break response,
            }
            redirects += 1;
        };
        let (parts, body) = response.into_parts();
        let collected = Limited::new(body, ANSWER_BYTES).collect();
        // A status that says that all was taken counts, whatever becomes of the rest; the status of gRPC is the last of it.
        let collected = match self.target.protocol {
            Protocol::Http | Protocol::Json if parts.status.is_success() => {
                tokio::time::timeout(REST, collected).await.unwrap_or_else(|late| Err(late.into()))
            }
            Protocol::Http | Protocol::Json | Protocol::Grpc => collected.await,
        };
        let (mut body, mut trailers, mut broken) = (None, None, None);
        match collected {
            Ok(collected) => {
                trailers = collected.trailers().cloned();
                body = Some(collected.to_bytes());
            }
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {}
            Err(error) => broken = Some(chain(&*error)),
        }
        match self.target.protocol {
            Protocol::Http | Protocol::Json => answer::http(parts.status, &parts.headers, body.as_deref(), SystemTime::now()),
            Protocol::Grpc => match broken {
                Some(why) => Answer::again(why, Blame::Unclear),
                // An answer without a body has the status among its headers.
                None => {
                    let status = trailers.as_ref().filter(|trailers| trailers.contains_key("grpc-status"));
                    answer::grpc(parts.status, status.or(Some(&parts.headers)), body.as_deref(), SystemTime::now())
                }
            },
        }
    }
}

impl Wire for Collector {
    async fn send(&mut self, payload: &Bytes) -> Answer {
        let request = match request(&self.target, payload) {
            Ok(request) => request,
            Err(error) => return Answer::Refused { why: format!("it cannot be translated to JSON: {error}") },
        };
        let answer = match tokio::time::timeout(self.target.timeout, self.exchange(request)).await {
            Ok(answer) => answer,
            Err(_) => Answer::again(format!("no answer within {:?}", self.target.timeout), Blame::Unclear),
        };
        if matches!(answer, Answer::Again { .. }) {
            // What is kept of the connection may be what fails.
            self.client = None;
        }
        answer
    }
}

/// What is not there is left out: not everybody who reads numbers can read `null`.
fn absent(json: &mut serde_json::Value) {
    match json {
        serde_json::Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(absent);
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(absent),
        _ => {}
    }
}

/// Where the same request is to go instead: with its keys, so only to the same host, and not from a secret way to an open one.
fn elsewhere(from: &Uri, status: StatusCode, headers: &HeaderMap) -> Option<Uri> {
    if !matches!(status, StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT) {
        return None;
    }
    let location = headers.get(header::LOCATION)?.to_str().ok()?;
    let to: Uri = if location.starts_with('/') && !location.starts_with("//") {
        format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok()?
    } else {
        location.parse().ok()?
    };
    let safe = to.scheme_str() == Some("https") || to.scheme_str() == from.scheme_str();
    (safe && to.host() == from.host()).then_some(to)
}

fn request(target: &Target, payload: &Bytes) -> Result<Request<Full<Bytes>>, String> {
    let plain = match target.protocol {
        Protocol::Json => json(target.signal, payload)?,
        Protocol::Http | Protocol::Grpc => payload.clone(),
    };
    let body = match (target.protocol, target.gzip) {
        (Protocol::Http | Protocol::Json, false) => plain,
        (Protocol::Http | Protocol::Json, true) => Bytes::from(gzip(Vec::new(), &plain)),
        (Protocol::Grpc, gzip) => frame(&plain, gzip),
    };
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = target.uri.clone();
    let headers = request.headers_mut();
    for (name, value) in &target.headers.0 {
        headers.append(name, value.clone());
    }
    envelope(target, headers);
    Ok(request)
}

/// The same message in the JSON of OTLP: ids in hexadecimal, enumerations as numbers.
fn json(signal: Signal, payload: &Bytes) -> Result<Bytes, String> {
    fn translated<T: Message + Default + serde::Serialize>(payload: &Bytes) -> Result<Bytes, String> {
        let message = T::decode(payload.as_ref()).map_err(|error| error.to_string())?;
        let mut json = serde_json::to_value(&message).map_err(|error| error.to_string())?;
        absent(&mut json);
        serde_json::to_vec(&json).map(Bytes::from).map_err(|error| error.to_string())
    }
    match signal {
        Signal::Traces => translated::<ExportTraceServiceRequest>(payload),
        Signal::Metrics => translated::<ExportMetricsServiceRequest>(payload),
        Signal::Logs => translated::<ExportLogsServiceRequest>(payload),
    }
}

/// Ours come last: who sets a header of the protocol's by hand does not mean to break it.
fn envelope(target: &Target, headers: &mut HeaderMap) {
    const AGENT: &str = concat!("agent-sidecar/", env!("CARGO_PKG_VERSION"));
    let text = HeaderValue::from_static;
    headers.insert(header::USER_AGENT, text(AGENT));
    match target.protocol {
        Protocol::Http | Protocol::Json => {
            let json = target.protocol == Protocol::Json;
            headers.insert(header::CONTENT_TYPE, text(if json { "application/json" } else { "application/x-protobuf" }));
            if target.gzip {
                headers.insert(header::CONTENT_ENCODING, text("gzip"));
            }
        }
        Protocol::Grpc => {
            headers.insert(header::CONTENT_TYPE, text("application/grpc"));
            headers.insert(header::TE, text("trailers"));
            // Eight digits at most: the hours in which that is milliseconds are enough.
            let timeout = format!("{}m", target.timeout.as_millis().min(99_999_999));
            headers.insert("grpc-timeout", HeaderValue::from_str(&timeout).expect("digits and a letter"));
            if target.gzip {
                headers.insert("grpc-encoding", text("gzip"));
            }
        }
    }
}

fn gzip(out: Vec<u8>, payload: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::fast());
    let written = encoder.write_all(payload).and_then(|()| encoder.finish());
    written.expect("writing to memory does not fail")
}

/// Whether it is compressed, its length, the message.
fn frame(payload: &[u8], compress: bool) -> Bytes {
    let mut framed = vec![u8::from(compress), 0, 0, 0, 0];
    if compress {
        framed = gzip(framed, payload);
    } else {
        framed.extend_from_slice(payload);
    }
    let length = u32::try_from(framed.len() - 5).expect("the queue takes no batch of four gigabytes");
    framed[1..5].copy_from_slice(&length.to_be_bytes());
    Bytes::from(framed)
}

fn client(target: &Target) -> Result<Http, String> {
    let way = Way::out(target.timeout);
    let tls = tls(target)?;
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    let connector = match target.protocol {
        Protocol::Http | Protocol::Json => connector.enable_http1().wrap_connector(way),
        Protocol::Grpc => connector.enable_http2().wrap_connector(way),
    };
    let client = Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(1)
        .http2_only(target.protocol == Protocol::Grpc)
        .build(connector);
    Ok(client)
}

/// Roots are only loaded where there is something to verify.
fn tls(target: &Target) -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    if target.uri.scheme_str() == Some("https") {
        match &target.certificate {
            // Named, it is the only one that is trusted.
            Some(path) => {
                let unreadable = |error| format!("the certificate {} cannot be read: {error}", path.display());
                for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                    roots.add(certificate.map_err(unreadable)?).map_err(|error| error.to_string())?;
                }
            }
            None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider);
    let config = config.with_safe_default_protocol_versions().map_err(|error| error.to_string())?.with_root_certificates(roots);
    let Some((certificate, key)) = &target.identity else { return Ok(config.with_no_client_auth()) };
    let unreadable = |error| format!("{} and {} cannot be read: {error}", certificate.display(), key.display());
    let certificates =
        CertificateDer::pem_file_iter(certificate).map_err(unreadable)?.collect::<Result<_, _>>().map_err(unreadable)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(unreadable)?;
    config.with_client_auth_cert(certificates, key).map_err(|error| error.to_string())
}

/// An error with its causes, which say what it was.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn keys_follow_no_redirect_to_another_host_or_into_the_open() {
        let to = |from: &str, status: u16, location: &str| {
            let headers = [(header::LOCATION, HeaderValue::from_str(location).unwrap())].into_iter().collect();
            elsewhere(&from.parse().unwrap(), StatusCode::from_u16(status).unwrap(), &headers).map(|uri| uri.to_string())
        };
        let moved = |text: &str| Some(String::from(text));
        assert_eq!(to("http://c:4318/v1/logs", 307, "/in/v1/logs"), moved("http://c:4318/in/v1/logs"));
        assert_eq!(to("http://c:4318/v1/logs", 308, "https://c/v1/logs"), moved("https://c/v1/logs"));
        assert_eq!(to("https://c/v1/logs", 308, "http://c/v1/logs"), None);
        assert_eq!(to("https://c/v1/logs", 307, "https://d/v1/logs"), None);
        assert_eq!(to("https://c/v1/logs", 307, "//d/v1/logs"), None);
        assert_eq!(to("https://c/v1/logs", 302, "/login"), None, "that makes a GET of it");
    }

    #[test]
    fn json_has_ids_in_hexadecimal_enumerations_as_numbers_and_no_null() {
        use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
        let span = Span { trace_id: vec![0xab; 16], span_id: vec![1; 8], kind: 3, start_time_unix_nano: 7, ..Span::default() };
        let scope_spans = vec![ScopeSpans { spans: vec![span], ..ScopeSpans::default() }];
        let resource_spans = vec![ResourceSpans { scope_spans, ..ResourceSpans::default() }];
        let payload = ExportTraceServiceRequest { resource_spans }.encode_to_vec();
        let text = String::from_utf8(json(Signal::Traces, &payload.into()).unwrap().to_vec()).unwrap();
        let said: serde_json::Value = serde_json::from_str(&text).unwrap();
        let span = &said["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
        assert_eq!(
            (span["traceId"].as_str(), span["spanId"].as_str()),
            (Some("ab".repeat(16).as_str()), Some("0101010101010101"))
        );
        assert_eq!((span["kind"].as_i64(), span["startTimeUnixNano"].as_str()), (Some(3), Some("7")));
        assert!(!text.contains("null"), "{text}");
        assert!(json(Signal::Logs, &Bytes::from_static(b"\xff")).is_err());
    }

    #[test]
    fn a_frame_says_how_long_it_is_and_whether_it_is_compressed() {
        assert_eq!(frame(b"abc", false).as_ref(), b"\0\0\0\0\x03abc");
        let framed = frame(&[7; 1_000], true);
        assert_eq!((framed[0], u32::from_be_bytes([framed[1], framed[2], framed[3], framed[4]]) as usize), (1, framed.len() - 5));
        let mut whole = Vec::new();
        flate2::read::GzDecoder::new(&framed[5..]).read_to_end(&mut whole).unwrap();
        assert_eq!(whole, [7; 1_000]);
    }
}
