//! The way out: directly, or through the proxy that `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name, as for the CLI.
//! Always by CONNECT: gRPC in the open needs a tunnel, and a proxy that reads along has no business here.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Connects, for whatever is spoken over it.
#[derive(Clone)]
pub(crate) struct Way {
    tcp: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Way {
    /// `patience`: how long a connection may take.
    pub(crate) fn out(patience: Duration) -> Way {
        // The environment does not change; what it says is read once.
        static PROXIES: OnceLock<Arc<Matcher>> = OnceLock::new();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(patience));
        Way { tcp, proxies: Arc::clone(PROXIES.get_or_init(|| Arc::new(Matcher::from_env()))) }
    }
}

impl Service<Uri> for Way {
    type Response = TokioIo<TcpStream>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<TcpStream>, Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let Some(by) = self.proxies.intercept(&to).filter(|_| !is_here(&to)) else {
            let connecting = self.tcp.call(to);
            return Box::pin(async { Ok(connecting.await?) });
        };
        if by.uri().scheme_str() != Some("http") {
            // It may hold a password: it is not repeated.
            return Box::pin(async { Err("the environment names a proxy that is not http://".into()) });
        }
        let mut tunnel = Tunnel::new(by.uri().clone(), self.tcp.clone());
        if let Some(auth) = by.basic_auth() {
            tunnel = tunnel.with_auth(auth.clone());
        }
        let connecting = tunnel.call(to);
        Box::pin(async { connecting.await.map_err(|error| format!("through the environment's proxy: {error}").into()) })
    }
}

/// No proxy has a way to our own loopback.
fn is_here(to: &Uri) -> bool {
    let host = to.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
