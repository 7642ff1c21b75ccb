//! `[conversations]`, and the templates whose sessions are put away.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

use super::read::{Reader, Section, Span};
use super::secret::is_key;
use super::value::{count, size, switch, text, time_or_off, web_url};
use super::{Conversations, Hidden, Place, S3, Template};
use crate::conversation::credentials::Keys;
use crate::provider::{Pause, Secret};

/// The one before the last is for whoever finds the last wrong.
const KEEP: usize = 2;
const MAX_SIZE: u64 = 1 << 30;
const REGION: &str = "us-east-1";
const STORES: &str = "write file:///var/lib/agent-fleet/conversations, s3://BUCKET/PREFIX or postgres://USER@HOST/DATABASE";
const KEYS: [&str; 6] = ["endpoint", "region", "path_style", "access_key", "secret_key", "session_token"];

impl<'a> Reader<'a> {
    pub(super) fn conversations(&mut self, mut section: Section<'a>) -> Option<Conversations> {
        let s = &mut section;
        let at = s.at_key("store");
        let store = match s.has("store") {
            Some(DeValue::Table(_)) => {
                self.secret(s, "store").and_then(|secret| self.needed(&secret, "conversations.store", at.clone()))
            }
            Some(_) => self.get(s, "store", text).map(|url| {
                if is_key(&url) {
                    let remedy = "write store = { env = \"…\" } or { file = \"…\" } and put the whole URL there";
                    self.wrong(at.clone(), "`conversations.store` has a password in it", remedy);
                }
                Hidden::new(url)
            }),
            None => {
                self.wrong(s.at.clone(), "[conversations] has no store", STORES);
                s.known.push("store");
                None
            }
        };
        let keep = self.get(s, "keep", count).map_or(KEEP, |keep| usize::try_from(keep).unwrap_or(usize::MAX));
        let keep_for: Option<Duration> = self.get(s, "keep_for", time_or_off).flatten();
        let max_size = self.get(s, "max_size", size).unwrap_or(MAX_SIZE);
        let spool = self.get(s, "spool", text).map_or_else(std::env::temp_dir, PathBuf::from);
        let url = store.as_ref().map(Hidden::reveal).unwrap_or_default().to_owned();
        let s3 = url.strip_prefix("s3://").map(|rest| self.s3(&mut section, rest));
        if s3.is_none() {
            let foreign: Vec<&'static str> = KEYS.into_iter().filter(|key| section.has(key).is_some()).collect();
            for key in foreign {
                section.known.push(key);
                self.wrong(section.at_key(key), format!("`conversations.{key}` is for S3 alone"), "remove it");
            }
        }
        self.finish(section);
        let place = match s3 {
            Some(s3) => Place::S3(s3?),
            None if url.starts_with("file:///") => Place::Directory(PathBuf::from(&url["file://".len()..])),
            None if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                match crate::conversation::postgres::check(&url) {
                    Ok(_) => Place::Postgres(Hidden::new(url)),
                    Err(what) => {
                        self.wrong(at, format!("`conversations.store`: {what}"), STORES);
                        return None;
                    }
                }
            }
            None => {
                if store.is_some() {
                    self.wrong(at, "`conversations.store` is the URL of a directory, of a bucket or of PostgreSQL", STORES);
                }
                return None;
            }
        };
        Some(Conversations { place, keep, keep_for, max_size, spool })
    }

    fn s3(&mut self, s: &mut Section<'a>, rest: &str) -> Option<S3> {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            self.wrong(s.at_key("store"), "`conversations.store` names no bucket", "write s3://BUCKET/PREFIX");
        }
        let region = self.get(s, "region", text).unwrap_or_else(|| REGION.to_owned());
        let endpoint = self.get(s, "endpoint", web_url);
        // Of those that have none of their own, each bucket has a name.
        let path_style = self.get(s, "path_style", switch).unwrap_or(endpoint.is_some());
        let endpoint = endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let keys = self.keys(s, &region);
        let (bucket, prefix) = (bucket.to_owned(), prefix.trim_matches('/').to_owned());
        (!bucket.is_empty()).then_some(())?;
        Some(S3 { bucket, prefix, endpoint, region, path_style, keys: keys? })
    }

    /// As they are named; where none is, as AWS's own tools would find them.
    fn keys(&mut self, s: &mut Section<'a>, region: &str) -> Option<Keys> {
        if ["access_key", "secret_key", "session_token"].into_iter().any(|key| s.has(key).is_some()) {
            let access_key = self.key(s, "access_key", "conversations.access_key", true);
            let secret_key = self.key(s, "secret_key", "conversations.secret_key", true);
            let session_token = self.key(s, "session_token", "conversations.session_token", false);
            return Some(Keys::Kept { access_key: access_key?, secret_key: secret_key?, session_token });
        }
        let env = |name: &str| Secret::Env(name.to_owned());
        let from = self.outside;
        let outside = |name: &str| from.secret(&env(name));
        if matches!(outside("AWS_ACCESS_KEY_ID"), Ok(None)) {
            // Of another machine's environment nothing is known.
            let (access_key, secret_key) = (env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY"));
            return Some(Keys::Kept { access_key, secret_key, session_token: None });
        }
        let found = Keys::of_environment(|name| Some(outside(name).ok()??.reveal().to_owned()), region);
        let remedy =
            "add access_key and secret_key, each as { env = \"…\" } or { file = \"…\" }, or run it where AWS gives it a role";
        match found {
            Ok(Some(keys)) => return Some(keys),
            Ok(None) => self.wrong(
                s.at.clone(),
                "`conversations.access_key` is missing, and the environment names no credentials",
                remedy,
            ),
            Err(what) => {
                self.wrong(s.at.clone(), format!("[conversations] has no `access_key`, and of the environment {what}"), remedy)
            }
        }
        None
    }

    /// Where it is, if it can be read: it may be another later.
    fn key(&mut self, s: &mut Section<'a>, key: &'static str, name: &str, needed: bool) -> Option<Secret> {
        let at = s.at_key(key);
        if needed && s.has(key).is_none() {
            self.wrong(
                s.at.clone(),
                format!("`{name}` is missing"),
                format!("add {key} = {{ env = \"…\" }} or {{ file = \"…\" }}"),
            );
        }
        let secret = self.secret(s, key)?;
        self.needed(&secret, name, at);
        Some(secret)
    }

    /// A secret that the fleet itself needs. On another machine it is there, whatever it is.
    pub(super) fn needed(&mut self, secret: &Secret, key: &str, at: Span) -> Option<Hidden> {
        if matches!(secret, Secret::Provider(_)) {
            self.wrong(at, format!("`{key}` is needed here, not in a container"), "name a variable or a file");
            return None;
        }
        self.outside(secret, key, at)
    }

    /// Templates that want what is not there.
    pub(super) fn archives(&mut self, root: &Section<'a>, templates: &BTreeMap<String, Template>, stored: bool) {
        for template in templates.values().filter(|template| template.archive) {
            let Some(DeValue::Table(all)) = root.has("templates") else { continue };
            let at = all.get(template.name.as_str()).map_or(0..0, toml::Spanned::span);
            let name = &template.name;
            if !stored && root.has("conversations").is_none() {
                let remedy = "add [conversations] with store = \"…\", or leave `archive` out";
                self.wrong(
                    at.clone(),
                    format!("`templates.{name}.archive`: there is no [conversations] to put anything into"),
                    remedy,
                );
            }
            let Some(can) = self.can.get(&template.provider) else { continue };
            // Which would pause all that are in it, where several are.
            let (endpoint, env, memory) = (can.endpoint, can.env, can.pause == Pause::Memory && template.shared.is_none());
            if memory {
                let what = format!(
                    "`templates.{name}.archive`: `{}` pauses containers with all that is in them, for less",
                    template.provider
                );
                self.wrong(at, what, "leave `archive` out");
            } else if !endpoint {
                let what = format!("`templates.{name}.archive`: no port of a container is reached at `{}`", template.provider);
                self.wrong(at, what, "leave `archive` out, or take another provider");
            } else if !env {
                let what = format!(
                    "`templates.{name}.archive`: `{}` gives a container no environment, by which its sidecar is told whom to hand the conversation to",
                    template.provider
                );
                self.wrong(at, what, "leave `archive` out, or take another provider");
            }
        }
    }
}
