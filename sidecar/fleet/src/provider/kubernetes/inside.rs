//! Commands in a pod, and its ports, over WebSockets.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube_client::api::Portforwarder;
use kube_client::{Api as Typed, Error as ClientError};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_tungstenite::tungstenite::Message;

use super::NAME;
use super::api::{Api, Ask, Opened, RIGHTS, Reached, Status, cut, is_no_right, told};
use crate::provider::{Error, Executed, OUTPUT_MOST, Result};

/// What is given to a command at a time.
const PIECE: usize = 32 << 10;
/// How long opening one of these may take.
const OPEN: Duration = Duration::from_secs(30);
/// Ports that are forwarded at a time, and connections to each.
const FORWARDS_MOST: usize = 4096;
const CONNECTIONS_MOST: usize = 64;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
/// The channel that is named after it has ended.
const CLOSE: u8 = 255;

/// Runs a command to its end, however long that takes. What it prints is in `done` also when this is given up.
pub(super) async fn run(api: &Api, ask: Ask<'_>, stdin: &[u8], done: &mut Executed) -> Result<()> {
    let ask = ask.query("stdout", "true").query("stderr", "true");
    let ask = if stdin.is_empty() { ask } else { ask.query("stdin", "true") };
    let ask = &ask;
    let connect =
        api.open(|reached| async move { Ok(reached.client.connect(ask.request(&reached.namespace, Vec::new())?).await) });
    let connection = match tokio::time::timeout(OPEN, connect).await {
        Ok(Ok(Ok(connection))) => connection,
        Ok(Ok(Err(error))) => return Err(not_opened(&error)),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Err(Error::Failed { provider: NAME, what: String::from("no answer in time") }),
    };
    if !stdin.is_empty() && !connection.supports_stream_close() {
        let hint = Some("Kubernetes can from 1.30 on");
        return Err(Error::Unsupported { provider: NAME, verb: "say where a command's input ends", hint });
    }
    let (mut there, mut here) = connection.into_stream().split();
    let give = async {
        // Who does not read it has no use for it. It is held open to the end: who hangs up ends what he listens to.
        for piece in stdin.chunks(PIECE) {
            let framed = [&[STDIN], piece].concat();
            if there.send(Message::binary(framed)).await.is_err() {
                break;
            }
        }
        if !stdin.is_empty() {
            drop(there.send(Message::binary(vec![CLOSE, STDIN])).await);
        }
        std::future::pending::<()>().await;
    };
    let take = async {
        let broken = |what: String| Error::Unsure { provider: NAME, what };
        while let Some(message) = here.next().await {
            let message = message.map_err(|error| broken(cut(&error.to_string())))?;
            let data = match message {
                Message::Binary(data) => data,
                Message::Close(_) => break,
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            let Some((channel, bytes)) = data.split_first() else { continue };
            let all = match *channel {
                STDOUT => &mut done.stdout,
                STDERR => &mut done.stderr,
                STATUS => {
                    done.exit_code = Some(ended(bytes)?);
                    return Ok(());
                }
                _ => continue,
            };
            let kept = bytes.len().min(OUTPUT_MOST - all.len());
            all.extend_from_slice(&bytes[..kept]);
            done.cut |= kept < bytes.len();
        }
        Err(broken(String::from("the command's output broke off")))
    };
    tokio::select! {
        () = give => unreachable!("it is held open"),
        taken = take => taken,
    }
}

/// The exit code in the last word about a command.
fn ended(said: &[u8]) -> Result<i32> {
    let broken = |what: String| Error::Unsure { provider: NAME, what };
    let status: Status = serde_json::from_slice(said).map_err(|error| broken(format!("a status of another shape: {error}")))?;
    if status.status == "Success" {
        return Ok(0);
    }
    let code = status.details.causes.iter().find(|cause| cause.reason == "ExitCode");
    if let Some(code) = code.and_then(|cause| cause.message.parse().ok()) {
        return Ok(code);
    }
    let what = cut(&status.message);
    // By the runtimes' words: it was never begun.
    match ["executable file not found", "no such file or directory", "permission denied"].iter().any(|no| what.contains(no)) {
        true => Err(Error::Refused { provider: NAME, what }),
        false => Err(broken(what)),
    }
}

fn not_opened(error: &ClientError) -> Error {
    match error {
        ClientError::Api(status) => {
            let hint = if is_no_right(&status.message) { RIGHTS } else { "" };
            let what = format!("it answers {}: {}{hint}", status.code, cut(&status.message));
            match status.code {
                404 => Error::Missing { provider: NAME },
                429 => Error::Busy { provider: NAME, after: None },
                400 | 401 | 409 | 500.. => Error::Failed { provider: NAME, what },
                _ => Error::Refused { provider: NAME, what },
            }
        }
        other => Error::Failed { provider: NAME, what: told(other) },
    }
}

/// Ports of pods, as ports of this machine's own.
#[derive(Default)]
pub(super) struct Forwards(Mutex<HashMap<(String, u16), Forward>>);

struct Forward {
    at: SocketAddr,
    pod: String,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Forwards {
    /// Where the port is reached: the same place each time that it is asked for, as long as it is the same pod.
    pub(super) async fn open(&self, api: &Arc<Api>, native: &str, pod: &str, port: u16) -> Result<SocketAddr> {
        let failed = |what: String| Error::Failed { provider: NAME, what };
        let key = (native.to_owned(), port);
        {
            let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            held.retain(|of, forward| !forward.task.is_finished() && (*of != key || forward.pod == pod));
            if let Some(forward) = held.get(&key) {
                return Ok(forward.at);
            }
            if held.len() >= FORWARDS_MOST {
                return Err(failed(format!("{FORWARDS_MOST} ports are forwarded already")));
            }
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(|error| failed(error.to_string()))?;
        let at = listener.local_addr().map_err(|error| failed(error.to_string()))?;
        let task = tokio::spawn(serve(listener, Arc::clone(api), pod.to_owned(), port));
        // Of two at once the first one stays.
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(held.entry(key).or_insert(Forward { at, pod: pod.to_owned(), task }).at)
    }

    /// Of what is gone nothing is forwarded.
    pub(super) fn close(&self, native: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(of, _), _| of != native);
    }
}

async fn serve(listener: TcpListener, api: Arc<Api>, pod: String, port: u16) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MOST));
    let mut open = tokio::task::JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(turn) = Arc::clone(&room).acquire_owned().await else { return };
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (api, pod) = (Arc::clone(&api), pod.clone());
        open.spawn(async move {
            if let Err(error) = forward(socket, &api, &pod, port).await {
                tracing::debug!(provider = NAME, pod, port, error, "a forwarded connection has ended");
            }
            drop(turn);
        });
    }
}

async fn tunnel(reached: Reached, pod: &str, port: u16) -> Opened<Portforwarder> {
    Typed::<Pod>::namespaced(reached.client, &reached.namespace).portforward(pod, &[port]).await
}

async fn forward(mut socket: TcpStream, api: &Api, pod: &str, port: u16) -> std::result::Result<(), String> {
    // As whoever we are now: a place that is forwarded is older than the credentials.
    let opened = api.open(|reached| async move { Ok(tunnel(reached, pod, port).await) });
    let opened = tokio::time::timeout(OPEN, opened).await.map_err(|_| String::from("no answer in time"))?;
    let mut tunnel = opened.map_err(|error| error.to_string())?.map_err(|error| told(&error))?;
    let mut there = tunnel.take_stream(port).ok_or("it has no such port")?;
    let refused = tunnel.take_error(port).ok_or("it has no such port")?;
    let passed = async { tokio::io::copy_bidirectional(&mut socket, &mut there).await };
    tokio::select! {
        passed = passed => passed.map(drop).map_err(|error| error.to_string()),
        // Nobody listens there, mostly: whoever has come is not kept waiting for the connection's end.
        Some(error) = refused => Err(cut(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_command_ended_is_in_its_last_word() {
        let code = |said: &str| ended(said.as_bytes());
        assert_eq!(code(r#"{"metadata":{},"status":"Success"}"#).unwrap(), 0);
        let failed = r#"{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code: exit status 3","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(code(failed).unwrap(), 3);
        let none = r#"{"metadata":{},"status":"Failure","message":"error executing command in container: exec: \"x\": executable file not found in $PATH","reason":"InternalError","code":500}"#;
        assert!(matches!(code(none), Err(Error::Refused { .. })));
        let lost = r#"{"metadata":{},"status":"Failure","message":"error executing command in container: context canceled","reason":"InternalError","code":500}"#;
        assert!(matches!(code(lost), Err(Error::Unsure { .. })));
        assert!(code("").is_err());
    }
}
