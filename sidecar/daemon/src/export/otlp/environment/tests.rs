use super::*;

fn read(own: &Own, variables: &[(&str, &str)]) -> (OtlpConfig, Vec<Mistake>) {
    super::read(own, |name| variables.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned()))
}

/// Where each signal goes, with what the tests ask about; `-` where it does not.
fn told(own: &Own, variables: &[(&str, &str)]) -> String {
    let (config, mistakes) = read(own, variables);
    let targets = config.targets.iter().map(|target| match target {
        None => String::from("-"),
        Some(target) => {
            let gzip = if target.gzip { " gzip" } else { "" };
            let headers: Vec<&str> = target.headers.0.values().map(|value| value.to_str().unwrap()).collect();
            let protocol = match target.protocol {
                Protocol::Http => "",
                Protocol::Json => " json",
                Protocol::Grpc => " grpc",
            };
            let seconds = if target.timeout == TIMEOUT { String::new() } else { format!(" {:?}", target.timeout) };
            format!("{}{protocol}{gzip}{seconds} {}", target.uri, headers.join("+")).trim_end().to_owned()
        }
    });
    let mistakes = mistakes.iter().map(|mistake| format!("\n! {mistake}"));
    targets.collect::<Vec<_>>().join("\n") + &mistakes.collect::<String>()
}

fn endpoint_of_ours(text: &str) -> Own {
    Own { endpoint: Some(text.to_owned()), ..Own::default() }
}

#[test]
fn without_an_endpoint_nothing_is_exported() {
    let variables =
        [("OTEL_TRACES_EXPORTER", "otlp"), ("OTEL_EXPORTER_OTLP_HEADERS", "a=b"), ("OTEL_EXPORTER_OTLP_ENDPOINT", " ")];
    assert_eq!(told(&Own::default(), &[]), "-\n-\n-");
    assert_eq!(told(&Own::default(), &variables), "-\n-\n-");
    assert_eq!(read(&Own::default(), &[]).0.exported(), [false; 3]);
}

#[test]
fn the_general_endpoint_is_a_base_and_a_signals_own_is_used_as_it_is() {
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/base/"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "https://logs.example/in?x=1"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "500"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "k=a%20b%2Cc, "),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "k=t,l=u"),
        ("OTEL_EXPORTER_OTLP_LOGS_COMPRESSION", "gzip"),
    ];
    let expected = "http://c:4318/base/v1/traces 2s t+u\n\
                    http://c:4318/base/v1/metrics 500ms a b,c\n\
                    https://logs.example/in?x=1 gzip 2s a b,c";
    assert_eq!(told(&Own::default(), &variables), expected);
}

#[test]
fn grpc_is_secure_unless_somebody_says_otherwise() {
    let service = |signal: &str, name: &str| format!("opentelemetry.proto.collector.{signal}.v1.{name}/Export");
    let variables = [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4317"),
        ("OTEL_EXPORTER_OTLP_METRICS_INSECURE", "true"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://d:4317/ignored"),
    ];
    let expected = format!(
        "https://c:4317/{} grpc\nhttp://c:4317/{} grpc\nhttp://d:4317/{} grpc",
        service("trace", "TraceService"),
        service("metrics", "MetricsService"),
        service("logs", "LogsService")
    );
    assert_eq!(told(&Own::default(), &variables), expected);
}

#[test]
fn each_signal_may_be_spoken_to_in_its_own_way() {
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:1"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf"),
    ];
    let expected = "http://c:1/v1/traces json\nhttp://c:1/v1/metrics json\nhttp://c:1/v1/logs";
    assert_eq!(told(&Own::default(), &variables), expected);
}

#[test]
fn the_standard_samplers_are_known() {
    let sampler = |name, arg| {
        let (config, mistakes) = read(&Own::default(), &[("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", arg)]);
        (config.sampler.ratio, config.sampler.follow, mistakes.len())
    };
    assert_eq!(sampler("", ""), (1.0, true, 0));
    assert_eq!(sampler("always_off", ""), (0.0, false, 0));
    assert_eq!(sampler("traceidratio", "0.25"), (0.25, false, 0));
    assert_eq!(sampler("parentbased_traceidratio", ""), (1.0, true, 0));
    assert_eq!(sampler("traceidratio", "NaN"), (1.0, false, 1));
    assert_eq!(sampler("xray", "0.1"), (1.0, true, 1));
}

#[test]
fn secrets_are_known_by_the_names_of_their_variables() {
    let own = Own { headers: Some(headers("authorization=Bearer%20abcdef").unwrap()), ..endpoint_of_ours("http://c") };
    let (config, _) = read(&own, &[("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "100")]);
    assert_eq!(config.value_limit, Some(100));
    let variables = [("MY_API_KEY", "0123456789"), ("db_password", "0123456789ab"), ("PATH", "/usr/bin:/bin"), ("AUTH", "short")];
    let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(secrets(&config, variables), ["Bearer abcdef", "0123456789ab", "0123456789"]);
}

#[test]
fn who_wants_no_telemetry_gets_none() {
    let on = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c");
    assert_eq!(told(&Own::default(), &[on, ("OTEL_SDK_DISABLED", "TRUE")]), "-\n-\n-");
    let exporters =
        [on, ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_METRICS_EXPORTER", "prometheus"), ("OTEL_LOGS_EXPORTER", "console, otlp")];
    assert_eq!(told(&Own::default(), &exporters), "-\n-\nhttp://c/v1/logs");
    assert_eq!(told(&Own { off: true, ..Own::default() }, &[on]), "-\n-\n-");
    let signals = [Some(false), None, Some(true)];
    assert_eq!(told(&Own { signals, ..Own::default() }, &[on]), "-\nhttp://c/v1/metrics\nhttp://c/v1/logs");
}

#[test]
fn our_endpoint_gets_none_of_the_keys_that_were_meant_for_theirs() {
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://theirs"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=theirs"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_SDK_DISABLED", "true"),
    ];
    let ours = "http://ours:1/v1/traces\nhttp://ours:1/v1/metrics\nhttp://ours:1/v1/logs";
    assert_eq!(told(&endpoint_of_ours("http://ours:1"), &variables), ours);
    let own = Own { headers: Some(headers("k=ours").unwrap()), ..Own::default() };
    assert_eq!(told(&own, &variables[..2]).lines().next(), Some("http://theirs/v1/traces ours"));
}

#[test]
fn what_is_wrong_is_named_with_its_remedy_and_leaves_the_rest_in_place() {
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "c:4318"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://u:geheim@c"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/xml"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "geheim,key=kept"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "dleta"),
    ];
    let told = told(&Own::default(), &variables);
    let expected = "-\nhttp://c/v1/metrics kept\n-
! OTEL_EXPORTER_OTLP_PROTOCOL: `http/xml` is not spoken here; http/protobuf is; write http/protobuf, http/json or grpc
! OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: the endpoint does not begin with http:// or https:// and a host; write it like http://collector:4318
! OTEL_EXPORTER_OTLP_HEADERS: header 1 has no `=`; write name=value,name=value, with %2C for a comma within a value
! OTEL_EXPORTER_OTLP_TIMEOUT: `10s` is no number of milliseconds; write a whole number above zero, like 5000
! OTEL_EXPORTER_OTLP_COMPRESSION: `zstd` is not known here; write gzip or none
! OTEL_EXPORTER_OTLP_LOGS_ENDPOINT: the endpoint has a user or a password in it, which belong into the headers; write it like http://collector:4318
! OTEL_BSP_MAX_QUEUE_SIZE: `0` is no count; write a whole number above zero, like 5000
! OTEL_TRACES_SAMPLER: `jaeger_remote` is none of always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off, parentbased_traceidratio; write always_on or always_off or traceidratio or parentbased_always_on or parentbased_always_off or parentbased_traceidratio
! OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE: `dleta` is none of cumulative, delta, lowmemory; write cumulative or delta or lowmemory";
    assert_eq!(told, expected);
    assert!(!told.contains("geheim"), "no secret is repeated");
}

#[test]
fn a_secret_is_not_printed() {
    let (config, _) = read(
        &Own { headers: Some(headers("authorization=Bearer%20geheim").unwrap()), ..endpoint_of_ours("https://c/geheim") },
        &[("OTEL_EXPORTER_OTLP_HEADERS", "x=geheim")],
    );
    assert!(!format!("{:?}", config.targets.clone().map(|target| target.map(|target| target.headers))).contains("geheim"));
    assert_eq!(config.targets[0].as_ref().map(Target::name).as_deref(), Some("https://c"));
}

#[test]
fn how_often_and_how_much_is_read_too() {
    let (config, mistakes) = read(
        &Own::default(),
        &[
            ("OTEL_BSP_SCHEDULE_DELAY", "250"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9999"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "1000"),
            ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "Delta"),
            ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "base2_exponential_bucket_histogram"),
            ("XDG_STATE_HOME", "/state"),
        ],
    );
    assert!(mistakes.is_empty(), "{mistakes:?}");
    assert_eq!(config.spans, Batching { delay: Duration::from_millis(250), max_batch: 2_048, max_queue: 2_048 });
    assert_eq!(config.logs, Batching { delay: Duration::from_secs(1), max_batch: 512, max_queue: 2_048 });
    let interval = Duration::from_secs(1);
    assert_eq!(config.metrics, Reading { interval, temporality: Temporality::Delta, histograms: Histograms::Exponential });
    assert_eq!(config.queue_dir, Some(PathBuf::from("/state/agent-sidecar/otlp")));
    assert_eq!((config.queue_max, config.flush), (QUEUE_BYTES, FLUSH));
}

#[test]
fn collectors_are_told_apart_by_where_they_are() {
    let at = |text: &str| read(&endpoint_of_ours(text), &[]).0.destination();
    assert_eq!(at("http://a"), at("http://a/"));
    assert_ne!(at("http://a"), at("http://b"));
    let with_key = Own { headers: Some(headers("k=1").unwrap()), ..endpoint_of_ours("http://a") };
    assert_eq!(read(&with_key, &[]).0.destination(), at("http://a"), "a new key is no new collector");
}
