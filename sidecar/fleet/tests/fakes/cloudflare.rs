//! The Worker of deploy/cloudflare/fleet: what it says and does, by its own contract. The Worker itself is tried by tests/fleet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::contract::Contract;
use super::machine::{Machine, kill};
use super::{Api, Content, Reply, Request, TOKEN};
use crate::conformance::Call;

pub(crate) const PAGE: usize = 3;
/// What its configuration says.
pub(crate) const IMAGE: &str = "registry.example.com/agent:1.0.0";

pub(crate) struct Cloudflare {
    api: Contract,
    sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    /// What each was created with, but for its environment.
    asked: Mutex<Vec<Value>>,
}

struct Sandbox {
    told: Value,
    machine: Arc<Machine>,
    pid: u32,
    ended: Arc<Mutex<Option<i64>>>,
}

fn no(status: u16, error: &str) -> Reply {
    Reply::json(status, json!({ "error": error }))
}

impl Cloudflare {
    pub(crate) fn new() -> Self {
        let contract = include_str!("../../../../deploy/cloudflare/fleet/openapi.json");
        Self { api: Contract::parse(contract), sandboxes: Mutex::default(), asked: Mutex::default() }
    }

    pub(crate) fn count(&self, key: &str) -> usize {
        self.sandboxes.lock().unwrap().keys().filter(|has| *has == key).count()
    }

    pub(crate) fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }

    fn manage(&self, request: &Request) -> Reply {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let body = request.json();
        match (request.method.as_str(), &request.segments()[2..]) {
            ("GET", []) => {
                let asked = || request.query.iter().filter_map(|(name, value)| Some((name.strip_prefix("label.")?, value)));
                let after = request.query("cursor").unwrap_or_default();
                let fit = sandboxes.iter().filter(|(key, _)| key.as_str() > after);
                let fit = fit.filter(|(_, has)| asked().all(|(name, value)| has.told["labels"][name] == **value));
                let mut page: Vec<Value> = fit.take(PAGE + 1).map(|(_, has)| has.said()).collect();
                let more = page.len() > PAGE;
                page.truncate(PAGE);
                let mut said = json!({ "sandboxes": page });
                if more {
                    said["next"] = page[PAGE - 1]["key"].clone();
                }
                Reply::json(200, said)
            }
            ("PUT", [key]) => {
                let named = body["image"].as_str().unwrap_or(IMAGE);
                if named != IMAGE {
                    return no(400, &format!("the image here is {IMAGE}"));
                }
                if !sandboxes.contains_key(*key) {
                    sandboxes.insert((*key).to_owned(), Sandbox::start(key, &body));
                    let mut asked = body;
                    asked["env"] = Value::Null;
                    self.asked.lock().unwrap().push(asked);
                }
                Reply::json(200, sandboxes[*key].said())
            }
            ("DELETE", [key]) => {
                sandboxes.remove(*key);
                Reply::empty(204)
            }
            (method, [key, verb @ ..]) => {
                let Some(sandbox) = sandboxes.get_mut(*key) else { return no(404, "there is no such sandbox") };
                match (method, verb) {
                    ("GET", []) => {}
                    ("POST", ["stop"]) => {
                        sandbox.stop(Duration::from_secs_f64(body["grace_s"].as_f64().expect("the contract says so")))
                    }
                    ("POST", ["keepalive"]) => sandbox.keep_alive(&body["until"]),
                    other => panic!("the contract has {other:?}"),
                }
                Reply::json(200, sandbox.said())
            }
            other => panic!("the contract has {other:?}"),
        }
    }

    /// To a port: whoever runs listens there.
    fn pass(&self, to: &str) -> Reply {
        let sandboxes = self.sandboxes.lock().unwrap();
        let (key, _) = to.split_once(':').expect("a key and a port");
        match sandboxes.get(key) {
            None => no(404, "there is no such sandbox"),
            Some(has) if has.said()["state"] == "running" => Reply::json(200, json!({ "passed": true })),
            Some(_) => no(409, "it does not run"),
        }
    }
}

impl Sandbox {
    fn start(key: &str, body: &Value) -> Self {
        let env = serde_json::from_value(body["env"].clone()).unwrap_or_default();
        let machine = Arc::new(Machine::new(env));
        let argv: Vec<String> = serde_json::from_value(body["command"].clone()).unwrap_or_default();
        let argv = if argv.is_empty() { ["sleep", "1000"].map(String::from).to_vec() } else { argv };
        let mut child = machine.spawn(&argv, &BTreeMap::new(), false).expect("it is a program");
        let (pid, ended) = (child.id(), Arc::<Mutex<Option<i64>>>::default());
        let tell = ended.clone();
        std::thread::spawn(move || {
            let status = child.wait().expect("it is ours");
            *tell.lock().unwrap() = Some(status.code().map_or(137, i64::from));
        });
        let after = |seconds: &Value| {
            let later = Duration::from_secs_f64(seconds.as_f64()?);
            Some((Timestamp::now() + later).to_string())
        };
        let ends = after(&body["ttl_s"]).expect("the contract says so");
        let mut told = json!({ "key": key, "state": "running", "labels": body["labels"], "created": Timestamp::now().to_string(), "ends": ends });
        if let Some(idle) = after(&body["idle_s"]) {
            told["idle_ends"] = Value::from(idle);
        }
        Self { told, machine, pid, ended }
    }

    fn stop(&mut self, grace: Duration) {
        if self.said()["state"] != "running" {
            return;
        }
        let (pid, ended) = (self.pid, self.ended.clone());
        self.machine.settle();
        self.told["state"] = Value::from("stopping");
        kill("-TERM", &pid.to_string());
        std::thread::spawn(move || {
            std::thread::sleep(grace);
            if ended.lock().unwrap().is_none() {
                kill("-KILL", &format!("-{pid}"));
            }
        });
    }

    fn keep_alive(&mut self, until: &Value) {
        let time = |value: &Value| value.as_str().and_then(|text| text.parse::<Timestamp>().ok());
        if let (Some(idle), Some(until), Some(ends)) = (time(&self.told["idle_ends"]), time(until), time(&self.told["ends"])) {
            self.told["idle_ends"] = Value::from(idle.max(until.min(ends)).to_string());
        }
    }

    fn said(&self) -> Value {
        let mut told = self.told.clone();
        if let Some(code) = *self.ended.lock().unwrap() {
            told["state"] = Value::from("stopped");
            told["exit_code"] = Value::from(code);
        }
        told
    }
}

impl Api for Cloudflare {
    fn call(&self, request: &Request) -> Option<Call> {
        match (request.method.as_str(), request.segments().get(2..)?) {
            ("PUT", [_]) => Some(Call::Create),
            ("GET", []) => Some(Call::List),
            ("GET", [_]) => Some(Call::State),
            ("DELETE", [_]) => Some(Call::Delete),
            _ => None,
        }
    }

    fn judge(&self, request: &Request) -> Result<(), String> {
        let to = request.header("x-agent-fleet-port");
        let token = request.header(if to.is_empty() { "authorization" } else { "x-agent-fleet-authorization" });
        if token != format!("Bearer {TOKEN}") {
            return Err(String::from("without the token"));
        }
        if !to.is_empty() {
            return Ok(());
        }
        self.api.request(&request.method, &request.path, &request.query, &request.body)
    }

    fn judge_reply(&self, request: &Request, reply: &Reply) -> Result<(), String> {
        if !request.header("x-agent-fleet-port").is_empty() {
            return Ok(());
        }
        let body = if let Content::Json(body) = &reply.content { body } else { &Value::Null };
        self.api.answer(&request.method, &request.path, reply.status, body)
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply> {
        let to = request.header("x-agent-fleet-port");
        let reply = if to.is_empty() { self.manage(request) } else { self.pass(to) };
        async move { reply }.boxed()
    }

    fn refuse(&self, _status: u16, message: &str) -> Value {
        json!({ "error": message })
    }

    fn unknown_state(&self, body: &mut Value) {
        body["state"] = json!("hibernating");
    }
}
