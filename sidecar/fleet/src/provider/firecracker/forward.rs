//! Ports of machines at ports of our own loopback, through Firecracker's vsock: `CONNECT port`, its `OK`, and then what both say.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Of one port at a time: who asks for more waits.
const AT_ONCE: usize = 64;
/// Firecracker says yes or no at once.
const ANSWER: Duration = Duration::from_secs(10);
/// `OK 4294967295\n`, and a little.
const LINE_MOST: usize = 32;

/// By machine and port: where it is reached, and what passes it on.
type Ports = BTreeMap<(String, u16), (SocketAddr, JoinSet<()>)>;

/// Each ends with its machine, or with us.
#[derive(Default)]
pub(super) struct Forwards(Mutex<Ports>);

impl Forwards {
    /// Where it is reached, from now on.
    pub(super) async fn to(&self, key: &str, port: u16, socket: &Path) -> io::Result<SocketAddr> {
        let known = |all: &Ports| all.get(&(key.to_owned(), port)).map(|(at, _)| *at);
        if let Some(at) = known(&self.0.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(at);
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let at = listener.local_addr()?;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody was quicker.
        if let Some(at) = known(&all) {
            return Ok(at);
        }
        let mut task = JoinSet::new();
        task.spawn(listen(listener, socket.to_owned(), port));
        all.insert((key.to_owned(), port), (at, task));
        Ok(at)
    }

    pub(super) fn end(&self, key: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(of, _), _| of != key);
    }
}

async fn listen(listener: TcpListener, socket: PathBuf, port: u16) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let Ok((caller, _)) = listener.accept().await else {
            // Out of descriptors: others give theirs back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let socket = socket.clone();
        connections.spawn(async move {
            if let Err(error) = pass(caller, &socket, port).await {
                tracing::debug!(%error, port, "a machine's port is not reached");
            }
            drop(permit);
        });
    }
}

async fn pass(mut caller: TcpStream, socket: &Path, port: u16) -> io::Result<()> {
    let mut machine = tokio::time::timeout(ANSWER, connect(socket, port)).await??;
    tokio::io::copy_bidirectional(&mut caller, &mut machine).await.map(drop)
}

/// Nothing behind Firecracker's line is read.
async fn connect(socket: &Path, port: u16) -> io::Result<UnixStream> {
    let mut machine = UnixStream::connect(socket).await?;
    machine.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        // It closes where nobody listens.
        line.push(machine.read_u8().await?);
        if line.len() > LINE_MOST {
            break;
        }
    }
    match line.starts_with(b"OK ") {
        true => Ok(machine),
        false => Err(io::Error::other("it does not say OK")),
    }
}
