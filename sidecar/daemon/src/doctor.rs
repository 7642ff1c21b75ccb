//! `doctor`: what is wrong with this container, where, and what to do about it. It looks, asks each CLI for its version, binds the port
//! for a moment, and changes nothing.
//!
//! A new finding is a function in [`CHECKS`] and a test that produces it.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_sidecar_core::limit::Mode;
use agent_sidecar_core::who::{Name, Source, Sources};
use rustix::fs::Access;
use serde::Serialize;

use crate::config::{Config, DEFAULT_FILE, Mistake};
use crate::export::otlp::environment;
use crate::fence;
use crate::hub::Place;
use crate::influence;
use crate::receive::{self, Decision, Surroundings};
use crate::shim::install::{self, Standing};
use crate::supervise::{self, User};
use crate::tenants::Places;

/// Less than this is gone in a day of busy agents.
const ROOM: u64 = 64 * 1024 * 1024;
/// The oldest release of the CLI that was tried.
const OLDEST: [u64; 3] = [2, 1, 197];
/// On a large machine, not all can be looked at while somebody waits.
const SEARCH: Duration = Duration::from_secs(30);
/// The kernel's, without the byte that ends it.
const LONGEST_SOCKET: usize = 107;
/// When this was written, and when somebody has other troubles: 2026 and 2100.
const YEARS: std::ops::Range<u64> = 1_767_225_600..4_102_444_800;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// Something does not work, or not as it was meant.
    Broken,
    /// Something works and is probably not what was meant.
    Warning,
    Fine,
}

#[derive(Debug, Serialize)]
struct Finding {
    level: Level,
    check: &'static str,
    /// A path, an address, a setting.
    place: String,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// What the checks look at.
struct Patient<'a> {
    config: Config,
    mistakes: Vec<Mistake>,
    user: Surroundings,
    /// Where to look for CLIs; empty for everywhere.
    dirs: &'a [PathBuf],
    now: Duration,
    /// For CLIs that are looked for and asked.
    patience: Duration,
}

type Check = fn(&Patient<'_>, &mut Report);

/// Every check, by the name that its findings have.
const CHECKS: &[(&str, Check)] = &[
    ("configuration", configuration),
    ("limits", limits),
    ("cli", clis),
    ("files", files),
    ("tenants", tenants),
    ("queue", queue),
    ("spill", spill),
    ("listen", listen),
    ("socket", socket),
    ("telemetry", telemetry),
    ("clock", clock),
    ("processes", processes),
    ("influence", influence),
];

struct Report {
    check: &'static str,
    findings: Vec<Finding>,
}

impl Report {
    fn say(&mut self, level: Level, place: impl ToString, what: impl Into<String>, remedy: Option<String>) {
        self.findings.push(Finding { level, check: self.check, place: place.to_string(), what: what.into(), remedy });
    }

    fn broken(&mut self, place: impl ToString, what: impl Into<String>, remedy: impl Into<String>) {
        self.say(Level::Broken, place, what, Some(remedy.into()));
    }

    fn warning(&mut self, place: impl ToString, what: impl Into<String>, remedy: impl Into<String>) {
        self.say(Level::Warning, place, what, Some(remedy.into()));
    }

    fn fine(&mut self, place: impl ToString, what: impl Into<String>) {
        self.say(Level::Fine, place, what, None);
    }
}

/// Looks at everything, and says what it found, the worst first. True if nothing is broken.
pub(crate) fn examine(read: (Config, Vec<Mistake>), dirs: &[PathBuf], json: bool, out: &mut impl Write) -> io::Result<bool> {
    let (config, mistakes) = read;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let patient = Patient { config, mistakes, user: Surroundings::here(), dirs, now, patience: SEARCH };
    let mut report = Report { check: "", findings: Vec::new() };
    for (name, check) in CHECKS {
        report.check = name;
        check(&patient, &mut report);
    }
    let mut findings = report.findings;
    findings.sort_by_key(|finding| finding.level);
    let count = |level: Level| findings.iter().filter(|finding| finding.level == level).count();
    let (broken, warnings) = (count(Level::Broken), count(Level::Warning));
    if json {
        let all = serde_json::json!({ "broken": broken, "warnings": warnings, "findings": findings });
        serde_json::to_writer_pretty(&mut *out, &all)?;
        writeln!(out)?;
    } else {
        for Finding { level, check, place, what, remedy } in &findings {
            let level = match level {
                Level::Broken => "broken",
                Level::Warning => "warning",
                Level::Fine => "fine",
            };
            let remedy = remedy.as_ref().map_or(String::new(), |remedy| format!("; {remedy}"));
            writeln!(out, "{level:<8} {check:<14} {place}: {what}{remedy}")?;
        }
    }
    Ok(broken == 0)
}

fn configuration(patient: &Patient<'_>, report: &mut Report) {
    for Mistake { origin, what, remedy } in &patient.mistakes {
        report.broken(origin, what.as_str(), remedy.as_str());
    }
    for Mistake { origin, what, remedy } in patient.config.strangers() {
        report.warning(origin, what.as_str(), remedy.as_str());
    }
    let file = Path::new(DEFAULT_FILE);
    let agent = patient.config.user().unwrap_or_else(|error| {
        report.broken("run.user", error.to_string(), "until then no agent is started");
        None
    });
    let agent = agent.unwrap_or_else(User::ours);
    if patient.config.file().is_some_and(|file| fence::is_open(file, &agent)) {
        report.warning(
            patient.config.file().unwrap_or(file).display(),
            "an agent may change it, or put another in its place",
            "give it and its directories to root, and take the write permission from others",
        );
    }
    if let Err(error) = patient.config.token() {
        report.broken("hub.control_token_file", error, "until then nothing can be changed at the hub");
    }
    if patient.mistakes.is_empty() {
        let set = patient.config.effective().filter(|(_, effective)| effective.origin != crate::config::Origin::Default).count();
        report.fine(if file.exists() { DEFAULT_FILE } else { "environment" }, format!("{set} settings, without a mistake"));
    }
}

fn limits(patient: &Patient<'_>, report: &mut Report) {
    let mut rules = patient.config.rules();
    // These are there whether anybody chose them or not.
    rules.retain(|rule| !rule.limit.is_loop());
    if rules.is_empty() {
        report.warning("limits", "none is set: an agent may spend without end", "set at least AGENT_SIDECAR_MAX_COST_USD");
    } else if rules.iter().all(|rule| rule.mode != Mode::Enforce) {
        report.warning("limits.mode", "no limit is enforced", "set it to enforce once what shadow says is what you want");
    } else {
        report.fine("limits", format!("{} set", rules.len()));
    }
}

fn clis(patient: &Patient<'_>, report: &mut Report) {
    let install::Survey { found, unsearched, unasked } = install::survey(patient.dirs, patient.patience);
    if unsearched > 0 {
        let what = format!("there was no time to look into {unsearched} directories, and what is below them");
        let root = patient.dirs.first().map_or(Path::new("/"), PathBuf::as_path);
        report.warning(root.display(), what, "name directories: `agent-sidecar doctor DIR…`");
    }
    if let Some(first) = unasked.first() {
        let what = format!("no time was left to ask it for its version, nor {} more", unasked.len() - 1);
        report.warning(first.display(), what, "name its directory: `agent-sidecar doctor DIR…`");
    }
    if found.is_empty() && unsearched == 0 && unasked.is_empty() {
        report.warning("claude", "no Claude CLI was found", "install the CLI or an SDK, then run `agent-sidecar install --all`");
    }
    for (path, standing) in found {
        let place = path.display();
        let install = format!("run `agent-sidecar install {place}`");
        match &standing {
            Standing::Bare { version } => {
                report.warning(place, format!("CLI {version}: whoever finds it here runs it without the sidecar"), install);
            }
            Standing::Behind { version, current: false } => {
                report.warning(place, format!("a shim of another version, before CLI {version}"), install);
            }
            Standing::Behind { version, current: true } => report.fine(place, format!("a shim, before CLI {version}")),
            Standing::ByHand { real } => report.fine(place, format!("a shim put there by hand, before {}", real.display())),
            Standing::Broken { why } => {
                report.broken(place, why.as_str(), "install the package again, then `agent-sidecar install`")
            }
        }
        if let Standing::Bare { version } | Standing::Behind { version, .. } = &standing
            && numbers(version) < OLDEST
        {
            let oldest = OLDEST.map(|n| n.to_string()).join(".");
            report.warning(
                path.display(),
                format!("CLI {version} is older than {oldest}, the oldest that was tried"),
                "update it",
            );
        }
    }
}

fn numbers(version: &str) -> [u64; 3] {
    let mut numbers = version.split(['.', '-', '+']).map(|n| n.parse().unwrap_or(0));
    [(); 3].map(|()| numbers.next().unwrap_or(0))
}

fn files(patient: &Patient<'_>, report: &mut Report) {
    match patient.config.ledger() {
        Some(path) => writable(&path, "ledger.path", report),
        None => report.warning(
            "ledger.path",
            "unset: what was spent is known as long as the agent runs, and then nowhere",
            "set AGENT_SIDECAR_LEDGER to a file on a volume",
        ),
    }
    if let Some(path) = patient.config.events() {
        writable(&path, "events.path", report);
    }
    if let Some(path) = patient.config.busy().file {
        writable(&path, "busy.file", report);
    }
    if let Some(dir) = patient.config.meeting().and_then(|meeting| meeting.state_dir) {
        writable(&dir.join("hub/lock"), "hub.state_dir", report);
    }
}

fn tenants(patient: &Patient<'_>, report: &mut Report) {
    let config = &patient.config;
    let [labels, annotations] = config.pod_files();
    let (who, learn) = crate::tenants::find(config, &[], true);
    let silent = crate::tenants::silent(config, &who);
    for name in Name::ALL {
        let Some(Sources(sources)) = config.sources_of(*name) else { continue };
        let setting = format!("labels.{}_from", name.as_str());
        let mut told = false;
        for (file, field) in [(&labels, "metadata.labels"), (&annotations, "metadata.annotations")] {
            let of_file = |source: &Source| match source {
                Source::Pod(_) => field == "metadata.labels",
                Source::Annotation(_) => field == "metadata.annotations",
                Source::Env(_) | Source::Arg(_) | Source::Resource(_) | Source::Message(_) | Source::Cwd(_) => false,
            };
            if sources.iter().any(of_file) && std::fs::File::open(file).is_err() {
                told = true;
                let remedy = format!("mount a downwardAPI volume with {field} there");
                report.warning(file.display(), format!("`{setting}` reads it, and it is not there"), remedy);
            }
        }
        let late = sources.iter().any(|source| matches!(source, Source::Message(_)));
        if silent.contains(name) && !told && !late {
            let what = format!("finds nothing: an agent that is started as this was has no {}", name.as_str());
            let remedy = "see to it that the app sets what is read there for each agent; other agents may have it";
            report.warning(setting, what, remedy);
        } else if let Some(value) = who.get(*name) {
            let yet = if learn.is_over() { "" } else { ", unless the app says otherwise" };
            report.fine(setting, format!("`{value}`{yet}"));
        }
    }
    if config.has_tenants() && config.guard() != Mode::Off && config.meeting().is_none() {
        report.warning(
            "tenants.guard",
            "agents do not meet: what those of different tenants share is not known",
            "set `listen` to an address with a port, or name `hub.socket`",
        );
    }
    if let Some(dirs) = config.agent_dirs() {
        writable(&dirs.root.join("tenant"), "tenants.agent_dirs", report);
    }
    let place = config.meeting().and_then(|meeting| Place::look(&meeting).ok());
    for (dir, agents) in place.iter().flat_map(shared_configs) {
        report.warning(
            dir.display(),
            format!("{agents} agents that run keep their sessions and settings there"),
            "give each its own: CLAUDE_CONFIG_DIR, or --agent-dirs for all",
        );
    }
}

/// The config directories that several agents have which run here, and how many.
fn shared_configs(place: &Place) -> Vec<(PathBuf, usize)> {
    let mut agents: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for wrapper in crate::hub::pids(place) {
        // The CLI is the first below it; what is below that is its own.
        let cli = supervise::below(wrapper.cast_signed()).into_iter().find_map(|pid| config_of(pid.as_raw_nonzero().get()));
        if let Some(dir) = cli {
            *agents.entry(dir).or_default() += 1;
        }
    }
    agents.retain(|_, n| *n > 1);
    agents.into_iter().collect()
}

/// Where a process keeps what a CLI keeps, by its environment.
fn config_of(pid: i32) -> Option<PathBuf> {
    let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let variable = |name: &str| {
        let value = environ.split(|byte| *byte == 0).find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
        (!value.is_empty()).then(|| PathBuf::from(std::ffi::OsStr::from_bytes(value)))
    };
    let dir = variable("CLAUDE_CONFIG_DIR").or_else(|| Some(variable("HOME")?.join(".claude")))?;
    let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
    Some(std::fs::canonicalize(cwd.join(&dir)).unwrap_or(dir))
}

fn queue(patient: &Patient<'_>, report: &mut Report) {
    let (config, mistakes) = environment::read(&patient.config.otlp(), |name| std::env::var(name).ok());
    for mistake in mistakes {
        report.broken("OTEL_*", mistake.to_string(), "correct the variable");
    }
    match config.queue_dir {
        _ if config.targets.iter().all(Option::is_none) => {}
        Some(dir) => writable(&dir.join("batch"), "otlp.queue_dir", report),
        None => report.warning(
            "otlp.queue_dir",
            "there is no place for what a collector does not take",
            "set HOME, or AGENT_SIDECAR_OTLP_QUEUE_DIR",
        ),
    }
}

fn spill(patient: &Patient<'_>, report: &mut Report) {
    let tmpdir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let own = patient.config.spill_dir();
    let usual = ["/tmp", "/dev/shm"].map(PathBuf::from);
    let dirs: Vec<PathBuf> = own.clone().into_iter().chain(tmpdir).chain(usual).collect();
    if let Some(own) = &own {
        writable(&own.join("file"), "relay.spill_dir", report);
    }
    match dirs.iter().find(|dir| dir.is_dir() && rustix::fs::access(dir.as_path(), Access::WRITE_OK).is_ok()) {
        Some(dir) => report.fine(dir.display(), "output that an app does not read waits here"),
        None => report.warning(
            "relay.spill_dir",
            "no directory for output that an app does not read: it waits in memory, and then the agent waits",
            "mount an empty directory at /tmp",
        ),
    }
}

/// Whether a file can be written, or made, and whether there is room for it.
fn writable(path: &Path, setting: &'static str, report: &mut Report) {
    let path = &std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // The part of the way that is there.
    let there = path.ancestors().find(|part| part.exists()).unwrap_or(Path::new("/"));
    // These directories are made when they are needed; that of a file that somebody named is not.
    let made_by_us = matches!(setting, "otlp.queue_dir" | "hub.state_dir" | "tenants.agent_dirs");
    let replaced = setting == "busy.file";
    let allowed = if there == path {
        match path.parent() {
            _ if path.is_dir() => Err(rustix::io::Errno::ISDIR),
            Some(dir) if replaced => rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK),
            _ => rustix::fs::access(path, Access::WRITE_OK),
        }
    } else if !there.is_dir() {
        Err(rustix::io::Errno::NOTDIR)
    } else if !made_by_us && path.parent() != Some(there) {
        Err(rustix::io::Errno::NOENT)
    } else {
        rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK)
    };
    if let Err(error) = allowed {
        return report.broken(
            path.display(),
            format!("`{setting}` cannot be written: {}", io::Error::from(error)),
            format!(
                "make {} and give it to uid {}",
                path.parent().unwrap_or(path).display(),
                rustix::process::geteuid().as_raw()
            ),
        );
    }
    match rustix::fs::statvfs(there) {
        Ok(disk) if disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM => {
            let left = disk.f_bavail.saturating_mul(disk.f_frsize) / (1024 * 1024);
            report.warning(
                path.display(),
                format!("`{setting}` has {left} MiB left"),
                "make room, or choose another file system",
            );
        }
        Ok(_) => report.fine(path.display(), format!("`{setting}` can be written")),
        Err(error) => report.warning(path.display(), format!("`{setting}`: {error}"), "look at the file system"),
    }
}

fn listen(patient: &Patient<'_>, report: &mut Report) {
    let Some(address) = patient.config.listen() else {
        return report.fine("listen", "off");
    };
    match crate::http::bind(address) {
        Ok(bound) => report.fine(bound.address, "free"),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match patient.config.meeting() {
            Some(meeting) if Place::serves(&meeting, address) => {
                report.fine(address, "served by a wrapper that runs, and the next one with it");
            }
            _ => report.warning(
                address,
                "somebody listens there, and not for this user's wrappers: the next one serves no metrics",
                "choose another address with AGENT_SIDECAR_LISTEN, or 127.0.0.1:0 for any",
            ),
        },
        Err(error) => report.broken(
            address,
            format!("metrics cannot be served there: {error}"),
            "choose an address of this machine, and a port above 1023, with AGENT_SIDECAR_LISTEN",
        ),
    }
}

fn socket(patient: &Patient<'_>, report: &mut Report) {
    let Some(meeting) = patient.config.meeting() else {
        return report.fine("socket", "off");
    };
    for path in Place::sockets(&meeting) {
        let remedy = "name another with AGENT_SIDECAR_SOCKET";
        match path.symlink_metadata() {
            _ if path.as_os_str().len() > LONGEST_SOCKET => {
                let what =
                    format!("longer than the {LONGEST_SOCKET} bytes that a socket's path may have: nothing is served there");
                report.warning(path.display(), what, remedy);
            }
            Ok(at) if !at.file_type().is_socket() => {
                report.warning(path.display(), "no socket, and left alone: nothing is served there", remedy);
            }
            Ok(_) => report.fine(path.display(), "a socket"),
            Err(error) => match path.parent().filter(|dir| dir.is_dir()).map(may_make_in) {
                Some(Ok(())) => report.fine(path.display(), "free"),
                Some(Err(error)) => {
                    let uid = rustix::process::geteuid().as_raw();
                    let what = format!("agents cannot meet there: uid {uid} can make none ({})", io::Error::from(error));
                    report.warning(path.display(), what, remedy);
                }
                None => {
                    let what = format!("agents cannot meet there: {error}");
                    report.warning(path.display(), what, "make its directory, for the agents' user alone");
                }
            },
        }
    }
}

/// Whether something new can be made in a directory. In `/proc` nobody can, and root is told otherwise.
fn may_make_in(dir: &Path) -> rustix::io::Result<()> {
    if rustix::fs::statfs(dir).is_ok_and(|disk| disk.f_type == rustix::fs::PROC_SUPER_MAGIC) {
        return Err(rustix::io::Errno::ROFS);
    }
    rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK)
}

fn telemetry(patient: &Patient<'_>, report: &mut Report) {
    if let Some(port) = patient.user.own_prometheus() {
        let ours = patient.config.listen().is_some_and(|address| address.port() == port);
        let taken = TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).is_err();
        let remedy = "take prometheus out of OTEL_METRICS_EXPORTER, and read the sidecar's metrics";
        if ours {
            report.broken(format!(":{port}"), "the CLI is told to serve its own metrics where the sidecar does", remedy);
        } else if taken {
            report.broken(format!(":{port}"), "the CLI is told to serve its own metrics there, and somebody else has it", remedy);
        } else {
            report.warning(
                format!(":{port}"),
                "the CLI is told to serve its own metrics there: the second one of this container cannot, and says nothing",
                remedy,
            );
        }
    }
    match receive::decide(patient.config.native(), true, true, &patient.user) {
        Decision::StayOut(why) => report.warning(
            "native.telemetry",
            format!("at a terminal and with text output the cost is not known: {why}"),
            "change the CLI's own OTEL_* settings, or run it with --output-format stream-json",
        ),
        Decision::On(_) | Decision::Off => {}
    }
}

fn clock(patient: &Patient<'_>, report: &mut Report) {
    let seconds = patient.now.as_secs();
    let year = 1970 + seconds / 31_556_952;
    if YEARS.contains(&seconds) {
        report.fine("clock", format!("it is {year}"));
    } else {
        report.broken("clock", format!("it says {year}: prices, ledgers and certificates go by it"), "set the machine's clock");
    }
}

fn processes(_: &Patient<'_>, report: &mut Report) {
    let us = rustix::process::getpid();
    let here = std::fs::read_to_string("/proc/self/stat").ok();
    let pid = here.as_deref().and_then(|stat| stat.split(' ').next()).and_then(|pid| pid.parse::<i32>().ok());
    if pid != Some(us.as_raw_nonzero().get()) {
        report.broken("/proc", "it is not there, or of other processes: what an agent leaves behind cannot be found", "mount it");
    }
    match rustix::process::set_child_subreaper(Some(us)) {
        Ok(()) => report.fine("processes", "what an agent leaves behind can be taken in and ended"),
        Err(error) => report.warning(
            "processes",
            format!("no subreaper: tools that outlive the agent stay ({error})"),
            "make the sidecar PID 1 of the container, or run one that reaps",
        ),
    }
}

/// What would change the CLI, here and now.
fn influence(patient: &Patient<'_>, report: &mut Report) {
    let (policy, expected) = patient.config.influence();
    let agent = patient.config.user().ok().flatten().unwrap_or_else(User::ours);
    let variables: Vec<_> = agent.variables().into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    let mut found = influence::in_environment(std::env::vars_os(), &expected);
    found.extend(influence::Files::of(&Places::of(&variables, None), &agent, &expected).look());
    for one in &found {
        let place = one.file.as_ref().map_or_else(|| String::from("environment"), |file| file.display().to_string());
        let what = match one.kind {
            influence::Kind::Loader => "has code run in the CLI or its tools",
            influence::Kind::Endpoint => "has the CLI ask somebody else",
            influence::Kind::Network => "has somebody between the CLI and whom it asks",
            influence::Kind::KeyHelper => "is run for the CLI's key",
        };
        let remedy = match policy {
            influence::Policy::Report => "take it out, or set `policy.environment` to strip or refuse",
            influence::Policy::Strip | influence::Policy::Refuse => "take it out",
        };
        report.warning(place, format!("{} {what}", one.name), remedy);
    }
    if found.is_empty() {
        report.fine("environment", "nothing has code run in the CLI, or has it ask somebody else");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_before_our_time_or_long_after_it_is_wrong() {
        let level = |seconds| {
            let (config, mistakes) = Config::read(&crate::config::Sources::default());
            let now = Duration::from_secs(seconds);
            let patient = Patient { config, mistakes, user: Surroundings::default(), dirs: &[], now, patience: Duration::ZERO };
            let mut report = Report { check: "clock", findings: Vec::new() };
            clock(&patient, &mut report);
            let found = report.findings.remove(0);
            (found.level, found.what)
        };
        assert_eq!(level(1_795_000_000), (Level::Fine, String::from("it is 2026")));
        for (seconds, year) in [(0, 1970), (1_500_000_000, 2017), (5_000_000_000, 2128)] {
            let (level, what) = level(seconds);
            assert!(level == Level::Broken && what.starts_with(&format!("it says {year}")), "{what}");
        }
    }

    #[test]
    fn what_there_is_no_time_for_is_said() {
        let (config, mistakes) = Config::read(&crate::config::Sources::default());
        let (dirs, now) = ([std::env::temp_dir()], Duration::ZERO);
        let patient = Patient { config, mistakes, user: Surroundings::default(), dirs: &dirs, now, patience: Duration::ZERO };
        let mut report = Report { check: "cli", findings: Vec::new() };
        clis(&patient, &mut report);
        let [left_out] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
        assert!(left_out.level == Level::Warning && left_out.what.contains("no time to look into 1 directories"), "{left_out:?}");
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(numbers("2.1.90") < OLDEST && numbers("2.0.300") < OLDEST && numbers("1.9.999-beta") < OLDEST);
        assert!(numbers("2.1.197") >= OLDEST && numbers("2.1.1000") >= OLDEST && numbers("3.0.0-rc.1") >= OLDEST);
    }
}
