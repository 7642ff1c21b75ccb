//! A session that goes on in another container: what it has is taken from here, brought here, or removed, by whoever has the container's token.
//!
//! ```text
//!   GET, HEAD /sessions/{id}/conversation ──► a tar of its own config directory and workspace, while its agent does not work
//!   PUT    ◄── the same, into a session to which nobody has said anything here: its next message goes on with it
//!   DELETE ──  its agent ends, and its directories go
//! ```
//!
//! How it is packed and unpacked is [`crate::conversation`]'s.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Method, Request, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{GRACE, House};
use crate::conversation::{self, Conversation, Fetched, Options, Root, What, Work, Wrong};
use crate::http::{Answer, reply, text};
use crate::hub::gate::{Gate, Peer};
use crate::tenants::{Home, Homes};

/// Sessions that are taken and brought at the same time.
const AT_ONCE: usize = 4;
/// How often it is looked whether an agent has ended.
const LOOK: Duration = Duration::from_millis(20);
/// In a session's own directory, where its agent is not at home: into which container its conversation was brought.
const BROUGHT: &str = ".brought";

pub(super) struct Away {
    options: Options,
    gate: Gate,
    room: Arc<Semaphore>,
    /// `None`: sessions have no directories of their own here.
    homes: Option<Homes>,
    /// Sessions that are brought or removed: nothing is said to them.
    moving: Arc<Mutex<BTreeSet<String>>>,
}

/// That a session is brought or removed, for as long as this is there.
struct Moving {
    id: String,
    of: Arc<Mutex<BTreeSet<String>>>,
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Away {
    pub(super) fn new(options: Options, homes: Option<Homes>) -> Away {
        let gate = conversation::gate(&options);
        Away { options, gate, room: Arc::new(Semaphore::new(AT_ONCE)), homes, moving: Arc::default() }
    }

    pub(super) fn moves(&self, id: &str) -> bool {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    fn alone(&self, id: &str) -> Result<Moving, Wrong> {
        let new = self.moving.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
        let moving = new.then(|| Moving { id: id.to_owned(), of: Arc::clone(&self.moving) });
        moving.ok_or_else(|| busy("somebody else brings or removes it just now"))
    }

    /// What a session has there.
    fn conversation(&self, home: &Path) -> Conversation {
        let roots = ["config", "workspace"].map(|name| Root { name, path: home.join(name) }).to_vec();
        let fetched = Fetched::new(Some(home.join(BROUGHT)));
        Conversation::beside(Options { roots, ..self.options.clone() }, fetched, &self.room)
    }
}

/// What may be done now.
struct Ready {
    what: What,
    conversation: Conversation,
    /// While it is brought nobody else is there, nor comes.
    alone: Option<(Moving, Option<Home>)>,
}

impl House {
    pub(super) async fn converse(self: &Arc<Self>, away: &Away, id: &str, request: Request<Incoming>, peer: Peer) -> Answer {
        let (parts, body) = request.into_parts();
        let Ready { what, conversation, alone } = match self.asked(away, id, &parts, peer).await {
            Ok(ready) => ready,
            Err(answer) => return conversation::last(answer, body).await,
        };
        let (house, of, id) = (Arc::clone(self), id.to_owned(), id.to_owned());
        let works = move || std::future::ready(Some(house.work(&of)));
        let house = Arc::clone(self);
        // To its end, whether or not anybody waits for the answer.
        let done = tokio::spawn(async move {
            let answer = conversation.transfer(what, body, works).await;
            let brought = what == What::Bring && answer.status().is_success() && house.conversation(&id).is_none();
            if let Some(newest) = if brought { conversation.newest().await } else { None } {
                house.remember(&id, &newest);
            }
            drop(alone);
            answer
        });
        done.await.unwrap_or_else(|_| Wrong::from(io::Error::other("it failed")).answer())
    }

    fn work(&self, id: &str) -> Work {
        let state = self.talk(id).map(|talk| talk.state()).unwrap_or_default();
        Work { busy: state.busy, turns: state.turns }
    }

    /// What is wanted, if it may be, or the answer.
    async fn asked(&self, away: &Away, id: &str, asked: &Parts, peer: Peer) -> Result<Ready, Answer> {
        if let Some((status, why)) = away.gate.judge(peer, &asked.headers, std::time::Instant::now()).refusal() {
            return Err(text(status, why));
        }
        let what = "sessions have no directories of their own here: --agent-dirs, and no CLAUDE_CONFIG_DIR\n";
        let homes = away.homes.as_ref().ok_or_else(|| text(StatusCode::NOT_FOUND, what))?;
        match (What::of(&asked.method), &asked.method) {
            (Some(What::Bring), _) => self.to_be_brought(away, homes, id).await.map_err(|wrong| wrong.answer()),
            (Some(what), _) => self.to_be_taken(away, homes, id, what).await.map_err(|wrong| wrong.answer()),
            (None, &Method::DELETE) => Err(match self.remove(away, homes, id).await {
                Ok(()) => reply(StatusCode::NO_CONTENT, "text/plain", Vec::new()),
                Err(wrong) => wrong.answer(),
            }),
            (None, _) => {
                let how = "take it with GET, bring it with PUT, remove it with DELETE\n";
                Err(text(StatusCode::METHOD_NOT_ALLOWED, how))
            }
        }
    }

    async fn to_be_brought(&self, away: &Away, homes: &Homes, id: &str) -> Result<Ready, Wrong> {
        let moving = away.alone(id)?;
        let conversation = away.conversation(&homes.at(id, None));
        let home = if conversation.is_here() {
            // Whose answer was lost asks again.
            None
        } else if self.work(id).turns > 0 || self.conversation(id).is_some() {
            return Err(busy("something was said to it here"));
        } else {
            Some(blocking(homes, id, Homes::make).await?.ok_or_else(|| busy(STAYS))?)
        };
        Ok(Ready { what: What::Bring, conversation, alone: Some((moving, home)) })
    }

    /// What an agent that waits has not written down yet it does when it ends, and until somebody says something nobody writes after that.
    async fn to_be_taken(&self, away: &Away, homes: &Homes, id: &str, what: What) -> Result<Ready, Wrong> {
        let deadline = self.patience();
        loop {
            if away.moves(id) || self.work(id).busy {
                return Err(busy("its agent works, or is brought or removed"));
            }
            if what == What::Look {
                break;
            }
            match self.talk(id).filter(|talk| talk.state().runs) {
                Some(talk) => talk.rest(),
                None if blocking(homes, id, Homes::are_free).await? => break,
                None => {}
            }
            wait(deadline).await?;
        }
        let conversation = away.conversation(&homes.at(id, self.conversation(id).as_deref()));
        Ok(Ready { what, conversation, alone: None })
    }

    /// One that works does not end for this.
    async fn remove(&self, away: &Away, homes: &Homes, id: &str) -> Result<(), Wrong> {
        let _alone = away.alone(id)?;
        if let Some(talk) = self.talk(id) {
            if talk.state().busy {
                return Err(busy("its agent works"));
            }
            talk.drop_it();
        }
        self.forget(id);
        let deadline = self.patience();
        while !blocking(homes, id, Homes::remove).await? {
            wait(deadline).await?;
        }
        tracing::info!(session = id, "what a session had here is gone");
        Ok(())
    }

    /// Until when an agent has ended: it is asked, told, and killed.
    fn patience(&self) -> Instant {
        Instant::now() + self.options.grace.unwrap_or(GRACE) * 3
    }
}

const STAYS: &str = "its agent has not ended yet";

fn busy(what: &str) -> Wrong {
    Wrong::Busy(String::from(what))
}

async fn wait(deadline: Instant) -> Result<(), Wrong> {
    if Instant::now() >= deadline {
        return Err(busy(STAYS));
    }
    tokio::time::sleep(LOOK).await;
    Ok(())
}

/// Files that somebody else may hold up.
async fn blocking<T: Send + 'static>(homes: &Homes, id: &str, ask: fn(&Homes, &str) -> io::Result<T>) -> Result<T, Wrong> {
    let (homes, id) = (homes.clone(), id.to_owned());
    let asked = tokio::task::spawn_blocking(move || ask(&homes, &id)).await;
    Ok(asked.unwrap_or_else(|_| Err(io::Error::other("it failed")))?)
}
