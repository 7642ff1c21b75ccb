//! How the cluster is asked: the paths and media types of its interface, one rule of trying again, and what an answer means.
//!
//! Everything here can be sent twice: what is created has a name of ours, so that the second time finds the first.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use futures_util::{Stream, StreamExt};
use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube_client::client::{Body, ConfigExt};
use kube_client::config::{Config, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube_client::{Client, Error as ClientError};
use reqwest::Url;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Mutex;
use tower::{BoxError, ServiceBuilder, ServiceExt};

use super::NAME;
use crate::provider::{Error, Result, rest};
use crate::retry_after;

const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Who says that we shall come back later than this is told to the caller, and not waited for.
const PAUSE_MOST: Duration = Duration::from_secs(4);
const CALL: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(10);
/// A page of a hundred pods with all that their managers note is a quarter of this.
const ANSWER_MOST: usize = 16 << 20;
const WORDS_MOST: usize = 400;
/// By whom a pod knows the API server.
const CLUSTER_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

pub(super) const JSON: &str = "application/json";
pub(super) const MERGE_PATCH: &str = "application/merge-patch+json";

/// What is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Pods,
    Jobs,
    Sandboxes,
    Secrets,
    Claims,
    WarmPools,
    Templates,
    Events,
}

impl Kind {
    fn path(self, namespace: &str) -> Vec<&str> {
        let extensions: &[&str] = &["apis", "extensions.agents.x-k8s.io", "v1beta1"];
        let (group, plural): (&[&str], _) = match self {
            Kind::Pods => (&["api", "v1"], "pods"),
            Kind::Jobs => (&["apis", "batch", "v1"], "jobs"),
            Kind::Secrets => (&["api", "v1"], "secrets"),
            Kind::Events => (&["api", "v1"], "events"),
            Kind::Sandboxes => (&["apis", "agents.x-k8s.io", "v1beta1"], "sandboxes"),
            Kind::Claims => (extensions, "sandboxclaims"),
            Kind::WarmPools => (extensions, "sandboxwarmpools"),
            Kind::Templates => (extensions, "sandboxtemplates"),
        };
        group.iter().copied().chain(["namespaces", namespace, plural]).collect()
    }
}

/// Where the cluster is, and who asks it.
pub(super) struct Api {
    kubeconfig: Option<PathBuf>,
    context: Option<String>,
    namespace: Option<String>,
    held: Mutex<Option<Reached>>,
}

pub(super) type Opened<T> = std::result::Result<T, ClientError>;

#[derive(Clone)]
pub(super) struct Reached {
    pub(super) client: Client,
    pub(super) namespace: String,
    /// When what that was read from had been written.
    written: Option<SystemTime>,
}

impl Api {
    /// Touches nothing: the cluster may come later.
    pub(super) fn new(kubeconfig: Option<PathBuf>, context: Option<String>, namespace: Option<String>) -> Self {
        Self { kubeconfig, context, namespace, held: Mutex::default() }
    }

    pub(super) async fn reached(&self) -> Result<Reached> {
        let mut held = self.held.lock().await;
        if let Some(reached) = &*held {
            return Ok(reached.clone());
        }
        let made = self.connect().await.map_err(|what| Error::Failed { provider: NAME, what })?;
        Ok(held.insert(made).clone())
    }

    fn written(&self) -> Option<SystemTime> {
        let at = self.kubeconfig.as_deref().unwrap_or(Path::new(CLUSTER_CA));
        std::fs::metadata(at).and_then(|file| file.modified()).ok()
    }

    /// Who cannot be reached may be elsewhere by now, or have another certificate.
    async fn doubt(&self, reached: &Reached) {
        if self.written() != reached.written {
            self.forget().await;
        }
    }

    /// Who is not known any more may be by what is in the file now.
    async fn forget(&self) {
        *self.held.lock().await = None;
    }

    /// Opens what goes on for long; with what is in the file now, if nobody knows us by what was.
    pub(super) async fn open<T, F>(&self, open: impl Fn(Reached) -> F) -> Result<Opened<T>>
    where
        F: Future<Output = Result<Opened<T>>>,
    {
        let unknown = |opened: &Opened<T>| matches!(opened, Err(ClientError::Api(said)) if said.code == 401);
        let reached = self.reached().await?;
        let first = open(reached.clone()).await?;
        let lost = matches!(&first, Err(error) if !matches!(error, ClientError::Api(_)));
        let changed = lost && self.written() != reached.written;
        if !unknown(&first) && !changed {
            return Ok(first);
        }
        self.forget().await;
        let second = open(self.reached().await?).await?;
        if unknown(&second) {
            self.forget().await;
        }
        Ok(second)
    }

    async fn connect(&self) -> std::result::Result<Reached, String> {
        let written = self.written();
        let config = match &self.kubeconfig {
            Some(path) => {
                let at = path.display();
                let read = Kubeconfig::read_from(path).map_err(|error| format!("the kubeconfig {at}: {}", unreadable(&error)))?;
                let proxied = read.clusters.iter().any(|one| one.cluster.as_ref().is_some_and(|one| one.proxy_url.is_some()));
                if proxied {
                    return Err(format!("the kubeconfig {at} has a `proxy-url`, and proxies are not spoken to"));
                }
                let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
                let config = Config::from_custom_kubeconfig(read, &options).await;
                config.map_err(|error| format!("the kubeconfig {at}: {}", unreadable(&error)))?
            }
            None => Config::incluster().map_err(|error| {
                format!("no `kubeconfig` is named, and there is no service account of a pod here: {}", said(&error))
            })?,
        };
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = client(&config, &namespace).map_err(|error| told(&error))?;
        Ok(Reached { client, namespace, written })
    }

    pub(super) fn ask<'a>(&'a self, method: Method, kind: Kind, path: &[&'a str]) -> Ask<'a> {
        Ask { api: self, method, kind, path: path.to_vec(), query: Vec::new(), body: None, hide: Vec::new() }
    }

    pub(super) fn get<'a>(&'a self, kind: Kind, path: &[&'a str]) -> Ask<'a> {
        self.ask(Method::GET, kind, path)
    }
}

/// As kube-client makes it, but for what it says: with it each failed request would be an error in our log.
fn client(config: &Config, namespace: &str) -> std::result::Result<Client, ClientError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_nodelay(true);
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .service(http.map_err(BoxError::from));
    Ok(Client::new(service, namespace))
}

/// Of what is wrong in a kubeconfig only that which is no part of it: there are keys in it.
fn unreadable(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::ReadConfig(error, _) => error.kind().to_string(),
        KubeconfigError::CurrentContextNotSet => String::from("it has no current context: name one with `context`"),
        KubeconfigError::LoadContext(name) => format!("it has no context `{name}`"),
        KubeconfigError::LoadClusterOfContext(name) => format!("it has no cluster `{name}`"),
        _ => String::from("it is none that can be used"),
    }
}

/// With its causes.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            write!(text, ": {more}").expect("a string has room");
        }
        cause = error.source();
    }
    text
}

/// What a client says, without what a program that gives credentials has printed.
pub(super) fn told(error: &ClientError) -> String {
    match error {
        ClientError::Auth(kube_client::client::AuthError::AuthExecStart(error)) => {
            format!("the program that gives credentials does not start: {}", error.kind())
        }
        ClientError::Auth(_) => String::from("no credentials can be had"),
        other => cut(&said(other)),
    }
}

pub(super) fn cut(text: &str) -> String {
    let words: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS_MOST).collect();
    words.trim().to_owned()
}

/// A request that can be sent more than once.
pub(super) struct Ask<'a> {
    api: &'a Api,
    method: Method,
    kind: Kind,
    /// Below the kind: a name, and what of it.
    path: Vec<&'a str>,
    query: Vec<(&'static str, String)>,
    body: Option<(&'static str, Vec<u8>)>,
    hide: Vec<String>,
}

impl<'a> Ask<'a> {
    pub(super) fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    pub(super) fn body(mut self, kind: &'static str, body: &Value) -> Self {
        self.body = Some((kind, body.to_string().into_bytes()));
        self
    }

    /// Values that are in no message.
    pub(super) fn hide(mut self, secrets: impl IntoIterator<Item = String>) -> Self {
        self.hide.extend(secrets);
        self
    }

    /// What is sent, below the server's own address.
    pub(super) fn request<B>(&self, namespace: &str, body: B) -> Result<Request<B>> {
        let mut url = Url::parse("http://cluster").expect("it is one");
        let segments = self.kind.path(namespace);
        url.path_segments_mut().expect("it has a path").extend(segments).extend(&self.path);
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        let at = url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        let mut request = Request::builder().method(self.method.clone()).uri(at).header(ACCEPT, "application/json, */*");
        if let Some((kind, _)) = &self.body {
            request = request.header(CONTENT_TYPE, *kind);
        }
        request.body(body).map_err(|error| Error::Refused { provider: NAME, what: format!("it cannot be asked for: {error}") })
    }

    async fn open(&self, reached: &Reached) -> Result<axum::http::Response<Body>> {
        let body = self.body.as_ref().map_or_else(Vec::new, |(_, body)| body.clone());
        let request = self.request(&reached.namespace, Body::from(body))?;
        match reached.client.send(request).await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                self.api.doubt(reached).await;
                Err(self.lost(&told(&error)))
            }
        }
    }

    /// Whoever has not heard an answer does not know.
    fn lost(&self, what: &str) -> Error {
        let what = what.to_owned();
        match self.method {
            Method::GET => Error::Failed { provider: NAME, what },
            _ => Error::Unsure { provider: NAME, what },
        }
    }

    async fn once(&self, reached: &Reached) -> Result<Answer> {
        let response = self.open(reached).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut pieces = response.into_body().into_data_stream();
        let mut body = Vec::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| self.lost(&said(&error)))?;
            if body.len() + piece.len() > ANSWER_MOST {
                return Err(self.lost(&format!("an answer of more than {ANSWER_MOST} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(self.answer(status, &headers, body))
    }

    fn answer(&self, status: StatusCode, headers: &HeaderMap, body: Vec<u8>) -> Answer {
        let after = retry_after::of(headers, SystemTime::now());
        let said: Status = serde_json::from_slice(&body).unwrap_or_default();
        let said = if said.kind == "Status" { said } else { Status::default() };
        let after = after.or_else(|| said.details.retry_after_seconds.map(Duration::from_secs));
        Answer { status, after, said, body, asked: self.method == Method::GET, hide: self.hide.clone() }
    }

    /// The answer, whatever it says, but for those that are worth trying again and those that say nothing.
    pub(super) async fn send(self) -> Result<Answer> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let reached = self.api.reached().await?;
            let done = tokio::time::timeout(CALL, self.once(&reached)).await;
            let (error, after) = match done.unwrap_or_else(|_| Err(self.lost("no answer in time"))) {
                Ok(answer) if answer.status == StatusCode::UNAUTHORIZED => {
                    self.api.forget().await;
                    (answer.into_error(), None)
                }
                Ok(answer) if answer.status == StatusCode::TOO_MANY_REQUESTS || answer.status.is_server_error() => {
                    let after = answer.after;
                    (answer.into_error(), after)
                }
                Ok(answer) => return Ok(answer),
                Err(error) if error.is_passing() => (error, None),
                Err(error) => return Err(error),
            };
            let wait = after.map_or(pause, |after| after.max(pause));
            if attempt == TRIES || wait > PAUSE_MOST {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MOST);
        }
        unreachable!("the last try returns")
    }

    async fn begun(&self) -> Result<axum::http::Response<Body>> {
        let reached = self.api.reached().await?;
        let opened = tokio::time::timeout(CALL, self.open(&reached)).await;
        opened.unwrap_or_else(|_| Err(self.lost("no answer in time")))
    }

    /// An answer that comes piece by piece. It is sent once, or twice where we are not known any more, and its beginning is waited for.
    pub(super) async fn stream(self) -> Result<impl Stream<Item = Result<Vec<u8>>> + Send + use<>> {
        let mut response = self.begun().await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.api.forget().await;
            response = self.begun().await?;
        }
        if !response.status().is_success() {
            let (status, headers) = (response.status(), response.headers().clone());
            if status == StatusCode::UNAUTHORIZED {
                self.api.forget().await;
            }
            let body = tokio::time::timeout(CALL, response.into_body().collect_bytes()).await;
            let body = body.ok().and_then(std::result::Result::ok).map(|body| body.to_vec()).unwrap_or_default();
            return Err(self.answer(status, &headers, body).into_error());
        }
        Ok(response.into_body().into_data_stream().map(|piece| match piece {
            Ok(piece) => Ok(piece.to_vec()),
            Err(error) => Err(Error::Failed { provider: NAME, what: cut(&said(&error)) }),
        }))
    }
}

/// What the API server says beside a status.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Status {
    kind: String,
    pub(super) status: String,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) details: Details,
    metadata: ListMeta,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Details {
    /// Of what it is about.
    kind: String,
    pub(super) causes: Vec<Cause>,
    retry_after_seconds: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cause {
    pub(super) reason: String,
    pub(super) message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ListMeta {
    pub(super) resource_version: String,
    pub(super) r#continue: String,
}

pub(super) struct Answer {
    pub(super) status: StatusCode,
    after: Option<Duration>,
    pub(super) said: Status,
    pub(super) body: Vec<u8>,
    /// It was only asked.
    asked: bool,
    hide: Vec<String>,
}

impl Answer {
    /// By the API server's own word: a proxy's 404, and that there is no such kind or namespace, are something else.
    pub(super) fn is_missing(&self) -> bool {
        self.status == StatusCode::NOT_FOUND && self.said.reason == "NotFound" && self.said.details.kind != "namespaces"
    }

    /// There is something of this name already.
    pub(super) fn exists(&self) -> bool {
        self.status == StatusCode::CONFLICT && self.said.reason == "AlreadyExists"
    }

    /// We may not ask for that.
    pub(super) fn is_no_right(&self) -> bool {
        self.status == StatusCode::FORBIDDEN && is_no_right(&self.said.message)
    }

    /// Where a list goes on that took so long that it is not the same list any more.
    pub(super) fn goes_on(&self) -> Option<&str> {
        Some(self.said.metadata.r#continue.as_str()).filter(|more| self.status == StatusCode::GONE && !more.is_empty())
    }

    /// Itself, if it is a yes.
    pub(super) fn ok(self) -> Result<Self> {
        if self.status.is_success() { Ok(self) } else { Err(self.into_error()) }
    }

    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        let read = serde_json::from_slice(&self.body).map(rest::without_nulls);
        read.and_then(serde_json::from_value).map_err(|error| {
            let what = format!("an answer of another shape: {error}");
            if self.asked { Error::Failed { provider: NAME, what } } else { Error::Unsure { provider: NAME, what } }
        })
    }

    /// What this no means.
    pub(super) fn into_error(self) -> Error {
        let (provider, mut what) = (NAME, self.words());
        if is_no_right(&self.said.message) {
            what += RIGHTS;
        }
        match self.status.as_u16() {
            _ if self.is_missing() => Error::Missing { provider },
            429 => Error::Busy { provider, after: self.after },
            // Credentials change, and so do quotas and what is in the way.
            401 | 408 | 409 | 410 => Error::Failed { provider, what },
            // A quota that was made a moment ago has not been counted yet.
            403 if ["exceeded quota", "status unknown for quota"].iter().any(|full| self.said.message.contains(full)) => {
                Error::Failed { provider, what }
            }
            404 if self.said.reason != "NotFound" => Error::Refused {
                provider,
                what: format!("{what} (is it the API server's address, and are the custom resources installed?)"),
            },
            500.. if self.asked => Error::Failed { provider, what },
            500.. => Error::Unsure { provider, what },
            _ => Error::Refused { provider, what },
        }
    }

    /// The API server's words, without a secret.
    fn words(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        let mut words = if self.said.message.is_empty() { text.into_owned() } else { self.said.message.clone() };
        for secret in self.hide.iter().filter(|secret| !secret.is_empty()) {
            words = words.replace(secret.as_str(), "[secret]");
        }
        let (status, words) = (self.status.as_u16(), cut(&words));
        if words.is_empty() { format!("it answers {status}") } else { format!("it answers {status}: {words}") }
    }
}

/// What is told to who may not ask for that, beside the API server's words, which name verb and resource.
pub(super) const RIGHTS: &str = " (deploy/fleet/kubernetes/rbac.yaml has all that the fleet has to be granted)";

/// By the words of whoever grants rights: others who say 403 mean what is asked for.
pub(super) fn is_no_right(message: &str) -> bool {
    message.contains(" is forbidden: User ") && message.contains(" cannot ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, reason: &str, message: &str, kind: &str) -> Answer {
        let body = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "message": message,
            "details": {"kind": kind, "retryAfterSeconds": 7}});
        let api = Api::new(None, None, None);
        let ask = api.ask(Method::POST, Kind::Pods, &[]).hide([String::from("s3cret")]);
        ask.answer(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body.to_string().into_bytes())
    }

    #[test]
    fn what_can_be_done_about_a_no_is_in_the_error() {
        let quota = r#"pods "a" is forbidden: exceeded quota: agents, requested: limits.cpu=1, used: limits.cpu=4, limited: limits.cpu=4"#;
        let name = |error: &Error| match error {
            Error::Busy { .. } => "busy",
            Error::Unsure { .. } => "unsure",
            Error::Failed { .. } => "failed",
            Error::Refused { .. } => "refused",
            Error::Missing { .. } => "missing",
            Error::Unsupported { .. } => "unsupported",
        };
        let new = r#"pods "a" is forbidden: status unknown for quota: agents, resources: limits.cpu"#;
        for (status, reason, message, kind, expected) in [
            (404, "NotFound", r#"pods "a" not found"#, "pods", "missing"),
            (404, "NotFound", r#"namespaces "agents" not found"#, "namespaces", "refused"),
            (404, "", "404 page not found", "", "refused"),
            (403, "Forbidden", quota, "pods", "failed"),
            (403, "Forbidden", new, "pods", "failed"),
            (403, "Forbidden", r#"pods is forbidden: User "x" cannot create resource "pods""#, "pods", "refused"),
            (400, "BadRequest", r#"admission webhook "policy.example" denied the request: no"#, "", "refused"),
            (422, "Invalid", "spec.containers: Required value", "pods", "refused"),
            (409, "Conflict", "the object has been modified", "pods", "failed"),
            (401, "Unauthorized", "Unauthorized", "", "failed"),
            (410, "Expired", "too old resource version", "", "failed"),
            (429, "TooManyRequests", "too many requests", "", "busy"),
            (500, "InternalError", "failed calling webhook", "", "unsure"),
        ] {
            let error = answer(status, reason, message, kind).into_error();
            assert_eq!(name(&error), expected, "{error}");
            if !matches!(error, Error::Missing { .. } | Error::Busy { .. }) {
                assert!(error.to_string().contains(&message[..10]), "{error}");
            }
        }
        let right = r#"pods "a" is forbidden: User "x" cannot delete resource "pods" in API group "" in the namespace "agents""#;
        let said = |message| answer(403, "Forbidden", message, "pods").into_error().to_string();
        assert!(said(right).contains(right) && said(right).ends_with("rbac.yaml has all that the fleet has to be granted)"));
        assert!(!said(quota).contains("rbac.yaml"), "{}", said(quota));
        let busy = answer(429, "TooManyRequests", "", "").into_error();
        assert!(matches!(busy, Error::Busy { after: Some(after), .. } if after == Duration::from_secs(7)), "{busy:?}");
        let said = answer(422, "Invalid", "the value s3cret\nis wrong", "secrets").into_error().to_string();
        assert_eq!(said, "kubernetes: it answers 422: the value [secret] is wrong");
    }

    #[test]
    fn what_is_null_is_not_there() {
        let api = Api::new(None, None, None);
        let said = r#"{"metadata":{"continue":null,"resourceVersion":"7"},"items":null}"#;
        let answer = api.get(Kind::Pods, &[]).answer(StatusCode::OK, &HeaderMap::new(), said.into());
        let list: super::super::state::List<Value> = answer.json().unwrap();
        assert_eq!((list.items.len(), list.metadata.resource_version.as_str()), (0, "7"));
    }

    #[test]
    fn paths_are_the_clusters_and_a_name_is_no_path() {
        let api = Api::new(None, None, None);
        let at = |ask: Ask| ask.request("agents", ()).unwrap().uri().to_string();
        assert_eq!(
            at(api.get(Kind::Pods, &["a", "log"]).query("tailLines", "3")),
            "/api/v1/namespaces/agents/pods/a/log?tailLines=3"
        );
        assert_eq!(at(api.get(Kind::Sandboxes, &["a"])), "/apis/agents.x-k8s.io/v1beta1/namespaces/agents/sandboxes/a");
        assert_eq!(at(api.get(Kind::Jobs, &["a"])), "/apis/batch/v1/namespaces/agents/jobs/a");
        assert_eq!(at(api.get(Kind::Pods, &["../x?y"])), "/api/v1/namespaces/agents/pods/..%2Fx%3Fy");
        assert_eq!(
            at(api.get(Kind::Pods, &[]).query("labelSelector", "a.b=c,d=e f")),
            "/api/v1/namespaces/agents/pods?labelSelector=a.b%3Dc%2Cd%3De+f"
        );
    }

    #[tokio::test]
    async fn a_kubeconfig_that_is_wrong_is_said_without_what_is_in_it() {
        let path = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
        let try_with = |text: &str, context: Option<&str>| {
            std::fs::write(&path, text).unwrap();
            Api::new(Some(path.clone()), context.map(String::from), None)
        };
        let good = "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\n\
                    users: [{name: u, user: {token: s3cret}}]\ncontexts: [{name: x, context: {cluster: c, user: u, namespace: agents}}]\n";
        let reached = try_with(good, Some("x")).reached().await.unwrap();
        assert_eq!(reached.namespace, "agents");
        for (text, context, says) in [
            (good, None, "no current context"),
            (good, Some("y"), "no context `y`"),
            ("clusters: [{name: c, cluster: {server: s3cret", None, "none that can be used"),
            ("clusters: [{name: c, cluster: {server: 'https://x', proxy-url: 'http://p'}}]\n", None, "proxy-url"),
        ] {
            let error = try_with(text, context).reached().await.err().unwrap();
            let said = error.to_string();
            assert!(error.is_passing() && said.contains(says) && !said.contains("s3cret"), "{said}");
        }
        std::fs::remove_file(&path).unwrap();
        let said = Api::new(Some(path), None, None).reached().await.err().unwrap().to_string();
        assert!(said.contains("not found"), "{said}");
    }
}
