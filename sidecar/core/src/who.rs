//! For whom an agent works: tenant, team, cost centre and user, and the places that they are read from.
//!
//! ```text
//!   labels.tenant_from = "message:metadata.tenant, env:CUSTOMER_ID, pod:app.kubernetes.io/tenant"
//!                         └ SOURCE:KEY, the first that says something counts
//! ```
//!
//! Pure: variables, files and the command line are handed in. What the app says in its first message is learnt from the bytes that pass.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hash::Hash;
use crate::telemetry::Attributes;
use crate::update::labels;

labels! {
    /// What is known of whom it works for.
    Name { Tenant = "tenant", Team = "team", CostCenter = "cost_center", User = "user" }
}
labels! {
    /// What two tenants must not share.
    Shared { ConfigDir = "config_dir", Cwd = "cwd", Memory = "memory", Session = "session" }
}
labels! {
    /// What was done about it.
    Guarded { Flagged = "flagged", Refused = "refused", Ended = "ended" }
}

/// No value is longer.
pub const MAX: usize = 64;
/// The app's lines that are looked at for a field of its own: the first user message comes before, or never.
const LINES: u32 = 64;
/// Of one of these lines.
const LINE: usize = 1024 * 1024;

/// For whom an agent works, as far as anybody said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_center: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Who {
    pub fn get(&self, name: Name) -> Option<&str> {
        match name {
            Name::Tenant => &self.tenant,
            Name::Team => &self.team,
            Name::CostCenter => &self.cost_center,
            Name::User => &self.user,
        }
        .as_deref()
    }

    pub fn set(&mut self, name: Name, value: String) {
        *match name {
            Name::Tenant => &mut self.tenant,
            Name::Team => &mut self.team,
            Name::CostCenter => &mut self.cost_center,
            Name::User => &mut self.user,
        } = Some(value);
    }

    /// Of each series. A user is none: there are too many of them, and it is nobody's business who they are.
    pub fn labels(&self) -> Vec<(&'static str, String)> {
        let known = Name::ALL.iter().filter(|name| **name != Name::User);
        known.filter_map(|name| Some((name.as_str(), self.get(*name)?.to_owned()))).collect()
    }

    /// Of a span or an event.
    pub(crate) fn describe(&self, attributes: &mut Attributes) {
        for name in Name::ALL {
            if let Some(value) = self.get(*name) {
                crate::span::put(attributes, name.attribute(), value);
            }
        }
    }
}

impl Name {
    /// What spans and events call it.
    pub fn attribute(self) -> &'static str {
        match self {
            Name::Tenant => "claude_agent.tenant",
            Name::Team => "claude_agent.team",
            Name::CostCenter => "claude_agent.cost_center",
            Name::User => "user.id",
        }
    }
}

/// A text as the value of a label: of at most [`MAX`] bytes, of letters, digits, spaces and marks. What does not fit is replaced, with a
/// hash behind it, so that two of them do not become one. Nothing of nothing.
pub fn value(text: &str) -> Option<String> {
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let fits = |c: char| c.is_alphanumeric() || c == ' ' || c.is_ascii_punctuation();
    if text.len() <= MAX && text.chars().all(fits) {
        return Some(text.to_owned());
    }
    let plain: String = text.chars().take(MAX).map(|c| if fits(c) { c } else { '_' }).collect();
    let hash = Hash::of(text.as_bytes());
    Some(format!("{}~{hash:016x}", crate::metric::bounded(&plain, MAX - 17)))
}

/// Where a value may be read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A variable of the environment that the CLI is started with.
    Env(String),
    /// A label of the pod, from the file that the downward API makes.
    Pod(String),
    /// An annotation of it.
    Annotation(String),
    /// The value of a flag of the CLI's.
    Arg(String),
    /// An attribute of `OTEL_RESOURCE_ATTRIBUTES`.
    Resource(String),
    /// A field of one of the app's first lines, by the names that lead to it.
    Message(Vec<String>),
    /// What stands for `{}` in the working directory.
    Cwd(Pattern),
}

/// Names of sources, each with an example.
const SOURCES: &[(&str, &str)] = &[
    ("env", "env:CUSTOMER_ID"),
    ("pod", "pod:app.kubernetes.io/tenant"),
    ("annotation", "annotation:example.com/team"),
    ("arg", "arg:--name"),
    ("resource", "resource:tenant.id"),
    ("message", "message:metadata.tenant"),
    ("cwd", "cwd:/workspaces/{}/"),
];

/// Sources in the order in which they are asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(pub Vec<Source>);

/// What is wrong with a list of sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong(String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

impl std::str::FromStr for Sources {
    type Err = Wrong;

    fn from_str(text: &str) -> Result<Sources, Wrong> {
        let sources: Vec<Source> = text.split(',').map(|one| Source::read(one.trim())).collect::<Result<_, _>>()?;
        Ok(Sources(sources))
    }
}

impl Sources {
    /// What the first of them says that says anything.
    pub fn ask(&self, at: &Surroundings<'_>) -> Option<String> {
        self.0.iter().find_map(|source| source.ask(at))
    }

    /// Whether one of them speaks only when the agent runs.
    pub fn is_late(&self) -> bool {
        self.0.iter().any(|source| matches!(source, Source::Message(_)))
    }
}

impl Source {
    fn read(text: &str) -> Result<Source, Wrong> {
        let wrong = |what: String| Err(Wrong(what));
        let Some((name, key)) = text.split_once(':') else {
            return wrong(format!("`{text}` names no source: {}", known()));
        };
        let key = key.trim();
        let example = |name: &str| SOURCES.iter().find(|(known, _)| *known == name).map_or("", |(_, example)| example);
        let bad = |what: &str| wrong(format!("`{text}` {what}, like {}", example(name)));
        let dotted = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        Ok(match name {
            "env" if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') => {
                return bad("names no variable");
            }
            "env" => Source::Env(key.to_owned()),
            "pod" | "annotation" if key.is_empty() || !key.chars().all(dotted) => return bad("names no label"),
            "pod" => Source::Pod(key.to_owned()),
            "annotation" => Source::Annotation(key.to_owned()),
            "arg" if !key.starts_with('-') || key.len() < 2 || key.contains(['=', ' ']) => return bad("names no flag"),
            "arg" => Source::Arg(key.to_owned()),
            "resource" if key.is_empty() => return bad("names no attribute"),
            "resource" => Source::Resource(key.to_owned()),
            "message" if key.split('.').any(str::is_empty) => return bad("names no field"),
            "message" => Source::Message(key.split('.').map(str::to_owned).collect()),
            "cwd" => match Pattern::read(key) {
                Some(pattern) => Source::Cwd(pattern),
                None => return bad("is no path with one {} in it"),
            },
            _ => return wrong(format!("there is no source `{name}`: {}", known())),
        })
    }
}

fn known() -> String {
    let names: Vec<String> = SOURCES.iter().map(|(name, _)| format!("{name}:")).collect();
    format!("there are {}", names.join(", "))
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Env(key) => write!(f, "env:{key}"),
            Source::Pod(key) => write!(f, "pod:{key}"),
            Source::Annotation(key) => write!(f, "annotation:{key}"),
            Source::Arg(key) => write!(f, "arg:{key}"),
            Source::Resource(key) => write!(f, "resource:{key}"),
            Source::Message(path) => write!(f, "message:{}", path.join(".")),
            Source::Cwd(Pattern(parts)) => write!(f, "cwd:/{}", parts.join("/")),
        }
    }
}

/// The beginning of a path: `*` is any name, `{}` is the one that is wanted, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<String>);

impl Pattern {
    fn read(text: &str) -> Option<Pattern> {
        let parts: Vec<String> = parts(text.strip_prefix('/')?).map(str::to_owned).collect();
        (text.matches("{}").count() == 1 && !parts.iter().any(|part| part == "..")).then_some(Pattern(parts))
    }

    fn find<'a>(&self, path: &'a str) -> Option<&'a str> {
        let mut found = None;
        let mut names = parts(path);
        for part in &self.0 {
            let name = names.next()?;
            match part.split_once("{}") {
                Some((before, after)) => found = Some(name.strip_prefix(before)?.strip_suffix(after)?),
                None if part == "*" || part == name => {}
                None => return None,
            }
        }
        found
    }
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

/// What the sources are read from.
pub struct Surroundings<'a> {
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// The files of the downward API.
    pub pod_labels: &'a dyn Fn() -> Option<String>,
    pub pod_annotations: &'a dyn Fn() -> Option<String>,
    pub resource: &'a dyn Fn(&str) -> Option<String>,
    pub args: &'a [&'a str],
    pub cwd: &'a dyn Fn() -> String,
}

impl Source {
    /// What it says; of a message nothing yet.
    fn ask(&self, at: &Surroundings<'_>) -> Option<String> {
        let text = match self {
            Source::Env(name) => (at.env)(name),
            Source::Pod(key) => pod_field(&(at.pod_labels)()?, key),
            Source::Annotation(key) => pod_field(&(at.pod_annotations)()?, key),
            Source::Arg(flag) => flag_value(at.args, flag).map(str::to_owned),
            Source::Resource(key) => (at.resource)(key),
            Source::Message(_) => None,
            Source::Cwd(pattern) => pattern.find(&(at.cwd)()).map(str::to_owned),
        };
        value(&text?)
    }
}

/// The last one wins, as the CLI has it. What is behind `--` is no flag.
fn flag_value<'a>(args: &[&'a str], flag: &str) -> Option<&'a str> {
    let mut found = None;
    let mut args = args.iter().take_while(|word| **word != "--");
    while let Some(word) = args.next() {
        if *word == flag {
            found = args.next().copied().or(found);
        } else if let Some(value) = word.strip_prefix(flag).and_then(|rest| rest.strip_prefix('=')) {
            found = Some(value);
        }
    }
    found
}

/// A field of a file that the downward API makes: lines of `key="value"`, with the escapes of a Go string.
pub fn pod_field(text: &str, key: &str) -> Option<String> {
    let quoted = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix("=\"")?.strip_suffix('"'))?;
    let mut value = String::new();
    let mut rest = quoted.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            value.push(c);
            continue;
        }
        let digits = match rest.next()? {
            'n' => {
                value.push('\n');
                continue;
            }
            't' => {
                value.push('\t');
                continue;
            }
            'r' => {
                value.push('\r');
                continue;
            }
            'x' => 2,
            'u' => 4,
            'U' => 8,
            // A bell and its like are of no use here, and a backslash or a quote is itself.
            other => {
                value.push(if "abfv".contains(other) { ' ' } else { other });
                continue;
            }
        };
        let code: String = rest.by_ref().take(digits).collect();
        value.push(u32::from_str_radix(&code, 16).ok().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    Some(value)
}

/// Makes one user out of another, whom nobody knows.
#[derive(Clone, Debug)]
pub struct Mask {
    pub key: Vec<u8>,
    pub hash: fn(&[u8], &str) -> String,
}

/// What is still to be learnt from what the app says.
#[derive(Clone, Debug, Default)]
pub struct Learn {
    wanted: Vec<(Name, Vec<Vec<String>>)>,
    mask: Option<Mask>,
    lines: u32,
}

impl Learn {
    /// Asks the sources of each name. What those say that come first and can only be learnt is learnt later; till then, and where nobody
    /// says anything, `fixed` holds.
    pub fn begin(fixed: &Who, sources: &[(Name, Sources)], mask: Option<Mask>, at: &Surroundings<'_>) -> (Who, Learn) {
        let (mut who, mut wanted) = (fixed.clone(), Vec::new());
        for (name, Sources(sources)) in sources {
            let mut later = Vec::new();
            for source in sources {
                if let Source::Message(path) = source {
                    later.push(path.clone());
                } else if let Some(value) = source.ask(at) {
                    who.set(*name, value);
                    break;
                }
            }
            if !later.is_empty() {
                wanted.push((*name, later));
            }
        }
        if let (Some(mask), Some(user)) = (&mask, &mut who.user) {
            *user = (mask.hash)(&mask.key, user);
        }
        (who, Learn { wanted, mask, lines: 0 })
    }

    /// What of it stays as it is, whatever the app says.
    pub fn settled(&self, who: &Who) -> Who {
        let mut settled = Who::default();
        for name in Name::ALL.iter().filter(|name| !self.wanted.iter().any(|(wanted, _)| wanted == *name)) {
            if let Some(value) = who.get(*name) {
                settled.set(*name, value.to_owned());
            }
        }
        settled
    }

    /// Whether there is nothing more to be learnt.
    pub fn is_over(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Reads one of the app's lines. True when that was the last one to be read.
    pub fn read(&mut self, line: &[u8], is_message: bool, who: &mut Who) -> bool {
        if self.is_over() {
            return false;
        }
        self.lines += 1;
        let told = if line.len() <= LINE { serde_json::from_slice::<Value>(line).ok() } else { None };
        if let Some(told) = told {
            let mask = &self.mask;
            self.wanted.retain(|(name, paths)| {
                let Some(found) = paths.iter().find_map(|path| field(&told, path)) else { return true };
                let masked = mask.as_ref().filter(|_| *name == Name::User).map(|mask| (mask.hash)(&mask.key, &found));
                who.set(*name, masked.unwrap_or(found));
                false
            });
        }
        // What the model is asked from here on has to be somebody's.
        if is_message || self.lines >= LINES {
            self.wanted.clear();
        }
        self.is_over()
    }

    /// The app says no more.
    pub fn end(&mut self) -> bool {
        !std::mem::take(&mut self.wanted).is_empty()
    }
}

fn field(told: &Value, path: &[String]) -> Option<String> {
    let found = path.iter().try_fold(told, |at, name| match at {
        Value::Array(items) => items.get(name.parse::<usize>().ok()?),
        _ => at.get(name),
    })?;
    match found {
        Value::String(text) => value(text),
        Value::Number(_) | Value::Bool(_) => value(&found.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests;
