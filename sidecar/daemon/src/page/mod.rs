//! The page for people at `/`: a document, a style and a script, in the binary. What it shows it asks for itself.
//!
//! It is for whoever can reach the port, and for no other web site: nothing lets another origin read it, and a browser that was sent
//! here under a name that is not ours is turned away. Scrapers may use any name, as ever, and find `/metrics` and `/status`.

use std::net::IpAddr;

use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, CONTENT_SECURITY_POLICY, HOST, HeaderName, HeaderValue, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use hyper::{Request, StatusCode};

use crate::http::{Answer, reply, text};

const DOCUMENT: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Itself alone, and nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";
const WHAT: &str = "/metrics /livez /readyz /status /busy /events /sessions/ID/timeline, and / in a browser";
/// Where no public name server has a say.
const PRIVATE: [&str; 5] = [".localhost", ".local", ".internal", ".svc", ".home.arpa"];

/// The page's own files, and what is at other paths: a word about where to look.
pub(crate) fn answer(request: &Request<Incoming>) -> Answer {
    match request.uri().path() {
        "/" if wants_html(request) => {
            let mut page = file("text/html; charset=utf-8", DOCUMENT);
            page.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
            page.headers_mut().insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
            page.headers_mut().insert(VARY, HeaderValue::from_static("accept"));
            page
        }
        "/" => text(StatusCode::OK, format!("agent-sidecar: {WHAT}\n")),
        "/page.css" => file("text/css; charset=utf-8", STYLE),
        "/page.js" => file("text/javascript; charset=utf-8", SCRIPT),
        _ => text(StatusCode::NOT_FOUND, format!("not here; there are {WHAT}\n")),
    }
}

fn file(kind: &'static str, content: &'static str) -> Answer {
    let mut file = reply(StatusCode::OK, kind, content.as_bytes().to_vec());
    file.headers_mut().insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    file
}

fn wants_html(request: &Request<Incoming>) -> bool {
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/html"))
}

/// On every answer: nobody guesses what it is, and no other site embeds it.
pub(crate) fn harden(answer: &mut Answer) {
    answer.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer.headers_mut().insert(HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin"));
}

/// What is for people and browsers is answered under our own names only: a site whose name leads here all of a sudden (DNS
/// rebinding) could read it otherwise.
pub(crate) fn misdirected(request: &Request<Incoming>, own: Option<&str>) -> Option<Answer> {
    let path = request.uri().path();
    let for_people =
        matches!(path, "/" | "/page.css" | "/page.js" | "/events") || path.starts_with("/sessions") || path.starts_with("/v1/");
    let host = request.headers().get(HOST).map(|host| host.to_str().unwrap_or("?"));
    (for_people && !host.is_none_or(|host| is_ours(host, own))).then(|| {
        text(StatusCode::MISDIRECTED_REQUEST, "not under this name: use an address or localhost, or say --page-host NAME\n")
    })
}

/// An address, a name that nobody can register, or the one that was configured.
fn is_ours(host: &str, own: Option<&str>) -> bool {
    // `[::1]:9477` and `::1`, `name:9477` and `name`.
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name.parse::<IpAddr>().is_ok()
        || !name.contains('.')
        || PRIVATE.iter().any(|private| name.ends_with(private))
        || name.ends_with(".cluster.local")
        || own.is_some_and(|own| own.eq_ignore_ascii_case(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_others_can_have_are_not_ours() {
        for ours in [
            "127.0.0.1:9477",
            "[::1]:9477",
            "localhost",
            "localhost:9477",
            "agent-7:80",
            "10.1.2.3",
            "agents.prod.svc",
            "a.b.svc.cluster.local.",
            "Sidecar.Example.com:443",
        ] {
            assert!(is_ours(ours, Some("sidecar.example.com")), "{ours}");
        }
        for others in
            ["evil.example:9477", "127.0.0.1.evil.example", "localhost.evil.example", "sidecar.example.com.evil.example"]
        {
            assert!(!is_ours(others, Some("sidecar.example.com")), "{others}");
        }
    }

    #[test]
    fn nothing_of_the_page_is_inline_or_from_elsewhere() {
        for inline in ["<script>", "<style", "style=", " onclick", " onload", "javascript:"] {
            assert!(!DOCUMENT.contains(inline), "{inline}");
        }
        for sink in ["innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("] {
            assert!(!SCRIPT.contains(sink), "{sink}");
        }
        for file in [DOCUMENT, STYLE, SCRIPT] {
            let elsewhere = file.replace("http://www.w3.org/2000/svg", "");
            assert!(!elsewhere.contains("//www") && !elsewhere.contains("https:"), "no asset of others");
        }
    }
}
