//! S3, and what speaks like it. Requests are signed by `rusty-s3`, in their query, and sent by the client that is there.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use axum::body::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use reqwest::{Method, Response, StatusCode, Url};
use rusty_s3::actions::{CreateMultipartUpload, ListObjectsV2};
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use tokio::io::AsyncWriteExt;

use super::credentials::{Keys, Source};
use super::directory::gone;
use super::{Error, Result, Shelf, passing};

/// What is larger goes in parts of this size: as many as there may be make 160 GB.
const PART: u64 = 16 << 20;
/// A request has so long, and its signature holds no longer.
const REQUEST: Duration = Duration::from_secs(300);
/// What is said of credentials that have ended, or were replaced: a second try with others may do better.
const OVER: [&str; 5] = ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"];
/// Pages of a list: one that never ends must not keep us for ever.
const PAGES: usize = 10_000;

pub struct S3 {
    bucket: Bucket,
    credentials: Source,
    /// Before every name, with a `/` at its end; or nothing.
    prefix: String,
    client: reqwest::Client,
}

impl S3 {
    /// # Errors
    /// What is wrong with the endpoint or the bucket's name.
    pub fn new(
        endpoint: &str,
        path_style: bool,
        (bucket, prefix): (&str, &str),
        region: &str,
        keys: Keys,
        client: reqwest::Client,
    ) -> std::result::Result<Self, String> {
        let style = if path_style { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let endpoint: Url = endpoint.parse().map_err(|error| format!("the endpoint of S3 is no URL: {error}"))?;
        let bucket = Bucket::new(endpoint, style, bucket.to_owned(), region.to_owned());
        let bucket = bucket.map_err(|error| format!("there can be no such bucket: {error}"))?;
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let credentials = Source::new(keys, client.clone());
        Ok(Self { bucket, credentials, prefix, client })
    }

    /// What the credentials sign, with those that hold now; once more, if they do not and others can be had.
    async fn send(&self, method: Method, sign: impl Fn(&Credentials) -> Url, body: impl Into<Bytes>) -> Result<Response> {
        let (credentials, body) = (self.credentials.now().await?, body.into());
        let (code, error) = match self.once(method.clone(), sign(&credentials), body.clone()).await? {
            Ok(answer) => return Ok(answer),
            Err(said) => said,
        };
        if !OVER.contains(&code.as_str()) {
            return Err(error);
        }
        let Some(other) = self.credentials.other(&credentials).await? else { return Err(error) };
        self.once(method, sign(&other), body).await?.map_err(|(_, error)| error)
    }

    /// An answer, or its code and what that means.
    async fn once(&self, method: Method, url: Url, body: Bytes) -> Result<std::result::Result<Response, (String, Error)>> {
        let asked = self.client.request(method, url).timeout(REQUEST).body(body);
        let answer = asked.send().await.map_err(|error| passing("S3 does not answer", &error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(Ok(answer));
        }
        // A code in the XML says more than the status; the rest may repeat the request.
        let said = answer.text().await.unwrap_or_default();
        let code: String = word(&said, "Code").unwrap_or_default().chars().take(60).collect();
        // That a bucket is not there, or the wrong one is asked, can be mended.
        let error = match status == StatusCode::NOT_FOUND && code == "NoSuchKey" {
            true => gone(),
            false => Error::Passing(format!("S3 says {} {code}", status.as_u16())),
        };
        Ok(Err((code, error)))
    }

    async fn text(&self, method: Method, sign: impl Fn(&Credentials) -> Url, body: impl Into<Bytes>) -> Result<String> {
        self.send(method, sign, body).await?.text().await.map_err(|error| passing("S3 breaks off", &error))
    }

    /// A page of the uploads of several parts that were begun and are neither put together nor given up.
    async fn begun(&self, prefix: &str, (key, id): &(String, String)) -> Result<String> {
        let sign = |credentials: &Credentials| {
            let mut list = self.bucket.get_object(Some(credentials), "");
            list.query_mut().insert("uploads", "");
            list.query_mut().insert("prefix", prefix.to_owned());
            if !key.is_empty() {
                list.query_mut().insert("key-marker", key.clone());
                list.query_mut().insert("upload-id-marker", id.clone());
            }
            list.sign(REQUEST)
        };
        self.text(Method::GET, sign, Vec::new()).await
    }

    async fn abort(&self, key: &str, id: &str) -> Result<Response> {
        let sign = |credentials: &Credentials| self.bucket.abort_multipart_upload(Some(credentials), key, id).sign(REQUEST);
        self.send(Method::DELETE, sign, Vec::new()).await
    }

    async fn put_parts(&self, key: &str, upload: &str, mut file: std::fs::File) -> Result<()> {
        let mut etags = Vec::new();
        for number in 1..=10_000_u16 {
            let mut bytes = Vec::new();
            (&mut file).take(PART).read_to_end(&mut bytes)?;
            if bytes.is_empty() {
                break;
            }
            let sign = |credentials: &Credentials| self.bucket.upload_part(Some(credentials), key, number, upload).sign(REQUEST);
            let answer = self.send(Method::PUT, sign, bytes).await?;
            let etag = answer.headers().get("etag").and_then(|etag| etag.to_str().ok());
            etags.push(etag.ok_or_else(|| Error::Passing(String::from("S3 gives a part no ETag")))?.to_owned());
        }
        let tags = || etags.iter().map(String::as_str);
        let sign = |credentials: &Credentials| {
            self.bucket.complete_multipart_upload(Some(credentials), key, upload, tags()).sign(REQUEST)
        };
        let body = self.bucket.complete_multipart_upload(None, key, upload, tags()).body();
        let said = self.text(Method::POST, sign, body).await?;
        // What goes wrong after the answer has begun is said in it.
        if said.contains("<Error>") { Err(Error::Passing(String::from("S3 has not put the parts together"))) } else { Ok(()) }
    }
}

#[async_trait]
impl Shelf for S3 {
    async fn put(&self, name: &str, file: &Path) -> Result<()> {
        let key = format!("{}{name}", self.prefix);
        let mut file = std::fs::File::open(file)?;
        if file.metadata()?.len() <= PART {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let sign = |credentials: &Credentials| self.bucket.put_object(Some(credentials), &key).sign(REQUEST);
            return self.send(Method::PUT, sign, bytes).await.map(drop);
        }
        let sign = |credentials: &Credentials| self.bucket.create_multipart_upload(Some(credentials), &key).sign(REQUEST);
        let said = self.text(Method::POST, sign, Vec::new()).await?;
        let upload = CreateMultipartUpload::parse_response(&said);
        let upload = upload.map_err(|_| Error::Passing(String::from("S3 begins an upload without saying which")))?;
        let put = self.put_parts(&key, upload.upload_id(), file).await;
        if put.is_err() {
            // What is not put together is paid for.
            self.abort(&key, upload.upload_id()).await.ok();
        }
        put
    }

    async fn get(&self, name: &str, to: &Path) -> Result<()> {
        let key = format!("{}{name}", self.prefix);
        let sign = |credentials: &Credentials| self.bucket.get_object(Some(credentials), &key).sign(REQUEST);
        let mut parts = self.send(Method::GET, sign, Vec::new()).await?.bytes_stream();
        let mut to = tokio::fs::File::from_std(super::private(to)?);
        while let Some(part) = parts.next().await {
            to.write_all(&part.map_err(|error| passing("S3 breaks off", &error))?).await?;
        }
        Ok(to.flush().await?)
    }

    async fn list(&self, beginning: &str) -> Result<Vec<String>> {
        let (mut found, mut next) = (Vec::new(), None::<String>);
        for _ in 0..PAGES {
            let sign = |credentials: &Credentials| {
                let mut list = self.bucket.list_objects_v2(Some(credentials));
                list.with_prefix(format!("{}{beginning}", self.prefix));
                if let Some(next) = &next {
                    list.with_continuation_token(next.clone());
                }
                list.sign(REQUEST)
            };
            let said = self.text(Method::GET, sign, Vec::new()).await?;
            let page =
                ListObjectsV2::parse_response(&said).map_err(|_| Error::Passing(String::from("S3's list cannot be read")))?;
            found.extend(page.contents.into_iter().filter_map(|one| one.key.strip_prefix(&self.prefix).map(str::to_owned)));
            // Some end with an empty one.
            next = page.next_continuation_token.filter(|next| !next.is_empty());
            if next.is_none() {
                found.sort();
                return Ok(found);
            }
        }
        Err(Error::Passing(String::from("S3's list has no end")))
    }

    async fn delete(&self, name: &str) -> Result<()> {
        let key = format!("{}{name}", self.prefix);
        let sign = |credentials: &Credentials| self.bucket.delete_object(Some(credentials), &key).sign(REQUEST);
        match self.send(Method::DELETE, sign, Vec::new()).await {
            Err(Error::Lasting(_)) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What is begun and not put together is paid for, and nobody sees it.
    async fn tidy(&self, beginning: &str, before: SystemTime) -> Result<usize> {
        let prefix = format!("{}{beginning}", self.prefix);
        let before = Timestamp::try_from(before).map_err(|error| Error::Lasting(error.to_string()))?;
        let (mut aborted, mut next) = (0, (String::new(), String::new()));
        for _ in 0..PAGES {
            let said = self.begun(&prefix, &next).await?;
            for upload in said.split("<Upload>").skip(1) {
                let (Some(key), Some(id)) = (word(upload, "Key"), word(upload, "UploadId")) else { continue };
                // Whose age nobody says may be somebody's.
                let begun = word(upload, "Initiated").and_then(|at| at.parse::<Timestamp>().ok());
                if key.starts_with(&prefix) && begun.is_some_and(|begun| begun < before) {
                    match self.abort(&key, &id).await {
                        Ok(_) => aborted += 1,
                        // Somebody was quicker.
                        Err(Error::Passing(said)) if said.contains("NoSuchUpload") => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            if word(&said, "IsTruncated").as_deref() != Some("true") {
                return Ok(aborted);
            }
            let marks = (word(&said, "NextKeyMarker"), word(&said, "NextUploadIdMarker"));
            next = (marks.0.unwrap_or_default(), marks.1.unwrap_or_default());
            if next.0.is_empty() {
                break;
            }
        }
        Err(Error::Passing(String::from("S3's list of uploads has no end")))
    }
}

/// What is in the first element of that name, which has none in it.
pub(super) fn word(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let plain = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    Some(plain.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to)))
}
