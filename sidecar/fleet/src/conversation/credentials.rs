//! What S3 knows us by, as it is now: keys that are found somewhere are read for each request, so that they can be replaced; those of a role are
//! fetched, and again before they end.
//!
//! Where nothing is said they are looked for as AWS's own tools do: in the environment, for a cluster's token (IRSA), from who runs the container (ECS,
//! EKS Pod Identity). Not asked are a machine's metadata service and files in a home.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Response, Url};
use rusty_s3::Credentials;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::s3::word;
use super::{Error, Result, passing};
use crate::provider::Secret;

/// Those that end sooner are fetched anew.
const EARLY: Duration = Duration::from_secs(300);
/// How soon that is tried again, as long as those that are held still hold.
const AGAIN: Duration = Duration::from_secs(10);
/// Who gives them is near, and they are few bytes.
const FETCH: Duration = Duration::from_secs(10);
const ANSWER_MOST: usize = 64 << 10;
/// Where ECS and EKS answer containers, without TLS. To nobody else a token goes like that.
const NEAR: [&str; 3] = ["169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];

/// Where they are from.
#[derive(Clone, Debug, PartialEq)]
pub enum Keys {
    /// They are kept somewhere.
    Kept { access_key: Secret, secret_key: Secret, session_token: Option<Secret> },
    /// Of a role, which is given for a token in a file that somebody renews.
    WebIdentity { role: String, session: String, token: PathBuf, sts: String },
    /// Of who runs the container.
    Container { url: String, token: Option<Secret> },
}

impl Keys {
    /// As the environment says. `None`: nothing.
    ///
    /// # Errors
    /// What is wrong with what it says.
    pub fn of_environment(var: impl Fn(&str) -> Option<String>, region: &str) -> std::result::Result<Option<Self>, String> {
        let var = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let env = |name: &str| Secret::Env(name.to_owned());
        if var("AWS_ACCESS_KEY_ID").is_some() && var("AWS_SECRET_ACCESS_KEY").is_some() {
            let session_token = var("AWS_SESSION_TOKEN").map(|_| env("AWS_SESSION_TOKEN"));
            let (access_key, secret_key) = (env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY"));
            return Ok(Some(Keys::Kept { access_key, secret_key, session_token }));
        }
        if let (Some(role), Some(token)) = (var("AWS_ROLE_ARN"), var("AWS_WEB_IDENTITY_TOKEN_FILE")) {
            let region = var("AWS_REGION").unwrap_or_else(|| region.to_owned());
            let china = if region.starts_with("cn-") { ".cn" } else { "" };
            let sts = var("AWS_ENDPOINT_URL_STS").unwrap_or_else(|| format!("https://sts.{region}.amazonaws.com{china}"));
            let session = var("AWS_ROLE_SESSION_NAME").unwrap_or_else(|| String::from("agent-fleet"));
            let sts = web("AWS_ENDPOINT_URL_STS", &sts, false)?;
            return Ok(Some(Keys::WebIdentity { role, session, token: PathBuf::from(token), sts }));
        }
        let url = match (var("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"), var("AWS_CONTAINER_CREDENTIALS_FULL_URI")) {
            (Some(path), _) if path.starts_with('/') => format!("http://{}{path}", NEAR[0]),
            (Some(_), _) => return Err(String::from("`AWS_CONTAINER_CREDENTIALS_RELATIVE_URI` begins with `/`")),
            (None, Some(url)) => web("AWS_CONTAINER_CREDENTIALS_FULL_URI", &url, true)?,
            (None, None) => return Ok(None),
        };
        let file = var("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").map(|path| Secret::File(PathBuf::from(path)));
        let plain = || var("AWS_CONTAINER_AUTHORIZATION_TOKEN").map(|_| env("AWS_CONTAINER_AUTHORIZATION_TOKEN"));
        Ok(Some(Keys::Container { url, token: file.or_else(plain) }))
    }
}

/// An address that a token can go to: over TLS, or to who is near.
fn web(name: &str, text: &str, near: bool) -> std::result::Result<String, String> {
    let url: Url = text.parse().map_err(|error| format!("`{name}` is no URL: {error}"))?;
    let host = url.host_str().unwrap_or_default();
    let loopback =
        host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    match url.scheme() {
        "https" => Ok(text.to_owned()),
        "http" if loopback || near && NEAR.contains(&host) => Ok(text.to_owned()),
        _ => Err(format!("`{name}` is https://…: in plain text a token goes to nobody but this machine")),
    }
}

/// Credentials that hold now.
pub struct Source {
    keys: Keys,
    client: reqwest::Client,
    /// Held while they are fetched, so that this is done once for all.
    held: Mutex<Option<Held>>,
}

struct Held {
    credentials: Credentials,
    ends: Timestamp,
    /// They could not be fetched anew, which is tried again then.
    again: Option<Instant>,
}

impl Source {
    pub fn new(keys: Keys, client: reqwest::Client) -> Self {
        Self { keys, client, held: Mutex::default() }
    }

    /// # Errors
    /// They cannot be read, or nobody gives them.
    pub async fn now(&self) -> Result<Credentials> {
        let fetch = match &self.keys {
            Keys::Kept { access_key, secret_key, session_token } => return kept(access_key, secret_key, session_token.as_ref()),
            Keys::WebIdentity { .. } | Keys::Container { .. } => self.fetch(),
        };
        let mut held = self.held.lock().await;
        let now = Timestamp::now();
        if let Some(has) = &*held
            && (now + EARLY < has.ends || now < has.ends && has.again.is_some_and(|again| Instant::now() < again))
        {
            return Ok(has.credentials.clone());
        }
        match (fetch.await, &mut *held) {
            (Ok(new), held) => {
                let credentials = new.credentials.clone();
                *held = Some(new);
                Ok(credentials)
            }
            (Err(error), Some(has)) if now < has.ends => {
                tracing::warn!(%error, ends = %has.ends, "credentials for S3 cannot be renewed now: those that there are hold a little longer");
                has.again = Some(Instant::now() + AGAIN);
                Ok(has.credentials.clone())
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Others than those, which are not taken any more: `None` if there are none.
    ///
    /// # Errors
    /// They cannot be read, or nobody gives them.
    pub async fn other(&self, refused: &Credentials) -> Result<Option<Credentials>> {
        {
            let mut held = self.held.lock().await;
            // Somebody else may have been told so before.
            *held = held.take().filter(|has| has.credentials != *refused);
        }
        let now = self.now().await?;
        Ok(Some(now).filter(|now| now != refused))
    }

    async fn fetch(&self) -> Result<Held> {
        let fetched = async {
            match &self.keys {
                Keys::Kept { .. } => unreachable!("they are read"),
                Keys::WebIdentity { role, session, token, sts } => self.assume(role, session, token, sts).await,
                Keys::Container { url, token } => self.of_container(url, token.as_ref()).await,
            }
        };
        let slow = |_| Error::Passing(String::from("who gives credentials for S3 does not answer in time"));
        tokio::time::timeout(FETCH, fetched).await.map_err(slow)?
    }

    async fn assume(&self, role: &str, session: &str, token: &Path, sts: &str) -> Result<Held> {
        let token = read(&Secret::File(token.to_owned()))?;
        let mut form = Url::parse("form:").expect("it is one");
        form.query_pairs_mut()
            .append_pair("Action", "AssumeRoleWithWebIdentity")
            .append_pair("Version", "2011-06-15")
            .append_pair("RoleArn", role)
            .append_pair("RoleSessionName", session)
            .append_pair("WebIdentityToken", &token);
        let form = form.query().unwrap_or_default().to_owned();
        let asked = self.client.post(sts).header("content-type", "application/x-www-form-urlencoded").body(form);
        let (status, said) = text(asked.send().await.map_err(|error| passing("STS does not answer", &error))?).await?;
        if status != 200 {
            let code: String = word(&said, "Code").unwrap_or_default().chars().take(60).collect();
            return Err(Error::Passing(format!("STS gives no credentials: {status} {code}")));
        }
        let found = (word(&said, "AccessKeyId"), word(&said, "SecretAccessKey"), word(&said, "SessionToken"));
        let ends = word(&said, "Expiration").and_then(|ends| ends.parse().ok());
        match (found, ends) {
            ((Some(key), Some(secret), Some(token)), Some(ends)) => {
                Ok(Held { credentials: Credentials::new_with_token(key, secret, token), ends, again: None })
            }
            _ => Err(Error::Passing(String::from("STS gives credentials that cannot be read"))),
        }
    }

    async fn of_container(&self, url: &str, token: Option<&Secret>) -> Result<Held> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Given {
            access_key_id: String,
            secret_access_key: String,
            token: String,
            expiration: Timestamp,
        }
        let mut asked = self.client.get(url).header("accept", "application/json");
        if let Some(token) = token {
            asked = asked.header("authorization", read(token)?);
        }
        let answer =
            asked.send().await.map_err(|error| passing("who gives the container credentials does not answer", &error))?;
        let (status, said) = text(answer).await?;
        if status != 200 {
            return Err(Error::Passing(format!("who gives the container credentials says {status}")));
        }
        let given: Given = serde_json::from_str(&said)
            .map_err(|_| Error::Passing(String::from("who gives the container credentials gives some that cannot be read")))?;
        let credentials = Credentials::new_with_token(given.access_key_id, given.secret_access_key, given.token);
        Ok(Held { credentials, ends: given.expiration, again: None })
    }
}

fn read(secret: &Secret) -> Result<String> {
    let value = secret.read().map_err(|what| Error::Passing(format!("no credentials for S3: {what}")))?;
    Ok(value.expose().to_owned())
}

fn kept(access_key: &Secret, secret_key: &Secret, session_token: Option<&Secret>) -> Result<Credentials> {
    let (key, secret) = (read(access_key)?, read(secret_key)?);
    Ok(match session_token {
        Some(token) => Credentials::new_with_token(key, secret, read(token)?),
        None => Credentials::new(key, secret),
    })
}

async fn text(mut answer: Response) -> Result<(u16, String)> {
    let (status, mut body) = (answer.status().as_u16(), Vec::new());
    let broken = |error: reqwest::Error| passing("who gives credentials for S3 breaks off", &error);
    while let Some(piece) = answer.chunk().await.map_err(broken)? {
        body.extend_from_slice(&piece);
        if body.len() > ANSWER_MOST {
            return Err(Error::Passing(String::from("who gives credentials for S3 says too much")));
        }
    }
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn of(vars: &[(&str, &str)]) -> std::result::Result<Option<Keys>, String> {
        let vars: BTreeMap<&str, &str> = vars.iter().copied().collect();
        Keys::of_environment(|name| vars.get(name).map(|value| (*value).to_owned()), "eu-central-1")
    }

    #[test]
    fn the_environment_says_where_credentials_are_from() {
        let env = |name: &str| Secret::Env(name.to_owned());
        let kept = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "s")];
        let of_kept = |session_token| Keys::Kept {
            access_key: env("AWS_ACCESS_KEY_ID"),
            secret_key: env("AWS_SECRET_ACCESS_KEY"),
            session_token,
        };
        assert_eq!(of(&kept), Ok(Some(of_kept(None))));
        let token = [kept[0], kept[1], ("AWS_SESSION_TOKEN", "t"), ("AWS_ROLE_ARN", "r"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "/t")];
        assert_eq!(of(&token), Ok(Some(of_kept(Some(env("AWS_SESSION_TOKEN"))))));
        for (more, sts) in [
            (None, "https://sts.eu-central-1.amazonaws.com"),
            (Some(("AWS_REGION", "us-west-2")), "https://sts.us-west-2.amazonaws.com"),
            (Some(("AWS_REGION", "cn-north-1")), "https://sts.cn-north-1.amazonaws.com.cn"),
        ] {
            let vars: Vec<_> = token[3..].iter().copied().chain(more).collect();
            let (role, session) = (String::from("r"), String::from("agent-fleet"));
            let wanted = Keys::WebIdentity { role, session, token: PathBuf::from("/t"), sts: sts.to_owned() };
            assert_eq!(of(&vars), Ok(Some(wanted)));
        }
        let container = |url: &str, token| Ok(Some(Keys::Container { url: url.to_owned(), token }));
        assert_eq!(of(&[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/x")]), container("http://169.254.170.2/v2/x", None));
        let full = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials");
        let file = ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/token");
        assert_eq!(of(&[full, file]), container(full.1, Some(Secret::File(PathBuf::from("/token")))));
        for url in ["http://127.0.0.1:8080/c", "http://[::1]/c", "http://[fd00:ec2::23]/c", "https://credentials.example/c"] {
            assert_eq!(of(&[("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)]), container(url, None));
        }
        for url in ["http://credentials.example/c", "http://169.254.169.254/c", "ftp://127.0.0.1/c", "credentials"] {
            assert!(of(&[("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)]).is_err(), "{url}");
        }
        assert!(of(&[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "@example.com/x")]).is_err());
        assert_eq!(of(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", " ")]), Ok(None));
    }
}
