//! The command line: `serve`, what is read from the configuration alone (`check`, `plan`), and what is asked of a fleet that serves.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use agent_fleet::api::{self, Api, View, Views, Wrong};
use agent_fleet::config::{Config, Elsewhere, nearest};
use agent_fleet::drain::is_node;
use agent_fleet::hook::plan_hooks;
use agent_fleet::lifecycle::Phase;
use agent_fleet::metric::{self, Counted, Metrics};
use agent_fleet::store::HookRun;
use agent_fleet::{budget, build, provider, serve, store, trace};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use jiff::Timestamp;
use reqwest::Method;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Something is wrong with what was asked, or with the machine.
pub(crate) const FAILED: u8 = 1;
/// Where a fleet serves that is not told otherwise.
const HERE: &str = "http://127.0.0.1:9490";
/// How long a fleet may take for an answer: its provider may be slow with logs.
const ANSWER: Duration = Duration::from_secs(120);
/// How long a fleet may be away while it is waited for: it is being restarted.
const AWAY: Duration = Duration::from_secs(60);
/// What is under way is given so long when the fleet ends.
const LAST: Duration = Duration::from_secs(25);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn command() -> Command {
    let config = || {
        let default = "/etc/agent-fleet/agent-fleet.toml";
        Arg::new("config")
            .long("config")
            .value_name("FILE")
            .env("AGENT_FLEET_CONFIG")
            .default_value(default)
            .value_parser(value_parser!(PathBuf))
    };
    let flag = |name: &'static str, help: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    let asking = |command: Command| {
        command.arg(Arg::new("url").long("url").env("AGENT_FLEET_URL").default_value(HERE).help("Where the fleet serves")).arg(
            Arg::new("token-file")
                .long("token-file")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("The bearer token; otherwise AGENT_FLEET_TOKEN has it"),
        )
    };
    let id = || Arg::new("id").value_name("SESSION").required(true);
    let one = |name: &'static str, about: &'static str| asking(Command::new(name).about(about).arg(id()));
    Command::new("agent-fleet")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Creates, watches, pauses, resumes and destroys the containers that agents run in")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(Command::new("serve").about("Serves callers and drives their sessions").arg(config()))
        .subcommand(
            Command::new("check")
                .about("Says every mistake in the configuration")
                .arg(config())
                .arg(flag("print", "Prints what is in force, without secrets"))
                .arg(flag("elsewhere", "The file is for another machine: its secrets are not looked for here")),
        )
        .subcommand(
            Command::new("plan")
                .about("Says what would happen to a session, and creates nothing")
                .arg(config())
                .arg(flag("elsewhere", "The file is for another machine: its secrets are not looked for here"))
                .arg(Arg::new("template").value_name("TEMPLATE").help("This one alone")),
        )
        .subcommand(
            Command::new("catalog")
                .about("Prints every metric")
                .arg(Arg::new("format").long("format").value_parser(["markdown", "json"]).default_value("markdown")),
        )
        .subcommand(
            asking(Command::new("create").about("Asks for a session"))
                .arg(Arg::new("template").value_name("TEMPLATE").required(true).help("One of the fleet's [templates]"))
                .arg(Arg::new("id").long("id").value_name("SESSION").help("The same twice is one session"))
                .arg(Arg::new("tenant").long("tenant").value_name("TENANT").help("Who pays"))
                .arg(flag("wait", "Until it is ready, or has failed")),
        )
        .subcommand(
            asking(Command::new("list").about("Lists sessions"))
                .arg(
                    Arg::new("phase")
                        .long("phase")
                        .value_name("PHASE")
                        .value_parser(Phase::ALL.map(|phase| phase.as_str()))
                        .hide_possible_values(true)
                        .help("Those in this phase alone: requested, creating, …, destroyed, failed"),
                )
                .arg(flag("over", "Those that are over, too"))
                .arg(flag("json", "As JSON, one in a line")),
        )
        .subcommand(
            Command::new("probe")
                .about("Says by its exit code whether a fleet answers")
                .arg(Arg::new("url").long("url").env("AGENT_FLEET_URL").default_value(HERE).help("Where the fleet serves")),
        )
        .subcommand(one("show", "Shows a session, as JSON"))
        .subcommand(one("pause", "Puts a session to sleep"))
        .subcommand(one("resume", "Wakes a session"))
        .subcommand(
            one("destroy", "Ends a session, and destroys its container")
                .visible_alias("stop")
                .arg(flag("wait", "Until it is gone")),
        )
        .subcommand(
            asking(
                Command::new("drain")
                    .about("Empties a provider, or a node of it: nothing new is made there, and what is idle goes"),
            )
            .arg(
                Arg::new("provider")
                    .value_name("PROVIDER[/NODE]")
                    .required(true)
                    .help("As the configuration calls it, and, of a cluster, as the cluster calls the node"),
            )
            .arg(
                Arg::new("within")
                    .long("within")
                    .value_name("SECONDS")
                    .value_parser(value_parser!(u64))
                    .default_value("600")
                    .help("What works may go on for so long"),
            )
            .arg(flag("status", "Says how far it is, and changes nothing"))
            .arg(flag("end", "It may be used again"))
            .arg(flag("wait", "Until nothing is left there but what sleeps")),
        )
        .subcommand(one("logs", "Prints the last of what its container has said"))
        .subcommand(one("hooks", "Prints what hooks have done for it, as JSON"))
        .subcommand(
            asking(Command::new("events").about("Follows sessions: says each phase that one comes into"))
                .arg(flag("json", "As JSON, one in a line, with whatever else changes")),
        )
        .subcommand(asking(Command::new("dead-letters").about("Lists calls of hooks that were given up, as JSON, one in a line")))
        .subcommand(
            asking(Command::new("redeliver").about("Tells dead letters again, as they were"))
                .arg(Arg::new("id").value_name("SESSION").help("Those of this one alone"))
                .arg(Arg::new("key").long("key").value_name("KEY").requires("id").help("This one alone")),
        )
}

pub(crate) fn run() -> Result<ExitCode> {
    let matches = command().get_matches();
    let (name, asked) = matches.subcommand().ok_or("a command is missing")?;
    match name {
        "serve" => serve(&read(asked)?),
        "check" => check(asked),
        "plan" => plan(asked),
        "catalog" => catalog(asked),
        "probe" => runtime()?.block_on(probe(text(asked, "url").unwrap_or(HERE))),
        _ => runtime()?.block_on(ask(name, asked)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

fn text<'a>(asked: &'a ArgMatches, name: &str) -> Option<&'a str> {
    asked.try_get_one::<String>(name).ok().flatten().map(String::as_str)
}

fn is(asked: &ArgMatches, name: &str) -> bool {
    asked.try_get_one::<bool>(name).ok().flatten().is_some_and(|given| *given)
}

fn read(asked: &ArgMatches) -> Result<Config> {
    let path = asked.get_one::<PathBuf>("config").ok_or("--config is missing")?;
    Ok(if is(asked, "elsewhere") { Config::read_with(path, &Elsewhere)? } else { Config::read(path)? })
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{line}")?)
}

fn check(asked: &ArgMatches) -> Result<ExitCode> {
    let config = read(asked)?;
    for (name, of) in &config.providers {
        build::provider(name, of)?;
    }
    if is(asked, "print") {
        say(config.print().trim_end())?;
    } else {
        say("no mistake was found")?;
        for warning in config.warnings() {
            say(&format!("but {warning}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What each template leads to: what its provider cannot do, which hooks run, and what it may cost.
fn plan(asked: &ArgMatches) -> Result<ExitCode> {
    let config = read(asked)?;
    let only = text(asked, "template");
    if let Some(only) = only.filter(|only| !config.templates.contains_key(*only)) {
        let near = nearest(only, config.templates.keys().map(String::as_str));
        return Err(format!("there is no template `{only}`; {near}").into());
    }
    let mut refused = false;
    for template in config.templates.values().filter(|template| only.is_none_or(|only| template.name == only)) {
        let of = config.providers.get(&template.provider).ok_or("its provider is gone")?;
        let provider = build::provider(&template.provider, of)?;
        let spec = template.spec_for(&config.fleet.name, &"example".parse()?, "example", 1);
        let price = provider.price(template.size);
        say(&format!("{}: {} on {} ({})", template.name, template.image, template.provider, of.kind))?;
        for refusal in provider::refusals(&provider.capabilities(), &spec) {
            refused = true;
            say(&format!("  REFUSED: {} {refusal}", of.kind))?;
        }
        say(&format!("  {}", template.course(&provider.capabilities())))?;
        let most = budget::life(spec.ttl, &price);
        say(&format!("  a container costs {:.4} USD an hour, {most:.4} at most in its life ({})", price.running, price.source))?;
        for line in plan_hooks(&config, &template.name) {
            say(&format!("  {line}"))?;
        }
    }
    for warning in config.warnings() {
        say(&format!("but {warning}"))?;
    }
    Ok(if refused { ExitCode::from(FAILED) } else { ExitCode::SUCCESS })
}

fn catalog(asked: &ArgMatches) -> Result<ExitCode> {
    match text(asked, "format") {
        Some("json") => say(&serde_json::to_string_pretty(&metric::json())?)?,
        _ => say(metric::page().trim_end())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// How long whoever asks for its health has.
const PROBE: Duration = Duration::from_secs(5);

/// Whether it lives, not whether its store does: a fleet that is started again has the same store.
async fn probe(url: &str) -> Result<ExitCode> {
    let url = address(url)?;
    let answer = build::client()?.get(format!("{url}/livez")).timeout(PROBE).send().await;
    let answer = answer.map_err(|error| no_answer(&url, &error))?;
    Ok(if answer.status().is_success() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn serve(config: &Config) -> Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(false).init();
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    runtime()?.block_on(async {
        let store = store::open(config.fleet.store.reveal()).await?;
        let metrics = Arc::new(Metrics::of(config));
        let store = Counted::over(store, &metrics);
        let clock: agent_fleet::service::Clock = Arc::new(Timestamp::now);
        let hooks = build::hooks(config, &store, &clock)?;
        let mut fleet = build::fleet(config, Arc::clone(&store), hooks, clock)?.with_metrics(Arc::clone(&metrics));
        let mut sender = None;
        if let Some(endpoint) = &config.fleet.otlp_endpoint {
            let (traces, sends) = trace::to(endpoint, &config.fleet.name, build::client()?, &metrics);
            (fleet, sender) = (fleet.with_traces(traces), Some(sends));
        }
        let fleet = Arc::new(fleet);
        let api = Api { fleet: Arc::clone(&fleet), config: Arc::new(config.clone()) };
        let listener = tokio::net::TcpListener::bind(config.fleet.listen).await;
        let listener = listener.map_err(|error| format!("{} cannot be listened at: {error}", config.fleet.listen))?;
        tracing::info!(address = %listener.local_addr()?, fleet = %config.fleet.name, "serving");
        let (end, ended) = watch::channel(false);
        let mut driving = tokio::spawn(Arc::clone(&fleet).run(ended.clone()));
        // When what is under way is done there are no more spans.
        let (last, told) = watch::channel(false);
        let sending = tokio::spawn(async move {
            if let Some(sender) = sender {
                sender.run(told).await;
            }
        });
        let pruning = tokio::spawn(prune(store, config.fleet.keep));
        let serving = tokio::spawn(serve::serve(listener, api::router(api), ended));
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            // Who asks for sessions that nobody drives is not to be told that all is well.
            _ = &mut driving => return Err("sessions are driven no more: start it again".into()),
        }
        tracing::info!("ending: what is under way is finished, and sessions go on where they are");
        end.send(true).ok();
        pruning.abort();
        // Who does not hang up is not waited for.
        if tokio::time::timeout(LAST, async {
            let driven = async { driving.await.map(|()| last.send(true)) };
            tokio::join!(driven, serving, sending)
        })
        .await
        .is_err()
        {
            tracing::warn!("something is still under way; it is gone on with at the next start");
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Forgets what is over for long.
async fn prune(store: Arc<dyn store::Store>, keep: Duration) {
    loop {
        if let Err(error) = store.prune(Timestamp::now() - keep).await {
            tracing::error!(%error, "what is over cannot be forgotten");
        }
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
}

/// Nobody has answered.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoAnswer(String);

/// A fleet that serves, and who asks it.
struct Remote {
    client: reqwest::Client,
    url: String,
    token: String,
}

impl Remote {
    fn new(asked: &ArgMatches) -> Result<Self> {
        let url = address(text(asked, "url").unwrap_or(HERE))?;
        let token = match asked.get_one::<PathBuf>("token-file") {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|error| format!("the token in {} cannot be read: {error}", path.display()))?,
            None => std::env::var("AGENT_FLEET_TOKEN").map_err(|_| "no token: give --token-file, or set AGENT_FLEET_TOKEN")?,
        };
        let token = token.trim().to_owned();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(
                "the token is empty, or has spaces or letters in it that no token has: is it the right file, or variable?".into(),
            );
        }
        Ok(Self { client: build::client()?, url, token })
    }

    async fn ask(&self, method: Method, path: &str, body: Option<serde_json::Value>) -> Result<Vec<u8>> {
        let mut request = self.client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token).timeout(ANSWER);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let gone = |error: reqwest::Error| no_answer(&self.url, &error);
        let answer = request.send().await.map_err(gone)?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(gone)?;
        if status.is_success() { Ok(body.to_vec()) } else { Err(self.refusal(status, &body).into()) }
    }

    /// The fleet's own words, if it is one.
    fn refusal(&self, status: reqwest::StatusCode, body: &[u8]) -> String {
        let foreign = |_| format!("{} answers {status}, and not as a fleet does: is something else there?", self.url);
        serde_json::from_slice::<Wrong>(body).map_or_else(foreign, |wrong| wrong.error)
    }

    async fn view(&self, method: Method, path: &str, body: Option<serde_json::Value>) -> Result<View> {
        Ok(serde_json::from_slice(&self.ask(method, path, body).await?)?)
    }

    /// Asks until it is so, also over a restart of the fleet.
    async fn wait(&self, id: &str, so: impl Fn(Phase) -> bool) -> Result<View> {
        let mut heard = std::time::Instant::now();
        loop {
            match self.view(Method::GET, &format!("/v1/sessions/{id}"), None).await {
                Ok(view) if so(view.phase) => return Ok(view),
                Ok(_) => heard = std::time::Instant::now(),
                Err(error) if error.is::<NoAnswer>() && heard.elapsed() < AWAY => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn no_answer(url: &str, error: &reqwest::Error) -> NoAnswer {
    let remedy = if url.starts_with("https:") && error.is_connect() {
        "a fleet itself speaks no TLS: is it behind something that does?"
    } else {
        "start it with `agent-fleet serve`, or say where it is with --url or AGENT_FLEET_URL"
    };
    NoAnswer(format!("no fleet answers at {url}: {}; {remedy}", root(error)))
}

/// Where a fleet may be, without the slash at its end.
fn address(url: &str) -> Result<String> {
    match reqwest::Url::parse(url) {
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => Ok(url.trim_end_matches('/').to_owned()),
        _ => Err(format!("`{url}` is no address of a fleet: write it like {HERE}, in --url or AGENT_FLEET_URL").into()),
    }
}

/// The first cause: what is around it only repeats the address.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

async fn ask(name: &str, asked: &ArgMatches) -> Result<ExitCode> {
    let remote = Remote::new(asked)?;
    let id = text(asked, "id").unwrap_or_default();
    // It becomes part of a path.
    if !id.is_empty() {
        id.parse::<agent_fleet::session::SessionId>()?;
    }
    let path = format!("/v1/sessions/{id}");
    let shown = |view: &View| say(&serde_json::to_string_pretty(view)?);
    let last = |phase: Phase| phase.is_last();
    match name {
        "create" => {
            let mut body = serde_json::json!({ "template": text(asked, "template") });
            for (name, value) in [("id", text(asked, "id")), ("tenant", text(asked, "tenant"))] {
                if let Some(value) = value {
                    body[name] = value.into();
                }
            }
            let mut view = remote.view(Method::POST, "/v1/sessions", Some(body)).await?;
            if is(asked, "wait") {
                // It may be at rest again before it was seen to be up.
                let there = |phase: Phase| phase.is_up() || phase.is_last() || matches!(phase, Phase::Pausing | Phase::Paused);
                view = remote.wait(&view.id, there).await?;
            }
            shown(&view)?;
            return Ok(if view.phase == Phase::Failed { ExitCode::from(FAILED) } else { ExitCode::SUCCESS });
        }
        "list" => return list(&remote, asked).await,
        "events" => return events(&remote, is(asked, "json")).await,
        "dead-letters" => {
            for letter in letters(&remote).await? {
                say(&serde_json::to_string(&letter)?)?;
            }
        }
        "redeliver" => return redeliver(&remote, id, text(asked, "key")).await,
        "show" => shown(&remote.view(Method::GET, &path, None).await?)?,
        "pause" => shown(&remote.view(Method::POST, &format!("{path}/pause"), None).await?)?,
        "resume" => shown(&remote.view(Method::POST, &format!("{path}/resume"), None).await?)?,
        "destroy" => {
            let mut view = remote.view(Method::DELETE, &path, None).await?;
            if is(asked, "wait") {
                view = remote.wait(id, last).await?;
            }
            shown(&view)?;
        }
        "drain" => return drain(&remote, asked).await,
        "logs" => std::io::stdout().lock().write_all(&remote.ask(Method::GET, &format!("{path}/logs"), None).await?)?,
        "hooks" => std::io::stdout().lock().write_all(&remote.ask(Method::GET, &format!("{path}/hooks"), None).await?)?,
        other => return Err(format!("there is no command `{other}`").into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Names become part of it.
fn drain_path(of: &str) -> Result<String> {
    let (name, node) = of.split_once('/').map_or((of, None), |(name, node)| (name, Some(node)));
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Err(format!("`{name}` is no name of a provider").into());
    }
    match node {
        None => Ok(format!("/v1/providers/{name}/drain")),
        Some(node) if is_node(node) => Ok(format!("/v1/providers/{name}/nodes/{node}/drain")),
        Some(node) => Err(format!("`{node}` is no name of a node: write it as the cluster does (`kubectl get nodes`)").into()),
    }
}

async fn drain(remote: &Remote, asked: &ArgMatches) -> Result<ExitCode> {
    let path = drain_path(text(asked, "provider").unwrap_or_default())?;
    let (method, body) = if is(asked, "status") {
        (Method::GET, None)
    } else if is(asked, "end") {
        (Method::DELETE, None)
    } else {
        (Method::POST, Some(serde_json::json!({ "seconds": asked.get_one::<u64>("within") })))
    };
    let mut said = remote.ask(method, &path, body).await?;
    while is(asked, "wait") {
        let progress: serde_json::Value = serde_json::from_slice(&said)?;
        if progress["until"].is_null() || progress["left"] == progress["asleep"] {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        said = remote.ask(Method::GET, &path, None).await?;
    }
    say(&String::from_utf8_lossy(&said))?;
    Ok(ExitCode::SUCCESS)
}

async fn letters(remote: &Remote) -> Result<Vec<HookRun>> {
    Ok(serde_json::from_slice(&remote.ask(Method::GET, "/v1/dead-letters", None).await?)?)
}

/// Those of one session, or of all. Fails if one was told in vain again.
async fn redeliver(remote: &Remote, id: &str, key: Option<&str>) -> Result<ExitCode> {
    let sessions: BTreeSet<String> = match id {
        "" => letters(remote).await?.into_iter().map(|letter| letter.session.to_string()).collect(),
        id => BTreeSet::from([id.to_owned()]),
    };
    let mut heard = true;
    for id in sessions {
        let body = key.map_or_else(|| serde_json::json!({}), |key| serde_json::json!({ "key": key }));
        let told = remote.ask(Method::POST, &format!("/v1/sessions/{id}/redeliver"), Some(body)).await?;
        for run in serde_json::from_slice::<Vec<HookRun>>(&told)? {
            heard &= run.outcome == "ok";
            say(&format!("{} {} {} {} {}", run.session, run.phase, run.hook, run.outcome, run.said.escape_debug()))?;
        }
    }
    Ok(if heard { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// Until it is interrupted, also over a restart of the fleet.
async fn events(remote: &Remote, json: bool) -> Result<ExitCode> {
    let mut last: Option<String> = None;
    let mut heard = std::time::Instant::now();
    loop {
        match listen(remote, json, &mut last, &mut heard).await {
            Ok(()) => {}
            Err(error) if error.is::<NoAnswer>() && last.is_some() && heard.elapsed() < AWAY => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn listen(remote: &Remote, json: bool, last: &mut Option<String>, heard: &mut std::time::Instant) -> Result<()> {
    let mut request = remote.client.get(format!("{}/v1/events", remote.url)).bearer_auth(&remote.token);
    if let Some(last) = last.as_ref() {
        request = request.header("last-event-id", last);
    }
    let gone = |error: reqwest::Error| no_answer(&remote.url, &error);
    let mut answer = request.send().await.map_err(gone)?;
    if !answer.status().is_success() {
        let status = answer.status();
        let body = answer.bytes().await.map_err(gone)?;
        return Err(remote.refusal(status, &body).into());
    }
    let (mut rest, mut name) = (Vec::new(), String::new());
    // Comments come all the time: who is silent for so long is gone.
    while let Ok(piece) = tokio::time::timeout(AWAY, answer.chunk()).await {
        *heard = std::time::Instant::now();
        let Some(piece) = piece.map_err(gone)? else { break };
        rest.extend_from_slice(&piece);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            match line.trim_end().split_once(": ") {
                Some(("id", id)) => *last = Some(id.to_owned()),
                Some(("event", event)) => event.clone_into(&mut name),
                Some(("data", data)) if json => say(data)?,
                Some(("data", data)) if name == "phase" => {
                    let View { id, phase, since, reason, .. } = serde_json::from_str(data)?;
                    let reason = reason.map(|reason| format!(" ({})", reason.escape_debug())).unwrap_or_default();
                    say(&format!("{since:.0} {id} {phase}{reason}"))?;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

async fn list(remote: &Remote, asked: &ArgMatches) -> Result<ExitCode> {
    let json = is(asked, "json");
    if !json {
        say(&format!(
            "{:<36}  {:<10}  {:<12}  {:<16}  {:>10}  {:>10}  REASON",
            "SESSION", "PHASE", "TEMPLATE", "TENANT", "AGENT USD", "CONT. USD"
        ))?;
    }
    let mut after = String::new();
    loop {
        let mut path = format!("/v1/sessions?over={}", is(asked, "over"));
        if let Some(phase) = text(asked, "phase") {
            path.push_str(&format!("&phase={phase}"));
        }
        if !after.is_empty() {
            path.push_str(&format!("&after={after}"));
        }
        let page: Views = serde_json::from_slice(&remote.ask(Method::GET, &path, None).await?)?;
        for view in &page.sessions {
            if json {
                say(&serde_json::to_string(view)?)?;
                continue;
            }
            let (template, reason) = (view.template.as_deref().unwrap_or("-"), view.reason.as_deref().unwrap_or_default());
            say(&format!(
                "{:<36}  {:<10}  {:<12}  {:<16}  {:>10.4}  {:>10.4}  {reason}",
                view.id, view.phase, template, view.tenant, view.agent_usd, view.container_usd
            ))?;
        }
        match page.next {
            Some(next) => after = next,
            None => return Ok(ExitCode::SUCCESS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_url_and_said_to_be_none_before_anybody_is_asked() {
        assert_eq!(address("http://127.0.0.1:9490/").unwrap(), "http://127.0.0.1:9490");
        for wrong in ["", "fleet", "127.0.0.1:9490", "localhost:9490", "unix:///run/fleet"] {
            let said = address(wrong).unwrap_err().to_string();
            assert!(said.contains("is no address of a fleet: write it like http://127.0.0.1:9490"), "{wrong}: {said}");
        }
    }

    #[tokio::test]
    async fn who_is_not_there_and_who_is_no_fleet_is_said_with_what_to_do() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        let file = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
        std::fs::write(&file, "t".repeat(40)).unwrap();
        let said = async |url: &str| {
            let asked =
                command().get_matches_from(["agent-fleet", "show", "one", "--url", url, "--token-file", file.to_str().unwrap()]);
            let (name, asked) = asked.subcommand().unwrap();
            ask(name, asked).await.unwrap_err().to_string()
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let other = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 501 Not Implemented\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        });
        let foreign = said(&url).await;
        assert_eq!(foreign, format!("{url} answers 501 Not Implemented, and not as a fleet does: is something else there?"));
        other.await.unwrap();
        let gone = said(&url).await;
        assert!(gone.starts_with(&format!("no fleet answers at {url}: ")) && gone.contains("`agent-fleet serve`"), "{gone}");
        std::fs::write(&file, "two words").unwrap();
        assert!(said(&url).await.contains("is it the right file"));
        std::fs::remove_file(&file).unwrap();
        assert!(said(&url).await.starts_with("the token in "));
    }

    #[test]
    fn a_phase_that_there_is_not_is_no_argument_and_columns_are_as_wide_as_they_are_said_to_be() {
        let asked = |phase| command().try_get_matches_from(["agent-fleet", "list", "--phase", phase]);
        assert!(asked("idle").is_ok());
        assert!(asked("asleep").unwrap_err().to_string().contains("paused"));
        assert_eq!(format!("{:<10}|", Phase::Idle), "idle      |");
        let id: agent_fleet::session::SessionId = "one".parse().unwrap();
        assert_eq!(format!("{id:<6}|"), "one   |");
    }

    #[test]
    fn what_is_drained_is_a_provider_or_a_node_of_one() {
        let given = |of: &str| {
            let asked = command().get_matches_from(["agent-fleet", "drain", of]);
            let (_, asked) = asked.subcommand().unwrap();
            drain_path(text(asked, "provider").unwrap()).map_err(|error| error.to_string())
        };
        assert_eq!(given("local").unwrap(), "/v1/providers/local/drain");
        assert_eq!(given("cluster/node-1.example").unwrap(), "/v1/providers/cluster/nodes/node-1.example/drain");
        for (wrong, says) in [
            ("", "no name of a provider"),
            ("/n", "no name of a provider"),
            ("a/", "kubectl get nodes"),
            ("a/b/c", "kubectl get nodes"),
            ("a/..", "`..`"),
        ] {
            assert!(given(wrong).unwrap_err().contains(says), "{wrong}");
        }
    }
}
