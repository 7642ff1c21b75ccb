//! Where to send, how, and how often: our own settings before the standard `OTEL_*` variables, which are only read.
//!
//! The CLI inherits the same variables for its own telemetry, and a mistake in them is none that may keep an agent from starting:
//! what cannot be understood is said and left out. Without an endpoint nothing is exported. An SDK would take
//! `localhost:4318` then; a wrapper in every container would knock there in vain.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use agent_sidecar_core::span::Sampler;
use hyper::Uri;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::Signal;
use super::metrics::Temporality;
use crate::config::{Mistake, Origin};

/// An exporter's own limit in the specification.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Enough for a day of a busy agent whose collector is away.
pub(crate) const QUEUE_BYTES: u64 = 64 << 20;
/// Within the grace of any platform that gives ten seconds, and of both SDKs.
pub(crate) const FLUSH: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// `http/protobuf`
    Http,
    /// `http/json`
    Json,
    Grpc,
}

/// Headers, which hold keys more often than not: neither printed nor logged.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(pub(crate) HeaderMap);

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({} hidden)", self.0.len())
    }
}

/// One signal's collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(super) signal: Signal,
    pub(super) uri: Uri,
    pub(super) protocol: Protocol,
    pub(super) headers: Headers,
    /// Of a whole request, its connection included.
    pub(super) timeout: Duration,
    pub(super) gzip: bool,
    /// The only root that is trusted; without it those of the web.
    pub(super) certificate: Option<PathBuf>,
    /// A certificate of our own, and its key.
    pub(super) identity: Option<(PathBuf, PathBuf)>,
}

impl Target {
    /// For the log: no path, which some vendors put a key into.
    pub(super) fn name(&self) -> String {
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        format!("{}://{authority}", self.uri.scheme_str().unwrap_or("http"))
    }
}

/// How an encoder makes batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batching {
    pub(crate) delay: Duration,
    pub(crate) max_batch: usize,
    pub(crate) max_queue: usize,
}

/// How metrics are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) interval: Duration,
    pub(crate) temporality: Temporality,
    pub(crate) histograms: Histograms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Histograms {
    Explicit,
    Exponential,
}

/// All that an exporter and the encoders before it have to know.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct OtlpConfig {
    /// By signal; `None` is not exported.
    pub(crate) targets: [Option<Target>; 3],
    pub(crate) spans: Batching,
    pub(crate) sampler: Sampler,
    /// Characters of an attribute that tells content.
    pub(crate) value_limit: Option<usize>,
    pub(crate) logs: Batching,
    pub(crate) metrics: Reading,
    /// `None` where no directory can be named: memory alone.
    pub(crate) queue_dir: Option<PathBuf>,
    pub(crate) queue_max: u64,
    /// What to hand to [`super::Exporter::flush`] at the end.
    pub(crate) flush: Duration,
}

impl OtlpConfig {
    pub(crate) fn exported(&self) -> [bool; 3] {
        [0, 1, 2].map(|signal: usize| self.targets[signal].is_some())
    }

    /// Tells collectors apart, so that nobody sends what was meant for another. Keys are left out: they change.
    pub(super) fn destination(&self) -> u64 {
        let targets = self.targets.iter().map(|target| target.as_ref().map_or(String::new(), |target| target.uri.to_string()));
        let text: Vec<String> = targets.collect();
        text.join("\n").bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// The table `[otlp]` of our own configuration. What is `None` is asked of the standard variables, unless our endpoint is set:
/// then none of theirs are used, or a key that was meant for their endpoint would be sent to ours.
#[derive(Clone, Debug, Default)]
pub(crate) struct Own {
    pub(crate) endpoint: Option<String>,
    /// Said to be off: whatever the variables say.
    pub(crate) off: bool,
    pub(crate) protocol: Option<String>,
    pub(crate) headers: Option<Headers>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) compression: Option<String>,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) client_certificate: Option<PathBuf>,
    pub(crate) client_key: Option<PathBuf>,
    /// By signal.
    pub(crate) signals: [Option<bool>; 3],
    pub(crate) queue_dir: Option<PathBuf>,
    pub(crate) queue_max: Option<u64>,
    pub(crate) flush: Option<Duration>,
}

/// Reads both. What is wrong with the variables is left out of the one and named in the other.
pub(crate) fn read(own: &Own, lookup: impl Fn(&str) -> Option<String>) -> (OtlpConfig, Vec<Mistake>) {
    let mut variables = Variables { lookup: &lookup, mistakes: Vec::new() };
    let standard = own.endpoint.is_none();
    let silent = own.off || (standard && variables.truth("OTEL_SDK_DISABLED"));
    let targets = Signal::ALL.map(|signal| {
        let chosen = own.signals[signal as usize].unwrap_or_else(|| !standard || variables.chosen(signal));
        (chosen && !silent).then(|| variables.target(signal, own)).flatten()
    });
    let config = OtlpConfig {
        targets,
        spans: variables.batching("OTEL_BSP", Duration::from_secs(5)),
        sampler: variables.sampler(),
        value_limit: ["OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"]
            .into_iter()
            .find_map(|name| variables.number(name, "number of characters"))
            .and_then(|n| usize::try_from(n).ok()),
        logs: variables.batching("OTEL_BLRP", Duration::from_secs(1)),
        metrics: Reading {
            interval: variables.milliseconds("OTEL_METRIC_EXPORT_INTERVAL").unwrap_or(Duration::from_secs(60)),
            temporality: variables
                .word(
                    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
                    &[
                        ("cumulative", Temporality::Cumulative),
                        ("delta", Temporality::Delta),
                        ("lowmemory", Temporality::LowMemory),
                    ],
                )
                .unwrap_or(Temporality::Cumulative),
            histograms: variables
                .word(
                    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
                    &[
                        ("explicit_bucket_histogram", Histograms::Explicit),
                        ("base2_exponential_bucket_histogram", Histograms::Exponential),
                    ],
                )
                .unwrap_or(Histograms::Explicit),
        },
        queue_dir: own.queue_dir.clone().or_else(|| queue_dir(&lookup)),
        queue_max: own.queue_max.unwrap_or(QUEUE_BYTES),
        flush: own.flush.unwrap_or(FLUSH),
    };
    (config, variables.mistakes)
}

/// Where state belongs: what the user says, what the system has for root, what the user has at home. Not the temporary directory,
/// which anybody may write to and anything may clear. Only a volume outlives its container: then it has to be named.
fn queue_dir(lookup: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let absolute = |name: &str| lookup(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = match absolute("XDG_STATE_HOME") {
        Some(state) => state,
        None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib"),
        None => absolute("HOME")?.join(".local/state"),
    };
    Some(state.join("agent-sidecar/otlp"))
}

/// What is secret by the name of its variable, and our own headers: for [`agent_sidecar_core::content`].
pub(crate) fn secrets(config: &OtlpConfig, variables: impl Iterator<Item = (String, String)>) -> Vec<String> {
    const NAMES: [&str; 9] = ["KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "AUTH", "COOKIE", "HEADERS"];
    // A short one is in too many words.
    const SHORTEST: usize = 8;
    let named = variables.filter(|(name, _)| NAMES.iter().any(|secret| name.to_uppercase().contains(secret)));
    let headers = config.targets.iter().flatten().flat_map(|target| target.headers.0.values());
    let headers = headers.filter_map(|value| value.to_str().ok().map(str::to_owned));
    let mut secrets: Vec<String> = named.map(|(_, value)| value).chain(headers).filter(|one| one.len() >= SHORTEST).collect();
    // One may be in another.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets.dedup();
    secrets
}

struct Variables<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    mistakes: Vec<Mistake>,
}

impl Variables<'_> {
    /// Empty is unset, by the specification.
    fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn wrong(&mut self, name: &str, what: impl Into<String>, remedy: impl Into<String>) {
        let origin = Origin::Environment(name.to_owned());
        // One that several signals read is named once.
        let mistake = Mistake { origin, what: what.into(), remedy: remedy.into() };
        if !self.mistakes.contains(&mistake) {
            self.mistakes.push(mistake);
        }
    }

    fn truth(&self, name: &str) -> bool {
        self.get(name).is_some_and(|text| text.eq_ignore_ascii_case("true"))
    }

    fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Option<T> {
        let text = self.get(name)?;
        let found = words.iter().find(|(word, _)| text.eq_ignore_ascii_case(word)).map(|(_, value)| *value);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.wrong(name, format!("`{text}` is none of {}", known.join(", ")), format!("write {}", known.join(" or ")));
        }
        found
    }

    fn number(&mut self, name: &str, noun: &str) -> Option<u64> {
        let text = self.get(name)?;
        let number = text.parse::<u64>().ok().filter(|n| (1..=86_400_000).contains(n));
        if number.is_none() {
            self.wrong(name, format!("`{text}` is no {noun}"), "write a whole number above zero, like 5000");
        }
        number
    }

    fn milliseconds(&mut self, name: &str) -> Option<Duration> {
        self.number(name, "number of milliseconds").map(Duration::from_millis)
    }

    fn batching(&mut self, prefix: &str, delay: Duration) -> Batching {
        let mut count = |name: &str, default: usize| {
            let n = self.number(&format!("{prefix}_{name}"), "count").and_then(|n| usize::try_from(n).ok());
            n.unwrap_or(default)
        };
        let max_queue = count("MAX_QUEUE_SIZE", 2_048);
        let max_batch = count("MAX_EXPORT_BATCH_SIZE", 512).min(max_queue);
        let delay = self.milliseconds(&format!("{prefix}_SCHEDULE_DELAY")).unwrap_or(delay);
        Batching { delay, max_batch, max_queue }
    }

    fn sampler(&mut self) -> Sampler {
        const SAMPLERS: [(&str, (Option<f64>, bool)); 6] = [
            ("always_on", (Some(1.0), false)),
            ("always_off", (Some(0.0), false)),
            ("traceidratio", (None, false)),
            ("parentbased_always_on", (Some(1.0), true)),
            ("parentbased_always_off", (Some(0.0), true)),
            ("parentbased_traceidratio", (None, true)),
        ];
        let Some((ratio, follow)) = self.word("OTEL_TRACES_SAMPLER", &SAMPLERS) else { return Sampler::default() };
        let ratio = ratio.unwrap_or_else(|| {
            const ARG: &str = "OTEL_TRACES_SAMPLER_ARG";
            let text = self.get(ARG).unwrap_or_else(|| String::from("1"));
            text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio)).unwrap_or_else(|| {
                self.wrong(ARG, format!("`{text}` is no ratio"), "write a number from 0 to 1, like 0.25");
                1.0
            })
        });
        Sampler { ratio, follow }
    }

    /// Whether `OTEL_…_EXPORTER` asks for OTLP; it does if it is not set. `console`, `prometheus` and others are the CLI's affair.
    fn chosen(&self, signal: Signal) -> bool {
        let list = self.get(&format!("OTEL_{}_EXPORTER", signal.as_str().to_uppercase()));
        list.is_none_or(|list| list.split(',').any(|one| one.trim() == "otlp"))
    }

    /// The signal's own variable before the general one, and which of them it is.
    fn exporter(&self, signal: Signal, name: &str) -> Option<(String, String)> {
        let own = format!("OTEL_EXPORTER_OTLP_{}_{name}", signal.as_str().to_uppercase());
        let general = format!("OTEL_EXPORTER_OTLP_{name}");
        [own, general].into_iter().find_map(|variable| Some((self.get(&variable)?, variable)))
    }

    fn target(&mut self, signal: Signal, own: &Own) -> Option<Target> {
        let standard = own.endpoint.is_none();
        let get = |variables: &Self, name| if standard { variables.exporter(signal, name) } else { None };

        let protocol = own.protocol.clone().map(|text| (text, String::from("otlp.protocol"))).or_else(|| get(self, "PROTOCOL"));
        let protocol = match protocol {
            Some((text, _)) if text == "grpc" => Protocol::Grpc,
            Some((text, _)) if text == "http/json" => Protocol::Json,
            Some((text, name)) if text != "http/protobuf" => {
                let what = format!("`{text}` is not spoken here; http/protobuf is");
                self.wrong(&name, what, "write http/protobuf, http/json or grpc");
                Protocol::Http
            }
            _ => Protocol::Http,
        };
        let uri = match &own.endpoint {
            Some(text) => endpoint(text, signal, protocol, true, false).ok()?,
            None => {
                let (text, name) = self.exporter(signal, "ENDPOINT")?;
                let general = name == "OTEL_EXPORTER_OTLP_ENDPOINT";
                let insecure = self.exporter(signal, "INSECURE").is_some_and(|(text, _)| text.eq_ignore_ascii_case("true"));
                match endpoint(&text, signal, protocol, general, insecure) {
                    Ok(uri) => uri,
                    Err(what) => {
                        self.wrong(&name, what, "write it like http://collector:4318");
                        return None;
                    }
                }
            }
        };
        let headers = match (&own.headers, get(self, "HEADERS")) {
            (Some(headers), _) => headers.clone(),
            (None, None) => Headers::default(),
            (None, Some((text, name))) => {
                let (headers, wrong) = read_headers(&text);
                if let Some(what) = wrong {
                    self.wrong(&name, what, HEADERS_REMEDY);
                }
                headers
            }
        };
        let timeout = match get(self, "TIMEOUT") {
            Some((_, name)) if own.timeout.is_none() => self.milliseconds(&name),
            _ => own.timeout,
        };
        let gzip = match own.compression.clone().map(|text| (text, String::new())).or_else(|| get(self, "COMPRESSION")) {
            Some((text, _)) if text == "gzip" => true,
            Some((text, name)) if text != "none" => {
                self.wrong(&name, format!("`{text}` is not known here"), "write gzip or none");
                false
            }
            _ => false,
        };
        let path = |own: &Option<PathBuf>, name| own.clone().or_else(|| get(self, name).map(|(text, _)| PathBuf::from(text)));
        let certificate = path(&own.certificate, "CERTIFICATE");
        let identity = match (path(&own.client_certificate, "CLIENT_CERTIFICATE"), path(&own.client_key, "CLIENT_KEY")) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (Some(_), None) | (None, Some(_)) => {
                self.wrong(
                    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
                    "a client's certificate and its key are of no use without each other",
                    "set OTEL_EXPORTER_OTLP_CLIENT_KEY as well, or neither",
                );
                None
            }
        };
        Some(Target { signal, uri, protocol, headers, timeout: timeout.unwrap_or(TIMEOUT), gzip, certificate, identity })
    }
}

/// The whole address of one signal's requests. `general` endpoints are a base to which the signal's path is added; gRPC has paths of
/// its own. What is wrong is said without the text, which may hold a password.
fn endpoint(text: &str, signal: Signal, protocol: Protocol, general: bool, insecure: bool) -> Result<Uri, String> {
    // gRPC endpoints are often written without a scheme, and are secure then unless somebody says otherwise.
    let with_scheme = match protocol {
        Protocol::Grpc if !text.contains("://") => format!("{}://{text}", if insecure { "http" } else { "https" }),
        Protocol::Grpc | Protocol::Http | Protocol::Json => text.to_owned(),
    };
    let uri: Uri = with_scheme.parse().map_err(|_| String::from("the endpoint is no URL"))?;
    let (Some(scheme @ ("http" | "https")), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(String::from("the endpoint does not begin with http:// or https:// and a host"));
    };
    if authority.as_str().contains('@') {
        return Err(String::from("the endpoint has a user or a password in it, which belong into the headers"));
    }
    let path = match (protocol, general) {
        (Protocol::Grpc, _) => String::from(match signal {
            Signal::Traces => "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            Signal::Metrics => "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
            Signal::Logs => "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
        }),
        (Protocol::Http | Protocol::Json, true) => format!("{}/v1/{}", uri.path().trim_end_matches('/'), signal.as_str()),
        (Protocol::Http | Protocol::Json, false) => uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
    };
    format!("{scheme}://{authority}{path}").parse().map_err(|_| String::from("the endpoint is no URL"))
}

/// What is wrong with an endpoint of our own configuration.
pub(crate) fn check_endpoint(text: &str) -> Result<(), String> {
    endpoint(text, Signal::Traces, Protocol::Http, true, false).map(drop)
}

pub(crate) const HEADERS_REMEDY: &str = "write name=value,name=value, with %2C for a comma within a value";

/// `name=value,name=value`, values percent-encoded. What is wrong is said without the text.
pub(crate) fn headers(text: &str) -> Result<Headers, String> {
    match read_headers(text) {
        (headers, None) => Ok(headers),
        (_, Some(what)) => Err(what),
    }
}

/// Those that are right, and the first thing that is wrong.
fn read_headers(text: &str) -> (Headers, Option<String>) {
    let (mut headers, mut wrong) = (HeaderMap::new(), None);
    for (i, pair) in text.split(',').enumerate().filter(|(_, pair)| !pair.trim().is_empty()) {
        match header(pair, i + 1) {
            Ok((name, value)) => drop(headers.append(name, value)),
            Err(what) => wrong = wrong.or(Some(what)),
        }
    }
    (Headers(headers), wrong)
}

fn header(pair: &str, nth: usize) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = pair.split_once('=').ok_or_else(|| format!("header {nth} has no `=`"))?;
    let name: HeaderName = name.trim().parse().map_err(|_| format!("the name of header {nth} is none"))?;
    let value = percent_decoded(value.trim());
    let mut value = HeaderValue::from_str(&value).map_err(|_| format!("the value of header {nth} cannot be sent"))?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// A percent sign that begins no such thing is one.
pub(super) fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut i) = (Vec::with_capacity(bytes.len()), 0);
    while i < bytes.len() {
        let digits = bytes.get(i + 1..i + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.filter(|_| bytes[i] == b'%').and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests;
