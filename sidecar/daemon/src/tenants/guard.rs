//! Sees to it that no two tenants share what the CLI keeps: its config directory, a working directory, memory files, a session.
//!
//! What each tenant has used is in a file beside the hub's state, under a lock that is held for one reading and one writing. An agent
//! without a tenant is not looked at, unless its tenant was to be read from somewhere: then it is nobody's, who is a tenant of his own.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use agent_sidecar_core::launch::Launch;
use agent_sidecar_core::limit::Mode;
use agent_sidecar_core::metric;
use agent_sidecar_core::update::Start;
use agent_sidecar_core::who::{Guarded, Shared};
use agent_sidecar_core::{Input, Stop};

use super::book::{Book, Claim, Claimant, Conflict, Identity};
use super::{ANSWER, within};
use crate::files;
use crate::http::visit_blocking;
use crate::hub::{Place, lives, lock_named, lock_within};
use crate::supervise::{Handle, TERM, User, unix};

/// Transcripts that are looked at for the one that would be continued.
const TRANSCRIPTS: usize = 10_000;
/// Fifty agents that start at once on a machine that has other work hold each other up for seconds. Whoever must not start before it is known
/// what is whose waits so long for the book, and whoever is not waited for.
const PATIENCE: Duration = Duration::from_secs(4);
/// What is still to be written down when the agent has ended is waited for so long.
const LAST: Duration = Duration::from_secs(1);
/// Sessions that wait to be written down. One process has few.
const LETTERS: usize = 64;

/// Where an agent works and keeps what it keeps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    pub(crate) cwd: PathBuf,
    /// None where nobody knows: without a home.
    pub(crate) config: Option<PathBuf>,
}

impl Places {
    /// As the CLI finds them, with this in its environment.
    pub(crate) fn of(env: &[(std::ffi::OsString, std::ffi::OsString)], cwd: Option<&Path>) -> Places {
        let variable = |name: &str| {
            let ours = env.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.clone());
            ours.or_else(|| std::env::var_os(name)).filter(|value| !value.is_empty()).map(PathBuf::from)
        };
        let cwd = cwd.map_or_else(|| std::env::current_dir().unwrap_or_default(), Path::to_owned);
        let config = variable("CLAUDE_CONFIG_DIR").or_else(|| Some(variable("HOME")?.join(".claude")));
        Places { config: config.map(|config| cwd.join(config)), cwd }
    }

    /// Where its transcripts are: the CLI makes a name of the working directory.
    pub(crate) fn project(&self) -> Option<PathBuf> {
        let cwd = fs::canonicalize(&self.cwd).unwrap_or_else(|_| self.cwd.clone());
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let name: String = cwd.to_str()?.chars().map(plain).collect();
        Some(self.config.as_ref()?.join("projects").join(name))
    }
}

/// An agent that was not started.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "the agent of {} was not started: {} {}; give each tenant its own (CLAUDE_CONFIG_DIR and a working directory, or --agent-dirs), or set `tenants.guard` to shadow",
    tenant(.owner), what(.first), also(.more)
)]
pub(crate) struct TenantsShare {
    owner: String,
    first: Conflict,
    more: Vec<Conflict>,
}

impl TenantsShare {
    pub(crate) fn kinds(&self) -> impl Iterator<Item = (Shared, &str)> {
        std::iter::once(&self.first).chain(&self.more).map(|conflict| (conflict.kind, conflict.owner.as_str()))
    }
}

fn tenant(name: &str) -> String {
    if name.is_empty() { String::from("no known tenant") } else { format!("tenant `{name}`") }
}

fn what(Conflict { kind, key, owner, .. }: &Conflict) -> String {
    let what = match kind {
        Shared::ConfigDir => "its config directory",
        Shared::Cwd => "its working directory",
        Shared::Memory => "a memory file that it would read and may write",
        Shared::Session => "the session that it would go on with",
    };
    format!("{what}, {key}, is that of {}", tenant(owner))
}

fn also(more: &[Conflict]) -> String {
    let kinds: Vec<&str> = more.iter().map(|conflict| conflict.kind.as_str()).collect();
    if kinds.is_empty() { String::new() } else { format!("(and {})", kinds.join(", ")) }
}

/// What happens while the agent runs that concerns us.
enum Letter {
    /// Whom it works for is as known as it will be.
    Known,
    Session(String),
    /// The agent has ended: whoever sends this waits until all before it is done.
    End(SyncSender<()>),
}

/// See the module's head.
#[derive(Clone)]
pub(crate) struct Guard {
    inner: Arc<Inner>,
}

struct Inner {
    place: Place,
    run: String,
    mode: Mode,
    claims: Vec<Claim>,
    /// For whom; none while that is not known.
    owner: Mutex<Option<String>>,
    letters: SyncSender<Letter>,
    received: Mutex<Option<Receiver<Letter>>>,
    /// What belongs to whom could not be looked up before the start.
    blind: AtomicBool,
}

impl Guard {
    /// Looks at what the agent is going to use, as whom it runs; claims it where its tenant is known already.
    ///
    /// # Errors
    /// It is not to be started.
    pub(crate) fn begin(
        place: &Place,
        run: &str,
        mode: Mode,
        owner: Option<String>,
        launch: &Launch,
        places: &Places,
        agent: &User,
    ) -> Result<(Guard, Vec<(Shared, String)>), TenantsShare> {
        let (launch, places, agent) = (launch.clone(), places.clone(), agent.clone());
        let claims = within(ANSWER, move || claims(&launch, &places, &agent)).unwrap_or_else(|| {
            tracing::warn!("a file system does not answer: whether tenants share directories on it is not known");
            Vec::new()
        });
        let (letters, received) = sync_channel(LETTERS);
        let inner = Inner {
            place: place.clone(),
            run: run.to_owned(),
            mode,
            claims,
            owner: Mutex::new(owner.clone()),
            letters,
            received: Mutex::new(Some(received)),
            blind: AtomicBool::new(false),
        };
        let guard = Guard { inner: Arc::new(inner) };
        let Some(owner) = owner else { return Ok((guard, Vec::new())) };
        let (claimant, by) = (guard.clone(), owner.clone());
        let patient = mode == Mode::Enforce;
        let known = within(ANSWER, move || claimant.claim(&by, &claimant.inner.claims, patient)).flatten();
        guard.inner.blind.store(known.is_none(), Relaxed);
        let mut conflicts = known.unwrap_or_default();
        if mode == Mode::Enforce && !conflicts.is_empty() {
            let first = conflicts.remove(0);
            return Err(TenantsShare { owner, first, more: conflicts });
        }
        for conflict in conflicts.iter().filter(|conflict| conflict.fresh) {
            let whose = tenant(lock(&guard.inner.owner).as_deref().unwrap_or_default());
            tracing::warn!("this agent works for {whose}, and {}; each can read there what the other keeps", what(conflict));
        }
        let told = conflicts.into_iter().map(|conflict| (conflict.kind, conflict.owner)).collect();
        Ok((guard, told))
    }

    /// Whether it was started without anybody knowing what is whose.
    pub(crate) fn is_blind(&self) -> bool {
        self.inner.blind.load(Relaxed)
    }

    /// Writes down what the agent's sessions are called, and looks at it when it is known for whom it works.
    pub(crate) fn watch(&self, handle: Handle) {
        let Some(letters) = lock(&self.inner.received).take() else { return };
        let guard = self.clone();
        let started = std::thread::Builder::new().name(String::from("guard")).stack_size(256 * 1024).spawn(move || {
            let mut sessions: Vec<Claim> = Vec::new();
            for letter in letters {
                match letter {
                    Letter::Known => {
                        let Some(who) = visit_blocking(&handle, |monitor, _| monitor.who().clone()) else { return };
                        let owner = who.tenant.unwrap_or_default();
                        *lock(&guard.inner.owner) = Some(owner.clone());
                        let claims = [&guard.inner.claims[..], &sessions].concat();
                        guard.told(&handle, guard.claim(&owner, &claims, true));
                    }
                    Letter::End(done) => {
                        // Nobody waits any more: then it took too long.
                        done.send(()).ok();
                    }
                    Letter::Session(id) => {
                        let claim = Claim { kind: Shared::Session, key: id, file: None };
                        let owner = lock(&guard.inner.owner).clone();
                        match owner {
                            Some(owner) => guard.told(&handle, guard.claim(&owner, &[claim], true)),
                            None if sessions.len() < LETTERS => sessions.push(claim),
                            None => {}
                        }
                    }
                }
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "tenants' sessions are not told apart");
        }
    }

    pub(crate) fn known(&self) {
        // Never waits: it is the monitor that calls.
        self.inner.letters.try_send(Letter::Known).ok();
    }

    pub(crate) fn session(&self, id: &str) {
        self.inner.letters.try_send(Letter::Session(id.to_owned())).ok();
    }

    /// The agent has ended: till now it has used what it has.
    pub(crate) fn end(&self) {
        let (done, all) = sync_channel(1);
        // A short one may be over before it is known what its session is called.
        if self.inner.letters.try_send(Letter::End(done)).is_ok() {
            all.recv_timeout(LAST).ok();
        }
        let (guard, now) = (self.clone(), unix().as_secs_f64());
        let written = within(ANSWER, move || guard.write(false, |book| book.touch(&guard.inner.run, now)));
        if !matches!(written, Some(Ok(()))) {
            tracing::debug!(?written, "when this tenant was last here is not written down");
        }
    }

    /// Found out while the agent runs.
    fn told(&self, handle: &Handle, conflicts: Option<Vec<Conflict>>) {
        let Some(conflicts) = conflicts else {
            handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["tenants"], 1.0));
            return;
        };
        let enforced = self.inner.mode == Mode::Enforce;
        for conflict in &conflicts {
            let end = if enforced { "; it is ended" } else { "" };
            if conflict.fresh || enforced {
                let whose = tenant(lock(&self.inner.owner).as_deref().unwrap_or_default());
                tracing::warn!("this agent works for {whose}, and {}{end}", what(conflict));
            }
            let (kind, owner) = (conflict.kind, conflict.owner.clone());
            let action = if enforced { Guarded::Ended } else { Guarded::Flagged };
            visit_blocking(handle, move |monitor, now| monitor.handle(now, Input::Conflict { kind, owner: &owner, action }));
        }
        if enforced && !conflicts.is_empty() {
            handle.visit(|monitor, now| {
                monitor.handle(now, Input::Stop(Stop::Signal(agent_sidecar_core::Signal(TERM))));
            });
        }
    }

    /// What of it is another's. Where that cannot be known (none), the agent matters more.
    fn claim(&self, owner: &str, claims: &[Claim], patient: bool) -> Option<Vec<Conflict>> {
        let inner = &self.inner;
        let now = unix().as_secs_f64();
        let lives = |run: &str| run == inner.run || lives(&inner.place, run);
        let stands = |path: &str| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        let by = Claimant { owner, run: &inner.run, now, lives: &lives, stands: &stands };
        let all = inner.mode == Mode::Enforce;
        let claimed = self.write(patient, |book| {
            let conflicts = book.claim(&by, claims, all);
            // What the CLI has made by now was made while we are here.
            book.touch(&inner.run, now);
            conflicts
        });
        claimed.inspect_err(|error| tracing::warn!(%error, "whether tenants share anything is not known")).ok()
    }

    fn write<T>(&self, patient: bool, change: impl FnOnce(&mut Book) -> T) -> io::Result<T> {
        let (dir, name) = (&self.inner.place.dir, "tenants.lock");
        let _locked = if patient { lock_within(PATIENCE, dir, name) } else { lock_named(dir, name) }?;
        let path = dir.join("tenants.json");
        let before = match files::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::error!(path = %path.display(), %error, "what belongs to which tenant cannot be read: it is learnt anew");
                // For people to look at.
                fs::rename(&path, path.with_extension("broken")).ok();
                Book::default()
            }),
            Err(_) => Book::default(),
        };
        let mut book = before.clone();
        let changed = change(&mut book);
        if book != before {
            let new = path.with_extension("tmp");
            let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
            file.write_all(&serde_json::to_vec(&book)?)?;
            fs::rename(&new, &path)?;
        }
        Ok(changed)
    }
}

/// What an agent is going to use, before it does.
fn claims(launch: &Launch, places: &Places, agent: &User) -> Vec<Claim> {
    let mut claims = Vec::new();
    let mut path = |kind: Shared, path: &Path| {
        let claim = Claim { kind, key: path.display().to_string(), file: identity(path) };
        if !claims.contains(&claim) {
            claims.push(claim);
        }
    };
    let cwd = resolved(&places.cwd);
    let config = places.config.as_deref().map(resolved);
    if let Some(config) = &config {
        path(Shared::ConfigDir, config);
    }
    // What is everybody's is nobody's: who works there works nowhere.
    if cwd != Path::new("/") {
        path(Shared::Cwd, &cwd);
    }
    // What is within these two is told with them.
    for file in memory(&cwd, config.as_deref(), places, agent) {
        let within = |dir: &Path| file.starts_with(dir);
        if !within(&cwd) && !config.as_deref().is_some_and(within) {
            path(Shared::Memory, &file);
        }
    }
    for id in sessions(launch, places) {
        claims.push(Claim { kind: Shared::Session, key: id, file: None });
    }
    claims
}

/// What the CLI reads as the agent's memory, and its user could write: an operator's file is for all.
fn memory(cwd: &Path, config: Option<&Path>, places: &Places, agent: &User) -> Vec<PathBuf> {
    let of_project =
        cwd.ancestors().flat_map(|dir| ["CLAUDE.md", "CLAUDE.local.md", ".claude/CLAUDE.md"].map(|name| dir.join(name)));
    let of_user = config.map(|config| config.join("CLAUDE.md"));
    let learnt = places.project().map(|project| project.join("memory"));
    let files = of_project.chain(of_user).chain(learnt).filter_map(|file| fs::canonicalize(file).ok());
    files.filter(|file| agent.may_write_to(file)).collect()
}

/// The sessions that it would go on with, or take the name of.
fn sessions(launch: &Launch, places: &Places) -> Vec<String> {
    let stem = |path: &Path| path.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
    let named = launch.resume.iter().chain(&launch.session).filter_map(|id| {
        // A transcript can be named by its path, too.
        if id.contains('/') { stem(Path::new(id)) } else { Some(id.clone()) }
    });
    let latest = || {
        let entries = fs::read_dir(places.project()?).ok()?.flatten().take(TRANSCRIPTS);
        let transcripts = entries.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "jsonl"));
        let dated = transcripts.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())));
        stem(&dated.max()?.1)
    };
    let goes_on = launch.resume.is_none() && matches!(launch.start, Start::Continue | Start::Fork);
    named.chain(if goes_on { latest() } else { None }).collect()
}

/// Without links and dots, as far as it is there.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for there in path.ancestors() {
        if let Ok(real) = fs::canonicalize(there) {
            let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
            return rest.components().fold(real, |at, part| match part {
                std::path::Component::ParentDir => at.parent().map(Path::to_owned).unwrap_or(at),
                part => at.join(part),
            });
        }
    }
    path
}

fn identity(path: &Path) -> Option<Identity> {
    let found = fs::metadata(path).ok()?;
    let made = found.created().ok().and_then(|made| Some(made.duration_since(UNIX_EPOCH).ok()?.as_secs_f64()));
    Some(Identity { device: found.dev(), inode: found.ino(), made })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-guard-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::canonicalize(dir).unwrap()
    }

    fn launch(line: &str) -> Launch {
        let argv: Vec<std::ffi::OsString> = line.split(' ').map(Into::into).collect();
        Launch::of(&argv, false, false)
    }

    fn said(root: &Path, line: &str, cwd: &str, config: &str) -> Vec<String> {
        said_of(root, line, cwd, config, &User::ours())
    }

    fn said_of(root: &Path, line: &str, cwd: &str, config: &str, agent: &User) -> Vec<String> {
        let places = Places { cwd: root.join(cwd), config: Some(root.join(config)) };
        let below = |key: String| key.strip_prefix(&root.display().to_string()).map_or(key.clone(), str::to_owned);
        claims(&launch(line), &places, agent)
            .into_iter()
            .map(|claim| format!("{} {}", claim.kind.as_str(), below(claim.key)))
            .collect()
    }

    #[test]
    fn links_and_dots_lead_to_the_same_claim() {
        let root = scratch("links");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir_all(root.join("home")).unwrap();
        symlink(root.join("a"), root.join("link")).unwrap();
        for (cwd, config) in [("a/b", "home/.claude"), ("link/b", "link/../home/.claude"), ("a/b/../b", "home/x/../.claude")] {
            let expected = ["config_dir /home/.claude", "cwd /a/b"];
            // `link/..` is where the link leads to, and up.
            let config = if config.starts_with("link") { "a/../home/.claude" } else { config };
            assert_eq!(said(&root, "claude -p hi", cwd, config), expected, "{cwd} {config}");
        }
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn memory_that_others_may_read_and_sessions_that_others_have_are_claimed() {
        let root = scratch("memory");
        fs::create_dir_all(root.join("srv/acme")).unwrap();
        fs::write(root.join("srv/CLAUDE.md"), "").unwrap();
        fs::write(root.join("srv/acme/CLAUDE.md"), "").unwrap();
        fs::write(root.join("common.md"), "").unwrap();
        symlink(root.join("common.md"), root.join("srv/acme/CLAUDE.local.md")).unwrap();
        let expected = ["config_dir /config", "cwd /srv/acme", "memory /common.md", "memory /srv/CLAUDE.md"];
        let memory = said(&root, "claude -p hi", "srv/acme", "config");
        assert_eq!(memory, expected);
        // What another user may only read is the operator's.
        for (name, mode) in [("common.md", 0o644), ("srv/CLAUDE.md", 0o666)] {
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let others = said_of(&root, "claude -p hi", "srv/acme", "config", &User::stranger());
        assert_eq!(others, ["config_dir /config", "cwd /srv/acme", "memory /srv/CLAUDE.md"]);
        let sessions = |line: &str| -> Vec<String> {
            let all = said(&root, line, "srv/acme", "config");
            all.into_iter().filter_map(|one| one.strip_prefix("session ").map(str::to_owned)).collect()
        };
        assert_eq!(sessions("claude --resume a-b -p hi"), ["a-b"]);
        assert_eq!(sessions("claude --resume=/some/where/a-c.jsonl --fork-session"), ["a-c"]);
        assert_eq!(sessions("claude --session-id a-d -p hi"), ["a-d"]);
        assert!(sessions("claude --continue").is_empty(), "there is none yet");
        let places = Places { cwd: root.join("srv/acme"), config: Some(root.join("config")) };
        let project = places.project().unwrap();
        fs::create_dir_all(&project).unwrap();
        for (age, id) in [(60, "old"), (0, "new")] {
            let file = fs::File::create(project.join(format!("{id}.jsonl"))).unwrap();
            file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        assert_eq!(sessions("claude --continue -p hi"), ["new"]);
        fs::remove_dir_all(root).unwrap();
    }
}
