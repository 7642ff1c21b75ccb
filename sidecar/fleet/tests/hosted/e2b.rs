use std::collections::BTreeMap;
use std::time::Duration;

use agent_fleet::provider::e2b::{E2b, Settings};
use agent_fleet::provider::{Error, Exec, KEY_LABEL, Provider, Secret, Spec, State};
use jiff::Timestamp;

use crate::conformance::{Call, Fault};
use crate::fakes::{self, Fake, token};
use crate::{Known, sh, spec};

type Hosted = crate::Hosted<fakes::e2b::E2b, E2b>;

impl Hosted {
    async fn new() -> Self {
        let fake = Fake::serve(|_| fakes::e2b::E2b::new()).await;
        let settings = serde_json::json!({ "token": token(), "base_url": fake.address, "sandbox_url": fake.address });
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let provider = E2b::new(settings).unwrap();
        Self { fake, provider }
    }
}

impl Known for fakes::e2b::E2b {
    const PAGE: usize = fakes::e2b::PAGE;
    const PRICE_USD: f64 = 0.0666;

    fn count(&self, key: &str) -> usize {
        self.count(key)
    }
}

#[tokio::test]
async fn it_does_what_every_provider_must() {
    Hosted::new().await.conforms().await;
}

#[tokio::test]
async fn what_is_not_listed_yet_is_not_made_twice() {
    let Hosted { fake, provider } = Hosted::new().await;
    *fake.api.lag.lock().unwrap() = Duration::from_millis(800);
    fake.arm(Call::Create, Fault::LoseAnswer);
    let unsure = provider.create(&spec("agent-lag-1")).await;
    assert!(matches!(unsure, Err(Error::Unsure { .. })), "{unsure:?}");
    provider.create(&spec("agent-lag-1")).await.unwrap();
    assert_eq!(fake.api.count("agent-lag-1"), 1);
}

#[tokio::test]
async fn of_two_with_one_key_the_younger_goes() {
    let Hosted { fake, provider } = Hosted::new().await;
    let oldest = fake.api.insert("agent-two-1");
    for _ in 0..fakes::e2b::PAGE {
        fake.api.insert("agent-two-1");
    }
    assert_eq!(provider.create(&spec("agent-two-1")).await.unwrap().native, oldest);
    assert_eq!(fake.api.count("agent-two-1"), 1);
}

#[tokio::test]
async fn its_timer_is_moved_on_and_never_beyond_its_end_and_never_back() {
    let Hosted { fake, provider } = Hosted::new().await;
    let spec = Spec { idle: Some(Duration::from_secs(60)), ttl: Duration::from_secs(600), ..spec("agent-idle-1") };
    let before = Timestamp::now();
    let native = provider.create(&spec).await.unwrap().native;
    let life = || fake.api.ends(&native).duration_since(before).as_secs();
    assert!((58..=70).contains(&life()), "{}", life());
    for (asked, least, most) in [(300, 298, 310), (120, 298, 310), (100_000, 598, 600)] {
        provider.keep_alive(&native, Timestamp::now() + Duration::from_secs(asked)).await.unwrap();
        assert!((least..=most).contains(&life()), "{asked}: {}", life());
    }
    // Nor does it live longer for having slept.
    provider.pause(&native).await.unwrap();
    provider.resume(&native, &[]).await.unwrap();
    assert!((590..=600).contains(&life()), "{}", life());
}

#[tokio::test]
async fn its_command_is_begun_once_and_its_output_kept() {
    let Hosted { fake, provider } = Hosted::new().await;
    let spec = Spec { command: sh("echo begun; sleep 1000"), ..spec("agent-once-1") };
    let native = provider.create(&spec).await.unwrap().native;
    provider.create(&spec).await.unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while provider.logs(&native, 100).await.unwrap() != b"begun\n" {
        assert!(std::time::Instant::now() < until, "{:?}", provider.logs(&native, 100).await);
    }
    assert_eq!(provider.logs(&native, 3).await.unwrap(), b"un\n");
    provider.pause(&native).await.unwrap();
    let asleep = provider.logs(&native, 3).await;
    assert!(matches!(asleep, Err(Error::Refused { .. })), "{asleep:?}");
    assert_eq!(fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn what_is_refused_is_refused_without_a_secret_and_leaves_nothing() {
    let Hosted { fake, provider } = Hosted::new().await;
    let path = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
    std::fs::write(&path, "s3cret").unwrap();
    let mut spec = Spec { image: String::from("none"), ..spec("agent-no-1") };
    spec.secrets.insert(String::from("KEY"), Secret::File(path.clone()));
    let error = provider.create(&spec).await.unwrap_err();
    std::fs::remove_file(path).unwrap();
    assert_eq!(error.to_string(), "e2b: it answers 404: template 'none' not found");
    assert!(matches!(error, Error::Refused { .. }));
    assert_eq!(fake.api.count("agent-no-1"), 0);

    let settings = serde_json::json!({ "token": { "env": "AGENT_FLEET_NO_SUCH_TOKEN" }, "base_url": fake.address });
    let nobody = E2b::new(serde_json::from_value(settings).unwrap()).unwrap();
    let error = nobody.state("x").await.unwrap_err();
    assert!(matches!(&error, Error::Refused { what, .. } if what.contains("AGENT_FLEET_NO_SUCH_TOKEN")), "{error:?}");
    assert!(serde_json::from_value::<Settings>(serde_json::json!({ "token": { "env": "X" }, "api_key": "x" })).is_err());
}

/// What a sandbox's end does to a command that runs in it is not an end of the command.
#[tokio::test]
async fn a_container_that_vanishes_is_missing() {
    let Hosted { fake: _fake, provider } = Hosted::new().await;
    let native = provider.create(&Spec { ttl: Duration::from_secs(1), ..spec("agent-gone-1") }).await.unwrap().native;
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while provider.state(&native).await.unwrap().state != State::Missing {
        assert!(std::time::Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let looked =
        Exec { argv: sh("true"), env: BTreeMap::new(), stdin: Vec::new(), timeout: Duration::from_secs(5), detached: false };
    assert!(matches!(provider.exec(&native, &looked).await, Err(Error::Missing { .. })));
    let labels = BTreeMap::from([(String::from(KEY_LABEL), String::from("agent-gone-1"))]);
    assert_eq!(provider.list(&labels, None).await.unwrap().sandboxes, []);
}
