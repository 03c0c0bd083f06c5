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

    pub(crate) fn paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = self.0["paths"].as_object().expect("paths").keys().cloned().collect();
        paths.sort();
        paths
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
                "description" | "default" | "required" | "additionalProperties" => {}
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
                "minimum" if value.as_i64().is_some_and(|v| v < rule.as_i64().expect("a number")) => {
                    found.push(format!("{at}: {value} is below {rule}"));
                }
                "maximum" if value.as_i64().is_some_and(|v| v > rule.as_i64().expect("a number")) => {
                    found.push(format!("{at}: {value} is above {rule}"));
                }
                "minimum" | "maximum" => {}
                "format" => {
                    assert_eq!(rule, "uuid");
                    if value.as_str().is_none_or(|v| uuid::Uuid::parse_str(v).is_err()) {
                        found.push(format!("{at}: {value} is no UUID"));
                    }
                }
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
