//! Who is asked: the hub's socket, or an address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};

/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same for a probe, wherever it asks: above what the sidecar gives its own loop, and below what platforms give a probe.
const PROBE: Duration = Duration::from_secs(4);
/// More than every session of a large container says.
const ANSWER: usize = 64 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "no sidecar answers at {asked}; start an agent with `agent-sidecar run -- …`, or say where one is: --url http://HOST:9477"
    )]
    Nobody {
        asked: String,
        #[source]
        source: io::Error,
    },
    #[error("what is at {asked} does not speak as a sidecar does")]
    Other { asked: String },
    #[error("`{0}` is no address of a sidecar: write http://HOST:9477")]
    Url(String),
}

#[derive(Clone, Debug)]
enum Place {
    Socket(PathBuf),
    /// Where, under which name, and below which path.
    Tcp {
        host: String,
        port: u16,
        below: String,
    },
}

/// See the module's head.
pub(crate) struct Source {
    places: Vec<Place>,
    runtime: tokio::runtime::Runtime,
}

impl Source {
    pub(crate) fn url(url: &str) -> Result<Source, Error> {
        let bad = || Error::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let host = uri.host().filter(|_| uri.scheme_str().is_none_or(|scheme| scheme == "http")).ok_or_else(bad)?;
        let below = uri.path().trim_end_matches('/').to_owned();
        Source::at(vec![Place::Tcp { host: host.to_owned(), port: uri.port_u16().unwrap_or(9477), below }])
    }

    /// Those of this machine: the hub's sockets, and where a wrapper alone would be.
    pub(crate) fn here(sockets: Vec<PathBuf>, listen: Option<SocketAddr>) -> Result<Source, Error> {
        let mut places: Vec<Place> = sockets.into_iter().map(Place::Socket).collect();
        places.extend(listen.filter(|address| address.port() != 0).map(|address| {
            let ip = match address.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
                // It takes both families.
                IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(Ipv6Addr::LOCALHOST) | IpAddr::V4(_) | IpAddr::V6(_) => address.ip(),
            };
            Place::Tcp { host: ip.to_string(), port: address.port(), below: String::new() }
        }));
        Source::at(places)
    }

    fn at(places: Vec<Place>) -> Result<Source, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| Error::Nobody { asked: String::from("all"), source })?;
        Ok(Source { places, runtime })
    }

    pub(super) fn status(&self) -> Result<Value, Error> {
        let status: Value = self.get("/status")?;
        if status["sessions"].is_array() { Ok(status) } else { Err(Error::Other { asked: self.asked() }) }
    }

    pub(super) fn timeline(&self, pid: u64, after: u64) -> Result<Vec<Value>, Error> {
        let mut told = self.get(&format!("/sessions/{pid}/timeline?after={after}"))?;
        Ok(told["entries"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// What a probe's page says, and whether that is yes. Whoever answers first is believed, and the address comes first: of a hub's
    /// sockets, one may be that of another container which sees the same files.
    pub(crate) fn probe(&self, page: &str) -> Result<(bool, String), Error> {
        let asked = async {
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for place in self.places.iter().rev() {
                match ask(place, &format!("/{page}")).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        let answer = self.runtime.block_on(async { tokio::time::timeout(PROBE, asked).await });
        let (status, body) = answer
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|source| Error::Nobody { asked: self.asked(), source })?;
        let said = String::from_utf8_lossy(&body).trim().to_owned();
        // That one is answered whatever it says.
        let yes = page != "busy" || serde_json::from_str::<Value>(&said).is_ok_and(|word| word["busy"] == true);
        Ok((status == StatusCode::OK && yes, said))
    }

    fn get(&self, path: &str) -> Result<Value, Error> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for place in &self.places {
            let asked = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, ask(place, path)).await });
            match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok((StatusCode::OK, body)) => {
                    return serde_json::from_slice(&body).map_err(|_| Error::Other { asked: place.name() });
                }
                Ok((status, _)) => last = io::Error::other(format!("it answers {status}")),
                Err(error) => last = error,
            }
        }
        Err(Error::Nobody { asked: self.asked(), source: last })
    }

    fn asked(&self) -> String {
        let names: Vec<String> = self.places.iter().map(Place::name).collect();
        if names.is_empty() { String::from("any address (--listen off, --hub off)") } else { names.join(" or ") }
    }
}

impl Place {
    fn name(&self) -> String {
        match self {
            Place::Socket(path) => path.display().to_string(),
            Place::Tcp { host, port, below } => format!("http://{host}:{port}{below}"),
        }
    }
}

async fn ask(place: &Place, path: &str) -> io::Result<(StatusCode, Bytes)> {
    match place {
        Place::Socket(socket) => exchange(tokio::net::UnixStream::connect(socket).await?, "hub", path).await,
        Place::Tcp { host, port, below } => {
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            let stream = tokio::net::TcpStream::connect((bare, *port)).await?;
            exchange(stream, &format!("{host}:{port}"), &format!("{below}{path}")).await
        }
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: &str,
    path: &str,
) -> io::Result<(StatusCode, Bytes)> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    // It ends with the answer.
    let connection = tokio::spawn(connection);
    let request = Request::get(path).header(HOST, host).body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
    let answer = sender.send_request(request).await.map_err(io::Error::other)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER).collect().await.map_err(io::Error::other)?.to_bytes();
    connection.abort();
    Ok((status, body))
}
