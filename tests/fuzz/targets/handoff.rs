//! What a process leaves to the next.

use vmferry::agent::reread_handoff;

/// What was read is written, and read and written again as the same.
pub(crate) fn left(data: &[u8]) {
    let Ok(written) = reread_handoff(data, "alpha") else { return };
    assert!(reread_handoff(&written, "bravo").is_err(), "it is alpha's");
    let again = reread_handoff(&written, "alpha").expect("what we leave is read");
    assert!(again == written, "what we leave is left again as it was");
}
