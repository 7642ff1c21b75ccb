//! Tokens and money: of an answer, and the running totals by model.

use super::super::json::{ELEMENTS, Json, Str};
use super::super::{ModelTotal, Usage};
use crate::tokens::Tokens;

pub(super) fn usage(json: &mut Json<'_>) -> Option<Usage> {
    let (mut input, mut output, mut read, mut created) = (None, None, None, None);
    let (mut minutes, mut hour) = (None, None);
    let mut usage = Usage::default();
    let object = json.object(|key, json| match key {
        b"input_tokens" => input = json.count(),
        b"output_tokens" => output = json.count(),
        b"cache_read_input_tokens" => read = json.count(),
        b"cache_creation_input_tokens" => created = json.count(),
        b"cache_creation" => {
            json.object(|key, json| match key {
                b"ephemeral_5m_input_tokens" => minutes = json.count(),
                b"ephemeral_1h_input_tokens" => hour = json.count(),
                _ => {}
            });
        }
        b"server_tool_use" => {
            json.object(|key, json| {
                if key == b"web_search_requests" {
                    usage.web_searches = json.count().unwrap_or_default();
                }
            });
        }
        b"inference_geo" => usage.inference_geo = json.name().filter(|geo| !geo.is_empty()),
        b"speed" => usage.speed = json.name(),
        _ => {}
    });
    usage.has_input = input.is_some();
    usage.tokens = tokens(input, output, read, created, minutes, hour);
    object.then_some(usage)
}

fn tokens(
    input: Option<u64>,
    output: Option<u64>,
    read: Option<u64>,
    created: Option<u64>,
    minutes: Option<u64>,
    hour: Option<u64>,
) -> Tokens {
    let (created, hour) = (created.unwrap_or_default(), hour.unwrap_or_default());
    Tokens {
        input: input.unwrap_or_default(),
        output: output.unwrap_or_default(),
        cache_read: read.unwrap_or_default(),
        // What is not said to be kept for an hour costs the shorter price.
        cache_write_5m: minutes.unwrap_or_default().max(created.saturating_sub(hour)),
        cache_write_1h: hour,
    }
}

/// A table of models and their running totals; `None` where there is no table.
pub(super) fn totals(json: &mut Json<'_>) -> Option<Vec<ModelTotal>> {
    let mut totals = Vec::new();
    let table = if json.peek() == b'{' {
        json.entries(|model, json| {
            let total = model_total(model, json);
            if let Some(total) = total.filter(|_| totals.len() < ELEMENTS) {
                totals.push(total);
            }
        });
        true
    } else {
        json.object(|_, _| {})
    };
    table.then_some(totals)
}

fn model_total(model: Str<'_>, json: &mut Json<'_>) -> Option<ModelTotal> {
    let (mut input, mut output, mut read, mut created, mut minutes, mut hour) = (None, None, None, None, None, None);
    let mut total = ModelTotal::default();
    let object = json.object(|key, json| match key {
        b"inputTokens" => input = json.count(),
        b"outputTokens" => output = json.count(),
        b"cacheReadInputTokens" => read = json.count(),
        b"cacheCreationInputTokens" => created = json.count(),
        b"cacheCreationEphemeral5mInputTokens" => minutes = json.count(),
        b"cacheCreationEphemeral1hInputTokens" => hour = json.count(),
        b"webSearchRequests" => total.web_searches = json.count().unwrap_or_default(),
        b"costUSD" => total.cost_usd = json.amount().unwrap_or_default(),
        b"contextWindow" => total.context_window = json.count(),
        b"canonicalModel" => total.canonical = json.name(),
        b"costBasis" => total.cost_basis = json.name(),
        _ => {}
    });
    total.model = model.name();
    total.told_apart = minutes.is_some() || hour.is_some();
    total.tokens = tokens(input, output, read, created, minutes, hour);
    object.then_some(total)
}
