//! The table, and its cases in the same order.

use super::*;
use agent_fleet::provider::OUTPUT_MOST;
use std::collections::BTreeSet;

macro_rules! cases {
    ($($promise:literal => $run:ident,)*) => {
        &[$(Case { promise: $promise, run: |suite| Box::pin($run(suite)) }),*]
    };
}

pub(super) const ALL: &[Case] = cases! {
    "created twice it is one" => created_twice,
    "created by two at once it is one" => created_at_once,
    "created with the answer lost it is one" => answer_lost,
    "created with the answer cut it is one" => answer_cut,
    "created by one who gave up half-way it is one" => given_up,
    "a server's mistake once is passing" => mistake_once,
    "who is asked too often says when to come again" => asked_too_often,
    "who is told a date comes at that time" => told_a_date,
    "what is not there is missing" => missing,
    "it is what was asked for" => as_asked,
    "a list has all pages and nothing else" => pages,
    "a list that breaks off is no list" => list_broken,
    "what cannot be read of a list hides no other, and is not gone" => list_garbled,
    "what cannot be read of a list is not made again" => made_while_garbled,
    "what cannot be read of a container is not gone" => state_garbled,
    "a state that nobody knows is told" => unknown_state,
    "a field that nobody knows is no matter" => unknown_field,
    "a command has its code, its output and its errors" => executed,
    "a command's long output is whole, and longer output is cut" => long_output,
    "a command that takes too long is ended" => command_timeout,
    "its log is its last output" => log,
    "a secret is in the container and nowhere else" => secrets,
    "a secret that is not there refuses the container" => secret_missing,
    "kept alive, and never beyond its end" => kept_alive,
    "paused and resumed" => paused,
    "how it ended is told" => ended,
    "what hears is not killed" => stop_heard,
    "what does not hear is killed after the grace" => stop_ignored,
    "deleted twice it is gone" => deleted_twice,
    "deleted with the answer lost it is gone" => delete_lost,
    "what happens is told" => events,
    "its port is reached" => endpoint,
    "its price is the list's" => price,
};

/// The spec, or the case is left out.
macro_rules! spec {
    ($suite:expr, $does:expr) => {
        match $suite.spec($does) {
            Some(spec) => spec,
            None => return Outcome::LeftOut("no such container can be had"),
        }
    };
}

macro_rules! arm {
    ($suite:expr, $call:expr, $fault:expr) => {
        if !$suite.world.arm($call, $fault) {
            return Outcome::LeftOut("it cannot be disturbed like that");
        }
    };
}

async fn created_twice(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let first = suite.up(&spec).await;
    let second = suite.provider.create(&spec).await.expect("create again");
    assert_eq!(second.native, first.native);
    assert_eq!(second.state, State::Running);
    assert_eq!(suite.world.count(&spec.key).await, 1);
    Outcome::Kept
}

async fn created_at_once(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let (first, second) = futures_util::join!(suite.created(&spec), suite.created(&spec));
    assert_eq!(first.native, second.native);
    assert_eq!(suite.world.count(&spec.key).await, 1);
    Outcome::Kept
}

/// Creates with a disturbance, which may be an error that passes or may not be noticed at all; in the end there is one.
async fn created_despite(suite: &Suite<'_>, fault: Fault) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    arm!(suite, Call::Create, fault);
    let sandbox = suite.up(&spec).await;
    assert_eq!(suite.world.count(&spec.key).await, 1);
    assert_eq!(suite.listed(&suite.label(&spec)).await.map_or(1, |(all, _)| all.len()), 1);
    assert_eq!(suite.provider.create(&spec).await.expect("create again").native, sandbox.native);
    Outcome::Kept
}

async fn answer_lost(suite: &Suite<'_>) -> Outcome {
    created_despite(suite, Fault::LoseAnswer).await
}

async fn answer_cut(suite: &Suite<'_>) -> Outcome {
    created_despite(suite, Fault::CutAnswer).await
}

async fn given_up(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    arm!(suite, Call::Create, Fault::Slow(Duration::from_secs(3)));
    // Given up when the request is on its way: before that there is nothing to be found twice.
    let on_its_way = async {
        while suite.world.armed() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = on_its_way => {}
        done = suite.provider.create(&spec) => panic!("it was not slow: {done:?}"),
    }
    suite.up(&spec).await;
    assert_eq!(suite.world.count(&spec.key).await, 1);
    Outcome::Kept
}

async fn mistake_once(suite: &Suite<'_>) -> Outcome {
    let outcome = created_despite(suite, Fault::Status(500)).await;
    if !matches!(outcome, Outcome::Kept) {
        return outcome;
    }
    let spec = spec!(suite, Does::Wait);
    let native = suite.created(&spec).await.native;
    arm!(suite, Call::State, Fault::Status(500));
    if let Err(error) = suite.provider.state(&native).await {
        assert!(error.is_passing(), "{error:?}");
    }
    suite.provider.state(&native).await.expect("state");
    Outcome::Kept
}

async fn asked_too_often(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    arm!(suite, Call::Create, Fault::Limit(Duration::from_secs(1)));
    // Who waits by himself does well, too.
    match suite.provider.create(&spec).await {
        Ok(_) => {}
        Err(Error::Busy { after, .. }) => assert_eq!(after, Some(Duration::from_secs(1))),
        Err(error) => panic!("{error:?}"),
    }
    suite.up(&spec).await;
    assert_eq!(suite.world.count(&spec.key).await, 1);
    Outcome::Kept
}

async fn told_a_date(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let hour = Duration::from_secs(3600);
    arm!(suite, Call::Create, Fault::LimitUntil(hour));
    match suite.provider.create(&spec).await {
        // A date has no parts of a second.
        Err(Error::Busy { after: Some(after), .. }) => assert!(after.abs_diff(hour) < Duration::from_secs(60), "{after:?}"),
        done => panic!("nobody waits for that long: {done:?}"),
    }
    assert_eq!(suite.world.count(&spec.key).await, 0);
    Outcome::Kept
}

async fn missing(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.created(&spec).await.native;
    suite.provider.delete(&native).await.expect("delete");
    suite.becomes(&native, "gone", |now| now.state.is_gone()).await;
    fn missing<T: std::fmt::Debug>(what: &str, result: Result<T>) {
        assert!(matches!(result, Err(Error::Missing { .. })), "{what}: {result:?}");
    }
    missing("start", suite.provider.start(&native).await);
    if suite.can.pause != Pause::No {
        missing("pause", suite.provider.pause(&native).await);
        missing("resume", suite.provider.resume(&native, &[]).await);
    }
    if suite.can.exec {
        missing("exec", suite.shell(&native, "true").await);
    }
    if suite.can.logs {
        missing("logs", suite.provider.logs(&native, 100).await);
    }
    Outcome::Kept
}

async fn as_asked(suite: &Suite<'_>) -> Outcome {
    let mut spec = spec!(suite, Does::Wait);
    if suite.can.env {
        spec.env.insert(String::from("AGENT_FLEET_SAID"), String::from("a b=c \"d\" é"));
    }
    let before = Timestamp::now();
    let made = suite.up(&spec).await;
    for (name, value) in &spec.labels {
        assert_eq!(made.labels.get(name), Some(value), "label {name}");
    }
    if let Some(created) = made.created {
        let apart = created.duration_since(before).unsigned_abs();
        assert!(apart < Duration::from_secs(600), "created {created}, asked for {before}");
    }
    if let (true, Some(size)) = (suite.can.size, made.size) {
        assert!(size.cpu_milli >= spec.size.cpu_milli && size.memory_mib >= spec.size.memory_mib, "{size:?}");
    }
    if let Some(deadline) = made.deadline {
        let life = deadline.duration_since(before).unsigned_abs();
        assert!(life <= spec.ttl + Duration::from_secs(600), "it ends {deadline}");
    }
    if suite.can.env && suite.can.exec {
        let said = suite.shell(&made.native, "printf %s \"$AGENT_FLEET_SAID\"").await.expect("exec");
        assert_eq!(String::from_utf8_lossy(&said.stdout), "a b=c \"d\" é");
    }
    Outcome::Kept
}

async fn pages(suite: &Suite<'_>) -> Outcome {
    if !suite.can.list {
        return Outcome::LeftOut("it does not list");
    }
    let one = spec!(suite, Does::Wait);
    let shared = suite.label(&one);
    let most = suite.world.page();
    let wanted = most.map_or(3, |page| 2 * page + 1);
    let mut made = BTreeSet::new();
    for _ in 0..wanted {
        let mut spec = spec!(suite, Does::Wait);
        spec.labels.extend(shared.clone());
        made.insert(suite.created(&spec).await.native);
    }
    let other = spec!(suite, Does::Wait);
    let other = suite.created(&other).await.native;
    assert_eq!(made.len(), wanted);
    let (all, pages) = suite.listed(&shared).await.expect("list");
    let natives: BTreeSet<String> = all.iter().map(|sandbox| sandbox.native.clone()).collect();
    assert_eq!(natives, made);
    assert_eq!(all.len(), wanted, "one is there twice");
    assert!(!natives.contains(&other));
    assert!(pages >= most.map_or(1, |_| 3), "{pages} pages");
    for sandbox in &all {
        assert!(sandbox.key.is_some() && !matches!(sandbox.state, State::Unknown(_)), "{sandbox:?}");
    }
    let nobody = BTreeMap::from([(String::from(SESSION_LABEL), String::from("nobody"))]);
    assert_eq!(suite.listed(&nobody).await.expect("list").0, []);
    Outcome::Kept
}

/// A list that is cut must not look like a short one: who is not on it would be taken for gone.
async fn list_broken(suite: &Suite<'_>) -> Outcome {
    if !suite.can.list {
        return Outcome::LeftOut("it does not list");
    }
    let spec = spec!(suite, Does::Wait);
    let native = suite.created(&spec).await.native;
    for fault in [Fault::CutAnswer, Fault::LoseAnswer, Fault::Status(503)] {
        arm!(suite, Call::List, fault);
        match suite.listed(&suite.label(&spec)).await {
            Ok((all, _)) => assert!(all.iter().any(|sandbox| sandbox.native == native), "{fault:?}: {all:?}"),
            Err(error) => assert!(error.is_passing(), "{fault:?}: {error:?}"),
        }
        let (all, _) = suite.listed(&suite.label(&spec)).await.expect("list");
        assert_eq!(all.len(), 1, "{fault:?}");
    }
    Outcome::Kept
}

/// More than any of them has fields: some come up twice.
const GARBLES: std::ops::Range<usize> = 0..60;

async fn list_garbled(suite: &Suite<'_>) -> Outcome {
    if !suite.can.list {
        return Outcome::LeftOut("it does not list");
    }
    let one = spec!(suite, Does::Wait);
    let mut other = spec!(suite, Does::Wait);
    other.labels.extend(suite.label(&one));
    let made = BTreeSet::from([suite.up(&one).await.native, suite.up(&other).await.native]);
    for n in GARBLES {
        arm!(suite, Call::List, Fault::Garbled(n));
        let (mut found, mut unread, mut next) = (BTreeSet::new(), 0, None);
        loop {
            let page = suite.provider.list(&suite.label(&one), next.as_deref()).await.expect("list");
            unread += page.unread;
            for sandbox in page.sandboxes {
                assert!(sandbox.key.is_some() && !sandbox.state.is_gone(), "{n}: {sandbox:?}");
                found.insert(sandbox.native);
            }
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        assert!(!found.is_empty() && found.is_subset(&made), "{n}: {found:?}");
        assert!(found.len() + unread >= 2, "{n}: one is neither there nor said to be unread");
    }
    Outcome::Kept
}

async fn made_while_garbled(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    for n in GARBLES {
        arm!(suite, Call::List, Fault::Garbled(n));
        match suite.provider.create(&spec).await {
            Ok(again) => assert_eq!(again.native, native, "{n}"),
            Err(error) => assert!(error.is_passing(), "{n}: {error:?}"),
        }
        assert_eq!(suite.world.count(&spec.key).await, 1, "{n}");
        if suite.world.armed() > 0 {
            // It finds what it has made without a list, and will the next time.
            suite.listed(&suite.label(&spec)).await.expect("list");
            break;
        }
    }
    Outcome::Kept
}

async fn state_garbled(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    for n in GARBLES {
        arm!(suite, Call::State, Fault::Garbled(n));
        match suite.provider.state(&native).await {
            Ok(now) => assert!(!now.state.is_gone(), "{n}: {now:?}"),
            Err(error) => assert!(error.is_passing(), "{n}: {error:?}"),
        }
    }
    assert_eq!(suite.provider.state(&native).await.expect("state").state, State::Running);
    Outcome::Kept
}

async fn unknown_state(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.created(&spec).await.native;
    suite.becomes(&native, "something", |sandbox| sandbox.state != State::Creating).await;
    arm!(suite, Call::State, Fault::UnknownState);
    let told = suite.provider.state(&native).await.expect("state");
    assert!(matches!(&told.state, State::Unknown(word) if !word.is_empty()), "{told:?}");
    assert!(!told.state.is_gone());
    Outcome::Kept
}

async fn unknown_field(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    arm!(suite, Call::State, Fault::UnknownField);
    assert_eq!(suite.provider.state(&native).await.expect("state").state, State::Running);
    Outcome::Kept
}

async fn executed(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    if !suite.can.exec {
        unsupported(suite.shell(&native, "true").await);
        return Outcome::Kept;
    }
    let done = suite.shell(&native, "echo out; echo err >&2; exit 7").await.expect("exec");
    let expected = Executed { exit_code: Some(7), stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec(), cut: false };
    assert_eq!(done, expected);
    let mut asked = shell("printf %s \"$NAME\"; cat");
    asked.env.insert(String::from("NAME"), String::from("a \"b\" $c;"));
    asked.stdin = vec![b'x'; 100_000];
    match suite.provider.exec(&native, &asked).await {
        Ok(done) => {
            assert_eq!(done.exit_code, Some(0));
            assert_eq!(done.stdout, [b"a \"b\" $c;", &asked.stdin[..]].concat());
        }
        Err(Error::Unsupported { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    let none = suite.provider.exec(&native, &Exec { argv: vec![String::from("/no/such/program")], ..shell("") }).await;
    let failed = match &none {
        Ok(done) => done.exit_code.is_some_and(|code| code != 0),
        Err(error) => !error.is_passing(),
    };
    assert!(failed, "{none:?}");
    // Where a fake has no disk of its own, that of others is this one's, too.
    let file = format!("/tmp/detached-{}", uuid::Uuid::now_v7().simple());
    let detached = Exec { detached: true, ..shell(&format!("sleep 1; echo here > {file}")) };
    match suite.provider.exec(&native, &detached).await {
        Ok(done) => {
            assert_eq!(done.stdout, b"");
            let looked =
                suite.shell(&native, &format!("until [ -s {file} ]; do sleep 0.1; done; rm {file}")).await.expect("exec");
            assert_eq!(looked.exit_code, Some(0));
        }
        Err(Error::Unsupported { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    Outcome::Kept
}

async fn long_output(suite: &Suite<'_>) -> Outcome {
    if !suite.can.exec {
        return Outcome::LeftOut("it does not execute");
    }
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    let done = suite.shell(&native, "head -c 1000000 /dev/zero | tr '\\0' x; printf end").await.expect("exec");
    assert_eq!((done.exit_code, done.stdout.len(), done.cut), (Some(0), 1_000_003, false));
    assert!(done.stdout.ends_with(b"xend"));
    let done = suite.shell(&native, &format!("head -c {} /dev/zero", OUTPUT_MOST + 100_000)).await.expect("exec");
    assert_eq!((done.exit_code, done.stdout.len(), done.cut), (Some(0), OUTPUT_MOST, true));
    Outcome::Kept
}

async fn command_timeout(suite: &Suite<'_>) -> Outcome {
    if !suite.can.exec {
        return Outcome::LeftOut("it does not execute");
    }
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    // A number that no other process has among its arguments.
    let long = format!("1{:09}", Timestamp::now().subsec_nanosecond());
    let within = async |seconds: u64| {
        let asked = Exec { timeout: Duration::from_secs(seconds), ..shell(&format!("echo begun; sleep {long}; echo never")) };
        let done = suite.provider.exec(&native, &asked).await.expect("exec");
        assert_eq!(done.exit_code, None);
        done.stdout
    };
    let mut said = within(3).await;
    if said.is_empty() {
        // A busy machine may not even have begun with it.
        said = within(60).await;
    }
    assert_eq!(said, b"begun\n");
    // The pattern does not match the line that looks for it.
    let (first, rest) = long.split_at(1);
    let look = format!("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -q 'sleep [{first}]{rest}'");
    let began = Instant::now();
    while suite.shell(&native, &look).await.expect("exec").exit_code == Some(0) {
        assert!(began.elapsed() < SOON, "it still runs");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Outcome::Kept
}

async fn log(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Exit(3));
    let made = suite.created(&spec).await;
    if !suite.can.logs {
        unsupported(suite.provider.logs(&made.native, 100).await);
        return Outcome::Kept;
    }
    suite.started(&made).await;
    suite.becomes(&made.native, "over", |now| now.state == State::Stopped).await;
    let all = suite.provider.logs(&made.native, 1000).await.expect("logs");
    assert!(String::from_utf8_lossy(&all).contains("exits with 3"), "{:?}", String::from_utf8_lossy(&all));
    for most in [2, all.len() - 2] {
        let last = suite.provider.logs(&made.native, most).await.expect("logs");
        assert_eq!(last, all[all.len() - most..]);
    }
    Outcome::Kept
}

async fn secrets(suite: &Suite<'_>) -> Outcome {
    if !suite.can.env {
        return Outcome::LeftOut("it gives no environment");
    }
    let mut spec = spec!(suite, Does::Wait);
    let value = format!("s3cret-{}", spec.key);
    let path = std::env::temp_dir().join(&value[7..]);
    std::fs::write(&path, format!("{value}\n")).expect("a file");
    spec.secrets.insert(String::from("TOKEN"), Secret::File(path.clone()));
    let made = suite.up(&spec).await;
    std::fs::remove_file(&path).expect("a file");
    if suite.can.exec {
        let said = suite.shell(&made.native, "printf %s \"$TOKEN\"").await.expect("exec");
        assert_eq!(String::from_utf8_lossy(&said.stdout), value);
    }
    assert!(!format!("{made:?}").contains(&value), "{made:?}");
    if suite.can.list {
        let listed = suite.listed(&suite.label(&spec)).await.expect("list");
        assert!(!format!("{listed:?}").contains(&value), "{listed:?}");
    }
    Outcome::Kept
}

async fn secret_missing(suite: &Suite<'_>) -> Outcome {
    let mut spec = spec!(suite, Does::Wait);
    spec.secrets.insert(String::from("TOKEN"), Secret::Env(String::from("AGENT_FLEET_NO_SUCH_VARIABLE")));
    let refused = suite.provider.create(&spec).await;
    assert!(matches!(&refused, Err(Error::Refused { .. })), "{refused:?}");
    assert_eq!(suite.world.count(&spec.key).await, 0);
    Outcome::Kept
}

async fn kept_alive(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let made = suite.up(&spec).await;
    let soon = Timestamp::now() + Duration::from_secs(120);
    suite.provider.keep_alive(&made.native, soon).await.expect("keep_alive");
    let later = suite.provider.state(&made.native).await.expect("state");
    assert!(
        later.deadline.is_none_or(|deadline| deadline + Duration::from_secs(5) >= soon.min(made.deadline.unwrap_or(soon))),
        "{later:?}"
    );
    // Whoever asks for too much gets what there is.
    suite.provider.keep_alive(&made.native, Timestamp::now() + spec.ttl * 10).await.expect("keep_alive");
    let last = suite.provider.state(&made.native).await.expect("state");
    assert_eq!(last.state, State::Running);
    if let (Some(deadline), Some(created)) = (last.deadline, last.created) {
        let life = deadline.duration_since(created).unsigned_abs();
        assert!(life <= spec.ttl + Duration::from_secs(30), "it lives {life:?}");
    }
    Outcome::Kept
}

async fn paused(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    if suite.can.pause == Pause::No {
        unsupported(suite.provider.pause(&native).await);
        unsupported(suite.provider.resume(&native, &[]).await);
        return Outcome::Kept;
    }
    // Each twice: it is no mistake if it is so already.
    for _ in 0..2 {
        suite.provider.pause(&native).await.expect("pause");
        suite.becomes(&native, "paused", |now| matches!(now.state, State::Paused | State::Stopped)).await;
    }
    for _ in 0..2 {
        suite.provider.resume(&native, &[]).await.expect("resume");
        suite.becomes(&native, "running", |now| now.state == State::Running).await;
    }
    assert_eq!(suite.world.count(&spec.key).await, 1);
    if suite.can.exec {
        assert_eq!(suite.shell(&native, "true").await.expect("exec").exit_code, Some(0));
    }
    // What is asleep can be ended, too.
    suite.provider.pause(&native).await.expect("pause");
    suite.provider.delete(&native).await.expect("delete");
    suite.becomes(&native, "gone", |now| now.state.is_gone()).await;
    Outcome::Kept
}

async fn ended(suite: &Suite<'_>) -> Outcome {
    for code in [0, 3] {
        let spec = spec!(suite, Does::Exit(code));
        let made = suite.created(&spec).await;
        suite.started(&made).await;
        let over = suite.becomes(&made.native, "over", |now| matches!(now.state, State::Stopped | State::Failed)).await;
        assert_eq!(over.exit_code, Some(i32::from(code)), "{over:?}");
        // What is over is found, not made again.
        assert_eq!(suite.provider.create(&spec).await.expect("create again").native, made.native);
    }
    Outcome::Kept
}

async fn stop_heard(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    suite.world.listens(&native).await;
    let grace = Duration::from_secs(60);
    let began = Instant::now();
    match suite.provider.stop(&native, grace).await {
        Err(Error::Unsupported { .. }) => return Outcome::LeftOut("it cannot stop"),
        done => done.expect("stop"),
    }
    let over = suite.becomes(&native, "over", |now| now.state == State::Stopped || now.state.is_gone()).await;
    assert!(began.elapsed() < grace, "it was waited for to the end");
    assert!(over.exit_code.is_none_or(|code| code != 137), "it was killed: {over:?}");
    suite.provider.stop(&native, grace).await.expect("stop again");
    Outcome::Kept
}

async fn stop_ignored(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Ignore);
    let native = suite.up(&spec).await.native;
    suite.world.listens(&native).await;
    let grace = Duration::from_secs(2);
    let began = Instant::now();
    match suite.provider.stop(&native, grace).await {
        Err(Error::Unsupported { .. }) => return Outcome::LeftOut("it cannot stop"),
        done => done.expect("stop"),
    }
    suite.becomes(&native, "over", |now| now.state == State::Stopped || now.state.is_gone()).await;
    assert!(began.elapsed() >= grace, "it had no grace: {:?}", began.elapsed());
    Outcome::Kept
}

async fn deleted_twice(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Ignore);
    let native = suite.up(&spec).await.native;
    for _ in 0..2 {
        suite.provider.delete(&native).await.expect("delete");
        suite.becomes(&native, "gone", |now| now.state.is_gone()).await;
    }
    assert_eq!(suite.world.count(&spec.key).await, 0);
    if suite.can.list {
        let (left, _) = suite.listed(&suite.label(&spec)).await.expect("list");
        assert!(left.iter().all(|sandbox| sandbox.state.is_gone()), "{left:?}");
    }
    Outcome::Kept
}

async fn delete_lost(suite: &Suite<'_>) -> Outcome {
    let spec = spec!(suite, Does::Wait);
    let native = suite.up(&spec).await.native;
    arm!(suite, Call::Delete, Fault::LoseAnswer);
    if let Err(error) = suite.provider.delete(&native).await {
        assert!(error.is_passing(), "{error:?}");
        suite.provider.delete(&native).await.expect("delete again");
    }
    suite.becomes(&native, "gone", |now| now.state.is_gone()).await;
    assert_eq!(suite.world.count(&spec.key).await, 0);
    Outcome::Kept
}

async fn events(suite: &Suite<'_>) -> Outcome {
    let other = spec!(suite, Does::Wait);
    if !suite.can.events {
        let refused = suite.provider.events(&suite.label(&other)).await;
        unsupported(refused.map(|_| "a stream"));
        return Outcome::Kept;
    }
    // The second time is after a reconnect.
    for _ in 0..2 {
        let spec = spec!(suite, Does::Exit(3));
        let mut stream = suite.provider.events(&suite.label(&spec)).await.expect("events");
        suite.created(&other).await;
        let made = suite.created(&spec).await;
        suite.started(&made).await;
        // What has happened before anybody listens is not lost.
        suite.becomes(&made.native, "over", |now| now.state == State::Stopped).await;
        loop {
            let next = tokio::time::timeout(SOON, stream.next()).await.expect("nothing happens");
            let Happened { native, key, .. } = next.expect("the stream has ended").expect("an event");
            assert_eq!((native.as_str(), key.as_deref()), (made.native.as_str(), Some(spec.key.as_str())));
            if suite.provider.state(&native).await.expect("state").state == State::Stopped {
                break;
            }
        }
        // The end of the other is not told to who asked for this one.
        suite.provider.delete(&made.native).await.expect("delete");
        let gone = async {
            while let Some(next) = stream.next().await {
                assert_eq!(next.expect("an event").native, made.native);
                if suite.provider.state(&made.native).await.expect("state").state.is_gone() {
                    return;
                }
            }
            panic!("the stream has ended");
        };
        tokio::time::timeout(SOON, gone).await.expect("its end is not told");
    }
    Outcome::Kept
}

async fn endpoint(suite: &Suite<'_>) -> Outcome {
    let port = 8080;
    let mut spec = spec!(suite, Does::Serve(port));
    spec.ports = vec![port];
    let made = suite.up(&spec).await;
    if !suite.can.endpoint {
        unsupported(suite.provider.endpoint(&made.native, port).await);
        return Outcome::Kept;
    }
    let found = suite.provider.endpoint(&made.native, port).await.expect("endpoint");
    let url = reqwest::Url::parse(&found.url).expect("a URL");
    assert!(matches!(url.scheme(), "http" | "https") && url.path() == "/" && url.has_host(), "{url}");
    for (_, value) in &found.headers {
        assert!(!format!("{found:?}").contains(value.as_str()), "a header is printed");
    }
    // A fake's address is nobody's.
    if url.scheme() == "http" {
        serves(&found).await;
    }
    Outcome::Kept
}

async fn price(suite: &Suite<'_>) -> Outcome {
    let size = Size::default();
    let price = suite.provider.price(size);
    let listed = suite.world.price_usd();
    assert!((price.running - listed).abs() < 0.0001, "{price:?}, the list says {listed}");
    assert!(price.running >= price.paused && price.paused >= price.stopped && price.stopped >= 0.0, "{price:?}");
    assert!(!price.source.is_empty());
    if suite.can.pause == Pause::Frozen {
        assert_eq!(price.paused, price.running, "what is frozen is paid for");
    }
    let twice = Size { cpu_milli: 2 * size.cpu_milli, memory_mib: 2 * size.memory_mib, ..size };
    assert!(suite.provider.price(twice).running >= price.running);
    Outcome::Kept
}
