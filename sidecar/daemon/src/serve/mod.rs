//! `serve`: agents behind HTTP, for images without an app of their own. A conversation for each session id, an agent for each that is talked to.
//!
//! ```text
//!   POST /sessions/{id}/messages, or a WebSocket at /sessions/{id}/ws
//!                                ──► talk (one for each id) ──stdin──► agent-sidecar run -- claude …
//!                   events ◄────────────┘ ◄───────────────stdout──────┘
//!   /sessions/{id}/conversation  ◄──► away: what a session has, for whoever has the container's token
//!   and in this process the hub, which serves the numbers of all of them
//! ```
//!
//! Every agent is started by a wrapper of ours, as if somebody had typed it: limits, ledger, budgets and lease are its business and not known
//! here. What is here writes a line, reads lines, and knows which conversation goes on where.

mod away;
mod book;
mod child;
mod pages;
mod shape;
mod socket;
mod talk;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::update::Start;
use tokio::sync::watch;

use crate::config::Config;
use crate::hub::gate::Token;
use crate::hub::{self, Place};
use crate::supervise::User;
use crate::tenants::{Homes, Places};

pub(crate) use shape::Form;

use away::Away;
use book::Book;
use child::Reaper;
use talk::{State, Talk};

/// Conversations that were talked to since the start; beyond it those go whose agent has ended, and come again when they are talked to.
const TALKS: usize = 1000;
/// What the hosting cookbook calls our token.
pub(crate) const OTHER_TOKEN: &str = "AGENT_AUTH_TOKEN";
/// What tells an agent which session it is of, and names its directory, if each has one.
const SESSION: &str = "AGENT_SESSION";
/// The file that knows which conversation is whose, beside what the CLI keeps of them: whoever puts that away has both.
const BOOK: &str = "agent-sidecar-sessions.json";
/// Without a platform's word for it.
const GRACE: Duration = Duration::from_secs(30);

/// What the configuration says of it.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) address: SocketAddr,
    pub(crate) token: Token,
    /// No token is asked for.
    pub(crate) open: bool,
    pub(crate) book: Option<PathBuf>,
    /// Agents at once.
    pub(crate) agents: usize,
    /// Tools that ask for permission are allowed.
    pub(crate) allow: bool,
    pub(crate) form: Form,
    /// A turn ends when nobody listens to it any more.
    pub(crate) interrupt: bool,
    /// What an agent is given to end.
    pub(crate) grace: Option<Duration>,
    pub(crate) page_host: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("there is no token: name one with --serve-token-file, or listen at 127.0.0.1 with --serve-open")]
    NoToken,
    #[error("without a token it listens on loopback alone: leave --serve-open out, or --serve-listen at 127.0.0.1")]
    OpenToAll,
    #[error("the token cannot be had: {0}")]
    BadToken(String),
    #[error("there is no address to listen at: --serve-listen is off")]
    NoAddress,
    #[error("`{0}` cannot stand there: which conversation goes on is said with each message")]
    Conversation(&'static str),
    #[error("the agent's command speaks another format: leave --output-format and --input-format out")]
    Format,
    #[error(
        "a session finds its directory by its id, and its conversation in there: leave --agent-from and --agent-dirs-at-end remove out"
    )]
    AgentDirs,
    #[error("cannot listen at {0}")]
    Listen(SocketAddr, #[source] io::Error),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    #[error(transparent)]
    User(#[from] crate::supervise::NoUser),
}

/// How an agent is started, but for the conversation.
pub(crate) struct Recipe {
    /// Ours, for the wrapper: `--config` and flags.
    pub(crate) flags: Vec<OsString>,
    /// Those that nobody is to see in a list of processes, as variables.
    pub(crate) env: Vec<(String, String)>,
    pub(crate) command: Vec<OsString>,
}

/// What the CLI is spoken to in, and answers in.
const FORMAT: &str = "stream-json";

impl Recipe {
    /// # Errors
    /// The command says what only we can say.
    fn check(&self) -> Result<(), Error> {
        let launch = Launch::of(&self.command, false, false);
        let at = |words: &[&'static str]| {
            let said = |word: &&'static str| {
                self.command.iter().any(|one| one.to_str().is_some_and(|one| one.split('=').next() == Some(*word)))
            };
            words.iter().find(|word| said(word)).copied()
        };
        if let Some(flag) = at(&["--resume", "-r", "--continue", "-c", "--session-id", "--fork-session"])
            && (launch.start != Start::Fresh || launch.session.is_some())
        {
            return Err(Error::Conversation(flag));
        }
        // Its own word for one of them stands, and what it says must be what we speak.
        let words: Vec<&str> = self.command.iter().filter_map(|word| word.to_str()).collect();
        let other = |flag: &str| {
            words.iter().enumerate().any(|(n, word)| match word.split_once('=') {
                Some((name, value)) => name == flag && value != FORMAT,
                None => *word == flag && words.get(n + 1) != Some(&FORMAT),
            })
        };
        if other("--input-format") || other("--output-format") {
            return Err(Error::Format);
        }
        let formats = self.argv(None);
        match Launch::of(&formats, false, false).mode {
            Mode::Parse { stdin_json: true } => Ok(()),
            Mode::Parse { .. } | Mode::Terminal | Mode::PassThrough => Err(Error::Format),
        }
    }

    /// The agent's own command line.
    fn argv(&self, resume: Option<&str>) -> Vec<OsString> {
        let has =
            |flag: &str| self.command.iter().any(|word| word.to_str().is_some_and(|word| word.split('=').next() == Some(flag)));
        let mut more: Vec<String> = Vec::new();
        for (flag, value) in [("--input-format", FORMAT), ("--output-format", FORMAT), ("--permission-prompt-tool", "stdio")] {
            if !has(flag) {
                more.extend([flag.to_owned(), value.to_owned()]);
            }
        }
        for flag in ["--print", "--verbose"] {
            if !(has(flag) || flag == "--print" && has("-p")) {
                more.push(flag.to_owned());
            }
        }
        more.extend(resume.map(|conversation| format!("--resume={conversation}")));
        let mut argv = self.command.clone();
        let end = argv.iter().position(|word| word == "--").unwrap_or(argv.len());
        argv.splice(end..end, more.into_iter().map(OsString::from));
        argv
    }

    fn wrapper(&self, program: &std::path::Path, id: &str, has_dirs: bool, resume: Option<&str>) -> Command {
        let mut wrapper = Command::new(program);
        wrapper.arg("run").args(&self.flags);
        if has_dirs {
            wrapper.args(["--agent-from", &format!("env:{SESSION}")]);
        }
        wrapper.env(SESSION, id).arg("--").args(self.argv(resume)).env_remove(OTHER_TOKEN);
        wrapper.envs(self.env.iter().map(|(name, value)| (name, value)));
        wrapper
    }
}

/// All that is shared by pages and talks.
struct House {
    options: Options,
    recipe: Recipe,
    program: PathBuf,
    /// Each session has a directory of its own.
    has_dirs: bool,
    reaper: Arc<Reaper>,
    book: Mutex<Book>,
    talks: Mutex<BTreeMap<String, Arc<Talk>>>,
    /// Those that are over, and whose agents are not yet. Locked while `talks` is.
    ending: Mutex<Vec<Arc<Talk>>>,
    /// Nothing new is begun.
    closing: watch::Receiver<bool>,
    away: Option<Away>,
}

/// Why a message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// Its turn before is under way.
    Busy,
    /// What it has is brought or removed.
    Moving,
    /// As many agents work as may.
    Full,
    Closing,
}

impl House {
    /// The talk of that id, with its next turn reserved; whoever waits longest is put to rest for it where there is no room.
    fn admit(self: &Arc<Self>, id: &str) -> Result<Arc<Talk>, Refusal> {
        if *self.closing.borrow() {
            return Err(Refusal::Closing);
        }
        let mut talks = self.talks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        ending.retain(|talk| talk.state().runs);
        ending.extend(talks.extract_if(.., |_, talk| talk.is_over()).map(|(_, talk)| talk).filter(|talk| talk.state().runs));
        drop(ending);
        if self.away.as_ref().is_some_and(|away| away.moves(id)) {
            return Err(Refusal::Moving);
        }
        if !talks.contains_key(id) && talks.len() >= TALKS {
            let rests = talks.iter().find(|(_, talk)| !talk.state().runs && !talk.state().busy).map(|(id, _)| id.clone());
            let Some(rests) = rests else { return Err(Refusal::Full) };
            if let Some(talk) = talks.remove(&rests) {
                talk.end();
            }
        }
        let state = talks.get(id).map(|talk| talk.state()).unwrap_or_default();
        if state.busy {
            return Err(Refusal::Busy);
        }
        if !state.runs || state.rests {
            // With those that are about to start, and without those that are about to end.
            let needs = |state: &State| state.busy || state.runs && !state.rests;
            let mut n = 1 + talks.values().filter(|talk| needs(&talk.state())).count();
            while n > self.options.agents {
                let waiting = talks.values().filter(|talk| talk.state().runs && !talk.state().busy && !talk.state().rests);
                let Some(oldest) = waiting.min_by_key(|talk| talk.state().used) else { return Err(Refusal::Full) };
                oldest.rest();
                n -= 1;
            }
        }
        let talk = talks.entry(id.to_owned()).or_insert_with(|| Talk::begin(id, self));
        talk.reserve();
        Ok(Arc::clone(talk))
    }

    /// Whether there is room for one more agent: then it is this one's.
    fn take_room(&self, talk: &Talk) -> bool {
        let talks = self.talks.lock().unwrap_or_else(PoisonError::into_inner);
        let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let room = talks.values().chain(ending.iter()).filter(|talk| talk.state().runs).count() < self.options.agents;
        if room {
            talk.set(|state| state.runs = true);
        }
        room
    }

    fn talk(&self, id: &str) -> Option<Arc<Talk>> {
        self.talks.lock().unwrap_or_else(PoisonError::into_inner).get(id).filter(|talk| !talk.is_over()).cloned()
    }

    /// As it is by now.
    fn book(&self) -> MutexGuard<'_, Book> {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.refresh();
        book
    }

    fn conversation(&self, id: &str) -> Option<String> {
        self.book().find(id)
    }

    fn remember(&self, id: &str, conversation: &str) {
        let kept = self.book().remember(id, conversation);
        if let Err(error) = kept {
            tracing::warn!(%error, "which conversation a session is cannot be kept: it begins anew after the next start");
        }
    }

    fn forget(&self, id: &str) -> bool {
        match self.book().forget(id) {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(%error, "that a session is over cannot be kept");
                true
            }
        }
    }

    /// Every agent is asked to end, and all that is left is killed after the grace.
    async fn close(&self) {
        let talks: Vec<Arc<Talk>> = self.talks.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        talks.iter().for_each(|talk| talk.end());
        let all = async {
            while self.reaper.has_children() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let grace = self.options.grace.unwrap_or(GRACE);
        if tokio::time::timeout(grace, all).await.is_err() {
            tracing::warn!(?grace, "agents are left that do not end: they are killed");
            self.reaper.kill_all();
        }
    }
}

/// Serves until a signal ends it; then agents have ended, with their last cost booked.
///
/// # Errors
/// Why it cannot begin.
pub(crate) fn run(config: &Config, recipe: Recipe) -> Result<(), Error> {
    crate::supervise::hide();
    let options = config.serve()?;
    recipe.check()?;
    let dirs = config.agent_dirs();
    if dirs.as_ref().is_some_and(|dirs| dirs.name.is_some() || dirs.remove) {
        return Err(Error::AgentDirs);
    }
    let user = config.user()?.unwrap_or_else(User::ours);
    let homes = Homes::find(config, &recipe.argv(None), &user);
    let away = config.conversation(&Places::of(&[], None)).map(|options| Away::new(options, homes));
    let book = Book::open(options.book.clone().unwrap_or_else(|| config_dir(&user).join(BOOK)), &user);
    let program = std::env::current_exe().map_err(|error| Error::Io("find this program", error))?;
    let reaper = Reaper::start().map_err(|error| Error::Io("hear signals", error))?;
    let bound = crate::http::bind(options.address).map_err(|error| Error::Listen(options.address, error))?;
    if let Some(meeting) = config.meeting() {
        let place = Place::find(&meeting).map_err(|error| Error::Io("find a place where agents meet", error))?;
        hub::beside(place, config.listen(), config.hub_options())
            .map_err(|error| Error::Io("serve the numbers of all agents", error))?;
    }
    // Who asked for any port has no other way to know it.
    if options.address.port() == 0 {
        tracing::warn!(address = %bound.address, "serving sessions at a port that was free");
    } else {
        tracing::info!(address = %bound.address, "serving sessions");
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| Error::Io("begin", error))?;
    runtime.block_on(async {
        let mut closing = reaper.ending();
        let house = Arc::new(House {
            options,
            recipe,
            program,
            has_dirs: dirs.is_some(),
            reaper: Arc::clone(&reaper),
            book: Mutex::new(book),
            talks: Mutex::default(),
            ending: Mutex::default(),
            closing: closing.clone(),
            away,
        });
        let pages = tokio::spawn(pages::serve(bound.into_listener(), Arc::clone(&house)));
        closing.wait_for(|told| *told).await.ok();
        house.close().await;
        // What is on its way to somebody may arrive.
        tokio::time::sleep(Duration::from_millis(100)).await;
        pages.abort();
    });
    Ok(())
}

/// Where the CLI keeps its conversations.
fn config_dir(user: &User) -> PathBuf {
    if let Some(dir) = std::env::var_os("CLAUDE_CONFIG_DIR").filter(|dir| !dir.is_empty()) {
        return dir.into();
    }
    let home = user.variables().into_iter().find(|(name, _)| name == "HOME").and_then(|(_, home)| home);
    let home = home.or_else(|| std::env::var_os("HOME")).unwrap_or_else(|| "/".into());
    PathBuf::from(home).join(".claude")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(line: &str) -> Recipe {
        Recipe { flags: Vec::new(), env: Vec::new(), command: line.split(' ').map(OsString::from).collect() }
    }

    #[test]
    fn the_cli_is_started_as_one_that_is_talked_to() {
        let argv = |line: &str, resume| recipe(line).argv(resume).join(std::ffi::OsStr::new(" ")).into_string().unwrap();
        let usual = "--input-format stream-json --output-format stream-json --permission-prompt-tool stdio";
        assert_eq!(argv("claude --model x", None), format!("claude --model x {usual} --print --verbose"));
        assert_eq!(argv("claude -p --verbose", Some("c")), format!("claude -p --verbose {usual} --resume=c"));
        let own = "npx claude-code --permission-prompt-tool=mcp__a --output-format=stream-json";
        assert_eq!(argv(own, None), format!("{own} --input-format stream-json --print --verbose"));
    }

    #[test]
    fn a_command_that_says_what_only_we_can_say_is_refused() {
        assert!(recipe("claude --model x").check().is_ok());
        for (line, word) in [("claude -c", "-c"), ("claude --resume=x", "--resume"), ("claude --session-id x", "--session-id")] {
            assert!(matches!(recipe(line).check(), Err(Error::Conversation(said)) if said == word), "{line}");
        }
        for line in ["claude --output-format json", "claude --input-format=text", "claude mcp list"] {
            assert!(matches!(recipe(line).check(), Err(Error::Format)), "{line}");
        }
    }
}
