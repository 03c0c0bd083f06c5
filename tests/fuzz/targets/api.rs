//! Requests to the local API, by a member of its group.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmferry::api::{
    CheckRequest, DrainRequest, EndReplicaRequest, ForceRequest, ForwardRequest, LibvirtRequest,
    MigrateRequest, PeerLimitRequest, PingRequest, QemuCommandRequest, RecoverQuery, ShareRequest, Told,
};
use vmferry::json;

use super::shape::same_shape;

/// What was understood means the same when it is said again, and nothing in a request was passed over.
pub(crate) fn requests(data: &[u8]) {
    understood::<CheckRequest>(data);
    understood::<DrainRequest>(data);
    understood::<EndReplicaRequest>(data);
    understood::<ForceRequest>(data);
    understood::<ForwardRequest>(data);
    understood::<LibvirtRequest>(data);
    understood::<MigrateRequest>(data);
    understood::<PeerLimitRequest>(data);
    understood::<PingRequest>(data);
    understood::<QemuCommandRequest>(data);
    understood::<RecoverQuery>(data);
    understood::<ShareRequest>(data);
    understood::<Told>(data);
}

fn understood<T: Serialize + DeserializeOwned>(json: &[u8]) {
    let Ok(request) = json::read::<T>(json) else { return };
    let said = serde_json::to_value(&request).expect("a request can be written");
    let again: T = json::read(said.to_string().as_bytes()).expect("what we ask is understood");
    assert_eq!(serde_json::to_value(&again).expect("a request can be written"), said);
    let given = serde_json::from_slice(json).expect("what was understood is JSON");
    same_shape(&given, &said);
    if let Value::Object(fields) = given {
        let known = |name: &String| said.get(name).is_some() || fields[name].is_null() || !is_said(&said);
        assert!(fields.keys().all(known), "a field without a meaning: {fields:?} is {said}");
    }
}

/// Whether it is an object of which nothing is left out.
fn is_said(said: &Value) -> bool {
    said.as_object().is_some_and(|fields| !fields.is_empty())
}
