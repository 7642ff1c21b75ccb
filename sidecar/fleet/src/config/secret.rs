//! What must not be seen, and where it is looked for.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::provider::Secret;

/// A text that does not print.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden(String);

impl Hidden {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Where secrets and programs are looked for: handed in, so that a test has its own.
pub trait Outside: Sync {
    /// `Ok(None)`: it cannot be known here.
    ///
    /// # Errors
    /// What is wrong, in a sentence that says where the secret is, and nothing of what it is.
    fn secret(&self, secret: &Secret) -> Result<Option<Hidden>, String>;

    /// Whether there is such a file, as far as that can be known here.
    fn has_file(&self, _: &Path) -> bool {
        true
    }

    /// Whether there is such a program, as far as that can be known here.
    fn has_program(&self, _: &Path) -> bool {
        true
    }
}

/// This process's environment and its machine's files.
#[derive(Clone, Copy, Debug)]
pub struct Machine;

/// Another machine, on which everything is as it should be.
#[derive(Clone, Copy, Debug)]
pub struct Elsewhere;

impl Outside for Elsewhere {
    fn secret(&self, _: &Secret) -> Result<Option<Hidden>, String> {
        Ok(None)
    }
}

impl Outside for Machine {
    fn secret(&self, secret: &Secret) -> Result<Option<Hidden>, String> {
        match secret {
            Secret::Provider(_) => return Ok(None),
            Secret::File(path) => {
                let mode = std::fs::metadata(path).map_or(0, |about| about.permissions().mode() & 0o777);
                if mode & 0o007 != 0 {
                    return Err(format!("everybody on this machine can get at {} (mode {mode:o})", path.display()));
                }
            }
            Secret::Env(_) | Secret::Given(_) => {}
        }
        Ok(Some(Hidden(secret.read()?.expose().to_owned())))
    }

    fn has_file(&self, path: &Path) -> bool {
        path.is_file()
    }

    fn has_program(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    }
}

pub(crate) fn digest(token: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, token.as_bytes()).as_ref());
    bytes
}

/// Where it is, as it is written.
pub(crate) fn reference(secret: &Secret) -> String {
    match secret {
        Secret::Env(name) => format!("{{ env = {name:?} }}"),
        Secret::File(path) => format!("{{ file = {path:?} }}"),
        Secret::Provider(name) => format!("{{ provider = {name:?} }}"),
        Secret::Given(_) => String::from("(made by the fleet)"),
    }
}

/// `postgres://fleet:…@db/fleet`
pub(crate) fn without_password(url: &str) -> String {
    match password(url) {
        Some(password) => url.replacen(&format!(":{password}@"), ":…@", 1),
        None => url.to_owned(),
    }
}

/// What stands between a user and an `@`.
fn password(url: &str) -> Option<&str> {
    let authority = url.split_once("://")?.1.split(['/', '?', '#']).next()?;
    let password = authority.rsplit_once('@')?.0.split_once(':')?.1;
    (!password.is_empty()).then_some(password)
}

/// Beginnings of keys that their makers gave them so that they are found where they should not be.
const BEGINNINGS: &[&str] = &[
    "sk-",
    "sk_live_",
    "rk_live_",
    "ghp_",
    "gho_",
    "ghs_",
    "github_pat_",
    "glpat-",
    "xoxb-",
    "xoxp-",
    "AKIA",
    "ASIA",
    "AIza",
    "whsec_",
    "e2b_",
    "dtn_",
    "FlyV1 ",
    "fo1_",
    "hf_",
    "npm_",
    "eyJhbGciOi",
    "-----BEGIN ",
];

/// Ends of names of variables that hold keys.
const ENDS: &[&str] = &["_TOKEN", "_KEY", "_SECRET", "_PASSWORD", "_PASSWD", "_CREDENTIALS"];

/// No key is shorter.
const LEAST: usize = 16;

/// Whether this text, by itself, is a key.
pub(crate) fn is_key(text: &str) -> bool {
    text.len() >= LEAST && BEGINNINGS.iter().any(|begin| text.starts_with(begin)) || password(text).is_some()
}

/// Whether this variable holds a key.
pub(crate) fn holds_key(name: &str, value: &str) -> bool {
    let named = ENDS.iter().any(|end| name.to_ascii_uppercase().ends_with(end));
    is_key(value) || named && value.len() >= LEAST && !value.contains(char::is_whitespace) && !value.starts_with(['/', '$'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_how_it_begins_or_what_it_is_called() {
        for (name, value) in [
            ("A", "sk-ant-api03-0123456789"),
            ("A", "postgres://fleet:hunter2@db/fleet"),
            ("API_KEY", "0123456789abcdef"),
            ("db_password", "correct-horse-battery"),
        ] {
            assert!(holds_key(name, value), "{name}={value}");
        }
        for (name, value) in [
            ("A", "skipping is fine here"),
            ("A", "https://collector.example:4318/v1"),
            ("API_KEY", "dummy"),
            ("API_KEY_FILE", "/run/secrets/anthropic"),
            ("SSH_KEY", "/home/agent/.ssh/id_ed25519"),
        ] {
            assert!(!holds_key(name, value), "{name}={value}");
        }
        assert_eq!(without_password("postgres://fleet:hunter2@db/fleet?a=b:c@d"), "postgres://fleet:…@db/fleet?a=b:c@d");
        assert_eq!(without_password("sqlite:///var/lib/f:x@y.db"), "sqlite:///var/lib/f:x@y.db");
    }
}
