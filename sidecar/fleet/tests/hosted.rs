//! The providers that are reached over HTTP, each against a fake that holds them to the published contract.

#![expect(clippy::unwrap_used, reason = "a fake that cannot go on fails its test")]
#![expect(clippy::disallowed_methods, reason = "a fake has processes of its own, and nobody else waits for them")]

mod conformance;
mod fakes;
mod hosted {
    pub(crate) mod cloudflare;
    pub(crate) mod daytona;
    pub(crate) mod e2b;
    pub(crate) mod fly;
    pub(crate) mod kubernetes;
    pub(crate) mod modal;
    mod sdks;
    pub(crate) mod vercel;
}

use std::collections::BTreeMap;
use std::time::Duration;

use agent_fleet::provider::{Provider, Size, Spec};
use async_trait::async_trait;

use conformance::{Call, Does, Fault, World};
use fakes::Fake;

/// What the suite has to know of a provider that is reached over HTTP, which its fake knows.
pub(crate) trait Known: fakes::Api {
    const PAGE: usize;
    /// Of the default size for an hour, by the price list.
    const PRICE_USD: f64;

    fn count(&self, key: &str) -> usize;

    /// `None`: it cannot be had here.
    fn spec(does: Does) -> Option<Spec> {
        Some(Spec { command: command(does)?, ..spec("") })
    }
}

/// A provider, and the fake that it asks.
pub(crate) struct Hosted<A, P> {
    pub(crate) fake: Fake<A>,
    pub(crate) provider: P,
}

impl<A: Known, P: Provider> Hosted<A, P> {
    /// All that every provider must do, by its contract.
    pub(crate) async fn conforms(&self) {
        conformance::run(&self.provider, self).await;
        assert_eq!(self.fake.wrong(), Vec::<String>::new());
    }
}

#[async_trait]
impl<A: Known, P: Provider> World for Hosted<A, P> {
    fn spec(&self, does: Does) -> Option<Spec> {
        A::spec(does)
    }

    fn price_usd(&self) -> f64 {
        A::PRICE_USD
    }

    fn page(&self) -> Option<usize> {
        Some(A::PAGE)
    }

    fn arm(&self, call: Call, fault: Fault) -> bool {
        self.fake.arm(call, fault);
        true
    }

    fn armed(&self) -> usize {
        self.fake.armed()
    }

    async fn count(&self, key: &str) -> usize {
        self.fake.api.count(key)
    }
}

fn spec(key: &str) -> Spec {
    Spec {
        key: key.to_owned(),
        image: String::from("base"),
        command: Vec::new(),
        env: BTreeMap::new(),
        secrets: BTreeMap::new(),
        size: Size::default(),
        ports: Vec::new(),
        labels: BTreeMap::from([(String::from("team"), String::from("a&b=c d"))]),
        ttl: Duration::from_secs(3600),
        idle: None,
        avoid: vec![],
    }
}

fn sh(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(String::from).to_vec()
}

/// The same where it ends with its command.
fn ending(does: Does) -> Option<Vec<String>> {
    match does {
        Does::Exit(code) => Some(sh(&format!("echo exits with {code}; exit {code}"))),
        other => command(other),
    }
}

/// What does that, where the container outlives its command: then there is none that ends with it.
fn command(does: Does) -> Option<Vec<String>> {
    match does {
        Does::Wait | Does::Serve(_) => Some(sh("trap 'exit 0' TERM; : >\"$HOME/ready\"; while :; do sleep 0.05; done")),
        Does::Ignore => Some(sh("trap '' TERM; : >\"$HOME/ready\"; while :; do sleep 0.05; done")),
        Does::Exit(_) => None,
    }
}

/// Each as its least settings make it.
fn providers() -> Vec<Box<dyn Provider>> {
    fn of<T: serde::de::DeserializeOwned>(more: &str) -> T {
        toml::from_str(&format!("token = {{ env = \"TOKEN\" }}\n{more}")).unwrap()
    }
    use agent_fleet::provider::{cloudflare, daytona, e2b, fly, kubernetes, modal, vercel};
    vec![
        Box::new(e2b::E2b::new(of("")).unwrap()),
        Box::new(daytona::Daytona::new(of("")).unwrap()),
        Box::new(fly::Fly::new(of("app = \"agents\"")).unwrap()),
        Box::new(vercel::Vercel::new(of("team = \"t\"\nproject = \"p\"")).unwrap()),
        Box::new(
            modal::Modal::new(
                toml::from_str("token_id = { env = \"ID\" }\ntoken_secret = { env = \"SECRET\" }\napp = \"agents\"").unwrap(),
            )
            .unwrap(),
        ),
        Box::new(kubernetes::Kubernetes::new(kubernetes::Settings::default()).unwrap()),
        Box::new(cloudflare::Cloudflare::new(of("url = \"https://fleet.example.workers.dev\"")).unwrap()),
    ]
}

/// The tables that docs/fleet-providers.md has to have.
fn tables() -> [(&'static str, String); 2] {
    use agent_fleet::provider::Pause;
    let word = |yes: bool| if yes { "yes" } else { "no" };
    let heads = [
        "command",
        "environment",
        "provider's secrets",
        "size",
        "ports",
        "list by label",
        "ends it",
        "idle timer",
        "pause",
        "exec",
        "logs",
        "events",
        "endpoint",
        "traffic wakes",
        "nodes",
    ];
    let mut can = format!("| | {} |\n|---{}|\n", heads.join(" | "), "|---".repeat(heads.len()));
    let mut prices = String::from("| | running | paused | stopped | from |\n|---|---|---|---|---|\n");
    for provider in providers() {
        let c = provider.capabilities();
        let ttl = c
            .ttl
            .map_or(String::from("no"), |bounds| format!("{} s to {} h", bounds.least.as_secs(), bounds.most.as_secs() / 3600));
        let pause = match c.pause {
            Pause::No => "no",
            Pause::Frozen => "frozen",
            Pause::Memory => "memory",
            Pause::Disk => "disk",
        };
        let row = [
            word(c.command),
            word(c.env),
            word(c.provider_secrets),
            word(c.size),
            word(c.ports),
            word(c.list),
            &ttl,
            word(c.idle_timer),
            pause,
            word(c.exec),
            word(c.logs),
            word(c.events),
            word(c.endpoint),
            word(c.traffic_keeps_awake),
            word(c.nodes),
        ];
        can += &format!("| `{}` | {} |\n", provider.name(), row.join(" | "));
        let price = provider.price(Size::default());
        prices += &format!(
            "| `{}` | {:.4} | {:.4} | {:.4} | {} |\n",
            provider.name(),
            price.running,
            price.paused,
            price.stopped,
            price.source
        );
    }
    [("capabilities", can), ("prices", prices)]
}

#[test]
fn the_page_of_providers_says_what_they_can() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/fleet-providers.md");
    let page = std::fs::read_to_string(path).unwrap();
    // What is below one that does not end would be code.
    assert_eq!(page.matches("\n```").count() % 2, 0, "a block of code has no end");
    for (name, table) in tables() {
        let has = page
            .split_once(&format!("<!-- {name} -->\n"))
            .and_then(|(_, rest)| rest.split_once(&format!("<!-- /{name} -->")))
            .map(|(has, _)| has);
        assert_eq!(has, Some(table.as_str()), "put this between the marks `{name}`:\n{table}");
    }
}
