//! What a collector's answer means. Pure: bytes and numbers in, a verdict out.

use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use prost::Message;

/// A collector that asks for more patience than this is not believed.
const LONGEST: Duration = Duration::from_secs(300);

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Taken, this many items of it excepted.
    Taken { except: u64, said: String },
    /// Not now. `asked` is how long the collector wants to be left alone.
    Again { why: String, asked: Option<Duration>, blame: Blame },
    /// Never.
    Refused { why: String },
}

/// Whether the batch itself may be what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blame {
    /// The collector was not reached, or says that it is busy: every batch would have fared the same.
    Collector,
    /// It was reached and then failed over this one.
    Unclear,
}

impl Answer {
    pub(super) fn again(why: impl Into<String>, blame: Blame) -> Answer {
        Answer::Again { why: why.into(), asked: None, blame }
    }
}

/// The answer to each of the three requests; they differ in name only.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected: i64,
    #[prost(string, tag = "2")]
    message: String,
}

/// `google.rpc.Status`, as far as it is needed.
#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    delay: Option<Delay>,
}

#[derive(Clone, PartialEq, Message)]
struct Delay {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

/// Of an answer over HTTP. `body` is `None` if it was longer than anything that we would read.
pub(super) fn http(status: StatusCode, headers: &HeaderMap, body: Option<&[u8]>, now: SystemTime) -> Answer {
    let json = headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if status.is_success() {
        return if json { taken_in_json(body.unwrap_or_default()) } else { taken(body) };
    }
    let message = match body {
        Some(body) if json => serde_json::from_slice(body).ok().and_then(|status: serde_json::Value| text(&status, "message")),
        Some(body) => Status::decode(body).ok().map(|status| status.message),
        None => None,
    };
    let why = match message.map(|message| printable(&message)) {
        Some(message) if !message.is_empty() => format!("{status}: {message}"),
        _ => status.to_string(),
    };
    let blame = match status.as_u16() {
        429 | 503 => Blame::Collector,
        408 | 502 | 504 => Blame::Unclear,
        _ => return Answer::Refused { why },
    };
    Answer::Again { why, asked: retry_after(headers, now), blame }
}

/// Of an answer over gRPC: its first frame, and the headers or trailers that carry the status.
pub(super) fn grpc(http: StatusCode, status: Option<&HeaderMap>, body: Option<&[u8]>, now: SystemTime) -> Answer {
    let text = |name: &str| status.and_then(|headers| headers.get(name)).and_then(|value| value.to_str().ok());
    let Some(code) = text("grpc-status").and_then(|code| code.parse::<u16>().ok()) else {
        // No gRPC: a proxy's answer, or one that was cut off.
        return match http.as_u16() {
            200 => Answer::again("the answer has no status", Blame::Unclear),
            _ => self::http(http, status.unwrap_or(&HeaderMap::new()), None, now),
        };
    };
    if code == 0 {
        // Compressed flag and length come first; we ask for no compression.
        return taken(body.map(|body| body.get(5..).unwrap_or_default()));
    }
    let details = text("grpc-status-details-bin").and_then(base64).and_then(|bytes| Status::decode(&*bytes).ok());
    let asked = details.and_then(|status| retry_info(&status));
    let why = format!("gRPC status {code}: {}", printable(text("grpc-message").unwrap_or_default()));
    let blame = match code {
        // Unavailable; and exhausted, if it says for how long.
        14 => Blame::Collector,
        8 if asked.is_some() => Blame::Collector,
        // Cancelled, deadline exceeded, aborted, out of range, data loss.
        1 | 4 | 10 | 11 | 15 => Blame::Unclear,
        _ => return Answer::Refused { why },
    };
    Answer::Again { why, asked, blame }
}

fn taken(body: Option<&[u8]>) -> Answer {
    // It said that it has them; what else it says, if nobody can read it, changes nothing.
    let partial = body.and_then(|body| Response::decode(body).ok()).and_then(|response| response.partial_success);
    let PartialSuccess { rejected, message } = partial.unwrap_or_default();
    Answer::Taken { except: u64::try_from(rejected).unwrap_or(0), said: printable(&message) }
}

/// As [`taken`]; who answers protobuf with this lies a little, and is understood.
fn taken_in_json(body: &[u8]) -> Answer {
    let response: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let partial = &response["partialSuccess"];
    let rejected = ["rejectedSpans", "rejectedDataPoints", "rejectedLogRecords"].into_iter().find_map(|name| {
        // A 64-bit number is a text there; some write it plainly.
        partial[name].as_u64().or_else(|| text(partial, name)?.parse().ok())
    });
    let said = text(partial, "errorMessage").unwrap_or_default();
    Answer::Taken { except: rejected.unwrap_or(0), said: printable(&said) }
}

fn text(json: &serde_json::Value, name: &str) -> Option<String> {
    json[name].as_str().map(str::to_owned)
}

/// Seconds, or a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let after = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(after.min(LONGEST))
}

fn retry_info(status: &Status) -> Option<Duration> {
    let info = status.details.iter().find(|any| any.type_url.ends_with("/google.rpc.RetryInfo"))?;
    let delay = RetryInfo::decode(&*info.value).ok()?.delay.unwrap_or_default();
    let (seconds, nanos) = (u64::try_from(delay.seconds).unwrap_or(0), u32::try_from(delay.nanos).unwrap_or(0));
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanos.into())).min(LONGEST))
}

/// What somebody else says, fit for one line of our log.
fn printable(text: &str) -> String {
    const LONG: usize = 200;
    text.chars().filter(|c| !c.is_control()).take(LONG).collect()
}

/// Standard alphabet, padded or not: binary metadata of gRPC comes as either.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut held) = (0_u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits & 0xff) << 6 | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push(((bits >> held) & 0xff) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    fn word(answer: &Answer) -> &'static str {
        match answer {
            Answer::Taken { .. } => "taken",
            Answer::Again { blame: Blame::Collector, .. } => "again",
            Answer::Again { blame: Blame::Unclear, .. } => "again?",
            Answer::Refused { .. } => "refused",
        }
    }

    #[test]
    fn each_status_has_its_verdict() {
        let http = |status: u16| word(&http(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), Some(b""), now()));
        let verdicts: Vec<(u16, &str)> = (200..600).map(|status| (status, http(status))).collect();
        let such = |word: &str| -> Vec<u16> { verdicts.iter().filter(|(_, w)| *w == word).map(|(s, _)| *s).collect() };
        assert_eq!((such("again"), such("again?")), (vec![429, 503], vec![408, 502, 504]));
        assert_eq!(such("taken"), (200..300).collect::<Vec<_>>());
        let grpc = |code: u16| word(&grpc(StatusCode::OK, Some(&headers(&[("grpc-status", &code.to_string())])), None, now()));
        let such = |word: &str| -> Vec<u16> { (0..=20).filter(|code| grpc(*code) == word).collect() };
        assert_eq!((such("taken"), such("again"), such("again?")), (vec![0], vec![14], vec![1, 4, 10, 11, 15]));
    }

    #[test]
    fn the_collector_says_how_long_to_wait_within_reason() {
        let asked = |text: &str| match http(StatusCode::TOO_MANY_REQUESTS, &headers(&[("retry-after", text)]), None, now()) {
            Answer::Again { asked, .. } => asked.map(|asked| asked.as_secs()),
            other => panic!("{other:?}"),
        };
        assert_eq!(asked("7"), Some(7));
        assert_eq!(asked("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10));
        assert_eq!(asked("Sun, 06 Nov 1994 08:40:00 GMT"), Some(0));
        assert_eq!(asked("99999999999"), Some(300));
        assert_eq!((asked("soon"), asked("-1")), (None, None));
    }

    #[test]
    fn exhausted_is_for_good_unless_it_says_for_how_long() {
        let delay = RetryInfo { delay: Some(Delay { seconds: 2, nanos: 500_000_000 }) }.encode_to_vec();
        let any = Any { type_url: "type.googleapis.com/google.rpc.RetryInfo".into(), value: delay };
        let status = Status { message: String::new(), details: vec![any] }.encode_to_vec();
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for three in status.chunks(3) {
            let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
            (0..=three.len()).for_each(|i| text.push(char::from(alphabet[(bits >> (18 - 6 * i)) as usize & 63])));
        }
        let with = headers(&[("grpc-status", "8"), ("grpc-status-details-bin", &text)]);
        let expected = Answer::Again {
            why: String::from("gRPC status 8: "),
            asked: Some(Duration::from_millis(2_500)),
            blame: Blame::Collector,
        };
        assert_eq!(grpc(StatusCode::OK, Some(&with), None, now()), expected);
        let without = headers(&[("grpc-status", "8"), ("grpc-message", "full")]);
        assert_eq!(word(&grpc(StatusCode::OK, Some(&without), None, now())), "refused");
        // A proxy in between that speaks no gRPC.
        assert_eq!(word(&grpc(StatusCode::BAD_GATEWAY, Some(&HeaderMap::new()), None, now())), "again?");
        assert_eq!(word(&grpc(StatusCode::NOT_FOUND, Some(&HeaderMap::new()), None, now())), "refused");
    }

    #[test]
    fn a_part_that_was_not_taken_is_known_and_garbage_is_not_believed() {
        let partial = Response { partial_success: Some(PartialSuccess { rejected: 3, message: "too\nold".into() }) };
        let expected = Answer::Taken { except: 3, said: String::from("tooold") };
        assert_eq!(http(StatusCode::OK, &HeaderMap::new(), Some(&partial.encode_to_vec()), now()), expected);
        let framed = [&[0, 0, 0, 0, 9][..], &partial.encode_to_vec()].concat();
        assert_eq!(grpc(StatusCode::OK, Some(&headers(&[("grpc-status", "0")])), Some(&framed), now()), expected);
        let json = headers(&[("content-type", "application/json; charset=utf-8")]);
        let mut bodies = [
            r#"{"partialSuccess":{"rejectedSpans":"3","errorMessage":"too\nold"}}"#,
            r#"{"partialSuccess":{"rejectedLogRecords":3,"errorMessage":"tooold"}}"#,
        ]
        .into_iter();
        assert!(bodies.all(|body| http(StatusCode::OK, &json, Some(body.as_bytes()), now()) == expected));
        assert_eq!(
            http(StatusCode::BAD_REQUEST, &json, Some(br#"{"code":3,"message":"no tenant"}"#), now()),
            Answer::Refused { why: String::from("400 Bad Request: no tenant") }
        );
        let nothing = Answer::Taken { except: 0, said: String::new() };
        for garbage in [&b""[..], b"{", b"[]", b"{\"partialSuccess\":{\"rejectedSpans\":-1}}"] {
            assert_eq!(http(StatusCode::OK, &json, Some(garbage), now()), nothing);
        }
        for garbage in [&b""[..], b"{}", b"\xff\xff\xff\xff", b"\x0a\x02\x08\xff"] {
            assert_eq!(http(StatusCode::OK, &HeaderMap::new(), Some(garbage), now()), nothing);
        }
        let negative = Response { partial_success: Some(PartialSuccess { rejected: -1, message: String::new() }) };
        assert_eq!(http(StatusCode::OK, &HeaderMap::new(), Some(&negative.encode_to_vec()), now()), nothing);
    }
}
