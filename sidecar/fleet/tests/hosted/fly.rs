use std::time::Duration;

use agent_fleet::provider::fly::{Fly, Settings};
use agent_fleet::provider::{Error, Provider, Size, Spec, State};
use async_trait::async_trait;

use crate::conformance::{self, Call, Does, Fault, World};
use crate::fakes::{self, Fake, token};
use crate::{sh, spec};

struct Hosted {
    fake: Fake<fakes::fly::Fly>,
    provider: Fly,
}

impl Hosted {
    async fn new() -> Self {
        let fake = Fake::serve(|_| fakes::fly::Fly::new()).await;
        let settings = serde_json::json!({ "token": token(), "base_url": format!("{}/v1", fake.address), "app": "agents", "creates_per_second": 100 });
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let provider = Fly::new(settings).unwrap();
        Self { fake, provider }
    }
}

#[async_trait]
impl World for Hosted {
    fn spec(&self, does: Does) -> Option<Spec> {
        let command = match does {
            Does::Exit(code) => sh(&format!("echo exits with {code}; exit {code}")),
            // Its address is one of a network that is not here.
            Does::Serve(_) => return None,
            other => crate::command(other)?,
        };
        Some(Spec { command, ..spec("") })
    }

    fn price_usd(&self) -> f64 {
        0.0082
    }

    fn page(&self) -> Option<usize> {
        Some(fakes::fly::PAGE)
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

#[tokio::test]
async fn it_does_what_every_provider_must() {
    let world = Hosted::new().await;
    conformance::run(&world.provider, &world).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn nothing_is_started_again_or_forgotten_by_the_provider() {
    let Hosted { fake, provider } = Hosted::new().await;
    let size = Size { cpu_milli: 1500, memory_mib: 3000, disk_mib: 10 << 10 };
    let made = provider.create(&Spec { size, ..spec("agent-fly-1") }).await.unwrap();
    let config = fake.api.config("agent-fly-1");
    assert_eq!(config["restart"]["policy"], "no");
    assert_eq!(config["auto_destroy"], false);
    assert_eq!(config["services"], serde_json::Value::Null, "nothing is open to the world");
    assert_eq!(config["rootfs"]["size_gb"], 10);
    assert_eq!(made.size, Some(Size { cpu_milli: 2000, memory_mib: 3072, disk_mib: 10 << 10 }));
    let found = provider.endpoint(&made.native, 9464).await.unwrap();
    assert_eq!(found.url, "http://[fdaa:0:1::2]:9464");
    assert_eq!(fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn a_machine_is_paced_and_the_others_are_not() {
    let Hosted { provider, .. } = &Hosted::new().await;
    let first = provider.create(&spec("agent-paced-1")).await.unwrap().native;
    let other = provider.create(&spec("agent-paced-2")).await.unwrap().native;
    // Ten at once and five a second: the fortieth waits for six seconds, which is more than is waited.
    let asked = futures_util::future::join_all((0..40).map(|_| provider.state(&first))).await;
    let busy = asked.iter().filter(|asked| matches!(asked, Err(Error::Busy { after: Some(_), .. }))).count();
    assert!((5..20).contains(&busy), "{busy}");
    let began = std::time::Instant::now();
    assert_eq!(provider.state(&other).await.unwrap().state, State::Running);
    assert!(began.elapsed() < Duration::from_secs(1));
}
