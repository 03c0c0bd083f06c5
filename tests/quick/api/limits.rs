//! What the description says of requests is what is read: at each limit and one beyond it, with each field left out,
//! null, of another type, and with fields that nobody knows.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use vmferry::api::{
    CheckRequest, DrainRequest, EndReplicaRequest, ForceRequest, ForwardRequest, LibvirtRequest,
    MigrateRequest, PeerLimitRequest, PingRequest, QemuCommandRequest, ShareRequest, Told,
};

use super::schema::Description;

/// A request with all of its fields, and how the agent reads it.
struct Request {
    name: &'static str,
    whole: Value,
    is_read: fn(Value) -> bool,
}

fn request<T: DeserializeOwned>(name: &'static str, whole: Value) -> Request {
    Request { name, whole, is_read: |value| serde_json::from_value::<T>(value).is_ok() }
}

fn requests() -> Vec<Request> {
    let options = |disks: Value| {
        json!({
            "keep_source": true, "auto_converge": true, "downtime_limit_ms": 300, "never_slow_writes": true, "retry": 1,
            "compress": true, "limit_bytes_per_s": 1_000_000, "weight": 100, "disks": disks, "disks_at_once": 2,
            "incremental": {"only": ["vda"]}, "verify": 10, "compare_read_only": true, "replicate": false,
            "in_band": "blk", "never_in_band": false, "strict": true, "accept": ["cpu"],
        })
    };
    let only = options(json!({"only": ["vda"]}));
    let expected = json!({"ram": 1, "nbd": 2});
    vec![
        request::<MigrateRequest>("MigrateRequest", json!({"vm": "web1", "to": "bravo", "options": only})),
        request::<CheckRequest>(
            "CheckRequest",
            json!({
                "vm": "web1", "to": "bravo", "strict": true, "accept": ["cpu"], "disks": {"except": ["vda"]},
                "verify": true, "compare_read_only": true, "incremental": "all", "in_band": "inc",
                "never_in_band": false,
            }),
        ),
        request::<DrainRequest>(
            "DrainRequest",
            json!({
                "to": ["bravo"], "vms": ["web*"], "except": ["web2"], "at_once": 2, "options": options(json!("all")),
            }),
        ),
        request::<ForwardRequest>(
            "ForwardRequest",
            json!({
                "listen": "/run/near", "to": "bravo", "target": "vnc", "weight": 300, "limit_bytes_per_s": 65_536,
                "urgent": true, "owner": "nobody", "group": "nogroup", "mode": "0660",
            }),
        ),
        request::<ShareRequest>("ShareRequest", json!({"limit_bytes_per_s": 65_536, "weight": 300})),
        request::<PeerLimitRequest>("PeerLimitRequest", json!({"limit_bytes_per_s": 65_536})),
        request::<PingRequest>("PingRequest", json!({"bytes": 1})),
        request::<QemuCommandRequest>(
            "QemuCommandRequest",
            json!({"program": "/usr/bin/qemu", "images": "/vms/{vm}", "paths": [{"from": "/a", "to": "/b"}]}),
        ),
        request::<ForceRequest>("ForceRequest", json!({"force": "here", "until": 1})),
        request::<EndReplicaRequest>(
            "EndReplicaRequest",
            json!({"vm": "web1", "to": "bravo", "images": true}),
        ),
        request::<LibvirtRequest>(
            "LibvirtRequest",
            json!({
                "domain": "web1", "renamed": "web2", "to": "bravo", "rpc": true, "hold_s": 60, "expected": expected,
            }),
        ),
        request::<Told>("LibvirtTold", json!({"moved": expected})),
        request::<Told>("LibvirtTold", json!("failed")),
    ]
}

/// Everything that the description has behind one of these words.
fn all_of(words: &[&str], value: &Value, found: &mut Vec<Value>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if words.contains(&name.as_str()) && !field.is_object() {
                    found.extend(field.as_array().cloned().unwrap_or_else(|| vec![field.clone()]));
                }
                all_of(words, field, found);
            }
        }
        Value::Array(parts) => parts.iter().for_each(|part| all_of(words, part, found)),
        _ => {}
    }
}

/// What may be put in the place of anything: values of all types, and those at and beyond each limit that there is.
fn values(description: &Value) -> Vec<Value> {
    let found = |words: &[&str]| {
        let mut found = Vec::new();
        all_of(words, description, &mut found);
        found
    };
    let mut values =
        vec![json!(null), json!(true), json!(1.5), json!("x"), json!([]), json!({}), json!([1]), json!("")];
    for limit in found(&["minimum", "maximum"]) {
        let limit = limit.as_i64().map(i128::from).or_else(|| limit.as_u64().map(i128::from)).unwrap();
        for near in [limit - 1, limit, limit + 1] {
            let whole =
                u64::try_from(near).map(Value::from).or_else(|_| i64::try_from(near).map(Value::from));
            values.push(whole.unwrap_or_else(|_| json!(near as f64)));
        }
    }
    for length in found(&["maxLength", "maxItems"]) {
        let length = usize::try_from(length.as_u64().unwrap()).unwrap();
        for near in [length, length + 1] {
            values.push("a".repeat(near).into());
            values.push(format!("/{}", "a".repeat(near - 1)).into());
            values.push((0..near).map(|number| json!(format!("vm{number}"))).collect());
        }
    }
    values.push(json!(["twice", "twice"]));
    values.extend(found(&["enum", "const"]));
    let texts = [
        "0660",
        "660",
        "1660",
        "0688",
        "66",
        "06600",
        "/",
        "/run/",
        "run",
        "/run/a b",
        "127.0.0.1:5900",
        "127.0.0.1",
        "192.0.2.1:1",
        "[::1]:5900",
        "[::1]",
        "a.b-c_d",
        ".a",
        "a/b",
        "ä",
    ];
    values.extend(texts.map(Value::from));
    let distinct: BTreeSet<String> = values.iter().map(ToString::to_string).collect();
    distinct.iter().map(|text| serde_json::from_str(text).unwrap()).collect()
}

/// The whole with something else in each place, with a field more in each object, and with one less. But for an array in
/// the place of an object: serde reads that as the object's fields in their order, which nobody promises.
fn mutants(whole: &Value, values: &[Value]) -> Vec<Value> {
    let others = values.iter().filter(|other| !(whole.is_object() && other.is_array()));
    let mut all: Vec<Value> = others.cloned().collect();
    match whole {
        Value::Object(fields) => {
            let with = |change: &dyn Fn(&mut Map<String, Value>)| {
                let mut changed = fields.clone();
                change(&mut changed);
                Value::from(changed)
            };
            all.push(with(&|fields| drop(fields.insert("more".into(), json!(1)))));
            for (name, field) in fields {
                all.push(with(&|fields| drop(fields.remove(name))));
                let inside = mutants(field, values).into_iter();
                all.extend(
                    inside.map(|other| with(&|fields| drop(fields.insert(name.clone(), other.clone())))),
                );
            }
        }
        Value::Array(parts) => all.extend(mutants(&parts[0], values).into_iter().map(|other| json!([other]))),
        _ => {}
    }
    all
}

#[test]
fn what_is_described_of_a_request_is_what_is_read() {
    let description = Description::load();
    let values = values(&description.whole());
    let (mut read, mut refused) = (0, 0);
    for Request { name, whole, is_read } in requests() {
        assert!(is_read(whole.clone()), "{name}: {whole}");
        for mutant in mutants(&whole, &values) {
            let found = description.errors(name, &mutant);
            let is_read = is_read(mutant.clone());
            assert_eq!(
                is_read,
                found.is_empty(),
                "{name}, is read: {is_read}, described: {found:?}: {mutant}"
            );
            *if is_read { &mut read } else { &mut refused } += 1;
        }
    }
    assert!(read > 1000 && refused > 10_000, "{read} were read and {refused} refused");
}

/// All objects that a request may hold say that they have no other fields, and all bodies are tried above.
#[test]
fn no_request_has_fields_that_are_not_described() {
    let whole = Description::load().whole();
    let mut bodies = BTreeSet::new();
    for operation in
        whole["paths"].as_object().unwrap().values().flat_map(|m| m.as_object().unwrap().values())
    {
        let mut names = Vec::new();
        all_of(&["$ref"], &operation["requestBody"], &mut names);
        bodies.extend(names.iter().map(|name| name.as_str().unwrap().rsplit('/').next().unwrap().to_owned()));
    }
    let tried: BTreeSet<String> = requests().iter().map(|request| request.name.to_owned()).collect();
    assert_eq!(bodies, tried);
    let (mut left, mut seen) = (Vec::from_iter(bodies), BTreeSet::new());
    while let Some(name) = left.pop() {
        let schema = &whole["components"]["schemas"][&name];
        assert!(
            schema["properties"].is_null() || schema["additionalProperties"] == false,
            "{name}: {schema}"
        );
        let mut names = Vec::new();
        all_of(&["$ref"], schema, &mut names);
        let names = names.iter().map(|name| name.as_str().unwrap().rsplit('/').next().unwrap().to_owned());
        left.extend(names.filter(|name| seen.insert(name.clone())));
    }
    assert!(seen.contains("Options") && seen.contains("OtherPath"), "{seen:?}");
}
