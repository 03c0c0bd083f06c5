//! Metrics of the witness. Where there is none, there is no value of them.

use prometheus::{Error, IntCounterVec, IntGaugeVec};

use super::register::Register;
use crate::migrate::WitnessFigures;

/// How often the witness was asked, and whether it answers.
#[derive(Debug)]
pub struct WitnessMetrics {
    requests: IntCounterVec,
    answers: IntGaugeVec,
}

impl WitnessMetrics {
    pub(super) fn new(register: &Register) -> Result<Self, Error> {
        Ok(Self {
            requests: register.counter(
                "witness_requests_total",
                "Questions to the witness, and looks at whether it is there; an answer that was not believed is none. None without [witness].",
                &["result"],
            )?,
            answers: register.gauge(
                "witness_up",
                "1 while the witness answers, 0 if it did not when it was asked last: with each migration, and every minute.",
                &[],
            )?,
        })
    }

    /// As it is now; `None` where there is no witness.
    pub fn set(&self, figures: Option<WitnessFigures>) {
        let Some(WitnessFigures { answered, unanswered, answers }) = figures else { return };
        for (result, now) in [("answered", answered), ("unanswered", unanswered)] {
            let counter = self.requests.with_label_values(&[result]);
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        if let Some(answers) = answers {
            self.answers.with_label_values::<&str>(&[]).set(i64::from(answers));
        }
    }
}
