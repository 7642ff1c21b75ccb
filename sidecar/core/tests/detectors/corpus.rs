//! Runs with a label: what each is, and whether somebody should have stopped it.

use agent_sidecar_core::limit::Limit;
use serde_json::{Value, json};

use crate::stage::{Call, Stage, bash, edit, fails, read};

/// What a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Label {
    /// Not to be stopped, nor warned of.
    Healthy,
    /// Goes round in a circle of this kind.
    Sick(Limit),
    /// The same, and nothing here sees it.
    Unseen(Limit),
}
use Label::{Healthy, Sick, Unseen};
use Limit::{
    AlternatingCalls as Alternating, Compactions, FanOut, IdenticalCalls as Identical, NoProgress, SameErrors as SameError,
};

pub(crate) type Run = (&'static str, Label, fn(&mut Stage));

const RED: &str = "Exit code 1\n\n1 failing: expired(token) is false";

fn mcp<'a>(tool: &'a str, input: Value, result: &'a str) -> Call<'a> {
    (tool, input, result, false)
}

/// One user turn, with work at both ends that is nobody's circle.
fn turn(s: &mut Stage, within: impl FnOnce(&mut Stage)) {
    s.ask();
    s.call(bash("ls", "README.md src tests"));
    s.call(read("README.md", "A project."));
    within(s);
    s.end();
}

#[rustfmt::skip]
pub(crate) const RUNS: &[Run] = &[
    ("the same failing test, nothing changed in between", Sick(Identical), |s| turn(s, |s| for _ in 0..20 {
        s.call(fails("npm test", RED));
    })),
    ("the same file, read again and again", Sick(Identical), |s| turn(s, |s| for _ in 0..20 {
        s.call(read("src/a.rs", "fn a() {}"));
    })),
    ("the same command under another title, its input in another order", Sick(Identical), |s| turn(s, |s| for n in 0..20 {
        let text = if n % 2 == 0 { r#"{"command":"make","timeout":9,"description":"Build"}"# } else { r#"{ "description":"Build once more","timeout":9, "command":"make" }"# };
        s.call(("Bash", serde_json::from_str(text).unwrap_or_default(), "make: nothing to be done", false));
    })),
    ("two parallel calls, repeated in changing order", Sick(Identical), |s| turn(s, |s| for n in 0..20 {
        let mut calls = [read("src/a.rs", "fn a() {}"), bash("git diff", "")];
        if n % 3 == 0 { calls.reverse(); }
        s.round(&calls);
    })),
    ("a call that is denied each time", Sick(Identical), |s| turn(s, |s| for _ in 0..20 {
        s.call(fails("rm -r build", "Permission to use Bash has been denied."));
    })),
    ("a page that is not there, fetched again and again", Sick(Identical), |s| turn(s, |s| for _ in 0..20 {
        s.call(("WebFetch", json!({"url": "https://example.com/x", "prompt": "read"}), "Request failed with status code 404", true));
    })),
    ("an unknown tool that tells the same long story", Sick(Identical), |s| { let story = "issue 7 is open; ".repeat(40); turn(s, |s| for _ in 0..20 {
        s.call(mcp("mcp__tracker__show", json!({"issue": 7}), &story));
    }) }),
    ("a subagent that repeats one command", Sick(Identical), |s| turn(s, |s| {
        let agent = s.subagent();
        for _ in 0..30 { s.call(fails("npm run lint", "Exit code 1\nerror in src/a.js")); }
        s.home(&agent);
    })),
    ("healthy for long, then the same test for ever", Sick(Identical), |s| turn(s, |s| {
        for n in 0..100 { s.call(edit("src/a.rs", &format!("v{n}"), &format!("v{}", n + 1))); }
        for _ in 0..20 { s.call(fails("npm test", RED)); }
    })),
    ("two searches in turn", Sick(Alternating), |s| turn(s, |s| for _ in 0..15 {
        s.call(("Grep", json!({"pattern": "expired"}), "src/a.rs", false));
        s.call(read("src/a.rs", "fn a() {}"));
    })),
    ("an edit, a failing test, the edit taken back, a failing test", Sick(Alternating), |s| turn(s, |s| for _ in 0..12 {
        s.call(edit("src/a.rs", "<", "<="));
        s.call(fails("npm test", RED));
        s.call(edit("src/a.rs", "<=", "<"));
        s.call(fails("npm test", "Exit code 1\n\n1 failing: valid(token) is false"));
    })),
    ("three calls in turn, notes in between", Sick(Alternating), |s| turn(s, |s| for n in 0..15 {
        s.call(read("src/a.rs", "fn a() {}"));
        s.call(("TodoWrite", json!({"todos": [n]}), "Todos have been modified successfully.", false));
        s.call(read("src/b.rs", "fn b() {}"));
        s.call(bash("git status", "clean"));
    })),
    ("edits that do not find their place", Sick(SameError), |s| turn(s, |s| for n in 0..15 {
        let text = format!("<tool_use_error>String to replace not found in file.\nString: attempt {n} is different");
        s.call(("Edit", json!({"file_path": "src/a.rs", "old_string": n, "new_string": ""}), &text, true));
    })),
    ("one denial for every command", Sick(SameError), |s| turn(s, |s| for n in 0..15 {
        s.call(fails(&format!("git push --try {n}"), "This command requires approval"));
    })),
    ("the same error on other lines", Sick(SameError), |s| turn(s, |s| for n in 0..15 {
        s.call(fails(&format!("cargo build -j{n}"), &format!("error[E0463]: can't find crate for std, at 12:{n}:07, request req_0{n}x")));
        if n % 3 == 0 { s.call(read("README.md", "A project.")); }
    })),
    ("different commands, each failing in its own way", Sick(NoProgress), |s| turn(s, |s| for n in 0..60 {
        let word = ["disk", "net", "rights", "memory", "name", "type", "flag"][n % 7];
        s.call(fails(&format!("try {n}"), &format!("Exit code 1\n{word} {}", "x".repeat(n % 11))));
    })),
    ("seven files, read over and over", Sick(NoProgress), |s| turn(s, |s| for n in 0..70 {
        s.call(read(&format!("src/{}.rs", n % 7), "fn f() {}"));
    })),
    ("three known calls in no order", Sick(NoProgress), |s| turn(s, |s| for n in 0..90u32 {
        let n = n.wrapping_mul(2_654_435_761) >> 16;
        s.call(read(&format!("src/{}.rs", n % 3), "fn f() {}"));
    })),
    ("a hook that never lets it stop", Sick(NoProgress), |s| turn(s, |s| for _ in 0..60 { s.talk(); })),
    ("notes rewritten, and no work", Sick(NoProgress), |s| turn(s, |s| for n in 0..60 {
        s.call(("TodoWrite", json!({"todos": [n]}), "Todos have been modified successfully.", false));
    })),
    ("a context that is full again at once", Sick(Compactions), |s| turn(s, |s| for n in 0..8 {
        s.call(read(&format!("log{n}"), "much"));
        s.call(bash(&format!("grep x log{n}"), "more"));
        s.compacted("auto");
    })),
    ("agents that start agents", Sick(FanOut), |s| turn(s, |s| for _ in 0..150 { let agent = s.subagent(); s.home(&agent); })),
    ("a cluster looked at for ever", Sick(NoProgress), |s| turn(s, |s| for _ in 0..60 {
        s.call(bash("kubectl get pods", "web-1 Pending"));
    })),
    ("tests that are told not to watch, again and again", Sick(Identical), |s| turn(s, |s| for _ in 0..20 {
        s.call(fails("npx jest --watch=false --no-watch", RED));
    })),
    ("a look at the network that is denied each time", Sick(Identical), |s| turn(s, |s| for _ in 0..20 {
        s.call(fails("curl https://example.com", "Permission to use Bash has been denied."));
    })),
    ("a subagent that reads seven files over and over", Sick(NoProgress), |s| turn(s, |s| {
        let agent = s.subagent();
        for n in 0..70 { s.call(read(&format!("src/{}.rs", n % 7), "fn f() {}")); }
        s.home(&agent);
    })),
    ("known files in no order, and a short sleep now and then", Sick(NoProgress), |s| turn(s, |s| for n in 0..150u32 {
        if n % 10 == 9 { s.call(bash("sleep 1", "")); }
        s.call(read(&format!("src/{}.rs", (n.wrapping_mul(2_654_435_761) >> 16) % 3), "fn f() {}"));
    })),
    ("the same files read again after each compaction", Sick(Compactions), |s| turn(s, |s| for _ in 0..8 {
        for n in 0..6 { s.call(read(&format!("log{n}"), "much")); }
        s.compacted("auto");
    })),

    ("the same command, its output dated", Unseen(Identical), |s| turn(s, |s| for n in 0..60 {
        s.call(bash("npm test", &format!("41 passed, 1 failed in {}.{n} s", n % 7)));
    })),
    ("waits for a server that never comes", Unseen(NoProgress), |s| turn(s, |s| for _ in 0..60 {
        s.call(fails("sleep 5; curl localhost:8080", "Exit code 7\nconnection refused"));
    })),
    ("an unknown tool that only says ok", Unseen(Identical), |s| turn(s, |s| for _ in 0..60 {
        s.call(mcp("mcp__robot__step", json!({}), "ok"));
    })),
    ("a comment that is changed and changed again", Unseen(NoProgress), |s| turn(s, |s| for n in 0..60 {
        s.call(edit("src/a.rs", &format!("// {n}"), &format!("// {}", n + 1)));
    })),

    ("looks, edits, tests, is done", Healthy, |s| turn(s, |s| {
        s.call(fails("npm test", RED));
        s.call(read("src/a.rs", "fn a() {}"));
        s.call(edit("src/a.rs", "<", "<="));
        s.call(bash("npm test", "42 passed"));
    })),
    ("a test that fails after each of twenty edits", Healthy, |s| turn(s, |s| for n in 0..20 {
        s.call(edit("src/a.rs", &format!("v{n}"), &format!("v{}", n + 1)));
        s.call(fails("npm test", RED));
    })),
    ("a flaky test, tried again", Healthy, |s| turn(s, |s| {
        for _ in 0..3 { s.call(fails("npm test", RED)); }
        s.call(bash("npm test", "42 passed"));
    })),
    ("a file read again after each edit", Healthy, |s| turn(s, |s| for n in 0..25 {
        s.call(edit("src/a.rs", &format!("v{n}"), &format!("v{}", n + 1)));
        s.call(read("src/a.rs", &format!("fn v{}() {{}}", n + 1)));
    })),
    ("a pipeline polled while its status changes", Healthy, |s| turn(s, |s| for n in 0..40 {
        s.call(fails("gh pr checks", &format!("Exit code 8\n{n} of 40 checks passed, the rest are pending")));
    })),
    ("a pipeline polled with a sleep in between", Healthy, |s| turn(s, |s| for _ in 0..60 {
        s.call(fails("gh pr checks", "Exit code 8\npending"));
        s.call(bash("sleep 30", ""));
    })),
    ("a command that sleeps and looks", Healthy, |s| turn(s, |s| for _ in 0..60 {
        s.call(bash("sleep 20 && tail -1 build.log", "compiling"));
    })),
    ("a background command looked after", Healthy, |s| turn(s, |s| for _ in 0..60 {
        s.call(("BashOutput", json!({"bash_id": "b1"}), "status: running", false));
    })),
    ("a background task looked after", Healthy, |s| turn(s, |s| for _ in 0..60 {
        s.call(("TaskOutput", json!({"task_id": "t1", "block": true}), "not ready", false));
    })),
    ("waits that run out and are taken up again", Healthy, |s| turn(s, |s| for _ in 0..20 {
        s.call(fails("kubectl wait --for=condition=ready pod/a", "timed out waiting for the condition"));
        s.call(fails("gh run watch 7", "Exit code 1\nstill running"));
    })),
    ("a browser that waits for a page", Healthy, |s| turn(s, |s| for _ in 0..30 {
        s.call(mcp("mcp__playwright__browser_wait_for", json!({"time": 2}), &"page: loading; ".repeat(30)));
    })),
    ("a key pressed thirty times, the tool says ok", Healthy, |s| turn(s, |s| for _ in 0..30 {
        s.call(mcp("mcp__playwright__browser_press_key", json!({"key": "ArrowDown"}), "ok"));
    })),
    ("the next page, thirty times", Healthy, |s| turn(s, |s| for n in 0..30 {
        s.call(mcp("mcp__playwright__browser_click", json!({"ref": "next"}), &format!("page {n}: {}", "row ".repeat(90))));
    })),
    ("the same question in twenty user turns", Healthy, |s| for _ in 0..20 {
        s.ask();
        s.call(bash("git status", "clean"));
        s.end();
    }),
    ("a large file, page by page", Healthy, |s| turn(s, |s| for n in 0..60 {
        s.call(("Read", json!({"file_path": "log", "offset": n * 2_000}), &format!("line {n}"), false));
    })),
    ("two hundred edits", Healthy, |s| turn(s, |s| for n in 0..200 { s.call(edit("src/a.rs", &format!("v{n}"), "w")); })),
    ("one template for many files", Healthy, |s| turn(s, |s| for n in 0..60 {
        s.call(("Write", json!({"file_path": format!("{n}.md"), "content": "# Title"}), "File created successfully.", false));
    })),
    ("git status between all sorts of work", Healthy, |s| turn(s, |s| for n in 0..40 {
        s.call(edit("src/a.rs", &format!("v{n}"), "w"));
        s.call(bash("git status", "modified: src/a.rs"));
    })),
    ("searches that find nothing, among others", Healthy, |s| turn(s, |s| for n in 0..30 {
        s.call(fails(&format!("grep -r name{n} src"), "Exit code 1"));
        if n % 4 == 3 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); }
    })),
    ("a hard bug: twelve failures of all kinds, and then it works", Healthy, |s| turn(s, |s| {
        for n in 0..12 { s.call(fails(&format!("try {n}"), &format!("Exit code 1\nreason {}", "y".repeat(n)))); }
        s.call(bash("try 13", "it works"));
    })),
    ("a failing test, looked into between its runs", Healthy, |s| turn(s, |s| for n in 0..8 {
        s.call(fails("npm test", RED));
        s.call(read(&format!("src/{n}.rs"), "fn f() {}"));
    })),
    ("a bisection: one command, two outcomes", Healthy, |s| turn(s, |s| for n in 0..12 {
        let good = n % 3 == 0;
        s.call(if good { bash("make test", "ok") } else { fails("make test", RED) });
        s.call(bash(if good { "git bisect good" } else { "git bisect bad" }, &format!("{} revisions left", 4_096 >> n)));
    })),
    ("a benchmark, run often enough for an average", Healthy, |s| turn(s, |s| for n in 0..15 {
        s.call(bash("cargo bench", &format!("time: {}.{n} ms", n % 3)));
    })),
    ("denied twice, then another way", Healthy, |s| turn(s, |s| {
        s.call(fails("rm a", "Permission denied by the user"));
        s.call(fails("rm -f a", "Permission denied by the user"));
        s.call(bash("git rm a", "rm 'a'"));
    })),
    ("ten subagents read the same files", Healthy, |s| turn(s, |s| for _ in 0..10 {
        let agent = s.subagent();
        for n in 0..6 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); }
        s.home(&agent);
    })),
    ("forty subagents over four turns", Healthy, |s| for _ in 0..4 { turn(s, |s| for n in 0..10 {
        let agent = s.subagent();
        s.call(bash(&format!("ls {n}"), "a b"));
        s.home(&agent);
    }) }),
    ("a long task, compacted every fifty answers", Healthy, |s| turn(s, |s| for n in 0..300 {
        s.call(edit("src/a.rs", &format!("v{n}"), "w"));
        if n % 50 == 49 { s.compacted("auto"); }
    })),
    ("all is read again after a compaction", Healthy, |s| turn(s, |s| for _ in 0..4 {
        for n in 0..15 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); }
        s.compacted("auto");
    })),
    ("a person compacts six times", Healthy, |s| for _ in 0..6 { turn(s, |s| s.compacted("manual")); }),
    ("thirty searches in one answer", Healthy, |s| turn(s, |s| {
        let patterns: Vec<String> = (0..30).map(|n| format!("name{n}")).collect();
        let calls: Vec<Call<'_>> = patterns.iter().map(|p| ("Grep", json!({"pattern": p}), "no matches", false)).collect();
        s.round(&calls);
    })),
    ("an answer cut off at its length, three times", Healthy, |s| turn(s, |s| for _ in 0..3 { s.talk(); })),
    ("requests that are made again, and succeed", Healthy, |s| turn(s, |s| for n in 0..20 {
        s.cli(&json!({"type": "system", "subtype": "api_retry", "session_id": "s", "attempt": 1, "retry_delay_ms": 500, "error": "overloaded"}));
        s.call(read(&format!("src/{n}.rs"), "fn f() {}"));
    })),
    ("large outputs that differ in their middle", Healthy, |s| {
        let outputs: Vec<String> = (0..12).map(|n| format!("{}{n:02}{}", "a".repeat(90_000), "b".repeat(90_000))).collect();
        turn(s, |s| for output in &outputs { s.call(bash("dump", output)); });
    }),
    ("notes after each step", Healthy, |s| turn(s, |s| for n in 0..40 {
        s.call(edit("src/a.rs", &format!("v{n}"), "w"));
        s.call(("TodoWrite", json!({"todos": [n]}), "Todos have been modified successfully.", false));
    })),
    ("three hundred files, each read once", Healthy, |s| turn(s, |s| for n in 0..300 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); })),
    ("eighteen names that are nowhere, looked for with grep", Healthy, |s| turn(s, |s| for n in 0..18 {
        s.call(fails(&format!("grep -rn oldName{n} src"), "Exit code 1"));
    })),
    ("a test written first, that fails in another way after each change", Healthy, |s| turn(s, |s| for n in 0..25 {
        s.call(bash(&format!("sed -i s/v{n}/v{}/ src/a.py", n + 1), ""));
        s.call(fails("pytest -x", &format!("Exit code 1\n{} failed: {}", 25 - n, ["NameError", "TypeError", "AssertionError"][n % 3])));
    })),
    ("a service that is up after ten tries, each later than the last", Healthy, |s| turn(s, |s| {
        for n in 0..10 { s.call(fails(&format!("sleep {}; curl -sf localhost:8080/health", 1 << n), "Exit code 7")); }
        s.call(bash("curl -sf localhost:8080/health", "ok"));
    })),
    ("a rollout looked at again and again, without a sleep", Healthy, |s| turn(s, |s| for n in 0..30 {
        s.call(bash("kubectl get pods", &format!("web-1 ContainerCreating {}s", n * 7)));
    })),
    ("a dozen packages, installed and failing each for a reason of its own, then one that works", Healthy, |s| turn(s, |s| {
        for n in 0..6 { s.call(fails(&format!("pip install pkg{n}"), &format!("ERROR: No matching distribution found for pkg{}", ["alpha", "beta", "gamma", "delta", "eps", "zeta"][n]))); }
        s.call(bash("pip install pkg7", "Successfully installed"));
    })),
    ("a game played over a tool that shows the board", Healthy, |s| turn(s, |s| for n in 0..50 {
        s.call(mcp("mcp__chess__move", json!({"best": true}), &format!("move {n}\n{}", ". . . . . . . .\n".repeat(20))));
    })),
    ("three reviewers read the same forty-five files, one after the other", Healthy, |s| turn(s, |s| for _ in 0..3 {
        let agent = s.subagent();
        for n in 0..45 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); }
        s.home(&agent);
    })),
    ("what a subagent has read is read by the one who sent it", Healthy, |s| turn(s, |s| {
        let agent = s.subagent();
        for n in 0..45 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); }
        s.home(&agent);
        for n in 0..45 { s.call(read(&format!("src/{n}.rs"), "fn f() {}")); }
    })),
    ("a pipeline polled for an hour: a sleep and two looks", Healthy, |s| turn(s, |s| for _ in 0..60 {
        s.call(bash("sleep 60", ""));
        s.call(fails("gh pr checks 7", "Exit code 8\npending"));
        s.call(bash("gh run view 7", "in_progress"));
    })),
    ("a shell in a shell that sleeps", Healthy, |s| turn(s, |s| for _ in 0..20 {
        s.call(bash("bash -c 'sleep 30; tail -1 build.log'", "linking"));
        s.call(bash("ssh build \"sleep 30 && cat log\"", "linking"));
    })),
    ("other words for sleep", Healthy, |s| turn(s, |s| for _ in 0..20 {
        s.call(bash("python3 -c 'import time; time.sleep(20)'; cat train.log", "epoch 1"));
        s.call(bash("node -e 'setTimeout(() => {}, 20000)'; cat train.log", "epoch 1"));
        s.call(bash("/bin/sleep 20; cat train.log", "epoch 1"));
        s.call(("PowerShell", json!({"command": "Start-Sleep 20; Get-Content train.log"}), "epoch 1", false));
    })),
    ("a rollout that is waited for, a minute at a time", Healthy, |s| turn(s, |s| for _ in 0..15 {
        s.call(fails("kubectl rollout status deploy/web --timeout=60s", "Exit code 1\nerror: timed out waiting for the condition"));
    })),
    ("the output of a background command, looked into", Healthy, |s| turn(s, |s| for _ in 0..30 {
        s.call(read("/tmp/claude-0/-work/5f1c/tasks/b7.output", "Compiling"));
        s.call(bash("tail -3 /tmp/claude-0/-work/5f1c/tasks/b7.output", "Compiling"));
    })),
    ("a pipeline looked at fifteen times, without a sleep", Healthy, |s| turn(s, |s| for _ in 0..15 {
        s.call(bash("gh run view 7 --json status", "in_progress"));
    })),
    ("two looks in turn at what starts", Healthy, |s| turn(s, |s| for _ in 0..8 {
        s.call(bash("kubectl get pods", "web-1 ContainerCreating"));
        s.call(bash("docker compose ps", "db starting"));
    })),
    ("a training run, watched", Healthy, |s| turn(s, |s| for _ in 0..8 {
        s.call(bash("nvidia-smi --query-gpu=utilization.gpu --format=csv", "99 %"));
        s.call(bash("tail -n 1 train.log", "epoch 1"));
    })),
    ("thirty tasks noted one by one, put in order, and done", Healthy, |s| turn(s, |s| {
        for n in 0..30 { s.call(("TaskCreate", json!({"subject": format!("part {n}"), "description": "do it"}), "Task created successfully", false)); }
        for n in 1..30 { s.call(("TaskUpdate", json!({"taskId": n.to_string(), "addBlockedBy": [n - 1]}), "Updated task blockedBy", false)); }
        for n in 0..30 { s.call(edit("src/a.rs", &format!("v{n}"), "w")); }
    })),
    ("what kind of project is it: nine files that might be there", Healthy, |s| turn(s, |s| for name in
        ["Cargo.toml", "go.mod", "pom.xml", "setup.py", "Gemfile", "mix.exs", "build.gradle", "Makefile", "package.json"] {
        s.call(("Read", json!({"file_path": name}), "<tool_use_error>File does not exist. Note: your current working directory is /work.</tool_use_error>", true));
    })),
    ("a log larger than the context, six pages at a time, with notes", Healthy, |s| turn(s, |s| for n in 0..12 {
        for page in 0..6 { s.call(("Read", json!({"file_path": "log", "offset": (n * 6 + page) * 2_000}), "much", false)); }
        s.call(edit("notes.md", &format!("part {n}"), "found"));
        s.compacted("auto");
    })),
    ("arrow keys on a page that looks the same", Healthy, |s| turn(s, |s| for _ in 0..30 {
        s.call(mcp("mcp__playwright__browser_press_key", json!({"key": "ArrowDown"}), &"- canvas\n".repeat(60)));
    })),
    ("a program in a terminal, driven by keys", Healthy, |s| turn(s, |s| for _ in 0..15 {
        s.call(bash("tmux send-keys -t app Down", "(Bash completed with no output)"));
    })),
    ("a tool that is asked how far a build is", Healthy, |s| turn(s, |s| for _ in 0..15 {
        s.call(mcp("mcp__ci__get_build_status", json!({"build": 7}), &"stage: compile; state: running; ".repeat(20)));
    })),
];
