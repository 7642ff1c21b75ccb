//! What many write at the same time is written at once: a statement for sixty costs little more than one for one, and waits for the disk once.
//!
//! ```text
//!  one comes ─► waits ─► its turn: writes for all that have come by then, and tells each
//!                 └────► told by who had the turn before
//! ```

use std::collections::BTreeSet;
use std::mem;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{MutexGuard, oneshot};

use crate::session::SessionId;

/// How many go together: some hundreds of kilobytes.
const MOST: usize = 128;

struct Waiting<T, R> {
    id: SessionId,
    what: T,
    tell: oneshot::Sender<R>,
}

pub(super) struct Together<T, R> {
    /// In the order in which they came.
    waiting: Mutex<Vec<Waiting<T, R>>>,
    turn: tokio::sync::Mutex<()>,
}

impl<T, R> Together<T, R> {
    pub(super) fn new() -> Self {
        Self { waiting: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    /// Something for a session, of which there is only one in a write. What `write` makes of it, which answers in the order of what it is given. `None`: who
    /// wrote it was given up, and it may be written or not.
    pub(super) async fn add<F>(&self, id: &SessionId, what: T, write: impl Fn(Vec<T>) -> F) -> Option<R>
    where
        F: Future<Output = Vec<R>>,
    {
        let (tell, mut told) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(Waiting { id: id.clone(), what, tell });
        let _turn = tokio::select! {
            biased;
            answer = &mut told => return answer.ok(),
            turn = self.turn.lock() => turn,
        };
        // Who has come to it in the same moment goes along.
        tokio::task::yield_now().await;
        loop {
            match told.try_recv() {
                Ok(answer) => return Some(answer),
                Err(oneshot::error::TryRecvError::Closed) => return None,
                // An earlier one of the same session goes first.
                Err(oneshot::error::TryRecvError::Empty) => {}
            }
            let (all, tells): (Vec<T>, Vec<_>) = self.take().into_iter().map(|one| (one.what, one.tell)).unzip();
            for (tell, answer) in tells.into_iter().zip(write(all).await) {
                // Who does not listen any more has given up.
                drop(tell.send(answer));
            }
        }
    }

    /// Nothing is written as long as it is held.
    pub(super) async fn hold(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    fn take(&self) -> Vec<Waiting<T, R>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut taken, mut ids) = (Vec::new(), BTreeSet::new());
        for one in mem::take(&mut *waiting) {
            // Who has given up does not want it written later.
            if one.tell.is_closed() {
                continue;
            }
            if taken.len() < MOST && ids.insert(one.id.clone()) {
                taken.push(one);
            } else {
                waiting.push(one);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Notify;

    use super::*;

    fn id(n: usize) -> SessionId {
        format!("s{n}").parse().unwrap()
    }

    /// Starts one; what is written is kept, and answered ten times as large.
    fn add(
        together: &Arc<Together<usize, usize>>,
        writes: &Arc<Mutex<Vec<Vec<usize>>>>,
        goes: &Arc<Notify>,
        (of, what): (usize, usize),
    ) -> tokio::task::JoinHandle<Option<usize>> {
        let (together, writes, goes) = (Arc::clone(together), Arc::clone(writes), Arc::clone(goes));
        tokio::spawn(async move {
            let write = |all: Vec<usize>| {
                let (writes, goes) = (&writes, &goes);
                async move {
                    writes.lock().unwrap().push(all.clone());
                    goes.notified().await;
                    all.into_iter().map(|what| what * 10).collect()
                }
            };
            together.add(&id(of), what, write).await
        })
    }

    async fn settled() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_comes_meanwhile_goes_together_and_one_of_a_session_at_a_time() {
        let (together, writes, goes) = (Arc::new(Together::new()), Arc::default(), Arc::new(Notify::new()));
        let mut all = vec![add(&together, &writes, &goes, (0, 0))];
        settled().await;
        for (of, what) in [(1, 1), (2, 2), (1, 3)] {
            all.push(add(&together, &writes, &goes, (of, what)));
            settled().await;
        }
        for _ in 0..3 {
            goes.notify_one();
            settled().await;
        }
        for (n, one) in all.into_iter().enumerate() {
            assert_eq!(one.await.unwrap(), Some(n * 10));
        }
        assert_eq!(*writes.lock().unwrap(), [vec![0], vec![1, 2], vec![3]]);
    }

    #[tokio::test]
    async fn who_was_with_one_that_is_given_up_knows_and_who_comes_after_is_written() {
        let (together, writes, goes) = (Arc::new(Together::new()), Arc::default(), Arc::new(Notify::new()));
        let first = add(&together, &writes, &goes, (0, 0));
        settled().await;
        let second = add(&together, &writes, &goes, (1, 1));
        settled().await;
        let third = add(&together, &writes, &goes, (2, 2));
        settled().await;
        goes.notify_one();
        settled().await;
        assert_eq!(first.await.unwrap(), Some(0));
        // It writes for the third, too.
        second.abort();
        assert_eq!(third.await.unwrap(), None);
        let last = add(&together, &writes, &goes, (3, 3));
        settled().await;
        goes.notify_one();
        assert_eq!(last.await.unwrap(), Some(30));
        assert_eq!(*writes.lock().unwrap(), [vec![0], vec![1, 2], vec![3]]);
    }

    #[tokio::test]
    async fn many_are_written_in_several() {
        let (together, writes, goes) = (Arc::new(Together::new()), Arc::default(), Arc::new(Notify::new()));
        let all: Vec<_> = (0..2 * MOST + 2).map(|n| add(&together, &writes, &goes, (n, n))).collect();
        settled().await;
        for _ in 0..3 {
            goes.notify_one();
            settled().await;
        }
        for (n, one) in all.into_iter().enumerate() {
            assert_eq!(one.await.unwrap(), Some(n * 10));
        }
        let sizes: Vec<usize> = writes.lock().unwrap().iter().map(Vec::len).collect();
        assert_eq!(sizes, [MOST, MOST, 2], "who came in the same moment goes with the first");
    }
}
