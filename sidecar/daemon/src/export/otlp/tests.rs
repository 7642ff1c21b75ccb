//! The exporter against a collector on loopback that is down, slow, hanging, lying or gone.

mod collector;

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs};
use opentelemetry_proto::tonic::metrics::v1::{Metric, ResourceMetrics, ScopeMetrics};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use self::collector::{Collector, Got, Reply};
use super::environment::Own;
use super::*;

/// Far more than any flush here takes that is not meant to run out.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of a test's own, gone with it.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Scratch {
        let path = std::env::temp_dir().join(format!("agent-sidecar-otlp-{:016x}", crate::supervise::random()));
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&path).unwrap();
        Scratch(path)
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn spans(names: &[&str]) -> ExportTraceServiceRequest {
    let spans = names.iter().map(|name| Span { name: (*name).to_owned(), ..Span::default() }).collect();
    let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
    ExportTraceServiceRequest { resource_spans: vec![ResourceSpans { scope_spans, ..ResourceSpans::default() }] }
}

fn metrics(name: &str) -> ExportMetricsServiceRequest {
    let metrics = vec![Metric { name: name.to_owned(), ..Metric::default() }];
    let scope_metrics = vec![ScopeMetrics { metrics, ..ScopeMetrics::default() }];
    ExportMetricsServiceRequest { resource_metrics: vec![ResourceMetrics { scope_metrics, ..ResourceMetrics::default() }] }
}

fn logs(name: &str) -> ExportLogsServiceRequest {
    let log_records = vec![LogRecord { event_name: name.to_owned(), ..LogRecord::default() }];
    let scope_logs = vec![ScopeLogs { log_records, ..ScopeLogs::default() }];
    ExportLogsServiceRequest { resource_logs: vec![ResourceLogs { scope_logs, ..ResourceLogs::default() }] }
}

fn own(endpoint: &str, queue: &Path) -> Own {
    let (endpoint, queue_dir) = (Some(endpoint.to_owned()), Some(queue.to_owned()));
    Own { endpoint, queue_dir, timeout: Some(PATIENCE), ..Own::default() }
}

fn start_with(own: &Own) -> (Exporter, Arc<Counts>) {
    let (config, mistakes) = environment::read(own, |_| None);
    assert!(mistakes.is_empty());
    let counts = Arc::new(Counts::default());
    (Exporter::start(config, Arc::clone(&counts)).unwrap().unwrap(), counts)
}

fn start(endpoint: &str, queue: &Path) -> (Exporter, Arc<Counts>) {
    start_with(&own(endpoint, queue))
}

/// An address at which nobody listens, and nobody else here will: loopback has sixteen million of them.
fn nobody() -> SocketAddr {
    let [a, b, c, ..] = crate::supervise::random().to_le_bytes();
    (Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)), 4_318).into()
}

/// Its thread, too: on a busy machine the end does not wait for it, and as long as it lives nobody inherits from it.
fn gone(exporter: Exporter) {
    let shared = Arc::clone(&exporter.shared);
    drop(exporter);
    let state = shared.lock();
    let (state, _) = shared.progress.wait_timeout_while(state, PATIENCE, |state| !state.ended).unwrap();
    assert!(state.ended);
}

fn sent(items: u64) -> Flushed {
    Flushed { sent: items, ..Flushed::default() }
}

#[test]
fn all_signals_arrive_by_either_protocol_plain_or_compressed() {
    for (protocol, compression) in [
        ("http/protobuf", "none"),
        ("http/protobuf", "gzip"),
        ("http/json", "none"),
        ("http/json", "gzip"),
        ("grpc", "none"),
        ("grpc", "gzip"),
    ] {
        let (scratch, collector) = (Scratch::new(), Collector::start());
        let headers = Some(environment::headers("x-key=secret").unwrap());
        let (protocol, compression) = (Some(protocol.to_owned()), Some(compression.to_owned()));
        let (exporter, counts) = start_with(&Own { protocol, compression, headers, ..own(&collector.url(), &scratch) });
        exporter.offer_message(Signal::Traces, &spans(&["a", "b"]), 2);
        exporter.offer_message(Signal::Metrics, &metrics("m"), 1);
        exporter.offer_message(Signal::Logs, &logs("l"), 1);
        exporter.offer_message(Signal::Traces, &spans(&["c"]), 1);
        assert_eq!(exporter.flush(PATIENCE), sent(5));
        assert_eq!(collector.taken(Signal::Traces), ["a", "b", "c"]);
        assert_eq!((collector.taken(Signal::Metrics), collector.taken(Signal::Logs)), (vec!["m".into()], vec!["l".into()]));
        for Got { headers, path, .. } in collector.wait(|_| true) {
            assert_eq!(headers["x-key"], "secret");
            assert!(headers["user-agent"].to_str().unwrap().starts_with("agent-sidecar/"), "{path}");
        }
        assert_eq!((counts.total_sent(), counts.total_lost()), (5, 0));
        gone(exporter);
        assert_eq!(std::fs::read_dir(&*scratch).unwrap().count(), 0, "nothing is left behind");
    }
}

#[test]
fn a_collector_that_has_moved_is_followed_within_its_host() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    let away: &[(&str, &str)] = &[("location", "http://elsewhere.invalid/v1/logs")];
    let moved = Reply::Status(308, &[("location", "/moved/v1/logs?x=1")]);
    collector.answer(Signal::Logs, &[moved, Reply::Take, Reply::Status(307, away)]);
    let (exporter, counts) = start(&collector.url(), &scratch);
    exporter.offer_message(Signal::Logs, &logs("a"), 1);
    exporter.offer_message(Signal::Logs, &logs("b"), 1);
    assert_eq!(exporter.flush(PATIENCE), Flushed { sent: 1, left_on_disk: 0, lost: 1 });
    assert_eq!(collector.taken(Signal::Logs), ["a"]);
    let paths: Vec<String> = collector.wait(|_| true).into_iter().map(|got| got.path).collect();
    assert_eq!(paths, ["/v1/logs", "/moved/v1/logs", "/v1/logs"], "keys are not carried to another host");
    assert_eq!(counts.lost(Signal::Logs, Cause::Refused), 1);
}

#[test]
fn nothing_configured_is_no_thread_and_a_signal_that_is_off_is_nobodys_loss() {
    let (config, _) = environment::read(&Own::default(), |_| None);
    assert!(Exporter::start(config, Arc::default()).unwrap().is_none());
    let (scratch, collector) = (Scratch::new(), Collector::start());
    let (exporter, counts) = start_with(&Own { signals: [Some(false), None, None], ..own(&collector.url(), &scratch) });
    exporter.offer_message(Signal::Traces, &spans(&["a"]), 1);
    exporter.offer_message(Signal::Logs, &ExportLogsServiceRequest::default(), 0);
    assert_eq!((exporter.flush(PATIENCE), counts.total_lost()), (Flushed::default(), 0));
    assert!(collector.wait(|_| true).is_empty());
}

#[test]
fn a_collector_that_is_down_gets_it_all_when_it_is_up_from_whoever_comes_next() {
    let (scratch, address) = (Scratch::new(), nobody());
    let url = format!("http://{address}");
    let (exporter, counts) = start(&url, &scratch);
    for i in 0..50 {
        exporter.offer_message(Signal::Logs, &logs(&i.to_string()), 1);
    }
    let began = Instant::now();
    assert_eq!(exporter.flush(PATIENCE), Flushed { left_on_disk: 50, ..Flushed::default() });
    assert!(began.elapsed() < PATIENCE / 4, "nobody waits for a collector that is down: {:?}", began.elapsed());
    assert_eq!(counts.total_lost(), 0);
    gone(exporter);
    let collector = Collector::on(address, None);
    let (heir, _) = start(&url, &scratch);
    heir.offer_message(Signal::Logs, &logs("50"), 1);
    collector.wait(|got| got.len() == 51);
    assert_eq!(collector.taken(Signal::Logs), (0..=50).map(|i| i.to_string()).collect::<Vec<_>>());
}

#[test]
fn one_signal_that_hangs_holds_back_no_other_and_the_end_is_in_time() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    collector.always(Signal::Traces, Reply::Hang);
    let (exporter, counts) = start(&collector.url(), &scratch);
    exporter.offer_message(Signal::Traces, &spans(&["a", "b"]), 2);
    collector.wait(|got| got.len() == 1);
    exporter.offer_message(Signal::Metrics, &metrics("m"), 1);
    exporter.offer_message(Signal::Logs, &logs("l"), 1);
    collector.wait(|got| got.len() == 3);
    let deadline = Duration::from_millis(250);
    let late = || {
        let began = Instant::now();
        let flushed = exporter.flush(deadline);
        assert_eq!((flushed.left_on_disk, flushed.lost), (2, 0));
        began.elapsed().checked_sub(deadline).expect("it waited")
    };
    // On a busy machine the end of a wait may be heard late, but not each time.
    assert!((0..50).any(|_| late() < Duration::from_millis(50)), "none of them was in time");
    assert_eq!((counts.total_sent(), counts.total_lost()), (2, 0));
}

#[test]
fn whatever_a_collector_answers_the_batch_arrives_or_is_counted() {
    const SOON: &[(&str, &str)] = &[("retry-after", "0")];
    for protocol in ["http/protobuf", "grpc"] {
        let (scratch, collector) = (Scratch::new(), Collector::start());
        let http = protocol == "http/protobuf";
        let (busy, full, no) = if http { (503, 429, 400) } else { (14, 4, 3) };
        collector.answer(
            Signal::Traces,
            &[
                Reply::Status(busy, &[]),
                Reply::Status(full, SOON),
                Reply::Cut,
                // Taken now: "a".
                Reply::Nonsense,
                // Refused: "b", "c".
                Reply::Status(no, &[]),
                // In part: "d", "e".
                Reply::Part(1),
            ],
        );
        let own = Own { protocol: Some(protocol.to_owned()), ..own(&collector.url(), &scratch) };
        let (exporter, counts) = start_with(&own);
        exporter.offer_message(Signal::Traces, &spans(&["a"]), 1);
        collector.wait(|got| got.len() == 4);
        exporter.offer_message(Signal::Traces, &spans(&["b", "c"]), 2);
        exporter.offer_message(Signal::Traces, &spans(&["d", "e"]), 2);
        exporter.offer_message(Signal::Traces, &spans(&["f"]), 1);
        let flushed = exporter.flush(PATIENCE);
        assert_eq!((flushed.left_on_disk, collector.wait(|_| true).last().unwrap().names[0].as_str()), (0, "f"), "{protocol}");
        assert_eq!(counts.lost(Signal::Traces, Cause::Refused), 2, "{protocol}");
        assert_eq!(counts.lost(Signal::Traces, Cause::Partial), 1, "{protocol}");
        assert_eq!(counts.total_sent(), 3, "{protocol}");
        assert_eq!(counts.retried(Signal::Traces), 3, "{protocol}");
    }
}

#[test]
fn an_answer_without_end_is_not_read_to_it() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    collector.answer(Signal::Logs, &[Reply::Endless]);
    let (exporter, _) = start(&collector.url(), &scratch);
    exporter.offer_message(Signal::Logs, &logs("a"), 1);
    exporter.offer_message(Signal::Logs, &logs("b"), 1);
    // It said 200: it has the first one.
    assert_eq!(exporter.flush(PATIENCE), sent(2));
    assert!(collector.poured() < 64 << 20, "{} bytes were read", collector.poured());
}

#[test]
fn what_was_taken_is_not_sent_again_because_the_rest_of_the_answer_is_late() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    collector.answer(Signal::Logs, &[Reply::Dawdle]);
    let (exporter, counts) = start(&collector.url(), &scratch);
    exporter.offer_message(Signal::Logs, &logs("a"), 1);
    assert_eq!((exporter.flush(PATIENCE), counts.retried(Signal::Logs)), (sent(1), 0));
    assert_eq!(collector.taken(Signal::Logs), ["a"]);
}

#[test]
fn the_end_waits_as_long_as_the_collector_asks_for_if_it_has_the_time() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    collector.answer(Signal::Logs, &[Reply::Status(429, &[("retry-after", "1")])]);
    collector.answer(Signal::Traces, &[Reply::Status(503, &[("retry-after", "200")])]);
    let (exporter, _) = start(&collector.url(), &scratch);
    exporter.offer_message(Signal::Logs, &logs("a"), 1);
    exporter.offer_message(Signal::Traces, &spans(&["b"]), 1);
    assert_eq!(exporter.flush(PATIENCE), Flushed { sent: 1, left_on_disk: 1, lost: 0 });
}

#[test]
fn somebody_who_speaks_another_protocol_takes_nothing() {
    let scratch = Scratch::new();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::io::Write::write_all(&mut stream, b"220 mail.example ESMTP\r\n").ok();
            if tell.send(()).is_err() {
                return;
            }
        }
    });
    let (exporter, counts) = start(&format!("http://127.0.0.1:{port}"), &scratch);
    exporter.offer_message(Signal::Traces, &spans(&["a"]), 1);
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(exporter.flush(PATIENCE), Flushed { left_on_disk: 1, ..Flushed::default() });
    assert_eq!(counts.total_lost(), 0);
}

fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tls").join(name)
}

fn server(ask_for_client: bool) -> rustls::ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificates = |name| CertificateDer::pem_file_iter(pem(name)).unwrap().map(Result::unwrap).collect::<Vec<_>>();
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(certificates("ca.pem"));
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = match ask_for_client {
        true => config.with_client_cert_verifier(verifier.build().unwrap()),
        false => config.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from_pem_file(pem("server.key")).unwrap();
    let mut config = config.with_single_cert(certificates("server.pem"), key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

#[test]
fn tls_is_spoken_with_whom_it_can_be_trusted() {
    let collector = Collector::on("127.0.0.1:0".parse().unwrap(), Some(server(false)));
    let strict = Collector::on("127.0.0.1:0".parse().unwrap(), Some(server(true)));
    let at = |collector: &Collector| format!("https://localhost:{}", collector.address.port());
    let (right, wrong) = (Some(pem("ca.pem")), Some(pem("other-ca.pem")));
    let identity = || (Some(pem("client.pem")), Some(pem("client.key")));
    for protocol in ["http/protobuf", "grpc"] {
        for (collector, certificate, (client_certificate, client_key), arrives) in [
            (&collector, right.clone(), (None, None), true),
            (&collector, right.clone(), identity(), true),
            (&strict, right.clone(), identity(), true),
            (&strict, right.clone(), (None, None), false),
            (&collector, wrong.clone(), (None, None), false),
            (&collector, Some(PathBuf::from("/no/such/file")), (None, None), false),
            // The roots of the web know nothing of ours.
            (&collector, None, (None, None), false),
        ] {
            let scratch = Scratch::new();
            let own = Own {
                protocol: Some(protocol.to_owned()),
                certificate: certificate.clone(),
                client_certificate,
                client_key,
                ..own(&at(collector), &scratch)
            };
            let (exporter, counts) = start_with(&own);
            exporter.offer_message(Signal::Traces, &spans(&["a"]), 1);
            let expected = if arrives { sent(1) } else { Flushed { left_on_disk: 1, ..Flushed::default() } };
            assert_eq!(exporter.flush(PATIENCE), expected, "{protocol} {certificate:?}");
            assert_eq!(counts.total_lost(), 0, "a certificate can be mended");
        }
    }
}

#[test]
fn without_a_disk_it_is_sent_from_memory_and_the_end_says_what_was_lost() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    let file = scratch.join("file");
    std::fs::write(&file, b"").unwrap();
    let (exporter, counts) = start(&collector.url(), &file);
    exporter.offer_message(Signal::Logs, &logs("a"), 1);
    assert_eq!((exporter.flush(PATIENCE), counts.is_degraded()), (sent(1), true));
    collector.always(Signal::Logs, Reply::Hang);
    exporter.offer_message(Signal::Logs, &logs("b"), 1);
    assert_eq!(exporter.flush(Duration::from_millis(50)), Flushed { lost: 1, ..Flushed::default() });
}

/// Many threads, no room, a collector that hangs: nobody is held up, and every item is accounted for.
#[test]
fn offering_never_waits() {
    let (scratch, collector) = (Scratch::new(), Collector::start());
    collector.always(Signal::Traces, Reply::Hang);
    let (exporter, counts) = start_with(&Own { queue_max: Some(1 << 20), ..own(&collector.url(), &scratch) });
    let big = "x".repeat(100_000);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..100).for_each(|_| exporter.offer_message(Signal::Traces, &spans(&[&big]), 1)));
        }
    });
    let until = Instant::now() + PATIENCE;
    while exporter.shared.lock().in_memory() > 0 && Instant::now() < until {
        std::thread::yield_now();
    }
    let flushed = exporter.flush(Duration::from_millis(200));
    assert_eq!((flushed.sent, counts.total_lost() + flushed.left_on_disk), (0, 400));
    assert!(flushed.left_on_disk >= 9, "{flushed:?}");
}

/// The dying part of the next test: offers numbered records to nobody, and says what is in the queue, until it is killed.
#[test]
fn child_that_is_killed() {
    let Ok(asked) = std::env::var("AGENT_SIDECAR_TEST_OTLP_CHILD") else { return };
    let (address, queue) = asked.split_once(' ').unwrap();
    let (exporter, _) = start(&format!("http://{address}"), Path::new(queue));
    for i in 0.. {
        exporter.offer_message(Signal::Logs, &logs(&i.to_string()), 1);
        let until = Instant::now() + PATIENCE;
        while exporter.shared.lock().queued[Signal::Logs as usize].0 <= i {
            assert!(Instant::now() < until, "it is not taken in");
            std::thread::yield_now();
        }
        println!("\nqueued {i}");
    }
}

#[test]
fn what_was_queued_when_we_were_killed_is_sent_by_the_next_one() {
    let (scratch, address) = (Scratch::new(), nobody());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "export::otlp::tests::child_that_is_killed", "--nocapture"])
        .env("AGENT_SIDECAR_TEST_OTLP_CHILD", format!("{address} {}", scratch.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut queued = lines.filter_map(|line| line.strip_prefix("queued ").and_then(|n| n.parse::<usize>().ok()));
    assert_eq!(queued.by_ref().find(|n| *n >= 30), Some(30));
    child.kill().unwrap();
    #[expect(clippy::disallowed_methods, reason = "here is no reaper: the test owns its child")]
    child.wait().unwrap();
    let last = queued.last().unwrap_or(30);
    let collector = Collector::on(address, None);
    let (heir, counts) = start(&format!("http://{address}"), &scratch);
    collector.wait(|got| got.iter().filter(|got| got.taken).count() > last);
    let taken = collector.taken(Signal::Logs);
    assert_eq!(taken[..=last], (0..=last).map(|i| i.to_string()).collect::<Vec<_>>());
    assert_eq!(heir.flush(PATIENCE).left_on_disk, 0);
    // Killed over the one that was being written, that one is known, too.
    assert!(counts.total_lost() <= 1);
}

/// What the thread of this name has run, in nanoseconds.
fn ran(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let ours = tasks.filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
    let stat = |task: PathBuf| std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    ours.filter_map(|task| stat(task).split(' ').next()?.parse::<u64>().ok()).sum()
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A batch of 512 spans with ten attributes each.
fn full_batch() -> Vec<u8> {
    let attribute = |i: usize| KeyValue {
        key: format!("gen_ai.attribute.{i}"),
        value: Some(AnyValue { value: Some(Value::StringValue(format!("value {i}"))) }),
        ..KeyValue::default()
    };
    let mut request = spans(&["chat claude"; 512]);
    for span in &mut request.resource_spans[0].scope_spans[0].spans {
        span.attributes = (0..10).map(attribute).collect();
        (span.trace_id, span.span_id) = (vec![7; 16], vec![9; 8]);
    }
    prost::Message::encode_to_vec(&request)
}

const BATCHES: usize = 196;

/// The figures are printed: `cargo test --release -p agent-sidecar what_it_costs -- --nocapture`.
#[test]
fn what_it_costs() {
    let Ok(asked) = std::env::var("AGENT_SIDECAR_TEST_OTLP_COST") else {
        for what in ["http/protobuf none", "http/protobuf gzip", "grpc none", "down"] {
            let out = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "export::otlp::tests::what_it_costs", "--nocapture"])
                .env("AGENT_SIDECAR_TEST_OTLP_COST", what)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success(), "{said}");
            said.lines().filter(|line| line.contains(" spans")).for_each(|line| println!("{line}"));
        }
        return;
    };
    let (scratch, batch) = (Scratch::new(), full_batch());
    if asked == "down" {
        let (exporter, _) = start(&format!("http://{}", nobody()), &scratch);
        let before = resident_kib();
        (0..BATCHES).for_each(|_| {
            exporter.offer(Signal::Traces, batch.clone(), 512);
            while exporter.shared.lock().in_memory() > 0 {
                std::thread::yield_now();
            }
        });
        let kept = exporter.flush(Duration::from_secs(1));
        let more = resident_kib().saturating_sub(before);
        println!(
            "\n100,000 spans with the collector down: {} KiB more resident, {} on disk, {:.0} ms CPU",
            more,
            kept.left_on_disk,
            ran("otlp") as f64 / 1e6
        );
        assert!(more < 8_192, "{more} KiB more");
        return;
    }
    let (protocol, compression) = asked.split_once(' ').unwrap();
    let collector = Collector::start();
    let (protocol, compression) = (Some(protocol.to_owned()), Some(compression.to_owned()));
    let (exporter, _) = start_with(&Own { protocol, compression, ..own(&collector.url(), &scratch) });
    let began = Instant::now();
    for i in 0..BATCHES {
        exporter.offer(Signal::Traces, batch.clone(), 512);
        // As an encoder would: a few at a time.
        if i % 16 == 15 {
            exporter.flush(PATIENCE);
        }
    }
    exporter.flush(PATIENCE);
    let (took, cpu) = (began.elapsed(), ran("otlp"));
    println!(
        "\n100,000 spans, {asked}: {:.0} ms CPU of ours, {} bytes a batch, {took:?} with the collector's decoding",
        cpu as f64 / 1e6,
        batch.len()
    );
    assert!(cpu < 5_000_000_000, "{cpu}");
}
