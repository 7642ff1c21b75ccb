use std::collections::BTreeMap;
use std::time::Duration;

use agent_fleet::provider::modal::{Modal, Settings};
use agent_fleet::provider::{Error, KEY_LABEL, Provider, Secret, Size, Spec, State};
use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::conformance::{self, Call, Does, Fault, World};
use crate::fakes;
use crate::fakes::grpc::{Contract, Fake};
use crate::fakes::modal::{self as fake, CONTRACT, TOKEN_ID, TOKEN_SECRET};
use crate::{sh, spec};

/// Where the tokens are found: files, for tests that run side by side.
fn tokens() -> [Value; 2] {
    static PATHS: std::sync::LazyLock<[std::path::PathBuf; 2]> = std::sync::LazyLock::new(|| {
        [("modal-id", TOKEN_ID), ("modal-secret", TOKEN_SECRET)].map(|(name, token)| fakes::file(name, token))
    });
    PATHS.each_ref().map(|path| json!({ "file": path }))
}

pub(crate) struct Hosted {
    pub(crate) fake: Fake<fake::Modal>,
    pub(crate) provider: Modal,
}

impl Hosted {
    pub(crate) async fn new() -> Self {
        Self::with(json!({})).await
    }

    async fn with(more: Value) -> Self {
        let fake = Fake::serve(CONTRACT, fake::Modal::new).await;
        let provider = Self::provider(&fake, more);
        Self { fake, provider }
    }

    fn provider(fake: &Fake<fake::Modal>, more: Value) -> Modal {
        let [id, secret] = tokens();
        let mut settings = json!({ "token_id": id, "token_secret": secret, "app": "agents", "server_url": fake.address });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let settings: Settings = serde_json::from_value(settings).unwrap();
        Modal::new(settings).unwrap()
    }
}

#[async_trait]
impl World for Hosted {
    fn spec(&self, does: Does) -> Option<Spec> {
        let command = match does {
            Does::Exit(code) => sh(&format!("echo exits with {code}; exit {code}")),
            does => crate::command(does)?,
        };
        Some(Spec { command, ..spec("") })
    }

    fn price_usd(&self) -> f64 {
        0.094_968
    }

    fn page(&self) -> Option<usize> {
        Some(fake::PAGE)
    }

    fn arm(&self, call: Call, fault: Fault) -> bool {
        // It tells no dates, and of what it says of one container nothing is there while it runs.
        if matches!(fault, Fault::LimitUntil(_)) || matches!((call, fault), (Call::State, Fault::Garbled(_))) {
            return false;
        }
        self.fake.arm(call, fault);
        true
    }

    fn armed(&self) -> usize {
        self.fake.armed()
    }

    async fn count(&self, key: &str) -> usize {
        self.fake.api.count(key)
    }

    async fn listens(&self, native: &str) {
        let ready = "until [ -e \"$HOME/ready\" ]; do sleep 0.05; done";
        self.provider.exec(native, &shell(ready)).await.unwrap();
    }
}

#[tokio::test]
async fn it_does_what_every_provider_must() {
    let world = Hosted::new().await;
    conformance::run(&world.provider, &world).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

/// Each field that is sent or read has the number and the type that Modal publishes for its name.
#[test]
fn our_messages_are_theirs() {
    let contract: Contract = serde_json::from_str(CONTRACT).unwrap();
    let ours = include_str!("../../src/provider/modal/messages.rs");
    let (mut message, mut attribute, mut fields) = ("", "", 0);
    for line in ours.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("pub(super) struct ") {
            message = rest.split([' ', '{']).next().unwrap();
        } else if let Some(rest) = line.strip_prefix("#[prost(") {
            attribute = rest.strip_suffix(")]").unwrap();
        } else if let Some(rest) =
            line.strip_prefix("pub(super) ").filter(|rest| !rest.starts_with("const") && !rest.starts_with("mod"))
        {
            let name = rest.split(':').next().unwrap();
            let (kind, number) = attribute.rsplit_once(", tag = ").unwrap();
            let number: u64 = number.trim_matches('"').parse().unwrap();
            let found = contract.messages.iter().find(|(full, _)| full.rsplit('.').next() == Some(message));
            let (_, published) = found.unwrap_or_else(|| panic!("{message} is not published"));
            let (theirs, theirs_kind, _, many) = &published[&number];
            let kind_of = kind.split([',', ' ']).next().unwrap();
            let wanted = match (kind_of, theirs_kind.as_str()) {
                // A message that is read by itself is bytes until then.
                ("map" | "bytes", "message") | ("int32", "enum") => true,
                (ours, theirs) => ours == theirs,
            };
            let repeated = kind.contains("repeated") || kind.starts_with("map");
            assert!(
                theirs == name && wanted && repeated == *many,
                "{message}.{name} is {number} {kind}, published: {theirs} {theirs_kind}"
            );
            fields += 1;
        }
    }
    assert!(fields > 90, "only {fields} were read");
    let status = &contract.enums["modal.client.GenericResult.GenericStatus"];
    let consts = ours.lines().filter_map(|line| line.trim().strip_prefix("pub(crate) const ")?.split_once(": i32 = "));
    let ours: BTreeMap<String, i64> = consts
        .map(|(name, value)| (format!("GENERIC_STATUS_{name}"), value.trim_end_matches(';').parse().unwrap()))
        .chain([(String::from("GENERIC_STATUS_UNSPECIFIED"), 0)])
        .collect();
    assert_eq!(&ours, status);
    let number = |of: &str, name: &str| contract.enums[of][name];
    assert_eq!(number("modal.client.ObjectCreationType", "OBJECT_CREATION_TYPE_CREATE_IF_MISSING"), 1);
    assert_eq!(number("modal.client.ObjectCreationType", "OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP"), 4);
    assert_eq!(number("modal.client.RegistryAuthType", "REGISTRY_AUTH_TYPE_STATIC_CREDS"), 4);
    assert_eq!(number("modal.client.NetworkAccess.NetworkAccessType", "OPEN"), 1);
    assert_eq!(number("modal.client.FileDescriptor", "FILE_DESCRIPTOR_STDERR"), 2);
    assert_eq!(number("modal.task_command_router.TaskExecStdoutConfig", "TASK_EXEC_STDOUT_CONFIG_PIPE"), 1);
    assert_eq!(number("modal.task_command_router.TaskExecStderrConfig", "TASK_EXEC_STDERR_CONFIG_PIPE"), 1);
}

#[tokio::test]
async fn what_is_asked_for_is_what_was_meant() {
    let Hosted { fake, provider } = Hosted::with(json!({ "regions": ["eu"], "registry_secret": "registry" })).await;
    fake.api.keep("registry", "REGISTRY_USERNAME", "u");
    let asked = Spec {
        command: sh("sleep 1000"),
        size: Size { cpu_milli: 3000, memory_mib: 2048, disk_mib: 1 },
        ports: vec![8080],
        ttl: Duration::from_millis(90_500),
        idle: Some(Duration::from_secs(600)),
        ..spec("agent-asked-1")
    };
    // The password is not in it.
    let refused = provider.create(&asked).await.unwrap_err();
    assert!(matches!(&refused, Error::Refused { what, .. } if what.contains("`registry`")), "{refused:?}");
    let provider = Hosted::provider(&fake, json!({ "regions": ["eu"] }));
    let native = provider.create(&asked).await.unwrap().native;
    let has = fake.api.definition(&native);
    assert_eq!(has["resources"], json!({ "memory_mb": 2048, "memory_mb_max": 2048, "milli_cpu": 1500, "milli_cpu_max": 1500 }));
    assert_eq!(
        (&has["timeout_secs"], &has["idle_timeout_secs"], &has["name"]),
        (&json!(91), &json!(600), &json!("agent-asked-1"))
    );
    assert_eq!(has["open_ports"]["ports"], json!([{ "port": 8080 }]));
    assert_eq!(has["scheduler_placement"]["regions"], json!(["eu"]));
    assert_eq!(fake.api.images(), [json!({ "dockerfile_commands": ["FROM base", "ENTRYPOINT []"] })]);
    // Built once, and asked for once.
    provider.create(&Spec { command: sh("sleep 1000"), ..spec("agent-asked-2") }).await.unwrap();
    assert_eq!(fake.seen().iter().filter(|method| *method == "ImageGetOrCreate").count(), 1);
    // With the image's own command its entrypoint is left.
    let native = provider.create(&spec("agent-asked-3")).await.unwrap().native;
    assert_eq!(fake.api.images()[1], json!({ "dockerfile_commands": ["FROM base"] }));
    assert_eq!(fake.api.definition(&native)["entrypoint_args"], Value::Null);
    let refused = provider.create(&Spec { image: String::from("none"), ..spec("agent-asked-4") }).await.unwrap_err();
    assert!(matches!(&refused, Error::Refused { what, .. } if what.contains("manifest unknown")), "{refused:?}");
    assert_eq!(fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn a_secret_that_modal_keeps_passes_us_by() {
    let Hosted { fake, provider } = Hosted::new().await;
    fake.api.keep("anthropic", "ANTHROPIC_API_KEY", "s3cret");
    let asked = |key: &str, variable: &str| Spec {
        command: sh("sleep 1000"),
        secrets: BTreeMap::from([(variable.to_owned(), Secret::Provider(String::from("anthropic")))]),
        ..spec(key)
    };
    let native = provider.create(&asked("agent-kept-1", "ANTHROPIC_API_KEY")).await.unwrap().native;
    let said = provider.exec(&native, &shell("printf %s \"$ANTHROPIC_API_KEY\"")).await.unwrap();
    assert_eq!(said.stdout, b"s3cret");
    let refused = provider.create(&asked("agent-kept-2", "OTHER")).await.unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused:?}");
    assert_eq!(fake.api.count("agent-kept-2"), 0);
}

fn shell(script: &str) -> agent_fleet::provider::Exec {
    agent_fleet::provider::Exec {
        argv: sh(script),
        env: BTreeMap::new(),
        stdin: Vec::new(),
        timeout: Duration::from_secs(60),
        detached: false,
    }
}

/// What Modal ends is told, and is gone when it was deleted: also for a fleet that has forgotten all.
#[tokio::test]
async fn an_end_that_was_not_its_own_is_told() {
    let Hosted { fake, provider } = Hosted::new().await;
    for (at, status, state) in
        [(1, 4, State::Stopped), (2, 7, State::Stopped), (3, 5, State::Failed), (4, 10, State::Failed), (5, 3, State::Destroyed)]
    {
        let key = format!("agent-end-{at}");
        let native = provider.create(&Spec { command: sh("sleep 1000"), ..spec(&key) }).await.unwrap().native;
        fake.api.end(&native, status);
        let seen = provider.state(&native).await.unwrap();
        assert_eq!((seen.state, seen.exit_code, seen.key), (state, None, Some(key)), "{status}");
        assert!(seen.reason.is_some(), "{status}");
        let other = Hosted::provider(&fake, json!({}));
        other.delete(&native).await.unwrap();
        assert_eq!(other.state(&native).await.unwrap().state, State::Destroyed);
    }
}

/// What has ended costs nothing and is kept for ever: a list of all that ever was would have no end.
#[tokio::test]
async fn who_has_ended_is_in_no_list_and_is_not_made_again() {
    let Hosted { fake, provider } = Hosted::new().await;
    let asked = |key: &str| Spec { command: sh("sleep 1000"), ..spec(key) };
    let native = provider.create(&asked("agent-list-1")).await.unwrap().native;
    let label = BTreeMap::from([(String::from(KEY_LABEL), String::from("agent-list-1"))]);
    let listed = provider.list(&label, None).await.unwrap().sandboxes;
    let [one] = &listed[..] else { panic!("{listed:?}") };
    assert_eq!((&one.native, &one.state, one.key.as_deref()), (&native, &State::Running, Some("agent-list-1")));
    assert!(one.created.is_some_and(|created| one.deadline.is_some_and(|ends| ends > created)), "{one:?}");
    fake.api.bare.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(provider.list(&label, None).await.unwrap().sandboxes, listed, "a list without tags");
    fake.api.end(&native, 4);
    assert_eq!(provider.list(&label, None).await.unwrap().sandboxes, []);
    // Its name is free; what it did may not be done twice.
    assert_eq!(provider.create(&asked("agent-list-1")).await.unwrap().native, native);
}

/// A signal of life is a command, and only where there is a timer.
#[tokio::test]
async fn only_an_idle_timer_is_kept_from_ending_it() {
    let Hosted { fake, provider } = Hosted::new().await;
    let runs = || fake.seen().iter().filter(|method| *method == "TaskExecStart").count();
    for (key, idle, expected) in [("agent-idle-1", None, 0), ("agent-idle-2", Some(Duration::from_secs(600)), 1)] {
        let native = provider.create(&Spec { command: sh("sleep 1000"), idle, ..spec(key) }).await.unwrap().native;
        provider.keep_alive(&native, Timestamp::now()).await.unwrap();
        assert_eq!(runs(), expected, "{key}");
    }
}

/// Somebody else's is adopted by its name, though no list has it yet.
#[tokio::test]
async fn a_name_that_is_taken_is_adopted() {
    let Hosted { fake, provider } = Hosted::new().await;
    let one = Spec { command: sh("sleep 1000"), ..spec("agent-name-1") };
    let labels = BTreeMap::from([(String::from(KEY_LABEL), String::from("another"))]);
    let first = provider.create(&one).await.unwrap().native;
    // Its tags are lost: it is found by its name alone.
    fake.api.retag(&first, &labels);
    assert_eq!(provider.create(&one).await.unwrap().native, first);
    assert!(fake.seen().iter().any(|method| method == "SandboxGetFromName"), "{:?}", fake.seen());
}

#[tokio::test]
async fn a_port_that_was_not_opened_is_refused() {
    let Hosted { fake: _fake, provider } = Hosted::new().await;
    let native = provider.create(&Spec { ports: vec![8080], ..spec("agent-port-1") }).await.unwrap().native;
    assert!(provider.endpoint(&native, 8080).await.unwrap().url.ends_with(".modal.host"));
    assert!(matches!(provider.endpoint(&native, 9090).await, Err(Error::Refused { .. })));
}

#[tokio::test]
async fn a_token_that_is_not_right_is_in_no_message() {
    let Hosted { fake, .. } = Hosted::new().await;
    let path = fakes::file("modal-wrong", "as-wrong");
    let provider = Hosted::provider(&fake, json!({ "token_secret": { "file": path } }));
    let refused = provider.create(&spec("agent-wrong-1")).await.unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }) && !refused.to_string().contains("as-wrong"), "{refused:?}");
}

/// Nobody is there: it is certain that nothing was done, and it may be tried again.
#[tokio::test]
async fn who_does_not_answer_may_do_so_later() {
    let Hosted { fake, provider } = Hosted::new().await;
    drop(fake);
    let failed = provider.create(&spec("agent-nobody-1")).await.unwrap_err();
    assert!(failed.is_passing(), "{failed:?}");
}
