//! A directory for each agent: `ROOT/TENANT/NAME/{config,tmp,workspace}`, locked while its agent runs.
//!
//! An agent whose name is taken gets the next one, `NAME~2`; without a name, `_1`, `_2` and so on. Who resumes a session gets the
//! directory that has it.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use agent_sidecar_core::launch::Launch;
use agent_sidecar_core::update::Start;
use agent_sidecar_core::who::{Sources, Who};

use super::{ANSWER, digest, within};
use crate::config::Config;
use crate::conversation::{settled, unlock_all};
use crate::hub::try_lock;
use crate::supervise::User;

/// Agents of one name, or of none, at once; and directories that are looked at for a session.
const MANY: usize = 1_024;
/// What a name may be made of as it is, and how long it may be.
const NAME: usize = 48;
/// Whose agents nobody knows. Like the numbers of those without a name, no name begins with it.
const NOBODY: &str = "_";
/// What an agent has left is removed in this time, or the exit waits no longer.
const REMOVAL: Duration = Duration::from_secs(20);
/// What is being removed.
const GONE: &str = ".gone~";

/// What the configuration says of them.
#[derive(Clone, Debug)]
pub(crate) struct AgentDirs {
    pub(crate) root: PathBuf,
    pub(crate) name: Option<Sources>,
    pub(crate) workspace: Workspace,
    pub(crate) remove: bool,
}

/// Whether an agent works in its own directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workspace {
    /// Where the app gave it no other.
    Auto,
    Always,
    Never,
}

/// An agent's own directory.
#[derive(Debug)]
pub(crate) struct Home {
    dir: PathBuf,
    /// None where another agent has it, too: both resume the same session.
    lock: Option<File>,
    remove: bool,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) cwd: Option<PathBuf>,
}

impl Home {
    /// Finds or makes the one for this agent, within a bounded time. Who is started by an agent that has one is at home there.
    /// `user`: as whom the agent runs, if not as we do.
    pub(crate) fn open(
        config: &Config,
        who: &Who,
        launch: &Launch,
        argv: &[OsString],
        user: Option<&User>,
    ) -> Option<io::Result<Home>> {
        let dirs = config.agent_dirs()?;
        if is_within(&dirs.root) {
            return None;
        }
        let name = dirs.name.as_ref().and_then(|sources| super::known::first(config, argv, sources));
        let (tenant, start, resume) = (who.tenant.clone(), launch.start, launch.resume.clone());
        let user = user.filter(|user| !user.is_us()).cloned();
        let missing = user.as_ref().map_or(Vec::new(), |user| user.missing_for_dirs(dirs.remove));
        if !missing.is_empty() {
            let what = format!("directories of another user cannot be made and looked into without {}", missing.join(", "));
            return Some(Err(io::Error::new(io::ErrorKind::PermissionDenied, what)));
        }
        let make = move || Home::make(&dirs, tenant.as_deref(), name.as_deref(), start, resume.as_deref(), user.as_ref());
        let made = within(ANSWER, make);
        Some(made.unwrap_or_else(|| Err(io::Error::new(io::ErrorKind::TimedOut, "the file system does not answer"))))
    }

    fn make(
        dirs: &AgentDirs,
        tenant: Option<&str>,
        name: Option<&str>,
        start: Start,
        resume: Option<&str>,
        user: Option<&User>,
    ) -> io::Result<Home> {
        // A link below the root is somebody's idea; the root's own place is the operator's.
        let root = std::path::absolute(&dirs.root)?;
        let way = if user.is_some() { Reach::Through } else { Reach::Ours };
        make_root(&root, way)?;
        let tenant = root.join(tenant.map_or_else(|| NOBODY.to_owned(), safe));
        private(&tenant, way)?;
        let (dir, lock) = match resume.and_then(|id| with_session(&tenant, id)) {
            // Where its session is, there it has to be.
            Some(dir) => {
                private(&dir, way)?;
                let lock = take(&dir)?;
                (dir, lock)
            }
            None => free(&tenant, name, start, way)?,
        };
        if let Some(shut) = user.and_then(|user| shut(&dir, user)) {
            tracing::warn!(
                dir = %shut.display(),
                "the agent's user cannot pass through this directory to its own; let others pass (chmod o+x), or choose another --agent-dirs"
            );
        }
        let parts = ["config", "tmp", "workspace"].map(|part| dir.join(part));
        for part in &parts {
            // One that was killed could not clear up.
            if dirs.remove && lock.is_some() && part.exists() {
                discard(part, &tenant)?;
            }
            private(part, user.map_or(Reach::Ours, Reach::Of))?;
        }
        tidy(tenant);
        let [config, tmp, workspace] = parts;
        let unset = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
        let mut env: Vec<(OsString, OsString)> = [("CLAUDE_CONFIG_DIR", config), ("TMPDIR", tmp)]
            .into_iter()
            .filter(|(name, _)| unset(name))
            .map(|(name, path)| (name.into(), path.into()))
            .collect();
        let moves = match dirs.workspace {
            Workspace::Auto => inherited(),
            Workspace::Always => true,
            Workspace::Never => false,
        };
        if moves {
            env.push(("PWD".into(), workspace.clone().into()));
        }
        Ok(Home { dir, remove: dirs.remove && lock.is_some(), lock, env, cwd: moves.then_some(workspace) })
    }

    /// When nothing of the agent is left, or it was never started.
    pub(crate) fn close(self) {
        drop(self);
    }
}

/// The directories of agents that are told apart by their names, for whoever moves what is in them while nobody is there.
#[derive(Clone, Debug)]
pub(crate) struct Homes {
    dirs: AgentDirs,
    tenant: Option<String>,
    user: Option<User>,
    /// Without a link in it: that was so before an agent could make one.
    root: PathBuf,
}

impl Homes {
    /// As [`Home::open`] finds them. `None`: agents have none.
    pub(crate) fn find(config: &Config, argv: &[OsString], user: &User) -> Option<Homes> {
        // One that is named for all of them is no agent's own.
        let named = std::env::var_os("CLAUDE_CONFIG_DIR").is_some_and(|dir| !dir.is_empty());
        let dirs = config.agent_dirs().filter(|dirs| !named && !is_within(&dirs.root))?;
        let root = settled(&std::path::absolute(&dirs.root).ok()?);
        let tenant = super::find(config, argv, false).0.tenant;
        Some(Homes { dirs, tenant, user: (!user.is_us()).then(|| user.clone()), root })
    }

    fn tenant(&self) -> PathBuf {
        self.root.join(self.tenant.as_deref().map_or_else(|| NOBODY.to_owned(), safe))
    }

    /// What agents of this name have, the first first: it is there or not.
    fn of(&self, name: &str) -> Vec<PathBuf> {
        let (tenant, name) = (self.tenant(), safe(name));
        let more = (2..=MANY).map(|n| tenant.join(format!("{name}~{n}"))).take_while(|dir| fs::symlink_metadata(dir).is_ok());
        std::iter::once(tenant.join(&name)).chain(more).collect()
    }

    /// Where the agent of this name is that resumes this session, or begins.
    pub(crate) fn at(&self, name: &str, session: Option<&str>) -> PathBuf {
        let mut all = self.of(name);
        let found = session.and_then(|id| all.iter().position(|dir| has_session(dir, id)));
        all.swap_remove(found.unwrap_or_default())
    }

    /// Whether no agent of this name runs.
    pub(crate) fn are_free(&self, name: &str) -> io::Result<bool> {
        Ok(self.locked(name)?.is_some())
    }

    /// All that agents of this name have, kept from them. `None`: one runs.
    fn locked(&self, name: &str) -> io::Result<Option<Vec<(PathBuf, File)>>> {
        let is_dir = |dir: &PathBuf| fs::symlink_metadata(dir).is_ok_and(|found| found.is_dir());
        let there = self.of(name).into_iter().filter(is_dir);
        there.map(|dir| Ok(take(&dir)?.map(|lock| (dir, lock)))).collect()
    }

    /// Makes the first of this name, and keeps agents out of it. `None`: one has it.
    pub(crate) fn make(&self, name: &str) -> io::Result<Option<Home>> {
        let dirs = AgentDirs { root: self.root.clone(), workspace: Workspace::Never, remove: false, ..self.dirs.clone() };
        let home = Home::make(&dirs, self.tenant.as_deref(), Some(name), Start::Fresh, None, self.user.as_ref())?;
        Ok((home.dir == self.at(name, None)).then_some(home))
    }

    /// Removes all that agents of this name have. Whether that could be: none of them runs.
    pub(crate) fn remove(&self, name: &str) -> io::Result<bool> {
        let Some(locked) = self.locked(name)? else { return Ok(false) };
        for (dir, _lock) in locked {
            let gone = discard(&dir, &self.tenant())?;
            if clear(&gone).is_err() {
                unlock_all(&gone);
                clear(&gone)?;
            }
        }
        Ok(true)
    }
}

/// Whoever is not started leaves nothing, either.
impl Drop for Home {
    fn drop(&mut self) {
        let (dir, lock) = (self.dir.clone(), self.lock.take());
        if !self.remove {
            return;
        }
        let remove = move || {
            let removed = dir.parent().map_or(Ok(()), |tenant| discard(&dir, tenant).and_then(|gone| clear(&gone)));
            if let Err(error) = removed {
                tracing::warn!(dir = %dir.display(), %error, "the agent's own directory is not wholly removed");
            }
            // Only now may the next one have it.
            drop(lock);
        };
        if within(REMOVAL, remove).is_none() {
            tracing::warn!(dir = %self.dir.display(), "the agent's own directory is not removed in time; the next agent goes on with that");
        }
    }
}

/// Makes what is not there of the way to the root. A umask that lets nobody through would shut the agent out.
fn make_root(root: &Path, way: Reach<'_>) -> io::Result<()> {
    let missing: Vec<&Path> = root.ancestors().take_while(|part| !part.exists()).collect();
    for dir in missing.into_iter().rev() {
        if fs::create_dir(dir).is_ok() && matches!(way, Reach::Through) {
            let mode = fs::symlink_metadata(dir)?.mode() & 0o777;
            fs::set_permissions(dir, fs::Permissions::from_mode(mode | 0o711))?;
        }
    }
    fs::create_dir_all(root)
}

/// Where this user gets no further on the way to a directory.
fn shut(dir: &Path, user: &User) -> Option<PathBuf> {
    let dir = dir.canonicalize().ok()?;
    dir.ancestors().find(|part| fs::metadata(part).is_ok_and(|found| !user.may_pass(&found))).map(Path::to_owned)
}

/// The first of a name that nobody has. Who goes on without saying with what, goes on where an agent last was.
fn free(tenant: &Path, name: Option<&str>, start: Start, way: Reach<'_>) -> io::Result<(PathBuf, Option<File>)> {
    if name.is_none() && matches!(start, Start::Continue | Start::Fork) {
        let mut known = known(tenant);
        known.sort_by_key(|dir| std::cmp::Reverse(fs::metadata(dir.join(LOCK)).and_then(|found| found.modified()).ok()));
        for dir in known {
            if let Some(lock) = take(&dir)? {
                return Ok((dir, Some(lock)));
            }
        }
    }
    let name = name.map(safe);
    for n in 1..=MANY {
        let dir = tenant.join(match &name {
            Some(name) if n == 1 => name.clone(),
            Some(name) => format!("{name}~{n}"),
            None => format!("{NOBODY}{n}"),
        });
        private(&dir, way)?;
        if let Some(lock) = take(&dir)? {
            return Ok((dir, Some(lock)));
        }
    }
    Err(io::Error::other(format!("{MANY} agents have directories of this name already")))
}

const LOCK: &str = ".lock";

/// The lock of a directory, unless another agent has it.
fn take(dir: &Path) -> io::Result<Option<File>> {
    let path = dir.join(LOCK);
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(&path);
    let file = match file {
        // Removed since it was found.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let ours =
        try_lock(&file)? && fs::symlink_metadata(&path).is_ok_and(|found| found.ino() == file.metadata().map_or(0, |f| f.ino()));
    if ours {
        file.set_modified(SystemTime::now())?;
    }
    Ok(ours.then_some(file))
}

/// The directories of a tenant's agents.
fn known(tenant: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(tenant).into_iter().flatten().flatten().take(MANY);
    let named = entries.filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    named.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// The one where this session was.
fn with_session(tenant: &Path, id: &str) -> Option<PathBuf> {
    // What is a path, or no id at all, is nowhere here.
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return None;
    }
    known(tenant).into_iter().find(|dir| has_session(dir, id))
}

fn has_session(dir: &Path, id: &str) -> bool {
    let file = format!("{id}.jsonl");
    let projects = fs::read_dir(dir.join("config/projects")).into_iter().flatten().flatten().take(MANY);
    projects.into_iter().any(|project| fs::symlink_metadata(project.path().join(&file)).is_ok_and(|found| found.is_file()))
}

/// Who gets into a directory.
#[derive(Clone, Copy)]
enum Reach<'a> {
    /// We alone.
    Ours,
    /// It is ours, and others may pass through to what is theirs.
    Through,
    /// The agent's user alone, and root.
    Of(&'a User),
}

/// Makes a directory, or finds it, and nobody else gets into it.
fn private(dir: &Path, reach: Reach<'_>) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(dir)?;
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    let theirs = matches!(reach, Reach::Of(user) if found.uid() == user.uid());
    if !found.is_dir() || !(ours || theirs) {
        let what = format!("{} is not a directory of this user", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    // A volume's group, a umask that was wider, an agent that ran as somebody else.
    let mode = if matches!(reach, Reach::Through) { 0o711 } else { 0o700 };
    if found.mode() & 0o777 != mode {
        fs::set_permissions(dir, fs::Permissions::from_mode(mode))?;
    }
    if let (Reach::Of(user), false) = (reach, theirs) {
        // What is above it is ours: nobody can have put a link here.
        std::os::unix::fs::chown(dir, Some(user.uid()), Some(user.gid()))?;
    }
    Ok(())
}

/// Removes it for whoever comes next, in one step; to be cleared away. A kill in between leaves that to the next one.
fn discard(dir: &Path, tenant: &Path) -> io::Result<PathBuf> {
    let gone = tenant.join(format!("{GONE}{:016x}", crate::supervise::random()));
    fs::rename(dir, &gone)?;
    Ok(gone)
}

fn clear(gone: &Path) -> io::Result<()> {
    match fs::remove_dir_all(gone) {
        // Another agent tidies up at the same time.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        cleared => cleared,
    }
}

/// Clears away what somebody was killed over. That may be much: no agent waits for it.
fn tidy(tenant: PathBuf) {
    let tidy = move || {
        for entry in fs::read_dir(tenant).into_iter().flatten().flatten().take(MANY) {
            if entry.file_name().as_encoded_bytes().starts_with(GONE.as_bytes()) {
                clear(&entry.path()).ok();
            }
        }
    };
    // Without a thread the next agent tidies up.
    std::thread::Builder::new().name(String::from("tidy")).spawn(tidy).ok();
}

/// Whether we were started by an agent with a directory of its own, which a tool of it finds in its environment.
fn is_within(root: &Path) -> bool {
    let Ok(root) = std::path::absolute(root) else { return false };
    ["CLAUDE_CONFIG_DIR", "TMPDIR"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|dir| Path::new(&dir).starts_with(&root)))
}

/// Whether the app has left the working directory as its own is. Of PID 1 nobody knows: `/` is what nobody chose.
fn inherited() -> bool {
    let Ok(here) = std::env::current_dir() else { return false };
    let parent = rustix::process::getppid().and_then(|pid| fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok());
    here == Path::new("/") || parent.is_some_and(|parent| parent == here)
}

/// A name as the name of a file: itself where it is plain and small, else what is plain of it and a hash behind a mark that no plain name
/// has. Letters are small ones, for file systems that take them for the same.
fn safe(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if begins && name.len() <= NAME && name.bytes().all(plain) {
        return name.to_owned();
    }
    let kept = name.chars().take(NAME / 2).map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    format!("{}~{}", kept.collect::<String>(), digest(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-dirs-{name}-{}", std::process::id()));
        fs::remove_dir_all(&dir).ok();
        dir
    }

    fn dirs(root: &Path, remove: bool) -> AgentDirs {
        AgentDirs { root: root.to_owned(), name: None, workspace: Workspace::Always, remove }
    }

    fn name(home: &Home) -> String {
        let parts: Vec<_> = home.dir.components().rev().take(2).map(|part| part.as_os_str().to_string_lossy()).collect();
        format!("{}/{}", parts[1], parts[0])
    }

    #[test]
    fn each_agent_that_runs_has_one_of_its_own() {
        let root = scratch("own");
        let open = |tenant: Option<&str>, name: Option<&str>| {
            Home::make(&dirs(&root, false), tenant, name, Start::Fresh, None, None).unwrap()
        };
        let homes = [
            open(Some("acme"), Some("mailer")),
            open(Some("acme"), Some("mailer")),
            open(Some("globex"), Some("mailer")),
            open(Some("acme"), None),
            open(Some("acme"), None),
            open(None, None),
        ];
        let names: Vec<String> = homes.iter().map(name).collect();
        assert_eq!(names, ["acme/mailer", "acme/mailer~2", "globex/mailer", "acme/_1", "acme/_2", "_/_1"]);
        for part in ["", "config", "tmp", "workspace"] {
            assert_eq!(fs::metadata(homes[1].dir.join(part)).unwrap().mode() & 0o7777, 0o700);
        }
        assert_eq!(homes[0].cwd, Some(homes[0].dir.join("workspace")));
        drop(homes);
        assert_eq!(name(&open(Some("acme"), Some("mailer"))), "acme/mailer", "it is free again");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_session_is_resumed_where_it_was() {
        let root = scratch("resume");
        let open = |start, resume| Home::make(&dirs(&root, false), Some("acme"), None, start, resume, None).unwrap();
        let (_first, second) = (open(Start::Fresh, None), open(Start::Fresh, None));
        let project = second.dir.join("config/projects/-work");
        fs::create_dir_all(&project).unwrap();
        fs::write(project.join("0b-1.jsonl"), "").unwrap();
        let shared = open(Start::Resume, Some("0b-1"));
        assert_eq!((&shared.dir, shared.lock.is_none()), (&second.dir, true), "also while the first still runs");
        drop((shared, second));
        assert_eq!(name(&open(Start::Fork, Some("0b-1"))), "acme/_2");
        for id in ["0b-2", "../0b-1", "/0b-1", ""] {
            assert_eq!(name(&open(Start::Resume, Some(id))), "acme/_2", "{id}: the lowest that is free");
        }
        let third = (open(Start::Fresh, None), open(Start::Fresh, None)).1;
        assert_eq!(name(&third), "acme/_3");
        let lock = File::options().write(true).open(third.dir.join(LOCK)).unwrap();
        lock.set_modified(SystemTime::now() + std::time::Duration::from_secs(60)).unwrap();
        drop(third);
        assert_eq!(name(&open(Start::Continue, None)), "acme/_3", "where somebody last was");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn it_goes_with_the_agent_if_it_is_to() {
        let root = scratch("remove");
        let home = Home::make(&dirs(&root, true), Some("acme"), None, Start::Fresh, None, None).unwrap();
        let (dir, outside) = (home.dir.clone(), root.join("outside"));
        fs::write(&outside, "stays").unwrap();
        std::os::unix::fs::symlink(&root, dir.join("workspace/up")).unwrap();
        fs::create_dir(root.join(format!("acme/{GONE}1"))).unwrap();
        home.close();
        assert!(!dir.exists() && outside.exists());
        let mut killed = Home::make(&dirs(&root, true), Some("acme"), None, Start::Fresh, None, None).unwrap();
        fs::write(dir.join("workspace/secret"), "").unwrap();
        killed.remove = false;
        drop(killed);
        let mut next = Home::make(&dirs(&root, true), Some("acme"), None, Start::Fresh, None, None).unwrap();
        next.remove = false;
        assert!(
            dir.join("workspace").exists() && !dir.join("workspace/secret").exists(),
            "whoever comes next finds nothing of it"
        );
        drop(next);
        drop(Home::make(&dirs(&root, true), Some("acme"), None, Start::Fresh, None, None).unwrap());
        let cleared = (0..3_000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            !root.join(format!("acme/{GONE}1")).exists()
        });
        assert!(cleared, "what a kill has left is cleared away");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_link_in_the_place_of_a_directory_is_refused() {
        let root = scratch("link");
        let elsewhere = root.join("elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, root.join("acme")).unwrap();
        let refused = Home::make(&dirs(&root, false), Some("acme"), None, Start::Fresh, None, None);
        assert!(refused.unwrap_err().to_string().contains("is not a directory of this user"));
        fs::remove_dir_all(root).unwrap();
    }

    proptest! {
        #[test]
        fn names_are_plain_and_two_of_them_stay_two(a in any::<String>(), b in "[a-zA-Z0-9._~/-]{0,60}") {
            for name in [&a, &b] {
                let safe = safe(name);
                prop_assert!(!safe.is_empty() && safe.len() <= 64 && !safe.starts_with(['.', '_']), "{safe}");
                prop_assert!(safe.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._~".contains(&b)), "{safe}");
                let slot = safe.rsplit_once('~').is_some_and(|(_, tail)| tail.len() < 32);
                prop_assert!(!slot, "{safe} would be one more of another name");
            }
            prop_assert_eq!(safe(&a) == safe(&b), a == b);
            prop_assert_eq!(safe(&b) == safe(&b.to_ascii_lowercase()), b == b.to_ascii_lowercase());
        }
    }
}
