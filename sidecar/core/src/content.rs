//! What was said, written and read, for spans: nothing of it, unless somebody opened the gate for exactly that.
//!
//! Lines are read a second time here, and only where a gate is open: whatever else reads them has no words for content. Secrets are
//! taken out first, then the rest is cut to a length.

use serde_json::Value;

use crate::line;

/// Behind what is left of a secret.
const SCRUBBED: &str = "[scrubbed]";
/// Characters of one text, unless somebody says otherwise.
const MAX: usize = 4_096;

/// Which of it may be told.
#[derive(Clone, PartialEq, Eq)]
pub struct Gates {
    /// What the app says to the agent, over stdin.
    pub prompts: bool,
    /// What the model writes, its thinking excepted.
    pub answers: bool,
    pub tool_inputs: bool,
    pub tool_outputs: bool,
    /// Characters of one text.
    pub max: usize,
    /// Texts that are known to be secret: of the environment, most of them.
    pub secrets: Vec<String>,
}

impl std::fmt::Debug for Gates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open = [self.prompts, self.answers, self.tool_inputs, self.tool_outputs];
        write!(f, "Gates({open:?}, {} characters, {} secrets)", self.max, self.secrets.len())
    }
}

impl Default for Gates {
    fn default() -> Gates {
        Gates { prompts: false, answers: false, tool_inputs: false, tool_outputs: false, max: MAX, secrets: Vec::new() }
    }
}

/// Something that was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Prompt {
        text: String,
    },
    /// Of the main thread, or of the subagent of a call.
    Answer {
        parent: Option<String>,
        text: String,
    },
    Input {
        call: String,
        json: String,
    },
    Output {
        call: String,
        text: String,
    },
}

impl Gates {
    pub(crate) fn any(&self) -> bool {
        self.prompts || self.answers || self.tool_inputs || self.tool_outputs
    }

    /// What a line of the CLI says.
    pub(crate) fn of_cli(&self, line: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        match serde_json::from_slice(line) {
            Ok(Value::Array(all)) => all.iter().for_each(|message| self.message(message, &mut pieces)),
            Ok(message) => self.message(&message, &mut pieces),
            Err(_) => {}
        }
        pieces
    }

    /// What a line of the app says.
    pub(crate) fn of_app(&self, line: &[u8]) -> Option<Piece> {
        let message: Value = if self.prompts { serde_json::from_slice(line).ok()? } else { return None };
        let text = (message["type"] == "user").then(|| text(&message["message"]["content"])).filter(|text| !text.is_empty())?;
        Some(Piece::Prompt { text: self.told(&text) })
    }

    fn message(&self, message: &Value, pieces: &mut Vec<Piece>) {
        let blocks = message["message"]["content"].as_array().into_iter().flatten();
        let id = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for block in blocks {
            match (message["type"].as_str(), block["type"].as_str()) {
                (Some("assistant"), Some("text")) if self.answers => {
                    let parent = message["parent_tool_use_id"].as_str().map(str::to_owned);
                    pieces.push(Piece::Answer { parent, text: self.told(&text(block)) });
                }
                (Some("assistant"), Some("tool_use")) if self.tool_inputs => {
                    let json = cut(scrubbed_json(&block["input"], &self.secrets).to_string(), self.max);
                    pieces.push(Piece::Input { call: id(&block["id"]), json });
                }
                (Some("user"), Some("tool_result")) if self.tool_outputs => {
                    let text = self.told(&text(&block["content"]));
                    pieces.push(Piece::Output { call: id(&block["tool_use_id"]), text });
                }
                _ => {}
            }
        }
    }

    fn told(&self, text: &str) -> String {
        cut(scrubbed(text, &self.secrets), self.max)
    }
}

/// Of a content that may be a text, a block, or a list of blocks; what is no text (an image) is left out.
fn text(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => blocks.iter().map(text).filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n"),
        block => block["text"].as_str().unwrap_or_default().to_owned(),
    }
}

pub(crate) fn cut(text: String, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((at, _)) => text[..at].to_owned(),
        None => text,
    }
}

fn scrubbed_json(value: &Value, secrets: &[String]) -> Value {
    match value {
        Value::String(text) => Value::String(scrubbed(text, secrets)),
        Value::Array(values) => {
            let flags = std::iter::once(None).chain(values.iter().map(Value::as_str));
            let scrub = |(before, value): (Option<&str>, &Value)| match value {
                // A command line, word by word.
                Value::String(_) if before.is_some_and(|flag| flag.starts_with("--") && names_a_secret(flag)) => {
                    Value::String(SCRUBBED.to_owned())
                }
                value => scrubbed_json(value, secrets),
            };
            flags.zip(values).map(scrub).collect()
        }
        Value::Object(fields) => {
            let scrub = |(key, value): (&String, &Value)| match value {
                Value::String(_) | Value::Array(_) | Value::Object(_) if names_a_secret(key) => {
                    (key.clone(), Value::String(SCRUBBED.to_owned()))
                }
                value => (scrubbed(key, secrets), scrubbed_json(value, secrets)),
            };
            Value::Object(fields.iter().map(scrub).collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

/// The text without what is, or looks like, a key, a token or a password.
fn scrubbed(text: &str, secrets: &[String]) -> String {
    let mut text = text.to_owned();
    for secret in secrets {
        if text.contains(secret.as_str()) {
            text = text.replace(secret.as_str(), SCRUBBED);
        }
    }
    // A long text was shortened on its way here, perhaps within a secret.
    if let Some((kept, dropped)) = line::shortened(&text) {
        let whole = kept.trim_end_matches(|c: char| !c.is_whitespace());
        text = format!("{whole}…+{dropped}");
    }
    words(&passwords(&keys(&text)))
}

/// Private keys, armour and all.
fn keys(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(begin) = rest.find("-----BEGIN ") {
        let (head, block) = rest.split_at(begin);
        out.push_str(head);
        let end = block
            .find("-----END ")
            .map_or(block.len(), |at| block[at + 9..].find("-----").map_or(block.len(), |dashes| at + 9 + dashes + 5));
        let title = block.lines().next().unwrap_or_default();
        out.push_str(if title.contains("PRIVATE KEY") { SCRUBBED } else { &block[..end] });
        rest = &block[end..];
    }
    out + rest
}

/// Of URLs: `scheme://user:password@host`.
fn passwords(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("://") {
        let (head, tail) = rest.split_at(at + 3);
        out.push_str(head);
        let authority = tail.find(|c: char| c.is_whitespace() || "/?#\"'<>".contains(c)).unwrap_or(tail.len());
        rest = tail;
        if let Some(user) = tail[..authority].rfind('@') {
            out.push_str(SCRUBBED);
            rest = &tail[user..];
        }
    }
    out + rest
}

/// What stands alone and looks like a token, and what is said of something that is called a secret.
fn words(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "_-.+~$".contains(c);
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut before, mut between) = (text, "", "");
    while !rest.is_empty() {
        let gap = rest.find(is_part).unwrap_or(rest.len());
        let word_end = rest[gap..].find(|c| !is_part(c)).map_or(rest.len(), |at| gap + at);
        between = if gap > 0 || before.is_empty() { &rest[..gap] } else { between };
        out.push_str(&rest[..gap]);
        let word = &rest[gap..word_end];
        let mut end = word_end;
        if word.is_empty() {
            break;
        }
        if is_said_of_a_secret(before, between) {
            // Of base64, too: all of it.
            let quoted = between.ends_with(['"', '\'']);
            let stop = |c: char| if quoted { "\"'".contains(c) } else { c.is_whitespace() || "\"',;&)<>".contains(c) };
            end = rest[gap..].find(stop).map_or(rest.len(), |at| gap + at);
            out.push_str(SCRUBBED);
        } else {
            out.push_str(if is_a_token(word) { SCRUBBED } else { word });
        }
        before = word;
        rest = &rest[end..];
    }
    out
}

fn is_said_of_a_secret(before: &str, between: &str) -> bool {
    let assigned = between.contains(['=', ':']) && between.chars().all(|c| " \t\"'`=:>\\".contains(c));
    let blank = !between.is_empty() && between.chars().all(|c| " \t".contains(c));
    let scheme = ["bearer", "basic"].iter().any(|scheme| before.eq_ignore_ascii_case(scheme));
    (assigned && names_a_secret(before)) || (blank && (scheme || before.starts_with("--") && names_a_secret(before)))
}

/// Whether something of this name is nobody's business.
fn names_a_secret(name: &str) -> bool {
    const SECRET: [&str; 13] = [
        "password",
        "passwd",
        "passphrase",
        "secret",
        "api_key",
        "apikey",
        "access_key",
        "private_key",
        "credential",
        "authorization",
        "cookie",
        "auth_token",
        "token",
    ];
    let name = name.to_ascii_lowercase().replace('-', "_");
    // Numbers of tokens are no secret: `max_tokens`, `input_tokens`.
    let named = SECRET.iter().any(|secret| name.contains(secret)) && !name.ends_with("tokens");
    // `DB_PASS`; but `PASS` is what tests say, and `PWD` where we are.
    named || ["_pass", "_pwd", ".pass", ".pwd"].iter().any(|end| name.ends_with(end))
}

/// Whether a word is a token by its looks.
fn is_a_token(word: &str) -> bool {
    const BEGINNINGS: [&str; 30] = [
        "sk-",
        "sk_live_",
        "sk_test_",
        "rk_live_",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "gldt-",
        "xoxb-",
        "xoxp-",
        "xoxa-",
        "xoxr-",
        "xoxs-",
        "xapp-",
        "AIza",
        "ya29.",
        "hf_",
        "npm_",
        "pypi-",
        "dop_v1_",
        "SG.",
        "whsec_",
        "shpat_",
        "e2b_",
        "dtn_",
        "tskey-",
    ];
    // The end of a sentence is none of it.
    let word = word.trim_end_matches('.');
    let aws = |start: &str| word.starts_with(start) && word.len() == 20 && word.bytes().all(|b| b.is_ascii_alphanumeric());
    let jwt = word.starts_with("eyJ") && word.len() > 30 && word.matches('.').count() == 2;
    jwt || aws("AKIA") || aws("ASIA") || (word.len() >= 20 && BEGINNINGS.iter().any(|start| word.starts_with(start)))
}

/// A list of one message, as the conventions have it.
pub(crate) fn message(role: &str, text: &str, finish_reason: Option<&str>) -> String {
    let mut message = serde_json::json!({"role": role, "parts": [{"type": "text", "content": text}]});
    if let Some(reason) = finish_reason {
        message["finish_reason"] = reason.into();
    }
    serde_json::json!([message]).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_taken_out_and_nothing_else() {
        let known = [String::from("correct horse battery")];
        for (said, told) in [
            ("a correct horse battery staple", "a [scrubbed] staple"),
            ("key sk-ant-api03-AbCdEf0123456789, and on", "key [scrubbed], and on"),
            ("export API_KEY=abc123 PATH=/bin", "export API_KEY=[scrubbed] PATH=/bin"),
            (r#"{"password": "hunter2 and more", "user": "me"}"#, r#"{"password": "[scrubbed]", "user": "me"}"#),
            ("aws_secret_access_key = wJalr/K7MDENG+bPx\nregion = us", "aws_secret_access_key = [scrubbed]\nregion = us"),
            ("id AKIAIOSFODNN7EXAMPLE. Or key=%sk-ant-api03-AbCdEf0123456789%", "id [scrubbed] Or key=%[scrubbed]%"),
            ("id AKIAIOSFODNN7EXAMPLE x", "id [scrubbed] x"),
            ("curl -H 'Authorization: Bearer abc.def/ghi' url", "curl -H 'Authorization: [scrubbed] [scrubbed]' url"),
            ("Basic dXNlcjpwYXNz x", "Basic [scrubbed] x"),
            ("tool --token abc --verbose", "tool --token [scrubbed] --verbose"),
            ("git clone https://me:pw@host/x and https://host/y", "git clone https://[scrubbed]@host/x and https://host/y"),
            ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "jwt [scrubbed]"),
            ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nb", "a\n[scrubbed]\nb"),
            ("-----BEGIN PRIVATE KEY-----\nMIIE", "[scrubbed]"),
            (
                "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----",
                "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----",
            ),
            ("head sk-ant-…+900 0123456789abcdef", "head …+900"),
            ("whole …+900", "whole …+900"),
            ("DB_PASS=hunter2 PWD=/here PASS: 12 tests", "DB_PASS=[scrubbed] PWD=/here PASS: 12 tests"),
            (
                "max_tokens: 4096, the secret of my success, ask for a sk-ant key",
                "max_tokens: 4096, the secret of my success, ask for a sk-ant key",
            ),
            ("äöü =: 'ß' {\n\t\"a\": [1, 2]}\r\n", "äöü =: 'ß' {\n\t\"a\": [1, 2]}\r\n"),
        ] {
            assert_eq!(scrubbed(said, &known), told, "{said}");
        }
    }

    #[test]
    fn secrets_are_found_in_every_shape_of_json() {
        let said = serde_json::json!({"args": ["tool", "--password", "hunter2", "--verbose", "on"], "credentials": {"a": ["b"]},
            "max_tokens": 5, "token": 7});
        let told = serde_json::json!({"args": ["tool", "--password", SCRUBBED, "--verbose", "on"], "credentials": SCRUBBED,
            "max_tokens": 5, "token": 7});
        assert_eq!(scrubbed_json(&said, &[]), told);
    }

    #[test]
    fn half_a_secret_is_not_left_where_a_line_was_shortened() {
        let secret = "0123456789abcdefghijABCDEFGHIJklmnopqrst";
        let padding = "word ".repeat(20_000);
        // Wherever the cut falls.
        for before in 400..520 {
            let text = format!("{}key {secret} {padding}", &padding[..before]);
            let said = serde_json::json!({"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}});
            let mut told = Vec::new();
            line::Splitter::default().push(format!("{said}\n").as_bytes(), &mut |line| {
                let line::Line::Whole(line) = line else { panic!("{line:?}") };
                assert!(line.len() < 2_000, "it was shortened");
                told.extend(Gates { answers: true, secrets: vec![secret.to_owned()], ..Gates::default() }.of_cli(line));
            });
            let [Piece::Answer { text, .. }] = &told[..] else { panic!("{told:?}") };
            assert!(!text.contains(&secret[..4]), "{before}: {text}");
            assert!(
                text.contains("…+") && text.ends_with(|c: char| c.is_ascii_digit()),
                "the rest is counted, and not told: {text}"
            );
        }
    }

    #[test]
    fn each_gate_opens_one_thing() {
        let assistant = br#"{"type":"assistant","parent_tool_use_id":null,"message":{"content":[{"type":"thinking","thinking":"hm"},{"type":"text","text":"said"},{"type":"tool_use","id":"t1","input":{"command":"ls","api_key":"x"}}]}}"#;
        let result = br#"{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"read"},{"type":"image"}]}]}}"#;
        let prompt = br#"{"type":"user","message":{"content":"asked"}}"#;
        let told = |gates: Gates| {
            let pieces = gates.of_cli(assistant).into_iter().chain(gates.of_cli(result)).chain(gates.of_app(prompt));
            let text = |piece| match piece {
                Piece::Prompt { text } | Piece::Answer { text, .. } | Piece::Output { text, .. } => text,
                Piece::Input { json, .. } => json,
            };
            pieces.map(text).collect::<Vec<_>>().join("|")
        };
        let shut = Gates::default();
        assert_eq!(told(shut.clone()), "");
        assert_eq!(told(Gates { prompts: true, ..shut.clone() }), "asked");
        assert_eq!(told(Gates { answers: true, ..shut.clone() }), "said");
        assert_eq!(told(Gates { tool_inputs: true, ..shut.clone() }), r#"{"api_key":"[scrubbed]","command":"ls"}"#);
        assert_eq!(told(Gates { tool_outputs: true, ..shut.clone() }), "read");
        assert_eq!(told(Gates { prompts: true, max: 2, ..shut }), "as");
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_said_can_be_scrubbed(text in "(?s).{0,200}", word in "[a-zA-Z0-9_=:/@ \"'-]{0,80}") {
            scrubbed(&text, &[]);
            let once = scrubbed(&word, &[]);
            proptest::prop_assert!(!once.contains("sk-ant-aaaaaaaaaaaaaaaaaaaa"));
            let hidden = format!("{word} sk-ant-aaaaaaaaaaaaaaaaaaaa {word}");
            proptest::prop_assert!(!scrubbed(&hidden, &[]).contains("sk-ant-aaaaaaaaaaaaaaaaaaaa"));
        }
    }
}
