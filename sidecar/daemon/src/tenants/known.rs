//! Asks the sources of [`agent_sidecar_core::who`]: the environment, the downward API's files, the command line.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use agent_sidecar_core::who::{Learn, Mask, Name, Sources, Surroundings, Who};

use crate::config::Config;
use crate::export::otlp::resource;

/// Of a file of the downward API. Kubernetes allows 256 KiB of annotations.
const FILE: u64 = 1024 * 1024;

/// For whom the agent with this command line works, and what the app is still to say about it.
pub(crate) fn find(config: &Config, argv: &[OsString], hears_app: bool) -> (Who, Learn) {
    let sources: Vec<(Name, Sources)> =
        Name::ALL.iter().filter_map(|name| Some((*name, config.sources_of(*name)?.clone()))).collect();
    let mask = config.user_hash().map(|key| Mask { key, hash });
    let (who, learn) = asked(config, argv, |at| Learn::begin(&config.fixed_who(), &sources, mask, at));
    // Nobody says anything where we do not listen.
    (who, if hears_app { learn } else { Learn::default() })
}

/// The names that were to be read from somewhere, and are not known.
pub(crate) fn silent(config: &Config, who: &Who) -> Vec<Name> {
    let wanted = Name::ALL.iter().copied().filter(|name| config.sources_of(*name).is_some());
    wanted.filter(|name| who.get(*name).is_none()).collect()
}

/// What one list of sources says of this process.
pub(super) fn first(config: &Config, argv: &[OsString], sources: &Sources) -> Option<String> {
    asked(config, argv, |at| sources.ask(at))
}

fn asked<T>(config: &Config, argv: &[OsString], ask: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    let args: Vec<&str> = argv.iter().skip(1).map(|word| word.to_str().unwrap_or_default()).collect();
    let [labels, annotations] = config.pod_files();
    ask(&Surroundings {
        env: &|name| std::env::var(name).ok(),
        pod_labels: &|| text(&labels),
        pod_annotations: &|| text(&annotations),
        resource: &|name| resource::declared(name, &std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default()),
        args: &args,
        cwd: &cwd,
    })
}

fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// As the app called it, if that is where we are: behind a link it has another name.
fn cwd() -> String {
    let here = std::env::current_dir().unwrap_or_default();
    let called = std::env::var("PWD").ok().filter(|called| {
        let place = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
        Path::new(called).is_absolute() && place(Path::new(called)) == place(Path::new("."))
    });
    called.unwrap_or_else(|| here.display().to_string())
}

/// HMAC-SHA-256. Without a key it only saves people from being read, and not from being guessed.
fn hash(key: &[u8], user: &str) -> String {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
    super::hex(ring::hmac::sign(&key, user.as_bytes()).as_ref())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_users_hash_is_the_one_that_others_compute() {
        // printf anna | openssl dgst -sha256 -hmac key
        assert_eq!(super::hash(b"key", "anna"), "d27d461c645c7ca868ae8aca573e224c");
        assert_ne!(super::hash(b"", "anna"), super::hash(b"key", "anna"));
    }
}
