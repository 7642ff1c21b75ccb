use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::hook::Act;
use crate::lifecycle::Phase;

/// What every configuration of these tests begins with.
const HEAD: &str = r#"
[fleet]
name = "prod"
[callers.ops]
token = { env = "T" }
admin = true
[tenants.acme]
[providers.local]
kind = "docker"
[templates.task]
pattern = "ephemeral"
provider = "local"
image = "agent"
"#;

/// Surroundings in which each secret is its own name, repeated; what is called `MISSING` is missing.
struct Fake;

impl Outside for Fake {
    fn secret(&self, secret: &Secret) -> Result<Option<Hidden>, String> {
        match secret {
            Secret::Env(name) if name == "MISSING" || name.starts_with("AWS_") => Err(format!("there is no variable `{name}`")),
            Secret::Env(name) if name == "SHORT" => Ok(Some(Hidden::new(name.clone()))),
            Secret::Env(name) if name == "WHSEC" => Ok(Some(Hidden::new(String::from("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")))),
            Secret::Env(name) => Ok(Some(Hidden::new(name.repeat(40)))),
            Secret::File(_) | Secret::Provider(_) | Secret::Given(_) => Ok(None),
        }
    }

    fn has_file(&self, path: &Path) -> bool {
        !path.ends_with("missing")
    }

    fn has_program(&self, path: &Path) -> bool {
        !path.ends_with("missing")
    }
}

fn parse(text: &str) -> Result<Config, Mistakes> {
    Config::parse(Path::new("f.toml"), text, &Fake)
}

/// The mistakes, one a line, without the name of the file.
fn mistakes(text: &str) -> String {
    let found = parse(text).err().map(|mistakes| mistakes.0).unwrap_or_default();
    found.iter().map(|mistake| format!("{mistake}\n").replace("f.toml:", "")).collect()
}

/// The one mistake of a line that is put below [`HEAD`]'s template.
fn of_template(line: &str) -> String {
    mistakes(&format!("{HEAD}{line}\n"))
}

#[test]
fn the_example_has_no_mistake_and_says_what_it_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/fleet/agent-fleet.toml");
    let config = Config::read_with(&path, &Elsewhere).unwrap();
    let task = &config.templates["task"];
    assert_eq!(
        (task.pattern, task.ttl, task.max_age),
        (Pattern::Ephemeral, Duration::from_secs(7200), Duration::from_secs(7200))
    );
    // Every setting of a cluster is shown.
    let shown: Vec<&String> =
        ["cluster", "jobs", "claimed"].iter().flat_map(|name| config.providers[*name].settings.keys()).collect();
    let unknown = toml::from_str::<crate::provider::kubernetes::Settings>("x = 1").unwrap_err();
    let known: Vec<&str> = unknown.message().split('`').skip(3).step_by(2).collect();
    assert!(known.len() > 10 && known.iter().all(|name| shown.iter().any(|shown| shown == name)), "{known:?} {shown:?}");
    assert_eq!(config.templates["chat"].idle_after, Some(Duration::from_secs(900)));
    assert_eq!(config.tenants["acme"].budget_usd_per_day, Some(50.0));
    assert_eq!(config.hooks.iter().map(|hook| hook.name.as_str()).collect::<Vec<_>>(), ["admission", "audit"]);
    assert!(config.callers["shop"].may_use("acme") && !config.callers["shop"].may_use("internal"));
    assert!(config.callers["ops"].may_use("internal"));
}

#[test]
fn what_is_printed_is_what_is_in_force_and_no_secret() {
    let text = format!(
        "{HEAD}secrets = {{ KEY = {{ env = \"K\" }} }}\n[[hooks]]\nname = \"h\"\non = [\"ready\"]\nwebhook = \"https://h.example\"\n\
         secret = {{ env = \"WHSEC\" }}\ntimeout = \"5s\"\n"
    )
    .replace("name = \"prod\"", "name = \"prod\"\nstore = { env = \"postgres://\" }");
    let config = parse(&text).unwrap();
    let printed = config.print();
    for line in ["KEY = { env = \"K\" }", "ttl = \"1h\"", "provider_idle = \"off\"", "timeout = \"5s\"", "time_zone = \"UTC\""] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
    let debugged = format!("{config:?}");
    for secret in ["TTTT", "KKKK", "whsec_", "postgres://postgres"] {
        assert!(!debugged.contains(secret), "{secret}: {debugged}");
        assert!(!printed.contains(secret) || secret.starts_with("postgres"), "{secret}: {printed}");
    }
}

#[test]
fn a_template_has_what_is_not_said() {
    let config = parse(HEAD).unwrap();
    let template = &config.templates["task"];
    let id: SessionId = "s-1".parse().unwrap();
    let spec = template.spec_for(&config.fleet.name, &id, "acme", 2);
    assert_eq!(spec.key, container_key("prod", &id, 2));
    assert_eq!(spec.size, Size::default());
    assert_eq!((spec.ttl, spec.idle), (Duration::from_secs(3600), None));
    for (label, value) in
        [(FLEET_LABEL, "prod"), (SESSION_LABEL, "s-1"), (KEY_LABEL, &spec.key), (TENANT_LABEL, "acme"), (TEMPLATE_LABEL, "task")]
    {
        assert_eq!(spec.labels[label], value);
    }
    let hybrid = parse(&HEAD.replace("ephemeral", "hybrid")).unwrap();
    assert_eq!(hybrid.templates["task"].idle_after, Some(Duration::from_secs(600)));
    assert_eq!(hybrid.templates["task"].max_age, Duration::from_secs(7 * 86_400));
}

#[test]
fn every_mistake_is_found_at_once_and_where_it_is() {
    let text = r#"
[fleet]
nmae = "prod"
listen = "0.0.0.0:80"
store = "postgres://fleet:hunter2@db/fleet"
[providers.local]
kind = "dokcer"
token = "0123456789abcdef"
[templates.task]
pattern = "hybird"
provider = "loacl"
image = ""
ttl = "0s"
env = { API_KEY = "sk-ant-0123456789", OK = "1", "1X" = "", AGENT_FLEET_X = "" }
secrets = { OK = { env = "A" }, A = { env = "MISSING" }, B = "sk-ant-0123456789" }
size = { cpu = 0, memory = "1Gb", disc = "1GiB" }
ports = [80, 0]
labels = { "agent-fleet.key" = "x" }
[[hooks]]
name = "a"
on = ["raedy", "ready"]
webhook = "http://hooks.example/x"
veto = true
[[hooks]]
name = "a"
on = []
command = ["audit"]
secret = { env = "A" }
timeout = "5m"
retrys = 3
"#;
    let found = mistakes(text);
    let expected = "\
2:2: `fleet` has no `name`; add name = \"prod\": it is on every container as a label
3:1: there is no setting `fleet.nmae`; did you mean `name`?
5:9: `fleet.store` has a password in it; write store = { env = \"…\" } or { file = \"…\" } and put the whole URL there
7:8: there is no provider of the kind `dokcer`; did you mean `docker`?
8:9: `providers.local.token` holds a secret; name where it is: { env = \"…\" } or { file = \"…\" }
10:11: `templates.task.pattern` is one of ephemeral, long-running, hybrid, shared, not `hybird`; did you mean `hybrid`?
11:12: there is no provider `loacl`; did you mean `local`?
12:9: `templates.task.image` is empty; write it, or remove the line
13:7: `templates.task.ttl` is zero, which would allow nothing; write a number and a unit, like \"90s\", \"10m\" or \"1h30m\"
";
    assert!(found.contains("nobody may ask at 0.0.0.0:80"), "{found}");
    let without = found.replace(found.lines().find(|line| line.contains("nobody may ask")).unwrap(), "").replace("\n\n", "\n");
    assert!(without.trim_start().starts_with(expected), "{found}");
    for piece in [
        "14:19: `templates.task.env.API_KEY` holds a secret; write secrets = { API_KEY = { env = \"API_KEY\" } }",
        "`1X` in `templates.task` is no name of a variable",
        "`AGENT_FLEET_X` in `templates.task` is the fleet's own",
        "`templates.task` has `OK` twice, in `env` and in `secrets`",
        "`templates.task.secrets.A`: there is no variable `MISSING`; set it where the fleet runs",
        "`templates.task.secrets.B` says where a secret is",
        "`templates.task.size.cpu` is a number of CPUs from 0.05 to 256, not the number `0`",
        "`templates.task.size.memory` is a size of at least 16MiB, not the text `1Gb`",
        "there is no setting `templates.task.size.disc`; did you mean `disk`?",
        "`templates.task.ports` is a port, not the number `0`",
        "the label `agent-fleet.key` in `templates.task` is the fleet's own",
        "there is no phase `raedy`; did you mean `ready`?",
        "`hooks.a` has no `timeout`",
        "`hooks.a.webhook` goes over http to another machine; use https, or set insecure = true",
        "`hooks.a` is not signed",
        "`hooks.a.veto`: nobody can say no to ready",
        "two hooks are called `a`",
        "`hooks.a` runs on no phase",
        "`hooks.a.command` begins with `audit`; write the program's whole path",
        "`hooks.a.secret` is for webhooks",
        "there is no setting `hooks.a.retrys`; did you mean `retries`?",
    ] {
        assert!(found.contains(piece), "{piece}\nin\n{found}");
    }
    for secret in ["0123456789", "hunter2"] {
        assert!(!found.contains(secret), "{secret}: {found}");
    }
}

#[test]
fn times_that_cannot_come_are_mistakes() {
    for (line, what) in [
        (
            "ttl = \"10m\"\nidle_after = \"10m\"",
            "`templates.task.idle_after` is \"10m\", which never comes: `templates.task.ttl` is \"10m\"",
        ),
        ("ttl = \"1m\"", "`templates.task.ready_within` is \"2m\", which never comes"),
        ("ready_within = \"2h\"", "`templates.task.ready_within` is \"2h\", which never comes"),
        ("provider_idle = \"1d\"", "`templates.task.provider_idle` is \"1d\", which never comes"),
        ("ttl = \"2h\"\nmax_age = \"1h\"", "`templates.task.max_age` is \"1h\", shorter than one container's life"),
        ("stop_grace = \"1h\"", "`templates.task.stop_grace` is longer than \"10m\""),
        ("ttl = \"400d\"", "`templates.task.ttl` is a duration of at most 366 days"),
        ("ttl = 60", "`templates.task.ttl` is a duration of at most 366 days, not the number `60`"),
    ] {
        let found = of_template(line);
        assert!(found.contains(what) && found.lines().count() == 1, "{line}: {found}");
    }
    assert_eq!(
        of_template("ttl = \"10m\"\nidle_after = \"9m\"\nmax_age = \"10m\"\nready_within = \"1m\"\nprovider_idle = \"off\""),
        ""
    );
}

#[test]
fn a_provider_says_what_it_does_not_know_and_cannot_do() {
    let found = mistakes(&HEAD.replace("kind = \"docker\"", "kind = \"docker\"\nsockte = \"/x\""));
    assert_eq!(found, "10:1: there is no setting `providers.local.sockte`; did you mean `socket`?\n");
    let found = of_template("secrets = { A = { provider = \"a\" } }");
    let what = "`templates.task`: `local` keeps no secrets: name an environment variable or a file for `A`";
    assert!(found.contains(what) && found.lines().count() == 1, "{found}");
}

#[test]
fn every_mistake_of_a_provider_is_found_at_once_and_where_it_is() {
    let text = format!(
        r#"{HEAD}
[providers.all]
kind = "docker"
socket = "tcp://nowhere"
pids = "many"
cap_drop = "ALL"
publish_at = "300.0.0.1"
networks = "agents"
cpu_usd_per_hour = -0.05
[providers.e2b]
kind = "e2b"
token = "0123456789abcdef"
max_hours = -1
price = {{ running = -0.1, paused = nan, stopped = 0.0, source = "ours" }}
[providers.modal]
kind = "modal"
token_id = {{ env = "MISSING" }}
token_secret = {{ provider = "x" }}
app = "agents"
[providers.fly]
kind = "fly"
token = {{ env = "T" }}
[providers.vm]
kind = "firecracker"
kernel = "/missing"
directory = "/d"
network = {{ tap_prefix = "fc", taps = 2 }}
"#
    );
    assert_eq!(
        mistakes(&text),
        "\
17:10: `providers.all.socket`: `tcp://nowhere` is no daemon's address: it is a path, unix:///PATH or tcp://HOST:PORT; mend it
18:8: `providers.all.pids`: invalid type: string \"many\", expected i64; mend it
19:12: `providers.all.cap_drop`: invalid type: string \"ALL\", expected a list; mend it
20:14: `providers.all.publish_at`: invalid IP address syntax; mend it
21:1: there is no setting `providers.all.networks`; did you mean `network`?
22:20: `providers.all.cpu_usd_per_hour` is zero or more and below ten million, not the number `-0.05`; write it like 0.05
25:9: `providers.e2b.token` says where a secret is; write { env = \"NAME\" } or { file = \"/path\" }
26:13: `providers.e2b.max_hours`: invalid value: integer `-1`, expected u32; mend it
27:21: `providers.e2b.price.running` is zero or more and below ten million, not the number `-0.1`; write it like 0.05
27:36: `providers.e2b.price.paused` is zero or more and below ten million, not the number `nan`; write it like 0.05
30:12: `providers.modal.token_id`: there is no variable `MISSING`; set it where the fleet runs
31:16: `providers.modal.token_secret` is needed here, not in a container; name a variable or a file
33:12: `providers.fly` has no `app`; add it
38:10: `providers.vm.kernel`: there is no file `/missing`; write the path of one that the fleet can read
40:11: `providers.vm.network`: missing field `first`; mend it
"
    );
    let found = mistakes(&text);
    assert!(!found.contains("0123456789"), "{found}");
}

#[test]
fn callers_are_known_by_their_token_alone() {
    let config = parse(HEAD).unwrap();
    assert_eq!(config.caller(&"T".repeat(40)).map(|caller| caller.name.as_str()), Some("ops"));
    assert_eq!(config.caller("T"), None);
    assert_eq!(config.caller(""), None);
    let both = HEAD.replace("{ env = \"T\" }", "[{ env = \"T\" }, { env = \"U\" }]");
    let config = parse(&both).unwrap();
    assert!(config.caller(&"T".repeat(40)).is_some() && config.caller(&"U".repeat(40)).is_some());
    for (add, what) in [
        ("[callers.a]\ntoken = { env = \"SHORT\" }\nadmin = true", "`callers.a.token` has fewer than 32 characters"),
        ("[callers.a]\ntoken = { env = \"T\" }\nadmin = true", "`callers.ops` and `callers.a` have the same token"),
        ("[callers.a]\ntoken = { env = \"MISSING\" }\nadmin = true", "`callers.a.token`: there is no variable `MISSING`"),
        ("[callers.a]\ntoken = { provider = \"x\" }\nadmin = true", "`callers.a.token` is needed here, not in a container"),
        ("[callers.a]\ntoken = { env = \"A\" }", "`callers.a` may ask for no tenant"),
        ("[callers.a]\nadmin = true", "`callers.a` has no token"),
        ("[callers.a]\ntoken = { env = \"A\" }\ntenants = [\"acmee\"]", "there is no tenant `acmee`; did you mean `acme`?"),
        ("[callers.A_]\ntoken = { env = \"A\" }\nadmin = true", "`A_` in [callers] is no name"),
    ] {
        let found = mistakes(&format!("{HEAD}{add}\n"));
        assert!(found.contains(what), "{add}: {found}");
        if !what.contains("same token") {
            assert_eq!(found.lines().count(), 1, "{found}");
        }
    }
}

#[test]
fn hooks_are_checked_as_what_they_are() {
    let hook =
        |lines: &str| mistakes(&format!("{HEAD}[[hooks]]\nname = \"h\"\non = [\"requested\"]\ntimeout = \"5s\"\n{lines}\n"));
    let signed = "secret = { env = \"WHSEC\" }";
    assert_eq!(hook(&format!("webhook = \"https://h.example/\"\nveto = true\n{signed}")), "");
    assert_eq!(hook(&format!("webhook = \"http://127.0.0.1:1/\"\n{signed}")), "");
    assert_eq!(hook(&format!("webhook = \"http://[::1]:1/\"\n{signed}")), "");
    assert_eq!(hook(&format!("webhook = \"http://h.example/\"\ninsecure = true\n{signed}")), "");
    assert_eq!(hook("command = [\"/bin/true\"]\npass = [\"X\"]"), "");
    for (lines, what) in [
        ("", "`hooks.h` does nothing"),
        ("command = []", "`hooks.h.command` is empty"),
        ("command = [\"/x\", \"sk-ant-0123456789\"]", "`hooks.h.command` holds a secret"),
        ("webhook = \"https://a:b@h.example/\"\nsecret = { env = \"WHSEC\" }", "`hooks.h.webhook` has a user or password in it"),
        ("webhook = \"ftp://h.example/\"\nsecret = { env = \"WHSEC\" }", "`hooks.h.webhook` is no URL of http or https"),
        ("webhook = \"https://h.example/\"\nsecret = { env = \"A\" }", "`hooks.h.secret` does not begin with `whsec_`"),
        ("webhook = \"https://h.example/\"\ncommand = [\"/x\"]\n", "`hooks.h` is a command and a webhook"),
        ("command = [\"/x\"]\nretries = 21", "`hooks.h.retries` is 21"),
        ("command = [\"/x\"]\nretries = -1", "`hooks.h.retries` is a whole number"),
        ("command = [\"/x\"]\ntemplates = [\"tsk\"]", "there is no template `tsk`"),
        ("webhook = \"https://h.example/\"\npass = [\"A\"]\nsecret = { env = \"WHSEC\" }", "`hooks.h.pass` is for commands"),
    ] {
        let found = hook(lines);
        assert!(found.contains(what) && found.lines().count() == 1, "{lines}: {found}");
    }
    let config =
        parse(&format!("{HEAD}[[hooks]]\nname = \"h\"\non = [\"requested\", \"ready\"]\ntimeout = \"5s\"\ncommand = [\"/x\"]\n"))
            .unwrap();
    let hook = &config.hooks[0];
    assert!(hook.required && hook.may_veto(Phase::Requested) && !hook.may_veto(Phase::Ready));
    assert!(matches!(&hook.act, Act::Command { argv, .. } if argv == &["/x"]));
}

#[test]
fn a_budget_is_of_the_day_and_month_where_the_tenant_lives() {
    let text = HEAD.replace(
        "[tenants.acme]",
        "[tenants.acme]\nbudget_usd_per_day = 5\nbudget_usd_per_month = \"$100\"\ntime_zone = \"Pacific/Auckland\"\nmax_sessions = 3",
    );
    let config = parse(&text).unwrap();
    let now: Timestamp = "2026-11-30T12:00:00Z".parse().unwrap();
    assert_eq!(config.tenants["acme"].periods(now), [(String::from("2026-12-01"), 5.0), (String::from("2026-12"), 100.0)]);
    for (line, what) in [
        ("budget_usd_per_day = 0", "is an amount above zero"),
        ("budget_usd_per_day = 9\nbudget_usd_per_month = 8", "may spend more in a day (9) than in a month (8)"),
        ("time_zone = \"europe/berlin\"", "is a time zone, not the text `europe/berlin`"),
        ("max_sessions = 0", "is zero, which would allow nothing"),
        ("max_sesions = 1", "did you mean `max_sessions`?"),
    ] {
        let found = mistakes(&HEAD.replace("[tenants.acme]", &format!("[tenants.acme]\n{line}")));
        assert!(found.contains(what) && found.lines().count() == 1, "{line}: {found}");
    }
}

#[test]
fn broken_toml_hides_no_other_mistake() {
    let found = mistakes(&format!("{HEAD}ttl = 1h\nidel_after = \"1m\"\n"));
    assert!(found.contains("mend the TOML here") && found.contains("did you mean `idle_after`?"), "{found}");
    assert!(mistakes("").contains("there is no [fleet]"));
}

#[test]
fn a_secret_that_everybody_can_read_is_a_mistake() {
    let dir = std::env::temp_dir().join(format!("agent-fleet-{}-secret", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("token");
    std::fs::write(&path, format!("{}\n", "x".repeat(32))).unwrap();
    let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    let secret = Secret::File(path.clone());
    mode(0o644);
    let text = HEAD.replace("{ env = \"T\" }", &format!("{{ file = {path:?} }}"));
    let found = Config::parse(Path::new("f.toml"), &text, &Machine).unwrap_err().to_string();
    assert!(found.contains("(mode 644); write it there, and `chmod 640"), "{found}");
    mode(0o640);
    let config = Config::parse(Path::new("f.toml"), &text, &Machine).unwrap();
    assert!(config.caller(&"x".repeat(32)).is_some(), "the line feed is not part of it");
    std::fs::write(&path, "").unwrap();
    assert!(Machine.secret(&secret).unwrap_err().contains("is empty"));
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(Machine.secret(&secret).unwrap_err().contains("there is no file"));
    assert!(check(&path)[0].to_string().contains("the file cannot be read"));
}

/// A file whose sessions are put away, with these lines below `[conversations]`.
fn away(conversations: &str) -> String {
    let head = HEAD.replace("name = \"prod\"", "name = \"prod\"\nsecret = { env = \"S\" }").replace("ephemeral", "hybrid");
    format!("{head}archive = true\n[conversations]\n{conversations}\n")
}

#[test]
fn where_conversations_are_put_is_read() {
    let of = |lines: &str| parse(&away(lines)).unwrap().conversations.unwrap();
    let directory = of("store = \"file:///var/c\"\nkeep_for = \"2d\"\nkeep = 5");
    assert_eq!(directory.place, Place::Directory(PathBuf::from("/var/c")));
    assert_eq!((directory.keep, directory.keep_for), (5, Some(Duration::from_secs(2 * 86_400))));
    let keys = "access_key = { env = \"A\" }\nsecret_key = { env = \"K\" }";
    let Place::S3(amazon) = of(&format!("store = \"s3://bucket/some/where/\"\nregion = \"eu-central-1\"\n{keys}")).place else {
        panic!()
    };
    assert_eq!((amazon.bucket.as_str(), amazon.prefix.as_str(), amazon.path_style), ("bucket", "some/where", false));
    assert_eq!(amazon.endpoint, "https://s3.eu-central-1.amazonaws.com");
    let Place::S3(own) = of(&format!("store = \"s3://bucket\"\nendpoint = \"http://minio:9000\"\n{keys}")).place else {
        panic!()
    };
    assert_eq!((own.endpoint.as_str(), own.path_style), ("http://minio:9000", true));
    assert!(matches!(of("store = \"postgres://fleet@db/fleet\"").place, Place::Postgres(_)));
    let config = parse(&away(&format!("store = \"s3://bucket\"\n{keys}"))).unwrap();
    assert!(config.templates["task"].archive && config.print().contains("access_key = { env = \"A\" }"));
    for said in [config.print(), format!("{config:?}")] {
        assert!(!said.contains("SSSS") && !said.contains("KKKK") && !said.contains("AAAA"), "{said}");
    }
    // Of a machine that this is not, nothing is known of its secrets, and nothing is wrong with them.
    assert!(Config::parse(Path::new("f.toml"), &away(&format!("store = \"s3://bucket\"\n{keys}")), &Elsewhere).is_ok());
    assert!(Config::parse(Path::new("f.toml"), &away("store = \"s3://bucket\""), &Elsewhere).is_ok());
}

/// Surroundings in which a cluster gives a role.
struct Role;

impl Outside for Role {
    fn secret(&self, secret: &Secret) -> Result<Option<Hidden>, String> {
        match secret {
            Secret::Env(name) if name == "AWS_ROLE_ARN" => Ok(Some(Hidden::new(String::from("arn:aws:iam::1:role/fleet")))),
            Secret::Env(name) if name == "AWS_WEB_IDENTITY_TOKEN_FILE" => Ok(Some(Hidden::new(String::from("/var/token")))),
            other => Fake.secret(other),
        }
    }
}

#[test]
fn where_no_keys_are_named_the_environment_names_them() {
    let text = away("store = \"s3://bucket\"\nregion = \"eu-north-1\"");
    let config = Config::parse(Path::new("f.toml"), &text, &Role).unwrap();
    let Place::S3(s3) = &config.conversations.as_ref().unwrap().place else { panic!() };
    let Keys::WebIdentity { role, token, sts, .. } = &s3.keys else { panic!("{:?}", s3.keys) };
    assert_eq!((role.as_str(), token.as_path()), ("arn:aws:iam::1:role/fleet", Path::new("/var/token")));
    assert_eq!(sts, "https://sts.eu-north-1.amazonaws.com");
    assert!(config.print().contains("# the keys are those of arn:aws:iam::1:role/fleet"));
}

#[test]
fn what_is_wrong_with_putting_away_is_said() {
    for (lines, said) in [
        ("", "[conversations] has no store"),
        ("store = \"/var/c\"", "is the URL of a directory, of a bucket or of PostgreSQL"),
        ("store = \"s3:///x\"", "names no bucket"),
        ("store = \"s3://b\"", "`conversations.access_key` is missing, and the environment names no credentials"),
        ("store = \"s3://b\"\nsecret_key = { env = \"K\" }", "`conversations.access_key` is missing"),
        (
            "store = \"s3://b\"\nsecret_key = { env = \"K\" }\naccess_key = { env = \"MISSING\" }",
            "there is no variable `MISSING`",
        ),
        ("store = \"file:///c\"\nregion = \"x\"", "`conversations.region` is for S3 alone"),
        ("store = \"postgres://fleet:hunter2hunter2@db/fleet\"", "has a password in it"),
        ("store = \"file:///c\"\nkeep = 0", "is zero"),
        ("store = \"file:///c\"\nmax_size = \"much\"", "is a size"),
        ("store = \"file:///c\"\nkept_for = \"1d\"", "did you mean `keep_for`?"),
    ] {
        let found = mistakes(&away(lines));
        assert!(found.contains(said) && !found.contains("hunter2"), "{lines}: {found}");
    }
    let of = |from: &str, to: &str| mistakes(&away("store = \"file:///c\"").replace(from, to));
    assert_eq!(of("", ""), "");
    assert!(of("secret = { env = \"S\" }", "").contains("[conversations] wants a secret of the fleet's"));
    assert!(of("{ env = \"S\" }", "{ env = \"SHORT\" }").contains("`fleet.secret` has fewer than 32 characters"));
    assert!(of("hybrid", "long-running").contains("`archive` is for what is put away"));
    let shared = "app_port = 8000\nshared = { sessions_per_container = 8 }\n[conversations]";
    assert_eq!(of("hybrid", "shared").matches("`archive` is for").count(), 1, "by how many is not said");
    let several = away("store = \"file:///c\"").replace("hybrid", "shared").replace("[conversations]", shared);
    assert!(parse(&several).unwrap().templates["task"].archive);
    assert!(of("[conversations]\nstore = \"file:///c\"", "").contains("there is no [conversations] to put anything into"));
    let claims = of("kind = \"docker\"", "kind = \"kubernetes\"\nbackend = \"claim\"");
    assert!(claims.contains("`local` gives a container no environment"), "{claims}");
    assert!(of("secret = { env = \"S\" }", "url = \"http://fleet:9490\"").contains("`fleet.url` is for containers"));
}

#[test]
fn a_pool_has_a_size_and_an_age_that_leaves_something_of_a_life() {
    let head = HEAD.replace("ephemeral", "long-running");
    let text = format!("{head}ttl = \"1h\"\npool = {{ size = 3 }}\nrecycle = {{ age = \"30m\", memory = \"900MiB\" }}\n");
    let config = parse(&text).unwrap();
    let task = &config.templates["task"];
    assert_eq!(task.pool, Some(Pool { size: 3, max_age: Duration::from_secs(1800), per_minute: 30 }));
    assert_eq!((task.recycle.age, task.recycle.memory_bytes), (Some(Duration::from_secs(1800)), Some(900 << 20)));
    let again = config.print();
    assert!(again.contains("pool = { size = 3, max_age = \"30m\", per_minute = 30 }"), "{again}");
    assert!(again.contains("recycle = { age = \"30m\", memory = \"900MiB\" }"), "{again}");
    for (line, what) in [
        ("pool = {}", "`templates.task.pool` has no `size`"),
        ("pool = { size = 0 }", "is zero"),
        ("pool = { size = 1001 }", "more than 1000"),
        ("pool = { size = 3, max_age = \"1h\" }", "nothing is left of a life of \"1h\""),
        ("pool = { size = 3, age = \"1m\" }", "there is no setting `templates.task.pool.age`"),
        ("recycle = { age = \"1h\" }", "`templates.task.recycle.age` never comes"),
        ("recycle = { memory = \"2GiB\" }", "`templates.task.recycle.memory` never comes"),
    ] {
        let found = mistakes(&format!("{head}{line}\n"));
        assert!(found.contains(what) && found.lines().count() == 1, "{line}: {found}");
    }
    // Of tasks only those can be made ahead that are told what to do.
    let done = of_template("pool = { size = 3 }");
    assert!(done.contains("a task begins when its container is made") && done.contains("leave the pool out"), "{done}");
    assert_eq!(of_template("pool = { size = 3 }\napp_port = 8000"), "");
}

#[test]
fn a_fleet_that_nobody_can_ask_for_anything_says_so() {
    assert_eq!(parse(HEAD).unwrap().warnings(), Vec::<String>::new());
    let empty = HEAD.split_once("[templates.task]").unwrap().0;
    let warnings = parse(empty).unwrap().warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("[templates.NAME]") && warnings[0].contains("add one"), "{warnings:?}");
}

#[test]
fn what_no_tenant_can_pay_and_what_is_not_encrypted_is_said_and_is_no_mistake() {
    let with = |from: &str, to: &str| parse(&HEAD.replace(from, to)).unwrap().warnings().join("\n");
    assert_eq!(with("[tenants.acme]", "[tenants.acme]\nbudget_usd_per_day = 0.04"), "");
    let dear = with("[tenants.acme]", "[tenants.acme]\nbudget_usd_per_day = 0.03\nbudget_usd_per_month = 1.0");
    let what = "`tenants.acme` may spend 0.03 USD in a day, and 0.0358 are set aside for a container of `templates.task`";
    assert!(dear.contains(what) && dear.lines().count() == 1, "{dear}");
    for (near, far) in [("tcp://127.0.0.1:2375", "tcp://10.0.0.1:2375"), ("http://localhost:2375", "http://docker.internal:2375")]
    {
        assert_eq!(with("kind = \"docker\"", &format!("kind = \"docker\"\nsocket = \"{near}\"")), "");
        let said = with("kind = \"docker\"", &format!("kind = \"docker\"\nsocket = \"{far}\""));
        assert!(said.contains("`providers.local.socket` is another machine"), "{said}");
    }
}

#[test]
fn a_template_says_what_becomes_of_its_sessions() {
    let can = crate::build::provider("local", &parse(HEAD).unwrap().providers["local"]).unwrap().capabilities();
    let course = |template: &str, pause| {
        let config = parse(&format!("{HEAD}{template}").replace("pattern = \"ephemeral\"\n", "")).unwrap();
        config.templates["task"].course(&Capabilities { pause, ..can.clone() })
    };
    for (template, pause, says) in [
        (
            "pattern = \"ephemeral\"",
            Pause::No,
            "ephemeral: ends when its work is done; is over after 1h, each container after 1h",
        ),
        (
            "pattern = \"long-running\"\nidle_after = \"5m\"",
            Pause::Frozen,
            "long-running; when idle for 5m it ends; is over after 1h, each container after 1h",
        ),
        (
            "pattern = \"hybrid\"",
            Pause::Frozen,
            "hybrid; when idle for 10m it is frozen by the provider, at the price of running; is over after 7d, each container after 1h",
        ),
        (
            "pattern = \"hybrid\"",
            Pause::No,
            "hybrid; when idle for 10m it cannot sleep here, and ends; is over after 7d, each container after 1h",
        ),
        (
            "pattern = \"shared\"\napp_port = 8000\nidle_after = \"5m\"\nshared = { sessions_per_container = 8 }",
            Pause::Frozen,
            "shared, 8 in a container; when idle for 5m it ends; is over after 1h, each container after 1h",
        ),
    ] {
        assert_eq!(course(template, pause), says, "{template}");
    }
}

#[test]
fn what_could_only_fail_later_is_found_before() {
    for (line, what) in [
        ("app_port = 9477", "`templates.task.app_port` is 9477, where its sidecar listens; take another"),
        ("sidecar_port = 8000\napp_port = 8000", "`templates.task.app_port` is 8000, where its sidecar listens"),
        (
            "[[hooks]]\nname = \"h\"\non = [\"ready\"]\ncommand = [\"/usr/bin/missing\"]\ntimeout = \"5s\"",
            "`hooks.h.command`: there is no program `/usr/bin/missing`",
        ),
    ] {
        let found = of_template(line);
        assert!(found.contains(what) && found.lines().count() == 1, "{line}: {found}");
    }
    for (before, after, what) in [
        ("\"agent\"", "\"agent:1 --rm\"", "`templates.task.image` has a space in it: `agent:1 --rm`"),
        ("\"ephemeral\"", "\"shared\"", "`templates.task` is shared, and does not say by how many; add shared = {"),
        ("name = \"prod\"", "name = \"prod\"\nstore = \"sqlite:\"", "`fleet.store`: `sqlite:` wants a path after it"),
        ("name = \"prod\"", "name = \"prod\"\nstore = \"postgres://u@h/d?sslmod=x\"", "has no parameter `sslmod`"),
    ] {
        let found = mistakes(&HEAD.replace(before, after));
        assert!(found.contains(what) && found.lines().count() == 1, "{after}: {found}");
    }
    let stored = "[conversations]\nstore = \"postgres://u@h/d?passwrd=of-ours\"\n[fleet]\nsecret = { env = \"T\" }";
    let found = mistakes(&HEAD.replace("[fleet]", stored));
    assert!(
        found.contains("`conversations.store`: PostgreSQL has no parameter `passwrd`") && !found.contains("of-ours"),
        "{found}"
    );
}

#[test]
fn sessions_share_a_container_where_its_app_can_tell_them_apart() {
    let shared = "shared = { sessions_per_container = 8, containers = 4 }";
    for pattern in ["shared", "long-running"] {
        let text = format!("{HEAD}app_port = 8000\n{shared}\n").replace("\"ephemeral\"", &format!("{pattern:?}"));
        let config = parse(&text).unwrap();
        assert_eq!(config.templates["task"].shared, Some(Share { sessions_per_container: 8, containers: Some(4) }));
        assert!(config.print().contains(shared), "{}", config.print());
    }
    for (lines, what) in [
        (
            "app_port = 8000\nshared = { sessions_per_container = 8 }",
            "`templates.task` is ephemeral, and has its container for itself",
        ),
        ("shared = { sessions_per_container = 8 }", "`templates.task.shared` needs `app_port`"),
        ("app_port = 8000\nshared = { containers = 2 }", "`templates.task.shared` has no `sessions_per_container`"),
        ("app_port = 8000\nshared = { sessions_per_container = 257 }", "`templates.task.shared.sessions_per_container` is 257"),
        ("app_port = 8000\nshared = { sessions_per_container = 2, containers = 0 }", "is zero"),
    ] {
        let found = of_template(lines);
        assert!(found.contains(what), "{lines}: {found}");
    }
}
