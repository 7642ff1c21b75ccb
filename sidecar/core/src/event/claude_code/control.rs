//! Control requests and their answers, in both directions.

use super::super::json::{Json, Str};
use super::super::{Answer, Event, Request};
use super::usage::totals;
use super::{LABEL, Line};

pub(super) fn control_request<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let (mut id, mut subtype): (_, Option<Str<'_>>) = (None, None);
    let (mut tool, mut call, mut server, mut hook, mut method, mut rpc_id) = (None, None, None, None, None, false);
    line.read(json, |key, json| {
        match key {
            b"request_id" => id = json.name(),
            b"request" => {
                json.object(|key, json| {
                    match key {
                        b"subtype" => subtype = json.text(),
                        b"tool_name" => tool = json.name(),
                        b"tool_use_id" => call = json.name(),
                        b"server_name" => server = json.name(),
                        // A hook's input or any tool's: what is there is not promised.
                        b"input" => {
                            json.object_if_any(|key, json| {
                                if key == b"hook_event_name" && json.peek() == b'"' {
                                    hook = json.name();
                                }
                            });
                        }
                        b"message" => {
                            json.object_if_any(|key, json| match key {
                                b"method" => method = json.name(),
                                b"id" => rpc_id = json.peek() != b'n',
                                _ => {}
                            });
                        }
                        _ => {}
                    }
                });
            }
            _ => {}
        }
    });
    let request = match &*subtype.map(Str::bytes).unwrap_or_default() {
        b"initialize" => Request::Initialize,
        b"can_use_tool" => Request::CanUseTool { tool, call },
        b"hook_callback" => Request::HookCallback { event: hook },
        b"mcp_message" => Request::McpMessage { server, method, id: rpc_id },
        b"interrupt" => Request::Interrupt,
        b"end_session" => Request::EndSession,
        b"get_usage" => Request::GetUsage,
        _ => Request::Other(subtype.map(|subtype| subtype.cut(LABEL)).unwrap_or_default()),
    };
    Event::ControlRequest { id: id.unwrap_or_default(), request }
}

pub(super) fn control_response<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let (mut id, mut ok, mut answer) = (None, false, Answer::Other);
    line.read(json, |key, json| {
        if key == b"response" {
            json.object(|key, json| match key {
                b"subtype" => ok = json.is(b"success"),
                b"request_id" => id = json.name(),
                b"response" => answer = read_answer(json),
                _ => {}
            });
        }
    });
    Event::ControlResponse { id: id.unwrap_or_default(), ok, answer }
}

fn read_answer(json: &mut Json<'_>) -> Answer {
    let (mut cost, mut models, mut pid, mut version, mut allow) = (None, None, None, None, None);
    json.object_if_any(|key, json| match key {
        b"session" => {
            json.object_if_any(|key, json| match key {
                b"total_cost_usd" => cost = json.amount(),
                b"model_usage" => models = totals(json),
                _ => {}
            });
        }
        b"pid" => pid = json.count(),
        b"claude_code_version" => version = json.name(),
        b"behavior" => allow = json.text().map(|behavior| behavior.bytes() == &b"allow"[..]),
        _ => {}
    });
    match (models, allow) {
        (Some(models), _) => Answer::Usage { total_cost_usd: cost, models },
        (None, Some(allow)) => Answer::Permission { allow },
        (None, None) if pid.is_some() || version.is_some() => {
            Answer::Initialized { pid: pid.and_then(|pid| u32::try_from(pid).ok()), version }
        }
        (None, None) => Answer::Other,
    }
}
