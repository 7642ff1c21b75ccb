//! The hooks that the CLI is started with where agents share a budget, so that it asks us before it asks the model, from the first
//! message on: put to the `--settings` of its command line, with what the app says there itself.
//!
//! The CLI adds them to those of its settings files, and leaves them out, as all others, with `--bare`, with `disableAllHooks` and where
//! a policy forbids them: then nothing asks, and the agent is interrupted as it was.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::{Map, Value};

use crate::files;

/// One word of a command line may be 128 KiB; nobody else should come near to that for us.
const LONGEST: usize = 96 * 1024;
/// What a file may say that must not be read by others on a command line, or means something else in another place.
const STAYS: [&str; 3] = ["env", "permissions", "sandbox"];

/// Why the app's own settings are left as they are.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Left {
    #[error("they are no JSON that has hooks as others have them")]
    Strange,
    #[error("their file cannot be read")]
    Unread(#[source] std::io::Error),
    #[error("their file has `{0}`, which is to stay in it")]
    Stays(&'static str),
    #[error("they are too long")]
    Long,
}

/// The settings for the CLI, which is started in that directory.
pub(crate) fn settings(given: Option<&OsStr>, ours: Value, cwd: Option<&Path>) -> Result<String, Left> {
    let mut settings = given.map_or(Ok(Map::new()), |given| read(given, cwd))?;
    let Value::Object(ours) = ours else { return Err(Left::Strange) };
    let hooks = settings.entry("hooks").or_insert_with(|| Value::Object(Map::new())).as_object_mut().ok_or(Left::Strange)?;
    for (event, hook) in ours {
        let all = hooks.entry(event).or_insert_with(|| Value::Array(Vec::new())).as_array_mut().ok_or(Left::Strange)?;
        all.extend(hook.as_array().into_iter().flatten().cloned());
    }
    let text = Value::Object(settings).to_string();
    if text.len() > LONGEST { Err(Left::Long) } else { Ok(text) }
}

/// As the CLI reads it: JSON if it looks like an object, and else a file.
fn read(given: &OsStr, cwd: Option<&Path>) -> Result<Map<String, Value>, Left> {
    let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).map_err(|_| Left::Strange);
    if let Some(text) = given.to_str().map(str::trim).filter(|text| text.starts_with('{') && text.ends_with('}')) {
        return object(text);
    }
    let path = cwd.map_or_else(|| given.into(), |cwd| cwd.join(given));
    let settings = object(&files::read_linked(&path).map_err(Left::Unread)?)?;
    match STAYS.into_iter().find(|key| settings.contains_key(*key)) {
        Some(key) => Err(Left::Stays(key)),
        None => Ok(settings),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ours() -> Value {
        json!({"PostToolBatch": ["our"], "UserPromptSubmit": ["our"]})
    }

    fn merged(given: &str) -> Result<Value, Left> {
        settings(Some(OsStr::new(given)), ours(), None).map(|text| serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn what_the_app_has_set_goes_on_working() {
        assert_eq!(serde_json::from_str::<Value>(&settings(None, ours(), None).unwrap()).unwrap(), json!({"hooks": ours()}));
        assert_eq!(
            merged(r#" {"model":"opus","env":{"A":"b"},"hooks":{"PostToolBatch":["its"],"Stop":["its"]}} "#).unwrap(),
            json!({
                "model": "opus",
                "env": {"A": "b"},
                "hooks": {"PostToolBatch": ["its", "our"], "Stop": ["its"], "UserPromptSubmit": ["our"]},
            })
        );
    }

    #[test]
    fn what_is_not_understood_is_left_alone() {
        for given in [r#"{"hooks":7}"#, r#"{"hooks":{"PostToolBatch":{}}}"#, "{no json}", r#"{"hooks":null}"#] {
            assert!(matches!(merged(given), Err(Left::Strange)), "{given}");
        }
        let long = format!(r#"{{"a":"{}"}}"#, "x".repeat(LONGEST));
        assert!(matches!(merged(&long), Err(Left::Long)));
        assert!(matches!(merged("/no/such.json"), Err(Left::Unread(_))));
    }

    #[test]
    fn a_file_is_read_where_the_cli_runs_and_no_secret_of_it_is_told() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-hooks-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("a.json"), r#"{"model":"opus"}"#).unwrap();
        std::fs::write(dir.join("b.json"), r#"{"env":{"KEY":"secret"}}"#).unwrap();
        let of = |name: &str| settings(Some(OsStr::new(name)), ours(), Some(&dir));
        assert!(of("a.json").unwrap().contains("opus"));
        assert!(matches!(of("b.json"), Err(Left::Stays("env"))));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
