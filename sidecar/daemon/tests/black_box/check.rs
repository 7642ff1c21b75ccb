//! Configurations, right and wrong, and the pages that are made from the tables.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::*;

fn ask(args: &[&str]) -> Output {
    Command::new(SIDECAR).args(args).env_clear().output().unwrap()
}

fn said(out: &Output) -> String {
    String::from_utf8(out.stderr.clone()).unwrap()
}

fn file(name: &str, text: &str) -> PathBuf {
    let path = scratch("check").join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn every_mistake_is_named_at_once_and_nothing_is_started() {
    let path = file("wrong.toml", "[limits]\nmax_turns = 0\nidle_timeout = 600\nmax_cost = 2\n[log]\nformat = \"xml\"\n");
    let path = path.to_str().unwrap();
    let marker = scratch("check").join("started");
    let marker = marker.to_str().unwrap();
    for (args, code) in [
        (&["check", "--config", path, "--mode", "loud"][..], 1),
        (&["run", "--config", path, "--mode", "loud", "--", "touch", marker], 125),
    ] {
        let out = ask(args);
        assert_eq!(out.status.code(), Some(code), "{args:?}");
        let said = said(&out);
        for part in [
            "5 mistakes",
            "wrong.toml:2:13: `limits.max_turns` is zero",
            "wrong.toml:3:16: `limits.idle_timeout` is a duration, not the number `600`; write",
            "wrong.toml:4:1: there is no setting `limits.max_cost`; did you mean `limits.max_cost_usd`?",
            "wrong.toml:6:10: `log.format` is one of text, json",
            "--mode: `limits.mode` is a mode, not `loud`; write off, shadow or enforce",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
    assert!(!Path::new(marker).exists());
}

#[test]
fn an_unreadable_file_hides_no_other_mistake() {
    let out = ask(&["check", "--config", "/no/such/file.toml", "--max-turns", "many"]);
    let said = said(&out);
    assert_eq!(out.status.code(), Some(1));
    assert!(said.contains("/no/such/file.toml:1:1: the file cannot be read") && said.contains("--max-turns:"), "{said}");
}

#[test]
fn each_value_is_printed_with_where_it_came_from() {
    let path = file("right.toml", "[limits]\nmax_turns = 7\nmax_tokens = 10_000\n");
    let out = Command::new(SIDECAR)
        .args(["check", "--print", "--max-cost-usd", "2.50", "--config", path.to_str().unwrap()])
        .env("AGENT_SIDECAR_MAX_TOKENS", "20000")
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", said(&out));
    let printed = String::from_utf8(out.stdout).unwrap();
    let line = |key: &str| -> Vec<String> {
        let line = printed.lines().find(|line| line.split_whitespace().next() == Some(key)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(line("limits.max_turns")[1..], ["7".to_owned(), format!("{}:2:13", path.display())]);
    assert_eq!(line("limits.max_tokens")[1..], ["20000", "AGENT_SIDECAR_MAX_TOKENS"]);
    assert_eq!(line("limits.max_cost_usd")[1..], ["2.50", "--max-cost-usd"]);
    assert_eq!(line("limits.mode")[1..], ["enforce", "default"]);
}

#[test]
fn a_mistyped_flag_is_not_taken_for_the_program() {
    let out = ask(&["run", "--max-turn", "3", "--", "true"]);
    assert_eq!(out.status.code(), Some(125));
    assert!(said(&out).contains("--max-turn"), "{}", said(&out));
    assert_eq!(ask(&["chek"]).status.code(), Some(2));
    assert_eq!(ask(&["--version"]).status.code(), Some(0));
}

#[test]
fn flags_after_the_program_are_its_own() {
    for args in [
        &["run", "--listen", "off", "echo", "--max-turns", "3", "--"][..],
        &["run", "--listen", "off", "--", "echo", "--max-turns", "3", "--"],
    ] {
        assert_eq!(String::from_utf8(ask(args).stdout).unwrap(), "--max-turns 3 --\n");
    }
}

#[test]
fn the_pages_are_up_to_date() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    for (page, args) in [("metrics.md", ["catalog", "--format", "markdown"]), ("settings.md", ["check", "--format", "markdown"])]
    {
        let made = String::from_utf8(ask(&args).stdout).unwrap();
        let kept = std::fs::read_to_string(docs.join(page)).unwrap_or_default();
        assert!(made == kept, "docs/{page} is not what `agent-sidecar {}` says: run `make docs`", args.join(" "));
    }
}

#[test]
fn the_catalog_is_a_list_that_tools_can_read() {
    let out = ask(&["catalog", "--format", "json"]);
    let metrics: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
    assert!(metrics.len() > 50);
    for metric in metrics {
        for key in ["name", "type", "unit", "help"] {
            assert!(metric[key].is_string(), "{metric}");
        }
        assert!(metric["labels"].is_array(), "{metric}");
    }
}

#[test]
fn a_file_that_the_environment_names_is_not_read_and_that_is_said() {
    let path = file("named.toml", "[limits]\nmax_turns = 3\n");
    let out = Command::new(SIDECAR).args(["check"]).env("AGENT_SIDECAR_CONFIG", &path).output().unwrap();
    let expected = "AGENT_SIDECAR_CONFIG: there is no such variable; the file is /etc/agent-sidecar/config.toml; only `--config` names another";
    assert!(out.status.code() == Some(1) && said(&out).contains(expected), "{}", said(&out));
}

#[test]
fn a_time_zone_that_is_none_and_the_setting_of_old_say_what_to_write() {
    let path = file("zone.toml", "[limits]\ntime_zone = \"Berlin\"\nutc_offset = \"+01:00\"\n");
    let path = path.to_str().unwrap();
    let out = Command::new(SIDECAR).args(["check", "--config", path]).env("AGENT_SIDECAR_UTC_OFFSET", "+01:00").output().unwrap();
    let said = said(&out);
    for part in [
        "zone.toml:2:13: `limits.time_zone` is a time zone, not `Berlin`; write a name of the IANA database, like Europe/Berlin",
        "zone.toml:3:1: there is no setting `limits.utc_offset` any more; set `limits.time_zone` instead",
        "AGENT_SIDECAR_UTC_OFFSET: there is no such variable any more; set AGENT_SIDECAR_TIME_ZONE instead",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    for zone in ["America/Argentina/Buenos_Aires", "UTC", "+05:30", "-03:00"] {
        assert_eq!(ask(&["check", "--time-zone", zone]).status.code(), Some(0), "{zone}");
    }
}

#[test]
fn a_variable_that_nothing_reads_is_said_and_refuses_nothing() {
    let dir = Scratch::new("check", "strangers");
    let with = |command: &mut Command| {
        // A typo that is near nothing, and what Kubernetes sets for a service that is called like us.
        command.env("AGENT_SIDECAR_COST_LIMIT_USD", "5.4321").env("AGENT_SIDECAR_SERVICE_HOST", "10.0.0.7");
        command.env("AGENT_SIDECAR_PORT", "tcp://10.0.0.7:9477").env("AGENT_SIDECAR_PORT_9477_TCP_ADDR", "10.0.0.7");
        let out = command.output().unwrap();
        (out.status.code(), said(&out))
    };
    let told = |said: &str| {
        assert!(
            said.contains("AGENT_SIDECAR_COST_LIMIT_USD") && said.contains("the nearest is AGENT_SIDECAR_MAX_COST_USD"),
            "{said}"
        );
        assert!(!said.contains("5.4321") && !said.contains("SERVICE_HOST") && !said.contains("AGENT_SIDECAR_PORT"), "{said}");
    };
    let (code, said) = with(Command::new(SIDECAR).arg("check"));
    assert_eq!(code, Some(0), "{said}");
    told(&said);
    let (code, said) = with(Command::new(SIDECAR).args(["run", "--listen", "off", "--", "sh", "-c", "exit 7"]));
    assert_eq!(code, Some(7), "{said}");
    told(&said);
    assert_eq!(said.matches("WARN").count(), 1, "{said}");
    let (code, said) = with(Command::new(SIDECAR).args(["hub", "--hub", "off"]));
    assert_eq!(code, Some(1), "it has nothing to serve: {said}");
    told(&said);
    // Under the name of the CLI, too.
    script(&dir.join("claude"), "echo '2.1.330 (Claude Code)'; [ \"$1\" = --version ] || exit 7");
    assert!(Command::new(SIDECAR).arg("install").arg(&*dir).output().unwrap().status.success());
    let (code, said) = with(Command::new(dir.join("claude")).args(["-p", "hi"]).env("AGENT_SIDECAR_LISTEN", "off"));
    assert_eq!(code, Some(7), "{said}");
    told(&said);
}
