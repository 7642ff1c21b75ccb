use agent_fleet::provider::fly::{Fly, Settings};
use agent_fleet::provider::{Error, Provider, Size, Spec, State};

use crate::conformance::Does;
use crate::fakes::{self, Fake, token};
use crate::{Known, ending, spec};

type Hosted = crate::Hosted<fakes::fly::Fly, Fly>;

impl Hosted {
    async fn new() -> Self {
        let fake = Fake::serve(|_| fakes::fly::Fly::new()).await;
        let settings = serde_json::json!({ "token": token(), "base_url": format!("{}/v1", fake.address), "app": "agents", "creates_per_second": 100 });
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let provider = Fly::new(settings).unwrap();
        Self { fake, provider }
    }
}

impl Known for fakes::fly::Fly {
    const PAGE: usize = fakes::fly::PAGE;
    const PRICE_USD: f64 = 0.0082;

    fn count(&self, key: &str) -> usize {
        self.count(key)
    }

    fn spec(does: Does) -> Option<Spec> {
        // Its address is one of a network that is not here.
        let here = Some(does).filter(|does| !matches!(does, Does::Serve(_)));
        Some(Spec { command: ending(here?)?, ..spec("") })
    }
}

#[tokio::test]
async fn it_does_what_every_provider_must() {
    Hosted::new().await.conforms().await;
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
    // Ten at once and five a second: the fortieth waits for six seconds, which is more than is waited. Who is asked about another machine then is answered.
    let forty = futures_util::future::join_all((0..40).map(|_| provider.state(&first)));
    let (asked, answered) = tokio::join!(forty, provider.state(&other));
    let busy = asked.iter().filter(|asked| matches!(asked, Err(Error::Busy { after: Some(_), .. }))).count();
    assert!((5..20).contains(&busy), "{busy}");
    assert_eq!(answered.unwrap().state, State::Running);
}
