//! What each shelf of conversations promises, of each: a directory, a bucket behind a server that checks every signature, and PostgreSQL where
//! `AGENT_FLEET_TEST_POSTGRES` has the URL of a server. And that a conversation comes back as it was, or not at all.

#![expect(clippy::unwrap_used, reason = "what fails here is a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::build;
use agent_fleet::conversation::credentials::Keys;
use agent_fleet::conversation::directory::Directory;
use agent_fleet::conversation::postgres::Postgres;
use agent_fleet::conversation::s3::S3;
use agent_fleet::conversation::{Conversations, Error, Shelf};
use agent_fleet::lifecycle::Phase;
use agent_fleet::provider::secret::Value;
use agent_fleet::provider::{Endpoint, Secret, Spec};
use agent_fleet::session::{Pattern, Session};
use agent_fleet::store;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use ring::{digest, hmac};

const KEY: &str = "AKIDEXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("agent-fleet-shelves-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A bucket in memory.
#[derive(Default)]
struct Bucket {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    uploads: Mutex<BTreeMap<String, BTreeMap<u32, Vec<u8>>>>,
    /// Of each upload: of what, and when it was begun.
    begun: Mutex<BTreeMap<String, (String, Timestamp)>>,
    /// The next part is refused.
    breaks: Mutex<bool>,
    gone: Mutex<bool>,
    /// Who is known, by key: with which secret and token.
    known: Mutex<BTreeMap<String, (String, Option<String>)>>,
    /// Tokens that hold no longer.
    over: Mutex<BTreeSet<String>>,
    refused: AtomicUsize,
}

impl Bucket {
    fn new() -> Arc<Self> {
        let known = Mutex::new(BTreeMap::from([(KEY.to_owned(), (SECRET.to_owned(), None))]));
        Arc::new(Self { known, ..Self::default() })
    }

    /// Whether this request was signed with a key that is known and holds: what is said if not.
    fn judge(&self, method: &Method, path: &str, query: &str, host: &str) -> Result<(), &'static str> {
        let get = |name: &str| {
            let pair = query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
            pair.map(|(_, value)| decoded(value))
        };
        let key = get("X-Amz-Credential").unwrap_or_default().split('/').next().unwrap_or_default().to_owned();
        let known = self.known.lock().unwrap();
        let Some((secret, token)) = known.get(&key) else { return Err("InvalidAccessKeyId") };
        if !is_signed(method, path, query, host, (&key, secret)) {
            return Err("SignatureDoesNotMatch");
        }
        let given = get("X-Amz-Security-Token");
        if given.as_ref().is_some_and(|given| self.over.lock().unwrap().contains(given)) {
            return Err("ExpiredToken");
        }
        if given == *token { Ok(()) } else { Err("InvalidToken") }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sign(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

/// Signature version 4 in a query, as its specification says it: whether this request was signed with the key, and when it ends.
fn is_signed(method: &Method, path: &str, query: &str, host: &str, (key, secret): (&str, &str)) -> bool {
    let mut pairs: Vec<(&str, &str)> = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
    let get = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()).unwrap_or_default();
    let (given, date, scope) = (get("X-Amz-Signature"), get("X-Amz-Date"), get("X-Amz-Credential").replace("%2F", "/"));
    let Some(scope) = scope.strip_prefix(&format!("{key}/")).map(str::to_owned) else { return false };
    let parts: Vec<&str> = scope.split('/').collect();
    let [day, region, "s3", "aws4_request"] = parts[..] else { return false };
    if get("X-Amz-SignedHeaders") != "host" || region != "eu-north-7" || !date.starts_with(day) {
        return false;
    }
    pairs.retain(|(key, _)| *key != "X-Amz-Signature");
    pairs.sort_unstable();
    let query: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let canonical = format!("{method}\n{path}\n{}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD", query.join("&"));
    let hash = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{hash}");
    let key = [day, region, "s3", "aws4_request"].iter().fold(format!("AWS4{secret}").into_bytes(), |key, part| sign(&key, part));
    hex(&sign(&key, &text)) == given
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex = |byte: Option<u8>| char::from(byte.unwrap()).to_digit(16).unwrap() as u8;
        bytes.push(if byte == b'%' { hex(rest.next()) << 4 | hex(rest.next()) } else { byte });
    }
    String::from_utf8(bytes).unwrap()
}

async fn s3(State(bucket): State<Arc<Bucket>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
    let host = parts.headers["host"].to_str().unwrap();
    if *bucket.gone.lock().unwrap() {
        return (StatusCode::NOT_FOUND, "<Error><Code>NoSuchBucket</Code></Error>").into_response();
    }
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
    if let Err(code) = bucket.judge(&parts.method, &path, &query, host) {
        bucket.refused.fetch_add(1, Relaxed);
        return (StatusCode::FORBIDDEN, format!("<Error><Code>{code}</Code></Error>")).into_response();
    }
    let key = decoded(path.strip_prefix("/bucket").unwrap().trim_start_matches('/'));
    let asked: BTreeMap<String, String> = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(k, v)| (k.to_owned(), decoded(v)))
        .collect();
    let xmlns = "xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";
    match (parts.method.as_str(), asked.get("uploadId")) {
        ("GET", _) if asked.contains_key("uploads") => {
            assert_eq!(path, "/bucket/", "a list is the bucket's");
            let (uploads, begun) = (bucket.uploads.lock().unwrap(), bucket.begun.lock().unwrap());
            let of = |id: &String| begun[id].clone();
            let mut all: Vec<(String, &String)> = uploads.keys().map(|id| (of(id).0, id)).collect();
            all.sort();
            let mark = |name: &str| asked.get(name).cloned().unwrap_or_default();
            let after = (mark("key-marker"), mark("upload-id-marker"));
            all.retain(|(key, id)| key.starts_with(&asked["prefix"]) && (key.clone(), (*id).clone()) > after);
            let more = all.len() > 2;
            all.truncate(2);
            let one = |(key, id): &(String, &String)| {
                let at = of(id).1;
                format!("<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{at}</Initiated></Upload>")
            };
            let marks = all.last().filter(|_| more).map_or_else(String::new, |(key, id)| {
                format!("<NextKeyMarker>{key}</NextKeyMarker><NextUploadIdMarker>{id}</NextUploadIdMarker>")
            });
            let uploads: String = all.iter().map(one).collect();
            format!("<ListMultipartUploadsResult {xmlns}><Bucket>bucket</Bucket><KeyMarker></KeyMarker>{marks}<IsTruncated>{more}</IsTruncated>{uploads}</ListMultipartUploadsResult>")
                .into_response()
        }
        ("GET", _) if asked.contains_key("list-type") => {
            let objects = bucket.objects.lock().unwrap();
            let (prefix, after) = (&asked["prefix"], asked.get("continuation-token").cloned().unwrap_or_default());
            let all: Vec<&String> = objects.keys().filter(|key| key.starts_with(prefix.as_str()) && **key > after).collect();
            let page = &all[..all.len().min(2)];
            let one = |key: &&String| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
            // The last is an empty one with some.
            let next = if all.len() > 2 { page[1].as_str() } else { "" };
            let next = format!("<NextContinuationToken>{next}</NextContinuationToken>");
            let more = all.len() > 2;
            let contents: String = page.iter().map(one).collect();
            format!("<ListBucketResult {xmlns}><IsTruncated>{more}</IsTruncated>{contents}{next}</ListBucketResult>")
                .into_response()
        }
        ("GET", _) => match bucket.objects.lock().unwrap().get(&key) {
            Some(bytes) => bytes.clone().into_response(),
            None => (StatusCode::NOT_FOUND, "<Error><Code>NoSuchKey</Code></Error>").into_response(),
        },
        ("POST", None) => {
            let mut uploads = bucket.uploads.lock().unwrap();
            let id = format!("upload-{}", uploads.len());
            uploads.insert(id.clone(), BTreeMap::new());
            bucket.begun.lock().unwrap().insert(id.clone(), (key.clone(), Timestamp::now()));
            format!("<InitiateMultipartUploadResult {xmlns}><Bucket>bucket</Bucket><Key>{key}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>")
                .into_response()
        }
        ("PUT", Some(_)) if std::mem::take(&mut *bucket.breaks.lock().unwrap()) => {
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
        ("PUT", Some(id)) => {
            let number: u32 = asked["partNumber"].parse().unwrap();
            bucket.uploads.lock().unwrap().get_mut(id).unwrap().insert(number, body.to_vec());
            [("etag", format!("\"part-{number}\""))].into_response()
        }
        ("POST", Some(id)) => {
            let parts = bucket.uploads.lock().unwrap().remove(id).unwrap();
            let said = String::from_utf8(body.to_vec()).unwrap();
            assert!(parts.keys().all(|n| said.contains(&format!("part-{n}"))), "{said}");
            bucket.objects.lock().unwrap().insert(key, parts.into_values().flatten().collect());
            format!("<CompleteMultipartUploadResult {xmlns}><ETag>\"whole\"</ETag></CompleteMultipartUploadResult>")
                .into_response()
        }
        ("DELETE", Some(id)) => {
            bucket.uploads.lock().unwrap().remove(id);
            StatusCode::NO_CONTENT.into_response()
        }
        ("PUT", None) => {
            bucket.objects.lock().unwrap().insert(key, body.to_vec());
            StatusCode::OK.into_response()
        }
        ("DELETE", None) => {
            bucket.objects.lock().unwrap().remove(&key);
            StatusCode::NO_CONTENT.into_response()
        }
        other => panic!("{other:?}"),
    }
}

async fn served(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}")
}

async fn bucket(bucket: &Arc<Bucket>, secret: &str) -> S3 {
    let given = |text: &str| Secret::Given(Value::new(text.to_owned()));
    with(bucket, Keys::Kept { access_key: given(KEY), secret_key: given(secret), session_token: None }).await
}

async fn with(bucket: &Arc<Bucket>, keys: Keys) -> S3 {
    let url = served(Router::new().fallback(s3).with_state(Arc::clone(bucket))).await;
    S3::new(&url, true, ("bucket", "some/where"), "eu-north-7", keys, build::client().unwrap()).unwrap()
}

/// What every one of them does.
async fn keeps(shelf: &dyn Shelf, scratch: &Scratch, fleet: &str) {
    // Of more than one part, and no multiple of any.
    let large: Vec<u8> = (0..(17_u32 << 20) + 7).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let names: Vec<String> = (0..5).map(|n| format!("{fleet}/a_Session-1/{n:04}-x.tar.gz")).collect();
    for (n, name) in names.iter().enumerate() {
        let bytes = if n == 3 { &large[..] } else { name.as_bytes() };
        let file = scratch.file("in", bytes);
        shelf.put(name, &file).await.unwrap();
        // The same once more: its answer was lost.
        shelf.put(name, &file).await.unwrap();
    }
    let other = format!("{fleet}/a_Session-10/0000-x.tar.gz");
    shelf.put(&other, &scratch.file("in", b"")).await.unwrap();
    assert_eq!(shelf.list(&format!("{fleet}/a_Session-1/")).await.unwrap(), names);
    assert_eq!(shelf.list(&format!("{fleet}/")).await.unwrap().len(), 6);
    assert_eq!(shelf.list(&format!("{fleet}/nobody/")).await.unwrap(), Vec::<String>::new());
    for (name, bytes) in [(&names[3], &large[..]), (&names[0], names[0].as_bytes()), (&other, b"")] {
        let to = scratch.0.join("out");
        shelf.get(name, &to).await.unwrap();
        assert!(std::fs::read(&to).unwrap() == bytes, "{name}");
        std::fs::remove_file(to).unwrap();
    }
    for name in names.iter().chain([&other]) {
        shelf.delete(name).await.unwrap();
        shelf.delete(name).await.unwrap();
        let gone = shelf.get(name, &scratch.0.join("none")).await;
        assert!(matches!(gone, Err(Error::Lasting(_))), "{gone:?}");
        std::fs::remove_file(scratch.0.join("none")).ok();
    }
    assert_eq!(shelf.list(&format!("{fleet}/")).await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_directory_keeps_conversations() {
    let scratch = Scratch::new();
    let root = scratch.0.join("shelf");
    keeps(&Directory::new(root.clone()), &scratch, "fleet").await;
    let left: Vec<_> = std::fs::read_dir(root.join("fleet")).unwrap().collect();
    let away = Directory::new(scratch.0.join("not-mounted")).get("fleet/s/1", &scratch.0.join("none")).await;
    assert!(matches!(away, Err(Error::Passing(_))), "what should be mounted is not, {away:?}");
    assert!(left.is_empty(), "directories of sessions that have nothing: {left:?}");
}

/// What is put beneath a mount that is missing is gone when it is there again.
#[tokio::test]
async fn nothing_is_put_where_what_was_put_away_is_not_seen() {
    let scratch = Scratch::new();
    let (root, file) = (scratch.0.join("mount/shelf"), scratch.file("in", b"x"));
    let shelf = Directory::new(root.clone());
    shelf.put("fleet/a/1", &file).await.unwrap();
    // It is not mounted any more: the place is there, and empty.
    std::fs::rename(scratch.0.join("mount"), scratch.0.join("away")).unwrap();
    std::fs::create_dir(scratch.0.join("mount")).unwrap();
    let begun_anew = Directory::new(root.clone());
    begun_anew.expects();
    for shelf in [&shelf, &begun_anew] {
        let refused = shelf.put("fleet/a/2", &file).await;
        assert!(matches!(&refused, Err(Error::Passing(what)) if what.contains("mounted")), "{refused:?}");
    }
    assert!(!root.exists(), "its root is made beneath");
    std::fs::remove_dir(scratch.0.join("mount")).unwrap();
    std::fs::rename(scratch.0.join("away"), scratch.0.join("mount")).unwrap();
    begun_anew.put("fleet/a/2", &file).await.unwrap();
    assert_eq!(begun_anew.list("fleet/a/").await.unwrap(), ["fleet/a/1", "fleet/a/2"]);
}

#[tokio::test]
async fn a_bucket_keeps_conversations_for_who_signs_with_its_key() {
    let (scratch, kept) = (Scratch::new(), Bucket::new());
    let shelf = bucket(&kept, SECRET).await;
    keeps(&shelf, &scratch, "fleet").await;
    assert!(kept.uploads.lock().unwrap().is_empty());
    // What breaks off is not there, and is not paid for.
    *kept.breaks.lock().unwrap() = true;
    let large = scratch.file("in", &vec![1; 20 << 20]);
    assert!(matches!(shelf.put("fleet/s/1", &large).await, Err(Error::Passing(_))));
    assert!(kept.uploads.lock().unwrap().is_empty() && kept.objects.lock().unwrap().is_empty());
    shelf.put("fleet/s/1", &large).await.unwrap();
    assert_eq!(kept.objects.lock().unwrap().keys().collect::<Vec<_>>(), ["some/where/fleet/s/1"]);
    // Its bucket is not there: that is mended, and then it is.
    *kept.gone.lock().unwrap() = true;
    let away = shelf.get("fleet/s/1", &scratch.0.join("out")).await;
    assert!(matches!(away, Err(Error::Passing(_))), "{away:?}");
    *kept.gone.lock().unwrap() = false;
    let stranger = bucket(&kept, "another").await;
    let refused = stranger.list("fleet/").await.unwrap_err().to_string();
    assert!(refused.contains("403 SignatureDoesNotMatch") && !refused.contains("another"), "{refused}");
}

/// Gives credentials, each time others, to who has the token of the file: as STS does, or as who runs a container.
struct Giver {
    bucket: Arc<Bucket>,
    given: AtomicUsize,
    /// What is to be said of how long they hold.
    seconds: Mutex<i64>,
    token: Mutex<String>,
    away: AtomicBool,
}

impl Giver {
    async fn start(bucket: &Arc<Bucket>) -> (Arc<Self>, String) {
        let (given, away) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (seconds, token) = (Mutex::new(3600), Mutex::new(String::from("first&token")));
        let giver = Arc::new(Self { bucket: Arc::clone(bucket), given, seconds, token, away });
        let url = served(Router::new().fallback(give).with_state(Arc::clone(&giver))).await;
        (giver, url)
    }

    fn given(&self) -> usize {
        self.given.load(Relaxed)
    }

    /// Those that were given last do not hold any more, whatever was said of them.
    fn ends(&self) {
        self.bucket.over.lock().unwrap().insert(format!("token-{}=/+", self.given()));
    }
}

async fn give(State(giver): State<Arc<Giver>>, method: Method, headers: HeaderMap, body: String) -> Response {
    let token = giver.token.lock().unwrap().clone();
    let sts = method == Method::POST;
    let form: BTreeMap<String, String> =
        body.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), decoded(v))).collect();
    let right = match sts {
        true => {
            let asked = |name: &str| form.get(name).map(String::as_str);
            let wanted = [
                ("Action", "AssumeRoleWithWebIdentity"),
                ("Version", "2011-06-15"),
                ("RoleArn", "arn:aws:iam::1:role/a"),
                ("RoleSessionName", "fleet"),
            ];
            wanted.iter().all(|(name, value)| asked(name) == Some(value)) && asked("WebIdentityToken") == Some(&token)
        }
        false => headers.get("authorization").is_some_and(|said| said.as_bytes() == token.as_bytes()),
    };
    if giver.away.load(Relaxed) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if !right {
        return (StatusCode::BAD_REQUEST, "<ErrorResponse><Error><Code>InvalidIdentityToken</Code></Error></ErrorResponse>")
            .into_response();
    }
    let n = giver.given.fetch_add(1, Relaxed) + 1;
    let (key, secret, token) = (format!("ASIA{n}"), format!("secret/{n}"), format!("token-{n}=/+"));
    giver.bucket.known.lock().unwrap().insert(key.clone(), (secret.clone(), Some(token.clone())));
    let ends = Timestamp::now() + jiff::SignedDuration::from_secs(*giver.seconds.lock().unwrap());
    if sts {
        return format!(
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><SessionToken>{token}</SessionToken>\
             <SecretAccessKey>{secret}</SecretAccessKey><Expiration>{ends}</Expiration><AccessKeyId>{key}</AccessKeyId></Credentials>\
             </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        .into_response();
    }
    let given =
        serde_json::json!({ "AccessKeyId": key, "SecretAccessKey": secret, "Token": token, "Expiration": ends.to_string() });
    axum::Json(given).into_response()
}

#[tokio::test]
async fn credentials_of_a_role_are_fetched_before_they_end_and_once_more_when_they_have() {
    for sts in [true, false] {
        let (scratch, kept) = (Scratch::new(), Bucket::new());
        let (giver, url) = Giver::start(&kept).await;
        let file = scratch.file("token", b"first&token\n");
        let keys = match sts {
            true => {
                let (role, session) = (String::from("arn:aws:iam::1:role/a"), String::from("fleet"));
                Keys::WebIdentity { role, session, token: file.clone(), sts: url }
            }
            false => Keys::Container { url: format!("{url}/v1/credentials"), token: Some(Secret::File(file.clone())) },
        };
        let shelf = with(&kept, keys).await;
        keeps(&shelf, &scratch, "fleet").await;
        assert_eq!((giver.given(), kept.refused.load(Relaxed)), (1, 0), "what holds is not fetched again");
        // They have ended before it was said that they would; the token in the file is another by now.
        giver.ends();
        giver.token.lock().unwrap().push('2');
        scratch.file("token", b"first&token2");
        keeps(&shelf, &scratch, "fleet").await;
        assert_eq!((giver.given(), kept.refused.load(Relaxed)), (2, 1));
        // Many find that out at once: it is asked for once.
        giver.ends();
        let many = (0..20).map(|_| shelf.list("fleet/"));
        assert!(futures_util::future::join_all(many).await.into_iter().all(|listed| listed.is_ok()));
        assert_eq!(giver.given(), 3);
        // If the next are no better, that is said, and not tried for ever.
        kept.known.lock().unwrap().clear();
        kept.over.lock().unwrap().extend((3..9).map(|n| format!("token-{n}=/+")));
        let refused = shelf.list("fleet/").await.unwrap_err();
        assert!(matches!(&refused, Error::Passing(what) if what.contains("403 ExpiredToken")), "{refused:?}");
        assert_eq!(giver.given(), 4);
        kept.over.lock().unwrap().clear();
        shelf.list("fleet/").await.unwrap();

        // What ends within five minutes is fetched anew before anybody refuses it; where that cannot be done now, it is used until its end.
        *giver.seconds.lock().unwrap() = 120;
        giver.ends();
        shelf.list("fleet/").await.unwrap();
        let (given, refused) = (giver.given(), kept.refused.load(Relaxed));
        shelf.list("fleet/").await.unwrap();
        assert_eq!((giver.given(), kept.refused.load(Relaxed)), (given + 1, refused));
        giver.away.store(true, Relaxed);
        for _ in 0..3 {
            shelf.list("fleet/").await.unwrap();
        }
        giver.ends();
        let away = shelf.list("fleet/").await.unwrap_err();
        assert!(matches!(&away, Error::Passing(_)), "{away:?}");
        giver.away.store(false, Relaxed);
        *giver.token.lock().unwrap() = String::from("another");
        let unknown = shelf.list("fleet/").await.unwrap_err().to_string();
        assert!(unknown.contains("400") && !unknown.contains("first"), "{unknown}");
    }
}

#[tokio::test]
async fn keys_that_are_kept_in_files_are_read_when_they_are_needed() {
    let (scratch, kept) = (Scratch::new(), Bucket::new());
    let file = |name: &str, text: &str| Secret::File(scratch.file(name, text.as_bytes()));
    let (access_key, secret_key) = (file("key", KEY), file("secret", SECRET));
    let shelf = with(&kept, Keys::Kept { access_key, secret_key, session_token: None }).await;
    shelf.list("fleet/").await.unwrap();
    kept.known.lock().unwrap().clear();
    kept.known.lock().unwrap().insert(String::from("NEW"), (String::from("new"), None));
    let refused = shelf.list("fleet/").await.unwrap_err().to_string();
    assert!(refused.contains("InvalidAccessKeyId"), "{refused}");
    scratch.file("key", b"NEW\n");
    scratch.file("secret", b"new\n");
    shelf.list("fleet/").await.unwrap();
    std::fs::remove_file(scratch.0.join("secret")).unwrap();
    let none = shelf.list("fleet/").await.unwrap_err();
    assert!(matches!(&none, Error::Passing(what) if what.contains("no credentials for S3")), "{none:?}");
}

#[tokio::test]
async fn a_session_token_is_part_of_what_is_signed() {
    let (scratch, kept) = (Scratch::new(), Bucket::new());
    kept.known.lock().unwrap().insert(KEY.to_owned(), (SECRET.to_owned(), Some(String::from("a+token/="))));
    let given = |text: &str| Secret::Given(Value::new(text.to_owned()));
    let token = Secret::File(scratch.file("token", b"a+token/="));
    let keys = Keys::Kept { access_key: given(KEY), secret_key: given(SECRET), session_token: Some(token) };
    let shelf = with(&kept, keys).await;
    keeps(&shelf, &scratch, "fleet").await;
    scratch.file("token", b"another");
    assert!(shelf.list("fleet/").await.unwrap_err().to_string().contains("InvalidToken"));
}

#[tokio::test]
async fn uploads_that_a_kill_has_left_are_given_up_after_a_day() {
    let kept = Bucket::new();
    let shelf = bucket(&kept, SECRET).await;
    let now = Timestamp::now();
    let begin = |id: &str, key: &str, hours: u64| {
        kept.uploads.lock().unwrap().insert(id.to_owned(), BTreeMap::from([(1, vec![0; 9])]));
        kept.begun.lock().unwrap().insert(id.to_owned(), (key.to_owned(), now - Duration::from_secs(hours * 3600)));
    };
    // More than two pages of them, two of one name.
    for (n, key) in ["a/1", "a/1", "b/2", "c/3", "d/4"].iter().enumerate() {
        begin(&format!("old-{n}"), &format!("some/where/fleet/{key}"), 25);
    }
    begin("young", "some/where/fleet/a/1", 23);
    begin("another-fleets", "some/where/fleet-2/a/1", 99);
    begin("nobodys", "some/body/fleet/a/1", 99);
    let day_ago = std::time::SystemTime::now() - Duration::from_secs(86_400);
    assert_eq!(shelf.tidy("fleet/", day_ago).await.unwrap(), 5);
    let left: Vec<String> = kept.uploads.lock().unwrap().keys().cloned().collect();
    assert_eq!(left, ["another-fleets", "nobodys", "young"]);
    assert_eq!(shelf.tidy("fleet/", day_ago).await.unwrap(), 0);
}

#[tokio::test]
async fn postgresql_keeps_conversations() {
    let Ok(url) = std::env::var("AGENT_FLEET_TEST_POSTGRES") else { return };
    let (scratch, fleet) = (Scratch::new(), uuid::Uuid::now_v7().to_string());
    let (one, other) = (Postgres::new(&url).unwrap(), Postgres::new(&url).unwrap());
    // Both make the tables.
    let (left, right) = tokio::join!(one.list("none/"), other.list("none/"));
    assert!(left.is_ok() && right.is_ok());
    keeps(&one, &scratch, &fleet).await;
}

/// A sidecar that gives and takes what is in it.
#[derive(Default)]
struct Sidecar {
    has: Mutex<Vec<u8>>,
    says: Mutex<Option<StatusCode>>,
    /// Somebody works with it after it was given.
    goes_on: AtomicBool,
    /// What `/livez` is answered with.
    live: Mutex<Option<(StatusCode, &'static str)>>,
}

async fn livez(State(sidecar): State<Arc<Sidecar>>) -> Response {
    sidecar.live.lock().unwrap().unwrap_or((StatusCode::OK, "ok\n")).into_response()
}

/// What every tar ends with.
const END: [u8; 1024] = [0; 1024];

async fn sidecar(State(sidecar): State<Arc<Sidecar>>, method: Method, headers: HeaderMap, body: Bytes) -> Response {
    if headers.get("authorization").is_none_or(|said| said != "Bearer the-token") {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if let Some(status) = *sidecar.says.lock().unwrap() {
        return (status, "because\nof all").into_response();
    }
    if method == Method::PUT {
        *sidecar.has.lock().unwrap() = body.to_vec();
        return StatusCode::OK.into_response();
    }
    let has = sidecar.has.lock().unwrap().clone();
    let later = method == Method::HEAD && sidecar.goes_on.load(Relaxed);
    let mark = if later { "2-b" } else { "1-a" };
    ([("agent-conversation", "the-one"), ("agent-conversation-mark", mark)], Body::from(has)).into_response()
}

fn session(id: &str) -> Session {
    let spec: Spec =
        serde_json::from_value(serde_json::json!({"key": "k", "image": "i", "ttl": {"secs": 60, "nanos": 0}})).unwrap();
    Session::new(id.parse().unwrap(), ("t", "o"), Pattern::Hybrid, "p", spec, Timestamp::now())
}

#[tokio::test]
async fn a_conversation_comes_back_as_it_was_or_not_at_all() {
    let scratch = Scratch::new();
    let root = scratch.0.join("shelf");
    let container = Arc::new(Sidecar::default());
    let routes = Router::new().route("/livez", axum::routing::get(livez));
    let at = served(routes.fallback(sidecar).with_state(Arc::clone(&container))).await;
    let at = Endpoint { url: at, headers: vec![] };
    let away = Conversations {
        fleet: String::from("fleet"),
        shelf: Arc::new(Directory::new(root.clone())),
        client: build::client().unwrap(),
        spool: scratch.0.clone(),
        keep: 2,
        keep_for: None,
        max_size: 1 << 20,
    };
    let talk = session("talk");
    let was: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut last = None;
    for n in 0..4_u8 {
        *container.has.lock().unwrap() = [&was[..], &[n], &END].concat();
        last = Some(away.put_away(&talk, &at, "the-token", Timestamp::now()).await.unwrap());
    }
    let last = last.unwrap();
    assert_eq!(last.conversation.as_deref(), Some("the-one"));
    assert_eq!(away.shelf.list("fleet/talk/").await.unwrap().len(), 2, "the last two are kept");
    container.has.lock().unwrap().clear();
    away.bring(&talk, &last.name, &at, "the-token").await.unwrap();
    assert!(*container.has.lock().unwrap() == [&was[..], &[3], &END].concat());
    // Somebody has spoken to it while it was on its way to the shelf.
    container.goes_on.store(true, Relaxed);
    let refused = away.put_away(&talk, &at, "the-token", Timestamp::now()).await;
    assert!(matches!(refused, Err(Error::Passing(_))), "{refused:?}");
    assert!(away.shelf.list("fleet/talk/").await.unwrap().contains(&last.name), "what was whole before is still there");
    container.goes_on.store(false, Relaxed);
    // Whose token is another's, who works, who refuses, who is not there.
    let refused = away.put_away(&talk, &at, "another", Timestamp::now()).await;
    assert!(matches!(refused, Err(Error::Lasting(_))), "{refused:?}");
    for (status, passing) in [(409, true), (503, true), (413, false), (403, false)] {
        *container.says.lock().unwrap() = Some(StatusCode::from_u16(status).unwrap());
        let said = away.put_away(&talk, &at, "the-token", Timestamp::now()).await.unwrap_err();
        assert_eq!(matches!(said, Error::Passing(_)), passing, "{said}");
        assert_eq!(said.to_string(), format!("the sidecar says {status}: because"));
    }
    *container.says.lock().unwrap() = None;
    let nobody = Endpoint { url: String::from("http://127.0.0.1:1"), headers: vec![] };
    assert!(matches!(away.bring(&talk, &last.name, &nobody, "the-token").await, Err(Error::NotYet(_))));
    // A gateway that answers for nobody is not the sidecar; a sidecar that is not well is.
    let unwell = "the agent survives every attempt to end it\n";
    for (status, said, there) in [(404, "", false), (502, "", false), (503, "no healthy upstream", false), (503, unwell, true)] {
        *container.live.lock().unwrap() = Some((StatusCode::from_u16(status).unwrap(), said));
        *container.says.lock().unwrap() = Some(StatusCode::FORBIDDEN);
        let brought = away.bring(&talk, &last.name, &at, "the-token").await;
        assert_eq!(matches!(brought, Err(Error::NotYet(_))), !there, "{status} {said}: {brought:?}");
    }
    (*container.live.lock().unwrap(), *container.says.lock().unwrap()) = (None, None);
    // What ends before its end is not all of it, however well its connection ends.
    for part in [&b""[..], &was[..5000], &END[1..], &[&END[..], b"x"].concat()] {
        *container.has.lock().unwrap() = part.to_vec();
        let half = away.put_away(&session("half"), &at, "the-token", Timestamp::now()).await;
        assert!(matches!(half, Err(Error::Passing(_))), "{half:?}");
    }
    assert_eq!(away.shelf.list("fleet/half/").await.unwrap(), Vec::<String>::new());
    // What is damaged is brought nowhere.
    container.has.lock().unwrap().clear();
    let path = root.join(&last.name);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(away.bring(&talk, &last.name, &at, "the-token").await, Err(Error::Lasting(_))));
    assert!(container.has.lock().unwrap().is_empty());
    // What compresses badly is too large, and nothing of it is left.
    let noise = ring::rand::SystemRandom::new();
    let mut large = vec![0; 2 << 20];
    ring::rand::SecureRandom::fill(&noise, &mut large).unwrap();
    *container.has.lock().unwrap() = large;
    assert!(matches!(away.put_away(&session("large"), &at, "the-token", Timestamp::now()).await, Err(Error::Lasting(_))));
    assert_eq!(away.shelf.list("fleet/large/").await.unwrap(), Vec::<String>::new());
    let spooled = |path: &Path| std::fs::read_dir(path).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_file()).count();
    assert_eq!(spooled(&scratch.0), 0, "nothing is left on the way");
}

#[tokio::test]
async fn what_was_put_away_last_is_kept_whatever_it_is_called() {
    let scratch = Scratch::new();
    let container = Arc::new(Sidecar { has: Mutex::new(END.to_vec()), ..Sidecar::default() });
    let url = served(Router::new().fallback(sidecar).with_state(container)).await;
    let at = Endpoint { url, headers: vec![] };
    let away = Conversations {
        fleet: String::from("fleet"),
        shelf: Arc::new(Directory::new(scratch.0.join("shelf"))),
        client: build::client().unwrap(),
        spool: scratch.0.clone(),
        keep: 1,
        keep_for: None,
        max_size: 1 << 20,
    };
    let (now, mut talk) = (Timestamp::now(), session("talk"));
    let put = async |session: &Session, seconds: u64| {
        away.put_away(session, &at, "the-token", now + Duration::from_secs(seconds)).await.unwrap().name
    };
    let list = async || away.shelf.list("fleet/talk/").await.unwrap();
    // Of one of the same id, which had more containers than this one has yet.
    talk.generation = 7;
    let before = put(&talk, 0).await;
    talk.generation = 1;
    let first = put(&talk, 60).await;
    assert_eq!(list().await, std::slice::from_ref(&first), "and not {before}");
    // What it would go on with, if nobody hears that there is another.
    talk.archive = Some(first.clone());
    let second = put(&talk, 120).await;
    assert_eq!(list().await, [first.clone(), second.clone()]);
    // A clock that was put back says that the new is the oldest.
    talk.archive = Some(second.clone());
    let third = put(&talk, 30).await;
    assert_eq!(list().await, [third, second]);
}

#[tokio::test]
async fn what_nobody_needs_is_swept_and_nothing_else() {
    let scratch = Scratch::new();
    let store = store::memory().await.unwrap();
    let now = Timestamp::now();
    let name = |session: &str, at: Timestamp| format!("fleet/{session}/0000000001-{:015}-x.tar.gz", at.as_millisecond());
    let shelf = Arc::new(Directory::new(scratch.0.join("shelf")));
    for (id, phase) in [("lives", Phase::Paused), ("over", Phase::Destroyed), ("failed", Phase::Failed)] {
        let mut kept = session(id);
        kept.phase = phase;
        store.insert(&kept).await.unwrap();
    }
    let file = scratch.file("in", b"x");
    let after = now + Duration::from_secs(60);
    for name in
        [name("lives", now), name("over", now), name("failed", now), name("nobody", after), name("before", Timestamp::UNIX_EPOCH)]
    {
        shelf.put(&name, &file).await.unwrap();
    }
    shelf.put("fleet/notes", &file).await.unwrap();
    let mut away = Conversations {
        fleet: String::from("fleet"),
        shelf: shelf.clone(),
        client: build::client().unwrap(),
        spool: scratch.0.clone(),
        keep: 2,
        keep_for: Some(Duration::from_secs(3600)),
        max_size: 1 << 20,
    };
    // What was on its way when somebody was killed, and what is on its way now.
    let old = std::time::SystemTime::now() - Duration::from_secs(2 * 86_400);
    let (spool, half) = (scratch.0.clone(), scratch.0.join("shelf/fleet/half"));
    std::fs::create_dir(&half).unwrap();
    let begun = |dir: &Path, name: &str, is_old: bool| {
        let path = dir.join(name);
        let file = std::fs::File::create(&path).unwrap();
        is_old.then(|| file.set_modified(old).unwrap());
        path
    };
    let gone = [begun(&half, ".begun-1", true), begun(&spool, "agent-fleet-1.tar.gz", true)];
    let stays = [
        begun(&scratch.0.join("shelf/fleet/lives"), ".begun-2", false),
        begun(&spool, "agent-fleet-2.tar.gz", false),
        begun(&spool, "agent-fleet-notes", true),
        begun(&spool, "another.tar.gz", true),
    ];
    let later = now + Duration::from_secs(600);
    assert_eq!(away.sweep(&store, later).await.unwrap(), 0, "they are kept for an hour");
    away.keep_for = None;
    assert_eq!(away.sweep(&store, later).await.unwrap(), 2);
    let left = shelf.list("fleet/").await.unwrap();
    let expected = [name("before", Timestamp::UNIX_EPOCH), name("failed", now), name("lives", now), String::from("fleet/notes")];
    assert!(!gone.iter().any(|path| path.exists()) && !half.exists(), "it was left by nobody who lives");
    assert!(stays.iter().all(|path| path.exists()), "it is somebody's");
    assert_eq!(left, expected, "older than the store, wanted perhaps, alive, or no conversation");
}
