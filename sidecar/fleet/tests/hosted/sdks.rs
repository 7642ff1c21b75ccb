//! The providers' own SDKs as judges of the fakes: `AGENT_FLEET_TEST_SDKS` is a Python that has them. tests/install makes one; without it nothing is
//! tried, and that is said.

use std::collections::BTreeMap;
use std::process::Command;

use agent_fleet::provider::{Provider, Spec, State, daytona, e2b};

use crate::fakes::{self, Api, Fake, TOKEN, token};
use crate::{sh, spec};

async fn sees<A: Api>(kind: &'static str, fake: &Fake<A>, provider: &dyn Provider) {
    let Some(python) = std::env::var_os("AGENT_FLEET_TEST_SDKS").filter(|python| !python.is_empty()) else {
        eprintln!("{kind}: not tried, for there is no AGENT_FLEET_TEST_SDKS; `make unit` has one");
        return;
    };
    let key = format!("agent-{kind}-1");
    let env = BTreeMap::from([(String::from("SAID"), String::from("hello"))]);
    let made = provider.create(&Spec { command: sh("sleep 1000"), env, ..spec(&key) }).await.unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosted/sdks.py");
    let mut judge = Command::new(python);
    judge.args([script, kind, &fake.address, TOKEN, &key]);
    let done = tokio::task::spawn_blocking(move || judge.output().unwrap()).await.unwrap();
    assert!(done.status.success(), "{}\n{:?}", String::from_utf8_lossy(&done.stderr), fake.wrong());
    // It has deleted it.
    assert_eq!(provider.state(&made.native).await.unwrap().state, State::Missing);
}

#[tokio::test]
async fn e2b_sees_what_we_created() {
    let fake = Fake::serve(|_| fakes::e2b::E2b::new()).await;
    let settings = serde_json::json!({ "token": token(), "base_url": fake.address, "sandbox_url": fake.address });
    let provider = e2b::E2b::new(serde_json::from_value(settings).unwrap()).unwrap();
    sees("e2b", &fake, &provider).await;
}

#[tokio::test]
async fn daytona_sees_what_we_created() {
    let fake = Fake::serve(fakes::daytona::Daytona::new).await;
    let settings = serde_json::json!({ "token": token(), "base_url": fake.address });
    let provider = daytona::Daytona::new(serde_json::from_value(settings).unwrap()).unwrap();
    sees("daytona", &fake, &provider).await;
}
