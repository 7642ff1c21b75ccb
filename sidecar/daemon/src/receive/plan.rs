//! Whether the CLI is asked to export its telemetry to us, and how that goes together with what its user has set up.
//!
//! Only the endpoints of metrics and logs are ours; traces, headers, compression and what may be told of prompts stay his. A user who
//! exports already keeps it: what comes is forwarded as it came. Where that cannot be done, we stay out, and say so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hyper::Uri;

use super::Signal;

/// The setting `native.telemetry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Where nothing else tells what is spent.
    Auto,
    On,
    Off,
}

/// What is done, and why not.
#[derive(Debug)]
pub(crate) enum Decision {
    On(Plan),
    /// Not wanted.
    Off,
    /// Wanted, and it cannot be done without taking something from the user.
    StayOut(String),
}

/// What the CLI is told, and where what it says goes on to.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    variables: BTreeMap<String, String>,
    /// Those whose value is a path below the receiver's base.
    endpoints: BTreeMap<String, Signal>,
    destinations: BTreeMap<Signal, Uri>,
    /// Files with certificates of authorities, besides those that everybody trusts.
    authorities: Vec<PathBuf>,
}

impl Plan {
    pub(crate) fn destination(&self, signal: Signal) -> Option<&Uri> {
        self.destinations.get(&signal)
    }

    /// Whether anything is to be forwarded.
    pub(crate) fn forwards(&self) -> bool {
        !self.destinations.is_empty()
    }

    pub(crate) fn authorities(&self) -> &[PathBuf] {
        &self.authorities
    }

    /// What the CLI is to find in its environment, when the receiver is here.
    pub(crate) fn variables(&self, base: &str) -> Vec<(String, String)> {
        let endpoints = self.endpoints.iter().map(|(name, signal)| (name.clone(), format!("{base}/v1/{}", signal.as_str())));
        self.variables.iter().map(|(name, value)| (name.clone(), value.clone())).chain(endpoints).collect()
    }
}

/// What the user has set up: the environment, and what the CLI's settings files lay over it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    pub(crate) environment: BTreeMap<String, String>,
    /// The CLI lets these win.
    pub(crate) settings: BTreeMap<String, String>,
}

impl Surroundings {
    /// This process's, and those of the files that the CLI reads, the strongest last.
    pub(crate) fn here() -> Surroundings {
        let environment: BTreeMap<String, String> =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect();
        let home = environment.get("HOME").map(|home| Path::new(home).join(".claude"));
        let user = environment.get("CLAUDE_CONFIG_DIR").map(PathBuf::from).or(home);
        let files = [
            user.map(|dir| dir.join("settings.json")),
            Some(PathBuf::from(".claude/settings.json")),
            Some(PathBuf::from(".claude/settings.local.json")),
            Some(PathBuf::from("/etc/claude-code/managed-settings.json")),
        ];
        let mut settings = BTreeMap::new();
        for text in files.into_iter().flatten().filter_map(|file| crate::files::read_linked(&file).ok()) {
            settings.extend(env_of(&text));
        }
        Surroundings { environment, settings }
    }

    fn get(&self, name: &str) -> Option<&str> {
        let value = self.settings.get(name).or_else(|| self.environment.get(name))?;
        Some(value.trim()).filter(|value| !value.is_empty())
    }

    /// The signal's own variable, or the one for all.
    fn otlp(&self, signal: Signal, what: &str) -> Option<&str> {
        self.get(&own(signal, what)).or_else(|| self.get(&format!("OTEL_EXPORTER_OTLP_{what}")))
    }

    /// Where the CLI is to serve its own metrics to Prometheus, if it is to: one port, which the second CLI of a container does not get.
    pub(crate) fn own_prometheus(&self) -> Option<u16> {
        let on = self.is_on() && self.exporters(Signal::Metrics).contains(&"prometheus");
        on.then(|| self.get("OTEL_EXPORTER_PROMETHEUS_PORT").and_then(|port| port.parse().ok()).unwrap_or(9464))
    }

    fn is_on(&self) -> bool {
        matches!(self.get("CLAUDE_CODE_ENABLE_TELEMETRY"), Some("1" | "true" | "yes" | "on"))
    }

    /// The exporters that the user has chosen for a signal.
    fn exporters(&self, signal: Signal) -> Vec<&str> {
        let list = self.get(&exporter(signal)).unwrap_or_default();
        list.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "none").collect()
    }
}

/// The variables of a settings file, as far as it can be read.
fn env_of(text: &str) -> BTreeMap<String, String> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        env: BTreeMap<String, serde_json::Value>,
    }
    let file: File = serde_json::from_str(text).unwrap_or(File { env: BTreeMap::new() });
    let text = |value: serde_json::Value| match value {
        serde_json::Value::String(text) => text,
        other => other.to_string(),
    };
    file.env.into_iter().map(|(name, value)| (name, text(value))).collect()
}

fn upper(signal: Signal) -> String {
    signal.as_str().to_uppercase()
}

fn own(signal: Signal, what: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_{}_{what}", upper(signal))
}

fn exporter(signal: Signal) -> String {
    format!("OTEL_{}_EXPORTER", upper(signal))
}

/// How often is asked for: a limit acts, and a kill loses, within about that.
const INTERVALS: [(&str, &str); 2] = [("OTEL_METRIC_EXPORT_INTERVAL", "1000"), ("OTEL_LOGS_EXPORT_INTERVAL", "500")];

/// `blind`: it is the CLI, it will ask a model, and nothing of it can be read. `agent`: it is the CLI at all.
pub(crate) fn decide(choice: Choice, agent: bool, blind: bool, user: &Surroundings) -> Decision {
    match choice {
        Choice::Off => return Decision::Off,
        Choice::Auto if !blind => return Decision::Off,
        Choice::On if !agent => return Decision::Off,
        Choice::Auto | Choice::On => {}
    }
    let mut plan = Plan::default();
    let mut set = |name: &str, value: &str| plan.variables.insert(name.to_owned(), value.to_owned());
    if !user.is_on() {
        set("CLAUDE_CODE_ENABLE_TELEMETRY", "1");
        // These were meant for others: the CLI had no telemetry, and has none now but ours.
        set("OTEL_TRACES_EXPORTER", "none");
        for signal in Signal::ALL {
            set(&exporter(signal), "otlp");
            set(&own(signal, "PROTOCOL"), "http/protobuf");
        }
        for (name, interval) in INTERVALS {
            set(name, interval);
        }
        set("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta");
    } else {
        for signal in Signal::ALL {
            let exporters = user.exporters(signal);
            if !exporters.contains(&"otlp") {
                set(&exporter(signal), &exporters.into_iter().chain(["otlp"]).collect::<Vec<_>>().join(","));
                set(&own(signal, "PROTOCOL"), "http/protobuf");
                continue;
            }
            match destination(signal, user) {
                Ok(to) => plan.destinations.insert(signal, to),
                Err(why) => return Decision::StayOut(why),
            };
        }
        let certificates = Signal::ALL.map(|signal| user.otlp(signal, "CERTIFICATE"));
        let trusted = certificates.into_iter().chain([user.get("NODE_EXTRA_CA_CERTS")]);
        plan.authorities = trusted.flatten().map(PathBuf::from).collect();
        for (name, interval) in INTERVALS.into_iter().filter(|(name, _)| user.get(name).is_none()) {
            plan.variables.insert(name.to_owned(), interval.to_owned());
        }
    }
    plan.endpoints = Signal::ALL.map(|signal| (own(signal, "ENDPOINT"), signal)).into();
    let overruled = plan.variables.iter().find(|(name, value)| user.settings.get(*name).is_some_and(|theirs| theirs != *value));
    let overruled =
        overruled.map(|(name, _)| name).or_else(|| plan.endpoints.keys().find(|name| user.settings.contains_key(*name)));
    match overruled {
        Some(name) => Decision::StayOut(format!("the CLI's settings file sets {name}, which wins over its environment")),
        None => Decision::On(plan),
    }
}

/// Where the user's export of a signal goes to.
fn destination(signal: Signal, user: &Surroundings) -> Result<Uri, String> {
    match user.otlp(signal, "PROTOCOL") {
        Some("http/protobuf" | "http/json") => {}
        Some(other) => {
            let name = own(signal, "PROTOCOL");
            return Err(format!("its telemetry goes out as {other}, which cannot be forwarded; set {name} to http/protobuf"));
        }
        None => return Err(String::from("its telemetry has no protocol; set OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf")),
    }
    for certificate in ["CLIENT_CERTIFICATE", "CLIENT_KEY"] {
        if user.otlp(signal, certificate).is_some() {
            return Err(format!("its telemetry needs a {certificate}, which it alone can use"));
        }
    }
    let url = match (user.get(&own(signal, "ENDPOINT")), user.get("OTEL_EXPORTER_OTLP_ENDPOINT")) {
        (Some(own), _) => own.to_owned(),
        (None, base) => format!("{}/v1/{}", base.unwrap_or("http://localhost:4318").trim_end_matches('/'), signal.as_str()),
    };
    let uri: Uri = url.parse().map_err(|_| format!("the endpoint of its {} is no URL", signal.as_str()))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some("http" | "https"), Some(authority)) if authority.as_str().contains('@') => {
            Err(format!("the endpoint of its {} has a password in it, which it alone can use; use headers", signal.as_str()))
        }
        (Some("http" | "https"), Some(_)) => Ok(uri),
        _ => Err(format!("the endpoint of its {} is no http:// or https:// URL", signal.as_str())),
    }
}

#[cfg(test)]
mod tests;
