//! Reads secrets where they are, at the moment they are needed. What is read is in no message: not when it is printed by mistake, and not when
//! it cannot be read.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use super::{Error, Result, Secret, Spec};

/// More is no secret that anybody gives in a variable.
const MOST: u64 = 64 << 10;

/// A secret's value. Who needs it says so.
#[derive(Clone, PartialEq, Eq)]
pub struct Value(String);

impl Value {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

impl Secret {
    /// Its value, now.
    ///
    /// # Errors
    /// A sentence that says where it is not, and nothing of what it is.
    pub fn read(&self) -> std::result::Result<Value, String> {
        match self {
            Secret::Env(name) => {
                let value = std::env::var(name).map_err(|error| match error {
                    std::env::VarError::NotPresent => format!("there is no variable `{name}` in the fleet's environment"),
                    std::env::VarError::NotUnicode(_) => format!("the variable `{name}` is not UTF-8"),
                })?;
                fit(value, || format!("the variable `{name}`"))
            }
            Secret::File(path) => {
                let at = path.display();
                let said = |error: std::io::Error| match error.kind() {
                    std::io::ErrorKind::NotFound => format!("there is no file {at}"),
                    kind => format!("cannot read the secret in {at}: {kind}"),
                };
                // A pipe that nobody writes to would be waited for.
                if !std::fs::metadata(path).map_err(said)?.is_file() {
                    return Err(format!("cannot read the secret in {at}: not a file"));
                }
                let mut bytes = Vec::new();
                std::fs::File::open(path).and_then(|file| file.take(MOST + 1).read_to_end(&mut bytes)).map_err(said)?;
                let mut value = String::from_utf8(bytes).map_err(|_| format!("the secret in {at} is not UTF-8"))?;
                if value.ends_with('\n') {
                    value.pop();
                    if value.ends_with('\r') {
                        value.pop();
                    }
                }
                fit(value, || format!("the secret in {at}"))
            }
            Secret::Given(value) => Ok(value.clone()),
            Secret::Provider(name) => Err(format!("the secret `{name}` is the provider's: it cannot be read")),
        }
    }
}

/// What no environment and no header could carry is found here, where it can be said which it is.
fn fit(value: String, which: impl Fn() -> String) -> std::result::Result<Value, String> {
    let wrong = match &value {
        value if value.is_empty() => "is empty",
        value if value.len() as u64 > MOST => "is longer than 64 KiB",
        value if value.contains('\0') => "has a zero byte in it",
        _ => return Ok(Value(value)),
    };
    Err(format!("{} {wrong}", which()))
}

/// The secrets of a container that are ours to read. Those that the provider keeps are not among them.
///
/// # Errors
/// [`Error::Refused`] for the first that cannot be read: nothing has been created then.
pub fn read_all(provider: &'static str, spec: &Spec) -> Result<BTreeMap<String, Value>> {
    let ours = spec.secrets.iter().filter(|(_, secret)| !matches!(secret, Secret::Provider(_)));
    ours.map(|(name, secret)| match secret.read() {
        Ok(value) => Ok((name.clone(), value)),
        Err(why) => Err(Error::Refused { provider, what: format!("`{name}`: {why}") }),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is removed with the test.
    struct File(std::path::PathBuf);

    impl File {
        fn with(content: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
            std::fs::write(&path, content).unwrap();
            Self(path)
        }

        fn read(&self) -> std::result::Result<Value, String> {
            Secret::File(self.0.clone()).read()
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).unwrap();
        }
    }

    #[test]
    fn a_file_is_a_secret_without_its_last_line_feed() {
        for content in ["s3cret", "s3cret\n", "s3cret\r\n"] {
            assert_eq!(File::with(content.as_bytes()).read().unwrap().expose(), "s3cret");
        }
        assert_eq!(File::with(b" a\nb \n\n").read().unwrap().expose(), " a\nb \n");
    }

    #[test]
    fn what_cannot_be_read_is_said_without_what_it_is() {
        let no_file = Secret::File("/nowhere/token".into()).read().unwrap_err();
        assert_eq!(no_file, "there is no file /nowhere/token");
        let directory = Secret::File(std::env::temp_dir()).read().unwrap_err();
        assert!(directory.contains("not a file"), "{directory}");
        let no_variable = Secret::Env(String::from("AGENT_FLEET_NO_SUCH_VARIABLE")).read().unwrap_err();
        assert!(no_variable.contains("AGENT_FLEET_NO_SUCH_VARIABLE"), "{no_variable}");
        assert!(Secret::Provider(String::from("theirs")).read().is_err());
        for content in [&b""[..], b"\n", b"s3cret\xff", b"s3cret\0", "s3cret".repeat(20_000).as_bytes()] {
            let said = File::with(content).read().unwrap_err();
            assert!(!said.contains("s3cret"), "{said}");
        }
    }

    #[test]
    fn a_variable_is_read_as_it_is() {
        let path = std::env::var("PATH").unwrap();
        assert_eq!(Secret::Env(String::from("PATH")).read().unwrap().expose(), path);
    }

    #[test]
    fn a_value_is_not_printed() {
        let read = File::with(b"s3cret").read().unwrap();
        assert!(!format!("{read:?} {:?}", BTreeMap::from([("TOKEN", read.clone())])).contains("s3cret"));
    }

    #[test]
    fn the_secrets_of_a_container_are_all_there_or_it_is_refused() {
        let file = File::with(b"s3cret\n");
        let mut spec: Spec =
            serde_json::from_value(serde_json::json!({"key": "k", "image": "i", "ttl": {"secs": 60, "nanos": 0}})).unwrap();
        spec.secrets.insert(String::from("A"), Secret::File(file.0.clone()));
        spec.secrets.insert(String::from("B"), Secret::Provider(String::from("theirs")));
        let read = read_all("docker", &spec).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["A"]);
        spec.secrets.insert(String::from("C"), Secret::Env(String::from("AGENT_FLEET_NO_SUCH_VARIABLE")));
        let refused = read_all("docker", &spec).unwrap_err();
        assert!(matches!(&refused, Error::Refused { what, .. } if what.contains("`C`")), "{refused:?}");
        assert!(!refused.to_string().contains("s3cret") && !refused.is_passing());
    }
}
