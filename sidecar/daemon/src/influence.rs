//! What can make the CLI another program, or have it talk to another API: variables of its environment, and the settings files that an
//! agent may write for the session after it. Nothing of it is changed unless somebody wants that: it may be what the app meant.
//!
//! | | heeded by |
//! |---|---|
//! | `LD_PRELOAD`, `LD_AUDIT`, `LD_LIBRARY_PATH` | the CLI, which is linked dynamically, and its tools |
//! | `BUN_OPTIONS` (`--preload`), `BUN_INSPECT_PRELOAD`, `BUN_INSPECT…` | the CLI |
//! | `NODE_OPTIONS`, `BASH_ENV`, `ENV` | a CLI that node runs, MCP servers, shells of tools |
//! | `…_BASE_URL`, `CLAUDE_CODE_USE_…` | the CLI; a project's settings file wins over its environment |

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use agent_sidecar_core::metric;
use serde_json::Value;

use crate::files;
use crate::supervise::{Handle, NICE, User};
use crate::tenants::Places;

/// How often the files are looked at that count for the next session.
const EVERY: Duration = Duration::from_secs(5);
/// Of one file; nobody reads a longer list.
const FINDINGS: usize = 32;
/// Of a name that somebody else chose.
const NAME: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Has code run in the CLI.
    Loader,
    /// Has it ask somebody else.
    Endpoint,
    /// Has somebody between it and whom it asks.
    Network,
    /// Is run for its key.
    KeyHelper,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Loader, Kind::Endpoint, Kind::Network, Kind::KeyHelper];

    /// As a label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Kind::Loader => "loader",
            Kind::Endpoint => "endpoint",
            Kind::Network => "network",
            Kind::KeyHelper => "key_helper",
        }
    }
}

/// What is done about what loads code, and about whom else it would ask, where it is said whom it may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    Report,
    /// Variables are taken from the CLI's environment. What a file says is not ours to change.
    Strip,
    /// The CLI is not started.
    Refuse,
}

/// One of them, and where: in the environment, if in no file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) file: Option<PathBuf>,
}

/// Why the CLI is not started.
#[derive(Debug, thiserror::Error)]
#[error("{}; see `policy.environment` and `policy.base_urls`", said(.0))]
pub(crate) struct Refused(Vec<Finding>);

fn said(findings: &[Finding]) -> String {
    let one = |found: &Finding| match &found.file {
        Some(file) => format!("{} sets {}", file.display(), found.name),
        None => format!("{} is in its environment", found.name),
    };
    findings.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Whom the CLI may ask; nobody has said so, if it is none.
pub(crate) type Expected = Option<Vec<String>>;

/// What a variable does, by its name.
fn kind_of(name: &str) -> Option<Kind> {
    const LOADERS: [&str; 6] = ["LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "NODE_OPTIONS", "BASH_ENV", "ENV"];
    const NETWORK: [&str; 6] =
        ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NODE_EXTRA_CA_CERTS", "NODE_TLS_REJECT_UNAUTHORIZED", "SSL_CERT_FILE"];
    const PROVIDERS: [&str; 4] = ["BEDROCK", "VERTEX", "FOUNDRY", "MANTLE"];
    let provider = name.strip_prefix("CLAUDE_CODE_USE_").is_some_and(|which| PROVIDERS.contains(&which));
    let asks = name.ends_with("_BASE_URL") && (name.starts_with("ANTHROPIC_") || name == "CLAUDE_CODE_API_BASE_URL");
    match name {
        _ if LOADERS.contains(&name) || name == "BUN_OPTIONS" || name.starts_with("BUN_INSPECT") => Some(Kind::Loader),
        _ if provider || asks => Some(Kind::Endpoint),
        _ if NETWORK.contains(&name.to_ascii_uppercase().as_str()) => Some(Kind::Network),
        _ => None,
    }
}

/// Whether a variable that says whom to ask says somebody who is expected.
fn is_expected(value: &str, expected: &Expected) -> bool {
    let plain = |url: &str| url.trim().trim_end_matches('/').to_ascii_lowercase();
    let value = plain(value);
    expected.iter().flatten().map(|url| plain(url)).any(|url| value == url || value.starts_with(&format!("{url}/")))
}

/// Of the environment. Whom the CLI asks, and through whom, is the app's to say, unless somebody else has said it.
pub(crate) fn in_environment(variables: impl Iterator<Item = (OsString, OsString)>, expected: &Expected) -> Vec<Finding> {
    let of = |(name, value): (OsString, OsString)| {
        let name = name.into_string().ok()?;
        let kind = kind_of(&name)?;
        let told = match kind {
            _ if value.is_empty() => false,
            Kind::Loader => true,
            Kind::Endpoint => expected.is_some() && !is_expected(&value.to_string_lossy(), expected),
            Kind::Network | Kind::KeyHelper => false,
        };
        told.then_some(Finding { kind, name, file: None })
    };
    variables.filter_map(of).collect()
}

/// Of a settings file.
fn in_settings(file: &Path, text: &str, expected: &Expected) -> Vec<Finding> {
    let settings: Value = serde_json::from_str(text).unwrap_or_default();
    let found = |kind, name: &str| Finding { kind, name: metric::bounded(name, NAME).to_owned(), file: Some(file.to_owned()) };
    let variables = settings["env"].as_object().into_iter().flatten().filter_map(|(name, value)| {
        let kind = kind_of(name)?;
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let meant = value.is_empty() || kind == Kind::Endpoint && is_expected(&value, expected);
        (!meant).then(|| found(kind, name))
    });
    let helpers = ["apiKeyHelper", "awsAuthRefresh", "awsCredentialExport", "gcpAuthRefresh"];
    let helpers = helpers.into_iter().filter(|name| settings.get(*name).is_some_and(|value| !value.is_null()));
    variables.chain(helpers.map(|name| found(Kind::KeyHelper, name))).take(FINDINGS).collect()
}

/// The settings files that the agent can write, and what they were when they were last looked at.
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    agent: User,
    expected: Expected,
    seen: BTreeMap<PathBuf, Look>,
    told: BTreeSet<Finding>,
}

type Look = Option<(u64, SystemTime)>;

impl Files {
    pub(crate) fn of(places: &Places, agent: &User, expected: &Expected) -> Files {
        let project = places.cwd.join(".claude");
        let user = places.config.iter().map(|config| config.join("settings.json"));
        let paths = [project.join("settings.json"), project.join("settings.local.json")].into_iter().chain(user).collect();
        Files { paths, agent: agent.clone(), expected: expected.clone(), seen: BTreeMap::new(), told: BTreeSet::new() }
    }

    /// All that is in them now. What only others can write is theirs.
    pub(crate) fn look(&mut self) -> Vec<Finding> {
        let mut all = Vec::new();
        for path in &self.paths {
            let look = path.metadata().ok().and_then(|found| Some((found.len(), found.modified().ok()?)));
            self.seen.insert(path.clone(), look);
            if let Some(text) = look.filter(|_| self.agent.may_change(path)).and_then(|_| files::read_linked(path).ok()) {
                all.extend(in_settings(path, &text, &self.expected));
            }
        }
        all
    }

    fn changed(&self) -> bool {
        let look = |path: &PathBuf| path.metadata().ok().and_then(|found| Some((found.len(), found.modified().ok()?)));
        self.paths.iter().any(|path| self.seen.get(path) != Some(&look(path)))
    }

    /// Says what is there, and what is put there, for as long as there is a monitor. On a thread of its own: the disk may hang.
    pub(crate) fn watch(mut self, mut found: Vec<Finding>, handle: &Handle) {
        let handle = handle.clone();
        let watches = std::thread::Builder::new().name(String::from("settings")).stack_size(256 * 1024).spawn(move || {
            rustix::process::nice(NICE).ok();
            loop {
                self.tell(&found, &handle);
                while !self.changed() {
                    if !handle.visit(|_, _| {}) {
                        return;
                    }
                    std::thread::sleep(EVERY);
                }
                let environment = found.into_iter().filter(|one| one.file.is_none());
                found = environment.chain(self.look()).collect();
            }
        });
        if let Err(error) = watches {
            tracing::warn!(%error, "what an agent writes into the CLI's settings is not looked at");
        }
    }

    fn tell(&mut self, found: &[Finding], handle: &Handle) {
        for one in found.iter().filter(|one| one.file.is_some() && !self.told.contains(one)) {
            let file = one.file.as_deref().map(|file| file.display().to_string());
            tracing::warn!(
                file,
                name = one.name,
                kind = one.kind.as_str(),
                "a settings file that the agent can write changes what the CLI runs or whom it asks"
            );
        }
        self.told = found.iter().cloned().collect();
        let counts: Vec<(&str, &str, usize)> = [("environment", false), ("settings", true)]
            .into_iter()
            .flat_map(|(source, file)| {
                let of = |kind| found.iter().filter(|one| one.kind == kind && one.file.is_some() == file).count();
                Kind::ALL.map(|kind| (kind.as_str(), source, of(kind)))
            })
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
        handle.visit(move |monitor, _| {
            for (kind, source, n) in counts {
                monitor.meters_mut().set(&metric::INFLUENCES, &[kind, source], n as f64);
            }
        });
    }
}

/// What of this is not to be, where somebody wants more than to know: whom to ask is nobody's business where nobody has said so.
pub(crate) fn judge(policy: Policy, found: &[Finding], expected: &Expected) -> Result<Vec<OsString>, Refused> {
    let meant = |one: &&Finding| one.kind == Kind::Loader || one.kind == Kind::Endpoint && expected.is_some();
    let bad: Vec<Finding> = found.iter().filter(meant).cloned().collect();
    match policy {
        Policy::Refuse if !bad.is_empty() => Err(Refused(bad)),
        Policy::Strip => Ok(bad.into_iter().filter(|one| one.file.is_none()).map(|one| one.name.into()).collect()),
        Policy::Report | Policy::Refuse => Ok(Vec::new()),
    }
}

/// The names of such variables in a process's environment, as /proc has it.
pub(crate) fn names(environ: &[u8]) -> Vec<String> {
    let variables = environ.split(|byte| *byte == 0).filter_map(|one| {
        let (name, value) = std::str::from_utf8(one).ok()?.split_once('=')?;
        Some((name, value))
    });
    variables
        .filter(|(name, value)| !value.is_empty() && kind_of(name).is_some())
        .map(|(name, _)| name.to_owned())
        .take(FINDINGS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(list: &[(&str, &str)], expected: &Expected) -> Vec<(Kind, String)> {
        let list = list.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        in_environment(list, expected).into_iter().map(|one| (one.kind, one.name)).collect()
    }

    #[test]
    fn what_the_app_gives_is_told_only_where_it_runs_code_or_somebody_has_said_whom_to_ask() {
        let given = [
            ("PATH", "/bin"),
            ("LD_PRELOAD", "/x.so"),
            ("NODE_OPTIONS", ""),
            ("BUN_INSPECT_PRELOAD", "/x.js"),
            ("ANTHROPIC_BASE_URL", "https://gateway.example/v1"),
            ("CLAUDE_CODE_USE_BEDROCK", "1"),
            ("https_proxy", "http://proxy"),
        ];
        let loaders = vec![(Kind::Loader, "LD_PRELOAD".to_owned()), (Kind::Loader, "BUN_INSPECT_PRELOAD".to_owned())];
        assert_eq!(environment(&given, &None), loaders);
        let expected = Some(vec![String::from("https://Gateway.example/")]);
        assert_eq!(environment(&given, &expected).last().unwrap().1, "CLAUDE_CODE_USE_BEDROCK");
        assert_eq!(environment(&[("ANTHROPIC_BASE_URL", "https://gateway.example.org")], &expected).len(), 1);
    }

    #[test]
    fn what_a_settings_file_does_is_told_by_name_alone() {
        let text = r#"{"env":{"ANTHROPIC_BASE_URL":"http://127.0.0.1:1","HTTPS_PROXY":"http://x","FOO":"1","BUN_OPTIONS":"--preload x"},"apiKeyHelper":"cat key"}"#;
        let found = in_settings(Path::new("f"), text, &None);
        let said: Vec<(&str, &str)> = found.iter().map(|one| (one.kind.as_str(), one.name.as_str())).collect();
        assert_eq!(
            said,
            [
                ("endpoint", "ANTHROPIC_BASE_URL"),
                ("loader", "BUN_OPTIONS"),
                ("network", "HTTPS_PROXY"),
                ("key_helper", "apiKeyHelper")
            ]
        );
        let expected = Some(vec![String::from("http://127.0.0.1:1")]);
        assert_eq!(in_settings(Path::new("f"), text, &expected).len(), 3);
        for junk in ["", "{", "[]", "7", r#"{"env":[]}"#, r#"{"env":null}"#] {
            assert!(in_settings(Path::new("f"), junk, &None).is_empty(), "{junk}");
        }
    }

    #[test]
    fn a_policy_takes_variables_away_or_starts_nothing() {
        let found = |kind, file: Option<&str>| Finding { kind, name: String::from("X"), file: file.map(PathBuf::from) };
        let all = [found(Kind::Loader, None), found(Kind::Endpoint, Some("f")), found(Kind::Network, Some("f"))];
        assert!(judge(Policy::Report, &all, &None).unwrap().is_empty());
        assert_eq!(judge(Policy::Strip, &all, &None).unwrap(), ["X"]);
        assert_eq!(judge(Policy::Refuse, &all, &None).unwrap_err().0.len(), 1);
        assert_eq!(judge(Policy::Refuse, &all, &Some(Vec::new())).unwrap_err().0.len(), 2);
        assert!(judge(Policy::Refuse, &all[2..], &Some(Vec::new())).is_ok());
        assert_eq!(names(b"A=1\0LD_PRELOAD=/x\0ENV=\0\xff=2\0ANTHROPIC_BASE_URL=u\0"), ["LD_PRELOAD", "ANTHROPIC_BASE_URL"]);
    }
}
