//! What the model and the app say to each other: answers, in one piece or streamed, and what tools gave back.

use super::super::json::{ELEMENTS, Json, Str};
use super::super::{Assistant, Block, Stream, ToolResult, Usage, User};
use super::Line;
use super::tool::{EXITED, error_hash, input_of};
use super::usage::usage;
use crate::hash::Hash;

/// What an answer of the API says about itself.
#[derive(Default)]
pub(super) struct Body {
    pub(super) id: Option<String>,
    pub(super) model: Option<String>,
    pub(super) usage: Option<Usage>,
    pub(super) stop_reason: Option<String>,
    blocks: Vec<Block>,
}

impl Body {
    pub(super) fn field(&mut self, key: &[u8], json: &mut Json<'_>) {
        match key {
            b"id" => self.id = json.name(),
            b"model" => self.model = json.name(),
            b"usage" => self.usage = usage(json),
            b"stop_reason" => self.stop_reason = json.name(),
            _ => {}
        }
    }
}

pub(super) fn assistant<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Assistant {
    let (mut body, mut error, mut aborted, mut subagent_type) = (Body::default(), None, None, None);
    line.read(json, |key, json| match key {
        b"message" => {
            json.object(|key, json| {
                if key == b"content" {
                    body.blocks = blocks(json);
                }
                body.field(key, json)
            });
        }
        b"error" => error = json.name(),
        b"aborted" => aborted = json.flag(),
        b"subagent_type" => subagent_type = json.name(),
        _ => {}
    });
    Assistant {
        id: body.id,
        model: body.model,
        usage: body.usage,
        stop_reason: body.stop_reason,
        blocks: body.blocks,
        error,
        aborted: aborted.unwrap_or_default(),
        subagent_type,
    }
}

fn blocks(json: &mut Json<'_>) -> Vec<Block> {
    if json.peek() == b'"' {
        return vec![Block::Text { bytes: json.string().len() }];
    }
    let mut blocks = Vec::new();
    json.list(|json| {
        let read = block(json);
        if let Some(block) = read.filter(|_| blocks.len() < ELEMENTS) {
            blocks.push(block);
        }
    });
    blocks
}

fn block(json: &mut Json<'_>) -> Option<Block> {
    let (mut kind, mut id, mut name, mut text, mut thinking, mut input): (Option<Str<'_>>, _, _, _, _, _) =
        (None, None, None, 0, 0, &b""[..]);
    let object = json.object(|key, json| match key {
        b"type" => kind = json.text(),
        b"id" => id = json.name(),
        b"name" => name = json.name(),
        b"text" => text = json.text().map_or(0, Str::len),
        b"thinking" => thinking = json.text().map_or(0, Str::len),
        b"input" => {
            let start = json.at();
            json.skip();
            input = json.since(start);
        }
        _ => {}
    });
    let kind = kind.map(Str::bytes).unwrap_or_default();
    object.then(|| match (&*kind, id, name) {
        (b"text", ..) => Block::Text { bytes: text },
        (b"thinking", ..) => Block::Thinking { bytes: thinking },
        (b"tool_use", Some(call), Some(tool)) => {
            let (input_hash, aim) = input_of(&tool, input);
            Block::ToolUse { call, tool, input_bytes: input.len(), input_hash, aim }
        }
        _ => Block::Other,
    })
}

pub(super) fn user<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> User {
    let (mut user, mut metas, mut interrupted) = (User::default(), Vec::new(), None);
    line.read(json, |key, json| {
        match key {
            b"message" => {
                json.object(|key, json| {
                    if key == b"content" {
                        said(&mut user, json);
                    }
                });
            }
            b"uuid" => user.uuid = json.name(),
            b"isSynthetic" => user.synthetic = json.flag().unwrap_or_default(),
            b"isReplay" => user.replay = json.flag().unwrap_or_default(),
            b"shouldQuery" => user.silent = json.flag() == Some(false),
            b"tool_result_meta" => metas = rejections(json),
            // Of its own shape for every tool; often only a text.
            b"tool_use_result" => {
                interrupted = None;
                json.object_if_any(|key, json| {
                    if key == b"interrupted" {
                        interrupted = json.flag();
                    }
                });
            }
            _ => {}
        }
    });
    for result in &mut user.results {
        result.denied = metas.contains(&result.call);
        result.interrupted = interrupted == Some(true);
    }
    user
}

/// The content of a user's message: a text, or blocks.
fn said(user: &mut User, json: &mut Json<'_>) {
    (user.prompt, user.results) = (false, Vec::new());
    if json.peek() == b'"' {
        json.string();
        user.prompt = true;
        return;
    }
    json.list(|json| {
        let (mut result, mut call, mut error, mut content) = (false, None, None, &b""[..]);
        let object = json.object(|key, json| match key {
            b"type" => result = json.is(b"tool_result"),
            b"tool_use_id" => call = json.name(),
            b"is_error" => error = json.flag(),
            b"content" => {
                let start = json.at();
                json.skip();
                content = json.since(start);
            }
            _ => {}
        });
        match call.filter(|_| result) {
            Some(call) if user.results.len() < ELEMENTS => {
                let error = error == Some(true);
                user.results.push(ToolResult {
                    call,
                    error,
                    denied: false,
                    interrupted: false,
                    ran: error && content.starts_with(EXITED),
                    hash: Hash::of(content),
                    bytes: content.len(),
                    error_hash: if error { error_hash(content) } else { 0 },
                });
            }
            Some(_) => {}
            None => user.prompt |= object,
        }
    });
}

/// The calls that a rule, a callback, a person or an interrupt while one was asked turned away: they never ran.
fn rejections(json: &mut Json<'_>) -> Vec<String> {
    let mut calls = Vec::new();
    json.list(|json| {
        let (mut id, mut rejected) = (None, false);
        json.object(|key, json| match key {
            b"id" => id = json.name(),
            b"non_execution_kind" => rejected |= json.text().is_some_and(|kind| kind.raw.ends_with(b"rejected")),
            b"permission_decision" => {
                json.object(|key, json| {
                    if key == b"decision" {
                        rejected |= json.text().is_some_and(|word| matches!(word.raw, b"reject" | b"deny"));
                    }
                });
            }
            _ => {}
        });
        calls.extend(id.filter(|_| rejected && calls.len() < ELEMENTS));
    });
    calls
}

pub(super) fn stream<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Stream {
    let (mut kind, mut body, mut ttft_ms): (Option<Str<'_>>, _, _) = (None, Body::default(), None);
    let (mut tool, mut bytes, mut last_usage, mut stop_reason) = (None, 0, None, None);
    line.read(json, |key, json| match key {
        b"event" => {
            json.object(|key, json| match key {
                b"type" => kind = json.text(),
                b"message" => {
                    json.object(|key, json| body.field(key, json));
                }
                b"content_block" => tool = tool_use(json),
                b"delta" => {
                    bytes = 0;
                    json.object(|key, json| match key {
                        b"text" | b"thinking" | b"partial_json" => bytes += json.text().map_or(0, Str::len),
                        b"stop_reason" => stop_reason = json.name(),
                        _ => {}
                    });
                }
                b"usage" => last_usage = usage(json),
                _ => {}
            });
        }
        b"ttft_ms" => ttft_ms = json.count(),
        _ => {}
    });
    match &*kind.map(Str::bytes).unwrap_or_default() {
        b"message_start" => Stream::MessageStart { id: body.id, model: body.model, usage: body.usage, ttft_ms },
        b"content_block_start" => Stream::BlockStart { tool },
        b"content_block_delta" => Stream::Delta { bytes },
        b"content_block_stop" => Stream::BlockStop,
        b"message_delta" => Stream::MessageDelta { usage: last_usage, stop_reason },
        b"message_stop" => Stream::MessageStop,
        _ => Stream::Other,
    }
}

/// Id and name, where the block is a call of a tool that runs here.
fn tool_use(json: &mut Json<'_>) -> Option<(String, String)> {
    let (mut ours, mut id, mut name) = (false, None, None);
    json.object(|key, json| match key {
        b"type" => ours = json.is(b"tool_use"),
        b"id" => id = json.name(),
        b"name" => name = json.name(),
        _ => {}
    });
    id.zip(name).filter(|_| ours)
}
