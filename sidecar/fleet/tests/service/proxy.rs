//! Talking to sessions: what is passed on and what is not, who is woken or made for it, and that it comes as it is said.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::lifecycle::Phase;
use agent_fleet::session::Wanted;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::api::Served;
use crate::town::until;

/// An app in every container, which writes down what it was asked. A message is answered with one event, and with one more for each permit.
struct App {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
    go: Arc<Semaphore>,
    /// What came last through a WebSocket.
    closed: Arc<Mutex<Vec<u8>>>,
}

impl App {
    async fn start() -> App {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, go) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(0)));
        let closed = Arc::default();
        let app = App { url, asked: Arc::clone(&asked), go: Arc::clone(&go), closed: Arc::clone(&closed) };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, Arc::clone(&asked), Arc::clone(&go), Arc::clone(&closed)));
            }
        });
        app
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(mut stream: TcpStream, asked: Arc<Mutex<Vec<String>>>, go: Arc<Semaphore>, closed: Arc<Mutex<Vec<u8>>>) {
    let mut said = Vec::new();
    let (head, length) = loop {
        let mut chunk = [0; 1024];
        let n = stream.read(&mut chunk).await.unwrap();
        assert!(n > 0);
        said.extend_from_slice(&chunk[..n]);
        let text = String::from_utf8_lossy(&said).to_ascii_lowercase();
        if let Some((head, _)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            break (head.len() + 4, length.unwrap_or(0));
        }
    };
    while said.len() < head + length {
        let mut chunk = [0; 1024];
        let n = stream.read(&mut chunk).await.unwrap();
        said.extend_from_slice(&chunk[..n]);
    }
    let text = String::from_utf8(said).unwrap();
    asked.lock().unwrap().push(text.clone());
    if text.starts_with("GET /ws") {
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n").await.unwrap();
        if text.starts_with("GET /ws/listen") {
            return listen(stream, &closed).await;
        }
        let mut chunk = [0; 1024];
        while let Ok(n @ 1..) = stream.read(&mut chunk).await {
            stream.write_all(&chunk[..n]).await.unwrap();
        }
        return;
    }
    let refused = text.contains("refuse me");
    let head = if refused { "401 Unauthorized" } else { "200 OK" };
    let head =
        format!("HTTP/1.1 {head}\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nX-Of-The-App: yes\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    loop {
        let event = "event: message\ndata: {}\n\n";
        if stream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await.is_err() {
            return;
        }
        let done = text.contains("at once") || refused;
        if done || go.acquire().await.is_err() {
            break;
        }
        go.forget_permits(1);
    }
    stream.write_all(b"0\r\n\r\n").await.ok();
}

/// Says again what it hears, up to the frame that closes it: wherever the network cuts what comes.
async fn listen(mut stream: TcpStream, closed: &Mutex<Vec<u8>>) {
    let (mut heard, mut said, mut at, mut chunk) = (Vec::new(), 0, 0, [0; 1024]);
    while let Ok(n @ 1..) = stream.read(&mut chunk).await {
        heard.extend_from_slice(&chunk[..n]);
        // Where the last frame begins of which something is there.
        let length = |heard: &[u8], at: usize| Some(6 + usize::from(heard.get(at + 1)? & 0x7f));
        let closes = loop {
            match (heard.get(at), length(&heard, at)) {
                (Some(0x88), length) => break Some(length),
                (Some(_), Some(length)) => at += length,
                _ => break None,
            }
        };
        let until = if closes.is_some() { at } else { heard.len() };
        stream.write_all(&heard[said..until]).await.unwrap();
        said = until;
        if closes.flatten().is_some_and(|length| heard.len() >= at + length) {
            heard[at..].clone_into(&mut closed.lock().unwrap());
            return;
        }
    }
}

async fn served(name: &str) -> (Served, App) {
    let (served, app) = (Served::new(name).await, App::start().await);
    served.town.cloud.app.lock().unwrap().clone_from(&app.url);
    (served, app)
}

impl Served {
    async fn say(&self, who: &str, path: &str, prompt: &str) -> reqwest::Response {
        let asked = self.client.post(format!("{}/v1/sessions/{path}", self.url)).bearer_auth(who.repeat(12));
        asked.json(&json!({"prompt": prompt})).send().await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_reaches_ones_own_session_and_its_answer_comes_as_it_is_said() {
    let (served, app) = served("message").await;
    assert_eq!(served.create("shop", json!({"template": "chat", "id": "a"})).await.0, 201);
    let message = json!({"prompt": "hello"});
    for (who, status) in [("", 401), ("nobody", 401), ("bank", 404)] {
        assert_eq!(served.ask(who, "POST", "/v1/sessions/a/messages", Some(message.clone())).await.0, status, "{who}");
    }
    for body in [json!({}), json!({"prompt": 1}), json!([])] {
        assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/messages", Some(body)).await.0, 400);
    }
    for id in ["-a", "a%20b", "a%2Fb", &"a".repeat(65)] {
        let (status, said) = served.ask("shop", "POST", &format!("/v1/sessions/{id}/messages"), Some(message.clone())).await;
        assert!(status == 400 && said["error"].as_str().unwrap().contains("a session id has"), "{id}: {status} {said}");
        assert_eq!(served.ask("shop", "GET", &format!("/v1/sessions/{id}/app/x"), None).await.0, 400, "{id}");
    }
    let long = json!({"prompt": "x".repeat(1 << 20)});
    assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/messages", Some(long)).await.0, 413);
    assert!(app.asked().is_empty(), "the app heard nothing of all that");

    // It waits until the container is up.
    let mut answer = served.say("shop", "a/messages", "hello").await;
    assert_eq!((answer.status().as_u16(), answer.headers()["content-type"].to_str().unwrap()), (200, "text/event-stream"));
    assert_eq!(answer.headers()["x-of-the-app"], "yes");
    let told = format!("{:?}", answer.headers());
    assert!(!told.contains("appapp") && !told.contains("key-of-the-provider"), "{told}");
    // The first event is here before the app says the second.
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "event: message\ndata: {}\n\n");
    app.go.add_permits(1);
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "event: message\ndata: {}\n\n");
    let asked = app.asked().concat();
    assert!(asked.starts_with("POST /sessions/a/messages HTTP/1.1\r\n") && asked.ends_with(r#"{"prompt":"hello"}"#), "{asked}");
    let lower = asked.to_ascii_lowercase();
    assert!(lower.contains(&format!("authorization: bearer {}\r\n", "app".repeat(12))), "{asked}");
    assert!(lower.contains("x-provider-key: key-of-the-provider\r\n") && !lower.contains("shopshop"), "{asked}");
    assert!(lower.contains("agent-session: a\r\n"), "{asked}");

    // That our token is refused is not the caller's mistake.
    let refused = served.say("shop", "a/messages", "refuse me").await;
    assert_eq!(refused.status().as_u16(), 502);
    assert!(refused.text().await.unwrap().contains("refuses the fleet's token"));
    // An app of one's own has other paths.
    let (status, said) = served.ask("shop", "POST", "/v1/sessions/a/app/v2/things?x=%2e%2e", Some(json!("at once"))).await;
    assert_eq!((status, said.as_str()), (200, Some("event: message\ndata: {}\n\n")));
    assert!(app.asked().last().unwrap().starts_with("POST /v2/things?x=%2e%2e HTTP/1.1\r\n"));
    assert_eq!(served.ask("bank", "GET", "/v1/sessions/a/app/x", None).await.0, 404);

    assert_eq!(served.create("shop", json!({"template": "task", "id": "deaf"})).await.0, 201);
    let (status, said) = served.ask("shop", "POST", "/v1/sessions/deaf/messages", Some(message.clone())).await;
    assert!(status == 422 && said["error"].as_str().unwrap().contains("app_port"), "{said}");
    assert_eq!(served.ask("shop", "DELETE", "/v1/sessions/a", None).await.0, 202);
    assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/messages", Some(message)).await.0, 409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sleeps_is_woken_and_who_is_not_there_is_made_where_a_template_is_named() {
    let (served, app) = served("woken").await;
    assert_eq!(served.say("shop", "a/messages", "at once").await.status().as_u16(), 404);
    assert_eq!(served.say("shop", "a/messages?template=nothing", "at once").await.status().as_u16(), 400);
    assert_eq!(served.say("shop", "a/messages?template=chat&tenant=globex", "at once").await.status().as_u16(), 403);
    // Nobody could talk to what is made from this one: it would work, and cost, for nothing.
    let deaf = served.say("shop", "a/messages?template=task", "at once").await;
    assert_eq!((deaf.status().as_u16(), deaf.text().await.unwrap().contains("template `task` has no app")), (422, true));
    assert!(served.town.store.get(&"a".parse().unwrap()).await.unwrap().is_none());
    for _ in 0..2 {
        let made = served.say("shop", "a/messages?template=chat", "at once").await;
        assert_eq!(made.status().as_u16(), 200);
        assert_eq!(made.text().await.unwrap(), "event: message\ndata: {}\n\n");
    }
    assert_eq!(served.town.cloud.alive(), 1, "the same session is the same container");
    assert_eq!(served.say("bank", "a/messages?template=chat&tenant=acme", "at once").await.status().as_u16(), 409);

    assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/pause", None).await.0, 202);
    served.town.reaches("a", Phase::Paused).await;
    // It is said at once, and nobody wakes it when that is over but who asks again.
    assert_eq!(served.ask("ops", "POST", "/v1/providers/cloud/drain", Some(json!({"seconds": 600}))).await.0, 202);
    let drained = served.say("shop", "a/messages", "at once").await;
    assert_eq!((drained.status().as_u16(), drained.headers()["retry-after"].to_str().unwrap()), (503, "5"));
    assert!(drained.text().await.unwrap().contains("session `a` sleeps, and is not woken before the drain of provider `cloud`"));
    assert_eq!(served.town.get("a").await.wanted, Wanted::Paused);
    assert_eq!(served.ask("ops", "DELETE", "/v1/providers/cloud/drain", None).await.0, 200);
    assert_eq!(served.say("shop", "a/messages", "at once").await.status().as_u16(), 200);
    let woken = served.town.get("a").await;
    assert!(woken.phase.is_up() && woken.wanted == Wanted::Running, "{woken:?}");
    assert_eq!((woken.generation, app.asked().len()), (1, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_in_use_while_its_answer_comes_and_no_longer() {
    let (served, app) = served("in-use").await;
    let mut answer = served.say("shop", "a/messages?template=chat", "go on").await;
    answer.chunk().await.unwrap().unwrap();
    let since = async || served.town.get("a").await.idle_since;
    // Its agent is idle by the sidecar's word, which may be behind; that it is talked to is known here.
    let mut last = since().await;
    for _ in 0..3 {
        let before = last;
        while last == before {
            app.go.add_permits(1);
            answer.chunk().await.unwrap().unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            last = since().await;
        }
        assert!(last > before);
    }
    // Somebody who wants it to sleep is not contradicted by that.
    assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/pause", None).await.0, 202);
    served.town.reaches("a", Phase::Paused).await;
    app.go.add_permits(1);
    answer.chunk().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(served.town.get("a").await.phase, Phase::Paused);
}

impl Served {
    /// A WebSocket of somebody's to a session, and what was answered.
    async fn socket(&self, who: &str, path: &str) -> (TcpStream, String) {
        let mut stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).await.unwrap();
        let head = format!(
            "GET /v1/sessions/{path} HTTP/1.1\r\nHost: fleet\r\nAuthorization: Bearer {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Agent-Session: another\r\nSec-WebSocket-Key: k\r\nSec-WebSocket-Version: 13\r\n\r\n",
            who.repeat(12)
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.unwrap());
        }
        (stream, String::from_utf8(answer).unwrap().to_ascii_lowercase())
    }
}

/// A client's, with a mask of zeros.
fn frame(first: u8, said: &[u8]) -> Vec<u8> {
    [&[first, 0x80 | u8::try_from(said.len()).unwrap(), 0, 0, 0, 0], said].concat()
}

/// All that comes until it is closed.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    rest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_on_which_nobody_says_anything_keeps_nobody_awake_and_is_closed_with_a_reason() {
    let (served, app) = served("silence").await;
    assert_eq!(served.create("shop", json!({"template": "chat", "id": "a"})).await.0, 201);
    let (mut stream, answer) = served.socket("shop", "a/ws").await;
    assert!(answer.starts_with("http/1.1 101"), "{answer}");
    let since = async || served.town.get("a").await.idle_since;
    // Many clients send these by themselves.
    let before = since().await;
    let (ping, mut echoed) = (frame(0x89, b"are you there"), [0; 19]);
    let until = tokio::time::Instant::now() + Duration::from_millis(2500);
    while tokio::time::Instant::now() < until {
        stream.write_all(&ping).await.unwrap();
        stream.read_exact(&mut echoed).await.unwrap();
        assert_eq!(echoed[..], ping);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(since().await, before);
    let text = frame(0x81, b"are you there");
    while since().await == before {
        stream.write_all(&text).await.unwrap();
        stream.read_exact(&mut echoed).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/pause", None).await.0, 202);
    let closed = rest(&mut stream).await;
    assert_eq!(served.town.get("a").await.phase, Phase::Paused);
    assert_eq!(closed[..4], [0x88, u8::try_from(closed.len() - 2).unwrap(), 0x03, 0xe9], "1001, by the fleet");
    assert_eq!(closed[4..], *b"the session sleeps: connect again, and it is woken");
    // Who connects again wakes it.
    let (mut stream, answer) = served.socket("shop", "a/ws").await;
    assert!(answer.starts_with("http/1.1 101") && served.town.get("a").await.phase.is_up(), "{answer}");
    assert_eq!(app.asked().len(), 2);
    // In the middle of what the app says nothing is put in between.
    stream.write_all(&frame(0x81, b"half of it")[..8]).await.unwrap();
    let mut half = [0; 8];
    stream.read_exact(&mut half).await.unwrap();
    let (mut other, _) = served.socket("shop", "a/ws").await;
    assert_eq!(served.ask("shop", "DELETE", "/v1/sessions/a", None).await.0, 202);
    assert_eq!(rest(&mut other).await[4..], *b"the session has ended");
    assert!(rest(&mut stream).await.is_empty());
}

/// The end of a fleet is told to both ends of a WebSocket, and to who listens to events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_that_ends_takes_leave() {
    let (mut served, app) = served("leave").await;
    assert_eq!(served.create("shop", json!({"template": "chat", "id": "a"})).await.0, 201);
    let (mut stream, answer) = served.socket("shop", "a/ws/listen").await;
    assert!(answer.starts_with("http/1.1 101"), "{answer}");
    // Something is on its way in both directions, and is whole before the last frame.
    stream.write_all(&frame(0x81, b"half of it")[..8]).await.unwrap();
    stream.read_exact(&mut [0; 8]).await.unwrap();
    let events = served.client.get(format!("{}/v1/events", served.url)).bearer_auth("shop".repeat(12)).send().await.unwrap();
    assert_eq!(events.status().as_u16(), 200);
    let talk = async {
        stream.write_all(&frame(0x81, b"half of it")[8..]).await.unwrap();
        let mut whole = [0; 8];
        stream.read_exact(&mut whole).await.unwrap();
        rest(&mut stream).await
    };
    let (closed, events, ()) = tokio::join!(talk, events.text(), served.ends());
    assert_eq!(closed[..4], [0x88, u8::try_from(closed.len() - 2).unwrap(), 0x03, 0xe9], "1001");
    assert_eq!(closed[4..], *b"going away: the fleet ends here, connect again");
    events.unwrap();
    // The app hears what a client would have said.
    until("the app has heard it", || async { !app.closed.lock().unwrap().is_empty() }).await;
    let heard = app.closed.lock().unwrap().clone();
    let mask: [u8; 4] = heard[2..6].try_into().unwrap();
    assert_eq!((heard[0], heard[1] & 0x80), (0x88, 0x80), "{heard:?}");
    let said: Vec<u8> = heard[6..].iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
    assert_eq!(said, closed[2..]);
    assert_eq!(served.town.get("a").await.wanted, Wanted::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_is_passed_through_byte_for_byte_to_its_owner_alone() {
    let (served, app) = served("websocket").await;
    assert_eq!(served.create("shop", json!({"template": "chat", "id": "a"})).await.0, 201);
    let open = async |who: &str, path: &str| served.socket(who, &format!("a/{path}")).await;
    let (_, refused) = open("bank", "ws").await;
    assert!(refused.starts_with("http/1.1 404"), "{refused}");
    for (path, there) in [("ws", "/ws"), ("ws/room?n=1", "/ws/room?n=1"), ("app/ws/x", "/ws/x")] {
        let (mut stream, answer) = open("shop", path).await;
        assert!(answer.starts_with("http/1.1 101") && answer.contains("sec-websocket-accept: x\r\n"), "{answer}");
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let (mut from, mut to) = stream.split();
        let mut back = vec![0; bytes.len()];
        let (sent, heard) = tokio::join!(to.write_all(&bytes), from.read_exact(&mut back));
        sent.unwrap();
        heard.unwrap();
        assert_eq!(back, bytes);
        let asked = app.asked().last().unwrap().clone();
        assert!(asked.starts_with(&format!("GET {there} HTTP/1.1\r\n")), "{asked}");
        let lower = asked.to_ascii_lowercase();
        // Whose it is says the fleet alone.
        assert!(lower.contains("agent-session: a\r\n") && !lower.contains("another"), "{asked}");
        assert!(
            lower.contains("sec-websocket-key: k\r\n") && lower.contains("upgrade: websocket\r\n") && !lower.contains("shopshop"),
            "{asked}"
        );
    }
    assert_eq!(served.ask("shop", "GET", "/v1/sessions/a/ws", None).await.0, 426);
}
