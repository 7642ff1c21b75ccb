//! Many agents, of several tenants, in one container: who each works for, what they must not share, and a directory for each.

mod book;
mod dirs;
mod guard;
mod known;

use std::time::Duration;

pub(crate) use dirs::{AgentDirs, Home, Homes, Workspace};
pub(crate) use guard::{Guard, Places, TenantsShare};
pub(crate) use known::{find, silent};

/// A file system that does not answer is not waited for any longer. What the agent itself does with it is the agent's affair.
const ANSWER: Duration = Duration::from_secs(5);

/// Does something that may hang, on a thread that is left behind if it does. Nothing if it took too long.
fn within<T: Send + 'static>(bound: Duration, what: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name(String::from("tenants"))
        .stack_size(256 * 1024)
        .spawn(move || {
            // Nobody waits for it any more: then it was too late.
            sender.send(what()).ok();
        })
        .ok()?;
    receiver.recv_timeout(bound).ok()
}

/// What tells two texts apart where a name has no room for them, or must not show them: 16 bytes.
fn digest(text: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, text).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_hangs_is_left_behind() {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let began = Instant::now();
        // It ends when the test does, and not before.
        assert_eq!(within(Duration::from_millis(20), move || wait.recv().is_ok()), None);
        assert_eq!(within(ANSWER, || 7), Some(7));
        assert!(began.elapsed() < ANSWER);
        drop(done);
    }
}
