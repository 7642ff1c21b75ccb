//! `explain`, over a ledger that `run` wrote.

use std::path::Path;
use std::process::Command;

use crate::support::*;

fn explain(args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(SIDECAR).arg("explain").args(args).env_clear().output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

fn ledger(dir: &Path, recordings: &[&str]) -> String {
    let file = dir.join("ledger.jsonl").display().to_string();
    for recording in recordings {
        let path = format!("{}/../core/tests/data/{recording}.jsonl", env!("CARGO_MANIFEST_DIR"));
        let mut run = Command::new(SIDECAR);
        run.args(["run", "--listen", "off", "--ledger", &file, "--mode", "shadow", "--max-cost-usd", "0.02", "--"]);
        let out = run.args(["sh", "-c", "cat \"$0\"", &path, "--output-format=stream-json"]).output().unwrap();
        assert_eq!(out.stdout, std::fs::read(&path).unwrap());
    }
    file
}

#[test]
fn a_session_is_explained_from_its_ledger() {
    let dir = scratch("explain");
    let file = ledger(&dir, &["01_basic_text", "08_http500_x3_then_ok"]);
    let (code, out, _) = explain(&["--ledger", &file, "--format", "json", "a403c1ab"]);
    assert_eq!(code, Some(0));
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&told["cost_usd"], &told["turns"][0]["cost_usd"]), (&0.025344.into(), &0.025344.into()));
    assert_eq!((&told["turns"][0]["requests"], &told["tools"]["Bash"]["ok"]), (&3.into(), &2.into()));
    assert_eq!((&told["limits"][0]["limit"], &told["limits"][0]["mode"]), (&"usd".into(), &"shadow".into()));

    let (_, text, _) = explain(&["--ledger", &file, "a403c1ab"]);
    for said in ["$0.025344", "claude-opus-5-5", "where the time went", "Bash", "(shadow only)"] {
        assert!(text.contains(said), "{said} is not in\n{text}");
    }

    let (code, _, error) = explain(&["--ledger", &file]);
    assert!(code == Some(1) && error.contains("2 sessions; name one of a403c1ab"), "{error}");
    let (code, _, error) = explain(&["--ledger", &file, "zzz"]);
    assert!(code == Some(1) && error.contains("no session begins with \"zzz\"; there are a403c1ab"), "{error}");
    let (code, _, error) = explain(&[]);
    assert!(code == Some(1) && error.contains("give --ledger FILE, or set ledger.path"), "{error}");
    let (code, _, error) = explain(&["--ledger", "/dev/null"]);
    assert!(code == Some(1) && error.contains("there is no session in /dev/null"), "{error}");
    let (code, _, error) = explain(&["--ledger", "/no/such/file"]);
    assert!(code == Some(1) && error.contains("/no/such/file"), "{error}");
    std::fs::remove_dir_all(dir).unwrap();
}
