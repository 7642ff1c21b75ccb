use super::*;

fn ended(call: u64, result: u64) -> Ended {
    Ended { call, result, bytes: 1_000, error: None, kind: Kind::Plain }
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut loops = Loops::default();
    for n in 0..20_000u64 {
        let thread = (n % 1_000).to_string();
        loops.call_began(&thread);
        loops.call_ended(&thread, &ended(n, n));
        loops.answered(true);
        loops.subagent_began();
    }
    assert!(loops.threads.len() <= THREADS);
    assert!(loops.progress.remembered() <= 4_096);
    assert_eq!(loops.streaks().stale, 1, "a memory that is full takes everything for news");
}

#[test]
fn a_round_is_whole_when_its_last_call_has_ended() {
    let mut loops = Loops::default();
    for n in 0..4 {
        for _ in 0..2 {
            loops.call_began("");
        }
        // Results come in any order.
        let (first, second) = if n % 2 == 0 { (1, 2) } else { (2, 1) };
        loops.call_ended("", &ended(first, 0));
        assert_eq!(loops.streaks().identical, n, "half a round is none");
        loops.call_ended("", &ended(second, 0));
        assert_eq!(loops.streaks().identical, n + 1);
    }
}

#[test]
fn a_result_of_a_call_that_nobody_saw_begin_is_a_round() {
    let mut loops = Loops::default();
    loops.call_ended("", &ended(1, 1));
    loops.call_ended("", &ended(1, 1));
    assert_eq!(loops.streaks().identical, 2);
}

#[test]
fn a_call_that_is_never_answered_hides_no_circle() {
    let mut loops = Loops::default();
    loops.call_began("");
    for n in 1..=3 {
        loops.answer_began("");
        loops.call_began("");
        loops.call_ended("", &ended(1, 1));
        assert_eq!(loops.streaks().identical, n);
    }
}
