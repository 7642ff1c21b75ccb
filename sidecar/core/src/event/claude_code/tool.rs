//! What tells one tool call from another, and one error.

use super::super::Aim;
use super::super::json::Json;
use super::aim;
use crate::hash::{Hash, mix};

/// What tells a call's input apart, and what the call is there for.
pub(super) fn input_of(tool: &str, input: &[u8]) -> (u64, Aim) {
    let mut aim = aim::of_tool(tool);
    let shell = matches!(tool, "Bash" | "PowerShell");
    let mut json = Json::new(input);
    if json.peek() != b'{' {
        return (canonical(&mut json), aim);
    }
    let mut sum = 0u64;
    json.entries(|key, json| {
        let key = key.bytes();
        if (shell && *key == *b"command" || tool == "Read" && *key == *b"file_path") && json.peek() == b'"' {
            let text = json.string().bytes();
            aim = aim.max(if shell { aim::of_command(&text) } else { aim::of_file(&text) });
            sum = sum.wrapping_add(mix(Hash::of(&key), Hash::of(&text)));
        } else if shell && *key == *b"description" {
            // For people: the same command under another title is the same command.
            json.skip();
        } else {
            sum = sum.wrapping_add(mix(Hash::of(&key), canonical(json)));
        }
    });
    (mix(sum, 1), aim)
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

/// What the error of a command begins with that was run.
pub(super) const EXITED: &[u8] = b"\"Exit code ";
/// What of an error is looked at.
const ERROR_HEAD: usize = 512;

/// Of an error's beginning, as it is written in JSON: words with digits in them are times, lines, ids. The CLI's own errors name what
/// they are about behind their first line.
pub(super) fn error_hash(text: &[u8]) -> u64 {
    const OWN: &[u8] = b"<tool_use_error>";
    let text = &text[..text.len().min(ERROR_HEAD)];
    let end = if text.windows(OWN.len()).any(|own| own == OWN) { text.windows(2).position(|two| two == br"\n") } else { None };
    // An exit code alone says nothing: a search that found nothing has one, too.
    if text.starts_with(EXITED) && text.len() <= b"\"Exit code 127\"".len() {
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
