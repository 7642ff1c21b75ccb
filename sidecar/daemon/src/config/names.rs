//! What settings are called in the environment, and what somebody may have meant who called one otherwise.

use std::collections::BTreeSet;

use agent_sidecar_core::written::near;

use super::{DEFAULT_FILE, Mistake, Origin, SETTINGS, Setting};

pub(super) const PREFIX: &str = "AGENT_SIDECAR_";

/// A setting's name in the environment.
pub(crate) fn variable(setting: &Setting) -> String {
    format!("{PREFIX}{}", setting.flag.replace('-', "_").to_uppercase())
}

/// Stands for a key that is not told.
pub(super) const WITHHELD: &str = "withheld";

pub(super) fn name_of(key: &str) -> String {
    SETTINGS.iter().find(|setting| setting.key == key).map(variable).expect("it is a setting")
}

/// What was called otherwise once, and what is set instead now.
const RENAMED: &[(&str, &str)] = &[("limits.utc_offset", "limits.time_zone")];

/// The setting that has taken another's place.
pub(super) fn renamed(key: &str) -> Option<&'static Setting> {
    let (_, now) = RENAMED.iter().find(|(before, _)| *before == key)?;
    SETTINGS.iter().find(|setting| setting.key == *now)
}

/// What the project itself reads beside settings: the shim, and the tests.
const OURS: &[&str] =
    &["BIN", "SHIM_DEPTH", "SPAWNED", "TESTS_NO_DOCKER", "TEST_OTLP_CHILD", "TEST_OTLP_COST", "WRAPS", "WRITE_DOCS"];

pub(super) fn is_ours(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|name| OURS.contains(&name))
}

/// What Kubernetes sets for a service that is called like us, or begins so; the first is an address, and no port that somebody chose.
pub(super) fn is_kubernetes(name: &str, value: &str) -> bool {
    let name = format!("_{}", name.strip_prefix(PREFIX).unwrap_or(name));
    let numbered = |rest: &str| {
        let mut parts = rest.split('_');
        parts.next().is_some_and(|port| port.parse::<u16>().is_ok()) && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
    };
    name.ends_with("_PORT") && value.contains("://")
        || ["_SERVICE_HOST", "_SERVICE_PORT"].iter().any(|end| name.ends_with(end))
        || name.contains("_SERVICE_PORT_")
        || name.match_indices("_PORT_").any(|(at, port)| numbered(&name[at + port.len()..]))
}

/// A variable that means nothing, and may have been meant for something: it is said, and refuses nothing, since other programs of a
/// platform may share the prefix. Its name alone: the value may be a key.
pub(super) fn stranger(name: &str) -> Mistake {
    let words = |name: &str| -> BTreeSet<String> { name.split('_').map(str::to_owned).collect() };
    let its = words(name.strip_prefix(PREFIX).unwrap_or(name));
    let shared = |setting: &Setting| words(&setting.flag.replace('-', "_").to_uppercase()).intersection(&its).count();
    // Of those that have as many words of it the shortest.
    let nearest = SETTINGS.iter().max_by_key(|setting| (shared(setting), std::cmp::Reverse(setting.flag.len())));
    let remedy = match nearest.filter(|setting| shared(setting) > 0) {
        Some(nearest) => format!("the nearest is {}", variable(nearest)),
        None => String::from("`agent-sidecar check --print` lists what there is"),
    };
    // A name may hold anything but `=`.
    let name = name.chars().take(100).flat_map(char::escape_default).collect();
    Mistake { origin: Origin::Environment(name), what: String::from("no setting is called so, and nothing reads it"), remedy }
}

/// A variable that means nothing and was meant for one of ours: a limit that nobody holds costs money.
pub(super) fn slip(name: &str) -> Option<Mistake> {
    let before = RENAMED
        .iter()
        .find(|(before, _)| before.rsplit('.').next().map(str::to_uppercase).as_deref() == name.strip_prefix(PREFIX));
    if let Some(now) = before.and_then(|(before, _)| renamed(before)) {
        return Some(Mistake {
            origin: Origin::Environment(name.to_owned()),
            what: String::from("there is no such variable any more"),
            remedy: format!("set {} instead; it is {}", variable(now), now.help),
        });
    }
    if name == "AGENT_SIDECAR_CONFIG" {
        return Some(Mistake {
            origin: Origin::Environment(name.to_owned()),
            what: String::from("there is no such variable"),
            remedy: format!("the file is {DEFAULT_FILE}; only `--config` names another"),
        });
    }
    // The names that somebody would make of the keys are as near as can be.
    let meant = SETTINGS
        .iter()
        .find(|setting| *name == format!("{PREFIX}{}", setting.key.replace('.', "_").to_uppercase()))
        .map(variable)
        .or_else(|| {
            let known: Vec<String> = SETTINGS.iter().map(variable).collect();
            near(name, known.iter().map(String::as_str), |name| name.strip_prefix(PREFIX).unwrap_or(name)).map(str::to_owned)
        })?;
    Some(Mistake {
        origin: Origin::Environment(name.to_owned()),
        what: String::from("there is no such variable"),
        remedy: format!("did you mean {meant}?"),
    })
}
