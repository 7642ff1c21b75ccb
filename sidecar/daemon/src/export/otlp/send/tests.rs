use std::collections::VecDeque;

use super::super::tests::Scratch;
use super::*;

/// Answers from a list and writes down when it was asked for what; then never answers.
struct Script {
    answers: VecDeque<Answer>,
    start: Instant,
    asked: Vec<String>,
}

impl Wire for Script {
    async fn send(&mut self, payload: &hyper::body::Bytes) -> Answer {
        let at = self.start.elapsed().as_millis();
        self.asked.push(format!("{at} {}", String::from_utf8_lossy(payload)));
        match self.answers.pop_front() {
            Some(answer) => answer,
            None => std::future::pending().await,
        }
    }
}

const TAKEN: Answer = Answer::Taken { except: 0, said: String::new() };

fn busy(asked: Option<u64>) -> Answer {
    Answer::Again { why: String::from("busy"), asked: asked.map(Duration::from_secs), blame: Blame::Collector }
}

fn broken() -> Answer {
    Answer::again("broken", Blame::Unclear)
}

fn shared() -> Arc<Shared> {
    let (wake, progress) = (Notify::new(), std::sync::Condvar::new());
    Arc::new(Shared { state: std::sync::Mutex::default(), wake, progress, counts: Arc::default() })
}

/// What is asked of the wire, and when, in a minute in which `signal` has the batches `a`, `b` and `c`. `flush_at` is when the end
/// begins, in milliseconds.
async fn minute(signal: Signal, answers: &[Answer], flush_at: Option<u64>) -> (Vec<String>, Arc<Shared>) {
    let (scratch, shared) = (Scratch::new(), shared());
    let bounds = Bounds { disk: 1 << 20, memory: 1 << 20, batches: 10 };
    let mut queue = Queue::open(Some(scratch.to_path_buf()), 1, bounds, Arc::clone(&shared.counts));
    for (i, batch) in ["a", "b", "c"].into_iter().enumerate() {
        queue.put(signal, 10, hyper::body::Bytes::from(batch), i as u64);
    }
    let bench = Bench::new(queue, &shared);
    let mut script = Script { answers: answers.iter().cloned().collect(), start: Instant::now(), asked: Vec::new() };
    let flush = async {
        if let Some(at) = flush_at {
            sleep(Duration::from_millis(at)).await;
            bench.hurry.send_replace(true);
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = send_by(signal, "test", &mut script, &bench) => {}
        () = flush => {}
        () = sleep(Duration::from_secs(60)) => {}
    }
    drop(bench);
    (script.asked, shared)
}

fn order(asked: &[String]) -> String {
    asked.iter().filter_map(|line| line.split(' ').nth(1)).collect()
}

fn at(asked: &[String]) -> Vec<u64> {
    asked.iter().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn pauses_double_up_to_a_bound_and_half_of_each_is_chance() {
    let pauses = |chance: f64, hurry: bool| {
        let mut backoff = Backoff { failures: 0 };
        (0..8).map(|_| backoff.next(None, hurry, chance).as_millis()).collect::<Vec<_>>()
    };
    assert_eq!(pauses(1.0, false), [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000]);
    assert_eq!(pauses(0.0, false), [500, 1_000, 2_000, 4_000, 8_000, 15_000, 15_000, 15_000]);
    assert_eq!(pauses(1.0, true)[..3], [100, 200, 400]);
    let mut backoff = Backoff { failures: 1_000_000 };
    assert_eq!(backoff.next(Some(Duration::from_secs(90)), false, 0.5), Duration::from_secs(90));
    assert!((0..100).all(|_| (0.0..=1.0).contains(&chance())));
}

#[tokio::test(start_paused = true)]
async fn one_batch_after_the_other_and_each_until_it_is_taken() {
    let (asked, shared) = minute(Signal::Logs, &[busy(None), busy(None), TAKEN, TAKEN, TAKEN], None).await;
    assert_eq!(order(&asked), "aaabc");
    let at = at(&asked);
    assert!((500..=1_001).contains(&at[1]) && (1_500..=3_002).contains(&at[2]), "{at:?}");
    assert_eq!(at[2], at[4], "what is taken costs no pause");
    assert_eq!((shared.counts.total_sent(), shared.counts.retried(Signal::Logs)), (30, 2));
}

#[tokio::test(start_paused = true)]
async fn the_collector_says_when() {
    let (asked, _) = minute(Signal::Traces, &[busy(Some(20)), TAKEN], None).await;
    let at = at(&asked);
    assert!((20_000..20_010).contains(&at[1]), "{at:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_is_counted_and_blocks_nobody() {
    let refused = Answer::Refused { why: String::from("400") };
    let partial = Answer::Taken { except: 3, said: String::from("too old") };
    let too_many = Answer::Taken { except: 99, said: String::new() };
    let (asked, shared) = minute(Signal::Traces, &[refused, partial, too_many], None).await;
    assert_eq!(order(&asked), "abc");
    assert_eq!(shared.counts.lost(Signal::Traces, Cause::Refused), 10);
    assert_eq!(shared.counts.lost(Signal::Traces, Cause::Partial), 3 + 10);
    assert_eq!(shared.counts.total_sent(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_breaks_the_collector_lets_the_others_pass_unless_order_matters() {
    let answers = [broken(), broken(), broken(), broken(), TAKEN, TAKEN, TAKEN];
    let (asked, shared) = minute(Signal::Traces, &answers, None).await;
    assert_eq!(order(&asked), "aaaabca");
    assert_eq!(shared.counts.total_sent(), 30);
    let (asked, _) = minute(Signal::Metrics, &answers, None).await;
    assert_eq!(order(&asked), "aaaaabc");
    let busy: Vec<Answer> = (0..4).map(|_| busy(None)).chain([TAKEN]).collect();
    let (asked, _) = minute(Signal::Traces, &busy, None).await;
    assert_eq!(order(&asked), "aaaaab", "a collector that is busy blames nobody");
}

#[tokio::test(start_paused = true)]
async fn the_end_waits_for_no_pause_and_for_no_collector_that_is_down() {
    let down: Vec<Answer> = (0..20).map(|_| busy(None)).collect();
    // After five failures the pause is eight seconds at least, and the end comes into one like that.
    let (asked, shared) = minute(Signal::Logs, &down, Some(18_000)).await;
    let at = at(&asked);
    let hurried: Vec<u64> = at.iter().copied().filter(|at| (18_000..19_000).contains(at)).collect();
    assert!(hurried[0] - 18_000 < 2 && hurried.len() >= 3, "{at:?}");
    assert_eq!(shared.lock().hopeless, [false, false, true]);
    // Who asks for peace gets it.
    let (asked, shared) = minute(Signal::Logs, &[busy(Some(30)), TAKEN], Some(1_000)).await;
    assert!(self::at(&asked)[1] >= 30_000, "{asked:?}");
    assert_eq!(shared.lock().hopeless, [false, false, true], "and nobody waits for that");
}
