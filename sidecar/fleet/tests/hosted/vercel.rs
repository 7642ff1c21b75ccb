use std::collections::BTreeMap;
use std::time::Duration;

use agent_fleet::provider::vercel::{Settings, Vercel};
use agent_fleet::provider::{Error, Exec, Provider, Spec, State};
use jiff::Timestamp;

use crate::fakes::{self, Fake, token};
use crate::{Known, sh, spec};

type Hosted = crate::Hosted<fakes::vercel::Vercel, Vercel>;

impl Hosted {
    async fn new() -> Self {
        let fake = Fake::serve(|_| fakes::vercel::Vercel::new()).await;
        let settings =
            serde_json::json!({ "token": token(), "base_url": fake.address, "team": "team_fake", "project": "prj_fake" });
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let provider = Vercel::new(settings).unwrap();
        Self { fake, provider }
    }

    async fn becomes(&self, native: &str, state: State) {
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while self.provider.state(native).await.unwrap().state != state {
            assert!(std::time::Instant::now() < until, "it is not {state:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Known for fakes::vercel::Vercel {
    const PAGE: usize = fakes::vercel::PAGE;
    const PRICE_USD: f64 = 0.1704;

    fn count(&self, key: &str) -> usize {
        self.count(key)
    }
}

#[tokio::test]
async fn it_does_what_every_provider_must() {
    Hosted::new().await.conforms().await;
}

/// Its time is added to, not set: what is asked for twice is had once.
#[tokio::test]
async fn its_timer_is_moved_on_and_never_beyond_its_end() {
    let world = Hosted::new().await;
    let spec = Spec { idle: Some(Duration::from_secs(60)), ttl: Duration::from_secs(600), ..spec("agent-idle-1") };
    world.provider.create(&spec).await.unwrap();
    world.becomes("agent-idle-1", State::Running).await;
    let life = || world.fake.api.sessions("agent-idle-1").1.as_secs();
    assert_eq!(life(), 60);
    for (asked, least, most) in [(300, 298, 310), (300, 298, 310), (120, 298, 310), (100_000, 590, 601), (100_000, 590, 601)] {
        world.provider.keep_alive("agent-idle-1", Timestamp::now() + Duration::from_secs(asked)).await.unwrap();
        assert!((least..=most).contains(&life()), "{asked}: {}", life());
    }
    // The next session has what is left, not the whole.
    world.provider.pause("agent-idle-1").await.unwrap();
    world.becomes("agent-idle-1", State::Stopped).await;
    world.provider.resume("agent-idle-1", &[]).await.unwrap();
    assert!((500..=600).contains(&life()), "{}", life());
}

#[tokio::test]
async fn what_sleeps_is_not_woken_by_being_looked_at() {
    let world = Hosted::new().await;
    let command = sh("echo begun; sleep 1000");
    let native = world.provider.create(&Spec { command, ..spec("agent-asleep-1") }).await.unwrap().native;
    let began = async |times: usize| {
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while world.provider.logs(&native, 100).await.unwrap() != b"begun\n".repeat(times) {
            assert!(std::time::Instant::now() < until);
        }
    };
    began(1).await;
    world.provider.pause(&native).await.unwrap();
    world.becomes(&native, State::Stopped).await;
    let look =
        Exec { argv: sh("true"), env: BTreeMap::new(), stdin: Vec::new(), timeout: Duration::from_secs(5), detached: false };
    assert!(matches!(world.provider.exec(&native, &look).await, Err(Error::Refused { .. })));
    assert!(matches!(world.provider.logs(&native, 10).await, Err(Error::Refused { .. })));
    world.provider.keep_alive(&native, Timestamp::now() + Duration::from_secs(60)).await.unwrap();
    world.provider.list(&BTreeMap::new(), None).await.unwrap();
    assert_eq!(world.fake.api.sessions(&native).0, 1);
    // Its disk is what it was, and its command begins anew, once.
    for _ in 0..2 {
        world.provider.resume(&native, &[]).await.unwrap();
        began(2).await;
    }
    assert_eq!(world.fake.api.sessions(&native).0, 2);
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn what_does_not_fit_is_refused_before_it_is_made() {
    let world = Hosted::new().await;
    let refused = world.provider.create(&Spec { ports: vec![1, 2, 3, 4, 5], ..spec("agent-many-1") }).await.unwrap_err();
    assert!(refused.to_string().contains("at most 4 open ports"), "{refused}");
    assert_eq!(world.fake.seen(), Vec::<String>::new());
}

/// They have five tags: labels that are more share one.
#[tokio::test]
async fn as_many_labels_as_there_are() {
    let world = Hosted::new().await;
    let labels: BTreeMap<String, String> = (0..20).map(|n| (format!("label.{n}&="), format!("a b&c=d:{n}é"))).collect();
    let native = world.provider.create(&Spec { labels: labels.clone(), ..spec("agent-labels-1") }).await.unwrap().native;
    let told = world.provider.state(&native).await.unwrap().labels;
    assert!(labels.iter().all(|(name, value)| told.get(name) == Some(value)), "{told:?}");
    assert_eq!(world.provider.list(&labels, None).await.unwrap().sandboxes.len(), 1);
    let other = BTreeMap::from([(String::from("label.1&="), String::from("x"))]);
    assert_eq!(world.provider.list(&other, None).await.unwrap().sandboxes, []);
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}
