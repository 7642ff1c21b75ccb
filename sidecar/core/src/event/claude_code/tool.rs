//! What tells one tool call from another, and whether it is there to let time pass.

use super::super::json::Json;
use crate::hash::{Hash, mix};

/// What tells a call's input apart, and whether the call is there to let time pass.
pub(super) fn input_of(tool: &str, input: &[u8]) -> (u64, bool) {
    let mut waits = polls(tool);
    let mut json = Json::new(input);
    if json.peek() != b'{' {
        return (canonical(&mut json), waits);
    }
    let mut sum = 0u64;
    json.entries(|key, json| {
        let key = key.bytes();
        if tool == "Bash" && *key == *b"command" && json.peek() == b'"' {
            let command = json.string().bytes();
            waits |= lets_time_pass(&command);
            sum = sum.wrapping_add(mix(Hash::of(&key), Hash::of(&command)));
        } else if tool == "Bash" && *key == *b"description" {
            // For people: the same command under another title is the same command.
            json.skip();
        } else {
            sum = sum.wrapping_add(mix(Hash::of(&key), canonical(json)));
        }
    });
    (mix(sum, 1), waits)
}

/// The same for the same value, whatever the order of its keys and the blanks in between. The nesting is bounded: it was skipped over
/// once.
fn canonical(json: &mut Json<'_>) -> u64 {
    match json.peek() {
        b'{' => {
            let mut sum = 0u64;
            json.entries(|key, json| sum = sum.wrapping_add(mix(Hash::of(&key.bytes()), canonical(json))));
            mix(sum, 1)
        }
        b'[' => {
            let mut all = 2;
            json.list(|json| all = mix(all, canonical(json)));
            all
        }
        b'"' => mix(Hash::of(&json.string().bytes()), 3),
        _ => {
            let start = json.at();
            json.skip();
            mix(Hash::of(json.since(start)), 4)
        }
    }
}

/// Tools that wait, or look whether something has come: to call them again and again is what they are for.
fn polls(tool: &str) -> bool {
    const NAMES: [&str; 7] = ["BashOutput", "TaskOutput", "AgentOutputTool", "Monitor", "ScheduleWakeup", "TaskGet", "TaskList"];
    let tool = tool.rsplit("__").next().unwrap_or(tool);
    NAMES.contains(&tool)
        || tool.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| {
            ["wait", "sleep", "poll", "watch"]
                .iter()
                .any(|verb| word.get(..verb.len()).is_some_and(|w| w.eq_ignore_ascii_case(verb)))
        })
}

/// Whether a shell command waits: one of its words is a verb for it.
fn lets_time_pass(command: &[u8]) -> bool {
    command
        .split(|byte| byte.is_ascii_whitespace() || b";&|()`{}$".contains(byte))
        .any(|word| matches!(word, b"sleep" | b"usleep" | b"wait" | b"watch" | b"until" | b"--watch" | b"--wait"))
}

/// What of an error is looked at.
const ERROR_HEAD: usize = 512;

/// Of an error's beginning, as it is written in JSON: words with digits in them are times, lines, ids. The CLI's own errors name what
/// they are about behind their first line.
pub(super) fn error_hash(text: &[u8]) -> u64 {
    const OWN: &[u8] = b"<tool_use_error>";
    let text = &text[..text.len().min(ERROR_HEAD)];
    let end = if text.windows(OWN.len()).any(|own| own == OWN) { text.windows(2).position(|two| two == br"\n") } else { None };
    // An exit code alone says nothing: a search that found nothing has one, too.
    if text.starts_with(b"\"Exit code ") && text.len() <= b"\"Exit code 127\"".len() {
        return 0;
    }
    let mut hash = Hash::default();
    for word in text[..end.unwrap_or(text.len())].split_inclusive(|byte| !byte.is_ascii_alphanumeric()) {
        if word.iter().any(u8::is_ascii_digit) {
            hash.put(b"#");
        } else {
            hash.put(word);
        }
    }
    hash.finish()
}
