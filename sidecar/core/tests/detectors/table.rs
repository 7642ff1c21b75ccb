//! What the detectors make of the corpus and of the recordings, as a page shows it.

use std::fmt::Write as _;
use std::path::Path;

use agent_sidecar_core::Input;
use agent_sidecar_core::detect::CEILINGS;
use agent_sidecar_core::update::Step;

use crate::corpus::{Label, RUNS};
use crate::stage::{Stage, Told};

pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) label: Label,
    pub(crate) warned: Option<Told>,
    pub(crate) stopped: Option<Told>,
    pub(crate) answers: u64,
}

pub(crate) fn runs() -> Vec<Row> {
    RUNS.iter()
        .map(|(name, label, play)| {
            let mut stage = Stage::default();
            play(&mut stage);
            stage.exit();
            row((*name).to_owned(), *label, &stage)
        })
        .collect()
}

/// The real CLI, recorded: what it was made to do is no circle, however it ended.
pub(crate) fn recordings() -> Vec<Row> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut files: Vec<_> = std::fs::read_dir(data).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|kind| kind == "jsonl") && !path.to_string_lossy().contains(".wire."));
    files.sort();
    files
        .iter()
        .map(|path| {
            let mut stage = Stage::default();
            for line in std::fs::read(path).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
                stage.put(Input::Stdout(line));
            }
            stage.exit();
            row(path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), Label::Healthy, &stage)
        })
        .collect()
}

fn row(name: String, label: Label, stage: &Stage) -> Row {
    // Of several that are right, the one that it is called.
    let of = |step| match label {
        Label::Sick(kind) => stage.told.iter().copied().find(|told| told.step == step && told.kind == kind).or(stage.first(step)),
        Label::Healthy | Label::Unseen(_) => stage.first(step),
    };
    Row { name, label, warned: of(Step::Warn), stopped: of(Step::Interrupt), answers: stage.answers }
}

/// The two tables of docs/detectors.md.
pub(crate) fn page() -> String {
    let (runs, recordings) = (runs(), recordings());
    let mut out = String::new();
    let healthy = || runs.iter().chain(&recordings).filter(|row| row.label == Label::Healthy);
    let wrong = |of: fn(&Row) -> Option<Told>| healthy().filter(|row| of(row).is_some()).count();
    let (warned, stopped) = (wrong(|row| row.warned), wrong(|row| row.stopped));
    let sick = runs.len() + recordings.len() - healthy().count();
    writeln!(
        out,
        "{} healthy runs ({} of them recordings of the real CLI): {warned} warned of, {stopped} stopped. {sick} sick ones:\n",
        healthy().count(),
        recordings.len()
    )
    .ok();
    writeln!(out, "| kind | sick runs | warned of | stopped | recall | precision |\n|---|---|---|---|---|---|").ok();
    let share = |n: usize, of: usize| (100 * n).checked_div(of).map_or_else(|| String::from("–"), |share| format!("{share} %"));
    for (kind, _) in CEILINGS {
        let is = |row: &&Row| matches!(row.label, Label::Sick(k) | Label::Unseen(k) if k == kind);
        let right = |told: Option<Told>| told.is_some_and(|told| told.kind == kind);
        let all = runs.iter().filter(is).count();
        let warned = runs.iter().filter(is).filter(|row| right(row.warned)).count();
        let stopped = runs.iter().filter(is).filter(|row| right(row.stopped)).count();
        let false_stops = healthy().filter(|row| right(row.stopped)).count();
        writeln!(
            out,
            "| `{}` | {all} | {warned} | {stopped} | {} | {} |",
            kind.as_str(),
            share(stopped, all),
            share(stopped, stopped + false_stops)
        )
        .ok();
    }
    writeln!(out, "\n| run | is | warned after | stopped after | of answers |\n|---|---|---|---|---|").ok();
    for row in &runs {
        let label = match row.label {
            Label::Healthy => String::from("healthy"),
            Label::Sick(kind) | Label::Unseen(kind) => format!("`{}`", kind.as_str()),
        };
        let after = |told: Option<Told>| told.map_or_else(|| String::from("–"), |told| told.answers.to_string());
        writeln!(out, "| {} | {label} | {} | {} | {} |", row.name, after(row.warned), after(row.stopped), row.answers).ok();
    }
    out
}

const BEGIN: &str = "<!-- measured: from here on made by `make docs` -->\n\n";

/// The page with its tables as they are to be.
pub(crate) fn renewed(page: &str) -> String {
    let prose = page.split(BEGIN).next().unwrap_or_default();
    format!("{prose}{BEGIN}{}", self::page())
}
