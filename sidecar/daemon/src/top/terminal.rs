//! The terminal while it is ours: raw, on its other screen, without a cursor; and given back as it was, whatever happens.

use std::io::{self, Read, Write};
use std::sync::{Mutex, PoisonError, mpsc};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::Event;
use crate::supervise::{HUP, INT, TERM};

const TAKE: &str = "\x1b[?1049h\x1b[?25l";
const GIVE_BACK: &str = "\x1b[?25h\x1b[?1049l";
/// The size of the window.
const WINCH: i32 = 28;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Back,
    Enter,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    /// By the next column.
    Sort,
    Reverse,
}

/// How it was; for a panic on whatever thread.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// See the module's head.
pub(super) struct Terminal;

impl Terminal {
    /// # Errors
    /// It is none.
    pub(super) fn take(say: &mpsc::Sender<Event>) -> io::Result<Terminal> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // The others end alone, and who draws goes on.
            if std::thread::current().name() == Some("main") {
                give_back();
            }
            told(panic);
        }));
        let mut signals = signal_hook::iterator::Signals::new([INT, TERM, HUP, WINCH])?;
        let terminal = Terminal;
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        write(TAKE);
        let (keys, sizes) = (say.clone(), say.clone());
        std::thread::spawn(move || {
            for signal in signals.forever() {
                let event = if signal == WINCH { Event::Resized } else { Event::Signal(signal) };
                if sizes.send(event).is_err() {
                    return;
                }
            }
        });
        std::thread::spawn(move || read_keys(&keys));
        Ok(terminal)
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (usize::from(size.ws_col), usize::from(size.ws_row)),
            _ => (80, 24),
        }
    }

    pub(super) fn colours(&self) -> bool {
        std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty())
    }

    /// In one write, so that nothing flickers.
    pub(super) fn show(&self, lines: &[String]) {
        let mut all = String::from("\x1b[?2026h\x1b[H");
        for (at, line) in lines.iter().enumerate() {
            all += if at == 0 { "" } else { "\r\n" };
            all += line;
            all += "\x1b[0m\x1b[K";
        }
        all += "\x1b[J\x1b[?2026l";
        write(&all);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        write(GIVE_BACK);
        // There is nothing else to try.
        tcsetattr(io::stdin(), OptionalActions::Flush, &before).ok();
    }
}

/// A terminal that is gone takes nothing, and a signal says so.
fn write(text: &str) {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).ok();
}

fn read_keys(say: &mpsc::Sender<Event>) {
    let mut bytes = [0; 64];
    loop {
        match io::stdin().lock().read(&mut bytes) {
            Ok(n @ 1..) => {
                if keys(&bytes[..n]).into_iter().any(|key| say.send(Event::Key(key)).is_err()) {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nobody can press anything any more.
            Ok(_) | Err(_) => {
                say.send(Event::Key(Key::Quit)).ok();
                return;
            }
        }
    }
}

/// What was pressed, as far as it means anything.
fn keys(mut bytes: &[u8]) -> Vec<Key> {
    const CODES: [(&[u8], Key); 23] = [
        (b"\x1b[A", Key::Up),
        (b"\x1bOA", Key::Up),
        (b"\x1b[B", Key::Down),
        (b"\x1bOB", Key::Down),
        (b"\x1b[5~", Key::PageUp),
        (b"\x1b[6~", Key::PageDown),
        (b"\x1b[H", Key::Home),
        (b"\x1bOH", Key::Home),
        (b"\x1b[1~", Key::Home),
        (b"\x1b[F", Key::End),
        (b"\x1bOF", Key::End),
        (b"\x1b[4~", Key::End),
        (b"q", Key::Quit),
        (b"\x03", Key::Quit),
        (b"\r", Key::Enter),
        (b"\n", Key::Enter),
        (b"k", Key::Up),
        (b"j", Key::Down),
        (b"s", Key::Sort),
        (b"r", Key::Reverse),
        (b"g", Key::Home),
        (b"G", Key::End),
        (b"\x7f", Key::Back),
    ];
    let mut keys = Vec::new();
    while !bytes.is_empty() {
        let known = CODES.iter().find(|(code, _)| bytes.starts_with(code));
        let (used, key) = match known {
            Some((code, key)) => (code.len(), Some(*key)),
            // Escape by itself; what follows it belongs to a key that means nothing here.
            None if bytes == b"\x1b" => (1, Some(Key::Back)),
            None if bytes[0] == 0x1b => (bytes.len(), None),
            None => (1, None),
        };
        keys.extend(key);
        bytes = &bytes[used..];
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_told_apart_and_what_means_nothing_is_none() {
        assert_eq!(keys(b"\x1b[A\x1bOBjq"), [Key::Up, Key::Down, Key::Down, Key::Quit]);
        assert_eq!(keys(b"\x1b"), [Key::Back]);
        assert_eq!(keys(b"\x1b[1;5A"), []);
        assert_eq!(keys("xé\r".as_bytes()), [Key::Enter]);
    }
}
