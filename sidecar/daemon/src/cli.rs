//! The command line: which subcommand, with which settings.

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use agent_sidecar_core::bill::By;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::config::{Config, Kind, Mistakes, SETTINGS, Sources, variable};
use crate::run::{self, Agent};
use crate::shim::install;
use crate::supervise::OWN_FAILURE;
use crate::{bill, demo, doctor, explain, hub, messages_api, reference, remote, replay, serve, top};

/// A word on the command line that nobody understands.
const USAGE: u8 = 2;

/// What went wrong, and the code to exit with.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Box<dyn Error>,
    pub(crate) code: ExitCode,
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { error: Box::new(error), code: ExitCode::FAILURE }
    }
}

/// `hub` with settings that allow none.
#[derive(Debug, thiserror::Error)]
#[error("there is nothing to serve: set --listen to an address with a port, or --socket, and not --hub off")]
struct NoMeeting;

/// `hub` with nowhere to meet.
#[derive(Debug, thiserror::Error)]
#[error("the hub has no place to meet the wrappers; name a socket in a directory that is there and that this user may write to")]
struct NoPlace(#[source] io::Error);

fn command() -> Command {
    let config = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help(format!("read settings from this file instead of {}", crate::config::DEFAULT_FILE));
    let files = Arg::new("files").value_name("FILE").num_args(1..).required(true).value_parser(value_parser!(PathBuf));
    let format =
        |words: &'static [&'static str]| Arg::new("format").long("format").value_parser(words.to_vec()).default_value(words[0]);
    Command::new("agent-sidecar")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Wraps a Claude agent's CLI: relays it exactly, counts it, limits it, and stops it without losing its last cost.")
        .after_help(
            "Example: agent-sidecar run --max-cost-usd 2.50 --idle-timeout 10m -- claude -p --output-format stream-json --verbose …\n\
             `agent-sidecar check` finds mistakes in a configuration, `agent-sidecar run --help` lists the settings.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(
            Command::new("run")
                .about("Start a command under the sidecar")
                .after_help("Example: agent-sidecar run --max-cost-usd 2.50 --idle-timeout 10m -- claude --output-format stream-json …\n\
                    Exit codes: the command's own, 128+n for a signal, 125 for a failure of ours, 126 not executable, 127 not found.")
                .arg(config.clone())
                .args(flags())
                .arg(
                    Arg::new("command")
                        .value_name("CMD ARGS")
                        .num_args(1..)
                        .required(true)
                        .trailing_var_arg(true)
                        .help("the program to start and its arguments; `--` before it where it could be taken for a flag")
                        .value_parser(value_parser!(OsString)),
                ),
        )
        .subcommand(
            Command::new("hub")
                .about("Serve what all wrappers of this container have counted, without an agent of one's own")
                .arg(config.clone())
                .args(flags()),
        )
        .subcommand(
            Command::new("serve")
                .about("Serve agents over HTTP: a conversation for each session id, each agent under the sidecar")
                .after_help(
                    "Example: agent-sidecar serve --serve-token-file /run/secrets/token --max-cost-usd 5 -- claude --model sonnet\n\
                    curl -N -H 'Authorization: Bearer …' -d '{\"prompt\": \"Hello\"}' localhost:8000/sessions/one/messages",
                )
                .arg(config.clone())
                .args(flags())
                .arg(
                    Arg::new("command")
                        .value_name("CMD ARGS")
                        .num_args(0..)
                        .trailing_var_arg(true)
                        .help("the CLI and its arguments; by default `claude`; how it is talked to is added")
                        .value_parser(value_parser!(OsString)),
                ),
        )
        .subcommand(
            Command::new("top")
                .about("Show the sessions that run, and what happened to each")
                .after_help("Keys: q ends, arrows select, Enter shows what happened, s sorts by the next column, r the other way round.\n\
                    Not at a terminal it prints one plain table, as with --once; the same as JSON is at /status.")
                .arg(config.clone())
                .arg(Arg::new("url").long("url").value_name("URL").help("ask this sidecar, http://HOST:9477; by default the one of this container"))
                .arg(Arg::new("once").long("once").action(ArgAction::SetTrue).help("print one plain table"))
                .args(flags().filter(|flag| ["listen", "socket", "hub"].contains(&flag.get_id().as_str()))),
        )
        .subcommand(
            Command::new("probe")
                .about("Ask whether the sidecar is alive, ready or busy, where there is no shell and no curl to ask with")
                .after_help("Exit codes: 0 for yes, 1 for no, and if nobody answers within four seconds.\n\
                    Example: HEALTHCHECK CMD [\"/agent-sidecar\", \"probe\"]")
                .arg(config.clone())
                .arg(Arg::new("page").value_parser(["livez", "readyz", "busy"]).default_value("livez").help("what is asked"))
                .args(flags().filter(|flag| ["listen", "socket", "hub"].contains(&flag.get_id().as_str()))),
        )
        .subcommand(
            Command::new("replay")
                .about("Say what a recorded stdout, or a ledger file, would have measured")
                .arg(config.clone())
                .arg(Arg::new("ledger").long("ledger").action(ArgAction::SetTrue).help("the files are ledgers, not recordings"))
                .arg(format(&["text", "json", "prometheus"]))
                .arg(files),
        )
        .subcommand(
            Command::new("explain")
                .about("Say what a session cost and why, from its ledger")
                .arg(config.clone())
                .arg(
                    Arg::new("files")
                        .long("ledger")
                        .value_name("FILE")
                        .action(ArgAction::Append)
                        .value_parser(value_parser!(PathBuf))
                        .help("a ledger file, or several; by default the configured one"),
                )
                .arg(format(&["text", "json"]))
                .arg(Arg::new("session").value_name("SESSION").help("a session's id or its beginning; not needed if there is only one")),
        )
        .subcommand(bill_command())
        .subcommand(
            Command::new("check")
                .about("Find every mistake in the configuration")
                .arg(config.clone())
                .args(flags())
                .arg(Arg::new("print").long("print").action(ArgAction::SetTrue).help("print each value and where it came from"))
                .arg(
                    Arg::new("format")
                        .long("format")
                        .value_parser(["markdown"])
                        .help("print the reference page of all settings instead"),
                ),
        )
        .subcommand(
            shims("install")
                .about("Put the sidecar in the place of the CLIs that SDKs and shells find")
                .after_help("Example: RUN agent-sidecar install --all\n\
                    The CLI moves beside its place, as `claude.sidecar-real`. Again after each upgrade of the SDK or the CLI."),
        )
        .subcommand(shims("uninstall").about("Put the CLIs back as they were"))
        .subcommand(
            Command::new("doctor")
                .about("Find what is wrong with this container, and say what to do")
                .after_help("Exit codes: 1 if something is broken, 0 otherwise.")
                .arg(config)
                .arg(format(&["text", "json"]))
                .arg(
                    Arg::new("dirs")
                        .value_name("DIR")
                        .num_args(0..)
                        .value_parser(value_parser!(PathBuf))
                        .help("where to look for CLIs; by default everywhere"),
                ),
        )
        .subcommand(control())
        .subcommand(Command::new("version").about("Print the version"))
        .subcommand(Command::new("catalog").about("List every metric").arg(format(&["json", "markdown"])))
        .subcommand(
            Command::new("demo")
                .about("Run the real CLI through a scripted Messages API on loopback, and show its numbers")
                .arg(Arg::new("cli").long("cli").value_name("FILE").value_parser(value_parser!(PathBuf)).help("the CLI; by default `claude` on the PATH"))
                .arg(Arg::new("script").long("script").value_name("FILE").value_parser(value_parser!(PathBuf)).help("another script for the API"))
                .arg(Arg::new("live").long("live").action(ArgAction::SetTrue).help("ask the real API, with ANTHROPIC_API_KEY; costs money")),
        )
        .subcommand(
            Command::new("messages-api")
                .about("Serve a scripted Messages API, for tests")
                .arg(Arg::new("script").long("script").value_name("FILE").value_parser(value_parser!(PathBuf)).help("by default the demo's"))
                .arg(Arg::new("listen").long("listen").value_name("ADDR").value_parser(value_parser!(SocketAddr)).default_value("127.0.0.1:0"))
                .arg(Arg::new("log").long("log").value_name("FILE").value_parser(value_parser!(PathBuf)).help("append one JSON line for each request that was served")),
        )
}

fn bill_command() -> Command {
    let value =
        |name: &'static str, value: &'static str, help: &'static str| Arg::new(name).long(name).value_name(value).help(help);
    let zone = flags().find(|flag| flag.get_id() == "time-zone");
    Command::new("bill")
        .about("Make a bill of ledger files, in rows of FOCUS 1.2")
        .after_help(
            "Example: agent-sidecar bill /var/log/agents --from 2026-11-01 --to 2026-12-01 --output november.csv\n\
             A line that is in several files is billed once. Its sums are those of `replay --ledger`.",
        )
        .arg(
            Arg::new("files")
                .value_name("FILE")
                .num_args(1..)
                .value_parser(value_parser!(PathBuf))
                .help("ledger files, directories with them, or - for standard input; by default the configured one"),
        )
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("read settings from this file"),
        )
        .arg(
            Arg::new("output")
                .long("output")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("write the bill there, when it is whole; by default to stdout"),
        )
        .arg(
            Arg::new("format")
                .long("format")
                .value_parser(["csv", "json"])
                .default_value("csv")
                .help("json: an object in each line"),
        )
        .arg(
            Arg::new("by").long("by").value_parser(["session", "tenant", "model"]).default_value("session").help(
                "how far rows are apart: each session of a day, each tenant with its teams and cost centres, or models alone",
            ),
        )
        .arg(value("from", "DAY", "leave out what was before this day, like 2026-11-01"))
        .arg(value("to", "DAY", "leave out this day, and what came after it"))
        .arg(value("billing-account", "ID", "the account that is charged: BillingAccountId").default_value("claude-agents"))
        .arg(value("provider", "NAME", "who sells the tokens and sends their invoice").default_value("Anthropic"))
        .arg(value("container-provider", "NAME", "the same of the container").default_value("Container platform"))
        .arg(
            Arg::new("strict")
                .long("strict")
                .action(ArgAction::SetTrue)
                .help("exit with 1 if a line could not be read, or is missing: the bill is written all the same"),
        )
        .args(zone)
}

/// What people can ask of running agents.
fn control() -> Command {
    let session = |required: bool| Arg::new("session").value_name("SESSION").required(required);
    let one = || session(true).help("a session's id, or its slot");
    let all = || session(false).help("a session's id, or its slot; without, all agents, those that are started later, too");
    let value = |name: &'static str, help: &'static str| Arg::new(name).long(name).value_name("VALUE").help(help);
    Command::new("control")
        .about("Pause, resume, interrupt or stop agents that run, and raise their limits and budgets")
        .after_help(
            "Example: agent-sidecar control pause --now\n\
             Asks the hub of this container at its socket; changes need `hub.control` (--hub-control) where the agents were started.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(meets("budgets").about("Say how all shared budgets stand").arg(
            Arg::new("format").long("format").value_parser(["text", "json"]).default_value("text"),
        ))
        .subcommand(
            meets("pause")
                .about("Have an agent take no more messages, with its session kept; or all agents")
                .arg(all())
                .arg(Arg::new("now").long("now").action(ArgAction::SetTrue).help("interrupt the turn that runs; without, it may end")),
        )
        .subcommand(meets("resume").about("Let it go on").arg(all()))
        .subcommand(meets("interrupt").about("End its turn, with a result").arg(one()))
        .subcommand(meets("stop").about("End it, with a result").arg(one()))
        .subcommand(
            meets("raise")
                .about("Make a shared budget larger, until its day or month is over")
                .arg(Arg::new("scope").value_name("BUDGET").required(true).help("container, tenant, and each with _day or _month"))
                .arg(value("usd", "to so many dollars"))
                .arg(value("tokens", "to so many tokens"))
                .arg(value("tenant", "whose, for a tenant's")),
        )
        .subcommand(
            meets("limits")
                .about("Make a session's own limits larger")
                .arg(one())
                .arg(value("max-cost-usd", "to so many dollars"))
                .arg(value("max-tokens", "to so many tokens"))
                .arg(value("session-max-turns", "to so many model round trips")),
        )
}

/// What has to know where the hub is asked.
fn meets(name: &'static str) -> Command {
    let config = Arg::new("config").long("config").value_name("FILE").value_parser(value_parser!(PathBuf));
    let known = ["listen", "socket", "hub-state-dir", "control-token-file"];
    Command::new(name)
        .arg(config.help("read settings from this file"))
        .args(flags().filter(|flag| known.contains(&flag.get_id().as_str())))
}

/// The request that a subcommand of `control` makes.
fn request(verb: &str, matches: &ArgMatches) -> (&'static str, String) {
    let value = |name: &str| matches.try_get_one::<String>(name).ok().flatten().map(String::as_str);
    let pairs = |names: &[(&str, &str)]| {
        let given = names.iter().filter_map(|(flag, key)| Some(format!("{key}={}", remote::encoded(value(flag)?))));
        given.collect::<Vec<String>>().join("&")
    };
    match verb {
        "budgets" => ("GET", String::from("/v1/budgets")),
        "raise" => {
            let query = pairs(&[("usd", "usd"), ("tokens", "tokens"), ("tenant", "tenant")]);
            ("POST", format!("/v1/budgets/{}?{query}", remote::encoded(value("scope").unwrap_or_default())))
        }
        _ => {
            let query = match verb {
                "limits" => pairs(&[
                    ("max-cost-usd", "max_cost_usd"),
                    ("max-tokens", "max_tokens"),
                    ("session-max-turns", "session_max_turns"),
                ]),
                "pause" if matches.get_flag("now") => String::from("now=true"),
                _ => String::new(),
            };
            let whom = value("session").map_or_else(String::new, |session| format!("sessions/{}/", remote::encoded(session)));
            ("POST", format!("/v1/{whom}{verb}?{query}"))
        }
    }
}

/// `install` and its opposite take the same.
fn shims(name: &'static str) -> Command {
    let paths = Arg::new("paths").value_name("PATH").num_args(1..).value_parser(value_parser!(PathBuf));
    Command::new(name)
        .arg(paths.required_unless_present("all").help("a CLI, or a directory to search"))
        .arg(
            Arg::new("all")
                .long("all")
                .action(ArgAction::SetTrue)
                .help("search everything: what pip, npm and the native installer left"),
        )
        .arg(Arg::new("print").long("print").action(ArgAction::SetTrue).help("say what would be done, and change nothing"))
}

/// One flag for each setting.
fn flags() -> impl Iterator<Item = Arg> {
    SETTINGS.iter().map(|setting| {
        let arg = Arg::new(setting.flag).long(setting.flag).help(setting.help).help_heading("Settings");
        match setting.kind {
            Kind::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("BOOL"),
            _ => arg.value_name("VALUE").allow_hyphen_values(true),
        }
    })
}

fn sources(matches: &ArgMatches) -> Sources {
    let given = SETTINGS.iter().filter_map(|setting| {
        // Subcommands that read recordings know the file and the environment only.
        let value = matches.try_get_one::<String>(setting.flag).ok().flatten()?;
        Some((setting.flag, value.clone()))
    });
    Sources::system(matches.get_one::<PathBuf>("config").map(PathBuf::as_path), given.collect())
}

fn config(matches: &ArgMatches) -> Result<Config, Mistakes> {
    Config::load(&sources(matches))
}

/// Whom to ask of the sidecars of this container.
fn here(config: &Config) -> Result<top::Source, top::Error> {
    let sockets = config.meeting().map(|meeting| hub::Place::sockets(&meeting)).unwrap_or_default();
    top::Source::here(sockets, config.listen())
}

/// What a command line of ours has `run` start, if it is one.
pub(crate) fn command_of(args: Vec<OsString>) -> Option<Vec<OsString>> {
    let matches = command().try_get_matches_from(args).ok()?;
    Some(matches.subcommand_matches("run")?.get_many("command")?.cloned().collect())
}

pub(crate) fn main() -> Result<ExitCode, Failure> {
    let args: Vec<OsString> = std::env::args_os().collect();
    let running = args.get(1).is_some_and(|word| word == "run");
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            let asked = !error.use_stderr();
            error.print()?;
            // Before the command ran: the code that whoever runs containers knows.
            return Ok(if asked { ExitCode::SUCCESS } else { ExitCode::from(if running { OWN_FAILURE } else { USAGE }) });
        }
    };
    let mut out = io::stdout().lock();
    match matches.subcommand() {
        Some(("run", matches)) => {
            drop(out);
            return run_command(matches);
        }
        Some(("hub", matches)) => {
            let config = config(matches)?;
            crate::logging::start(&config);
            crate::logging::strangers(&config);
            let meeting = config.meeting().ok_or(NoMeeting)?;
            let mut options = config.hub_options();
            let place = match config.hub_users()? {
                None => hub::Place::find(&meeting).map_err(NoPlace)?,
                Some((members, user)) => {
                    options.members.clone_from(&members);
                    hub::Place::of_users(&meeting, &members, user.as_ref())?
                }
            };
            hub::alone(place, config.listen(), &options)?;
        }
        Some(("serve", matches)) => {
            let config = config(matches)?;
            crate::logging::start(&config);
            crate::logging::strangers(&config);
            serve::run(&config, recipe(matches))?;
        }
        Some(("probe", matches)) => {
            // Mistakes elsewhere in the configuration are no reason to call it dead.
            let (config, _) = Config::read(&sources(matches));
            let page = matches.get_one::<String>("page").expect("it has a default");
            let (yes, said) = here(&config)?.probe(page)?;
            writeln!(out, "{said}")?;
            out.flush()?;
            return Ok(if yes { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Some(("top", matches)) => {
            let source = match matches.get_one::<String>("url") {
                Some(url) => top::Source::url(url)?,
                None => here(&config(matches)?)?,
            };
            // Whoever draws, and whoever gives the terminal back, takes it for themselves.
            drop(out);
            return Ok(top::run(source, matches.get_flag("once"), &mut io::stdout())?);
        }
        Some(("replay", matches)) => {
            let config = config(matches)?;
            crate::logging::start(&config);
            let files: Vec<PathBuf> = matches.get_many("files").into_iter().flatten().cloned().collect();
            let format = match matches.get_one::<String>("format").map(String::as_str) {
                Some("json") => replay::Format::Json,
                Some("prometheus") => replay::Format::Prometheus,
                _ => replay::Format::Text,
            };
            if matches.get_flag("ledger") {
                replay::ledgers(&files, format, &mut out)?;
            } else {
                replay::streams(&files, &config, format, &mut out)?;
            }
        }
        Some(("explain", matches)) => {
            let config = config(matches)?;
            crate::logging::start(&config);
            let named: Vec<PathBuf> = matches.get_many("files").into_iter().flatten().cloned().collect();
            let files = if named.is_empty() { config.ledger().into_iter().collect() } else { named };
            let json = matches.get_one::<String>("format").is_some_and(|format| format == "json");
            explain::explain(matches.get_one::<String>("session").map(String::as_str), &files, json, &mut out)?;
        }
        Some(("bill", matches)) => {
            let config = config(matches)?;
            crate::logging::start(&config);
            let named: Vec<PathBuf> = matches.get_many("files").into_iter().flatten().cloned().collect();
            let text = |name: &str| matches.get_one::<String>(name).cloned();
            let request = bill::Request {
                files: if named.is_empty() { config.ledger().into_iter().collect() } else { named },
                output: matches.get_one("output").cloned(),
                format: if text("format").is_some_and(|format| format == "json") {
                    bill::Format::Json
                } else {
                    bill::Format::Csv
                },
                by: match text("by").as_deref() {
                    Some("tenant") => By::Tenant,
                    Some("model") => By::Model,
                    _ => By::Session,
                },
                from: text("from"),
                to: text("to"),
                account: text("billing-account").unwrap_or_default(),
                provider: text("provider").unwrap_or_default(),
                container_provider: text("container-provider").unwrap_or_default(),
            };
            let whole = bill::bill(&request, &config, &mut out)?;
            return Ok(if whole || !matches.get_flag("strict") { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Some(("check", matches)) if matches.contains_id("format") => reference::settings(&mut out)?,
        Some(("check", matches)) => {
            let config = config(matches)?;
            if matches.get_flag("print") {
                reference::effective(&config, &mut out)?;
            } else {
                writeln!(out, "the configuration is right")?;
            }
            for stranger in config.strangers() {
                eprintln!("warning: {stranger}");
            }
        }
        Some(("catalog", matches)) => match matches.get_one::<String>("format").map(String::as_str) {
            Some("markdown") => reference::metrics_page(&mut out)?,
            _ => reference::metrics_json(&mut out)?,
        },
        Some(("demo", matches)) => {
            let options = demo::Options {
                cli: matches.get_one("cli").cloned(),
                live: matches.get_flag("live"),
                script: matches.get_one("script").cloned(),
            };
            demo::run(&options, &mut out)?;
        }
        Some(("messages-api", matches)) => {
            let listen = *matches.get_one::<SocketAddr>("listen").expect("it has a default");
            let script = matches.get_one::<PathBuf>("script").map(PathBuf::as_path);
            messages_api::serve(script, listen, matches.get_one::<PathBuf>("log").map(PathBuf::as_path))?;
        }
        Some(("doctor", matches)) => {
            let dirs: Vec<PathBuf> = matches.get_many("dirs").into_iter().flatten().cloned().collect();
            let json = matches.get_one::<String>("format").is_some_and(|format| format == "json");
            let well = doctor::examine(Config::read(&sources(matches)), &dirs, json, &mut out)?;
            out.flush()?;
            return Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Some((what @ ("install" | "uninstall"), matches)) => {
            let request = install::Request {
                undo: what == "uninstall",
                all: matches.get_flag("all"),
                paths: matches.get_many("paths").into_iter().flatten().cloned().collect(),
                print: matches.get_flag("print"),
            };
            let well = install::perform(&request, &mut out)?;
            out.flush()?;
            return Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Some(("control", matches)) => {
            let Some((verb, matches)) = matches.subcommand() else { unreachable!("clap asks for one") };
            // Mistakes elsewhere in the configuration are no reason not to pause an agent.
            let (config, _) = Config::read(&sources(matches));
            let (method, target) = request(verb, matches);
            let answer = remote::ask(&config, method, &target)?;
            let table = verb == "budgets" && matches.get_one::<String>("format").is_some_and(|format| format == "text");
            if table { remote::table(&answer, &mut out)? } else { writeln!(out, "{}", answer.trim_end())? }
        }
        Some(("version", _)) => writeln!(out, "agent-sidecar {}", env!("CARGO_PKG_VERSION"))?,
        _ => unreachable!("clap asks for a subcommand, and knows these"),
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Whether the command begins with a word that was meant to be a flag's: `--switch true -- claude`.
fn hides_command(args: &[OsString], argv: &[OsString]) -> bool {
    let before = args.len().checked_sub(argv.len() + 1).and_then(|at| args.get(at));
    before.is_some_and(|word| word != "--") && argv.iter().skip(1).any(|word| word == "--")
}

/// What `serve` starts: its own settings are not for each agent, and keys are not for who lists processes.
fn recipe(matches: &ArgMatches) -> serve::Recipe {
    let (mut flags, mut env) = (Vec::new(), Vec::new());
    if let Some(file) = matches.get_one::<PathBuf>("config") {
        flags.extend([OsString::from("--config"), file.into()]);
    }
    for setting in SETTINGS.iter().filter(|setting| !setting.key.starts_with("serve.")) {
        let Some(value) = matches.try_get_one::<String>(setting.flag).ok().flatten() else { continue };
        match setting.kind {
            Kind::Headers | Kind::Token | Kind::Secret => env.push((variable(setting), value.clone())),
            _ => flags.push(format!("--{}={value}", setting.flag).into()),
        }
    }
    let command: Vec<OsString> = matches.get_many("command").into_iter().flatten().cloned().collect();
    serve::Recipe { flags, env, command: if command.is_empty() { vec![OsString::from("claude")] } else { command } }
}

fn run_command(matches: &ArgMatches) -> Result<ExitCode, Failure> {
    let own = |error: Box<dyn Error>| Failure { error, code: OWN_FAILURE.into() };
    let config = config(matches).map_err(|mistakes| own(Box::new(mistakes)))?;
    crate::logging::start(&config);
    crate::logging::strangers(&config);
    let argv: Vec<OsString> = matches.get_many("command").into_iter().flatten().cloned().collect();
    if hides_command(&std::env::args_os().collect::<Vec<_>>(), &argv) {
        tracing::warn!(
            command = %argv[0].display(),
            "this is taken for the command, as it stands before `--`; a switch takes its value with `=`"
        );
    }
    match run::run(&config, Agent::command(argv)) {
        Ok(code) => Ok(code.into()),
        Err(failure) => Err(Failure { code: failure.exit_code.into(), error: Box::new(failure) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flags_value_that_became_the_command_is_seen() {
        let seen = |line: &str| {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            hides_command(&args, &command_of(args.clone()).unwrap())
        };
        assert!(seen("agent-sidecar run --content-answers true -- claude -p hi"));
        assert!(!seen("agent-sidecar run --content-answers=true -- claude -p hi"));
        assert!(!seen("agent-sidecar run --content-answers -- npx -- claude"));
        assert!(!seen("agent-sidecar run claude -p hi"));
    }
}
