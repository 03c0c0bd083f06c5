//! The API's description as a value: schemas from the types, and what is said of each operation. Knows no operation.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use vmferry::api::{ErrorBody, PROBLEM_JSON};

/// A type, once there is somebody to describe it.
type Shape = fn(&mut SchemaGenerator) -> Schema;

fn shape<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// A status, what it means, and the body's content type and shape, where there is a body.
type Answer = (u16, &'static str, Option<(&'static str, Shape)>);

/// What can be asked.
pub(super) struct Operation {
    path: &'static str,
    method: &'static str,
    role: &'static str,
    id: &'static str,
    summary: &'static str,
    parameters: Vec<Value>,
    query: Option<Shape>,
    body: Option<Shape>,
    answers: Vec<Answer>,
}

impl Operation {
    fn new(method: &'static str, role: &'static str, path: &'static str, words: [&'static str; 2]) -> Self {
        let [id, summary] = words;
        let (parameters, answers) = (Vec::new(), Vec::new());
        Self { path, method, role, id, summary, parameters, query: None, body: None, answers }
    }

    /// It only looks.
    pub(super) fn view(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new("get", "view", path, [id, summary])
    }

    pub(super) fn operate(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new("post", "operate", path, [id, summary])
    }

    pub(super) fn admin(path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self::new("post", "admin", path, [id, summary])
    }

    pub(super) fn header(mut self, name: &str, pattern: &str, description: &str) -> Self {
        let schema = json!({"type": "string", "pattern": pattern});
        self.parameters
            .push(json!({"name": name, "in": "header", "description": description, "schema": schema}));
        self
    }

    /// What may be behind a `?`.
    pub(super) fn asks<T: JsonSchema>(mut self) -> Self {
        self.query = Some(shape::<T>);
        self
    }

    pub(super) fn takes<T: JsonSchema>(mut self) -> Self {
        self.body = Some(shape::<T>);
        self
    }

    pub(super) fn gives<T: JsonSchema>(mut self, status: u16, description: &'static str) -> Self {
        self.answers.push((status, description, Some(("application/json", shape::<T>))));
        self
    }

    /// One on each line, the last one with its end.
    pub(super) fn streams<T: JsonSchema>(mut self, description: &'static str) -> Self {
        self.answers.push((200, description, Some(("application/x-ndjson", shape::<T>))));
        self
    }

    /// An answer without a body.
    pub(super) fn accepts(mut self, description: &'static str) -> Self {
        self.answers.push((202, description, None));
        self
    }

    pub(super) fn refuses(mut self, status: u16, description: &'static str) -> Self {
        self.answers.push((status, description, Some((PROBLEM_JSON, shape::<ErrorBody>))));
        self
    }

    /// What follows from what it takes, where nothing more is said of it.
    fn with_what_follows(mut self) -> Self {
        let by_id = self.path.contains("{id}");
        let wrong = match (by_id, self.body.is_some(), self.query.is_some()) {
            (true, true, _) => {
                Some("No UUID, not JSON of this shape, or a value outside its range: field says which.")
            }
            (true, false, _) => Some("No UUID."),
            (false, true, _) => {
                Some("Not JSON of this shape, or a value outside its range: field says which.")
            }
            (false, false, true) => Some("Another query."),
            (false, false, false) => None,
        };
        let of_body: &[(u16, &str)] = match self.body {
            Some(_) => &[
                (408, "The body did not come in time."),
                (413, "The body is too long."),
                (415, "Not said to be JSON."),
            ],
            None => &[],
        };
        let all = wrong.map(|wrong| (400, wrong)).into_iter().chain(of_body.iter().copied());
        for (status, description) in all.chain([(403, "The caller has not the role that this takes.")]) {
            if self.answers.iter().all(|(said, ..)| *said != status) {
                self = self.refuses(status, description);
            }
        }
        self.answers.sort_by_key(|(status, ..)| *status);
        self
    }
}

/// The schemas by name, of requests as they are read and of answers as they are written.
struct Schemas {
    requests: SchemaGenerator,
    answers: SchemaGenerator,
}

/// The description of these operations.
pub(super) fn document(info: &Value, servers: &Value, operations: Vec<Operation>) -> Value {
    let settings =
        || SchemaSettings::draft2020_12().with(|s| s.definitions_path = "/components/schemas".into());
    let mut schemas = Schemas {
        requests: settings().for_deserialize().into_generator(),
        answers: settings().for_serialize().into_generator(),
    };
    let mut paths = Map::new();
    for operation in operations {
        let (path, method) = (operation.path, operation.method);
        let described = describe(operation.with_what_follows(), &mut schemas);
        let methods = paths.entry(path).or_insert_with(|| json!({}));
        let before = methods.as_object_mut().unwrap().insert(method.to_owned(), described);
        assert_eq!(before, None, "{method} {path} is there twice");
    }
    let mut components = schemas.requests.take_definitions(true);
    components.values_mut().for_each(bound);
    for (name, schema) in schemas.answers.take_definitions(true) {
        let of_requests = components.insert(name.clone(), schema.clone());
        assert!(
            of_requests.is_none_or(|r| r == schema),
            "{name} is one thing in requests and another in answers"
        );
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": info,
        "servers": servers,
        "paths": paths,
        "components": {"schemas": components},
    });
    plain(&mut document);
    document
}

fn describe(operation: Operation, schemas: &mut Schemas) -> Value {
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "x-role": operation.role,
    });
    let in_path = operation.path.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let mut parameters: Vec<Value> = in_path.map(|name| path_parameter(operation.path, name)).collect();
    if let Some(query) = operation.query {
        parameters.extend(query_parameters(&query(&mut schemas.requests), &mut schemas.requests));
    }
    parameters.extend(operation.parameters);
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    if let Some(body) = operation.body {
        let schema = body(&mut schemas.requests);
        described["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": schema}}});
    }
    for (status, description, content) in operation.answers {
        let mut answer = json!({"description": description});
        if let Some((kind, shape)) = content {
            answer["content"] = json!({kind: {"schema": shape(&mut schemas.answers)}});
        }
        described["responses"][status.to_string()] = answer;
    }
    described
}

fn path_parameter(path: &str, name: &str) -> Value {
    let id = json!({"type": "string", "format": "uuid"});
    let text = json!({"type": "string"});
    let (description, schema) = match name {
        "id" if path.starts_with("/v1/forwards/") => ("The forwarding.", id),
        "id" => ("The migration.", id),
        "name" => ("The peer, [peer.NAME] here.", text),
        "vm" => ("The VM, which runs here.", text),
        other => panic!("{path}: what is {other}?"),
    };
    json!({"name": name, "in": "path", "required": true, "description": description, "schema": schema})
}

/// The fields of an object, each a parameter that may be left out.
fn query_parameters(schema: &Schema, generator: &mut SchemaGenerator) -> Vec<Value> {
    let name =
        schema.as_value()["$ref"].as_str().and_then(|path| path.rsplit('/').next()).unwrap().to_owned();
    let object = generator.definitions_mut().remove(&name).unwrap();
    let fields = object["properties"].as_object().unwrap().clone();
    let parameter = |(name, mut schema): (String, Value)| {
        let description = schema.as_object_mut().unwrap().remove("description");
        if let Some(kinds) = schema["type"].as_array() {
            schema["type"] = kinds[0].clone();
        }
        schema.as_object_mut().unwrap().remove("default");
        json!({"name": name, "in": "query", "description": description, "schema": schema})
    };
    fields.into_iter().map(parameter).collect()
}

/// Says the bounds of a whole number that its format implies.
fn bound(schema: &mut Value) {
    match schema {
        Value::Object(words) => {
            let (least, most) = match words.get("format").and_then(Value::as_str) {
                Some("uint64") => (json!(u64::MIN), json!(u64::MAX)),
                Some("int64") => (json!(i64::MIN), json!(i64::MAX)),
                _ => return words.values_mut().for_each(bound),
            };
            words.entry("minimum").or_insert(least);
            words.entry("maximum").or_insert(most);
        }
        Value::Array(parts) => parts.iter_mut().for_each(bound),
        _ => {}
    }
}

/// Has texts speak of JSON, and lists the values of an enumeration as one.
fn plain(value: &mut Value) {
    match value {
        Value::Object(words) => {
            words.values_mut().for_each(plain);
            if let Some(Value::String(text)) = words.get_mut("description") {
                *text = in_json(text);
            }
            if let Some(listed) = words.get("oneOf").and_then(listed) {
                words.remove("oneOf");
                let (values, meanings) = listed;
                let text =
                    words.get("description").and_then(Value::as_str).into_iter().chain([meanings.trim_end()]);
                let text = text.collect::<Vec<_>>().join(" ");
                words.extend([
                    ("type".to_owned(), json!("string")),
                    ("enum".to_owned(), values.into()),
                    ("description".to_owned(), text.into()),
                ]);
            }
        }
        Value::Array(parts) => parts.iter_mut().for_each(plain),
        _ => {}
    }
}

/// The values and meanings of an enumeration that is written as a choice between words.
fn listed(choices: &Value) -> Option<(Vec<Value>, String)> {
    let (mut values, mut meanings) = (Vec::new(), String::new());
    for choice in choices.as_array()? {
        if choice["type"] != "string" {
            return None;
        }
        let one = choice.get("const").map(|value| vec![value.clone()]);
        let some = one.or_else(|| choice["enum"].as_array().cloned())?;
        if let (Some(meaning), [Value::String(word)]) = (choice["description"].as_str(), &some[..]) {
            let meaning = meaning.trim_end_matches('.');
            meanings += &format!("`{word}`: {meaning}. ");
        }
        values.extend(some);
    }
    Some((values, meanings))
}

/// What is none in Rust is null in JSON, and a link to a type is its name.
fn in_json(text: &str) -> String {
    let words = text.split_whitespace().map(|word| match word {
        "None" => "Null",
        word => word,
    });
    words.collect::<Vec<_>>().join(" ").replace("; none ", "; null ").replace("[`", "`").replace("`]", "`")
}
