//! JSON that derived code would take and nobody means: arrays for objects, names twice, numbers in other spellings, more
//! than one document. What each of it means to a real agent is written down here, for requests to the local API and for
//! peers' messages.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};
use uuid::Uuid;
use vmferry::migrate::message::{Asked, EndReplica, Piece, Pieces, Request};
use vmferry::migrate::progress::DiskProgress;
use vmferry::net::message;
use vmferry::qemu::Machine;

use super::types::{ask, bodies, whole_offer};
use super::victim::{Attacker, Victim, open_control};
use crate::api::schema::Description;
use crate::rig::soon;

/// JSON with the fields of its objects in the order in which they are written.
#[derive(Debug, Clone)]
enum Ordered {
    Fields(Vec<(String, Self)>),
    Items(Vec<Self>),
    Simple(Value),
}

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Ordered;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered::Simple(Value::Null))
            }
            fn visit_bool<E>(self, is: bool) -> Result<Ordered, E> {
                Ok(Ordered::Simple(is.into()))
            }
            fn visit_u64<E>(self, number: u64) -> Result<Ordered, E> {
                Ok(Ordered::Simple(number.into()))
            }
            fn visit_f64<E>(self, number: f64) -> Result<Ordered, E> {
                Ok(Ordered::Simple(number.into()))
            }
            fn visit_str<E>(self, text: &str) -> Result<Ordered, E> {
                Ok(Ordered::Simple(text.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Ordered, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element()? {
                    all.push(item);
                }
                Ok(Ordered::Items(all))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Ordered, A::Error> {
                let mut all = Vec::new();
                while let Some(field) = fields.next_entry()? {
                    all.push(field);
                }
                Ok(Ordered::Fields(all))
            }
        }
        from.deserialize_any(Any)
    }
}

impl Ordered {
    fn value(&self) -> Value {
        match self {
            Self::Fields(fields) => {
                fields.iter().map(|(name, field)| (name.clone(), field.value())).collect()
            }
            Self::Items(items) => items.iter().map(Self::value).collect(),
            Self::Simple(value) => value.clone(),
        }
    }

    /// All documents that have an array of the fields in the place of one object, and where.
    fn with_an_array(&self) -> Vec<(String, Value)> {
        match self {
            Self::Simple(_) => Vec::new(),
            Self::Items(items) => {
                let inner = items.iter().enumerate().flat_map(|(n, item)| {
                    item.with_an_array().into_iter().map(move |(at, changed)| (n, at, changed))
                });
                let replaced = inner.map(|(n, at, changed)| {
                    let mut all: Vec<Value> = items.iter().map(Self::value).collect();
                    all[n] = changed;
                    (format!("/{n}{at}"), Value::Array(all))
                });
                replaced.collect()
            }
            Self::Fields(fields) => {
                let itself = fields.iter().map(|(_, field)| field.value()).collect();
                let inner = fields.iter().flat_map(|(name, field)| {
                    field.with_an_array().into_iter().map(move |(at, changed)| (name, at, changed))
                });
                let replaced = inner.map(|(name, at, changed)| {
                    let mut all = self.value();
                    all[name] = changed;
                    (format!("/{name}{at}"), all)
                });
                [vec![(String::new(), itself)], replaced.collect()].concat()
            }
        }
    }
}

fn ordered(text: &str) -> Ordered {
    serde_json::from_str(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_array_is_no_object_in_any_request_to_the_api() {
    let victim = Victim::start();
    // Each request has its own time.
    tokio::task::block_in_place(|| {
        let description = Description::load();
        let bodies = bodies(&victim);
        let described = description.whole();
        let with_body = described["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().values();
            methods.filter(|method| method.get("requestBody").is_some()).map(move |_| path.as_str())
        });
        let asked: Vec<&str> = bodies.iter().map(|(path, ..)| *path).collect();
        assert_eq!(asked, with_body.collect::<Vec<_>>(), "an operation is left out");
        for (described, path, good) in bodies {
            for (at, array) in ordered(&good).with_an_array() {
                let answer = ask(&victim, "POST", &path, array.to_string());
                assert_eq!(answer.0, 400, "{path} {array}: {answer:?}");
                assert_eq!(answer.1, "application/problem+json");
                description.accepts("post", described, &answer);
                let field = serde_json::from_str::<Value>(&answer.2).unwrap()["field"].clone();
                let named = at.trim_start_matches('/').split('/').next().unwrap_or_default();
                assert!(field.as_str().unwrap_or_default().starts_with(named), "{path} {at}: {answer:?}");
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_array_is_no_object_in_any_message_of_a_peer() {
    let victim = Victim::start();
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    let mut offer = whole_offer();
    offer.machine = Some(Machine::default());
    let pieces = Pieces { disk: "virtio0".into(), pieces: vec![Piece { at: 0, bytes: 1 }] };
    let disks = vec![DiskProgress::default()];
    let summary = vmferry::migrate::message::Summary { disks, ..Default::default() };
    let mut refused = 0;
    for request in [
        Request::Check(offer),
        Request::Hash(pieces),
        Request::ToRun { running: true },
        Request::Abort { reason: "x".into() },
        Request::EndReplica(EndReplica { vm: "web1".into(), images: false }),
    ] {
        let good =
            serde_json::to_string(&Asked { number: 1, request, summary: Some(summary.clone()) }).unwrap();
        for (at, bad) in ordered(&good).with_an_array() {
            let (mut sender, mut receiver) = message::split(open_control(&session).await.unwrap(), &session);
            sender.send(&bad).await.unwrap();
            let answer = soon(&at, receiver.recv::<Value>()).await.unwrap().unwrap().to_string();
            assert!(answer.contains("does not understand"), "{at} {bad}: {answer}");
            refused += 1;
        }
    }
    let counted = "vmferry_peer_refusals_total{peer=\"bravo\",reason=\"not_understood\"}";
    assert_eq!(victim.metric(counted), f64::from(refused));
    assert!(refused > 20, "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_documents_mean_one_thing_or_are_refused() {
    let victim = Victim::start();
    // What is understood is of a migration that there is not.
    const UNDERSTOOD: u16 = 404;
    let deep = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
    let table: Vec<(&[u8], u16)> = vec![
        (b"{}", UNDERSTOOD),
        (b"{\"weight\":300}", UNDERSTOOD),
        (b"\r\n\t {\"weight\" : 300 } \n", UNDERSTOOD),
        (b"{\"we\\u0069ght\":300}", UNDERSTOOD),
        // A field that may be left out may be null; here that says something of the limit.
        (b"{\"weight\":null,\"limit_bytes_per_s\":null}", UNDERSTOOD),
        // Numbers by their worth, as JSON Schema has it.
        (b"{\"weight\":300.0}", UNDERSTOOD),
        (b"{\"weight\":3e2}", UNDERSTOOD),
        (b"{\"weight\":3E+2,\"limit_bytes_per_s\":1e9}", UNDERSTOOD),
        (b"{\"weight\":300.5}", 400),
        (b"{\"weight\":-0}", 400),
        (b"{\"weight\":-1}", 400),
        (b"{\"weight\":18446744073709551616}", 400),
        (b"{\"weight\":1e400}", 400),
        (b"{\"weight\":1e-400}", 400),
        (b"{\"weight\":NaN}", 400),
        (b"{\"weight\":0300}", 400),
        (b"{\"weight\":+300}", 400),
        (b"{\"weight\":0x12c}", 400),
        (b"{\"weight\":\"300\"}", 400),
        (b"{\"weight\":[300]}", 400),
        (b"{\"weight\":true}", 400),
        // Names once, however they are spelt.
        (b"{\"weight\":300,\"weight\":300}", 400),
        (b"{\"weight\":300,\"we\\u0069ght\":301}", 400),
        (b"{\"Weight\":300}", 400),
        (b"{\"weight\\u0000\":300}", 400),
        // One document, of UTF-8.
        (b"", 400),
        (b"null", 400),
        (b"[null,300]", 400),
        (b"{\"weight\":300}{\"weight\":300}", 400),
        (b"{\"weight\":300}\0", 400),
        (b"{\"weight\":300},", 400),
        (b"{\"weight\":300,}", 400),
        (b"{'weight':300}", 400),
        (b"{\"weight\":300/**/}", 400),
        (b"\xef\xbb\xbf{\"weight\":300}", 400),
        (b"{\"wei\xff\":300}", 400),
        (b"{\"wei\\ud800\":300}", 400),
        (b"\xff\xfe{\0}\0", 400),
    ];
    tokio::task::block_in_place(|| {
        let description = Description::load();
        let described = "/v1/migrations/{id}/limit";
        let path = described.replace("{id}", &Uuid::nil().to_string());
        let depths = [100, 1_000, 30_000].map(deep);
        let all = table.into_iter().chain(depths.iter().map(|deep| (&deep[..], 400)));
        for (body, status) in all {
            let shown = String::from_utf8_lossy(&body[..body.len().min(60)]);
            let answer = ask(&victim, "POST", &path, body);
            assert_eq!(answer.0, status, "{shown}: {answer:?}");
            description.accepts("post", described, &answer);
        }
        // A field that is not described as null may be left out, and is not null.
        let check = json!({"vm": "web1", "to": "bravo", "strict": null});
        let answer = ask(&victim, "POST", "/v1/check", check.to_string());
        assert!(answer.0 == 400 && answer.2.contains("\"field\":\"strict\""), "{answer:?}");
        // A variant without a value is its name.
        let check = json!({"vm": "web1", "to": "bravo", "disks": {"all": null}});
        let answer = ask(&victim, "POST", "/v1/check", check.to_string());
        assert!(answer.0 == 400 && answer.2.contains("\"field\":\"disks"), "{answer:?}");
    });
}
