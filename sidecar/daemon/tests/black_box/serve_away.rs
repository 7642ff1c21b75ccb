//! A session of several goes on in another container: with what is its own and nothing else, for whoever has the container's token.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::fleet::hear;
use crate::serve::{Server, TOKEN, command};
use crate::support::*;

/// The container's, and not the app's.
const KEY: &str = "0123456789abcdef0123456789abcdef";

fn container(dir: &Path, name: &str) -> Server {
    let root = dir.join("agents");
    let flags = ["--conversation-serve", "--fleet-container", name, "--agent-dirs", root.to_str().unwrap()];
    let mut command = command(dir, &flags);
    command.env("AGENT_SIDECAR_FLEET_TOKEN", KEY);
    Server::of(command, dir)
}

/// What a session has there.
fn home(dir: &Path, id: &str) -> PathBuf {
    dir.join("agents/_").join(id)
}

fn ask(server: &Server, method: &str, id: &str, token: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("{method} /sessions/{id}/conversation HTTP/1.1\r\nHost: here\r\nConnection: close\r\n");
    // Who is refused early may have closed.
    write!(stream, "{head}Authorization: Bearer {token}\r\nContent-Length: {}\r\n\r\n", body.len()).ok();
    stream.write_all(body).ok();
    stream
}

fn talk(server: &Server, method: &str, id: &str, token: &str, body: &[u8]) -> (u16, Vec<u8>) {
    hear(ask(server, method, id, token, body)).unwrap_or_else(|| panic!("{method} {id} was broken off"))
}

fn take(server: &Server, id: &str) -> Vec<u8> {
    let (status, tar) = talk(server, "GET", id, KEY, b"");
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&tar));
    tar
}

fn bring(server: &Server, id: &str, tar: &[u8]) -> u16 {
    talk(server, "PUT", id, KEY, tar).0
}

/// How far it has come, by its own word.
fn mark(server: &Server, id: &str) -> Option<String> {
    let mut head = String::new();
    ask(server, "HEAD", id, KEY, b"").read_to_string(&mut head).unwrap();
    head.lines().find_map(|line| line.strip_prefix("agent-conversation-mark: ")).map(str::to_owned)
}

/// Files, with what is in them, and links, with where they lead to.
fn files(tar: &[u8]) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(tar);
    let read = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut text = entry.link_name().unwrap().map(|to| format!("-> {}", to.display())).unwrap_or_default();
        entry.read_to_string(&mut text).unwrap();
        (entry.header().entry_type() != tar::EntryType::Directory).then_some((name, text))
    });
    read.flatten().collect()
}

/// One file of any name.
fn archive(name: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    for set in [tar::Header::set_size, tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_mtime] {
        set(&mut header, 1);
    }
    header.set_mode(0o644);
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.push(b'x');
    tar.resize(512 * 4, 0);
    tar
}

#[test]
fn a_session_goes_on_in_another_container_with_what_is_its_own() {
    let (from, to) = (Scratch::new("serve", "away-from"), Scratch::new("serve", "away-to"));
    let first = container(&from, "agent-1-1");
    for id in ["a", "b"] {
        first.last(id, &format!("hello {id}"), "done");
        std::fs::write(home(&from, id).join("workspace/notes"), format!("of {id}")).unwrap();
    }
    let conversation = first.ask("GET", "/sessions/a").1["conversation"].as_str().unwrap().to_owned();
    let env = first.starts()[0]["env"].to_string();
    assert!(!env.contains("FLEET_TOKEN"), "{env}");
    // The other one works, and hears nothing of it.
    let go = from.join("go");
    let mut turn = first.begin("b", &format!("wait {}", go.display()));
    turn.next().unwrap();
    for method in ["GET", "HEAD", "DELETE"] {
        assert_eq!(talk(&first, method, "b", KEY, b"").0, 409, "{method}: it works");
    }
    assert_eq!(talk(&first, "GET", "a", TOKEN, b"").0, 401, "whoever may talk to it may not have it");
    assert_eq!(talk(&first, "POST", "a", KEY, b"").0, 405);
    assert_eq!(talk(&first, "GET", "..", KEY, b"").0, 400);
    let before = mark(&first, "a").unwrap();
    assert_eq!(first.ask("GET", "/sessions/a").1["state"], "waiting", "who only looks ends nobody");
    let tar = take(&first, "a");
    let transcript = format!("config/projects/work/{conversation}.jsonl");
    let own = BTreeMap::from([
        (transcript.clone(), String::from("hello a\n")),
        (String::from("workspace/notes"), String::from("of a")),
    ]);
    assert_eq!(files(&tar), own);
    assert_eq!(mark(&first, "a"), Some(before), "nothing was said since");
    let state = |server: &Server, id: &str| server.ask("GET", &format!("/sessions/{id}")).1["state"].clone();
    assert_eq!([state(&first, "a"), state(&first, "b")], ["resting", "working"]);

    let second = container(&to, "agent-1-2");
    second.last("c", "hello", "done");
    assert_eq!(bring(&second, "c", &tar), 409, "something was said to it here");
    assert_eq!(bring(&second, "a", &tar[..tar.len() - 1024]), 400, "half of it");
    assert!(!home(&to, "a").join("workspace/notes").exists() && second.ask("GET", "/sessions/a").0 == 404);
    assert_eq!(bring(&second, "a", &tar), 200);
    assert_eq!(second.ask("GET", "/sessions/a").1["conversation"], json!(conversation));
    assert_eq!(bring(&second, "a", &tar), 200, "whose answer was lost may ask again");
    second.last("a", "again", "done");
    let last = second.starts().pop().unwrap();
    assert_eq!(last["resume"], json!([conversation]));
    assert_eq!(std::fs::read_to_string(Path::new(last["cwd"].as_str().unwrap()).join("notes")).unwrap(), "of a");
    assert_eq!(files(&take(&second, "a"))[&transcript], "hello a\nagain\n");
    // Also after a restart, and by then much may have been said.
    assert_eq!(second.stop(), Some(0));
    let second = container(&to, "agent-1-2");
    assert_eq!(bring(&second, "a", &tar), 200);
    assert_eq!(files(&take(&second, "a"))[&transcript], "hello a\nagain\n");

    // What is elsewhere by now needs no room here.
    assert_eq!(talk(&first, "DELETE", "a", KEY, b"").0, 204);
    assert!(!home(&from, "a").exists() && home(&from, "b").exists());
    assert_eq!(std::fs::read_dir(from.join("agents/_")).unwrap().count(), 1, "nothing is left of it");
    assert_eq!(first.ask("GET", "/sessions/a").0, 404);
    assert_eq!(talk(&first, "DELETE", "a", KEY, b"").0, 204, "it is gone");
    assert_eq!(files(&take(&first, "a")), BTreeMap::new());
    std::fs::write(&go, "").unwrap();
    while turn.next().unwrap().0 != "done" {}
    // And it may come back.
    assert_eq!(bring(&first, "a", &take(&second, "a")), 200);
    first.last("a", "back", "done");
    assert_eq!(first.starts().pop().unwrap()["resume"], json!([conversation]));
    assert_eq!(first.stop(), Some(0));
}

#[test]
fn of_a_session_to_which_somebody_says_something_meanwhile_only_a_part_is_given() {
    let dir = Scratch::new("serve", "away-meanwhile");
    let server = container(&dir, "agent-1-1");
    server.last("a", "hello", "done");
    // More than is on its way to somebody who does not read.
    std::fs::File::create(home(&dir, "a").join("workspace/large")).unwrap().set_len(64 << 20).unwrap();
    let taken = |meanwhile: &dyn Fn()| {
        let mut stream = ask(&server, "GET", "a", KEY, b"");
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
        meanwhile();
        hear((&status[..]).chain(stream)).is_some()
    };
    assert!(taken(&|| {}), "nobody works");
    let before = mark(&server, "a");
    // A turn that is over when it is looked at again: whoever says something has it answered.
    assert!(!taken(&|| assert_eq!(server.last("a", "and more", "done"), "and more")));
    assert_ne!(mark(&server, "a"), before);
    assert!(
        taken(&|| {
            server.last("b", "hello", "done");
        }),
        "another's is another's"
    );
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn where_it_is_not_opened_or_sessions_have_nothing_of_their_own_it_is_closed() {
    let dir = Scratch::new("serve", "away-closed");
    let of = |flags: &[&str]| {
        let mut command = command(&dir, flags);
        command.env("AGENT_SIDECAR_FLEET_TOKEN", KEY);
        Server::of(command, &dir)
    };
    let closed = of(&["--agent-dirs", dir.join("agents").to_str().unwrap()]);
    assert_eq!([TOKEN, KEY].map(|token| talk(&closed, "GET", "a", token, b"").0), [404, 401]);
    assert_eq!(closed.stop(), Some(0));
    let shared = of(&["--conversation-serve"]);
    let (status, why) = talk(&shared, "GET", "a", KEY, b"");
    assert!(status == 404 && String::from_utf8(why).unwrap().contains("no directories of their own"));
    assert_eq!(talk(&shared, "GET", "a", "another-0123456789abcdef", b"").0, 401);
    assert_eq!(shared.stop(), Some(0));
}

#[test]
fn nothing_leads_from_one_session_to_another_or_out() {
    let dir = Scratch::new("serve", "away-links");
    let server = container(&dir, "agent-1-1");
    for id in ["a", "b"] {
        server.last(id, "hello", "done");
    }
    std::fs::write(home(&dir, "b").join("workspace/secret"), "of b").unwrap();
    symlink(home(&dir, "b"), home(&dir, "a").join("workspace/b")).unwrap();
    let all = files(&take(&server, "a"));
    assert!(all["workspace/b"].starts_with("-> ") && all.keys().all(|name| !name.contains("secret")), "{all:?}");
    // Its whole directory is a link now.
    std::fs::remove_dir_all(home(&dir, "a").join("workspace")).unwrap();
    symlink(home(&dir, "b").join("workspace"), home(&dir, "a").join("workspace")).unwrap();
    let (status, said) = talk(&server, "GET", "a", KEY, b"");
    assert!(status == 500 && !String::from_utf8_lossy(&said).contains("of b"), "{status}");

    for name in ["../../x", "config/../../b/workspace/secret", "/tmp/x", "other/x", "tmp/x", ""] {
        assert_eq!(bring(&server, "c", &archive(name)), 400, "{name}");
    }
    assert_eq!(bring(&server, "c", &archive("workspace/x")), 200);
    // What was put in the place of one that comes.
    symlink(home(&dir, "b"), home(&dir, "d")).unwrap();
    assert_eq!(bring(&server, "d", &archive("workspace/secret")), 500);
    assert_eq!(talk(&server, "DELETE", "d", KEY, b"").0, 204);
    assert_eq!(std::fs::read_to_string(home(&dir, "b").join("workspace/secret")).unwrap(), "of b");
    let all: Vec<Value> = server.ask("GET", "/sessions").1["sessions"].as_array().unwrap().clone();
    assert_eq!(all.len(), 2, "nothing was said to those that came: {all:?}");
    assert_eq!(server.stop(), Some(0));
}
