//! The API's description, and as much of JSON Schema as it uses. Anything else in it is an error,
//! so that nothing is checked by being ignored.

use serde_json::Value;

pub(crate) struct Description(Value);

impl Description {
    pub(crate) fn load() -> Self {
        Self(serde_json::from_str(include_str!("../../../src/api/openapi.json")).expect("JSON"))
    }

    pub(crate) fn whole(&self) -> Value {
        self.0.clone()
    }

    /// Each as its method and path.
    pub(crate) fn operations(&self) -> Vec<String> {
        let paths = self.0["paths"].as_object().expect("paths").iter();
        let of = |(path, methods): (&String, &Value)| {
            let methods = methods.as_object().expect("methods").keys();
            methods.map(|method| format!("{method} {path}")).collect::<Vec<_>>()
        };
        let mut operations: Vec<String> = paths.flat_map(of).collect();
        operations.sort();
        operations
    }

    /// Panics unless the answer (status, content type, body) is one that is described.
    pub(crate) fn accepts(&self, method: &str, path: &str, (status, kind, body): &(u16, String, String)) {
        let answer = &self.0["paths"][path][method]["responses"][status.to_string()];
        assert!(answer.is_object(), "{method} {path}: status {status} is not described");
        let Some(content) = answer["content"].as_object() else {
            return assert!(body.is_empty(), "{method} {path}: no body is described: {body}");
        };
        let (described, content) = content.iter().next().expect("a content type");
        assert_eq!(kind, described, "{method} {path}");
        let parts = if kind.contains("ndjson") { body.lines().collect() } else { vec![body.as_str()] };
        assert!(!parts.is_empty(), "{method} {path}: an empty answer");
        for part in parts {
            let value = serde_json::from_str(part).expect("JSON");
            let found = self.judge(&content["schema"], &value, "");
            assert!(found.is_empty(), "{method} {path} {status}: {found:?} in {part}");
        }
    }

    /// Panics unless `value` is as the schema `name` says.
    pub(crate) fn check(&self, name: &str, value: &Value) {
        let found = self.errors(name, value);
        assert!(found.is_empty(), "{name}: {found:?} in {value}");
    }

    pub(crate) fn errors(&self, name: &str, value: &Value) -> Vec<String> {
        let schema = &self.0["components"]["schemas"][name];
        assert!(schema.is_object(), "there is no schema {name}");
        self.judge(schema, value, name)
    }

    fn judge(&self, schema: &Value, value: &Value, at: &str) -> Vec<String> {
        let mut found = Vec::new();
        for (word, rule) in schema.as_object().expect("a schema is an object") {
            match word.as_str() {
                "description" | "default" | "required" => {}
                "additionalProperties" if schema["properties"].is_null() => {
                    for (name, field) in value.as_object().into_iter().flatten() {
                        found.extend(self.judge(rule, field, &format!("{at}.{name}")));
                    }
                }
                // More is asked of objects with fields of their own, below.
                "additionalProperties" => {}
                "$ref" => {
                    let name = rule.as_str().and_then(|r| r.rsplit('/').next()).expect("a reference");
                    found.extend(self.errors(name, value).into_iter().map(|e| format!("{at}: {e}")));
                }
                "type" if !is_type(rule, value) => found.push(format!("{at}: {value} is no {rule}")),
                "type" => {}
                "const" if value != rule => found.push(format!("{at}: {value} is not {rule}")),
                "const" => {}
                "enum" if !rule.as_array().expect("values").contains(value) => {
                    found.push(format!("{at}: {value} is none of {rule}"));
                }
                "enum" => {}
                "minimum" | "maximum" | "minItems" | "maxItems" | "uniqueItems" | "maxLength" | "pattern"
                | "format"
                    if !is_within(word, rule, value) =>
                {
                    found.push(format!("{at}: {value} is outside {word} {rule}"));
                }
                "minimum" | "maximum" | "minItems" | "maxItems" | "uniqueItems" | "maxLength" | "pattern"
                | "format" => {}
                "items" => {
                    for item in value.as_array().into_iter().flatten() {
                        found.extend(self.judge(rule, item, &format!("{at}[]")));
                    }
                }
                "properties" => found.extend(self.fields(schema, rule, value, at)),
                "oneOf" | "anyOf" => found.extend(self.choose(word, rule, value, at)),
                other => panic!("{at}: nobody checks \"{other}\""),
            }
        }
        found
    }

    fn choose(&self, word: &str, rule: &Value, value: &Value, at: &str) -> Option<String> {
        let choices = rule.as_array().expect("choices");
        let judged: Vec<_> = choices.iter().map(|choice| self.judge(choice, value, at)).collect();
        let fitting = judged.iter().filter(|found| found.is_empty()).count();
        let fits = if word == "oneOf" { fitting == 1 } else { fitting > 0 };
        (!fits).then(|| format!("{at}: {fitting} of {word} fit: {judged:?}"))
    }

    /// Of our own answers more is asked than of JSON: nothing that is not described.
    fn fields(&self, schema: &Value, properties: &Value, value: &Value, at: &str) -> Vec<String> {
        let Some(fields) = value.as_object() else { return Vec::new() };
        let mut found = Vec::new();
        for (name, field) in fields {
            match properties.get(name) {
                Some(rule) => found.extend(self.judge(rule, field, &format!("{at}.{name}"))),
                None => found.push(format!("{at}.{name} is not described")),
            }
        }
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        found.extend(required.filter(|n| !fields.contains_key(*n)).map(|n| format!("{at}.{n} is missing")));
        found
    }
}

/// Of what a word says nothing of, everything is within it.
fn is_within(word: &str, rule: &Value, value: &Value) -> bool {
    let number = |value: &Value| value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    let limit = || number(rule).expect("a whole number");
    let items = |holds: &dyn Fn(&Vec<Value>) -> bool| value.as_array().is_none_or(holds);
    let text = |holds: &dyn Fn(&str) -> bool| value.as_str().is_none_or(holds);
    match word {
        "minimum" => number(value).is_none_or(|v| v >= limit()),
        "maximum" => number(value).is_none_or(|v| v <= limit()),
        "minItems" => items(&|items| items.len() as i128 >= limit()),
        "maxItems" => items(&|items| items.len() as i128 <= limit()),
        "uniqueItems" => {
            items(&|items| items.iter().enumerate().all(|(at, item)| !items[..at].contains(item)))
        }
        "maxLength" => text(&|text| text.chars().count() as i128 <= limit()),
        "pattern" => text(&|text| matches(rule.as_str().expect("a pattern"), text)),
        "format" => match rule.as_str().expect("a format") {
            "uuid" => text(&|text| uuid::Uuid::parse_str(text).is_ok()),
            "date-time" => text(&|text| text.contains('T') && text.ends_with('Z')),
            // The number's bounds are written down where they are asked for.
            "uint" | "uint16" | "uint32" | "uint64" | "int32" | "int64" | "double" => true,
            other => panic!("nobody checks the format {other}"),
        },
        other => panic!("nobody checks \"{other}\""),
    }
}

/// The patterns that there are, read by hand.
fn matches(pattern: &str, text: &str) -> bool {
    let step = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match pattern {
        "^[A-Za-z0-9_-][A-Za-z0-9._-]*$" => {
            !text.is_empty() && !text.starts_with('.') && text.chars().all(step)
        }
        "^0?[0-7]{3}$" => {
            let digits = text.strip_prefix('0').filter(|rest| rest.len() == 3).unwrap_or(text);
            digits.len() == 3 && digits.chars().all(|c| c.is_digit(8))
        }
        r"^/([^\u0000]{0,105}[^/\u0000])$" => {
            (2..=107).contains(&text.chars().count()) && text.starts_with('/') && !text.ends_with('/')
        }
        r"^(127(\.(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3}|\[::1\]):([0-9]{1,4}|[1-5][0-9]{4}|6([0-4][0-9]{3}|5([0-4][0-9]{2}|5([0-2][0-9]|3[0-5]))))$" => {
            text.parse::<std::net::SocketAddr>().is_ok_and(|address| address.ip().is_loopback())
        }
        other => panic!("nobody reads the pattern {other}"),
    }
}

fn is_type(rule: &Value, value: &Value) -> bool {
    if let Some(several) = rule.as_array() {
        return several.iter().any(|one| is_type(one, value));
    }
    match rule.as_str().expect("a type") {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("no such type: {other}"),
    }
}
