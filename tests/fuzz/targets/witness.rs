//! What an etcd answers, or whatever is taken for one.

use vmferry::migrate::handover::Word;
use vmferry::witness::{ConnectionError, Told, told_of_change, told_of_key};

/// Longest text of a refusal that is shown.
const SHOWN_MAX: usize = 1000;

fn judge(told: Result<Told, ConnectionError>) -> Option<Told> {
    match told {
        Ok(told) => {
            let is_digit = |c: char| c.is_ascii_digit();
            assert!((1..=20).contains(&told.cluster.len()) && told.cluster.chars().all(is_digit), "{told:?}");
            Some(told)
        }
        Err(e) => {
            let text = e.to_string();
            assert!(text.chars().count() < SHOWN_MAX && !text.chars().any(char::is_control), "{text}");
            None
        }
    }
}

/// An answer to either question: none is taken for a change that was not made, nor a word for another.
pub(crate) fn answer(data: &[u8]) {
    if let Some(told) = judge(told_of_key(data)) {
        assert!(!told.is_changed, "{told:?}");
        let word = told.kept.as_ref().and_then(|kept| Word::named(&kept.value));
        assert!(word.is_none_or(|word| told.kept.is_some_and(|kept| kept.value == word.name())));
    }
    if let Some(told) = judge(told_of_change(data, "offered"))
        && told.is_changed
    {
        assert_eq!(
            told.kept.map(|kept| (kept.value, kept.mod_revision)),
            Some(("offered".into(), told.revision))
        );
    }
}
