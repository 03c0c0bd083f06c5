//! A request that is sent again is carried out once: its `Idempotency-Key` is the migration's id, in another form, so
//! that journals remember it over restarts. Knows nothing of how a migration begins.

use aws_lc_rs::digest::{Context, SHA256};
use axum::http::{HeaderMap, StatusCode};
use uuid::{Builder, Uuid};

use super::refusal::Refusal;
use crate::migrate::progress::Progress;

/// The header, in the words of the IETF's draft for it.
const KEY: &str = "idempotency-key";
/// The longest key.
const KEY_BYTES_MAX: usize = 255;

/// The id of the migration that is asked for: of the caller's key, where it sends one.
pub(super) fn migration(headers: &HeaderMap, uid: Option<u32>) -> Result<Uuid, Refusal> {
    let mut keys = headers.get_all(KEY).iter();
    let Some(key) = keys.next() else { return Ok(Uuid::new_v4()) };
    let is_good = (1..=KEY_BYTES_MAX).contains(&key.len()) && key.as_bytes().iter().all(u8::is_ascii_graphic);
    if !is_good || keys.next().is_some() {
        let error = format!("`Idempotency-Key` is not one of 1 to {KEY_BYTES_MAX} letters, digits and signs");
        let refusal =
            Refusal::new(StatusCode::BAD_REQUEST, error, "send a UUID, a new one for each migration");
        return Err(refusal.in_field(Some("Idempotency-Key".into())));
    }
    Ok(id_of(key.as_bytes(), uid))
}

/// Of another user's key it is another one.
fn id_of(key: &[u8], uid: Option<u32>) -> Uuid {
    let mut hash = Context::new(&SHA256);
    hash.update(b"vmferry migration by key\0");
    hash.update(&uid.map_or(u64::MAX, u64::from).to_be_bytes());
    hash.update(key);
    let hash = hash.finish();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_ref()[..16]);
    Builder::from_custom_bytes(bytes).into_uuid()
}

/// The key has stood for something else.
pub(super) fn another(before: &Progress) -> Refusal {
    let error = format!(
        "this `Idempotency-Key` was that of migration {} of VM {} to {}",
        before.id, before.vm, before.peer
    );
    Refusal::new(StatusCode::CONFLICT, error, "send a new key for each migration")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_an_id_of_its_user_and_none_is_a_new_one() {
        let of = |key: &str, uid| {
            let mut headers = HeaderMap::new();
            headers.insert(KEY, key.parse().unwrap_or_else(|_| panic!("{key}")));
            migration(&headers, uid).ok()
        };
        assert!(of("a", Some(1)).is_some());
        assert_eq!(of("a", Some(1)), of("a", Some(1)));
        assert_ne!(of("a", Some(1)), of("a", Some(2)));
        assert_ne!(of("a", Some(1)), of("b", Some(1)));
        assert_ne!(of("a", None), of("a", Some(u32::MAX)));
        for bad in ["", "a b", &"x".repeat(KEY_BYTES_MAX + 1)] {
            assert_eq!(of(bad, Some(1)), None, "{bad}");
        }
        let none = || migration(&HeaderMap::new(), Some(1)).ok();
        assert_ne!(none(), none());
    }
}
