use std::io::Write;

use agent_sidecar_core::native::{Book, Report};
use agent_sidecar_core::tokens::{Tokens, Usd};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use proptest::prelude::*;
use prost::Message;

use super::*;

/// As the CLI writes it.
const METRICS: &str = r#"{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"claude-code"}}],
"droppedAttributesCount":0},"scopeMetrics":[{"scope":{"name":"com.anthropic.claude_code","version":"2.1.330"},"metrics":[
{"name":"claude_code.session.count","description":"","unit":"","sum":{"aggregationTemporality":1,"isMonotonic":true,"dataPoints":[
{"attributes":[{"key":"session.id","value":{"stringValue":"s"}}],"startTimeUnixNano":"1795470326273000000","timeUnixNano":"1795470327268000000","asInt":1}]}},
{"name":"claude_code.cost.usage","description":"","unit":"USD","sum":{"aggregationTemporality":1,"isMonotonic":true,"dataPoints":[
{"attributes":[{"key":"session.id","value":{"stringValue":"s"}},{"key":"anthropic.custom_base_url","value":{"boolValue":true}},
{"key":"model","value":{"stringValue":"claude-opus-4-8[1m]"}},{"key":"query_source","value":{"stringValue":"main"}}],
"startTimeUnixNano":"1795470326720000000","timeUnixNano":"1795470327268000000","asDouble":0.007864}]}},
{"name":"claude_code.token.usage","description":"","unit":"tokens","sum":{"aggregationTemporality":1,"isMonotonic":true,"dataPoints":[
{"attributes":[{"key":"session.id","value":{"stringValue":"s"}},{"key":"model","value":{"stringValue":"claude-opus-4-8[1m]"}},
{"key":"query_source","value":{"stringValue":"main"}},{"key":"type","value":{"stringValue":"cacheCreation"}}],
"startTimeUnixNano":"1795470326720000000","timeUnixNano":"1795470327268000000","asInt":790}]}}]}]}]}"#;

const LOGS: &str = r#"{"resourceLogs":[{"resource":{"attributes":[],"droppedAttributesCount":0},"scopeLogs":[{"scope":{"name":"com.anthropic.claude_code.events"},
"logRecords":[{"timeUnixNano":"1795470326775000000","observedTimeUnixNano":"1795470326775000000","body":{"stringValue":"claude_code.api_request"},"attributes":[
{"key":"session.id","value":{"stringValue":"s"}},{"key":"event.sequence","value":{"intValue":6}},{"key":"model","value":{"stringValue":"claude-opus-4-8"}},
{"key":"cache_creation_5m_tokens","value":{"intValue":700}},{"key":"cache_creation_1h_tokens","value":{"intValue":90}},
{"key":"query_source","value":{"stringValue":"sdk"}},{"key":"nothing","value":{}},{"key":"list","value":{"arrayValue":{"values":[]}}}],"droppedAttributesCount":0}]}]}]}"#;

fn json(signal: Signal, text: &str) -> Report {
    decode::report(signal, Encoding::Json, &Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

#[test]
fn both_encodings_say_the_same() {
    let metrics: ExportMetricsServiceRequest = serde_json::from_str(METRICS).unwrap();
    let logs: ExportLogsServiceRequest = serde_json::from_str(LOGS).unwrap();
    for (signal, text, bytes) in [(Signal::Metrics, METRICS, metrics.encode_to_vec()), (Signal::Logs, LOGS, logs.encode_to_vec())]
    {
        let packed = {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            packer.write_all(&bytes).unwrap();
            Bytes::from(packer.finish().unwrap())
        };
        let unpacked = decode::unpack(&packed, BODY).unwrap();
        assert_eq!(decode::report(signal, Encoding::Protobuf, &unpacked).unwrap(), json(signal, text));
        assert!(matches!(decode::unpack(&packed, 100), Err(decode::Undecodable::TooLarge)));
    }
}

#[test]
fn what_the_cli_writes_is_understood() {
    let mut book = Book::default();
    let (spent, _) = book.take(&json(Signal::Metrics, METRICS));
    assert_eq!(spent.len(), 1);
    assert_eq!((spent[0].model.as_str(), spent[0].usd), ("claude-opus-4-8", Usd::from_f64(0.007864)));
    let (split, _) = book.take(&json(Signal::Logs, LOGS));
    assert_eq!(split[0].tokens, Tokens { cache_write_5m: 700, cache_write_1h: 90, ..Tokens::default() });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nonsense_is_refused_or_means_nothing(
        mut body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..400),
            Just(serde_json::from_str::<ExportMetricsServiceRequest>(METRICS).unwrap().encode_to_vec()),
            Just(LOGS.as_bytes().to_vec()),
        ],
        hits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
    ) {
        for (at, byte) in hits {
            if !body.is_empty() {
                let at = at.index(body.len());
                body[at] = byte;
            }
        }
        let body = Bytes::from(body);
        for signal in Signal::ALL {
            for encoding in [Encoding::Protobuf, Encoding::Json] {
                if let Ok(report) = decode::report(signal, encoding, &body) {
                    Book::default().take(&report);
                }
            }
        }
        decode::unpack(&body, BODY).ok();
    }
}
