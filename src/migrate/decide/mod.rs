//! What both roles, at work or settled, do for the hand-over's interpreter.

mod question;
mod records;
mod remote;
mod witness;

pub(crate) use question::{ASK_AGAIN, Decided, Leaving, Question};
pub(crate) use records::{after_resume, decision, is_being_given_up, report, runs_twice, write};
pub(crate) use remote::{ANSWER_DEADLINE, abort_remote, ask_peer, confirm_remote, hook};
pub(crate) use witness::{
    Afterwards, ORDERED_WITHIN, afterwards, at_witness, is_confirmed, is_never_offered, witness_trouble,
};
