//! OTLP, in both of its encodings, to what the core understands of it.

use std::io::Read;
use std::time::Duration;

use agent_sidecar_core::native::{Attributes, Event, Point, Report, Span, Value};
use hyper::body::Bytes;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{AggregationTemporality, metric, number_data_point};
use prost::Message;

use super::Signal;

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Protobuf,
    Json,
}

/// Why a body was not understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum Undecodable {
    #[error("it cannot be unpacked")]
    Gzip(#[source] std::io::Error),
    #[error("it is too large")]
    TooLarge,
    #[error("it is no protobuf of that kind")]
    Protobuf(#[source] prost::DecodeError),
    #[error("it is no JSON of that kind")]
    Json(#[source] serde_json::Error),
}

/// The body as it was before it was packed, if that is no more than so many bytes.
pub(super) fn unpack(body: &Bytes, max: usize) -> Result<Bytes, Undecodable> {
    let mut plain = Vec::new();
    let mut unpacked = flate2::read::GzDecoder::new(body.as_ref()).take(max as u64 + 1);
    unpacked.read_to_end(&mut plain).map_err(Undecodable::Gzip)?;
    if plain.len() > max { Err(Undecodable::TooLarge) } else { Ok(plain.into()) }
}

pub(super) fn report(signal: Signal, encoding: Encoding, body: &Bytes) -> Result<Report, Undecodable> {
    Ok(match signal {
        Signal::Metrics => Report { points: points(message(encoding, body)?), events: Vec::new() },
        Signal::Logs => Report { points: Vec::new(), events: events(message(encoding, body)?) },
    })
}

fn message<T: Message + Default + serde::de::DeserializeOwned>(encoding: Encoding, body: &Bytes) -> Result<T, Undecodable> {
    match encoding {
        Encoding::Protobuf => T::decode(body.as_ref()).map_err(Undecodable::Protobuf),
        Encoding::Json => serde_json::from_slice(body).map_err(Undecodable::Json),
    }
}

fn points(request: ExportMetricsServiceRequest) -> Vec<Point> {
    let metrics =
        request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics).flat_map(|scope| scope.metrics);
    let mut points = Vec::new();
    for one in metrics {
        let Some(metric::Data::Sum(sum)) = one.data else { continue };
        let cumulative = sum.aggregation_temporality == AggregationTemporality::Cumulative as i32;
        for point in sum.data_points {
            #[expect(clippy::cast_precision_loss, reason = "no count of tokens comes near to where it would matter")]
            let value = match point.value {
                Some(number_data_point::Value::AsDouble(value)) => value,
                Some(number_data_point::Value::AsInt(value)) => value as f64,
                None => continue,
            };
            let nanos = Duration::from_nanos;
            let span = Span { start: nanos(point.start_time_unix_nano), end: nanos(point.time_unix_nano), cumulative };
            points.extend(Point::of(&one.name, &attributes(point.attributes), span, value));
        }
    }
    points
}

fn events(request: ExportLogsServiceRequest) -> Vec<Event> {
    let records = request.resource_logs.into_iter().flat_map(|resource| resource.scope_logs).flat_map(|scope| scope.log_records);
    records
        .filter_map(|record| {
            let name = match record.body.and_then(|body| body.value) {
                _ if !record.event_name.is_empty() => record.event_name,
                Some(any_value::Value::StringValue(body)) => body,
                _ => return None,
            };
            Event::of(&name, &attributes(record.attributes), Duration::from_nanos(record.time_unix_nano))
        })
        .collect()
}

fn attributes(all: Vec<KeyValue>) -> Attributes {
    all.into_iter().filter_map(|KeyValue { key, value, .. }| Some((key, scalar(value?)?))).collect()
}

fn scalar(value: AnyValue) -> Option<Value> {
    match value.value? {
        any_value::Value::StringValue(text) => Some(Value::Text(text)),
        any_value::Value::BoolValue(value) => Some(Value::Bool(value)),
        any_value::Value::IntValue(value) => Some(Value::Int(value)),
        any_value::Value::DoubleValue(value) => Some(Value::Float(value)),
        _ => None,
    }
}
