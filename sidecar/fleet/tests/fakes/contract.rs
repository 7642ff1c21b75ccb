//! What a provider has published about its interface, as a judge of every request that it gets and of every answer of its fake.
//!
//! Requests are read strictly: what is not in the contract is a mistake, even where the contract would let it pass. Of JSON Schema it knows what
//! the contracts in tests/specs use.

use std::collections::BTreeSet;

use serde_json::Value;

pub(crate) struct Contract(Value);

type Check = Result<(), String>;

impl Contract {
    pub(crate) fn parse(text: &str) -> Self {
        Self(serde_json::from_str(text).expect("tests/specs holds JSON"))
    }

    /// Whether there is such a call, with these parameters and this body.
    pub(crate) fn request(&self, method: &str, path: &[String], query: &[(String, String)], body: &[u8]) -> Check {
        let (operation, node) = self.operation(method, path)?;
        let parameters = || {
            let lists = [&operation["parameters"], &node["parameters"]];
            lists.into_iter().filter_map(Value::as_array).flatten().map(|parameter| self.resolved(parameter))
        };
        // One of many names: `metadata.{key}`.
        let named = |known: &Value, name: &str| {
            known.as_str().is_some_and(|known| known.split_once('{').map_or(known == name, |(begin, _)| name.starts_with(begin)))
        };
        for (name, value) in query {
            let known = parameters().find(|parameter| parameter["in"] == "query" && named(&parameter["name"], name));
            let Some(parameter) = known else { return Err(format!("there is no parameter `{name}`")) };
            self.text(&parameter["schema"], value).map_err(|why| format!("`{name}`: {why}"))?;
        }
        for parameter in parameters().filter(|parameter| parameter["in"] == "query" && parameter["required"] == true) {
            let name = parameter["name"].as_str().unwrap_or_default();
            if !query.iter().any(|(has, _)| has == name) {
                return Err(format!("`{name}` is missing"));
            }
        }
        let wanted = self.resolved(&operation["requestBody"]);
        let schema = &wanted["content"]["application/json"]["schema"];
        match (body, schema) {
            ([], _) if wanted["required"] == true => Err(String::from("the body is missing")),
            ([], _) => Ok(()),
            (_, Value::Null) => Err(String::from("a body that nobody asked for")),
            (body, schema) => {
                let value = serde_json::from_slice(body).map_err(|error| format!("the body is no JSON: {error}"))?;
                self.check(schema, &value, true).map_err(|why| format!("the body{why}"))
            }
        }
    }

    /// Whether it could be answered like this.
    pub(crate) fn answer(&self, method: &str, path: &[String], status: u16, body: &Value) -> Check {
        let (operation, _) = self.operation(method, path)?;
        let answers = &operation["responses"];
        let answer = self.resolved(&answers[status.to_string()]);
        // Failures are not all written down.
        if answer.is_null() && status >= 400 {
            return Ok(());
        }
        if answer.is_null() {
            return Err(format!("{status} is no answer to this"));
        }
        match &answer["content"]["application/json"]["schema"] {
            Value::Null => Ok(()),
            schema => self.check(schema, body, false).map_err(|why| format!("the answer{why}")),
        }
    }

    fn operation(&self, method: &str, path: &[String]) -> Result<(&Value, &Value), String> {
        let paths = self.0["paths"].as_object().expect("a contract has paths");
        let fits = |template: &&String| {
            let parts: Vec<&str> = template.trim_start_matches('/').split('/').collect();
            parts.len() == path.len() && parts.iter().zip(path).all(|(part, has)| part.starts_with('{') || part == has)
        };
        // The one with the fewest blanks is meant.
        let template = paths.keys().filter(fits).min_by_key(|template| template.matches('{').count());
        let node = template.map(|template| &paths[template]).ok_or_else(|| format!("there is no path {path:?}"))?;
        match &node[method.to_ascii_lowercase()] {
            Value::Null => Err(format!("{path:?} has no {method}")),
            operation => Ok((operation, node)),
        }
    }

    fn resolved<'a>(&'a self, mut node: &'a Value) -> &'a Value {
        while let Some(reference) = node["$ref"].as_str() {
            node = self.0.pointer(reference.trim_start_matches('#')).unwrap_or_else(|| panic!("{reference} is not there"));
        }
        node
    }

    /// A parameter, which is text whatever it means.
    fn text(&self, schema: &Value, text: &str) -> Check {
        let schema = self.resolved(schema);
        let value = match schema["type"].as_str() {
            Some("integer" | "number") => {
                text.parse::<serde_json::Number>().map(Value::Number).map_err(|_| format!("`{text}` is no number"))?
            }
            Some("boolean") => text.parse().map(Value::Bool).map_err(|_| format!("`{text}` is not true or false"))?,
            Some("array") => Value::Array(text.split(',').map(Value::from).collect()),
            _ => Value::from(text),
        };
        self.check(schema, &value, true)
    }

    /// An error begins with where it is.
    fn check(&self, schema: &Value, value: &Value, strict: bool) -> Check {
        let schema = self.resolved(schema);
        if value.is_null() && schema["nullable"] == true {
            return Ok(());
        }
        if let Some(choices) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
            let tried: Vec<Check> = choices.iter().map(|choice| self.check(choice, value, strict)).collect();
            if tried.iter().all(Result::is_err) {
                return Err(format!(" is none of {tried:?}"));
            }
        }
        if let Some(words) = schema["enum"].as_array()
            && !words.contains(value)
        {
            return Err(format!(": {value} is none of {words:?}"));
        }
        let right = match schema["type"].as_str() {
            Some("object") => value.is_object(),
            Some("array") => value.is_array(),
            Some("string") => value.is_string(),
            Some("boolean") => value.is_boolean(),
            Some("integer") => value.is_i64() || value.is_u64(),
            Some("number") => value.is_number(),
            Some(other) => panic!("the type {other} is not known here"),
            None => true,
        };
        if !right {
            return Err(format!(": {value} is not {}", schema["type"]));
        }
        if let Some(number) = value.as_f64() {
            let below = schema["minimum"].as_f64().is_some_and(|least| number < least);
            if below || schema["maximum"].as_f64().is_some_and(|most| number > most) {
                return Err(format!(": {number} is out of bounds"));
            }
        }
        if let Some(text) = value.as_str() {
            let most = schema["maxLength"].as_u64().is_some_and(|most| text.len() as u64 > most);
            let time = schema["format"] == "date-time" && text.parse::<jiff::Timestamp>().is_err();
            if most || time {
                return Err(format!(": {text} is too long or no time"));
            }
        }
        for (at, item) in value.as_array().into_iter().flatten().enumerate() {
            if !schema["items"].is_null() {
                self.check(&schema["items"], item, strict).map_err(|why| format!("[{at}]{why}"))?;
            }
        }
        if let Some(members) = value.as_object() {
            let mut parts = Vec::new();
            self.parts(schema, &mut parts);
            let mut known = BTreeSet::new();
            for part in &parts {
                for name in part["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    if !members.contains_key(name) {
                        return Err(format!(": `{name}` is missing"));
                    }
                }
                for (name, schema) in part["properties"].as_object().into_iter().flatten() {
                    known.insert(name.as_str());
                    if let Some(member) = members.get(name) {
                        self.check(schema, member, strict).map_err(|why| format!(".{name}{why}"))?;
                    }
                }
            }
            let rest = parts.iter().map(|part| &part["additionalProperties"]).find(|rest| !rest.is_null());
            for (name, member) in members.iter().filter(|(name, _)| !known.contains(name.as_str())) {
                match rest {
                    Some(Value::Object(_)) => {
                        self.check(rest.expect("it is one"), member, strict).map_err(|why| format!(".{name}{why}"))?
                    }
                    Some(Value::Bool(true)) => {}
                    // Without a word about its members it is free.
                    None if known.is_empty() || !strict => {}
                    _ if !strict => {}
                    _ => return Err(format!(".{name} is not known")),
                }
            }
        }
        Ok(())
    }

    /// A schema with all that it is put together from.
    fn parts<'a>(&'a self, schema: &'a Value, into: &mut Vec<&'a Value>) {
        let schema = self.resolved(schema);
        into.push(schema);
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.parts(part, into);
        }
    }
}

#[test]
fn a_contract_judges() {
    let contract = Contract::parse(
        r##"{"paths": {"/a/{id}": {"post": {
            "parameters": [{"in": "query", "name": "n", "schema": {"type": "integer", "maximum": 3}}],
            "requestBody": {"required": true, "content": {"application/json": {"schema": {"allOf": [{"$ref": "#/s"}]}}}},
            "responses": {"200": {"content": {"application/json": {"schema": {"type": "array", "items": {"type": "string"}}}}}}}}},
          "s": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string", "enum": ["v"]}, "m": {"additionalProperties": {"type": "string"}}}}}"##,
    );
    let path = ["a", "x"].map(String::from);
    let asked = |query: &[(&str, &str)], body: &str| {
        let query: Vec<_> = query.iter().map(|(name, value)| (String::from(*name), String::from(*value))).collect();
        contract.request("POST", &path, &query, body.as_bytes()).err()
    };
    assert_eq!(asked(&[("n", "3")], r#"{"k": "v", "m": {"free": "x"}}"#), None);
    for (query, body) in [
        (&[("n", "4")][..], r#"{"k": "v"}"#),
        (&[("n", "x")], r#"{"k": "v"}"#),
        (&[("o", "1")], r#"{"k": "v"}"#),
        (&[], ""),
        (&[], "{"),
        (&[], "{}"),
        (&[], r#"{"k": "w"}"#),
        (&[], r#"{"k": "v", "l": 1}"#),
        (&[], r#"{"k": "v", "m": {"x": 1}}"#),
    ] {
        assert!(asked(query, body).is_some(), "{query:?} {body}");
    }
    assert!(contract.request("GET", &path, &[], b"").is_err());
    assert!(contract.request("POST", &path[..1], &[], b"{}").is_err());
    assert!(contract.answer("POST", &path, 200, &serde_json::json!(["x"])).is_ok());
    assert!(contract.answer("POST", &path, 200, &serde_json::json!([1])).is_err());
    assert!(contract.answer("POST", &path, 201, &Value::Null).is_err());
}
