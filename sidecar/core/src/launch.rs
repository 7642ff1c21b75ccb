//! What the command line of the CLI means for us: whether its output can be read, whether it can be talked to, how its session starts.
//!
//! The program may stand behind others (`node cli.js …`, `docker exec -i box claude …`), so flags are looked for in all of it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::update::Start;

/// How the wrapper handles the CLI's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// stdout is stream-json or json and goes through us; stdin does where it is stream-json, too.
    Parse { stdin_json: bool },
    /// A person sits there: the terminal is handed over untouched.
    Terminal,
    /// Text, a version, a subcommand: nothing to read.
    PassThrough,
}

/// What a command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub mode: Mode,
    pub start: Start,
    /// The session id to resume, where it is named.
    pub resume: Option<String>,
    /// The session id that the app has chosen.
    pub session: Option<String>,
    /// The app's own `--max-turns`, the last one, as the CLI takes it.
    pub max_turns: Option<u64>,
    /// It is the CLI, on its way to ask a model: limits can be handed to it.
    pub asks_model: bool,
    /// The app's own `--settings`, the last one, as the CLI takes it.
    pub settings: Option<OsString>,
    /// Where in the command line flags of ours can stand.
    flags_end: usize,
    /// The CLI is named in it, and what reads our flags is not something else.
    is_cli: bool,
}

/// Flags that take the next word as their value. Others are switches, or carry it behind `=`.
const WITH_VALUE: &[&str] = &[
    "--agent",
    "--agents",
    "--append-system-prompt",
    "--append-system-prompt-file",
    "--autocompact",
    "--debug-file",
    "--effort",
    "--environment",
    "--fallback-model",
    "--input-format",
    "--json-schema",
    "--max-budget-usd",
    "--max-thinking-tokens",
    "--max-turns",
    "--model",
    "--name",
    "--output-format",
    "--permission-mode",
    "--permission-prompt-tool",
    "--permission-prompts",
    "--plugin-dir",
    "--plugin-url",
    "--remote-control-session-name-prefix",
    "--resume-session-at",
    "--session-id",
    "--setting-sources",
    "--settings",
    "--system-prompt",
    "--system-prompt-file",
    "--system-prompt-snapshot",
    "--task-budget",
    "--thinking",
    "-n",
];
/// Flags that take every word up to the next flag.
const WITH_VALUES: &[&str] = &[
    "--add-dir",
    "--allowed-tools",
    "--allowedTools",
    "--betas",
    "--disallowed-tools",
    "--disallowedTools",
    "--file",
    "--mcp-config",
    "--tools",
];
/// Flags that take the next word, unless it is a flag.
const WITH_OPTIONAL_VALUE: &[&str] =
    &["--debug", "--from-pr", "--prompt-suggestions", "--resume", "--teleport", "--worktree", "-d", "-r", "-w"];
/// First words that are commands; any other first word is a prompt, and spends money.
const COMMANDS: &[&str] = &[
    "agents",
    "attach",
    "auth",
    "auto-mode",
    "doctor",
    "gateway",
    "import",
    "install",
    "kill",
    "logs",
    "mcp",
    "migrate-installer",
    "plugin",
    "plugins",
    "project",
    "purge",
    "remote-control",
    "respawn",
    "rm",
    "server",
    "setup-token",
    "stop",
    "ultrareview",
    "update",
    "upgrade",
];
/// Switches that make it detach, go elsewhere, or only print something.
const ELSEWHERE: &[&str] =
    &["-v", "--version", "-h", "--help", "--bg", "--background", "--cloud", "--tmux", "--remote-control", "--remote"];

/// Programs that start another one, which their own arguments name.
const RUNNERS: &[&str] = &[
    "bun",
    "bunx",
    "catatonit",
    "deno",
    "docker",
    "doas",
    "dumb-init",
    "env",
    "gosu",
    "kubectl",
    "nerdctl",
    "nice",
    "node",
    "nodejs",
    "nohup",
    "npm",
    "npx",
    "nsenter",
    "pnpm",
    "podman",
    "runuser",
    "setpriv",
    "setsid",
    "stdbuf",
    "su-exec",
    "sudo",
    "timeout",
    "tini",
    "unshare",
    "yarn",
];

impl Launch {
    /// Reads the whole command line, the program included.
    pub fn of(argv: &[OsString], stdin_tty: bool, stdout_tty: bool) -> Launch {
        let at = cli(argv);
        let from = at.map_or(1, |at| at + 1);
        let words: Vec<&str> = argv.iter().skip(from).map(|word| word.to_str().unwrap_or_default()).collect();
        let (mut settings, mut flags_end) = (None, argv.len());
        let (mut output, mut input, mut first, mut elsewhere) = (None, None, None, false);
        let (mut start, mut resume, mut session, mut max_turns) = (Start::Fresh, None, None, None);
        let mut rest = words.iter().copied().peekable();
        while let Some(word) = rest.next() {
            // Where the word stands in the command line.
            let here = argv.len() - rest.len() - 1;
            if word == "--" {
                // Who the program is nobody knows: it may be a shell that hands on what is behind.
                if at.is_none() {
                    continue;
                }
                flags_end = here;
                first = first.or_else(|| rest.next().map(|_| ""));
                break;
            }
            if !word.starts_with('-') || word == "-" {
                first.get_or_insert(word);
                continue;
            }
            let (flag, mut value) = match word.split_once('=') {
                Some((flag, value)) if flag.starts_with("--") => (flag, Some(value)),
                _ => (word, None),
            };
            if value.is_none() && WITH_VALUE.contains(&flag) {
                value = rest.next();
            } else if value.is_none() && WITH_OPTIONAL_VALUE.contains(&flag) {
                value = rest.next_if(|next| !next.starts_with('-'));
            } else if WITH_VALUES.contains(&flag) {
                value = value.or_else(|| rest.next());
                while rest.next_if(|next| !next.starts_with('-')).is_some() {}
            }
            match flag {
                "--output-format" => output = value,
                "--input-format" => input = value,
                // What is no number is for the CLI to complain about.
                "--max-turns" => max_turns = value.and_then(|turns| turns.parse().ok()),
                "--resume" | "-r" => {
                    resume = value.map(|id| crate::metric::bounded(id, 96).to_owned());
                    start = if start == Start::Fork { Start::Fork } else { Start::Resume };
                }
                "--settings" if value.is_some() => settings = Some(here),
                "--session-id" => session = value.map(|id| crate::metric::bounded(id, 96).to_owned()),
                "--from-pr" if start != Start::Fork => start = Start::Resume,
                "--continue" | "-c" if start != Start::Fork => start = Start::Continue,
                "--fork-session" => start = Start::Fork,
                _ if ELSEWHERE.contains(&flag) => elsewhere = true,
                _ => {}
            }
        }
        let command = at.is_some() && first.is_some_and(|word| COMMANDS.contains(&word));
        let readable = matches!(output, Some("stream-json" | "json")) && !command && !elsewhere;
        let mode = match () {
            () if readable => Mode::Parse { stdin_json: input == Some("stream-json") },
            () if stdin_tty || stdout_tty => Mode::Terminal,
            () => Mode::PassThrough,
        };
        let asks_model = readable || at.is_some() && !command && !elsewhere;
        if !asks_model {
            // `sh -c` continues nothing.
            (start, resume, session, max_turns) = (Start::Fresh, None, None, None);
        }
        let settings = settings.map(|at: usize| after_sign(&argv[at]).unwrap_or_else(|| argv[at + 1].clone()));
        Launch { mode, start, resume, session, max_turns, asks_model, settings, flags_end, is_cli: at.is_some() }
    }

    /// The command line with our ceiling on model round trips: the smaller of the app's and ours, as the last one, which wins.
    pub fn with_max_turns(&self, argv: &[OsString], ours: u64) -> Vec<OsString> {
        // Zero is no limit to the CLI.
        let turns = self.max_turns.filter(|theirs| *theirs > 0).map_or(ours, |theirs| theirs.min(ours));
        self.with(argv, format!("--max-turns={turns}"))
    }

    /// Whether the CLI itself can be given settings by its command line.
    pub fn takes_settings(&self) -> bool {
        self.asks_model && self.is_cli
    }

    /// The command line with settings, as the last ones, which win.
    pub fn with_settings(&self, argv: &[OsString], ours: &str) -> Vec<OsString> {
        self.with(argv, format!("--settings={ours}"))
    }

    /// Behind all flags, none of which takes it for its value, and before what is no flag any more.
    fn with(&self, argv: &[OsString], flag: String) -> Vec<OsString> {
        let mut argv = argv.to_vec();
        argv.insert(self.flags_end.min(argv.len()), flag.into());
        argv
    }
}

/// What stands behind the `=` of a flag, whatever its bytes are.
fn after_sign(word: &OsStr) -> Option<OsString> {
    let bytes = word.as_encoded_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    Some(OsStr::from_bytes(&bytes[at + 1..]).to_owned())
}

/// Where in the command line the CLI stands. A word that is called like it is one only where a program can stand.
fn cli(argv: &[OsString]) -> Option<usize> {
    let program = argv.first()?;
    let name = program.to_str().unwrap_or_default().rsplit('/').next().unwrap_or_default();
    // An image's entry point hands on what it is given.
    let runs = is_cli(program) || RUNNERS.contains(&name) || name.ends_with(".sh") || name.contains("entrypoint");
    if runs { argv.iter().position(|word| is_cli(word)) } else { None }
}

/// Whether a word of the command line is the CLI itself, by its file name.
fn is_cli(word: &OsStr) -> bool {
    let name = word.to_str().unwrap_or_default().rsplit('/').next().unwrap_or_default();
    matches!(
        name,
        "claude"
            | "claude.exe"
            | "claude.sidecar-real"
            | "claude.exe.sidecar-real"
            | "claude.real"
            | "cli.js"
            | "cli.mjs"
            | "@anthropic-ai/claude-code"
            | "claude-code"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(line: &str) -> Launch {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Launch::of(&argv, false, false)
    }

    const STREAM: Mode = Mode::Parse { stdin_json: true };
    const READ: Mode = Mode::Parse { stdin_json: false };

    #[test]
    fn the_command_line_tells_the_mode() {
        for (line, mode, start) in [
            ("claude --output-format stream-json --verbose --input-format stream-json", STREAM, Start::Fresh),
            ("claude --output-format=stream-json --input-format=stream-json --resume=abc", STREAM, Start::Resume),
            ("claude -p hi --output-format json", READ, Start::Fresh),
            ("claude -p hi --output-format stream-json --output-format text", Mode::PassThrough, Start::Fresh),
            ("claude -p hi --output-format text --output-format=json", READ, Start::Fresh),
            ("claude -p hi", Mode::PassThrough, Start::Fresh),
            ("claude --system-prompt --output-format=json -p hi", Mode::PassThrough, Start::Fresh),
            ("claude --continue --fork-session -p --output-format json", READ, Start::Fork),
            ("claude -c --output-format json", READ, Start::Continue),
            ("claude --fork-session -r abc --output-format json", READ, Start::Fork),
            ("claude mcp list --output-format json", Mode::PassThrough, Start::Fresh),
            ("claude -v --output-format stream-json", Mode::PassThrough, Start::Fresh),
            ("claude config list --output-format json", READ, Start::Fresh),
            ("claude --bg --output-format stream-json hi", Mode::PassThrough, Start::Fresh),
            ("node /opt/cli.js --output-format stream-json --input-format stream-json", STREAM, Start::Fresh),
            ("docker exec -i box claude --output-format stream-json", READ, Start::Fresh),
            ("python3 fake.py --output-format stream-json --input-format stream-json", STREAM, Start::Fresh),
            ("sh -c true", Mode::PassThrough, Start::Fresh),
            ("claude -- --output-format=json", Mode::PassThrough, Start::Fresh),
            ("sh /run.sh -- --output-format=json", READ, Start::Fresh),
            ("npx -y -- @anthropic-ai/claude-code -p hi --output-format json", READ, Start::Fresh),
            ("claude --debug mcp -p hi --output-format json", READ, Start::Fresh),
            ("claude --add-dir a stop --output-format json", READ, Start::Fresh),
            ("claude --from-pr 12 -p hi --output-format json", READ, Start::Resume),
            ("claude -r -p hi --output-format json", READ, Start::Resume),
            ("claude kill 3 --output-format json", Mode::PassThrough, Start::Fresh),
            ("claude --autocompact 90000 import --output-format json", Mode::PassThrough, Start::Fresh),
            ("claude --system-prompt-snapshot off mcp list --output-format json", Mode::PassThrough, Start::Fresh),
        ] {
            let launch = launch(line);
            assert_eq!((launch.mode, launch.start), (mode, start), "{line}");
        }
    }

    #[test]
    fn a_terminal_is_handed_over_unless_the_output_is_for_programs() {
        let argv = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(Launch::of(&argv("claude"), true, true).mode, Mode::Terminal);
        assert_eq!(Launch::of(&argv("claude -p hi"), false, true).mode, Mode::Terminal);
        assert_eq!(Launch::of(&argv("claude -p hi --output-format json"), true, true).mode, READ);
    }

    #[test]
    fn the_smaller_ceiling_is_the_last_one() {
        for (line, expected) in [
            ("claude -p hi", "claude -p hi --max-turns=9"),
            ("claude --max-turns 3 -p hi", "claude --max-turns 3 -p hi --max-turns=3"),
            ("claude --max-turns=30 --max-turns=20", "claude --max-turns=30 --max-turns=20 --max-turns=9"),
            ("claude --max-turns=0", "claude --max-turns=0 --max-turns=9"),
            ("claude -p -- hi", "claude -p --max-turns=9 -- hi"),
            ("npx -- claude-code -p hi", "npx -- claude-code -p hi --max-turns=9"),
        ] {
            let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let ours = launch(line).with_max_turns(&argv, 9);
            assert_eq!(ours.join(OsStr::new(" ")), expected, "{line}");
        }
    }

    #[test]
    fn settings_stand_where_no_other_flag_takes_them_and_the_apps_own_are_known() {
        for (line, expected, own) in [
            ("claude -p hi", "claude -p hi --settings=X", None),
            ("claude -p hi --allowedTools Bash Read", "claude -p hi --allowedTools Bash Read --settings=X", None),
            (
                "claude --settings a.json -p --settings=b=c -- hi",
                "claude --settings a.json -p --settings=b=c --settings=X -- hi",
                Some("b=c"),
            ),
            ("claude --append-system-prompt -- -p hi", "claude --append-system-prompt -- -p hi --settings=X", None),
            ("claude --model --settings -p hi", "claude --model --settings -p hi --settings=X", None),
            ("npx -- claude-code --settings {} -p hi", "npx -- claude-code --settings {} -p hi --settings=X", Some("{}")),
        ] {
            let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let launch = launch(line);
            assert!(launch.takes_settings(), "{line}");
            assert_eq!(launch.with_settings(&argv, "X").join(OsStr::new(" ")), expected);
            assert_eq!(launch.settings.as_deref(), own.map(OsStr::new), "{line}");
        }
        for line in ["claude mcp list", "claude -v", "claude update", "sh -c true", "python3 fake.py --output-format json"] {
            assert!(!launch(line).takes_settings(), "{line}");
        }
        let bytes = OsStr::from_bytes(b"/\xff.json");
        let argv = ["claude".into(), "-p".into(), "--settings".into(), bytes.to_owned()];
        assert_eq!(Launch::of(&argv, false, false).settings.as_deref(), Some(bytes));
    }

    #[test]
    fn who_asks_no_model_gets_no_limit() {
        assert!(launch("claude -p hi").asks_model);
        assert!(!launch("claude mcp list").asks_model);
        assert!(!launch("claude -v").asks_model);
        assert!(!launch("sh -c true").asks_model);
        assert!(!launch("ls /home/claude").asks_model);
        assert!(launch("/docker-entrypoint.sh claude -p hi").asks_model);
        assert!(launch("docker exec -i box claude -p hi").asks_model);
        assert_eq!(launch("claude --resume 1234 -p").resume.as_deref(), Some("1234"));
        assert_eq!(launch("claude --resume -p").resume, None);
    }
}
