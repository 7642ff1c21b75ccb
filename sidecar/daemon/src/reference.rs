//! The pages that are made from the tables: metrics and settings, for people and for checks.

use std::io::{self, Write};

use agent_sidecar_core::metric::CATALOG;

use crate::config::{Config, Origin, SETTINGS, variable};

/// Every metric, as the contract that dashboards and alerts are checked against.
pub(crate) fn metrics_json(out: &mut impl Write) -> io::Result<()> {
    let metrics: Vec<serde_json::Value> = CATALOG
        .iter()
        .map(|metric| {
            serde_json::json!({
                "name": metric.name,
                "type": metric.kind.as_str(),
                "unit": metric.unit.as_str(),
                "labels": metric.labels,
                "merge": metric.merge.as_str(),
                "help": metric.help,
                "buckets": metric.buckets,
            })
        })
        .collect();
    serde_json::to_writer_pretty(&mut *out, &metrics)?;
    writeln!(out)
}

/// The same as a page.
pub(crate) fn metrics_page(out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "# Metrics\n\nMade by `make docs` from the catalogue in `sidecar/core/src/metric.rs`.\n")?;
    writeln!(
        out,
        "`claude_agent_*` is the agent, `agent_sidecar_*` the sidecar itself. A label never holds a session, a user or a path;"
    )?;
    writeln!(out, "`model`, `tool`, `server` and others that agents choose take a bounded number of values, then `other`.\n")?;
    writeln!(
        out,
        "Several wrappers in a container are served as one. `together` says what their series with the same labels make: the sum, the"
    )?;
    writeln!(out, "largest, the smallest, or what the newest reading says, where all of them look at the same thing.\n")?;
    writeln!(out, "| metric | type | labels | together | meaning |\n|---|---|---|---|---|")?;
    for metric in CATALOG {
        let labels = if metric.labels.is_empty() { String::from("–") } else { metric.labels.join(", ") };
        writeln!(
            out,
            "| `{}` | {} | {labels} | {} | {} |",
            metric.name,
            metric.kind.as_str(),
            metric.merge.as_str(),
            metric.help
        )?;
    }
    Ok(())
}

/// The settings, as a page.
pub(crate) fn settings(out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "# Settings\n\nMade by `make docs` from the table in `sidecar/daemon/src/config/table.rs`.\n")?;
    writeln!(
        out,
        "A later source wins: default, file, environment, flag. `agent-sidecar check --print` shows what is in force and why."
    )?;
    writeln!(
        out,
        "A variable `AGENT_SIDECAR_*` that is no setting is a mistake where it is near one, and otherwise a warning of `check`, `doctor` and the log; what Kubernetes sets for a service called `agent-sidecar` is neither.\n"
    )?;
    writeln!(
        out,
        "Limits are unset by default, but those on loops, which only say what they would do; `off` unsets one again. `[limits.modes]` sets the mode of one limit: `max_cost_usd = \"shadow\"`.\n"
    )?;
    writeln!(out, "| in the file | flag | environment | takes | default | |\n|---|---|---|---|---|---|")?;
    for setting in SETTINGS {
        let default = if setting.default.is_empty() { String::from("–") } else { format!("`{}`", setting.default) };
        writeln!(
            out,
            "| `{}` | `--{}` | `{}` | {} | {default} | {} |",
            setting.key,
            setting.flag,
            variable(setting),
            setting.kind.name(),
            setting.help
        )?;
    }
    writeln!(out, "\nPrices of one's own, in dollars for a million tokens:\n")?;
    writeln!(
        out,
        "```toml\n[prices]\ndiscount = 0.8                                # of every list price\nfallback = {{ input = 5, output = 25 }}         # models that nobody prices\n\n[[prices.model]]\nname = \"house-model\"\nfrom = \"2026-12-01\"                            # from this day on, UTC\ninput = 1.0\noutput = 4.0                                  # cache prices follow the usual proportions unless they are said\n\n[[prices.model]]\nname = \"claude-opus-5-5\"\ndiscount = 0.7\n```"
    )
}

/// Each value in force, and where it came from.
pub(crate) fn effective(config: &Config, out: &mut impl Write) -> io::Result<()> {
    for (setting, effective) in config.effective() {
        let value = if effective.value.is_none() { "(unset)" } else { effective.text.as_str() };
        writeln!(out, "{:<32} {value:<24} {}", setting.key, effective.origin)?;
    }
    for (name, mode, origin) in config.modes() {
        writeln!(out, "{:<32} {:<24} {origin}", format!("limits.modes.{name}"), mode.as_str())?;
    }
    debug_assert!(
        config.effective().all(|(setting, effective)| effective.origin != Origin::Default || effective.text == setting.default)
    );
    Ok(())
}
