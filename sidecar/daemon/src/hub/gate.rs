//! Who may change something: raise a budget, pause an agent. Everything else that is served is only read, and is not asked for here.
//!
//! | | at the socket | over TCP |
//! |---|---|---|
//! | `hub.control` off | nobody | nobody |
//! | on, no token | this user and root, by the kernel's word | nobody |
//! | on, with a token | this user and root, if they know it | nobody; with `hub.control_tcp` who knows it |

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderMap, ORIGIN};
use subtle::ConstantTimeEq;

/// A shorter token can be guessed.
const SHORTEST: usize = 16;
/// A token is no document.
const LONGEST: u64 = 4 * 1024;
/// So many wrong words within so long from one place, and the next ones are told apart. The right one is heard from anywhere: it is
/// too long to be guessed at any speed.
const GUESSES: u32 = 10;
const WITHIN: Duration = Duration::from_secs(60);
/// Places that are remembered. From more than that at once, somebody guesses in earnest.
const PLACES: usize = 256;

/// Where a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    /// At the socket, which lets nobody in but this user and root.
    Socket,
    /// At the socket, one of the users whose wrappers are served.
    User(u32),
    Tcp(IpAddr),
}

/// A word that opens the gate.
#[derive(Clone, Default, PartialEq)]
pub(crate) enum Token {
    /// None is asked for.
    #[default]
    None,
    Is(Vec<u8>),
    /// There should be one, and it cannot be read: no word is right.
    Lost,
}

impl Token {
    /// # Errors
    /// Why no token can be had of it.
    pub(crate) fn of(text: &str) -> Result<Token, String> {
        let text = text.trim();
        if text.len() < SHORTEST || text.contains(|c: char| !c.is_ascii_graphic()) {
            return Err(format!("a token has at least {SHORTEST} letters and digits, without a space"));
        }
        Ok(Token::Is(text.as_bytes().to_vec()))
    }

    /// The word, if one is to be said.
    pub(crate) fn word(&self) -> Option<&str> {
        match self {
            Token::Is(word) => std::str::from_utf8(word).ok(),
            Token::None | Token::Lost => None,
        }
    }

    /// From a file that nobody else can read, but root's group where root owns it and we are in that group.
    ///
    /// # Errors
    /// Why no token can be had of it.
    pub(crate) fn read(path: &Path) -> Result<Token, String> {
        let read = || -> io::Result<String> {
            // Not the one end of a pipe that somebody put there.
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
            let mut file = File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?);
            let found = file.metadata()?;
            let us = rustix::process::geteuid().as_raw();
            if !found.is_file() || found.uid() != us && found.uid() != 0 {
                return Err(io::Error::other("it is no file of this user's or root's"));
            }
            if found.mode() & readers(found.uid(), us) != 0 {
                return Err(io::Error::other("others may read it: take that from them (chmod 600)"));
            }
            let mut text = String::new();
            (&mut file).take(LONGEST).read_to_string(&mut text)?;
            Ok(text)
        };
        read().map_err(|error| error.to_string()).and_then(|text| Token::of(&text))
    }
}

/// What nobody may be allowed in a token's file. Where it is root's, and we are not, we read it as its group: so Kubernetes mounts a
/// secret for an `fsGroup`.
fn readers(owner: u32, us: u32) -> u32 {
    if owner == 0 && us != 0 { 0o037 } else { 0o077 }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Token::None => "None",
            Token::Is(_) => "Is(…)",
            Token::Lost => "Lost",
        })
    }
}

/// What the configuration says of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    pub(crate) control: bool,
    pub(crate) tcp: bool,
    pub(crate) token: Token,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    Allowed,
    /// Nothing may be changed, here or at all.
    Closed,
    /// A page of somebody's in a browser.
    CrossSite,
    /// No token, or not the one.
    Unauthorized,
    /// Too many of those.
    Limited,
}

impl Judged {
    #[cfg(test)]
    const ALL: [Judged; 5] = [Judged::Allowed, Judged::Closed, Judged::CrossSite, Judged::Unauthorized, Judged::Limited];

    /// As a label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Judged::Allowed => "allowed",
            Judged::Closed => "closed",
            Judged::CrossSite => "cross_site",
            Judged::Unauthorized => "unauthorized",
            Judged::Limited => "limited",
        }
    }

    /// What is answered to whoever is not let in.
    pub(crate) fn refusal(self) -> Option<(StatusCode, &'static str)> {
        match self {
            Judged::Allowed => None,
            Judged::Closed => Some((
                StatusCode::FORBIDDEN,
                "control is off: nothing can be changed here without `hub.control` (--hub-control) where the hub was started\n",
            )),
            Judged::CrossSite => Some((StatusCode::FORBIDDEN, "not from a page in a browser\n")),
            Judged::Unauthorized => Some((StatusCode::UNAUTHORIZED, "say the token: Authorization: Bearer …\n")),
            Judged::Limited => Some((StatusCode::TOO_MANY_REQUESTS, "too many wrong tokens; wait a minute\n")),
        }
    }
}

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    keys: Keys,
    failures: Mutex<HashMap<Peer, (u32, Instant)>>,
}

impl Gate {
    pub(crate) fn new(keys: Keys) -> Gate {
        Gate { keys, failures: Mutex::default() }
    }

    pub(crate) fn judge(&self, peer: Peer, headers: &HeaderMap, now: Instant) -> Judged {
        let Keys { control, tcp, token } = &self.keys;
        let over_tcp = matches!(peer, Peer::Tcp(_));
        if !control || matches!(peer, Peer::User(_)) || over_tcp && (!tcp || matches!(token, Token::None)) {
            return Judged::Closed;
        }
        // A browser says where a page is from whenever it sends what could change something, and cannot send a token without asking
        // first; nobody answers that.
        if headers.contains_key(ORIGIN) || headers.get("sec-fetch-site").is_some_and(|site| site != "none") {
            return Judged::CrossSite;
        }
        let token = match token {
            Token::None => return Judged::Allowed,
            Token::Is(token) => token.as_slice(),
            Token::Lost => &[],
        };
        let said = headers.get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
        let said = match said.split_at_checked(7) {
            Some((scheme, word)) if scheme.eq_ignore_ascii_case(b"bearer ") => word.trim_ascii(),
            _ => b"",
        };
        // First: who knows it shares a place with those who guess, and is not to be shut out by them.
        if !token.is_empty() && bool::from(said.ct_eq(token)) {
            return Judged::Allowed;
        }
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, (_, since)| now.saturating_duration_since(*since) < WITHIN);
        let full = failures.len() >= PLACES && !failures.contains_key(&peer);
        if full || failures.get(&peer).is_some_and(|(n, _)| *n >= GUESSES) {
            return Judged::Limited;
        }
        failures.entry(peer).or_insert((0, now)).0 += 1;
        Judged::Unauthorized
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const WORD: &str = "0123456789abcdef0123456789abcdef";
    const TCP: Peer = Peer::Tcp(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));

    fn gate(control: bool, tcp: bool, token: Option<&str>) -> Gate {
        Gate::new(Keys { control, tcp, token: token.map_or(Token::None, |token| Token::of(token).unwrap()) })
    }

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (hyper::header::HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_table_holds() {
        let now = Instant::now();
        let (none, right) = (headers(&[]), headers(&[("authorization", &format!("Bearer {WORD}"))]));
        let judge = |gate: &Gate, peer, headers| gate.judge(peer, headers, now);
        for (control, tcp, token, expected) in [
            // Without and with the token at the socket, then over TCP.
            (false, true, Some(WORD), [Judged::Closed; 4]),
            (true, false, None, [Judged::Allowed, Judged::Allowed, Judged::Closed, Judged::Closed]),
            (true, true, None, [Judged::Allowed, Judged::Allowed, Judged::Closed, Judged::Closed]),
            (true, false, Some(WORD), [Judged::Unauthorized, Judged::Allowed, Judged::Closed, Judged::Closed]),
            (true, true, Some(WORD), [Judged::Unauthorized, Judged::Allowed, Judged::Unauthorized, Judged::Allowed]),
        ] {
            let gate = gate(control, tcp, token);
            let got = [(Peer::Socket, &none), (Peer::Socket, &right), (TCP, &none), (TCP, &right)];
            assert_eq!(got.map(|(peer, headers)| judge(&gate, peer, headers)), expected, "{control} {tcp} {token:?}");
        }
        let lost = Gate::new(Keys { control: true, tcp: true, token: Token::Lost });
        assert_eq!(judge(&lost, Peer::Socket, &right), Judged::Unauthorized);
        assert_eq!(judge(&lost, Peer::Socket, &headers(&[("authorization", "Bearer ")])), Judged::Unauthorized);
    }

    #[test]
    fn each_outcome_is_a_series_from_the_start() {
        let zero: Vec<&str> = agent_sidecar_core::metric::CONTROL_REQUESTS.zero.iter().map(|values| values[0]).collect();
        assert_eq!(zero, Judged::ALL.map(Judged::as_str));
    }

    #[test]
    fn a_page_in_a_browser_is_not_let_in_with_whatever_it_has() {
        let gate = gate(true, true, Some(WORD));
        let bearer = format!("bearer {WORD}");
        for more in [("origin", "http://localhost:9477"), ("origin", "null"), ("sec-fetch-site", "cross-site")] {
            let headers = headers(&[("authorization", &bearer), more]);
            assert_eq!(gate.judge(TCP, &headers, Instant::now()), Judged::CrossSite);
        }
        let typed = headers(&[("authorization", &bearer), ("sec-fetch-site", "none")]);
        assert_eq!(gate.judge(TCP, &typed, Instant::now()), Judged::Allowed);
    }

    #[test]
    fn who_guesses_is_told_to_wait_and_who_knows_is_let_in_from_there() {
        let gate = gate(true, true, Some(WORD));
        let (wrong, right) =
            (headers(&[("authorization", "Bearer no")]), headers(&[("authorization", &format!("Bearer {WORD}"))]));
        let now = Instant::now();
        for _ in 0..GUESSES {
            assert_eq!(gate.judge(TCP, &wrong, now), Judged::Unauthorized);
        }
        assert_eq!(gate.judge(TCP, &wrong, now), Judged::Limited);
        assert_eq!(gate.judge(TCP, &right, now), Judged::Allowed);
        assert_eq!(gate.judge(TCP, &wrong, now), Judged::Limited);
        assert_eq!(gate.judge(Peer::Socket, &wrong, now), Judged::Unauthorized);
        assert_eq!(gate.judge(TCP, &wrong, now + WITHIN), Judged::Unauthorized);
        for n in 0..u32::try_from(PLACES).unwrap() {
            gate.judge(Peer::Tcp(std::net::Ipv4Addr::from(n).into()), &wrong, now);
        }
        assert!(gate.failures.lock().unwrap().len() <= PLACES);
        assert_eq!(gate.judge(Peer::Socket, &right, now), Judged::Allowed, "and where no place is left");
    }

    #[test]
    fn a_token_that_others_can_read_or_guess_is_none() {
        let path = std::env::temp_dir().join(format!("agent-sidecar-token-{}", std::process::id()));
        std::fs::write(&path, format!("{WORD}\n")).unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o600);
        assert!(matches!(Token::read(&path), Ok(Token::Is(token)) if token == WORD.as_bytes()));
        for open in [0o640, 0o604, 0o602] {
            mode(open);
            assert!(Token::read(&path).unwrap_err().contains("chmod 600"));
        }
        assert_eq!(
            [readers(0, 1000), readers(0, 0), readers(1000, 1000)].map(|others| 0o440 & others == 0),
            [true, false, false]
        );
        assert_eq!([0o444, 0o460, 0o441].map(|mode| mode & readers(0, 1000) == 0), [false; 3]);
        assert!(Token::of("short").is_err() && Token::of("with a space in the middle").is_err());
        assert!(Token::read(Path::new("/dev/null")).is_err() && Token::read(Path::new("/no/such/file")).is_err());
        std::fs::remove_file(path).unwrap();
    }
}
