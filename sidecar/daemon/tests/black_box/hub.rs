//! Many wrappers served as one, and what is left of the sums when any of them is killed.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::http::try_ask;
use crate::support::*;

/// A CLI of one process, id and number of turns in its arguments: a cent for each turn, and a pause before each.
const CLI: &str = r#"
echo '{"type":"system","subtype":"init","session_id":"'$1'","model":"claude-opus-5-5"}'
i=0
while [ $i -lt $2 ]; do
  i=$((i+1)); sleep $3
  used='{"claude-opus-5-5":{"inputTokens":'$((i*10))',"outputTokens":'$((i*5))',"costUSD":'$i'e-2}}'
  echo '{"type":"result","subtype":"success","is_error":false,"session_id":"'$1'","num_turns":1,"total_cost_usd":'$i'e-2,"modelUsage":'$used'}'
done
read -r _
"#;

/// Where some wrappers meet.
struct Yard {
    dir: PathBuf,
}

impl Yard {
    fn new(name: &str) -> Yard {
        Yard { dir: scratch(name) }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("hub.sock")
    }

    fn state(&self) -> PathBuf {
        self.dir.join("hub.state")
    }

    fn ledger(&self, id: usize) -> PathBuf {
        self.dir.join(format!("ledger{id}.jsonl"))
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(SIDECAR);
        command.args([what, "--listen", "127.0.0.1:0", "--socket"]).arg(self.socket());
        command
    }

    /// A wrapper with `turns` turns, which then waits for the end of its input.
    fn start(&self, id: usize, turns: usize, pause: &str, flags: &[&str]) -> Running {
        let mut command = self.command("run");
        command.args(["--tenant", &format!("t{id}"), "--ledger"]).arg(self.ledger(id)).args(flags);
        command.args(["--", "sh", "-c", CLI, "sh", &format!("s{id}"), &turns.to_string(), pause]).args(ONE_SHOT);
        Running::start(command)
    }

    /// A hub without an agent, for whoever wants to know in the end.
    fn hub(&self) -> Running {
        Running::start(self.command("hub"))
    }

    /// Where the present hub is asked.
    fn address(&self) -> Option<SocketAddr> {
        std::fs::read_to_string(self.state().join("address")).ok()?.parse().ok()
    }

    fn metrics(&self) -> Option<String> {
        let (head, body) = try_ask(self.address()?, "GET /metrics")?;
        head.starts_with("HTTP/1.1 200").then_some(body)
    }

    fn hub_pid(&self) -> Option<Pid> {
        let stream = UnixStream::connect(self.socket()).ok()?;
        Some(rustix::net::sockopt::socket_peercred(&stream).ok()?.pid)
    }

    /// What a wrapper's journal has told last, in cents.
    fn told(&self, pid: i32) -> Option<u64> {
        let mine = format!("\"pid\":{pid},");
        let journals = std::fs::read_dir(self.state()).ok()?.flatten().filter_map(|e| std::fs::read_to_string(e.path()).ok());
        let journal = journals.into_iter().find(|text| text.lines().next().is_some_and(|hello| hello.contains(&mine)))?;
        let line = journal.lines().next_back().filter(|_| journal.ends_with('\n'))?;
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(cents(line["totals"]["cost_usd"].as_f64()?))
    }

    fn ledger_cents(&self, id: usize) -> u64 {
        let out = Command::new(SIDECAR).args(["replay", "--ledger", "--format", "json"]).arg(self.ledger(id)).output().unwrap();
        let sum: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        cents(sum["totals"]["cost_usd"].as_f64().unwrap())
    }

    /// The first, the second and so on: the app has an answer before it is on the books.
    fn has_booked(&self, cents: &[u64]) {
        wait_for("the books", || cents.iter().enumerate().all(|(id, of)| self.ledger_cents(id) == *of).then_some(()));
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few cents")]
fn cents(usd: f64) -> u64 {
    (usd * 100.0).round() as u64
}

/// What a metric says, by tenant.
fn by_tenant(metrics: &str, name: &str) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for line in metrics.lines().filter(|line| line.starts_with(name)) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let tenant = series.split("tenant=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
        *sums.entry(tenant.to_owned()).or_default() += cents(value.parse::<f64>().unwrap());
    }
    sums
}

fn series(metrics: &str) -> usize {
    metrics.lines().filter(|line| !line.starts_with('#')).count()
}

#[test]
fn fifty_at_once_are_served_as_one_and_the_sums_are_the_ledgers() {
    const MANY: usize = 50;
    let yard = Yard::new("fifty");
    let mut running: Vec<Running> = (0..MANY).map(|id| yard.start(id % 5, 3, "0.2", &[])).collect();
    let all = (MANY * 3) as u64;
    let body = wait_for("all turns to be counted", || {
        let body = yard.metrics()?;
        (by_tenant(&body, "claude_agent_cost_usd_total{").values().sum::<u64>() == all).then_some(body)
    });
    assert!(body.contains("agent_sidecar_hub_wrappers{state=\"live\"} 50\n"), "{body}");
    let slots = body.lines().filter(|line| line.starts_with("claude_agent_process_state{") && line.contains("\"idle\""));
    assert!(slots.filter(|line| line.contains("slot=\"other\"")).count() > 0, "eight have a place of their own: {body}");
    assert_eq!(body.lines().filter(|line| line.contains("slot=\"8\"")).count(), 0, "{body}");
    assert!(series(&body) < 5 * 1_500, "{}", series(&body));
    let status: serde_json::Value = serde_json::from_str(&try_ask(yard.address().unwrap(), "GET /status").unwrap().1).unwrap();
    assert_eq!(status["sessions"].as_array().unwrap().len(), MANY, "{status}");
    assert_eq!(cents(status["totals"]["cost_usd"].as_f64().unwrap()), all);
    for wrapper in &mut running {
        wrapper.close_stdin();
    }
    for wrapper in &mut running {
        assert_eq!(wrapper.code(), Some(1), "`read` had nothing to read");
    }
    // They are all gone, and with them whoever served. What they have counted is not.
    let _hub = yard.hub();
    let ended = wait_for("the next hub to have all", || {
        let body = yard.metrics()?;
        body.contains("agent_sidecar_hub_retired_total 50\n").then_some(body)
    });
    let sums = by_tenant(&ended, "claude_agent_cost_usd_total{");
    for id in 0..5 {
        assert_eq!(sums[&format!("t{id}")], yard.ledger_cents(id), "t{id}: {ended}");
    }
    assert!(ended.contains("claude_agent_sessions_active{tenant=\"t0\"} 0\n"), "{ended}");
    assert!(!ended.contains("slot="), "nobody has a place any more: {ended}");
    let journals = std::fs::read_dir(yard.state()).unwrap().flatten().filter(|e| e.path().extension() == Some("jsonl".as_ref()));
    assert_eq!(journals.count(), 0, "journals do not pile up");
}

#[test]
fn whoever_is_killed_and_whenever_nothing_told_is_lost_or_doubled() {
    const MANY: usize = 24;
    let yard = Yard::new("chaos");
    // What a wrapper had told when it was killed.
    let mut killed: BTreeMap<usize, u64> = BTreeMap::new();
    let mut running: Vec<Running> = (0..MANY).map(|id| yard.start(id, 12, "0.1", &[])).collect();
    let pick = noise(8 * 64, u64::try_from(running[0].pid()).unwrap());
    for (round, random) in pick.chunks(8).take(10).enumerate() {
        // Every other time it is whoever serves.
        let hub = wait_for("somebody to serve", || yard.hub_pid());
        let serving = running.iter().position(|one| one.pid() == hub.as_raw_nonzero().get());
        let victim = serving.filter(|_| round % 2 == 0).unwrap_or(usize::from(random[0]) % MANY);
        if killed.contains_key(&victim) {
            continue;
        }
        let told = wait_for("its first line", || yard.told(running[victim].pid()));
        running[victim].signal(Signal::KILL);
        killed.insert(victim, told);
        wait_for("the numbers to be served again", || yard.metrics());
    }
    assert!(killed.len() > 5, "{killed:?}");
    for (id, wrapper) in running.iter_mut().enumerate() {
        wrapper.close_stdin();
        wrapper.code();
        // A hub in between, killed in the middle of whatever it does.
        if id % 8 == 0 {
            let hub = yard.hub();
            std::thread::sleep(Duration::from_millis(u64::from(pick[100 + id]) / 2));
            hub.signal(Signal::KILL);
        }
    }
    let _hub = yard.hub();
    let gone = format!("agent_sidecar_hub_retired_total {MANY}\n");
    let ended = wait_for("the last hub to have all", || yard.metrics().filter(|body| body.contains(&gone)));
    let sums = by_tenant(&ended, "claude_agent_cost_usd_total{");
    for id in 0..MANY {
        let (counted, ledger) = (sums.get(&format!("t{id}")).copied().unwrap_or_default(), yard.ledger_cents(id));
        match killed.get(&id) {
            // The ledger is written first, by a moment.
            Some(told) => assert!((*told..=ledger).contains(&counted), "t{id}: {told} <= {counted} <= {ledger}"),
            None => assert_eq!((counted, ledger), (12, 12), "t{id}"),
        }
    }
}

#[test]
fn a_hub_that_is_frozen_delays_nobody_and_loses_nothing() {
    let yard = Yard::new("frozen");
    let hub = yard.hub();
    wait_for("the hub", || yard.metrics());
    hub.signal(Signal::STOP);
    let start = Instant::now();
    let mut wrapper = yard.start(0, 2, "0", &["--hub-slots", "2"]);
    wrapper.line();
    wrapper.close_stdin();
    wrapper.code();
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    hub.signal(Signal::CONT);
    wait_for("its numbers", || {
        let body = yard.metrics()?;
        (by_tenant(&body, "claude_agent_cost_usd_total{").get("t0") == Some(&2)).then_some(())
    });
}

#[test]
fn the_next_wrapper_serves_at_the_same_address() {
    let yard = Yard::new("takeover");
    let mut running: Vec<Running> = (0..3).map(|id| yard.start(id, 1, "0", &[])).collect();
    let all = |body: &str| by_tenant(body, "claude_agent_turns_total{outcome=\"success\"").values().sum::<u64>() == 300;
    wait_for("three turns", || yard.metrics().filter(|body| all(body)));
    let before = yard.address().unwrap();
    for left in (0..3_usize).rev() {
        let hub = wait_for("somebody to serve", || yard.hub_pid());
        let serving = running.iter().position(|one| one.pid() == hub.as_raw_nonzero().get()).unwrap();
        running.swap_remove(serving).signal(Signal::KILL);
        if left > 0 {
            wait_for("another to serve the same", || yard.metrics().filter(|body| all(body)));
            assert_eq!(yard.address(), Some(before));
        }
    }
}

#[test]
fn the_last_numbers_of_each_wait_to_be_read_at_the_hub() {
    let yard = Yard::new("linger");
    let _hub = yard.hub();
    wait_for("the hub", || yard.metrics());
    let mut wrapper = yard.start(0, 1, "0", &["--linger", "25s", "--platform-grace", "60s"]);
    let pid = wrapper.pid();
    wrapper.line();
    wrapper.close_stdin();
    assert!(wrapper.rest().ends_with(b"\n"), "the app has its end before the numbers are read");
    assert!(alive(pid), "nobody has read them");
    let last = wait_for("the exit to be read", || {
        let body = yard.metrics()?;
        body.contains("claude_agent_process_exits_total{reason=\"error\",tenant=\"t0\"} 1\n").then_some(body)
    });
    assert!(last.contains("claude_agent_sessions_active{tenant=\"t0\"} 0\n"), "{last}");
    wait_for("the wrapper to go", || {
        yard.metrics();
        (!alive(pid)).then_some(())
    });
    assert_eq!(wrapper.code(), Some(1));
}

#[test]
fn the_socket_is_the_owners_and_says_the_same() {
    use std::os::unix::fs::MetadataExt;
    let yard = Yard::new("socket");
    let _hub = yard.hub();
    wait_for("the hub", || yard.metrics());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&yard.socket()), mode(&yard.state())), (0o600, 0o700));
    let mut stream = UnixStream::connect(yard.socket()).unwrap();
    stream.write_all(b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
}

#[test]
fn the_exposition_of_many_pleases_the_linter() {
    let yard = Yard::new("lint");
    let _hub = yard.hub();
    let _running: Vec<Running> = (0..3).map(|id| yard.start(id, 1, "0", &[])).collect();
    let body = wait_for("three wrappers", || {
        yard.metrics().filter(|body| by_tenant(body, "claude_agent_process_starts_total{").len() == 3)
    });
    let mut lint = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool comes with the package `prometheus`");
    lint.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let out = lint.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// A CLI that speaks with its app: a message costs a nickel, three seconds after it, unless a hook turns it away or it is interrupted.
const TALKER: &str = r#"
import json, select, subprocess, sys, os
buffer, block, total, turns, session = b"", None, 0.0, 0, sys.argv[1]

def say(**line):
    print(json.dumps(line), flush=True)

def result(subtype, text):
    used = {"claude-opus-5-5": {"inputTokens": 10, "outputTokens": 5, "costUSD": round(total, 2)}}
    say(type="result", subtype=subtype, is_error=False, session_id=session, num_turns=1, result=text, total_cost_usd=round(total, 2), modelUsage=used)

def line(timeout=None):
    global buffer
    while b"\n" not in buffer:
        if not select.select([0], [], [], timeout)[0]:
            return None
        more = os.read(0, 65536)
        if not more:
            sys.exit(0)
        buffer += more
    first, buffer = buffer.split(b"\n", 1)
    return json.loads(first)

def control(message):
    global block
    request = message["request"]
    if request["subtype"] == "end_session":
        sys.exit(0)
    if request["subtype"] == "apply_flag_settings":
        block = request["settings"]["hooks"]["UserPromptSubmit"][0]["hooks"][0]["command"]
    body = {"subtype": "success", "request_id": message["request_id"], "response": {}}
    say(type="control_response", response=body)
    return request["subtype"]

while True:
    message = line()
    if message["type"] == "control_request":
        control(message)
    elif message["type"] == "user":
        said = subprocess.run(["sh", "-c", block], capture_output=True).stdout if block else b""
        if b"block" in said:
            result("success", json.loads(said)["reason"])
            continue
        say(type="system", subtype="init", session_id=session, model="claude-opus-5-5")
        say(type="system", subtype="status", status="requesting", session_id=session)
        turns += 1
        answer = {"id": f"msg_{session}_{turns}", "model": "claude-opus-5-5", "role": "assistant", "content": [{"type": "text", "text": "so"}]}
        say(type="assistant", session_id=session, message={**answer, "usage": {"input_tokens": 1, "output_tokens": 1}})
        stopped = False
        while not stopped and (message := line(3)):
            stopped = message["type"] == "control_request" and control(message) == "interrupt"
        if stopped:
            result("error_during_execution", "stopped")
        else:
            total += 0.05
            result("success", "answer")
"#;

const INITIALIZE: &[u8] = b"{\"type\":\"control_request\",\"request_id\":\"1\",\"request\":{\"subtype\":\"initialize\"}}\n";
const PROMPT: &[u8] = b"{\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":\"go on\"}}\n";

impl Yard {
    fn talker(&self, id: usize, flags: &[&str]) -> Running {
        self.talker_of("acme", id, flags)
    }

    fn talker_of(&self, tenant: &str, id: usize, flags: &[&str]) -> Running {
        let mut command = self.command("run");
        // It exports no telemetry that could be waited for.
        command
            .args(["--tenant", tenant, "--usage-poll=false", "--native-telemetry=off", "--ledger"])
            .arg(self.ledger(id))
            .args(flags);
        command.args(["--", "python3", "-u", "-c", TALKER, &format!("s{id}")]).args(STREAM_JSON);
        let mut running = Running::start(command);
        // As the SDKs begin: from here on, the CLI can be spoken to.
        running.write(INITIALIZE).unwrap();
        assert!(running.line().contains("control_response"));
        running
    }
}

/// What the app hears for a message.
fn prompt(running: &mut Running) -> String {
    running.write(PROMPT).unwrap();
    loop {
        let line: serde_json::Value = serde_json::from_str(&running.line()).unwrap();
        if line["type"] == "result" {
            return line["result"].as_str().unwrap().to_owned();
        }
    }
}

#[test]
fn agents_that_share_a_budget_are_above_it_by_one_answer_at_most() {
    let yard = Yard::new("budget");
    let all: Vec<_> = std::thread::scope(|scope| {
        let agents: Vec<_> = (0..4)
            .map(|id| {
                let yard = &yard;
                scope.spawn(move || {
                    let mut agent = yard.talker(id, &["--container-max-cost-usd", "0.50"]);
                    let mut answers = 0;
                    // More often than there is money for.
                    for _ in 0..12 {
                        match prompt(&mut agent).as_str() {
                            "answer" => answers += 1,
                            other => {
                                // Stopped in the middle of it, or turned away.
                                if other.contains("shares with others") {
                                    break;
                                }
                            }
                        }
                    }
                    agent.close_stdin();
                    agent.code();
                    answers
                })
            })
            .collect();
        agents.into_iter().map(|agent| agent.join().unwrap()).collect()
    });
    let answers: u64 = all.iter().sum();
    assert!((9..=11).contains(&answers), "{all:?}: ten nickels are in half a dollar");
    assert_eq!((0..4).map(|id| yard.ledger_cents(id)).sum::<u64>(), answers * 5);

    // Whoever comes later finds it used up; whoever only wants to know is told and goes on; a larger one has room.
    let mut later = yard.talker(5, &["--container-max-cost-usd", "0.45"]);
    // It is stopped in the middle of it before the CLI knows that it is to turn it away.
    wait_for("the CLI itself to turn it away", || {
        let heard = prompt(&mut later);
        assert!(heard == "stopped" || heard.contains("shares with others"), "{heard}");
        (heard != "stopped").then_some(())
    });
    let mut shadow = yard.talker(6, &["--container-day-max-cost-usd", "0.45", "--mode", "shadow"]);
    assert_eq!(prompt(&mut shadow), "answer");
    wait_for("its decision to be on the books", || {
        let told = std::fs::read_to_string(yard.ledger(6)).unwrap();
        (told.contains("container_day") && told.contains("shadow")).then_some(())
    });
    let mut rich = yard.talker(7, &["--tenant-month-max-cost-usd", "5"]);
    assert_eq!(prompt(&mut rich), "answer");
    let body = wait_for("the limit to be shown", || {
        let body = yard.metrics()?;
        body.contains("claude_agent_limit_used_ratio{limit=\"usd\",scope=\"tenant_month\",tenant=\"acme\"}").then_some(body)
    });
    assert!(body.contains("scope=\"container\""), "{body}");
}

/// The code and the body that are answered at the socket.
fn asked(yard: &Yard, request: &str) -> (String, String) {
    let mut stream = UnixStream::connect(yard.socket()).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().to_owned(), body.to_owned())
}

fn post(yard: &Yard, path: &str) -> String {
    asked(yard, &format!("POST {path}")).0
}

fn budgets(yard: &Yard) -> Vec<serde_json::Value> {
    let (code, body) = asked(yard, "GET /v1/budgets");
    assert_eq!(code, "200", "{body}");
    serde_json::from_str::<serde_json::Value>(&body).unwrap()["budgets"].as_array().unwrap().clone()
}

#[test]
fn tokens_are_a_budget_too_and_everybody_can_see_how_it_stands() {
    let yard = Yard::new("tokens");
    // Fifteen tokens an answer.
    let flags = ["--container-day-max-tokens", "30", "--time-zone", "America/Santiago"];
    let mut agents = [yard.talker(0, &flags), yard.talker(1, &flags)];
    assert_eq!(agents.each_mut().map(prompt), ["answer", "answer"]);
    wait_for("the CLI to turn both away", || {
        agents.each_mut().iter_mut().all(|agent| prompt(agent).contains("shares with others")).then_some(())
    });
    let day = wait_for("both to be seen waiting", || {
        budgets(&yard).into_iter().find(|one| one["waits"].as_array().is_some_and(|waits| waits.len() == 2))
    });
    assert_eq!(
        (&day["scope"], &day["unit"], &day["limit"], &day["used"]),
        (&"container_day".into(), &"tokens".into(), &30.into(), &30.into())
    );
    assert!(day["waits"].as_array().unwrap().contains(&"s0".into()), "by their sessions: {day}");
    assert!(day["period"].as_str().unwrap().len() == 10 && day["ends_unix"].as_u64() > Some(1_790_000_000), "{day}");
    let lines = [
        "claude_agent_budget_spent_tokens{scope=\"container_day\",tenant=\"acme\"} 30\n",
        "claude_agent_budget_limit_tokens{scope=\"container_day\",tenant=\"acme\"} 30\n",
        "claude_agent_budget_remaining_ratio{limit=\"tokens\",scope=\"container_day\",tenant=\"acme\"} 0\n",
        "claude_agent_budget_reserved_tokens{scope=\"container_day\",tenant=\"acme\"} 0\n",
    ];
    // Each of the two says what it found last.
    let body = wait_for("the gauges", || yard.metrics().filter(|body| lines.iter().all(|line| body.contains(line))));
    assert!(body.contains("claude_agent_budget_window_end_timestamp_seconds{scope=\"container_day\""), "{body}");
    assert_eq!(post(&yard, "/v1/budgets/container_day?tokens=90"), "403");
}

#[test]
fn who_has_had_its_share_waits_while_others_work_and_goes_on_when_they_end() {
    let yard = Yard::new("share");
    let flags = ["--container-day-max-cost-usd", "0.20", "--budget-share", "fair", "--share-kept", "10m"];
    let [mut greedy, mut other] = [yard.talker(0, &flags), yard.talker(1, &flags)];
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(prompt(&mut other), "answer"));
        assert_eq!([prompt(&mut greedy), prompt(&mut greedy)], ["answer", "answer"]);
    });
    // A dime is left, and a nickel of it is the other's.
    let why =
        wait_for("the CLI to turn it away", || Some(prompt(&mut greedy)).filter(|heard| heard != "answer" && heard != "stopped"));
    assert_eq!(
        why,
        "agent-sidecar: the fair share of the container's day budget that this session shares with others is used up; \
         0.10 of 0.10 USD; it goes on when others need less"
    );
    let session = |yard: &Yard, id: &str| yard.status().into_iter().find(|session| session["session_id"] == id).unwrap();
    let held = session(&yard, "s0");
    let limit = held["limits"].as_array().unwrap().iter().find(|limit| limit["scope"] == "container_day").unwrap();
    assert_eq!(limit["share"], serde_json::json!({"used": 0.1, "of": 0.1, "tenant": false}), "{held}");
    assert_eq!(held["refusing"], true);
    let day = budgets(&yard).remove(0);
    let share = |session: &str, used: f64| serde_json::json!({"session": session, "used": used, "of": 0.1, "tenant": false});
    let shares = day["shares"].as_array().unwrap();
    assert!(shares.contains(&share("s0", 0.1)) && shares.contains(&share("s1", 0.05)), "{day}");
    let (_, table) = yard.control(&["budgets"]);
    assert!(table.contains("  share of s0: 0.1 of 0.1\n"), "{table}");
    let line = "claude_agent_budget_waiting{scope=\"container_day\",cause=\"share\",tenant=\"acme\"} 1\n";
    wait_for("the gauge", || yard.metrics().filter(|body| body.contains(line)));
    wait_for("its decision to be on the books", || {
        let told = std::fs::read_to_string(yard.ledger(0)).unwrap();
        told.lines().any(|line| line.contains("limit_decided") && line.contains("\"share\":true")).then_some(())
    });
    // It is not the other that waits.
    assert_eq!(day["waits"], serde_json::json!(["s0"]));
    other.close_stdin();
    other.code();
    wait_for("the same session to go on", || (prompt(&mut greedy) == "answer").then_some(()));
    let why = wait_for("the end of it all", || Some(prompt(&mut greedy)).filter(|heard| heard != "answer" && heard != "stopped"));
    assert!(why.ends_with("a budget that this session shares with others is used up"), "{why}");
    yard.has_booked(&[15, 5]);
}

#[test]
fn of_one_tenants_agents_none_waits_while_there_is_money_unless_that_is_wanted() {
    let yard = Yard::new("alone");
    let flags = ["--container-day-max-cost-usd", "0.30", "--share-kept", "10m"];
    let [mut large, mut small] = [yard.talker(0, &flags), yard.talker(1, &flags)];
    assert_eq!([prompt(&mut large), prompt(&mut small)], ["answer", "answer"]);
    // Five nickels of six are its, though the other has worked a moment ago.
    for n in 0..4 {
        assert_eq!(prompt(&mut large), "answer", "{n}");
    }
    let why = wait_for("the end of it all", || Some(prompt(&mut large)).filter(|heard| heard != "answer" && heard != "stopped"));
    assert!(why.ends_with("a budget that this session shares with others is used up"), "{why}");
    yard.has_booked(&[25, 5]);
}

#[test]
fn tenants_have_of_a_containers_budget_what_they_weigh() {
    let yard = Yard::new("weights");
    let start = |tenant: &str, id: usize, weight: &str| {
        yard.talker_of(tenant, id, &["--container-max-cost-usd", "0.20", "--tenant-weight", weight, "--share-kept", "10m"])
    };
    let [mut heavy, mut light] = [start("heavy", 0, "3"), start("light", 1, "1")];
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(prompt(&mut light), "answer"));
        assert_eq!([prompt(&mut heavy), prompt(&mut heavy)], ["answer", "answer"]);
    });
    let why = wait_for("its part to be used up", || Some(prompt(&mut light)).filter(|heard| heard.contains("fair share")));
    assert!(why.contains("0.05 of 0.05 USD, with the tenant's other agents"), "{why}");
    // What the light one asked for in vain is reserved for a moment.
    wait_for("three of four", || (prompt(&mut heavy) == "answer").then_some(()));
    yard.has_booked(&[15, 5]);
    // As they come, the light one would have been let.
    let mut quick = yard.talker_of("quick", 2, &["--container-max-cost-usd", "0.30", "--budget-share", "first-come"]);
    assert_eq!([prompt(&mut quick), prompt(&mut quick)], ["answer", "answer"]);
}

#[test]
fn an_agent_that_waits_for_a_budget_goes_on_when_it_is_raised() {
    let yard = Yard::new("raise");
    let mut agent = yard.talker(0, &["--container-max-cost-usd", "0.05", "--hub-control"]);
    assert_eq!(prompt(&mut agent), "answer");
    wait_for("the CLI to turn it away", || prompt(&mut agent).contains("shares with others").then_some(()));
    for (path, code) in [
        ("/v1/budgets/turn?usd=1", "404"),
        ("/v1/budgets/container?usd=-1", "400"),
        ("/v1/budgets/tenant?usd=1", "400"),
        ("/v1/budgets/tenant?tokens=9&tenant=a%20b", "200"),
        ("/metrics", "405"),
        ("/v1/budgets/container?usd=1", "200"),
    ] {
        assert_eq!(post(&yard, path), code, "{path}");
    }
    wait_for("the same session to go on", || (prompt(&mut agent) == "answer").then_some(()));
    assert!(try_ask(yard.address().unwrap(), "POST /v1/budgets/container?usd=9").unwrap().0.contains("405"), "not over TCP");
    drop(agent);
    let _hub = yard.hub();
    wait_for("the hub", || yard.hub_pid());
    wait_for("a hub that was not asked to", || (post(&yard, "/v1/budgets/container?usd=2") == "403").then_some(()));
}

#[test]
fn what_the_dead_had_reserved_is_free_again() {
    let yard = Yard::new("reserved");
    let flags = ["--tenant-max-cost-usd", "0.10"];
    let mut first = yard.talker(0, &flags);
    assert_eq!(prompt(&mut first), "answer");
    // With one answer in hand and one reserved, there is none for another.
    first.write(PROMPT).unwrap();
    let reserved = || {
        let book: serde_json::Value = serde_json::from_slice(&std::fs::read(yard.state().join("budgets.json")).ok()?).ok()?;
        Some(book["runs"].as_object()?.values().any(|run| run["reserved"][0].as_u64() > Some(0)))
    };
    wait_for("the reservation", || reserved().filter(|reserved| *reserved));
    let mut second = yard.talker(1, &flags);
    first.signal(Signal::KILL);
    wait_for("the dead to be missed", || reserved().filter(|reserved| !reserved));
    wait_for("a turn that is let through", || (prompt(&mut second) == "answer").then_some(()));
    let heard = wait_for("the end of the budget", || Some(prompt(&mut second)).filter(|heard| heard != "answer"));
    assert!(heard == "stopped" || heard.contains("shares with others"), "{heard}");
}

#[test]
fn no_more_run_at_once_than_may_and_the_next_waits_its_time() {
    let yard = Yard::new("seats");
    let flags = ["--max-sessions", "2", "--queue-timeout", "60s", "--platform-grace", "90s"];
    let mut running: Vec<Running> = (0..2).map(|id| yard.start(id, 1, "0", &flags)).collect();
    for wrapper in &mut running {
        wrapper.line();
    }
    // One too many for those who cannot wait; for whoever only wants to know, there is room.
    let claude = ["--", "sh", "-c", CLI, "sh", "x", "0", "0"];
    let run = |flags: &[&str], args: &[&str]| {
        let mut command = yard.command("run");
        command.args(["--max-sessions", "2"]).args(flags).args(claude).args(args).stdin(Stdio::null());
        let out = command.output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let (code, said) = run(&["--queue-timeout", "0"], &ONE_SHOT);
    assert!(code == Some(125) && said.contains("as many agents as may run at once (2)"), "{code:?} {said}");
    let (code, said) = run(&["--mode", "shadow"], &ONE_SHOT);
    assert!(code == Some(1) && said.contains("would have had to wait"), "{code:?} {said}");
    // The third waits, until one of the two is killed.
    let mut third = yard.start(2, 1, "0", &flags);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!yard.ledger(2).exists() || std::fs::metadata(yard.ledger(2)).unwrap().len() == 0, "it has not begun");
    running[0].signal(Signal::KILL);
    assert!(third.line().contains("init"), "it has begun");
}

#[test]
fn a_file_of_a_refusal_that_cannot_be_removed_for_a_moment_keeps_no_agent_waiting_for_ever() {
    let yard = Yard::new("refusal");
    let mut agent = yard.talker(0, &["--container-max-cost-usd", "0.05", "--hub-control"]);
    assert_eq!(prompt(&mut agent), "answer");
    let file = || {
        let names = std::fs::read_dir(yard.state()).unwrap().flatten().map(|entry| entry.path());
        names.into_iter().find(|path| path.extension() == Some("hold".as_ref()))
    };
    let hold = wait_for("the file", file);
    // Somebody who does not want to wait.
    std::fs::remove_file(&hold).unwrap();
    assert_eq!(wait_for("the file, again", file), hold);
    // A directory is no file: neither written to nor removed.
    let dir = yard.dir.join("dir");
    std::fs::create_dir(&dir).unwrap();
    let exchange = || rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &hold, rustix::fs::RenameFlags::EXCHANGE);
    exchange().unwrap();
    assert_eq!(post(&yard, "/v1/budgets/container?usd=1"), "200");
    wait_for("the agent to hear of it", || (yard.status()[0]["refusing"] == false).then_some(()));
    exchange().unwrap();
    wait_for("the file to be gone", || (!hold.exists()).then_some(()));
    assert_eq!(prompt(&mut agent), "answer");
}

#[test]
fn who_waits_for_a_seat_serves_nobody_and_ends_when_told() {
    let yard = Yard::new("queued");
    let flags = ["--max-sessions", "1", "--queue-timeout", "5m", "--platform-grace", "6m"];
    let mut first = yard.start(0, 1, "0", &flags);
    first.line();
    let mut second = yard.start(1, 1, "0", &flags);
    // From here on, it hears them.
    let caught = format!("/proc/{}/status", second.pid());
    wait_for("the second to wait", || {
        let status = std::fs::read_to_string(&caught).ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        (u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << 14 != 0).then_some(())
    });
    second.signal(Signal::TERM);
    assert_eq!(second.code(), Some(128 + 15));
    first.close_stdin();
    assert_eq!(first.code(), Some(1));
}

/// Whether somebody sits, or waits.
fn places(yard: &Yard) -> Option<(usize, usize)> {
    let queue: serde_json::Value = serde_json::from_slice(&std::fs::read(yard.state().join("seats.json")).ok()?).ok()?;
    let places = queue["places"].as_object()?;
    let sits = places.values().filter(|place| place["number"].is_null()).count();
    Some((sits, places.len() - sits))
}

#[test]
fn who_waits_for_a_seat_goes_on_ignoring_what_it_was_started_to_ignore() {
    let yard = Yard::new("nohup-seat");
    let flags = ["--max-sessions", "1", "--queue-timeout", "5m", "--platform-grace", "6m"];
    let mut first = yard.start(0, 1, "0", &flags);
    first.line();
    // The CLI itself says what it ignores, without us and with us; but for 32 and 33, which the C library keeps to itself.
    let says = "import sys
for l in open('/proc/self/status'):
    if l[:6] == 'SigIgn': print(hex(int(l[7:], 16) & ~(3 << 31)), flush=True)
sys.stdin.read()";
    let start = |wrapper: &Command| {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]);
        if wrapper.get_program() != "none" {
            command.arg(wrapper.get_program()).args(wrapper.get_args());
        }
        command.args(["python3", "-c", says]).args(STREAM_JSON);
        Running::start(command)
    };
    let without = start(&Command::new("none")).line();
    let mut wrapper = yard.command("run");
    wrapper.args(flags).arg("--");
    let mut second = start(&wrapper);
    wait_for("the second to wait", || places(&yard).filter(|places| *places == (1, 1)));
    second.signal(Signal::HUP);
    // Long enough for it to have looked.
    std::thread::sleep(Duration::from_millis(300));
    assert!(alive(second.pid()));
    first.close_stdin();
    first.code();
    assert_eq!(second.line(), without);
    second.close_stdin();
    assert_eq!(second.code(), Some(0));
}

#[test]
fn a_signal_between_the_seat_and_the_start_is_forwarded() {
    use std::os::unix::fs::DirBuilderExt;
    let yard = Yard::new("early");
    // Whoever wants to know who serves waits here, with its seat and without a CLI.
    std::fs::DirBuilder::new().mode(0o700).create(yard.state()).unwrap();
    assert!(Command::new("mkfifo").arg(yard.state().join("lock")).status().unwrap().success());
    let mut command = yard.command("run");
    command.args(["--max-sessions", "1", "--queue-timeout", "5m", "--platform-grace", "6m", "--"]);
    command.args(["sh", "-c", "cat", "sh"]).args(STREAM_JSON);
    let mut agent = Running::start(command);
    wait_for("its seat", || places(&yard).filter(|places| *places == (1, 0)));
    agent.signal(Signal::TERM);
    // Its input is open: without the signal it would go on.
    assert_eq!(agent.code(), Some(128 + 15));
}

#[test]
fn a_seat_counts_for_the_tenant_that_the_first_message_tells() {
    let yard = Yard::new("learnt-seat");
    let flags = ["--max-sessions", "1", "--queue-timeout", "5m", "--platform-grace", "6m"];
    let mut command = yard.command("run");
    let cli = format!("read -r _; {}", CLI.replace("\nread -r _\n", "\ncat >/dev/null\n"));
    command.args(flags).args(["--tenant-from", "message:metadata.tenant", "--", "sh", "-c", &cli, "sh", "s", "1", "0"]);
    command.args(STREAM_JSON);
    let mut first = Running::start(command);
    first
        .write(b"{\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":\"hi\"},\"metadata\":{\"tenant\":\"t1\"}}\n")
        .unwrap();
    assert!(first.line().contains("init"));
    let known = || {
        let queue: serde_json::Value = serde_json::from_slice(&std::fs::read(yard.state().join("seats.json")).ok()?).ok()?;
        queue["given"]["t1"].as_u64().filter(|given| *given > 0)
    };
    wait_for("its seat to be its tenant's", known);
    // One of the same tenant comes, and then one of another.
    let mut own = yard.start(1, 0, "0", &flags);
    wait_for("one to wait", || places(&yard).filter(|places| *places == (1, 1)));
    let mut other = yard.start(2, 0, "0", &flags);
    wait_for("two to wait", || places(&yard).filter(|places| *places == (1, 2)));
    first.close_stdin();
    first.code();
    assert!(other.line().contains("init"), "its tenant has had none");
    assert_eq!(places(&yard), Some((1, 1)));
    other.close_stdin();
    assert!(own.line().contains("init"));
    own.close_stdin();
}

#[test]
fn a_port_that_was_somebody_elses_and_is_free_again_is_no_longer_a_fault() {
    let yard = Yard::new("deaf");
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", &address.to_string(), "--socket"]).arg(yard.socket());
    command.args(["--", "sh", "-c", CLI, "sh", "s", "1", "0"]).args(ONE_SHOT);
    let mut running = Running::start(command);
    running.line();
    let asked = || {
        let mut stream = UnixStream::connect(yard.socket()).ok()?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    let says = |on: u8| asked()?.contains(&format!("agent_sidecar_degraded{{component=\"http\"}} {on}\n")).then_some(());
    wait_for("the fault to be said", || says(1));
    drop(other);
    wait_for("its end", || says(0));
    running.close_stdin();
    running.code();
}

#[test]
fn a_timeline_outlives_who_serves_and_goes_soon_after_its_agent() {
    let yard = Yard::new("timeline");
    let hub = yard.hub();
    let mut one = yard.start(0, 3, "0", &[]);
    (0..4).for_each(|_| drop(one.line()));
    let ended = |key: &str| {
        let (_, body) = try_ask(yard.address()?, &format!("GET /sessions/{key}/timeline"))?;
        Some(body.matches("\"kind\":\"turn_ended\"").count())
    };
    wait_for("three turns", || (ended("s0") == Some(3)).then_some(()));
    hub.signal(Signal::KILL);
    wait_for("three turns at the next", || {
        (yard.hub_pid()?.as_raw_nonzero().get() == one.pid() && ended("s0") == Some(3)).then_some(())
    });
    let stories = || {
        std::fs::read_dir(yard.state()).unwrap().flatten().filter(|e| e.path().extension() == Some("timeline".as_ref())).count()
    };
    assert_eq!((ended(&one.pid().to_string()), stories()), (Some(3), 1));
    one.signal(Signal::KILL);
    let _hub = yard.hub();
    wait_for("it to be cleared away", || yard.metrics().and_then(|_| (stories() == 0).then_some(())));
    // Of the last few that ended, it is still told.
    assert_eq!((ended("s0"), ended(&one.pid().to_string())), (Some(3), Some(3)));
    for id in 1..10 {
        let mut other = yard.start(id, 1, "0", &[]);
        (0..2).for_each(|_| drop(other.line()));
        other.close_stdin();
        other.code();
    }
    wait_for("those to be taken in", || yard.metrics().filter(|body| body.contains("agent_sidecar_hub_retired_total 10\n")));
    assert_eq!(ended("s9"), Some(1));
    assert!(try_ask(yard.address().unwrap(), "GET /sessions/s0/timeline").unwrap().0.contains("404"));
    assert_eq!(stories(), 0);
}

impl Yard {
    /// What `control` says, and whether it was done.
    fn control(&self, args: &[&str]) -> (bool, String) {
        let out = Command::new(SIDECAR).arg("control").args(args).arg("--socket").arg(self.socket()).output().unwrap();
        let said = if out.status.success() { out.stdout } else { out.stderr };
        (out.status.success(), String::from_utf8(said).unwrap())
    }

    fn status(&self) -> Vec<serde_json::Value> {
        let (_, body) = asked(self, "GET /status");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()["sessions"].as_array().unwrap().clone()
    }
}

#[test]
fn who_is_paused_waits_also_for_the_next_hub_and_goes_on_when_it_is_resumed() {
    let yard = Yard::new("paused");
    let flags = ["--hub-control", "--max-cost-usd", "0.05"];
    let mut agents = [yard.talker(0, &flags), yard.talker(1, &["--hub-control"])];
    assert_eq!(agents.each_mut().map(prompt), ["answer", "answer"]);
    wait_for("the CLI to turn it away", || prompt(&mut agents[0]).contains("a limit of this session").then_some(()));
    // Its own limit is raised, and not to what it is already.
    let (done, said) = yard.control(&["limits", "s0", "--max-cost-usd", "0.01"]);
    assert!(!done && said.contains("0.05 already"), "{said}");
    let (done, said) = yard.control(&["limits", "s0", "--max-tokens", "9"]);
    assert!(!done && said.contains("no limit of its tokens"), "{said}");
    let (done, said) = yard.control(&["limits", "s0", "--max-cost-usd", "9"]);
    assert!(done, "{said}");
    wait_for("the session to go on", || (prompt(&mut agents[0]) == "answer").then_some(()));
    let (done, said) = yard.control(&["pause", "s1", "--now"]);
    assert!(done && said.contains("\"agents\":1"), "{said}");
    wait_for("the pause to be heard", || prompt(&mut agents[1]).contains("is paused").then_some(()));
    assert_eq!(prompt(&mut agents[0]), "answer", "the other one works");
    let paused = || yard.status().iter().map(|session| session["paused"] == true).collect::<Vec<bool>>();
    wait_for("it to be shown", || (paused() == [false, true]).then_some(()));
    let (done, said) = yard.control(&["pause", "nobody"]);
    assert!(!done && said.contains("no session `nobody` runs here"), "{said}");
    // Whoever served is killed; the next one knows, and so do those that come later.
    assert!(yard.control(&["pause"]).0);
    let hub = yard.hub_pid().unwrap().as_raw_nonzero().get();
    let serving = agents.iter().position(|agent| agent.pid() == hub).unwrap();
    let [first, second] = agents;
    let (hub, mut left) = if serving == 0 { (first, second) } else { (second, first) };
    hub.signal(Signal::KILL);
    drop(hub);
    wait_for("it to be turned away", || prompt(&mut left).contains("is paused").then_some(()));
    let mut later = yard.talker(2, &["--hub-control"]);
    wait_for("a later one to be turned away, too", || prompt(&mut later).contains("is paused").then_some(()));
    wait_for("somebody to serve", || yard.hub_pid());
    wait_for("the next hub to let them go on", || yard.control(&["resume"]).0.then_some(()));
    wait_for("the same session to go on", || (prompt(&mut left) == "answer").then_some(()));
    let ledger = std::fs::read_to_string(yard.ledger(1 - serving)).unwrap();
    let orders: Vec<&str> = ledger.lines().filter(|line| line.contains("\"event\":\"ordered\"")).collect();
    assert!(orders.iter().any(|line| line.contains("\"order\":\"resume\"")), "{orders:?}");
    let explained = Command::new(SIDECAR).args(["explain", "--ledger"]).arg(yard.ledger(1 - serving)).output().unwrap();
    let explained = String::from_utf8(explained.stdout).unwrap();
    assert!(explained.contains("what people asked\n") && explained.contains(": resume\n"), "{explained}");
    let body = wait_for("the orders to be counted", || {
        yard.metrics().filter(|body| body.contains("claude_agent_orders_total{order=\"resume\",tenant=\"acme\"} 2\n"))
    });
    assert!(body.contains("claude_agent_paused{"), "{body}");
    // What was asked of the dead is asked of nobody.
    let asked = || std::fs::read_to_string(yard.state().join("orders.json")).unwrap();
    wait_for("it to be forgotten", || {
        (!asked().contains("\"usd\"")).then_some(()).filter(|()| serving == 0).or((serving != 0).then_some(()))
    });
    // And a stop ends in good order.
    let (done, said) = yard.control(&["stop", "s2"]);
    assert!(done, "{said}");
    assert_eq!(later.code(), Some(0));
    assert!(std::fs::read_to_string(yard.ledger(2)).unwrap().contains("\"reason\":\"shutdown\""));
}

#[test]
fn who_asks_in_vain_is_told_why() {
    let yard = Yard::new("asks");
    let (done, said) = yard.control(&["pause"]);
    assert!(!done && said.contains("an agent has to run, or `agent-sidecar hub`"), "{said}");
    let _hub = yard.hub();
    wait_for("the hub", || yard.hub_pid());
    let (done, said) = yard.control(&["pause"]);
    assert!(!done && said.contains("control is off") && said.contains("--hub-control"), "{said}");
    let (done, said) = yard.control(&["budgets"]);
    assert!(done && said.contains("no agent has told"), "{said}");
}

#[test]
fn a_seat_is_for_who_waits_longest_and_tenants_take_turns() {
    let yard = Yard::new("line");
    let flags = ["--max-sessions", "1", "--queue-timeout", "5m", "--platform-grace", "6m"];
    let line = || {
        let queue: serde_json::Value = serde_json::from_slice(&std::fs::read(yard.state().join("seats.json")).ok()?).ok()?;
        Some(queue["places"].as_object()?.len())
    };
    // Three of one tenant, and then one of another.
    let mut all: Vec<Running> = Vec::new();
    for (n, id) in [0, 0, 0, 1].into_iter().enumerate() {
        all.push(yard.start(id, 0, "0", &flags));
        wait_for("it to be in the line", || line().filter(|places| *places == n + 1));
    }
    let [first, second, third, other] = &mut all[..] else { unreachable!() };
    assert!(first.line().contains("init"));
    first.close_stdin();
    first.code();
    assert!(other.line().contains("init"), "its tenant has had none");
    assert_eq!(line(), Some(3), "the others wait");
    other.signal(Signal::KILL);
    assert!(second.line().contains("init"));
    assert_eq!(line(), Some(2));
    second.close_stdin();
    assert!(third.line().contains("init"));
    third.close_stdin();
    third.code();
    wait_for("everybody to have left", || line().filter(|places| *places == 0));
    let left =
        std::fs::read_dir(yard.state()).unwrap().flatten().filter(|entry| entry.path().extension() == Some("seat".as_ref()));
    assert_eq!(left.count(), 0);
}

#[test]
fn a_state_directory_that_hangs_keeps_no_agent_from_starting_or_ending() {
    use std::os::unix::fs::DirBuilderExt;
    // Whoever opens one of these to write waits for a reader, as on a file server that is gone.
    for hangs in ["lock", "seats.lock", "budgets.lock"] {
        let yard = Yard::new(&format!("hangs-{hangs}"));
        std::fs::DirBuilder::new().mode(0o700).create(yard.state()).unwrap();
        assert!(Command::new("mkfifo").arg(yard.state().join(hangs)).status().unwrap().success());
        let mut agent = yard.start(0, 1, "0", &["--max-sessions", "2", "--queue-timeout", "0", "--container-max-cost-usd", "9"]);
        assert!(agent.line().contains("init"), "{hangs}");
        agent.close_stdin();
        assert_eq!(agent.code(), Some(1), "{hangs}: `read` had nothing to read");
        assert_eq!(yard.ledger_cents(0), 1, "{hangs}");
    }
}

#[test]
fn who_is_learnt_from_the_first_message_pays_from_the_first_answer_on() {
    let cli = r#"read -r _
echo '{"type":"system","subtype":"init","session_id":"s","model":"claude-opus-5-5"}'
used='{"claude-opus-5-5":{"inputTokens":10,"outputTokens":5,"costUSD":1e-2}}'
echo '{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":1e-2,"modelUsage":'$used'}'
cat >/dev/null"#;
    let yard = Yard::new("learnt-payer");
    // The message may be there before the first line of the journal, or come after it.
    for n in 1..=8 {
        let mut command = yard.command("run");
        command.args(["--tenant-from", "message:metadata.tenant", "--tenant-max-cost-usd", "9", "--", "sh", "-c", cli, "sh"]);
        let mut agent = Running::start({
            command.args(STREAM_JSON);
            command
        });
        let message = br#"{"type":"user","message":{"role":"user","content":"hi"},"metadata":{"tenant":"acme"}}"#;
        agent.write(&[&message[..], b"\n"].concat()).unwrap();
        (0..2).for_each(|_| drop(agent.line()));
        wait_for("acme to have paid", || {
            let (_, said) = yard.control(&["budgets", "--format", "json"]);
            let budgets: serde_json::Value = serde_json::from_str(&said).ok()?;
            let budgets = budgets["budgets"].as_array()?.clone();
            assert!(budgets.iter().all(|budget| budget["tenant"] == "acme"), "{said}");
            (budgets.first()?["used"].as_f64()? > f64::from(n) * 0.01 - 1e-9).then_some(())
        });
        agent.close_stdin();
        agent.code();
    }
}

#[test]
fn a_pipe_in_the_place_of_what_a_hub_writes_silences_nobody() {
    let yard = Yard::new("pipe-scraped");
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(yard.state()).unwrap();
    assert!(Command::new("mkfifo").arg(yard.state().join("scraped")).status().unwrap().success());
    let _hub = yard.hub();
    // It is told that somebody has read when that one has gone.
    for _ in 0..3 {
        wait_for("the hub", || yard.metrics());
    }
}

#[test]
fn a_hub_without_a_place_says_which_directory_is_missing() {
    let socket = scratch("hub-nowhere").join("own/hub.sock");
    let mut command = Command::new(SIDECAR);
    let out = command.args(["hub", "--listen", "off", "--socket"]).arg(&socket).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    let missing = socket.with_extension("state").display().to_string();
    assert!(said.contains("name a socket in a directory that is there") && said.contains(&missing), "{said}");
}
