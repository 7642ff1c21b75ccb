use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct World {
    env: BTreeMap<&'static str, &'static str>,
    labels: &'static str,
    annotations: &'static str,
    resource: BTreeMap<&'static str, &'static str>,
    args: Vec<&'static str>,
    cwd: &'static str,
}

impl World {
    fn learn(&self, sources: &str) -> (Who, Learn) {
        let at = Surroundings {
            env: &|name| self.env.get(name).map(|text| (*text).to_owned()),
            pod_labels: &|| Some(self.labels.to_owned()),
            pod_annotations: &|| Some(self.annotations.to_owned()),
            resource: &|name| self.resource.get(name).map(|text| (*text).to_owned()),
            args: &self.args,
            cwd: &|| self.cwd.to_owned(),
        };
        let fixed = Who { tenant: Some(String::from("fixed")), ..Who::default() };
        Learn::begin(&fixed, &[(Name::Tenant, sources.parse().unwrap())], None, &at)
    }

    fn tenant(&self, sources: &str) -> String {
        self.learn(sources).0.tenant.unwrap()
    }
}

#[test]
fn the_first_source_that_says_something_counts() {
    let world = World {
        env: BTreeMap::from([("CUSTOMER", "of-env"), ("EMPTY", "  ")]),
        labels: "app=\"x\"\nexample.com/tenant=\"of \\\"pod\\\"\"\n",
        annotations: "note=\"a\\nb\"\n",
        resource: BTreeMap::from([("tenant.id", "of-resource")]),
        args: vec!["-p", "hi", "--tag", "first", "--tag=of-arg", "--", "--tag=prompt"],
        cwd: "/workspaces/of-cwd/src",
    };
    for (sources, expected) in [
        ("env:CUSTOMER", "of-env"),
        ("env:EMPTY", "fixed"),
        ("env:NOBODY, env:EMPTY ,pod:example.com/tenant", "of \"pod\""),
        ("pod:tenant", "fixed"),
        ("annotation:note", "a_b~"),
        ("arg:--tag", "of-arg"),
        ("arg:--ta", "fixed"),
        ("resource:tenant.id", "of-resource"),
        ("cwd:/workspaces/{}/", "of-cwd"),
        ("cwd:/*/of-{}", "cwd"),
        ("cwd:/workspaces/of-cwd/src/{}", "fixed"),
        ("cwd:/elsewhere/{}, env:CUSTOMER", "of-env"),
        ("message:tenant, env:CUSTOMER", "of-env"),
    ] {
        let found = world.tenant(sources);
        assert!(found == expected || expected.ends_with('~') && found.starts_with(expected), "{sources}: {found}");
    }
}

#[test]
fn what_the_app_says_first_is_learnt_until_its_first_message() {
    let world = World { env: BTreeMap::from([("T", "early")]), ..World::default() };
    let initialize = br#"{"type":"control_request","request":{"subtype":"initialize","tenant":["a",7]}}"#;
    let message = br#"{"type":"user","metadata":{"tenant":"late"},"message":{"role":"user","content":"x"}}"#;
    let read = |sources: &str, lines: &[&[u8]]| {
        let (mut who, mut learn) = world.learn(sources);
        let over: Vec<bool> =
            lines.iter().map(|line| learn.read(line, line.starts_with(b"{\"type\":\"user"), &mut who)).collect();
        (who.tenant.unwrap(), over)
    };
    assert_eq!(
        read("message:metadata.tenant", &[initialize, message, message]),
        (String::from("late"), vec![false, true, false])
    );
    assert_eq!(read("message:request.tenant.1, env:T", &[initialize, message]), (String::from("7"), vec![true, false]));
    assert_eq!(read("message:no.such, env:T", &[b"no json", message]), (String::from("early"), vec![false, true]));
    assert_eq!(read("env:T, message:metadata.tenant", &[message]), (String::from("early"), vec![false]), "it was known before");
    let (who, learn) = world.learn("message:x, env:T");
    assert_eq!((who.tenant.as_deref(), learn.settled(&who).tenant), (Some("early"), None));
    let (who, learn) = world.learn("env:T");
    assert_eq!(learn.settled(&who), who);
    assert_eq!(read("message:metadata", &[message]), (String::from("fixed"), vec![true]), "an object is no value");
    assert!(read("message:x", &[b"{}".as_slice(); 64]).1[63], "nobody is listened to for ever");
}

#[test]
fn a_user_is_masked_wherever_it_comes_from() {
    let mask = || Some(Mask { key: b"k".to_vec(), hash: |key, user| format!("{}-{}", key.len(), user.len()) });
    let at = Surroundings {
        env: &|_| Some(String::from("anna")),
        pod_labels: &|| None,
        pod_annotations: &|| None,
        resource: &|_| None,
        args: &[],
        cwd: &|| String::from("/"),
    };
    let begin = |sources: &str| Learn::begin(&Who::default(), &[(Name::User, sources.parse().unwrap())], mask(), &at);
    let (mut who, mut learn) = begin("message:user, env:U");
    assert_eq!((who.user.as_deref(), who.labels()), (Some("1-4"), vec![]));
    learn.read(br#"{"user":"bob"}"#, true, &mut who);
    assert_eq!(who.user.as_deref(), Some("1-3"));
}

#[test]
fn what_is_no_source_is_said() {
    for (text, expected) in [
        ("CUSTOMER", "`CUSTOMER` names no source: there are env:, pod:, annotation:, arg:, resource:, message:, cwd:"),
        ("header:x", "there is no source `header`: there are env:"),
        ("env:", "`env:` names no variable, like env:CUSTOMER_ID"),
        ("env:A-B", "names no variable"),
        ("pod:a b", "`pod:a b` names no label, like pod:app.kubernetes.io/tenant"),
        ("arg:name", "names no flag, like arg:--name"),
        ("message:a..b", "names no field, like message:metadata.tenant"),
        ("cwd:/a/b", "is no path with one {} in it, like cwd:/workspaces/{}/"),
        ("cwd:{}/", "is no path"),
        ("cwd:/{}/{}", "is no path"),
        ("env:A,,env:B", "`` names no source"),
    ] {
        let wrong = text.parse::<Sources>().unwrap_err().to_string();
        assert!(wrong.contains(expected), "{text}: {wrong}");
    }
}

/// As Go quotes it.
fn quoted(text: &str) -> String {
    let escaped = |c: char| match c {
        '"' | '\\' => format!("\\{c}"),
        '\n' => String::from("\\n"),
        '\t' => String::from("\\t"),
        '\r' => String::from("\\r"),
        c if c.is_control() && u32::from(c) < 0x80 => format!("\\x{:02x}", u32::from(c)),
        c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

proptest! {
    #[test]
    fn a_pods_field_comes_back_as_it_was(key in "[a-z]{1,8}(/[a-z.-]{1,8})?", text in any::<String>(), other in any::<String>()) {
        // Line ends that only Unicode knows are none to Kubernetes.
        let file = format!("a{key}=\"{}\"\n{key}=\"{}\"\nz=\"\"\n", quoted(&other), quoted(&text));
        prop_assert_eq!(pod_field(&file, &key), Some(text));
    }

    #[test]
    fn no_file_is_too_odd_for_the_parser(text in any::<String>(), key in any::<String>()) {
        pod_field(&text, &key);
        pod_field(&format!("{key}=\"{text}\""), &key);
    }

    #[test]
    fn a_value_is_short_plain_and_tells_texts_apart(a in any::<String>(), b in any::<String>()) {
        let (one, two) = (value(&a), value(&b));
        for value in one.iter().chain(&two) {
            prop_assert!(!value.is_empty() && value.len() <= MAX);
            prop_assert!(!value.chars().any(char::is_control));
            let again = super::value(value);
            prop_assert_eq!(again.as_ref(), Some(value), "what fits stays");
        }
        prop_assert_eq!(one == two, a.trim() == b.trim());
        let long = format!("{}{a}", "x".repeat(200));
        prop_assert_ne!(value(&long), value(&format!("{long}.")));
    }

    #[test]
    fn sources_are_written_as_they_are_read(text in "(env:[A-Z_]{1,9}|pod:[a-z./-]{1,9}|arg:--[a-z-]{1,9}|message:[a-z]{1,5}(\\.[a-z0-9]{1,5}){0,3}|cwd:/[a-z]{1,5}/\\{\\}(/[a-z]{1,5})?)(, ?env:[A-Z]{1,4}){0,2}") {
        let sources: Sources = text.parse().unwrap();
        let again: Vec<String> = sources.0.iter().map(Source::to_string).collect();
        prop_assert_eq!(again.join(",").parse::<Sources>().unwrap(), sources);
    }

    #[test]
    fn no_text_is_too_odd_for_the_syntax(text in any::<String>(), prefix in "(env|pod|annotation|arg|resource|message|cwd):") {
        text.parse::<Sources>().ok();
        if let Ok(sources) = format!("{prefix}{text}").parse::<Sources>() {
            prop_assert!(!sources.0.is_empty());
        }
    }
}
