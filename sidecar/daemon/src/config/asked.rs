//! What the rest of the program asks of the settings, each in the type that it is used in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::budget::Caps;
use agent_sidecar_core::budget::share::{How, Sharing};
use agent_sidecar_core::content::Gates;
use agent_sidecar_core::ladder::Patience;
use agent_sidecar_core::limit::{Ceiling, Mode, Rule, SHARED};
use agent_sidecar_core::span::Semconv;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::who::{self, Name, Who};

use super::names::name_of;
use super::value::urls;
use super::{Config, Effective, Kind, Origin, RULES, SETTINGS, Setting, Value, WITHHELD, variable};
use crate::busy::Lease;
use crate::conversation::{self, Root};
use crate::export::otlp::environment::Own;
use crate::fleet::{self, Voice};
use crate::hub::gate::{Keys, Token};
use crate::hub::users::{self, Member};
use crate::hub::{Meeting, Zone};
use crate::influence;
use crate::serve;
use crate::supervise::{NoUser, User};
use crate::tenants::{AgentDirs, Places, Workspace};

/// Where a lease was unset: it cannot be none.
const BUSY_LEASE: Duration = Duration::from_secs(60);

/// Where these were unset.
const REPORT_EVERY: Duration = Duration::from_secs(10);
const LEASE_GRACE: Duration = Duration::from_secs(60);

impl Config {
    fn mode(&self, key: &str) -> Mode {
        match self.value(key) {
            Some(Value::Mode(mode)) => *mode,
            _ => Mode::Enforce,
        }
    }

    /// Every ceiling that is set, with its mode.
    pub(crate) fn rules(&self) -> Vec<Rule> {
        let common = self.mode("limits.mode");
        let loops = common.min(self.mode("limits.loop_mode"));
        RULES
            .iter()
            .filter_map(|&(name, limit, scope)| {
                let ceiling = match self.value(&format!("limits.{name}"))? {
                    Value::Count(n) => Ceiling::Count(*n),
                    Value::Size(n) => Ceiling::Bytes(*n),
                    Value::Money(usd) => Ceiling::Usd(Usd::from_f64(*usd)),
                    Value::Time(time) => Ceiling::Time(*time),
                    Value::Switch(_)
                    | Value::Mode(_)
                    | Value::Code(_)
                    | Value::Factor(_)
                    | Value::Text
                    | Value::Headers(_)
                    | Value::Sources(_)
                    | Value::Secret(_)
                    | Value::Token(_)
                    | Value::Zone(_)
                    | Value::Address(_) => return None,
                };
                let usual = if limit.is_loop() { loops } else { common };
                let mode = self.modes.get(name).map_or(usual, |(mode, _)| *mode);
                Some(Rule { limit, scope, ceiling, mode })
            })
            .collect()
    }

    /// How large the budgets are that agents share.
    pub(crate) fn caps(&self) -> [Caps; SHARED] {
        let mut caps = [Caps::default(); SHARED];
        for rule in self.rules().iter().filter(|rule| rule.mode != Mode::Off) {
            let Some(caps) = rule.scope.shared().and_then(|at| caps.get_mut(at)) else { continue };
            match rule.ceiling {
                Ceiling::Usd(usd) => caps.usd = Some(usd),
                Ceiling::Count(tokens) => caps.tokens = Some(tokens),
                Ceiling::Time(_) | Ceiling::Bytes(_) => {}
            }
        }
        caps
    }

    pub(crate) fn patience(&self) -> Patience {
        let usual = Patience::default();
        Patience {
            interrupt: self.time("stop.interrupt").unwrap_or(usual.interrupt),
            end: self.time("stop.end").unwrap_or(usual.end),
            terminate: self.time("stop.terminate").unwrap_or(usual.terminate),
        }
    }

    pub(crate) fn linger(&self) -> Duration {
        self.time("linger").unwrap_or_default()
    }

    pub(crate) fn listen(&self) -> Option<std::net::SocketAddr> {
        match self.value("listen") {
            Some(Value::Address(address)) => *address,
            _ => None,
        }
    }

    /// Where the wrappers of this container meet, if they are to.
    pub(crate) fn meeting(&self) -> Option<Meeting> {
        if self.text("hub.mode") != "auto" {
            return None;
        }
        let socket = self.path("hub.socket");
        // Nobody can know the port that will be picked: whoever asks for one asks for it alone.
        let port = self.listen().map(|address| address.port()).filter(|port| *port != 0);
        let (state_dir, users_dir) = (self.path("hub.state_dir"), self.path("hub.users_dir"));
        (socket.is_some() || port.is_some()).then_some(Meeting { socket, port, state_dir, users_dir })
    }

    pub(crate) fn hub_options(&self) -> crate::hub::Options {
        let slots = self.count("hub.slots").and_then(|n| usize::try_from(n).ok()).unwrap_or(8);
        crate::hub::Options {
            slots,
            max_series: self.max_series(),
            labels: self.fixed_who().labels(),
            keys: self.keys(),
            zone: self.zone(),
            lease: self.busy().length,
            page_host: self.page_host(),
            patrol: self.patrol(),
            members: Vec::new(),
            conversation: self.conversation(&Places::of(&[], None)),
            fleet: self.fleet(),
        }
    }

    /// The users that a hub serves, and who it is to become.
    ///
    /// # Errors
    /// One of them is not there, or is not kept apart from the hub.
    pub(crate) fn hub_users(&self) -> std::io::Result<Option<(Vec<Member>, Option<User>)>> {
        let Some(_) = self.value("hub.users") else { return Ok(None) };
        let hub = self.value("hub.user").map(|_| User::named(self.text("hub.user"))).transpose();
        let hub = hub.map_err(std::io::Error::other)?;
        Ok(Some((users::members(self.text("hub.users"), hub.as_ref())?, hub)))
    }

    pub(crate) fn patrol(&self) -> bool {
        self.switch("patrol")
    }

    pub(crate) fn page_host(&self) -> Option<String> {
        Some(self.text("page_host")).filter(|name| !name.is_empty()).map(str::to_owned)
    }

    /// Who may change something at the hub. A token that cannot be read opens to nobody.
    pub(super) fn keys(&self) -> Keys {
        let control = self.switch("hub.control");
        let token = if control { self.token() } else { Ok(Token::None) };
        let token = token.unwrap_or_else(|error| {
            tracing::error!(%error, "the control token cannot be read: nothing can be changed at the hub");
            Token::Lost
        });
        Keys { control, tcp: self.switch("hub.control_tcp"), token }
    }

    pub(super) fn has_token(&self) -> bool {
        self.value("hub.control_token").is_some() || self.value("hub.control_token_file").is_some()
    }

    /// # Errors
    /// There should be one, and it cannot be read.
    pub(crate) fn token(&self) -> Result<Token, String> {
        match (self.value("hub.control_token"), self.path("hub.control_token_file")) {
            (Some(Value::Token(token)), _) => Ok(token.clone()),
            (_, Some(path)) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            _ => Ok(Token::None),
        }
    }

    /// How sessions are served over HTTP.
    ///
    /// # Errors
    /// There is no token where one is needed, or it cannot be read.
    pub(crate) fn serve(&self) -> Result<serve::Options, serve::Error> {
        let Some(Value::Address(Some(address))) = self.value("serve.listen") else { return Err(serve::Error::NoAddress) };
        let other = std::env::var(serve::OTHER_TOKEN).ok().filter(|token| !token.is_empty());
        let token = match (self.value("serve.token"), self.path("serve.token_file"), other) {
            (Some(Value::Token(token)), _, _) => Ok(token.clone()),
            (_, Some(path), _) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            (_, _, Some(token)) => Token::of(&token).map_err(|error| format!("{}: {error}", serve::OTHER_TOKEN)),
            _ => Ok(Token::None),
        };
        let token = token.map_err(serve::Error::BadToken)?;
        let open = self.switch("serve.open");
        match token {
            Token::None if !open => return Err(serve::Error::NoToken),
            Token::None if !address.ip().is_loopback() => return Err(serve::Error::OpenToAll),
            Token::None | Token::Is(_) | Token::Lost => {}
        }
        Ok(serve::Options {
            address: *address,
            token,
            open,
            book: self.path("serve.state"),
            agents: self.count("serve.max_agents").and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX),
            allow: self.text("serve.permissions") == "allow",
            form: if self.text("serve.messages") == "cli" { serve::Form::Cli } else { serve::Form::Sdk },
            interrupt: self.switch("serve.interrupt_when_gone"),
            grace: self.time("stop.platform_grace"),
            page_host: self.page_host(),
        })
    }

    /// The container's token, which the fleet knows. One that cannot be read opens to nobody.
    fn fleet_token(&self) -> Token {
        let token = match (self.value("fleet.token"), self.path("fleet.token_file")) {
            (Some(Value::Token(token)), _) => return token.clone(),
            (_, Some(path)) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            _ => return Token::None,
        };
        token.unwrap_or_else(|error| {
            tracing::error!(%error, "the fleet's token cannot be read: nothing is told to it, and nothing taken from it");
            Token::Lost
        })
    }

    /// What is served of a conversation whose CLI finds its directories there, if anything is.
    pub(crate) fn conversation(&self, places: &Places) -> Option<conversation::Options> {
        if !self.switch("conversation.serve") {
            return None;
        }
        let config = self.path("conversation.config").or_else(|| places.config.clone());
        let workspace = self.path("conversation.workspace").unwrap_or_else(|| places.cwd.clone());
        let roots = [("config", config), ("workspace", Some(workspace))];
        let roots = roots.into_iter().filter_map(|(name, path)| Some(Root { name, path: conversation::settled(&path?) }));
        // The whole of a container's files is no workspace.
        let roots = roots.filter(|root| root.path != Path::new("/")).collect();
        let exclude = self.value("conversation.exclude").map(|_| self.text("conversation.exclude"));
        Some(conversation::Options {
            token: self.fleet_token(),
            roots,
            exclude: exclude.into_iter().flat_map(|text| text.split(',')).map(|name| name.trim().to_owned()).collect(),
            max_size: self.count("conversation.max_size").unwrap_or(u64::MAX),
            container: self.text("fleet.container").to_owned(),
        })
    }

    /// Who tells the fleet, if there is one.
    pub(crate) fn fleet(&self) -> Option<Voice> {
        let url = self.value("fleet.url").map(|_| self.text("fleet.url").trim_end_matches('/'))?;
        let to = format!("{url}/v1/containers/{}/report", self.text("fleet.container"));
        let options = fleet::Options {
            to: to
                .parse()
                .inspect_err(|_| tracing::error!("`fleet.url` and `fleet.container` make no URL: the fleet is told nothing"))
                .ok()?,
            headers: fleet::bearer(self.fleet_token().word()?)?,
            session: self.text("fleet.session").to_owned(),
            every: self.time("fleet.report_every").unwrap_or(REPORT_EVERY),
            lease: self.time("fleet.lease"),
            grace: self.time("fleet.grace").unwrap_or(LEASE_GRACE),
        };
        Some(Voice::new(options))
    }

    /// How long a start waits for a conversation.
    pub(crate) fn conversation_wait(&self) -> Duration {
        self.time("conversation.wait").unwrap_or_default()
    }

    pub(crate) fn ledger(&self) -> Option<PathBuf> {
        self.path("ledger.path")
    }

    pub(crate) fn events(&self) -> Option<PathBuf> {
        self.path("events.path")
    }

    pub(crate) fn semconv(&self) -> Semconv {
        Semconv::of(self.text("otlp.semconv")).unwrap_or_default()
    }

    pub(crate) fn agent_name(&self) -> String {
        self.text("otlp.agent_name").to_owned()
    }

    /// The table `[otlp]`, for [`crate::export::otlp::environment::read`].
    pub(crate) fn otlp(&self) -> Own {
        let text = |key: &str| self.value(key).map(|_| self.text(key).to_owned());
        // `off` unsets what has no default, and here it is also what is meant.
        let switch = |key: &str| match self.value(key) {
            Some(Value::Switch(on)) => Some(*on),
            _ => matches!(self.text(key), "off" | "none").then_some(false),
        };
        Own {
            endpoint: text("otlp.endpoint"),
            off: matches!(self.text("otlp.endpoint"), "off" | "none"),
            protocol: text("otlp.protocol"),
            headers: self.headers("otlp.headers"),
            timeout: self.time("otlp.timeout"),
            compression: text("otlp.compression").or_else(|| (self.text("otlp.compression") == "none").then(|| "none".into())),
            certificate: self.path("otlp.certificate"),
            client_certificate: self.path("otlp.client_certificate"),
            client_key: self.path("otlp.client_key"),
            signals: ["otlp.traces", "otlp.metrics", "otlp.logs"].map(switch),
            queue_dir: self.path("otlp.queue_dir"),
            queue_max: self.count("otlp.queue_max"),
            flush: self.time("otlp.flush"),
        }
    }

    /// What may be told of content; nothing, unless somebody says so. `secrets` never.
    pub(crate) fn gates(&self, max: Option<usize>, secrets: Vec<String>) -> Gates {
        let shut = Gates::default();
        Gates {
            prompts: self.switch("content.prompts"),
            answers: self.switch("content.answers"),
            tool_inputs: self.switch("content.tool_inputs"),
            tool_outputs: self.switch("content.tool_outputs"),
            max: max.unwrap_or(shut.max),
            secrets,
        }
    }

    pub(crate) fn busy(&self) -> Lease {
        Lease {
            length: self.time("busy.lease").unwrap_or(BUSY_LEASE),
            file: self.path("busy.file"),
            webhook: self.value("busy.webhook").and_then(|_| self.text("busy.webhook").parse().ok()),
            headers: self.headers("busy.webhook_headers").unwrap_or_default(),
        }
    }

    pub(crate) fn json_log(&self) -> bool {
        self.text("log.format") == "json"
    }

    pub(crate) fn log_level(&self) -> tracing::Level {
        match self.text("log.level") {
            _ if self.switch("log.quiet") => tracing::Level::ERROR,
            "error" => tracing::Level::ERROR,
            "info" => tracing::Level::INFO,
            "debug" => tracing::Level::DEBUG,
            _ => tracing::Level::WARN,
        }
    }

    pub(crate) fn spill_dir(&self) -> Option<PathBuf> {
        self.path("relay.spill_dir")
    }

    pub(crate) fn spill_bytes(&self) -> u64 {
        self.count("relay.spill_max").unwrap_or(crate::supervise::SPILL_BYTES)
    }

    /// As whom the CLI is to run; as we do, if nobody says.
    ///
    /// # Errors
    /// There is no such user, or we may not start anything as somebody else.
    pub(crate) fn user(&self) -> Result<Option<User>, NoUser> {
        self.value("run.user").map(|_| User::find(self.text("run.user"))).transpose()
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What is named to be written to, by the settings that name it.
    pub(crate) fn own_paths(&self) -> Vec<(&'static str, PathBuf)> {
        let keys = ["ledger.path", "events.path", "busy.file", "otlp.queue_dir", "hub.state_dir", "hub.socket"];
        keys.into_iter().filter_map(|key| Some((key, self.path(key)?))).collect()
    }

    /// The variables of ours that hold keys: nobody below us needs them.
    pub(crate) fn secrets() -> impl Iterator<Item = String> {
        SETTINGS.iter().filter(|setting| matches!(setting.kind, Kind::Headers | Kind::Token | Kind::Secret)).map(variable)
    }

    /// What agents that tools start are to be told otherwise than we were: nobody there has the keys, and where we ask for one, no
    /// hub of theirs is to go without.
    pub(crate) fn for_those_below(&self) -> Vec<(String, String)> {
        let given = |key: &str| matches!(self.values[key].origin, Origin::Environment(_) | Origin::Flag(_));
        let mut told = Vec::new();
        let lost = matches!(self.value("hub.control_token"), Some(Value::Token(Token::Lost)));
        let flag = matches!(self.values["hub.control_token_file"].origin, Origin::Flag(_));
        if lost || given("hub.control_token") || flag {
            told.push((name_of("hub.control"), String::from("false")));
        }
        if self.switch("labels.user_hash") && given("labels.user_hash_key") {
            told.push((name_of("labels.user_hash_key"), String::from(WITHHELD)));
            // Not everybody inherits a flag.
            if matches!(self.values["labels.user_hash"].origin, Origin::Flag(_)) {
                told.push((name_of("labels.user_hash"), String::from("true")));
            }
        }
        told
    }

    /// What is done about what changes the CLI, and whom it may ask.
    pub(crate) fn influence(&self) -> (influence::Policy, influence::Expected) {
        let policy = match self.text("policy.environment") {
            "strip" => influence::Policy::Strip,
            "refuse" => influence::Policy::Refuse,
            _ => influence::Policy::Report,
        };
        (policy, self.value("policy.base_urls").and_then(|_| urls(self.text("policy.base_urls"))))
    }

    pub(crate) fn shim_cli(&self) -> Option<PathBuf> {
        self.path("shim.cli")
    }

    pub(crate) fn shim_strict(&self) -> bool {
        self.switch("shim.strict")
    }

    pub(crate) fn poll(&self) -> bool {
        self.switch("usage.poll")
    }

    pub(crate) fn native(&self) -> crate::receive::Choice {
        match self.text("native.telemetry") {
            "on" => crate::receive::Choice::On,
            "off" => crate::receive::Choice::Off,
            _ => crate::receive::Choice::Auto,
        }
    }

    pub(crate) fn max_series(&self) -> usize {
        self.count("metrics.max_series").and_then(|n| usize::try_from(n).ok()).unwrap_or(agent_sidecar_core::metric::MAX_SERIES)
    }

    pub(crate) fn limit_exit_code(&self) -> Option<u8> {
        match self.value("limits.exit_code") {
            Some(Value::Code(code)) => Some(*code),
            _ => None,
        }
    }

    /// For whom everything here works that nothing else is known of.
    pub(crate) fn fixed_who(&self) -> Who {
        let mut who = Who::default();
        for name in Name::ALL {
            let key = format!("labels.{}", name.as_str());
            if !(*name == Name::User && self.withholds_user()) && self.value(&key).is_some() {
                who.set(*name, self.text(&key).to_owned());
            }
        }
        who
    }

    /// Where else that is asked for, if anywhere.
    pub(crate) fn sources_of(&self, name: Name) -> Option<&who::Sources> {
        self.sources(&format!("labels.{}_from", name.as_str())).filter(|_| name != Name::User || !self.withholds_user())
    }

    /// Whether users are hashed, with a key that is not here: with another, or none, the hash would tell who they are, or of two.
    fn withholds_user(&self) -> bool {
        matches!(self.value("labels.user_hash_key"), Some(Value::Secret(key)) if key.0 == WITHHELD)
    }

    pub(super) fn sources(&self, key: &str) -> Option<&who::Sources> {
        match self.value(key) {
            Some(Value::Sources(sources)) => Some(sources),
            _ => None,
        }
    }

    /// The files of the downward API: labels and annotations.
    pub(crate) fn pod_files(&self) -> [PathBuf; 2] {
        ["labels.pod_labels", "labels.pod_annotations"].map(|key| self.path(key).unwrap_or_default())
    }

    /// The key that users are hashed with, if they are.
    pub(crate) fn user_hash(&self) -> Option<Vec<u8>> {
        let key = match self.value("labels.user_hash_key") {
            Some(Value::Secret(key)) => key.0.clone().into_bytes(),
            _ => Vec::new(),
        };
        self.switch("labels.user_hash").then_some(key)
    }

    pub(crate) fn guard(&self) -> Mode {
        self.mode("tenants.guard")
    }

    /// Whether anything tells tenants apart here.
    pub(crate) fn has_tenants(&self) -> bool {
        self.value("labels.tenant").is_some() || self.sources_of(Name::Tenant).is_some()
    }

    pub(crate) fn agent_dirs(&self) -> Option<AgentDirs> {
        Some(AgentDirs {
            root: self.path("tenants.agent_dirs")?,
            name: self.sources("tenants.agent_from").cloned(),
            workspace: match self.text("tenants.agent_workspace") {
                "always" => Workspace::Always,
                "never" => Workspace::Never,
                _ => Workspace::Auto,
            },
            remove: self.text("tenants.agent_dirs_at_end") == "remove",
        })
    }

    /// How often directories are measured, if they are.
    pub(crate) fn disk_interval(&self) -> Option<Duration> {
        self.time("disk.interval").filter(|interval| !interval.is_zero())
    }

    /// How many agents may run at once, how long one more waits, and what becomes of it.
    pub(crate) fn max_sessions(&self) -> Option<(u64, Duration, Mode)> {
        let mode = self.mode("limits.mode");
        let seats = self.count("limits.max_sessions").filter(|_| mode != Mode::Off)?;
        Some((seats, self.time("limits.queue_timeout").unwrap_or_default(), mode))
    }

    pub(crate) fn tenant_weight(&self) -> u64 {
        self.count("limits.tenant_weight").unwrap_or(1)
    }

    /// How shared budgets are shared out.
    pub(crate) fn sharing(&self) -> Sharing {
        let chosen = How::ALL.iter().find(|how| how.as_str() == self.text("limits.budget_share"));
        Sharing { how: chosen.copied().unwrap_or(How::Tenants), kept: self.time("limits.share_kept").unwrap_or_default() }
    }

    /// Whether CLIs that share a budget are to ask before they ask the model.
    pub(crate) fn budget_hooks(&self) -> bool {
        self.switch("limits.budget_hooks")
    }

    /// Where days begin.
    pub(crate) fn zone(&self) -> Zone {
        match self.value("limits.time_zone") {
            Some(Value::Zone(zone)) => zone.clone(),
            _ => Zone::default(),
        }
    }

    pub(crate) fn idle_timeout(&self) -> Option<Duration> {
        self.time("limits.idle_timeout")
    }

    /// Each setting, in the order of [`SETTINGS`].
    pub(crate) fn effective(&self) -> impl Iterator<Item = (&'static Setting, &Effective)> {
        SETTINGS.iter().map(|setting| (setting, &self.values[setting.key]))
    }

    /// The modes of single limits, and where they were set.
    pub(crate) fn modes(&self) -> impl Iterator<Item = (&'static str, Mode, &Origin)> {
        self.modes.iter().map(|(name, (mode, origin))| (*name, *mode, origin))
    }

    /// Tells configurations apart: of what is in force, not of how it was written.
    pub(crate) fn fingerprint(&self) -> String {
        let mut text: String =
            self.effective().map(|(setting, effective)| format!("{}={}\n", setting.key, effective.text)).collect();
        text.extend(self.modes().map(|(limit, mode, _)| format!("{limit}={}\n", mode.as_str())));
        text += &format!("{:?}", self.prices);
        let hash =
            text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("{hash:016x}")
    }
}
