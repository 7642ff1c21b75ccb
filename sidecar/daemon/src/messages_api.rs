//! `messages-api`: the scripted API of the demo and the tests, on its own.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use messages_api::{Log, Script, ScriptError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read the script {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot use the script {}", path.display())]
    Script {
        path: PathBuf,
        #[source]
        source: ScriptError,
    },
    #[error("cannot listen on {address}; choose another address with --listen")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot serve")]
    Serve(#[from] std::io::Error),
}

/// Serves until it is killed; says on stdout where.
pub(crate) fn serve(script: Option<&Path>, address: SocketAddr, log: Option<&Path>) -> Result<(), Error> {
    let path = script.unwrap_or(Path::new("(the demo's)")).to_owned();
    let text = match script {
        Some(path) => std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?,
        None => messages_api::DEMO.to_owned(),
    };
    let script = Script::parse(&text).map_err(|source| Error::Script { path, source })?;
    let log = log.map(Log::to_file).transpose()?.unwrap_or_default();
    let listener = TcpListener::bind(address).map_err(|source| Error::Listen { address, source })?;
    let mut out = std::io::stdout();
    writeln!(out, "http://{}", listener.local_addr()?)?;
    out.flush()?;
    serve_until_killed(listener, script, log)?;
    Ok(())
}

/// On a runtime of its own, on the calling thread.
pub(crate) fn serve_until_killed(listener: TcpListener, script: Script, log: Log) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(messages_api::serve(listener, script, log, std::future::pending()))
}
