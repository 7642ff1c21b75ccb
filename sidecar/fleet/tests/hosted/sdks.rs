//! The providers' own SDKs as judges of the fakes: `AGENT_FLEET_TEST_SDKS` is a Python that has them. tests/install makes one; without it nothing is
//! tried, and that is said.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::Command;

use agent_fleet::provider::{Provider, Spec, State, daytona, e2b};

use crate::fakes::modal::{CONTRACT, TOKEN_ID, TOKEN_SECRET};
use crate::fakes::{self, Api, Fake, TOKEN, token};
use crate::hosted::modal::Hosted;
use crate::{sh, spec};

fn python(kind: &str) -> Option<OsString> {
    let python = std::env::var_os("AGENT_FLEET_TEST_SDKS").filter(|python| !python.is_empty());
    if python.is_none() {
        eprintln!("{kind}: not tried, for there is no AGENT_FLEET_TEST_SDKS; `make unit` has one");
    }
    python
}

async fn judged(python: &OsString, asked: &[&str]) {
    let mut judge = Command::new(python);
    judge.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosted/sdks.py")).args(asked);
    let done = tokio::task::spawn_blocking(move || judge.output().unwrap()).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

async fn sees<A: Api>(kind: &'static str, fake: &Fake<A>, provider: &dyn Provider) {
    let Some(python) = python(kind) else { return };
    let key = format!("agent-{kind}-1");
    let env = BTreeMap::from([(String::from("SAID"), String::from("hello"))]);
    let made = provider.create(&Spec { command: sh("sleep 1000"), env, ..spec(&key) }).await.unwrap();
    judged(&python, &[kind, &fake.address, TOKEN, &key]).await;
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

#[tokio::test]
async fn modal_sees_what_we_created() {
    let Some(python) = python("modal") else { return };
    let Hosted { fake, provider } = Hosted::new().await;
    let env = BTreeMap::from([(String::from("SAID"), String::from("hello"))]);
    let asked = Spec { command: sh("sleep 1000"), env, ports: vec![8080], ..spec("agent-modal-1") };
    let made = provider.create(&asked).await.unwrap();
    judged(&python, &["modal", &fake.address, &format!("{TOKEN_ID}:{TOKEN_SECRET}"), &asked.key]).await;
    assert_eq!(fake.wrong(), Vec::<String>::new());
    // It has terminated it.
    assert_eq!(provider.state(&made.native).await.unwrap().state, State::Destroyed);
}

/// The contract that the fake judges by is what their own client has.
#[tokio::test]
async fn the_contract_of_modal_is_the_one_that_is_published() {
    let Some(python) = python("modal") else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosted/modal_contract.py");
    let done = tokio::task::spawn_blocking(move || Command::new(python).arg(script).output().unwrap()).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8(done.stdout).unwrap(), CONTRACT);
}
