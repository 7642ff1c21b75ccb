//! Puts the shim in the place of a CLI, and the CLI back.
//!
//! ```text
//!   claude (CLI)  ──install──►  claude (a copy of us), claude.sidecar-real (the very file that was claude)  ──uninstall──►  claude (CLI)
//! ```
//!
//! There is no record of it anywhere: what stands at the two names is the whole state, so it cannot be out of date. The CLI gets its second
//! name before it loses its first, and each step is one call, so that whoever is killed leaves either the old or the new, and both work.
//! A package manager that puts a new CLI at the first name is right: the next `install` does the same again.
//!
//! A copy, because a link would have to be reachable, executable and of the same version for every user, mount and image layer that the
//! CLI itself is in; beside the CLI, because only there one rename is enough.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Access, AtFlags, CWD, FlockOperation};

use super::find::{REAL, beside, is_sidecar, real, unfinished};
use super::{NAMES, is_name};

/// A CLI says its version within 40 ms, on a cold disk within seconds.
const ANSWER: Duration = Duration::from_secs(20);
/// Another `install` in the same directory has this long.
const TURN: Duration = Duration::from_secs(30);
/// Not searched: what packages are copied and linked from, and the layers of other containers. Not all of `.cache`: Poetry has its
/// environments there, and Deno runs what it keeps there.
const ELSEWHERE: &[&str] = &[
    ".bun/install/cache",
    ".cache/uv",
    ".cache/yarn",
    ".local/share/containers",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/docker",
];

/// What to do, and where.
pub(crate) struct Request {
    pub(crate) undo: bool,
    pub(crate) all: bool,
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) print: bool,
}

/// One place, and what is to become of it.
enum Step {
    /// `stale` stands where the CLI is to go: of an earlier version, or the same file already.
    Put {
        version: String,
        real: Real,
    },
    /// The CLI stands beside a shim of another version.
    Renew {
        version: String,
    },
    InPlace {
        version: String,
    },
    /// Put there by hand: it finds a CLI on PATH.
    ByHand {
        real: PathBuf,
    },
    Restore,
    /// The CLI is in its place, and an older one was left beside it.
    Clean,
    Nothing,
}

/// What is at the second name of a CLI that is to be moved there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Real {
    Free,
    Same,
    Stale,
}

/// Why a place is left as it is.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("is no Claude CLI: {0}")]
    NoCli(String),
    #[error("is the sidecar, and its CLI is gone: neither {} nor another `claude` on PATH; install the package again", .0.display())]
    Gone(PathBuf),
    #[error("is a link to nothing: {0}")]
    Nothing(io::Error),
    #[error("starts a CLI by the name that it is called by itself, and would not under another; name what it starts: {0}")]
    ByName(String),
    #[error("is started as `node {}`, which the sidecar cannot stand in for; name a link to it, or set the path of the executable in the SDK", .0.display())]
    Script(PathBuf),
    #[error("was put there by hand: `install` left nothing beside it to put back")]
    NotOurs,
    #[error("another install is at work in {}", .0.display())]
    Busy(PathBuf),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl Trouble {
    /// Of what is only called like a CLI, or leads to one that is found by itself.
    fn is_of_something_else(&self) -> bool {
        match self {
            Trouble::NoCli(_) | Trouble::Nothing(_) | Trouble::ByName(_) | Trouble::Script(_) | Trouble::NotOurs => true,
            Trouble::Gone(_) | Trouble::Busy(_) | Trouble::Io { .. } => false,
        }
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Trouble {
    let what = what.into();
    move |source| Trouble::Io { what, source }
}

/// Does it, and says so, a line for each place. False if a place that was named, or that holds a CLI, is not as it was asked for.
pub(crate) fn perform(request: &Request, out: &mut impl Write) -> io::Result<bool> {
    let mut search = Search::default();
    for path in &request.paths {
        if path.is_dir() {
            search.below(path);
        } else {
            search.named.insert(path.clone());
        }
    }
    if request.all {
        search.everywhere();
    }
    let (mut well, mut seen, mut standing) = (true, BTreeSet::new(), 0);
    for (path, named) in search.named.iter().map(|path| (path, true)).chain(search.found.iter().map(|path| (path, false))) {
        let step = place(path).and_then(|place| {
            if !seen.insert(place.clone()) {
                return Ok(None);
            }
            let step = if request.print { plan(&place, request.undo) } else { carry_out(&place, request.undo) };
            step.map(|step| Some((place, step)))
        });
        match step {
            Ok(None) => {}
            Ok(Some((place, step))) => {
                standing += 1;
                say(&place, &step, request.print, out)?;
            }
            // Many things may be called like it: a directory of completions, a script that leads to one that was found.
            Err(trouble) if !named && trouble.is_of_something_else() => {
                writeln!(out, "skipped      {}: {trouble}", path.display())?;
            }
            Err(trouble) => {
                well = false;
                writeln!(out, "failed       {}: {trouble}", path.display())?;
            }
        }
    }
    for path in &search.left {
        writeln!(out, "left over    {}: its package was removed; delete it, too, or move it back", path.display())?;
    }
    if search.unread > 0 {
        writeln!(out, "not searched {} directories that this user may not read", search.unread)?;
    }
    if standing == 0 && well && !request.undo {
        writeln!(out, "no Claude CLI was found: install the SDK or the CLI before this")?;
        return Ok(false);
    }
    Ok(well)
}

fn say(place: &Path, step: &Step, print: bool, out: &mut impl Write) -> io::Result<()> {
    let (path, real) = (place.display(), beside(place));
    let real = Path::new(real.file_name().unwrap_or_default()).display();
    let words = |done: &str, todo: &str| if print { format!("would {todo:<7}") } else { format!("{done:<12}") };
    match step {
        Step::Put { version, real: Real::Stale } => {
            writeln!(out, "{} {path}: CLI {version} becomes {real}, in place of an older one", words("installed", "install"))
        }
        Step::Put { version, .. } => writeln!(out, "{} {path}: CLI {version} becomes {real}", words("installed", "install")),
        Step::Renew { version } => {
            writeln!(out, "{} {path}: another version of the shim; CLI {version}", words("renewed", "renew"))
        }
        Step::InPlace { version } => writeln!(out, "in place     {path}: CLI {version}"),
        Step::ByHand { real } => writeln!(out, "in place     {path}: put there by hand; the CLI is {}", real.display()),
        Step::Restore => writeln!(out, "{} {path}: from {real}", words("restored", "restore")),
        Step::Clean => writeln!(out, "{} {path}{REAL}: left from before an upgrade", words("removed", "remove")),
        Step::Nothing => writeln!(out, "not there    {path}: the CLI itself"),
    }
}

/// How a CLI stands, for the doctor.
pub(crate) enum Standing {
    /// Nobody stands before it.
    Bare { version: String },
    /// It is behind a shim, of this version or of another.
    Behind { version: String, current: bool },
    /// A shim without a CLI beside it, that finds one on PATH.
    ByHand { real: PathBuf },
    /// It cannot be started.
    Broken { why: String },
}

/// What was found, and what there was no time for.
pub(crate) struct Survey {
    pub(crate) found: Vec<(PathBuf, Standing)>,
    /// Directories, with all that is below them.
    pub(crate) unsearched: usize,
    pub(crate) unasked: Vec<PathBuf>,
}

/// Every CLI below some directories, or everywhere. Changes nothing. Half of the time is for the search; a CLI that is asked in the last
/// moment has as long as any to answer.
pub(crate) fn survey(dirs: &[PathBuf], time: Duration) -> Survey {
    let began = Instant::now();
    let mut search = Search { until: Some(began + time / 2), ..Search::default() };
    if dirs.is_empty() {
        search.everywhere();
    }
    dirs.iter().for_each(|dir| search.below(dir));
    let places: BTreeSet<PathBuf> = search.found.iter().filter_map(|path| place(path).ok()).collect();
    let standing = |place: PathBuf| {
        let standing = match judge(&place, false) {
            Ok(Step::Put { version, .. }) => Standing::Bare { version },
            Ok(Step::Renew { version }) => Standing::Behind { version, current: false },
            Ok(Step::InPlace { version }) => Standing::Behind { version, current: true },
            Ok(Step::ByHand { real }) => Standing::ByHand { real },
            Err(trouble @ (Trouble::Gone(_) | Trouble::Io { .. })) => Standing::Broken { why: trouble.to_string() },
            // Something else that is called like it.
            Ok(Step::Restore | Step::Clean | Step::Nothing)
            | Err(
                Trouble::NoCli(_)
                | Trouble::Nothing(_)
                | Trouble::ByName(_)
                | Trouble::Script(_)
                | Trouble::NotOurs
                | Trouble::Busy(_),
            ) => return None,
        };
        Some((place, standing))
    };
    let (mut found, mut unasked) = (Vec::new(), Vec::new());
    for place in places {
        if began.elapsed() < time {
            found.extend(standing(place));
        } else {
            unasked.push(place);
        }
    }
    Survey { found, unsearched: search.unsearched, unasked }
}

// ---- which places

/// What to look at.
#[derive(Default)]
struct Search {
    /// By the user: must be right.
    named: BTreeSet<PathBuf>,
    /// By us, by its name alone.
    found: BTreeSet<PathBuf>,
    /// CLIs that are behind no shim any more.
    left: BTreeSet<PathBuf>,
    unread: usize,
    /// When the search is given up, and how many directories were still to be looked into.
    until: Option<Instant>,
    unsearched: usize,
}

impl Search {
    /// The file system that holds `/`, and what this user's shell and home hold on others.
    fn everywhere(&mut self) {
        let root = Path::new("/");
        let device = |dir: &Path| dir.metadata().map(|dir| dir.dev()).ok();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs: Vec<PathBuf> = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).collect();
        self.found.extend(dirs.iter().map(|dir| dir.join(NAMES[0])).filter(|file| file.symlink_metadata().is_ok()));
        // A virtual environment and a global npm have their packages beside their `bin`.
        let prefixes = dirs.iter().filter(|dir| dir.ends_with("bin")).filter_map(|dir| dir.parent().map(Path::to_owned));
        let more = prefixes.chain(std::env::home_dir()).chain(std::env::current_dir().ok());
        let more: BTreeSet<PathBuf> = more.filter(|dir| device(dir).is_some() && device(dir) != device(root)).collect();
        // The large one last: there may be no time for all of it.
        more.iter().for_each(|dir| self.below(dir));
        self.below(root);
    }

    /// All of a directory on its own file system; links are not followed.
    fn below(&mut self, root: &Path) {
        let Ok(device) = root.metadata().map(|dir| dir.dev()) else { return };
        let mut dirs = vec![root.to_owned()];
        while let Some(dir) = dirs.pop() {
            if self.until.is_some_and(|until| Instant::now() > until) {
                self.unsearched += dirs.len() + 1;
                return;
            }
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) => {
                    self.unread += usize::from(error.kind() == io::ErrorKind::PermissionDenied);
                    continue;
                }
            };
            for entry in entries.flatten() {
                let path = entry.path();
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => {
                        let same = entry.metadata().is_ok_and(|dir| dir.dev() == device);
                        if same && !ELSEWHERE.iter().any(|elsewhere| path.ends_with(elsewhere)) {
                            dirs.push(path);
                        }
                    }
                    Ok(_) if is_name(&path) => {
                        self.found.insert(path);
                    }
                    Ok(_) => {
                        let shim = path.to_str().and_then(|path| path.strip_suffix(REAL)).map(PathBuf::from);
                        if shim.is_some_and(|shim| is_name(&shim) && shim.symlink_metadata().is_err()) {
                            self.left.insert(path);
                        }
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

/// The name to put the shim at. A link leads to the CLI of a package, and then it leads to its shim; but the native installer's own
/// names a version that the next update leaves, and an npm package of old a script that only node can start: there the link gives way.
/// Of links that lead to links, the last that is called like a CLI: what leads to it leads to its shim, as a package's does.
fn place(path: &Path) -> Result<PathBuf, Trouble> {
    let in_its_directory = |path: &Path| {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = dir.canonicalize().map_err(failed("its directory cannot be looked at"))?;
        Ok::<PathBuf, Trouble>(dir.join(path.file_name().unwrap_or_default()))
    };
    if path.symlink_metadata().map_err(failed("cannot be looked at"))?.is_symlink() {
        path.canonicalize().map_err(Trouble::Nothing)?;
    }
    let mut place = in_its_directory(path)?;
    let mut at = place.clone();
    for _ in 0..MOST_LINKS {
        let Ok(next) = fs::read_link(&at) else { break };
        at = in_its_directory(&directory(&at).join(next))?;
        if is_name(&at) && !directory(&at).ends_with("claude/versions") {
            place.clone_from(&at);
        }
    }
    Ok(place)
}

// ---- what to do there

/// What is to be done at a place. Changes nothing.
fn plan(place: &Path, undo: bool) -> Result<Step, Trouble> {
    let step = judge(place, undo)?;
    if matches!(step, Step::Put { .. } | Step::Renew { .. } | Step::Restore | Step::Clean) {
        let dir = directory(place);
        rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|error| failed(format!("nothing can be changed in {}", dir.display()))(error.into()))?;
    }
    Ok(step)
}

fn judge(place: &Path, undo: bool) -> Result<Step, Trouble> {
    let beside = beside(place);
    let behind = beside.symlink_metadata().ok();
    let ours = is_sidecar(place);
    let answer = |path: &Path| version(path).map_err(Trouble::NoCli);
    if undo {
        return match (ours, behind) {
            // A link there leads to another place, which has a shim of its own.
            (true, Some(behind)) if !behind.is_symlink() && is_sidecar(&beside) => Err(Trouble::Gone(beside)),
            (true, Some(_)) => Ok(Step::Restore),
            (true, None) => Err(Trouble::NotOurs),
            (false, Some(_)) => answer(place).map(|_| Step::Clean),
            (false, None) => answer(place).map(|_| Step::Nothing),
        };
    }
    if ours {
        if behind.is_none() || is_sidecar(&beside) {
            let real = real(place).ok_or(Trouble::Gone(beside))?;
            return Ok(Step::ByHand { real });
        }
        let version = version(&beside).map_err(|why| failed(beside.display().to_string())(io::Error::other(why)))?;
        return Ok(if is_current(place) { Step::InPlace { version } } else { Step::Renew { version } });
    }
    if place.extension().is_some_and(|kind| kind == "js" || kind == "mjs" || kind == "cjs") {
        return Err(Trouble::Script(place.to_owned()));
    }
    let version = answer(place)?;
    if goes_through_us(place) {
        return Err(Trouble::NoCli(String::from("it is a script that starts the sidecar already")));
    }
    if let Some(why) = by_name(place) {
        return Err(Trouble::ByName(why));
    }
    let real = match behind {
        None => Real::Free,
        Some(_) if same(place, &beside) => Real::Same,
        Some(_) => Real::Stale,
    };
    Ok(Step::Put { version, real })
}

/// Why it would not be the CLI under another name: the launchers of version managers (Volta, mise, pyenv, nodenv) are one program, or one
/// script, that looks at what it was called by. What they start has a place of its own.
fn by_name(place: &Path) -> Option<String> {
    if place.is_symlink() {
        let end = place.canonicalize().ok()?;
        return version(&end).err().map(|why| format!("{}: {why}", end.display()));
    }
    let looks = |text: Vec<u8>| {
        let has = |what: &[u8]| memchr::memmem::find(&text, what).is_some();
        has(b"0##*/")
            || [&b"basename $0"[..], b"basename \"$0\"", b"basename -- \"$0\"", b"basename \"${0}\""].into_iter().any(has)
    };
    let script = super::find::is_script(place) && fs::read(place).is_ok_and(looks);
    script.then(|| String::from("it is a script that looks at its own name"))
}

/// Two names of one file, or of one link.
fn same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| path.symlink_metadata().map(|file| (file.dev(), file.ino())).ok();
    id(one).is_some() && id(one) == id(other)
}

fn is_current(place: &Path) -> bool {
    let long = |path: &Path| path.metadata().map(|file| file.len()).ok();
    let us = Path::new(US);
    long(place) == long(us) && fs::read(place).ok() == fs::read(us).ok()
}

fn goes_through_us(place: &Path) -> bool {
    super::find::is_script(place) && fs::read(place).is_ok_and(|text| names_us(&text))
}

/// Whether a script names us as a program: a directory may be called as we are.
fn names_us(text: &[u8]) -> bool {
    let name = b"agent-sidecar";
    let ends = |at: usize| text.get(at + name.len()).is_none_or(|next| !next.is_ascii_alphanumeric() && !b"-_/.".contains(next));
    memchr::memmem::find_iter(text, name).any(ends)
}

/// What it says of itself; every Claude CLI answers `2.1.330 (Claude Code)` to this, without looking at anything. Root asks as somebody
/// else what others may have put there. Its environment is empty but for PATH, which scripts need.
fn version(path: &Path) -> Result<String, String> {
    let file = path.metadata().map_err(|error| error.to_string())?;
    if !file.is_file() {
        return Err(String::from("not a file"));
    }
    if file.permissions().mode() & 0o111 == 0 {
        return Err(String::from("not executable"));
    }
    let mut command = Command::new(path);
    command.arg("--version").env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).current_dir("/").process_group(0);
    if let Some((uid, gid)) = stranger(path).map_err(|error| error.to_string())? {
        command.uid(uid).gid(gid);
    }
    let said = ask(command)?;
    let version = said.strip_suffix(" (Claude Code)").filter(|version| version.starts_with(|c: char| c.is_ascii_digit()));
    let version = version.filter(|version| version.bytes().all(|c| c.is_ascii_alphanumeric() || b".-+".contains(&c)));
    version.map(str::to_owned).ok_or_else(|| String::from("it does not answer to --version as one"))
}

/// A user and a group who own nothing.
const NOBODY: u32 = 65534;
/// As many as the kernel follows.
const MOST_LINKS: u32 = 40;

/// Who asks instead of root, if others have a say in what this name leads to: the owner of the file, where nobody can put another in its
/// place, or else the owner of the directory that holds the name. A link there may lead to a file of root's, and elsewhere a moment later.
fn stranger(path: &Path) -> io::Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() || !is_user(NOBODY) {
        return Ok(None);
    }
    let owner = match safe_way(path) {
        Some(file) if file.uid() == 0 && file.mode() & 0o022 == 0 => return Ok(None),
        Some(file) if file.uid() != 0 => file,
        _ => directory(path).symlink_metadata()?,
    };
    let gid = if owner.uid() == 0 || owner.gid() == 0 { NOBODY } else { owner.gid() };
    Ok(Some((if owner.uid() == 0 { NOBODY } else { owner.uid() }, gid)))
}

/// What a name leads to, if every directory and link on the way is root's, and nobody else may write there. From the top down: what is in
/// a directory that no other can change stays as it was seen.
fn safe_way(path: &Path) -> Option<Metadata> {
    let pieces = |path: &Path| path.components().rev().map(|piece| PathBuf::from(piece.as_os_str())).collect::<Vec<_>>();
    let (mut at, mut todo, mut links) = (PathBuf::from("/"), pieces(path), 0);
    while let Some(piece) = todo.pop() {
        if piece == Path::new("..") {
            at.pop();
            continue;
        }
        at.push(piece);
        let found = at.symlink_metadata().ok()?;
        if found.is_file() && todo.is_empty() {
            return Some(found);
        }
        let is_link = found.is_symlink();
        // In a sticky directory nobody else can change what is root's.
        let others_write = found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0;
        if found.uid() != 0 || !is_link && others_write {
            return None;
        }
        if is_link {
            links += 1;
            let end = fs::read_link(&at).ok().filter(|_| links <= MOST_LINKS)?;
            at.pop();
            todo.extend(pieces(&end));
        }
    }
    None
}

/// Whether there is such a user here. Where there is none but root, as in a namespace that a user has made for himself, root is that user,
/// and can become nobody else.
fn is_user(uid: u32) -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.is_empty()
        || map.lines().any(|line| {
            let mut numbers = line.split_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
            let (first, _, long) = (numbers.next().unwrap_or(0), numbers.next(), numbers.next().unwrap_or(0));
            (first..first + long).contains(&uid.into())
        })
}

/// The first line of what it prints, if it ends well and in time.
#[expect(clippy::disallowed_methods, reason = "no agent runs here: nobody else reaps")]
fn ask(mut command: Command) -> Result<String, String> {
    let mut child = command.spawn().map_err(|error| format!("it cannot be started: {error}"))?;
    let started = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(None) if started.elapsed() < ANSWER => std::thread::sleep(Duration::from_millis(2)),
            Ok(ended) => break ended,
            Err(error) => return Err(error.to_string()),
        }
    };
    // It, if it is still there, and whatever it started.
    if let Some(group) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).ok();
    }
    let Some(ended) = ended else {
        child.wait().ok();
        return Err(format!("it does not answer to --version within {} seconds", ANSWER.as_secs()));
    };
    let mut said = [0; 256];
    let mut n = 0;
    if let Some(mut stdout) = child.stdout.take() {
        let mut fds = [PollFd::new(&stdout, PollFlags::IN)];
        // Nothing there, and somebody holds the pipe: then there is nothing to wait for.
        let there = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
        n = if there { stdout.read(&mut said).unwrap_or(0) } else { 0 };
    }
    if !ended.success() {
        return Err(format!("asked for its version, it ends with {ended}"));
    }
    Ok(String::from_utf8_lossy(&said[..n]).lines().next().unwrap_or_default().trim().to_owned())
}

// ---- doing it

/// The file that this process runs, whatever has become of its name.
const US: &str = "/proc/self/exe";

fn directory(place: &Path) -> &Path {
    place.parent().unwrap_or(Path::new("/"))
}

fn carry_out(place: &Path, undo: bool) -> Result<Step, Trouble> {
    let dir = directory(place);
    let lock = File::open(dir).map_err(failed(format!("{} cannot be opened", dir.display())))?;
    let since = Instant::now();
    while let Err(error) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        match error {
            rustix::io::Errno::WOULDBLOCK if since.elapsed() < TURN => std::thread::sleep(Duration::from_millis(20)),
            rustix::io::Errno::WOULDBLOCK => return Err(Trouble::Busy(dir.to_owned())),
            // Some network file systems have no locks.
            _ => break,
        }
    }
    let real = beside(place);
    let (shim, moved) = (unfinished(place, "shim"), unfinished(place, "real"));
    let step = plan(place, undo)?;
    // What somebody who was killed has left.
    for left in [&shim, &moved] {
        match fs::remove_file(left) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(format!("{} cannot be removed", left.display()))(error));
            }
            _ => {}
        }
    }
    let done = match &step {
        Step::Put { real: at, .. } => put(place, &real, &shim, &moved, *at),
        Step::Renew { .. } => {
            copy(&shim, &place.symlink_metadata().map_err(failed("cannot be looked at"))?).and_then(|()| rename(&shim, place))
        }
        Step::Restore => rename(&real, place),
        Step::Clean => fs::remove_file(&real).map_err(failed(format!("{} cannot be removed", real.display()))),
        Step::InPlace { .. } | Step::ByHand { .. } | Step::Nothing => return Ok(step),
    };
    if done.is_err() {
        fs::remove_file(&shim).ok();
        fs::remove_file(&moved).ok();
    }
    done?;
    // A power cut is not to take back what was said to be done; where a directory cannot be synced, it may.
    lock.sync_all().ok();
    Ok(step)
}

fn put(place: &Path, real: &Path, shim: &Path, moved: &Path, at: Real) -> Result<(), Trouble> {
    let file = place.symlink_metadata().map_err(failed("cannot be looked at"))?;
    copy(shim, &file)?;
    let named = match at {
        Real::Same => Ok(()),
        Real::Free => link(place, real),
        Real::Stale => link(place, moved).and_then(|()| rename(moved, real)),
    };
    // Before it is the only one that works.
    let answers = || version(real).map(drop).map_err(Trouble::ByName);
    named.and_then(|()| answers()).and_then(|()| rename(shim, place)).inspect_err(|_| {
        // The CLI is where it was, and keeps that name alone.
        if same(place, real) {
            fs::remove_file(real).ok();
        }
    })
}

/// A copy of this program, for whoever could execute what it stands for, and of the same owner: who may replace that may replace this.
fn copy(to: &Path, like: &Metadata) -> Result<(), Trouble> {
    let what = || failed(format!("no copy of the sidecar can be made at {}", to.display()));
    let mut from = File::open(US).map_err(failed("the sidecar itself cannot be read"))?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(what())?;
    io::copy(&mut from, &mut file).map_err(what())?;
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(&file, Some(like.uid()), Some(like.gid())).map_err(what())?;
    }
    // A link's own mode says nothing; set-user-id is not for us.
    let mode = if like.is_symlink() { 0o755 } else { like.mode() & 0o777 };
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(what())?;
    file.sync_all().map_err(what())
}

/// A second name for a file, or for a link as such.
fn link(from: &Path, to: &Path) -> Result<(), Trouble> {
    rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty())
        .map_err(|error| failed(format!("the CLI cannot have a second name, {}", to.display()))(error.into()))
}

fn rename(from: &Path, to: &Path) -> Result<(), Trouble> {
    fs::rename(from, to).map_err(failed(format!("{} cannot become {}", from.display(), to.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_script_names_us_as_a_program_and_not_as_a_directory() {
        for us in ["exec agent-sidecar run -- x", "/opt/bin/agent-sidecar\n", "\"/opt/agent-sidecar\" run", "agent-sidecar"] {
            assert!(names_us(us.as_bytes()), "{us}");
        }
        for other in ["exec /srv/agent-sidecar/bin/claude", "/tmp/agent-sidecar-12/claude", "agent-sidecars", "claude"] {
            assert!(!names_us(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_way_is_safe_if_nobody_but_root_can_change_where_it_leads() {
        assert!(safe_way(Path::new("/proc/../bin/sh")).is_some_and(|file| file.is_file()), "through links");
        assert!(safe_way(Path::new("/no/such/file")).is_none() && safe_way(Path::new("/bin")).is_none());
        let dir = std::env::temp_dir().join(format!("agent-sidecar-way-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        let (link, file, circle) = (dir.join("link"), dir.join("file"), dir.join("circle"));
        symlink("/bin/sh", &link).unwrap();
        symlink("circle", &circle).unwrap();
        fs::copy("/bin/sh", &file).unwrap();
        for path in [&link, &file, &circle] {
            assert!(safe_way(path).is_none(), "{}", path.display());
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
