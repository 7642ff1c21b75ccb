//! What sidecars say by themselves, to a fleet that cannot ask them.

use std::time::Duration;

use agent_fleet::lifecycle::Phase;
use agent_fleet::service::{NotHeard, Told};
use agent_fleet::session::{Pattern, Wanted};
use agent_fleet::token::Tokens;

use crate::town::{SECRET, Town, run, session};

fn told(seq: u64, busy: bool, cost_usd: f64) -> Told {
    Told {
        session: String::from("a"),
        run: String::from("one"),
        seq,
        busy,
        busy_seconds: 60.0,
        every_seconds: 100,
        cost_usd,
        memory_bytes: 7e6,
        sessions: vec![String::from("the-conversation")],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_tells_by_itself_is_not_asked_and_is_heard_once() {
    let mut town = Town::new(0).await;
    town.policy.idle_after = Some(Duration::from_millis(100));
    // Nobody answers who is asked.
    *town.words.0.lock().unwrap() = None;
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(session("a", Pattern::Hybrid)).await.unwrap();
    town.reaches("a", Phase::Starting).await;
    let key = town.get("a").await.key();
    let token = Tokens::new(SECRET).of(&key);
    let say = |word: Told| {
        let (fleet, key, token) = (fleet.clone(), key.clone(), token.clone());
        async move { fleet.reported(&key, &token, &word).await }
    };
    let lease = say(told(1, true, 0.25)).await.unwrap();
    assert!((3500.0..=3600.0).contains(&lease.lease_seconds), "{lease:?}");
    let active = town.reaches("a", Phase::Active).await;
    assert_eq!((active.cost_usd(), active.conversation.as_deref()), (0.25, Some("the-conversation")));
    assert_eq!(active.pushed.unwrap().memory_bytes, 7e6);
    // The same word twice, one that comes late, one that says less: none is new money, and none takes any back.
    for (word, cost) in [
        (told(3, true, 0.75), 0.75),
        (told(3, true, 0.75), 0.75),
        (told(2, false, 0.5), 0.75),
        (told(4, true, 0.5), 0.75),
        (Told { run: String::from("another"), ..told(1, true, 0.5) }, 1.25),
        (Told { run: String::from("another"), ..told(2, true, 0.5) }, 1.25),
        // The last words of a run that is over come late, and are not all its money once more.
        (told(5, true, 5.0), 1.25),
        (Told { run: String::from("another"), ..told(3, true, 0.5) }, 1.25),
        (told(6, true, 5.0), 1.25),
    ] {
        say(word.clone()).await.unwrap();
        let now = town.get("a").await;
        assert_eq!((now.cost_usd(), now.phase), (cost, Phase::Active), "{word:?}");
    }
    // Whose token is another container's says nothing; nor does nonsense.
    let other = Tokens::new(SECRET).of("agent-other-1");
    for (key, token) in [(key.as_str(), other.as_str()), ("agent-other-1", other.as_str()), (key.as_str(), "")] {
        let heard = fleet.reported(key, token, &told(9, false, 9.0)).await;
        assert!(matches!(heard, Err(NotHeard::Stranger)), "{heard:?}");
    }
    for cost in [f64::NAN, f64::INFINITY, -1.0] {
        assert!(matches!(say(told(9, true, cost)).await, Err(NotHeard::Nonsense(_))));
    }
    // What PostgreSQL cannot keep is not kept.
    assert!(matches!(say(Told { run: String::from("a\0b"), ..told(9, true, 9.0) }).await, Err(NotHeard::Nonsense(_))));
    let unnamed = Told { run: String::from("another"), sessions: vec![String::from("\0")], ..told(4, true, 0.5) };
    say(unnamed).await.unwrap();
    let now = town.get("a").await;
    assert_eq!((now.cost_usd(), now.conversation.as_deref()), (1.25, Some("the-conversation")));
    // It works no more: that is acted on at once, though its last word held for a minute.
    say(Told { run: String::from("another"), ..told(5, false, 0.5) }).await.unwrap();
    town.reaches("a", Phase::Paused).await;
    fleet.want(&"a".parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
    let gone = town.reaches("a", Phase::Destroyed).await;
    assert_eq!(gone.cost_usd(), 1.25);
    let late = say(Told { run: String::from("another"), ..told(6, true, 5.0) }).await.unwrap();
    assert_eq!((late.lease_seconds, town.get("a").await.cost_usd()), (0.0, 1.25), "its container is gone");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_to_end_is_asked_for_what_it_has_not_told_yet() {
    for (pattern, wanted, reached) in
        [(Pattern::Ephemeral, Wanted::Gone, Phase::Destroyed), (Pattern::Hybrid, Wanted::Paused, Phase::Paused)]
    {
        let town = Town::new(0).await;
        *town.words.0.lock().unwrap() = None;
        let fleet = town.fleet();
        let running = run(&fleet);
        fleet.create(session("a", pattern)).await.unwrap();
        town.reaches("a", Phase::Starting).await;
        let key = town.get("a").await.key();
        let token = Tokens::new(SECRET).of(&key);
        fleet.reported(&key, &token, &told(1, false, 0.25)).await.unwrap();
        town.reaches("a", Phase::Ready).await;
        // What came and went since then is told in a while, or would have been.
        *town.words.0.lock().unwrap() = Some((false, 0.75));
        fleet.want(&"a".parse().unwrap(), wanted, "enough").await.unwrap();
        assert_eq!(town.reaches("a", reached).await.cost_usd(), 0.75, "{pattern:?}");
        running.stop().await;
    }
}
