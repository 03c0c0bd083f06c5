//! What both roles, at work or settled, do for the hand-over's interpreter.

mod question;
mod records;
mod remote;

pub(crate) use question::{ASK_AGAIN, Decided, Leaving, Question};
pub(crate) use records::{decision, report, write};
pub(crate) use remote::{ANSWER_DEADLINE, abort_remote, confirm_remote, hook};
