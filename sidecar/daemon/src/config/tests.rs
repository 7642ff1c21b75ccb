use agent_sidecar_core::limit::{Ceiling, Rule};

use super::*;

fn load(file: &str, environment: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Config, Mistakes> {
    Config::load(&Sources {
        file: Some((PathBuf::from("c.toml"), file.to_owned())),
        unreadable: None,
        environment: environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        flags: flags.iter().map(|(flag, value)| (*flag, (*value).to_owned())).collect(),
    })
}

#[test]
fn every_setting_is_right_by_default_and_named_once() {
    let config = load("", &[], &[]).unwrap();
    let rules = config.rules();
    assert!(rules.iter().all(|rule| rule.limit.is_loop() && rule.mode == Mode::Shadow), "only loops are limited, and only told");
    let ceilings: Vec<_> = rules.iter().map(|rule| (rule.limit, rule.ceiling)).collect();
    assert_eq!(ceilings, agent_sidecar_core::detect::CEILINGS.map(|(limit, n)| (limit, Ceiling::Count(n))));
    let mut seen = std::collections::BTreeSet::new();
    for setting in SETTINGS {
        assert!(seen.insert(setting.flag) && seen.insert(setting.key) || setting.flag == setting.key, "{}", setting.key);
    }
    for (name, ..) in RULES {
        assert!(SETTINGS.iter().any(|setting| setting.key == format!("limits.{name}")), "{name}");
    }
}

#[test]
fn the_later_source_wins() {
    let file = "listen = \"off\"\n[limits]\nmax_turns = 7\nmax_cost_usd = 2.5\nidle_timeout = \"10m\"\n";
    let config =
        load(file, &[("AGENT_SIDECAR_MAX_TURNS", "8"), ("AGENT_SIDECAR_PORT_9477_TCP", "x")], &[("max-turns", "9")]).unwrap();
    let rules = chosen(&config);
    assert_eq!(rules.len(), 3);
    assert_eq!(rules[0].ceiling, Ceiling::Count(9));
    assert_eq!(config.idle_timeout(), Some(Duration::from_secs(600)));
    let origins: Vec<String> =
        config.effective().filter(|(_, e)| e.origin != Origin::Default).map(|(s, e)| format!("{} {}", s.key, e.origin)).collect();
    assert_eq!(
        origins,
        [
            "limits.max_turns --max-turns",
            "limits.max_cost_usd c.toml:4:16",
            "limits.idle_timeout c.toml:5:16",
            "listen c.toml:1:10"
        ]
    );
    let unset = load(file, &[], &[("max-cost-usd", "off")]).unwrap();
    assert_eq!(chosen(&unset).len(), 2);
}

/// Without those that are there by default.
fn chosen(config: &Config) -> Vec<Rule> {
    config.rules().into_iter().filter(|rule| !rule.limit.is_loop()).collect()
}

#[test]
fn loops_are_told_unless_somebody_wants_more_or_less() {
    let modes = |file: &str, flags: &[(&'static str, &str)]| -> Vec<&str> {
        load(file, &[], flags).unwrap().rules().iter().map(|rule| rule.mode.as_str()).collect()
    };
    assert_eq!(modes("", &[("loop-mode", "enforce")]), ["enforce"; 6]);
    assert_eq!(modes("", &[("mode", "off"), ("loop-mode", "enforce")]), ["off"; 6]);
    assert_eq!(modes("", &[("max-subagents", "off"), ("max-compactions", "none")]), ["shadow"; 4]);
    let one = "[limits]\nmax_stale_answers = \"off\"\n[limits.modes]\nmax_identical_calls = \"enforce\"\n";
    assert_eq!(modes(one, &[]), ["enforce", "shadow", "shadow", "shadow", "shadow"]);
}

#[test]
fn ten_mistakes_are_named_at_once_with_place_and_remedy() {
    let file = r#"listen = "nowhere"
[limits]
max_turn = 3
max_turns = -1
max_cost_usd = "two"
idle_timeout = 600
max_memory = "1 elephant"
[limits.modes]
max_cost_usd = "maybe"
[log]
format = "xml"
[[prices.model]]
name = "mine"
input = "cheap"
output = 1
"#;
    let mistakes = load(file, &[("AGENT_SIDECAR_MAX_DURATION", "5 parsecs")], &[("mode", "loud")]).unwrap_err();
    assert_eq!(
        mistakes.to_string(),
        "the configuration has 10 mistakes
  c.toml:1:10: `listen` is an address, not `nowhere`; write an address and a port, like 127.0.0.1:9477 or :9477, or off
  c.toml:3:1: there is no setting `limits.max_turn`; did you mean `limits.max_turns`?
  c.toml:4:13: `limits.max_turns` is a whole number, not `-1`; write a whole number above zero, like 40
  c.toml:5:16: `limits.max_cost_usd` is an amount of dollars, not `two`; write dollars, like 2.50
  c.toml:6:16: `limits.idle_timeout` is a duration, not the number `600`; write a number and a unit, like 90s, 10m, 1h30m or 500ms; in a file in quotes
  c.toml:7:14: `limits.max_memory` is a size, not `1 elephant`; write a number and a unit, like 512MiB or 2GiB
  c.toml:9:16: `limits.modes.max_cost_usd` is a mode, not the text `maybe`; write off, shadow or enforce
  c.toml:11:10: `log.format` is one of text, json, not `xml`; write text or json
  c.toml:14:9: `input` is dollars for a million tokens, not the text `cheap`; write a number, like 2.50
  AGENT_SIDECAR_MAX_DURATION: `limits.max_duration` is a duration, not `5 parsecs`; write a number and a unit, like 90s, 10m, 1h30m or 500ms; in a file in quotes
  --mode: `limits.mode` is a mode, not `loud`; write off, shadow or enforce"
            .replace("10 mistakes", "11 mistakes")
    );
}

#[test]
fn broken_toml_does_not_hide_what_else_is_wrong() {
    let mistakes = load("[limits\nmax_turns = = 3\nmax_turnips = 2\n", &[], &[]).unwrap_err();
    assert!(mistakes.0.len() >= 2, "{mistakes}");
    assert!(mistakes.to_string().contains("c.toml:1:"), "{mistakes}");
}

#[test]
fn what_cannot_all_be_meant_is_said() {
    let file = "linger = \"26s\"\n[limits]\nmax_cost_usd = 1\nturn_max_cost_usd = 2\n";
    let text = load(file, &[], &[("listen", "off")]).unwrap_err().to_string();
    for part in ["is above `limits.max_cost_usd`", "the platform kills after 30s", "`listen` is off"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn prices_of_ones_own_win() {
    let file = "[prices]\ndiscount = 0.5\nfallback = { input = 1, output = 2 }\n[[prices.model]]\nname = \"mine\"\ninput = 10\noutput = 20\n";
    let config = load(file, &[], &[]).unwrap();
    let tokens = agent_sidecar_core::tokens::Tokens { input: 1_000_000, ..Default::default() };
    let usage = agent_sidecar_core::event::Usage { tokens, ..Default::default() };
    let cost = |model| config.prices.answer(model, Duration::from_secs(1_795_392_000), &usage).map(Usd::to_f64);
    assert_eq!((cost("mine"), cost("claude-opus-5-5"), cost("nobody's")), (Some(5.0), Some(2.0), Some(0.5)));
}

#[test]
fn durations_and_sizes_have_units() {
    for (text, expected) in [("90s", 90.0), ("1h30m", 5_400.0), ("500ms", 0.5), ("2d", 172_800.0), ("1.5h", 5_400.0)] {
        assert_eq!(Kind::Time.parse(text), Ok(Value::Time(Duration::from_secs_f64(expected))), "{text}");
    }
    for text in ["", "10", "s", "1w", "-3s", "0s", "9999999d", "1e400s"] {
        assert!(Kind::Time.parse(text).is_err(), "{text}");
    }
    assert_eq!(Kind::Size.parse("512MiB"), Ok(Value::Size(512 << 20)));
    assert!(Kind::Size.parse("12 parsecs").is_err());
    assert_eq!(Kind::Address.parse("off"), Ok(Value::Address(None)));
}

#[test]
fn a_variable_that_was_meant_for_us_is_a_mistake_and_others_are_not() {
    let said = |name: &str| load("", &[(name, "3")], &[]).map_or_else(|mistakes| mistakes.0[0].remedy.clone(), |_| String::new());
    assert_eq!(said("AGENT_SIDECAR_MAX_COST"), "did you mean AGENT_SIDECAR_MAX_COST_USD?");
    assert_eq!(said("AGENT_SIDECAR_LIMITS_MAX_TURNS"), "did you mean AGENT_SIDECAR_MAX_TURNS?");
    assert_eq!(said("AGENT_SIDECAR_MAX_TURN"), "did you mean AGENT_SIDECAR_MAX_TURNS?");
    // What Kubernetes makes for services that are called like us, and what the project itself uses.
    for name in [
        "PORT",
        "SERVICE_HOST",
        "SERVICE_PORT",
        "PORT_9477_TCP",
        "PORT_9477_TCP_ADDR",
        "METRICS_PORT",
        "METRICS_SERVICE_HOST",
        "SOCKET",
        "BIN",
    ] {
        assert_eq!(said(&format!("AGENT_SIDECAR_{name}")), "", "{name}");
    }
}

#[test]
fn a_variable_that_is_near_nothing_is_a_stranger() {
    let strange = |name: &str, value: &str| {
        let name = format!("AGENT_SIDECAR_{name}");
        let all = load("", &[(&name, value)], &[]).unwrap().strangers().to_vec();
        all.first().map(|one| (one.origin.to_string(), one.remedy.clone()))
    };
    let nearest = |name: &str| strange(name, "3").map(|(_, remedy)| remedy);
    assert_eq!(nearest("COST_LIMIT_USD").as_deref(), Some("the nearest is AGENT_SIDECAR_MAX_COST_USD"));
    assert_eq!(nearest("VERSION").as_deref(), Some("`agent-sidecar check --print` lists what there is"));
    // Kubernetes sets an address; a number is somebody's wish.
    assert!(nearest("PORT").is_some() && nearest("PORT_NUMBER").is_some());
    assert_eq!(strange("A\nB", "3").unwrap().0, "AGENT_SIDECAR_A\\nB");
    for name in ["PORT", "HUB_PORT", "MAX_COST_PORT"] {
        assert_eq!(strange(name, "tcp://10.0.0.7:9477"), None, "{name}");
    }
    for name in [
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_METRICS",
        "PORT_9477_TCP",
        "PORT_9477_TCP_PROTO",
        "PORT_9477_UDP_ADDR",
        "METRICS_SERVICE_HOST",
        "METRICS_PORT_9477_TCP_PORT",
        "BIN",
        "SHIM_DEPTH",
        "TESTS_NO_DOCKER",
    ] {
        assert_eq!(strange(name, "3"), None, "{name}");
    }
    let many: Vec<String> = (0..50).map(|n| format!("AGENT_SIDECAR_XYZZY{n}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "1")).collect();
    assert_eq!(load("", &many, &[]).unwrap().strangers().len(), 10);
}

#[test]
fn mistakes_come_in_the_order_of_the_file() {
    let file = "[stop]\ngentle = 1\n[limits]\nmax_turns = 1\nmax_turns = 2\nidle = \"3m\"\n[limit]\na = 1\n[labels]\nteam = \"a\\nb\"\n[prices]\nmodel = 3\n";
    let mistakes = load(file, &[], &[]).unwrap_err();
    assert_eq!(
        mistakes.to_string(),
        "the configuration has 6 mistakes
  c.toml:2:1: there is no setting `stop.gentle`; remove it; `agent-sidecar check --print` lists what there is
  c.toml:5:1: duplicate key; mend the TOML here; text goes in quotes
  c.toml:6:1: there is no setting `limits.idle`; did you mean `limits.idle_timeout`?
  c.toml:7:2: there is no setting `limit`; did you mean `limits`?
  c.toml:10:8: `labels.team` is a text of 1 to 64 bytes in one line; write a name, like \"research\"
  c.toml:12:9: `prices.model` is more than the number `3`; write [[prices.model]] above each price"
    );
}

#[test]
fn whatever_is_in_force_is_in_the_fingerprint() {
    let files = [
        "",
        "[limits]\nmax_turns = 3\n",
        "[limits.modes]\nmax_turns = \"off\"\n",
        "[prices]\nfallback = { input = 1, output = 2 }\n",
    ];
    let prints: std::collections::BTreeSet<String> =
        files.iter().map(|file| load(file, &[], &[]).unwrap().fingerprint()).collect();
    assert_eq!(prints.len(), files.len());
    let written_otherwise = load("# the same\n[limits]\nmax_turns=3\n", &[], &[]).unwrap().fingerprint();
    assert!(prints.contains(&written_otherwise));
}

#[test]
fn no_linger_is_said_as_zero_or_off() {
    for text in ["0", "0s", "0ms"] {
        let config = load("", &[("AGENT_SIDECAR_LINGER", text)], &[("listen", "off")]).unwrap();
        assert_eq!(config.linger(), Duration::ZERO, "{text}");
    }
    let labels = load("[labels]\ntenant = \"a\"\n", &[("AGENT_SIDECAR_COST_CENTER", "42")], &[]).unwrap().fixed_who().labels();
    assert_eq!(labels, [("tenant", String::from("a")), ("cost_center", String::from("42"))]);
}

#[test]
fn where_telemetry_goes_is_ours_to_say_and_its_keys_are_nobodys_to_see() {
    let file = "[otlp]\nendpoint = \"https://c:4318\"\nprotocol = \"grpc\"\ntraces = false\nheaders = \"authorization=geheim\"\n";
    let config = load(file, &[("AGENT_SIDECAR_OTLP_TIMEOUT", "2s")], &[("otlp-logs", "off")]).unwrap();
    let own = config.otlp();
    assert_eq!((own.endpoint.as_deref(), own.off, own.protocol.as_deref()), (Some("https://c:4318"), false, Some("grpc")));
    assert_eq!((own.timeout, own.signals), (Some(Duration::from_secs(2)), [Some(false), None, Some(false)]));
    assert!(own.headers.is_some());
    let mut printed = Vec::new();
    crate::reference::effective(&config, &mut printed).unwrap();
    let printed = String::from_utf8(printed).unwrap();
    assert!(printed.lines().any(|line| line.starts_with("otlp.headers") && line.contains("(hidden) ")), "{printed}");
    assert!(!printed.contains("geheim") && !format!("{config:?} {own:?}").contains("geheim"));
    let other_key = load(&file.replace("geheim", "g"), &[("AGENT_SIDECAR_OTLP_TIMEOUT", "2s")], &[("otlp-logs", "off")]).unwrap();
    assert_eq!(other_key.fingerprint(), config.fingerprint());
    let off = load(file, &[("AGENT_SIDECAR_OTLP_ENDPOINT", "off")], &[]).unwrap().otlp();
    assert_eq!((off.endpoint, off.off), (None, true));
    let wrong = "[otlp]\nendpoint = \"https://u:geheim@c\"\nheaders = \"geheim\"\nclient_key = \"/k\"\n";
    let mistakes = load(wrong, &[], &[("otlp-endpoint", "geheim:4318")]).unwrap_err().to_string();
    assert!(!mistakes.contains("geheim"), "{mistakes}");
    for part in
        ["4 mistakes", "header 1 has no `=`", "a user or a password", "without `otlp.client_certificate`", "does not begin with"]
    {
        assert!(mistakes.contains(part), "{part}: {mistakes}");
    }
}

#[test]
fn whom_an_agent_works_for_is_read_from_several_places_and_keys_do_not_print() {
    let file = "[labels]\ntenant = \"acme\"\ntenant_from = \"message:metadata.tenant, env:CUSTOMER\"\nuser_hash = true\nuser_hash_key = \"geheim\"\n[tenants]\nguard = \"enforce\"\nagent_dirs = \"/data\"\n[disk]\ninterval = \"0\"\n";
    let config = load(file, &[("AGENT_SIDECAR_END_USER_FROM", "env:USER_ID")], &[("agent-from", "arg:--name")]).unwrap();
    assert_eq!(config.fixed_who().tenant.as_deref(), Some("acme"));
    assert_eq!(config.sources_of(Name::Tenant).map(|sources| sources.0.len()), Some(2));
    assert_eq!((config.sources_of(Name::User).is_some(), config.sources_of(Name::Team)), (true, None));
    assert_eq!((config.user_hash(), config.guard()), (Some(b"geheim".to_vec()), Mode::Enforce));
    assert!(config.agent_dirs().is_some_and(|dirs| dirs.name.is_some() && !dirs.remove));
    assert_eq!(config.disk_interval(), None);
    let mut printed = Vec::new();
    crate::reference::effective(&config, &mut printed).unwrap();
    let shown = format!("{}{config:?}", String::from_utf8(printed).unwrap());
    assert!(!shown.contains("geheim") && shown.contains("(hidden)"), "{shown}");
}

#[test]
fn who_has_no_key_tells_no_user() {
    let file = "[labels]\nuser_from = \"env:USER_ID\"\nuser = \"anna\"\nteam = \"blue\"\n";
    let (hash, key) = (("AGENT_SIDECAR_END_USER_HASH", "true"), "AGENT_SIDECAR_END_USER_HASH_KEY");
    let below = |config: &Config| config.for_those_below();
    assert_eq!(below(&load(file, &[hash], &[]).unwrap()), []);
    let hashed = load(file, &[hash, (key, "geheim")], &[]).unwrap();
    assert_eq!(below(&hashed), [(key.to_owned(), String::from("withheld"))]);
    assert!(hashed.fixed_who().user.is_some() && hashed.sources_of(Name::User).is_some());
    let flags = load(file, &[], &[("end-user-hash", "true"), ("end-user-hash-key", "geheim")]).unwrap();
    let told = below(&flags);
    assert_eq!(told.len(), 2);
    let told: Vec<(&str, &str)> = told.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    for file in [file.to_owned(), format!("[policy]\nfinal = [\"labels.*\"]\n{file}user_hash = true\n")] {
        let nested = load(&file, &told, &[]).unwrap();
        let who = nested.fixed_who();
        assert_eq!((who.user, who.team.as_deref(), nested.sources_of(Name::User)), (None, Some("blue"), None));
        assert_eq!(below(&nested), [told[0]].map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}

#[test]
fn what_is_wrong_with_tenants_is_said() {
    let file = "listen = \"off\"\n[labels]\ntenant_from = \"header:x\"\nuser_hash_key = \"geheim\"\n[tenants]\nguard = \"enforce\"\nagent_from = \"message:name\"\n[limits]\ntenant_max_cost_usd = 1\n";
    let text = load(file, &[], &[]).unwrap_err().to_string();
    for part in [
        "c.toml:3:15: `labels.tenant_from` is wrong: there is no source `header`: there are env:, pod:",
        "write sources in the order in which they are asked, like env:CUSTOMER_ID, pod:tenant",
        "`labels.user_hash_key` is of no use without",
        "`tenants.guard` knows what agents share that meet",
        "has to be there before the app says anything",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("geheim"), "{text}");
    let budget = "[limits]\ntenant_max_cost_usd = 1\n";
    assert!(load(budget, &[], &[]).unwrap_err().to_string().contains("set `labels.tenant` or `labels.tenant_from`"));
    assert!(load(budget, &[], &[("tenant-from", "env:T")]).is_ok());
}

#[test]
fn a_token_is_nobodys_to_see() {
    let word = "geheim-geheim-geheim";
    let config = load("", &[("AGENT_SIDECAR_CONTROL_TOKEN", word)], &[]).unwrap();
    let mut printed = Vec::new();
    crate::reference::effective(&config, &mut printed).unwrap();
    assert!(!String::from_utf8(printed).unwrap().contains("geheim") && !format!("{config:?}").contains("geheim"));
    let mistakes = load("[hub]\ncontrol_token = \"geheim\"\n", &[], &[]).unwrap_err().to_string();
    assert!(mistakes.contains("at least 16") && !mistakes.contains("geheim"), "{mistakes}");
    assert!(Config::secrets().any(|name| name == "AGENT_SIDECAR_CONTROL_TOKEN"));
}

#[test]
fn where_a_token_was_meant_none_is_not_enough() {
    let read = |file: &str, environment: &[(&str, &str)]| {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let sources = Sources { file: Some((PathBuf::from("c.toml"), file.to_owned())), environment, ..Sources::default() };
        let (config, mistakes) = Config::read(&sources);
        (config.keys().token, mistakes.len(), config.for_those_below())
    };
    let (control, word) = (("AGENT_SIDECAR_HUB_CONTROL", "true"), ("AGENT_SIDECAR_CONTROL_TOKEN", "geheim-geheim-geheim"));
    let is = |word: &str| Token::of(word).unwrap();
    let closed = vec![(String::from("AGENT_SIDECAR_HUB_CONTROL"), String::from("false"))];
    assert_eq!(read("", &[control]), (Token::None, 0, vec![]));
    assert_eq!(read("", &[control, word]), (is(word.1), 0, closed.clone()));
    // Too short, another name, a file that is no TOML.
    for (file, name, value) in [
        ("", "AGENT_SIDECAR_CONTROL_TOKEN", "short"),
        ("[hub]\ncontrol_tokn = \"geheim-geheim-geheim\"\n", "AGENT_SIDECAR_TEAM", "x"),
        ("[hub\ncontrol_token_file = \"/token\"\n", "AGENT_SIDECAR_TEAM", "x"),
    ] {
        let (token, mistakes, below) = read(file, &[control, (name, value)]);
        assert!(token == Token::Lost && mistakes > 0 && below == closed, "{name}={value}: {token:?} {mistakes} {below:?}");
    }
    // What is final has no token: then one may be given. Control may be less, and no second token be put before the first.
    let policy = "[policy]\nfinal = [\"*\"]\n[hub]\ncontrol = true\n";
    assert_eq!(read(policy, &[word]), (is(word.1), 0, closed));
    assert_eq!(read(policy, &[("AGENT_SIDECAR_HUB_CONTROL", "false")]), (Token::None, 0, vec![]));
    let another = format!("{policy}control_token = \"another-token-of-theirs\"\n");
    assert_eq!(read(&another, &[word]), (is("another-token-of-theirs"), 1, vec![]));
    let file = format!("{policy}control_token_file = \"/no/such/file\"\n");
    assert_eq!(read(&file, &[word]), (Token::Lost, 1, vec![]));
}

#[test]
fn what_is_final_can_be_tightened_and_nothing_else() {
    let text = "[policy]\nfinal = [\"limits.*\", \"hub.control\", \"run.user\", \"labels.tenant\"]\n[limits]\nmax_cost_usd = 5\nmode = \"shadow\"\n[run]\nuser = \"agent\"\n";
    let read = |name: &str, value: &str| {
        let sources = Sources {
            file: Some((PathBuf::from("config.toml"), text.to_owned())),
            environment: vec![(name.to_owned(), value.to_owned())],
            ..Sources::default()
        };
        let (config, mistakes) = Config::read(&sources);
        let setting = SETTINGS.iter().find(|setting| variable(setting) == name).unwrap();
        (config.text(setting.key).to_owned(), mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>())
    };
    for (name, value) in [
        ("AGENT_SIDECAR_MAX_COST_USD", "4.99"),
        ("AGENT_SIDECAR_MAX_COST_USD", "5.0"),
        ("AGENT_SIDECAR_MAX_TURNS", "1000"),
        ("AGENT_SIDECAR_MODE", "enforce"),
        ("AGENT_SIDECAR_HUB_CONTROL", "false"),
        ("AGENT_SIDECAR_USER", "agent"),
        ("AGENT_SIDECAR_TEAM", "other"),
    ] {
        assert_eq!(read(name, value), (value.to_owned(), vec![]), "{name}={value}");
    }
    for (name, value, stays) in [
        ("AGENT_SIDECAR_MAX_COST_USD", "5.01", "5"),
        ("AGENT_SIDECAR_MAX_COST_USD", "off", "5"),
        ("AGENT_SIDECAR_MODE", "off", "shadow"),
        ("AGENT_SIDECAR_LOOP_MODE", "off", "shadow"),
        ("AGENT_SIDECAR_MAX_SAME_ERRORS", "9", "8"),
        ("AGENT_SIDECAR_TIME_ZONE", "+05:00", "UTC"),
        ("AGENT_SIDECAR_MEMORY_HORIZON", "1s", ""),
        ("AGENT_SIDECAR_HUB_CONTROL", "true", "false"),
        ("AGENT_SIDECAR_USER", "root", "agent"),
        ("AGENT_SIDECAR_USER", "off", "agent"),
        ("AGENT_SIDECAR_TENANT", "acme", ""),
    ] {
        let (text, mistakes) = read(name, value);
        assert_eq!(text, stays, "{name}={value}");
        assert!(mistakes.len() == 1 && mistakes[0].contains("it is final (config.toml:2:"), "{mistakes:?}");
    }
    assert!(read("AGENT_SIDECAR_MAX_COST_USD", "off").1[0].contains("is 5, and may only be lowered here"));
}

#[test]
fn a_list_of_what_is_final_names_settings() {
    let text = "[policy]\nfinal = [\"limit.*\", \"hub.contrl\", 3]\n";
    let sources = Sources { file: Some((PathBuf::from("config.toml"), text.to_owned())), ..Sources::default() };
    let mistakes: Vec<String> = Config::read(&sources).1.iter().map(Mistake::to_string).collect();
    assert_eq!(mistakes.len(), 3, "{mistakes:?}");
    assert!(mistakes[1].contains("did you mean `hub.control`?"), "{mistakes:?}");
}

#[test]
fn where_something_is_final_no_other_file_is_read() {
    let dir = std::env::temp_dir().join(format!("agent-sidecar-final-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (usual, other) = (dir.join("usual.toml"), dir.join("other.toml"));
    std::fs::write(&other, "[limits]\nmax_cost_usd = 100\n").unwrap();
    std::fs::write(&usual, "[limits]\nmax_cost_usd = 5\n").unwrap();
    let (file, mistake) = Sources::file(Some(&other), &usual);
    assert!(mistake.is_none() && file.unwrap().0 == other);
    std::fs::write(&usual, "[policy]\nfinal = [\"*\"]\n[limits]\nmax_cost_usd = 5\n").unwrap();
    let (file, mistake) = Sources::file(Some(&other), &usual);
    assert!(mistake.is_some() && file.unwrap().0 == usual);
    let (file, mistake) = Sources::file(None, &usual);
    assert!(mistake.is_none() && file.unwrap().0 == usual);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn no_two_settings_have_a_flag_in_common() {
    let (mut flags, mut keys) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for setting in SETTINGS {
        assert!(flags.insert(setting.flag) && keys.insert(setting.key), "{}: {}", setting.key, setting.flag);
    }
}
