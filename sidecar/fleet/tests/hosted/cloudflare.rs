use std::time::Duration;

use agent_fleet::provider::cloudflare::{Cloudflare, Settings};
use agent_fleet::provider::{Error, Provider, Spec, State};
use async_trait::async_trait;

use crate::conformance::{self, Call, Does, Fault, World};
use crate::fakes::{self, Fake, token};
use crate::{Known, ending, sh, spec};

fn provider(url: &str, token: serde_json::Value) -> Cloudflare {
    let settings: Settings = serde_json::from_value(serde_json::json!({ "url": url, "token": token })).unwrap();
    Cloudflare::new(settings).unwrap()
}

type Hosted = crate::Hosted<fakes::cloudflare::Cloudflare, Cloudflare>;

impl Hosted {
    async fn new() -> Self {
        let fake = Fake::serve(|_| fakes::cloudflare::Cloudflare::new()).await;
        let provider = provider(&fake.address, token());
        Self { fake, provider }
    }
}

impl Known for fakes::cloudflare::Cloudflare {
    const PAGE: usize = fakes::cloudflare::PAGE;
    const PRICE_USD: f64 = 0.1290;

    fn count(&self, key: &str) -> usize {
        self.count(key)
    }

    fn spec(does: Does) -> Option<Spec> {
        Some(Spec { command: ending(does)?, image: String::from(fakes::cloudflare::IMAGE), ..spec("") })
    }
}

#[tokio::test]
async fn it_does_what_every_provider_must() {
    Hosted::new().await.conforms().await;
}

#[tokio::test]
async fn every_timer_is_set_and_what_has_ended_is_not_started() {
    let Hosted { fake, provider } = Hosted::new().await;
    let image = String::from(fakes::cloudflare::IMAGE);
    let asked = Spec { image: image.clone(), idle: Some(Duration::from_secs(120)), command: sh("exit 3"), ..spec("agent-cf-1") };
    let made = provider.create(&asked).await.unwrap();
    // The idle timer is the nearer end, as long as nobody has moved it.
    let life = made.deadline.unwrap().duration_since(made.created.unwrap());
    assert!((110..130).contains(&life.as_secs()), "{life:?}");
    let told = &fake.api.asked()[0];
    assert_eq!((&told["ttl_s"], &told["idle_s"]), (&serde_json::json!(3600), &serde_json::json!(120)));
    while provider.state(&made.native).await.unwrap().state != State::Stopped {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(matches!(provider.start(&made.native).await, Err(Error::Unsupported { .. })));

    provider.create(&Spec { image, ..spec("agent-cf-2") }).await.unwrap();
    assert_eq!(fake.api.asked()[1]["idle_s"], serde_json::Value::Null, "switched off");
    let other = provider.create(&Spec { image: String::from("another"), ..spec("agent-cf-3") }).await;
    assert!(matches!(&other, Err(Error::Refused { what, .. }) if what.contains("the image here is")), "{other:?}");
    assert_eq!(fake.wrong(), Vec::<String>::new());
}

/// The Worker itself, where tests/fleet has it running: see there.
struct Real(Cloudflare);

#[async_trait]
impl World for Real {
    fn spec(&self, does: Does) -> Option<Spec> {
        let command = match does {
            Does::Exit(code) => sh(&format!("echo exits with {code}; exit {code}")),
            Does::Wait => sh("trap 'exit 0' TERM; while :; do sleep 0.1; done"),
            Does::Ignore => sh("trap '' TERM; while :; do sleep 0.1; done"),
            Does::Serve(port) => sh(&format!("exec python3 -m http.server {port}")),
        };
        Some(Spec { command, image: std::env::var("AGENT_FLEET_TEST_CLOUDFLARE_IMAGE").unwrap(), ..spec("") })
    }

    fn price_usd(&self) -> f64 {
        0.1290
    }

    fn page(&self) -> Option<usize> {
        None
    }

    fn arm(&self, _call: Call, _fault: Fault) -> bool {
        false
    }

    fn armed(&self) -> usize {
        0
    }

    /// What the daemon has is named by a number that only the Worker can make of a key.
    async fn count(&self, key: &str) -> usize {
        match self.0.state(key).await.unwrap().state {
            State::Missing => 0,
            _ => 1,
        }
    }

    /// A shell needs a moment to set its trap.
    async fn listens(&self, _native: &str) {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

#[tokio::test]
async fn its_worker_does_what_every_provider_must() {
    let Ok(url) = std::env::var("AGENT_FLEET_TEST_CLOUDFLARE") else {
        eprintln!("not tried: AGENT_FLEET_TEST_CLOUDFLARE says where the Worker is");
        return;
    };
    let world = Real(provider(&url, serde_json::json!({ "env": "AGENT_FLEET_TEST_CLOUDFLARE_TOKEN" })));
    conformance::run(&world.0, &world).await;
}
