//! `demo`, with a CLI that answers by itself.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::*;

/// Says with its first answer where it would put its own files, and whether it may.
const CLI: &str = r#"#!/bin/sh
echo '{"type":"system","subtype":"init","session_id":"s","model":"claude-opus-5-5"}'
touch "$CLAUDE_CODE_TMPDIR/mine" && where=$CLAUDE_CODE_TMPDIR
while read -r line; do
  case $line in *'"type":"user"'*) ;; *) continue ;; esac
  echo '{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.01,"result":"'"$where"'"}'
done
"#;

#[test]
fn it_shares_no_file_with_other_agents_of_the_machine() {
    let dir = scratch("demo");
    let cli = dir.join("claude");
    std::fs::write(&cli, CLI).unwrap();
    std::fs::set_permissions(&cli, std::fs::Permissions::from_mode(0o755)).unwrap();
    let out = Command::new(SIDECAR).args(["demo", "--cli"]).arg(&cli).env("TMPDIR", &dir).output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(said.matches(&format!("< {}/agent-sidecar-demo-", dir.display())).count(), 3, "{said}");
    assert!(said.contains("The bill, from the ledger file:") && said.contains("container"), "{said}");
}
