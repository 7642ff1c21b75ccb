//! Where each session's last turn is kept, so that a process that resumes the session links its first turn to it: a small file for
//! each, beside the queue.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use agent_sidecar_core::telemetry::{Context, Span, Value};

use super::queue::is_our_own;

/// Sessions that are remembered; the one that was quiet for longest is forgotten.
const SESSIONS: usize = 256;

/// The last turns, as far as they were told.
pub(crate) fn read(queue_dir: &Path) -> BTreeMap<String, Context> {
    let me = rustix::process::geteuid().as_raw();
    let dir = Some(dir(queue_dir)).filter(|dir| is_our_own(dir));
    let files = dir.and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten().take(2 * SESSIONS);
    let turns = files.filter_map(|file| {
        let session = file.file_name().into_string().ok().filter(|name| is_session(name))?;
        // The volume may be open to others.
        let metadata = fs::symlink_metadata(file.path()).ok()?;
        if !metadata.is_file() || metadata.uid() != me || metadata.len() > 128 {
            return None;
        }
        Some((session, Context::from_traceparent(fs::read_to_string(file.path()).ok()?.trim())?))
    });
    turns.collect()
}

/// Remembers the turns among these. Nobody depends on it: what cannot be written is not remembered.
pub(crate) fn remember<'a>(queue_dir: &Path, spans: impl IntoIterator<Item = &'a Span>) {
    let text = |span: &'a Span, key: &str| {
        span.attributes.iter().find_map(|(known, value)| match value {
            Value::Str(text) if *known == key => Some(text.as_str()),
            _ => None,
        })
    };
    for span in spans {
        let is_turn = span.attributes.iter().any(|(key, _)| *key == "claude_agent.turn");
        let Some(session) = text(span, "gen_ai.conversation.id").filter(|session| is_turn && is_session(session)) else {
            continue;
        };
        if let Err(error) = write(&dir(queue_dir), session, span.context) {
            tracing::debug!(%error, "a session's last turn is not remembered");
        }
    }
}

fn dir(queue_dir: &Path) -> PathBuf {
    queue_dir.join("turns")
}

/// A name that is safe to be one of a file.
fn is_session(name: &str) -> bool {
    (8..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn write(dir: &Path, session: &str, context: Context) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(dir)?;
    let (path, half) = (dir.join(session), dir.join(format!("{session}.{}", std::process::id())));
    let is_new = !path.exists();
    if !is_our_own(dir) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the directory is somebody else's"));
    }
    // Of one that had our number and was killed. A link that is in the way is not followed.
    drop(fs::remove_file(&half));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&half)?;
    file.write_all(context.to_traceparent().as_bytes())?;
    fs::rename(&half, &path)?;
    if is_new {
        let mut all: Vec<_> =
            fs::read_dir(dir)?.flatten().filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file.path()))).collect();
        all.sort();
        for (_, path) in all.iter().rev().skip(SESSIONS) {
            fs::remove_file(path).ok();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agent_sidecar_core::telemetry::{SpanKind, Status};

    use super::super::tests::Scratch;
    use super::*;

    fn turn(session: &str, n: u8) -> Span {
        let parent = format!("00-4bf92f3577b34da6a3ce929d0e0e47{n:02x}-00f067aa0ba902b7-01");
        Span {
            context: Context::from_traceparent(&parent).unwrap(),
            parent: None,
            name: String::from("invoke_agent a"),
            kind: SpanKind::Internal,
            start: Duration::ZERO,
            end: Duration::ZERO,
            attributes: vec![("claude_agent.turn", Value::Int(1)), ("gen_ai.conversation.id", Value::Str(session.to_owned()))],
            events: Vec::new(),
            links: Vec::new(),
            status: Status::Unset,
        }
    }

    #[test]
    fn the_last_turn_of_each_session_is_remembered_and_not_of_too_many() {
        let root = Scratch::new();
        assert!(read(&root).is_empty());
        let (first, last) = (turn("session-1", 1), turn("session-1", 2));
        remember(&root, [&first, &turn("../evil/..", 3), &last]);
        assert_eq!(read(&root), [(String::from("session-1"), last.context)].into());
        fs::write(root.join("turns/session-2"), "nonsense").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("turns/session-3")).unwrap();
        assert_eq!(read(&root).len(), 1);
        for n in 0..SESSIONS + 10 {
            remember(&root, [&turn(&format!("another-{n}"), 4)]);
        }
        assert_eq!(fs::read_dir(root.join("turns")).unwrap().count(), SESSIONS);
        assert!(read(&root).contains_key(&format!("another-{}", SESSIONS + 9)));
    }

    #[test]
    fn links_that_others_have_put_there_are_not_followed() {
        let root = Scratch::new();
        let (turns, theirs) = (root.join("turns"), root.join("theirs"));
        fs::create_dir(&theirs).unwrap();
        fs::write(theirs.join("file"), "as it was").unwrap();
        std::os::unix::fs::symlink(&theirs, &turns).unwrap();
        remember(&root, [&turn("session-1", 1)]);
        assert_eq!(fs::read_dir(&theirs).unwrap().count(), 1);
        fs::write(theirs.join("session-1"), turn("session-1", 1).context.to_traceparent()).unwrap();
        assert!(read(&root).is_empty());
        fs::remove_file(&turns).unwrap();
        fs::create_dir(&turns).unwrap();
        let half = turns.join(format!("session-1.{}", std::process::id()));
        std::os::unix::fs::symlink(theirs.join("file"), &half).unwrap();
        remember(&root, [&turn("session-1", 2)]);
        assert_eq!(read(&root), [(String::from("session-1"), turn("session-1", 2).context)].into());
        assert_eq!(fs::read_to_string(theirs.join("file")).unwrap(), "as it was");
    }
}
