//! Limits and stops as timelines: what is said and done at which second. Time is moved, never waited for.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fmt::Write as _;
use std::time::Duration;

use agent_sidecar_core::budget::share::{Part, Shares};
use agent_sidecar_core::budget::{Amount, Caps};
use agent_sidecar_core::limit::{Ceiling, Limit, Mode, Rule, SHARED, Scope, Shared};
use agent_sidecar_core::metric::{self, Cell, Metric};
use agent_sidecar_core::monitor::HeldFor;
use agent_sidecar_core::order::{Order, Raised};
use agent_sidecar_core::sample::{CliSample, OomVictim, RoleSample, Sample};
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::{Action, Exit, Input, Monitor, Now, Output, Settings, Signal, Stop};

const DAY: u64 = 1_795_392_000;

/// A wrapper without a world: what goes in is said here, what comes out is written down.
struct Bench {
    monitor: Monitor,
    now: Duration,
    log: String,
    /// Questions for the totals are answered with this much, in dollars, on one opus model.
    total: f64,
    deaf: bool,
}

impl Bench {
    fn new(rules: &[Rule]) -> Bench {
        Bench::with(Settings { rules: rules.to_vec(), poll: true, ..settings() })
    }

    fn one_shot(rules: &[Rule]) -> Bench {
        Bench::with(Settings { rules: rules.to_vec(), stdin_json: false, ..settings() })
    }

    fn with(settings: Settings) -> Bench {
        let now = Now { mono: Duration::ZERO, unix: Duration::from_secs(DAY) };
        let mut bench = Bench {
            monitor: Monitor::new(settings, false, now),
            now: Duration::ZERO,
            log: String::new(),
            total: 0.0,
            deaf: false,
        };
        bench.put(Input::Spawned { pid: 7 });
        bench
    }

    fn put(&mut self, input: Input<'_>) {
        let now = Now { mono: self.now, unix: Duration::from_secs(DAY) + self.now };
        self.monitor.handle(now, input);
        let mut answers = Vec::new();
        while let Some(output) = self.monitor.poll_output() {
            let at = self.now.as_secs_f64();
            match output {
                Output::Action(Action::Inject { request_id, line }) => {
                    if line.contains("get_usage") {
                        answers.push(request_id);
                    } else {
                        let words = [("end_session", "end_session"), ("interrupt", "\"interrupt\""), ("hold", "read -r why")];
                        let said = |(_, word): &(&str, &str)| line.contains(word);
                        let what = words.into_iter().find(said).map_or("refuse", |(what, _)| what);
                        assert!(what != "refuse" || line.contains("UserPromptSubmit"), "{line}");
                        writeln!(self.log, "{at:>6} {what}").unwrap();
                    }
                }
                Output::Action(Action::Signal(Signal(n))) => writeln!(self.log, "{at:>6} signal {n}").unwrap(),
                Output::Action(Action::KillAll) => writeln!(self.log, "{at:>6} kill all").unwrap(),
                Output::Action(Action::CloseStdin) => writeln!(self.log, "{at:>6} close stdin").unwrap(),
                Output::Decided(d) => writeln!(
                    self.log,
                    "{at:>6} {} {} {}: {} at {} of {}",
                    d.mode.as_str(),
                    d.limit.as_str(),
                    d.scope.as_str(),
                    d.step.as_str(),
                    d.observed,
                    d.ceiling
                )
                .unwrap(),
                Output::Record(_) | Output::Span(_) | Output::Log(_) | Output::Known => {}
            }
        }
        if !self.deaf {
            for id in answers {
                let usd = self.total;
                self.cli(&format!(
                    r#"{{"type":"control_response","response":{{"subtype":"success","request_id":"{id}","response":{{"session":{{"total_cost_usd":{usd},"model_usage":{{"claude-opus-5-5":{{"outputTokens":{},"costUSD":{usd}}}}}}}}}}}}}"#,
                    (usd * 50_000.0).round()
                ));
            }
        }
    }

    fn cli(&mut self, line: &str) -> &mut Bench {
        self.put(Input::Stdout(format!("{line}\n").as_bytes()));
        self
    }

    fn app(&mut self, line: &str) -> &mut Bench {
        self.put(Input::Stdin(format!("{line}\n").as_bytes()));
        self
    }

    fn ask(&mut self) -> &mut Bench {
        self.app(r#"{"type":"user","message":{"role":"user","content":"do it"}}"#).cli(INIT)
    }

    fn answer(&mut self, id: u64, tool: bool) -> &mut Bench {
        let block = if tool {
            format!(r#"{{"type":"tool_use","id":"toolu_{id}","name":"Bash","input":{{}}}}"#)
        } else {
            String::from(r#"{"type":"text","text":"done"}"#)
        };
        self.cli(&format!(
            r#"{{"type":"assistant","session_id":"s","message":{{"id":"msg_{id}","model":"claude-opus-5-5","usage":{{"input_tokens":0,"output_tokens":1}},"content":[{block}]}}}}"#
        ))
    }

    fn tool_result(&mut self, id: u64) -> &mut Bench {
        self.cli(&format!(
            r#"{{"type":"user","session_id":"s","message":{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"toolu_{id}"}}]}}}}"#
        ))
    }

    fn result(&mut self, subtype: &str, reason: &str) -> &mut Bench {
        let usd = self.total;
        self.cli(&format!(
            r#"{{"type":"result","session_id":"s","subtype":"{subtype}","is_error":{},"terminal_reason":"{reason}","modelUsage":{{"claude-opus-5-5":{{"outputTokens":{},"costUSD":{usd}}}}}}}"#,
            subtype != "success",
            (usd * 50_000.0).round()
        ))
    }

    /// Lets time pass up to this second, stopping wherever the monitor wants to be called.
    fn at(&mut self, seconds: f64) -> &mut Bench {
        let until = Duration::from_secs_f64(seconds);
        while let Some(due) = self.monitor.poll_timeout().filter(|due| *due < until) {
            assert!(due > self.now, "it wants to be called at {due:?}, and it is {:?}: that would spin", self.now);
            self.now = due;
            self.put(Input::Timeout);
        }
        self.now = until;
        self.put(Input::Timeout);
        self
    }

    fn exit(&mut self, exit: Exit) -> &mut Bench {
        self.put(Input::StdoutEnd);
        self.put(Input::Exited(exit));
        self
    }

    fn stop(&mut self, signal: i32) -> &mut Bench {
        self.put(Input::Stop(Stop::Signal(Signal(signal))));
        self
    }

    fn log(&self) -> &str {
        self.log.trim_end()
    }

    fn count(&self, metric: &'static Metric, labels: &[&str]) -> f64 {
        self.monitor.meters().get(metric, labels).map_or(0.0, Cell::to_f64)
    }
}

fn settings() -> Settings {
    Settings { nonce: String::from("test"), ..Settings::default() }
}

const INIT: &str = r#"{"type":"system","subtype":"init","session_id":"s","claude_code_version":"2.1.330"}"#;

fn rule(limit: Limit, scope: Scope, ceiling: Ceiling) -> Rule {
    Rule { limit, scope, ceiling, mode: Mode::Enforce }
}

fn usd(ceiling: f64) -> Ceiling {
    Ceiling::Usd(Usd::from_f64(ceiling))
}

fn secs(seconds: u64) -> Ceiling {
    Ceiling::Time(Duration::from_secs(seconds))
}

#[test]
fn a_budget_warns_on_the_way_ends_the_turn_with_a_result_and_refuses_the_next() {
    let mut b = Bench::new(&[rule(Limit::CostUsd, Scope::Session, usd(1.0))]);
    b.ask();
    for (id, total) in [(1, 0.3), (2, 0.55), (3, 0.96), (4, 1.25)] {
        b.at(id as f64);
        b.total = total;
        b.answer(id, true).tool_result(id);
    }
    b.at(4.1).result("error_during_execution", "aborted_tools");
    // The CLI answers the next message itself, without asking the model; one that it asks for all the same is interrupted.
    b.at(10.0).ask().result("success", "completed").at(20.0).ask().answer(9, true).at(20.1);
    b.result("error_during_execution", "aborted_tools").exit(Exit::Code(1));
    assert_eq!(
        b.log(),
        "     2 enforce usd session: warn at 0.55 of 1
     3 enforce usd session: warn at 0.96 of 1
     4 enforce usd session: refuse at 1.25 of 1
     4 refuse
     4 interrupt
    20 interrupt"
    );
    assert_eq!(b.count(&metric::TURNS, &["limit_stopped"]), 2.0);
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "main"]), 1.25);
    let Some(Cell::Histogram(overshoot)) = b.monitor.meters().get(&metric::ENFORCEMENT_OVERSHOOT, &["session"]) else {
        panic!("no overshoot")
    };
    assert!((overshoot.sum - 0.25).abs() < 1e-9, "{}", overshoot.sum);
}

#[test]
fn a_turns_budget_ends_the_turn_and_the_session_lives_on() {
    let mut b = Bench::new(&[rule(Limit::CostUsd, Scope::Turn, usd(1.0))]);
    b.ask();
    b.total = 1.5;
    b.at(1.0).answer(1, true).at(1.2).result("error_during_execution", "aborted_tools");
    b.at(20.0).ask();
    b.total = 2.0;
    b.at(21.0).answer(2, false).result("success", "completed").at(60.0);
    assert_eq!(
        b.log(),
        "     1 enforce usd turn: interrupt at 1.5 of 1
     1 interrupt
    21 enforce usd turn: warn at 0.50002 of 1"
    );
    assert_eq!(b.count(&metric::TURNS, &["limit_stopped"]), 1.0);
    assert_eq!(b.count(&metric::TURNS, &["success"]), 1.0);
}

#[test]
fn shadow_says_what_it_would_have_done_and_does_nothing() {
    let rule = Rule { mode: Mode::Shadow, ..rule(Limit::CostUsd, Scope::Session, usd(1.0)) };
    let mut b = Bench::new(&[rule]);
    b.ask();
    b.total = 5.0;
    b.at(1.0).answer(1, true).tool_result(1).at(2.0).answer(2, false).result("success", "completed").at(100.0);
    assert_eq!(b.log(), "     1 shadow usd session: refuse at 5 of 1");
    assert_eq!(b.count(&metric::ENFORCEMENTS, &["usd", "session", "refuse", "shadow"]), 1.0);
}

#[test]
fn who_does_not_answer_is_asked_harder_until_nothing_is_left() {
    let mut b = Bench::new(&[rule(Limit::Duration, Scope::Turn, secs(10))]);
    b.ask().at(4.0).answer(1, true).at(30.0);
    assert_eq!(
        b.log(),
        "     5 enforce duration turn: warn at 5 of 10
     8 enforce duration turn: warn at 8 of 10
   9.5 enforce duration turn: warn at 9.5 of 10
    10 enforce duration turn: interrupt at 10 of 10
    10 interrupt
    13 end_session
    16 signal 15
  17.5 kill all
    18 kill all
  18.5 kill all
    19 kill all
  19.5 kill all
    20 kill all
  20.5 kill all
    21 kill all
  21.5 kill all
    22 kill all
  22.5 kill all
    23 kill all
  23.5 kill all
    24 kill all
  24.5 kill all
    25 kill all
  25.5 kill all
    26 kill all
  26.5 kill all
    27 kill all
  27.5 kill all
    28 kill all
  28.5 kill all
    29 kill all
  29.5 kill all
    30 kill all"
    );
    assert!(!b.monitor.live(), "what even a kill does not end is beyond recovery");
    b.exit(Exit::Signal(9));
    assert_eq!(b.count(&metric::TURNS, &["limit_stopped"]), 1.0);
    assert_eq!(b.count(&metric::RESULTS_MISSING, &["limit"]), 1.0);
}

#[test]
fn idle_is_judged_by_state_and_not_by_silence() {
    let idle = [rule(Limit::Idle, Scope::Session, secs(60))];
    // Ten silent minutes of a model, a tool, a permission, a retry, a background task: work.
    type Begin = fn(&mut Bench);
    let waits: [(&str, Begin); 5] = [
        ("model", |b| _ = b.ask()),
        ("tool", |b| _ = b.ask().answer(1, true)),
        ("permission", |b| {
            b.ask().answer(1, true).cli(
                r#"{"type":"control_request","request_id":"r","request":{"subtype":"can_use_tool","tool_name":"Bash","tool_use_id":"toolu_1"}}"#,
            );
        }),
        ("retry", |b| {
            b.ask()
                .cli(r#"{"type":"system","subtype":"api_retry","session_id":"s","retry_delay_ms":600000,"error":"overloaded"}"#);
        }),
        ("background task", |b| {
            b.ask()
                .cli(r#"{"type":"system","subtype":"background_tasks_changed","session_id":"s","tasks":[{"task_id":"t","task_type":"local_bash"}]}"#)
                .answer(1, false)
                .result("success", "completed");
        }),
    ];
    for (what, begin) in waits {
        let mut b = Bench::new(&idle);
        begin(&mut b);
        b.at(600.0);
        assert_eq!(b.log(), "", "{what}");
    }
    // Between two turns nothing is done, and time runs from the last of them.
    let mut b = Bench::new(&idle);
    b.ask().at(100.0).answer(1, false).result("success", "completed").at(300.0);
    assert_eq!(
        b.log().lines().take(2).collect::<Vec<_>>(),
        ["   160 enforce idle session: stop at 60 of 60", "   160 end_session"]
    );
    b.exit(Exit::Code(0));
    assert_eq!(b.count(&metric::IDLE_SHUTDOWNS, &[]), 1.0);
    assert_eq!(b.count(&metric::PROCESS_EXITS, &["idle"]), 1.0);
}

#[test]
fn an_agent_that_nobody_speaks_to_is_idle_from_the_start() {
    let mut b = Bench::new(&[rule(Limit::Idle, Scope::Session, secs(60))]);
    b.at(61.0);
    // Before the app's first line nothing may be said to the CLI: only a signal is left, the one that it takes as a clean end.
    assert_eq!(b.log(), "    60 enforce idle session: stop at 60 of 60\n    60 signal 2");
}

#[test]
fn turns_are_stopped_by_us_only_if_the_cli_does_not() {
    let mut b = Bench::new(&[rule(Limit::Turns, Scope::Turn, Ceiling::Count(3))]);
    b.ask();
    for id in 1..=3 {
        b.answer(id, true).tool_result(id);
    }
    assert!(!b.log().contains("interrupt"), "{}", b.log());
    b.answer(4, true);
    assert!(b.log().ends_with("enforce turns turn: interrupt at 4 of 3\n     0 interrupt"), "{}", b.log());
}

#[test]
fn a_session_that_used_up_its_turns_gets_no_further_round() {
    let mut b = Bench::new(&[rule(Limit::Turns, Scope::Session, Ceiling::Count(2))]);
    b.ask().answer(1, false).result("success", "completed");
    b.at(5.0).ask().answer(2, true);
    assert!(b.log().ends_with("5 enforce turns session: refuse at 2 of 2\n     5 refuse\n     5 interrupt"), "{}", b.log());

    // Used up with the last answer of a turn: that one ends as it would, and the next message is not even asked.
    let mut b = Bench::new(&[rule(Limit::Turns, Scope::Session, Ceiling::Count(2))]);
    b.ask().answer(1, true).tool_result(1).answer(2, false).at(3.0);
    assert!(!b.log().contains("refuse"), "{}", b.log());
    b.result("success", "completed").at(20.0).ask().result("success", "completed");
    assert!(b.log().ends_with("3 enforce turns session: refuse at 2 of 2\n     3 refuse"), "{}", b.log());

    // A one-shot ends there by itself.
    let mut b = Bench::one_shot(&[rule(Limit::Turns, Scope::Session, Ceiling::Count(1))]);
    b.cli(INIT).answer(1, false).result("success", "completed").exit(Exit::Code(0));
    assert_eq!(b.log(), "");
    assert_eq!(b.count(&metric::PROCESS_EXITS, &["clean"]), 1.0);
}

#[test]
fn a_silent_start_a_stall_and_a_missing_end_are_told_apart() {
    let startup = [rule(Limit::Startup, Scope::Session, secs(30))];
    let mut b = Bench::one_shot(&startup);
    b.at(31.0);
    assert_eq!(b.log(), "    30 enforce startup session: term at 30 of 30\n    30 signal 15");
    assert_eq!(b.count(&metric::STALLED, &["0", "startup"]), 1.0);
    b.exit(Exit::Code(143));
    assert_eq!(b.count(&metric::PROCESS_EXITS, &["stuck"]), 1.0);

    let mut b = Bench::new(&[rule(Limit::Stall, Scope::Session, secs(400))]);
    b.ask().at(390.0);
    assert_eq!(b.log(), "");
    b.at(401.0);
    assert_eq!(b.log(), "   400 enforce stall session: interrupt at 400 of 400\n   400 interrupt");
    assert_eq!(b.count(&metric::PROCESS_STATE, &["0", "stuck"]), 1.0);

    // One-shot, the result came, but a background command keeps the process for ever.
    let mut b = Bench::one_shot(&[rule(Limit::Result, Scope::Session, secs(20))]);
    b.cli(INIT).answer(1, false).at(5.0).result("success", "completed").at(26.0);
    assert_eq!(b.log(), "    25 enforce result session: stop at 20 of 20\n    25 signal 2");
}

#[test]
fn a_one_shot_is_interrupted_by_signal_and_ended_if_that_does_not_help() {
    let mut b = Bench::one_shot(&[rule(Limit::Duration, Scope::Turn, secs(8))]);
    b.cli(INIT).answer(1, true).at(8.5).result("error_during_execution", "aborted_tools").exit(Exit::Code(0));
    assert!(b.log().ends_with("8 enforce duration turn: interrupt at 8 of 8\n     8 signal 2"), "{}", b.log());
    assert_eq!(b.count(&metric::TURNS, &["limit_stopped"]), 1.0);
    assert_eq!(b.count(&metric::PROCESS_EXITS, &["limit"]), 1.0);
}

#[test]
fn where_nobody_can_be_asked_an_answer_counts_when_its_tool_starts() {
    let mut b = Bench::one_shot(&[rule(Limit::CostUsd, Scope::Session, usd(0.5))]);
    b.cli(INIT).cli(
        r#"{"type":"assistant","session_id":"s","message":{"id":"m","model":"claude-opus-5-5","usage":{"input_tokens":200000},"content":[{"type":"tool_use","id":"t","name":"Bash","input":{}}]}}"#,
    );
    assert_eq!(b.log(), "     0 enforce usd session: stop at 0.8 of 0.5\n     0 signal 2");
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "main"]), 0.8);
}

#[test]
fn where_nobody_can_be_asked_an_answer_in_one_piece_counts_when_it_is_there() {
    let whole = |n: u64, reason: &str| {
        format!(
            r#"{{"type":"assistant","session_id":"s","message":{{"id":"m{n}","model":"claude-opus-5-5","stop_reason":{reason},"usage":{{"input_tokens":10000,"output_tokens":5000}},"content":[{{"type":"text","text":"x"}}]}}}}"#
        )
    };
    let mut b = Bench::one_shot(&[]);
    b.cli(INIT).cli(&whole(1, r#""max_tokens""#));
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "main"]), 0.14);
    // Its other blocks say the same again.
    b.cli(&whole(1, r#""max_tokens""#));
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "main"]), 0.14);
    // Without a reason more of it may come.
    b.cli(&whole(2, "null"));
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "main"]), 0.14);
    b.cli(&whole(3, r#""end_turn""#));
    assert!((b.count(&metric::COST, &["claude-opus-5-5", "main"]) - 0.42).abs() < 1e-9);
}

#[test]
fn a_signal_becomes_a_graceful_end_where_it_can() {
    let mut b = Bench::new(&[]);
    b.ask();
    b.total = 0.5;
    b.at(1.0).answer(1, true).at(2.0).stop(15);
    b.total = 0.75;
    b.at(2.1).result("error_during_execution", "aborted_tools").exit(Exit::Code(1));
    assert_eq!(b.log(), "     2 end_session");
    assert_eq!(b.count(&metric::PROCESS_EXITS, &["shutdown"]), 1.0);
    assert_eq!(b.count(&metric::TURNS, &["interrupted"]), 1.0);
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "main"]), 0.75);

    // One-shot: as it came. Nobody confirms the last answer, so it is estimated.
    let mut b = Bench::one_shot(&[]);
    b.cli(INIT).answer(1, true).at(2.0).stop(15).at(2.3).exit(Exit::Code(143));
    assert_eq!(b.log(), "     2 signal 15");
    assert_eq!(b.count(&metric::RESULTS_MISSING, &["signal"]), 1.0);
    assert!(b.count(&metric::COST_ESTIMATED, &[]) > 0.0);
}

#[test]
fn a_cli_that_ignores_the_polite_way_gets_the_signal_in_time_for_the_sdks() {
    let mut b = Bench::new(&[]);
    b.ask().at(1.0).stop(15).at(6.0);
    assert_eq!(b.log().lines().take(3).collect::<Vec<_>>(), ["     1 end_session", "     4 signal 15", "   5.5 kill all"]);
}

#[test]
fn the_apps_end_waits_for_the_last_totals_but_not_for_long() {
    let mut b = Bench::new(&[]);
    b.ask().at(1.0).answer(1, false).result("success", "completed").at(2.0);
    b.total = 0.25;
    b.put(Input::StdinEnd);
    assert_eq!(b.log(), "     2 close stdin", "the answer came at once");
    b.exit(Exit::Code(0));
    assert_eq!(b.count(&metric::COST, &["claude-opus-5-5", "unattributed"]), 0.25);

    let mut b = Bench::new(&[]);
    b.ask().at(1.0);
    b.deaf = true;
    b.put(Input::StdinEnd);
    b.at(2.0);
    assert_eq!(b.log(), "  1.25 close stdin");
}

#[test]
fn a_cli_that_does_not_tell_its_totals_is_counted_by_its_answers() {
    let mut b = Bench::new(&[]);
    b.deaf = true;
    b.ask().at(6.0).answer(1, true).tool_result(1);
    let booked = |b: &Bench| b.count(&metric::COST, &["claude-opus-5-5", "main"]);
    assert_eq!(booked(&b), 0.00002, "its one token, before any result");
    // It tells them again: what was counted is in them.
    b.deaf = false;
    b.total = 0.25;
    b.at(12.0).answer(2, true).tool_result(2).at(13.0);
    let all = booked(&b) + b.count(&metric::COST, &["claude-opus-5-5", "unattributed"]);
    assert!((all - 0.25).abs() < 1e-9, "{all}");
}

#[test]
fn an_app_that_is_gone_takes_its_agent_along() {
    let mut b = Bench::new(&[]);
    b.ask().at(1.0).answer(1, true).at(2.0);
    b.put(Input::Stop(Stop::AppGone));
    b.at(5.5);
    assert_eq!(b.log(), "     2 end_session\n     5 signal 15");
}

#[test]
fn times_in_states_add_up_to_the_wall_clock() {
    let mut b = Bench::new(&[]);
    b.at(3.0).ask().at(10.0).answer(1, true).at(25.5).tool_result(1).at(30.0).answer(2, false);
    b.at(31.0).result("success", "completed").at(100.0).stop(15).at(101.0).exit(Exit::Code(0));
    let time = |state: &str| b.count(&metric::TIME, &[state]);
    assert_eq!(
        [time("waiting_input"), time("model"), time("tool"), time("idle"), time("draining")],
        [3.0, 12.5, 15.5, 69.0, 1.0]
    );
    let all: f64 = agent_sidecar_core::update::Activity::ALL.iter().map(|state| time(state.as_str())).sum();
    assert_eq!(all, 101.0);
}

#[test]
fn memory_recycles_at_the_next_turn_boundary() {
    use agent_sidecar_core::sample::{ContainerSample, Sample};
    let mut b = Bench::new(&[rule(Limit::Memory, Scope::Session, Ceiling::Bytes(1_000))]);
    b.ask().at(1.0).answer(1, false);
    let container = ContainerSample { working_set_bytes: Some(1_200), ..ContainerSample::default() };
    b.put(Input::Sample(&Sample { container, ..Sample::default() }));
    assert!(!b.log().contains("end_session"), "not in the middle of a turn: {}", b.log());
    b.at(2.0).result("success", "completed");
    assert!(b.log().ends_with("2 enforce memory session: stop at 1200 of 1000\n     2 end_session"), "{}", b.log());
}

/// A reading of the CLI's process in this state.
fn seen(state: char) -> Sample {
    Sample { cli: Some(CliSample { state, sockets: None }), ..Sample::default() }
}

#[test]
fn a_circle_ends_the_turn_and_the_session_lives_on() {
    let mut b = Bench::new(&[rule(Limit::IdenticalCalls, Scope::Turn, Ceiling::Count(4))]);
    b.ask();
    for id in 1..=4 {
        b.at(id as f64).answer(id, true).tool_result(id);
    }
    b.at(4.2).result("error_during_execution", "aborted_tools");
    // The same again in the next turn is no circle yet.
    b.at(10.0).ask().answer(5, true).tool_result(5).answer(6, false).result("success", "completed").at(20.0);
    assert_eq!(
        b.log(),
        "     2 enforce identical_call turn: warn at 2 of 4
     4 enforce identical_call turn: interrupt at 4 of 4
     4 interrupt"
    );
    assert_eq!(b.count(&metric::LOOP_DETECTIONS, &["identical_call", "interrupt"]), 1.0);
    assert_eq!(b.count(&metric::TURNS, &["limit_stopped"]), 1.0);
    assert_eq!(b.count(&metric::TURNS, &["success"]), 1.0);
}

#[test]
fn who_is_stopped_is_frozen_and_woken_before_it_is_asked() {
    let stall = [rule(Limit::Stall, Scope::Session, secs(20))];
    let mut b = Bench::new(&stall);
    b.ask().answer(1, true);
    for second in [5.0, 10.0, 15.0] {
        b.at(second).put(Input::Sample(&seen('T')));
    }
    let status = serde_json::to_value(b.monitor.status()).unwrap();
    assert_eq!((&status["sessions"][0]["state"], &status["sessions"][0]["why"]), (&"tool".into(), &"frozen".into()));
    assert_eq!(b.count(&metric::STALLED, &["0", "frozen"]), 1.0);
    // A tool may run for hours, but not where nothing runs.
    b.at(26.0);
    assert_eq!(b.log(), "    25 enforce stall session: interrupt at 20 of 20\n    25 signal 18\n    25 interrupt");
    b.put(Input::Sample(&seen('S')));
    b.result("error_during_execution", "aborted_tools");
    assert_eq!(b.count(&metric::STALLED, &["0", "frozen"]), 0.0);
    assert_eq!(b.count(&metric::TURNS, &["stuck_killed"]), 1.0);

    // Idle, it keeps nobody waiting.
    let mut b = Bench::new(&stall);
    b.ask().answer(1, false).result("success", "completed").put(Input::Sample(&seen('T')));
    b.at(600.0);
    assert_eq!(b.log(), "");
}

#[test]
fn a_decision_about_time_says_what_the_agent_was_about() {
    let mut b = Bench::new(&[rule(Limit::Stall, Scope::Session, secs(400)), rule(Limit::Duration, Scope::Tool, secs(90))]);
    b.ask().answer(1, true);
    let mut whys = Vec::new();
    for (second, input) in [(45, Input::Timeout), (91, Input::Timeout)] {
        let now = Duration::from_secs(second);
        b.monitor.handle(Now { mono: now, unix: Duration::from_secs(DAY) + now }, input);
        while let Some(output) = b.monitor.poll_output() {
            if let Output::Decided(decision) = output {
                whys.push((decision.step.as_str(), decision.why.map(|why| why.as_str())));
            }
        }
    }
    assert_eq!(whys, [("warn", Some("tool")), ("interrupt", Some("long_tool"))]);
}

#[test]
fn memory_that_runs_out_recycles_the_agent_between_two_turns() {
    let horizon = rule(Limit::MemoryForecast, Scope::Session, secs(600));
    let mut b = Bench::new(&[rule(Limit::Memory, Scope::Session, Ceiling::Bytes(2 << 30)), horizon]);
    b.ask();
    // Three megabytes each second from 200: full after ten minutes.
    let grown = |b: &mut Bench, until: u32| {
        while b.now < Duration::from_secs(until.into()) {
            let second = b.now.as_secs() + 5;
            let memory_bytes = (200 + 3 * second) << 20;
            let sample = Sample { roles: vec![RoleSample { memory_bytes, ..RoleSample::new("cli") }], ..Sample::default() };
            b.at(second as f64).put(Input::Sample(&sample));
        }
    };
    grown(&mut b, 300);
    assert!(!b.log().contains("stop"), "not in a turn: {}", b.log());
    b.answer(1, false).result("success", "completed");
    let stop = b.log().lines().skip_while(|line| line.contains("warn")).collect::<Vec<_>>().join("\n");
    assert!(stop.starts_with("   300 enforce memory_forecast session: stop at 31"), "{}", b.log());
    assert!(stop.ends_with("of 600\n   300 end_session"), "{}", b.log());
    let exhausted = b.count(&metric::MEMORY_EXHAUSTION, &[]);
    assert!((exhausted - (DAY + 616) as f64).abs() < 5.0, "{exhausted}");
    b.exit(Exit::Code(0));
    assert_eq!(b.count(&metric::PROCESS_EXITS, &["limit"]), 1.0);
}

#[test]
fn a_kill_is_called_out_of_memory_only_if_it_was_the_clis() {
    let victim = |role| OomVictim { role, memory_bytes: 1 << 30 };
    let tool = Sample { oom_victims: vec![victim("tool")], ..Sample::default() };
    let cli = Sample { oom_victims: vec![victim("tool"), victim("cli")], ..Sample::default() };
    let unknown = Sample { oom_unknown: 1, ..Sample::default() };
    for (sample, exit, reason) in [
        (&tool, Exit::Signal(9), "signal"),
        (&cli, Exit::Signal(9), "oom"),
        (&cli, Exit::Code(137), "oom"),
        (&cli, Exit::Code(0), "clean"),
        (&unknown, Exit::Signal(9), "oom"),
        (&Sample::default(), Exit::Signal(9), "signal"),
    ] {
        let mut b = Bench::new(&[]);
        b.ask().put(Input::Sample(sample));
        b.exit(exit);
        assert_eq!(b.count(&metric::PROCESS_EXITS, &[reason]), 1.0, "{exit:?} {sample:?}");
        let tools = sample.oom_victims.iter().filter(|victim| victim.role == "tool").count();
        assert_eq!(b.count(&metric::OOM_KILLS, &["tool"]), tools as f64);
    }
}

#[test]
fn what_was_frozen_with_us_is_not_silence() {
    let rules = [rule(Limit::Idle, Scope::Session, secs(600)), rule(Limit::Stall, Scope::Session, secs(400))];
    for turn_is_over in [true, false] {
        let mut b = Bench::new(&rules);
        b.ask();
        if turn_is_over {
            b.answer(1, false).result("success", "completed");
        }
        b.at(300.0);
        // The container is paused for a day, and we with it.
        b.now += Duration::from_secs(86_400);
        b.put(Input::Timeout);
        assert_eq!(b.log(), "", "turn is over: {turn_is_over}");
        b.at(86_400.0 + 390.0);
        assert_eq!(b.log(), "", "turn is over: {turn_is_over}");
        b.at(86_400.0 + 610.0);
        let limit = if turn_is_over {
            "87000 enforce idle session: stop at 600 of 600"
        } else {
            "86800 enforce stall session: interrupt at 400 of 400"
        };
        assert!(b.log().contains(limit), "{}", b.log());
    }
}

/// What the book says of the container's budget.
fn container(used: f64, ends: u64) -> [Option<Shared>; SHARED] {
    let mut shared = [None; SHARED];
    let ends = Duration::from_secs(ends);
    let none = Amount::NONE;
    let spent = Amount::new(Usd::from_f64(used), 0);
    let (raised, shares) = (Caps::default(), Shares::default());
    // Small, so that the end is near only when it is there.
    let typical = Amount::new(Usd::from_f64(0.0001), 1);
    shared[1] = Some(Shared {
        spent,
        reserved: none,
        before: none,
        guesses: 0,
        when_spent: none,
        ends,
        raised,
        shares,
        typical,
        payers: 1,
    });
    shared
}

#[test]
fn a_shared_budget_holds_the_agent_until_there_is_more() {
    let rule = Rule {
        limit: Limit::CostUsd,
        scope: Scope::ContainerDay,
        ceiling: Ceiling::Usd(Usd::from_f64(1.0)),
        mode: Mode::Enforce,
    };
    let mut bench =
        Bench::with(Settings { rules: vec![rule], poll: true, hold_file: String::from("/x/it's.hold"), ..settings() });
    assert!(!bench.monitor.held(), "nobody has said anything of it");
    bench.put(Input::Shared(&container(0.85, 7)));
    assert!(!bench.monitor.held());
    bench.put(Input::Shared(&container(1.0, 7)));
    assert!(bench.monitor.held(), "others have spent it");
    bench.put(Input::Shared(&container(0.9, 7)));
    assert!(!bench.monitor.held(), "somebody needed less than was reserved");
    bench.put(Input::Shared(&container(1.2, 7)));
    bench.put(Input::Shared(&container(0.0, 8)));
    assert!(!bench.monitor.held(), "another day");
    bench.put(Input::Shared(&container(1.5, 8)));
    assert!(bench.monitor.held());
    let mut raised = container(1.5, 8);
    raised[1].as_mut().unwrap().raised.usd = Some(Usd::from_f64(2.0));
    bench.put(Input::Shared(&raised));
    assert!(!bench.monitor.held(), "somebody has raised it");
    assert!((bench.monitor.limits()[0].ceiling - 2.0).abs() < 1e-9);
    let shadow = Rule { mode: Mode::Shadow, ..rule };
    let mut bench = Bench::with(Settings { rules: vec![shadow], poll: true, ..settings() });
    bench.put(Input::Shared(&container(2.0, 7)));
    assert!(!bench.monitor.held());
    let told = bench.monitor.meters().get(&metric::ENFORCEMENTS, &["usd", "container_day", "interrupt", "shadow"]).cloned();
    assert_eq!(told, Some(Cell::Count(1)));
}

#[test]
fn tokens_are_a_shared_budget_too_and_the_overshoot_is_that_of_all() {
    let rule = |limit, ceiling| Rule { limit, scope: Scope::ContainerDay, ceiling, mode: Mode::Enforce };
    let rules = vec![rule(Limit::Tokens, Ceiling::Count(1_000)), rule(Limit::CostUsd, Ceiling::Usd(Usd::from_f64(1.0)))];
    let mut bench = Bench::with(Settings { rules, poll: true, hold_file: String::from("/x/y.hold"), ..settings() });
    let with = |usd: f64, tokens: u64, before: u64| {
        let mut shared = container(usd, 7);
        let one = shared[1].as_mut().unwrap();
        one.spent.tokens = tokens;
        (one.before.tokens, one.reserved.tokens) = (before, before + 100);
        shared
    };
    bench.put(Input::Shared(&with(0.2, 900, 99)));
    assert!(!bench.monitor.held());
    bench.put(Input::Shared(&with(0.2, 900, 100)));
    assert_eq!(bench.monitor.waits(), [Scope::ContainerDay], "what others have reserved is spoken for");
    let gauge = |bench: &Bench, metric, values: &[&str]| bench.monitor.meters().get(metric, values).unwrap().to_f64();
    assert_eq!(gauge(&bench, &metric::BUDGET_LIMIT_TOKENS, &["container_day"]), 1_000.0);
    assert_eq!(gauge(&bench, &metric::BUDGET_SPENT_TOKENS, &["container_day"]), 900.0);
    assert_eq!(gauge(&bench, &metric::BUDGET_RESERVED_TOKENS, &["container_day"]), 200.0);
    assert!((gauge(&bench, &metric::BUDGET_REMAINING, &["usd", "container_day"]) - 0.8).abs() < 1e-9);
    assert_eq!(gauge(&bench, &metric::BUDGET_WINDOW_END, &["container_day"]), 7.0);
    bench.put(Input::Shared(&with(0.2, 0, 0)));
    assert!(!bench.monitor.held());
    // Others spend on while its own turn is stopped: what they are above it together is what is told.
    bench.ask();
    bench.put(Input::Shared(&with(1.25, 0, 0)));
    assert!(bench.log().contains("interrupt"), "{}", bench.log());
    bench.result("error_during_execution", "aborted_streaming");
    let Some(Cell::Histogram(over)) = bench.monitor.meters().get(&metric::ENFORCEMENT_OVERSHOOT, &["container_day"]).cloned()
    else {
        panic!("nothing was told of the overshoot");
    };
    assert!((over.sum - 0.25).abs() < 1e-9, "{over:?}");
}

/// The same, and what part of it is this agent's.
fn share(used: f64, had: f64, of: f64) -> [Option<Shared>; SHARED] {
    let mut shared = container(used, 7);
    let [had, of] = [had, of].map(|usd| Usd::from_f64(usd).pico());
    shared[1].as_mut().unwrap().shares.usd = Some(Part { had, of, tenants: false });
    shared
}

#[test]
fn who_has_had_its_share_waits_with_a_reason_and_what_it_was_let_it_may_have() {
    let rule = rule(Limit::CostUsd, Scope::ContainerDay, usd(4.0));
    let mut b = held(&[rule]);
    b.put(Input::Shared(&share(1.5, 1.1, 2.0)));
    assert!(!b.monitor.held());
    let limits = serde_json::to_value(b.monitor.limits()).unwrap();
    assert_eq!(limits[0]["share"], serde_json::json!({"used": 1.1, "of": 2.0, "tenant": false}));
    // Another comes while the model is asked: this answer was let. The CLI is told what to look at before it is there.
    b.ask();
    b.put(Input::Shared(&share(1.5, 1.1, 1.0)));
    b.at(1.0);
    assert_eq!((b.monitor.held(), b.log()), (false, "     0 hold"));
    b.total = 0.1;
    b.at(2.0).answer(1, true);
    b.at(2.5);
    assert!(b.log().ends_with("enforce usd container_day: refuse at 1.10002 of 1\n     2 interrupt"), "{}", b.log());
    let HeldFor { why, now } = b.monitor.held_for().unwrap();
    assert!(now, "also between two requests of a turn");
    assert_eq!(
        why,
        "agent-sidecar: the fair share of the container's day budget that this session shares with others is used up; \
         1.10 of 1.00 USD; it goes on when others need less"
    );
    assert!(!why.contains(['"', '\\']), "a shell puts it into JSON");
    let waits = |b: &Bench, cause| b.count(&metric::BUDGET_WAITING, &["container_day", cause]);
    assert_eq!([waits(&b, "budget"), waits(&b, "share")], [0.0, 1.0]);
    b.result("error_during_execution", "aborted_tools");
    // There is nobody else any more.
    b.put(Input::Shared(&container(1.6, 7)));
    assert_eq!((b.monitor.held_for(), waits(&b, "share")), (None, 0.0));
    b.put(Input::Shared(&share(4.1, 1.2, 2.0)));
    assert!(b.monitor.held_for().unwrap().why.ends_with("a budget that this session shares with others is used up"));
    assert_eq!([waits(&b, "budget"), waits(&b, "share")], [1.0, 0.0]);
}

fn held(rules: &[Rule]) -> Bench {
    Bench::with(Settings { rules: rules.to_vec(), poll: true, hold_file: String::from("/x/y.hold"), ..settings() })
}

#[test]
fn what_the_cli_asks_for_is_reserved_until_its_price_is_known() {
    let mut b = held(&[rule(Limit::CostUsd, Scope::ContainerDay, usd(4.0))]);
    let asked = |b: &Bench| b.monitor.claim().1.map(|asked| (asked.answers, asked.request));
    b.ask();
    b.put(Input::Knocks);
    b.put(Input::Asks);
    assert_eq!(asked(&b), Some((1, 1)));
    b.deaf = true;
    b.at(1.0).answer(1, true);
    assert_eq!(asked(&b), Some((1, 1)), "the tool runs, and nobody knows what the answer has cost");
    b.at(1.1).tool_result(1);
    b.put(Input::Knocks);
    b.put(Input::Asks);
    assert!(b.monitor.awaits_totals());
    assert_eq!(asked(&b), Some((2, 2)));
    // The question that came too early is given up, the next one is answered.
    (b.deaf, b.total) = (false, 0.1);
    b.at(9.0);
    assert!(!b.monitor.awaits_totals());
    assert_eq!((asked(&b), b.monitor.claim().0.usd), (Some((1, 2)), Usd::from_f64(0.1)));
    // An interrupt takes nothing back of what may be on its way.
    b.put(Input::Shared(&container(4.1, 7)));
    assert!(b.log().ends_with("interrupt"), "{}", b.log());
    assert_eq!(asked(&b), Some((1, 2)));
    b.put(Input::LetThrough);
    assert_eq!(asked(&b), None);
    b.at(9.1).result("error_during_execution", "aborted_tools");
    // Who waits with a message has it turned away, with the reason: no interrupt is in the way.
    b.put(Input::Shared(&container(0.1, 7)));
    let before = b.log.clone();
    b.app(r#"{"type":"user","message":{"role":"user","content":"do it"}}"#);
    b.put(Input::Knocks);
    b.put(Input::Asks);
    b.put(Input::Shared(&container(4.1, 7)));
    assert!(b.monitor.held_for().is_some_and(|held| held.now));
    assert!(!b.log[before.len()..].contains("interrupt"), "{}", b.log());
}

#[test]
fn who_comes_first_is_let_through_and_the_others_wait_for_its_price() {
    let mut b = held(&[rule(Limit::CostUsd, Scope::ContainerDay, usd(0.3))]);
    assert!(b.monitor.may_be_near(), "nobody knows what is left of it");
    let with = |used: f64, before: f64, guesses: u64, typical: f64| {
        let mut shared = container(used, 7);
        let one = shared[1].as_mut().unwrap();
        (one.before, one.guesses) = (Amount::new(Usd::from_f64(before), 0), guesses);
        one.typical = Amount::new(Usd::from_f64(typical), 0);
        shared
    };
    b.put(Input::Shared(&with(0.0, 0.0, 1, 0.0)));
    assert!(b.monitor.may_be_near() && !b.monitor.waits_for_others(), "it asks for nothing");
    b.put(Input::Knocks);
    b.put(Input::Asks);
    assert!(b.monitor.waits_for_others() && !b.monitor.held());
    b.put(Input::Shared(&with(0.0, 0.1, 0, 0.1)));
    assert!(!b.monitor.waits_for_others(), "by now there is a price");
    b.put(Input::Shared(&with(0.0, 0.3, 0, 0.1)));
    assert!(b.monitor.waits_for_others() && !b.monitor.held(), "they may need less");
    b.put(Input::LetThrough);
    assert!(b.monitor.held(), "they did not say so in time");
    b.put(Input::Shared(&with(0.0, 0.0, 1, 0.0)));
    b.put(Input::Asks);
    b.put(Input::LetThrough);
    assert!(!b.monitor.held(), "nobody is turned away for a guess");
    b.put(Input::Shared(&with(9.0, 0.0, 0, 0.1)));
    assert!(!b.monitor.held(), "what was let through may come");
}

const PAUSED: Order = Order { paused: true, interrupts: 0, stop: false, raised: Raised { usd: None, tokens: None, turns: None } };

#[test]
fn who_is_paused_ends_its_turn_and_takes_no_other() {
    let mut b = held(&[rule(Limit::Idle, Scope::Session, secs(60))]);
    b.ask().answer(1, true);
    b.put(Input::Ordered(&PAUSED));
    b.put(Input::Ordered(&PAUSED));
    assert!(b.monitor.held_for().is_some_and(|held| held.why.contains("is paused") && !held.now));
    b.at(1.0).tool_result(1).answer(2, false).result("success", "completed");
    // A CLI that does not know hooks, or a message that came too early.
    b.at(5.0).ask().answer(3, false).at(5.1).result("error_during_execution", "aborted_streaming");
    b.at(500.0);
    assert_eq!(b.log(), "     0 hold\n     5 interrupt", "who is made to wait is not idle");
    assert_eq!(serde_json::to_value(b.monitor.status()).unwrap()["sessions"][0]["paused"], true);
    assert_eq!(b.count(&metric::PAUSED, &["0"]), 1.0);
    b.put(Input::Ordered(&Order::default()));
    assert_eq!((b.monitor.held(), b.count(&metric::PAUSED, &["0"])), (false, 0.0));
    b.ask().answer(4, false).result("success", "completed");
    assert_eq!(["pause", "resume"].map(|order| b.count(&metric::ORDERS, &[order])), [1.0, 1.0]);
    assert_eq!(b.count(&metric::TURNS, &["success"]), 2.0);
    // Now means now, and what was asked once is done once.
    b.ask().answer(5, true);
    let now = Order { interrupts: 1, ..PAUSED };
    b.put(Input::Ordered(&now));
    b.put(Input::Ordered(&now));
    b.at(500.2).result("error_during_execution", "aborted_tools");
    assert!(b.log().ends_with("interrupt\n   500 interrupt"), "{}", b.log());
    assert_eq!(b.count(&metric::TURNS, &["interrupted"]), 2.0);
}

#[test]
fn a_limit_of_a_session_that_was_raised_lets_it_go_on() {
    let mut b = held(&[rule(Limit::CostUsd, Scope::Session, usd(1.0))]);
    b.ask();
    b.total = 1.2;
    b.at(1.0).answer(1, true).at(1.1).result("error_during_execution", "aborted_tools");
    assert!(b.log().ends_with("refuse\n     1 interrupt"), "{}", b.log());
    let refuses = |b: &Bench| serde_json::to_value(b.monitor.status()).unwrap()["sessions"][0]["refusing"] == true;
    assert!(refuses(&b));
    let raised = |usd: f64| Order { raised: Raised { usd: Some(Usd::from_f64(usd)), ..Raised::default() }, ..Order::default() };
    b.at(2.0).put(Input::Ordered(&raised(1.1)));
    assert!(refuses(&b), "not enough");
    b.put(Input::Ordered(&raised(4.0)));
    assert!(!refuses(&b) && b.log().ends_with("     2 hold"), "from now on, only while there is a reason: {}", b.log());
    b.log.clear();
    b.ask();
    b.total = 2.5;
    b.at(3.0).answer(2, true).tool_result(2);
    assert_eq!(b.log(), "     3 enforce usd session: warn at 2.5 of 4", "warnings are those of the new one");
    b.total = 4.5;
    b.at(4.0).answer(3, true).at(4.1);
    assert!(b.log().ends_with("enforce usd session: refuse at 4.5 of 4\n  3.25 refuse\n  3.25 interrupt"), "{}", b.log());
    b.result("error_during_execution", "aborted_tools");
    assert_eq!(b.count(&metric::ORDERS, &["raise"]), 2.0);
}

#[test]
fn who_is_told_to_stop_ends_with_its_last_cost() {
    let mut b = held(&[]);
    b.ask().answer(1, false).result("success", "completed");
    b.at(1.0).put(Input::Ordered(&Order { stop: true, ..Order::default() }));
    assert_eq!(b.log(), "     1 end_session");
    b.exit(Exit::Code(0));
    assert_eq!((b.count(&metric::PROCESS_EXITS, &["shutdown"]), b.count(&metric::ORDERS, &["stop"])), (1.0, 1.0));
}
