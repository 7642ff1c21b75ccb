use std::time::Duration;

use agent_fleet::provider::daytona::{Daytona, Settings};
use agent_fleet::provider::{Provider, Spec};
use jiff::Timestamp;

use crate::fakes::{self, Fake, token};
use crate::{Known, sh, spec};

type Hosted = crate::Hosted<fakes::daytona::Daytona, Daytona>;

impl Hosted {
    async fn new() -> Self {
        let fake = Fake::serve(fakes::daytona::Daytona::new).await;
        let settings = serde_json::json!({ "token": token(), "base_url": fake.address });
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let provider = Daytona::new(settings).unwrap();
        Self { fake, provider }
    }
}

impl Known for fakes::daytona::Daytona {
    const PAGE: usize = fakes::daytona::PAGE;
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
async fn no_timer_is_left_to_the_provider() {
    let Hosted { fake, provider } = Hosted::new().await;
    provider.create(&Spec { ttl: Duration::from_secs(90), ..spec("agent-timers-1") }).await.unwrap();
    let (asked, _) = fake.api.made("agent-timers-1");
    let timers = |asked: &serde_json::Value| {
        ["autoStopInterval", "ttlMinutes", "autoDeleteInterval"].map(|name| asked[name].as_i64().unwrap())
    };
    assert_eq!(timers(&asked), [0, 2, -1]);
    let native = provider.create(&Spec { idle: Some(Duration::from_secs(600)), ..spec("agent-timers-2") }).await.unwrap().native;
    provider.keep_alive(&native, Timestamp::now()).await.unwrap();
    let (asked, activity) = fake.api.made("agent-timers-2");
    assert_eq!(timers(&asked), [10, 60, -1]);
    assert_eq!(activity, 1);
}

/// What was begun is on the disk, and is begun anew by who only knows the name.
#[tokio::test]
async fn a_start_begins_the_command_anew() {
    let Hosted { fake, provider } = Hosted::new().await;
    let command = sh("echo begun; trap 'exit 0' TERM; : >\"$HOME/ready\"; while :; do sleep 0.05; done");
    let native = provider.create(&Spec { command, ..spec("agent-anew-1") }).await.unwrap().native;
    let began = async |times: usize| {
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while provider.logs(&native, 100).await.unwrap() != b"begun\n".repeat(times) {
            assert!(std::time::Instant::now() < until, "{:?}", provider.logs(&native, 100).await);
        }
    };
    began(1).await;
    provider.stop(&native, Duration::from_secs(60)).await.unwrap();
    provider.start(&native).await.unwrap();
    began(2).await;
    provider.start(&native).await.unwrap();
    began(2).await;
    assert_eq!(fake.wrong(), Vec::<String>::new());
}
