//! `control`: asks the hub of this container, for people.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::config::Config;
use crate::hub::{Meeting, Place};

/// A hub that hangs is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// No answer is longer.
const ANSWER: u64 = 16 * 1024 * 1024;

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    #[error(
        "agents do not meet here, so nobody can be asked: set --listen to an address with a port, or --socket, and not --hub off"
    )]
    NoMeeting,
    #[error(
        "there is no hub here: an agent has to run, or `agent-sidecar hub`, with the same --listen or --socket, for the same user"
    )]
    NoPlace(#[source] io::Error),
    #[error("the control token cannot be read: {0}")]
    NoToken(String),
    #[error("no hub answers at {path}: an agent has to run, or `agent-sidecar hub`, with the same --listen or --socket")]
    Nobody {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the hub at {path} was asked and did not answer")]
    Silent {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "who listens at {path} is user {uid}, who is not told the control token; ask as that user, or see that the socket is the hub's"
    )]
    Stranger { path: PathBuf, uid: u32 },
    #[error("{0}")]
    Refused(String),
}

/// Asks, and returns what was answered.
pub(crate) fn ask(config: &Config, method: &str, target: &str) -> Result<String, NoAnswer> {
    let meeting = config.meeting().ok_or(NoAnswer::NoMeeting)?;
    Place::look(&meeting).map_err(NoAnswer::NoPlace)?;
    let (mut stream, path) = connect(&meeting)?;
    let token = config.token().map_err(NoAnswer::NoToken)?;
    if token.word().is_some() {
        let uid = stranger(&stream).map_err(|source| NoAnswer::Silent { path: path.clone(), source })?;
        if let Some(uid) = uid {
            return Err(NoAnswer::Stranger { path, uid });
        }
    }
    let answer =
        talk(&mut stream, method, target, token.word()).map_err(|source| NoAnswer::Silent { path: path.clone(), source })?;
    let mut answer = answer.splitn(2, "\r\n\r\n");
    let (head, body) = (answer.next().unwrap_or_default(), answer.next().unwrap_or_default());
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        Some(_) => Err(NoAnswer::Refused(body.trim().to_owned())),
        None => Err(NoAnswer::Silent { path, source: io::ErrorKind::UnexpectedEof.into() }),
    }
}

/// The socket that is ours alone, where there are two.
fn connect(meeting: &Meeting) -> Result<(UnixStream, PathBuf), NoAnswer> {
    let mut last = None;
    for path in Place::sockets(meeting) {
        match UnixStream::connect(&path) {
            Ok(stream) => return Ok((stream, path)),
            Err(source) => last = Some(NoAnswer::Nobody { path, source }),
        }
    }
    Err(last.unwrap_or(NoAnswer::NoMeeting))
}

/// The user who listens there, if it is neither us nor root: the path may be anybody's.
fn stranger(stream: &UnixStream) -> io::Result<Option<u32>> {
    let uid = rustix::net::sockopt::socket_peercred(stream)?.uid;
    Ok((uid != rustix::process::geteuid() && !uid.is_root()).then(|| uid.as_raw()))
}

fn talk(stream: &mut UnixStream, method: &str, target: &str, token: Option<&str>) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let token = token.map(|word| format!("Authorization: Bearer {word}\r\n")).unwrap_or_default();
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n{token}\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER).read_to_string(&mut answer)?;
    Ok(answer)
}

/// A word for a path or a query.
pub(crate) fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}

/// Budgets as a table.
pub(crate) fn table(answer: &str, out: &mut impl Write) -> io::Result<()> {
    let answer: Value = serde_json::from_str(answer)?;
    let budgets = answer["budgets"].as_array().map(Vec::as_slice).unwrap_or_default();
    if budgets.is_empty() {
        return writeln!(out, "no agent has told of a shared budget");
    }
    writeln!(
        out,
        "{:<16} {:<16} {:>6} {:>14} {:>14} {:>14}  {:<10}  waits",
        "budget", "tenant", "unit", "limit", "used", "reserved", "period"
    )?;
    for budget in budgets {
        let text = |key: &str| match &budget[key] {
            Value::String(text) => text.clone(),
            Value::Null => String::from("-"),
            other => other.to_string(),
        };
        let raised = if budget["raised"].is_null() { "" } else { " (raised)" };
        let waits = budget["waits"].as_array().map_or(0, Vec::len);
        writeln!(
            out,
            "{:<16} {:<16} {:>6} {:>14} {:>14} {:>14}  {:<10}  {waits}{raised}",
            text("scope"),
            text("tenant"),
            text("unit"),
            text("limit"),
            text("used"),
            text("reserved"),
            text("period"),
        )?;
        for share in budget["shares"].as_array().into_iter().flatten() {
            let whose = if share["tenant"] == true { " (with the tenant's other agents)" } else { "" };
            writeln!(
                out,
                "  share of {}: {} of {}{whose}",
                share["session"].as_str().unwrap_or("-"),
                share["used"],
                share["of"]
            )?;
        }
    }
    Ok(())
}
