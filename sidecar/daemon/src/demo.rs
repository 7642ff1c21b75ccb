//! `demo`: the real CLI under the sidecar, three user messages long, with its numbers while they change and the bill at the end.
//!
//! Without a key it talks to the scripted Messages API of the tests, on loopback. With `--live` it is the real thing, and costs money.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use messages_api::{Log, Script};
use serde_json::Value;

use crate::replay;

/// The three messages of the demo's script.
const MESSAGES: [&str; 3] =
    ["Look at this project and run its tests.", "Have the handlers reviewed by subagents.", "Summarise what is to be done."];
/// How often the numbers are read.
const REFRESH: Duration = Duration::from_millis(500);
/// Nothing of the demo takes longer than this in one go.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(crate) struct Options {
    /// The CLI; `None` looks for `claude` on the PATH.
    pub(crate) cli: Option<PathBuf>,
    pub(crate) live: bool,
    pub(crate) script: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no `claude` on the PATH; install it (`npm install -g @anthropic-ai/claude-code`), or name it with --cli FILE")]
    NoCli,
    #[error("--live asks the real API, and ANTHROPIC_API_KEY is not set; set it, or leave --live out")]
    NoKey,
    #[error("cannot {what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot use the script {}", path.display())]
    Script {
        path: PathBuf,
        #[source]
        source: messages_api::ScriptError,
    },
    #[error("the agent ended before its work was done (exit code {0:?}); its own words are above")]
    Ended(Option<i32>),
    #[error("the agent said nothing for two minutes")]
    Silent,
    #[error("cannot read the ledger")]
    Ledger(#[from] replay::Error),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

pub(crate) fn run(options: &Options, out: &mut impl Write) -> Result<(), Error> {
    let cli = match &options.cli {
        // The agent works in a directory of its own.
        Some(cli) => std::path::absolute(cli).map_err(failed("find the CLI"))?,
        None => on_path("claude").ok_or(Error::NoCli)?,
    };
    if options.live && std::env::var_os("ANTHROPIC_API_KEY").is_none_or(|key| key.is_empty()) {
        return Err(Error::NoKey);
    }
    let scratch = std::env::temp_dir().join(format!("agent-sidecar-demo-{}", std::process::id()));
    for part in ["home", "work", "tmp"] {
        std::fs::create_dir_all(scratch.join(part)).map_err(failed("make a scratch directory"))?;
    }
    let done = show(options, &cli, &scratch, out);
    if let Err(error) = std::fs::remove_dir_all(&scratch) {
        tracing::warn!(%error, path = %scratch.display(), "the scratch directory stays behind");
    }
    done
}

fn show(options: &Options, cli: &Path, scratch: &Path, out: &mut impl Write) -> Result<(), Error> {
    let say = failed("write to standard output");
    let api = if options.live { None } else { Some(scripted_api(options.script.as_deref())?) };
    let metrics = free_address()?;
    let ledger = scratch.join("ledger.jsonl");
    let wrapper = std::env::current_exe().map_err(failed("find this program"))?;
    let mut command = Command::new(&wrapper);
    command
        .args(["run", "--quiet", "--max-cost-usd", "5", "--hub", "off", "--listen", &metrics.to_string(), "--ledger"])
        .arg(&ledger)
        .arg("--")
        .arg(cli)
        .args(["-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"])
        .args(["--include-partial-messages", "--allowedTools", "Bash,Task,Agent,Read"])
        .current_dir(scratch.join("work"))
        // In a namespace everybody is root, and `/tmp/claude-0`, which it would use, the other root's.
        .env("CLAUDE_CODE_TMPDIR", scratch.join("tmp"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if let Some(api) = api {
        command
            .env("ANTHROPIC_BASE_URL", format!("http://{api}"))
            .env("ANTHROPIC_API_KEY", "sk-ant-demo")
            .env("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
            .env("DISABLE_AUTOUPDATER", "1")
            .env("IS_SANDBOX", "1")
            .env("HOME", scratch.join("home"))
            .env_remove("ANTHROPIC_AUTH_TOKEN")
            .env_remove("CLAUDE_CONFIG_DIR");
    }
    let against = api.map_or_else(|| String::from("the real API"), |api| format!("a scripted Messages API on {api}"));
    writeln!(out, "{} under {} against {against}", cli.display(), wrapper.display()).map_err(say)?;
    writeln!(out, "metrics: http://{metrics}/metrics   status: http://{metrics}/status\n").map_err(failed("write"))?;

    let mut child = command.spawn().map_err(failed("start the wrapper"))?;
    let mut stdin = child.stdin.take().expect("stdin is piped: see above");
    let stdout = child.stdout.take().expect("stdout is piped: see above");
    let (lines, results) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // The demo reads what any app would: the results.
            let value: Value = serde_json::from_str(&line).unwrap_or_default();
            if value["type"] == "result" && lines.send(value).is_err() {
                return;
            }
        }
    });
    let mut screen = Screen { live: io::stdout().is_terminal(), last: String::new() };
    for message in MESSAGES {
        writeln!(out, "> {message}").map_err(failed("write"))?;
        let line = serde_json::json!({"type": "user", "message": {"role": "user", "content": message},
            "parent_tool_use_id": null, "session_id": ""});
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).map_err(failed("talk to the agent"))?;
        let mut waited = Duration::ZERO;
        let result = loop {
            match results.recv_timeout(REFRESH) {
                // A background agent's turn of its own comes between.
                Ok(result) if result["origin"]["kind"] == "task-notification" => {}
                Ok(result) => break result,
                Err(mpsc::RecvTimeoutError::Timeout) if waited < PATIENCE => {
                    waited += REFRESH;
                    screen.refresh(metrics, out).map_err(failed("write"))?;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => return Err(Error::Silent),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Error::Ended(None)),
            }
        };
        screen.refresh(metrics, out).map_err(failed("write"))?;
        let answer = result["result"].as_str().unwrap_or("(no answer)");
        screen.line(&format!("< {}\n", answer.lines().next().unwrap_or_default()), out).map_err(failed("write"))?;
    }
    drop(stdin);
    #[expect(clippy::disallowed_methods, reason = "the demo is an app, not the supervisor: this child is its own")]
    let status = child.wait().map_err(failed("wait for the wrapper"))?;
    if !status.success() {
        return Err(Error::Ended(status.code()));
    }
    writeln!(out, "\nThe bill, from the ledger file:").map_err(failed("write"))?;
    replay::bill(&replay::read_ledgers(&[ledger])?, out).map_err(failed("write"))?;
    Ok(())
}

/// One line of numbers, in place on a terminal, and on lines of their own when they change elsewhere.
struct Screen {
    live: bool,
    last: String,
}

impl Screen {
    fn refresh(&mut self, metrics: SocketAddr, out: &mut impl Write) -> io::Result<()> {
        let Some(status) = get(metrics, "/status") else { return Ok(()) };
        let session = &status["sessions"][0];
        let n = |value: &Value| value.as_u64().unwrap_or_default();
        let tokens = &session["tokens"];
        let numbers = format!(
            "  {:<14} turn {}   ${:.6}   {} in  {} out  {} cached   {} tool calls",
            session["state"].as_str().unwrap_or("starting"),
            n(&session["turns"]),
            session["cost_usd"].as_f64().unwrap_or_default(),
            n(&tokens["input"]),
            n(&tokens["output"]),
            n(&tokens["cache_read"]),
            session["tool_calls"]
                .as_object()
                .map_or(0, |tools| tools.values().map(|calls| n(&calls["ok"]) + n(&calls["error"])).sum::<u64>()),
        );
        if numbers == self.last {
            return Ok(());
        }
        if self.live {
            write!(out, "\r\x1b[K{numbers}")?;
        } else {
            writeln!(out, "{numbers}")?;
        }
        self.last = numbers;
        out.flush()
    }

    fn line(&self, text: &str, out: &mut impl Write) -> io::Result<()> {
        if self.live {
            writeln!(out)?;
        }
        writeln!(out, "{text}")
    }
}

/// The scripted API, on a thread that ends with the process.
fn scripted_api(script: Option<&Path>) -> Result<SocketAddr, Error> {
    let path = script.unwrap_or(Path::new("(embedded)"));
    let text = match script {
        Some(path) => std::fs::read_to_string(path).map_err(failed("read the script"))?,
        None => messages_api::DEMO.to_owned(),
    };
    let script = Script::parse(&text).map_err(|source| Error::Script { path: path.to_owned(), source })?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed("listen on loopback"))?;
    let address = listener.local_addr().map_err(failed("listen on loopback"))?;
    std::thread::spawn(move || crate::messages_api::serve_until_killed(listener, script, Log::default()));
    Ok(address)
}

fn free_address() -> Result<SocketAddr, Error> {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map_err(failed("listen on loopback"))
}

/// One small request to our own page. `None` while it is not there.
fn get(address: SocketAddr, path: &str) -> Option<Value> {
    let mut stream = TcpStream::connect_timeout(&address, REFRESH).ok()?;
    stream.set_read_timeout(Some(REFRESH)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|file| file.is_file())
}
