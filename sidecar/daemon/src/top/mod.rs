//! `top`: the sessions that run, in a terminal, and what happened to each of them; or one plain table, for scripts and pipes.
//!
//! Drawn with a few escape codes: a table and a list need no more, and the usual crates for terminals bring forty others along.

mod draw;
mod source;
mod terminal;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use draw::{Screen, View};
use serde_json::Value;
pub(crate) use source::{Error, Source};
use terminal::{Key, Terminal};

/// How often the numbers are asked for.
const REFRESH: Duration = Duration::from_secs(1);

/// What may happen while somebody watches.
enum Event {
    Key(Key),
    /// The window has another size.
    Resized,
    /// Somebody wants us gone.
    Signal(i32),
    Status(Result<Value, source::Error>),
    Timeline(u64, Vec<Value>),
}

/// Shows it until somebody has seen enough. Where nobody can watch, or `once`, one table is written.
pub(crate) fn run(source: Source, once: bool, out: &mut impl Write) -> Result<ExitCode, source::Error> {
    let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
    if once || dumb || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let status = source.status()?;
        // Whoever reads our output has read enough, if this fails.
        write!(out, "{}", draw::plain(&status, unix())).ok();
        return Ok(ExitCode::SUCCESS);
    }
    // Somebody must be there before the screen is taken.
    let first = source.status()?;
    let (say, hear) = mpsc::channel();
    let Ok(terminal) = Terminal::take(&say) else {
        write!(out, "{}", draw::plain(&first, unix())).ok();
        return Ok(ExitCode::SUCCESS);
    };
    let (ask, asked) = mpsc::channel();
    std::thread::spawn(move || fetch(&source, &say, &asked));
    Ok(watch(&terminal, first, &hear, &ask))
}

/// Asks again and again; for a timeline, too, of the session that is open.
fn fetch(source: &Source, say: &mpsc::Sender<Event>, asked: &mpsc::Receiver<Option<u64>>) {
    let (mut open, mut after) = (None, 0);
    loop {
        match asked.recv_timeout(REFRESH) {
            Ok(pid) => (open, after) = (pid, 0),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if let Some(pid) = open
            && let Ok(entries) = source.timeline(pid, after)
        {
            after = entries.last().and_then(|entry| entry["n"].as_u64()).unwrap_or(after);
            if say.send(Event::Timeline(pid, entries)).is_err() {
                return;
            }
        }
        if say.send(Event::Status(source.status())).is_err() {
            return;
        }
    }
}

fn watch(terminal: &Terminal, first: Value, hear: &mpsc::Receiver<Event>, ask: &mpsc::Sender<Option<u64>>) -> ExitCode {
    let mut screen = Screen::new(first, unix(), terminal.colours());
    loop {
        terminal.show(&screen.lines(terminal.size(), unix()));
        // The clock goes on where nothing else does.
        let event = match hear.recv_timeout(REFRESH) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return ExitCode::SUCCESS,
        };
        match event {
            Event::Key(Key::Quit) => return ExitCode::SUCCESS,
            Event::Key(key) => {
                let before = screen.view.open();
                screen.press(key);
                let now = screen.view.open();
                if now != before {
                    // Who fetches has ended, if this fails: then its last word was said.
                    ask.send(now).ok();
                }
            }
            Event::Resized => {}
            Event::Signal(signal) => return ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
            Event::Status(Ok(status)) => screen.take(status, unix()),
            Event::Status(Err(error)) => screen.lost(&error),
            Event::Timeline(pid, entries) => screen.happened(pid, entries),
        }
    }
}

impl View {
    fn open(&self) -> Option<u64> {
        match self {
            View::Table => None,
            View::Session { pid, .. } => Some(*pid),
        }
    }
}

fn unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
