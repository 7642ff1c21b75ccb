//! What is still done when the CLI has ended, and in which order.

use std::sync::Arc;
use std::time::Duration;

use agent_sidecar_core::Exit;
use agent_sidecar_core::metric;

use crate::http::{self, Scrapes};
use crate::hub::Share;
use crate::supervise::{BeforeExit, Ending, Handle, LastWords, Supervisor};

#[derive(Default)]
pub(super) struct Ends {
    words: Vec<LastWords>,
    last: Vec<BeforeExit>,
}

impl Ends {
    /// Before anybody hears that it has ended.
    pub(super) fn first(&mut self, say: impl FnOnce(Exit) + Send + 'static) {
        self.words.push(Box::new(say));
    }

    /// When the app has its EOF, after what was added before.
    pub(super) fn then(&mut self, end: impl FnOnce(Ending) + Send + 'static) {
        self.last.push(Box::new(end));
    }

    pub(super) fn of(self, supervisor: Supervisor) -> Supervisor {
        let Self { words, last } = self;
        let supervisor = supervisor.last_words(Box::new(move |exit| words.into_iter().for_each(|say| say(exit))));
        if last.is_empty() {
            return supervisor;
        }
        supervisor.before_exit(Box::new(move |ending| last.into_iter().for_each(|end| end(ending))))
    }

    /// The last numbers are told to the hub, and read there, if there is time for it.
    pub(super) fn linger_at(&mut self, share: Share, linger: Duration, handle: Handle) {
        self.then(move |_| {
            if !linger.is_zero() {
                say_scraped(&handle);
            }
            // Of a disk that hangs nobody reads anything.
            let told = share.finish();
            let read = linger.is_zero() || told && share.linger(linger);
            if !read {
                let next = if told && share.goes_on() { "the next hub here has them, and " } else { "" };
                tracing::warn!(?linger, "nobody read the last metrics; {next}the ledger has them, if one is set");
            }
        });
    }

    /// The same of one who is served alone.
    pub(super) fn linger(&mut self, scrapes: Arc<Scrapes>, linger: Duration, handle: Handle) {
        if linger.is_zero() {
            return;
        }
        self.then(move |_| {
            if !say_scraped(&handle) || !scrapes.wait(linger) {
                tracing::warn!(?linger, "nobody read the last metrics; the ledger has them, if one is set");
            }
        });
    }
}

/// The reader's own scrape already says that it happened. False if nobody can be told.
fn say_scraped(handle: &Handle) -> bool {
    http::visit_blocking(handle, |monitor, _| monitor.meters_mut().add(&metric::FINAL_FLUSH, &["scraped"], 1)).is_some()
}
