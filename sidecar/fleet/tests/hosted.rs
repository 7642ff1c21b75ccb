//! The providers that are reached over HTTP, each against a fake that holds them to the published contract.

mod conformance;
mod fakes;
mod hosted {
    pub(crate) mod daytona;
    pub(crate) mod e2b;
    pub(crate) mod fly;
    pub(crate) mod vercel;
}

use std::collections::BTreeMap;
use std::time::Duration;

use agent_fleet::provider::{Size, Spec};

use conformance::Does;

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
    }
}

fn sh(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(String::from).to_vec()
}

/// What does that, where the container outlives its command: then there is none that ends with it.
fn command(does: Does) -> Option<Vec<String>> {
    match does {
        Does::Wait | Does::Serve(_) => Some(sh("trap 'exit 0' TERM; : >\"$HOME/ready\"; while :; do sleep 0.05; done")),
        Does::Ignore => Some(sh("trap '' TERM; : >\"$HOME/ready\"; while :; do sleep 0.05; done")),
        Does::Exit(_) => None,
    }
}
