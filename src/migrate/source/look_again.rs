//! What becomes of a phase that has lost its view of QEMU for a while.

use super::Source;
use super::failure::Failure;
use crate::migrate::model::phase::Phase;

/// So often a phase may be begun again because the view of QEMU was lost.
const LOOKS_MAX: u32 = 100;

impl Source {
    /// A phase in which the view of QEMU was lost for a while is begun again: it looks at what is
    /// there. Any other failure is one.
    pub(crate) fn look_again(&mut self, failure: Failure) -> Result<(), Failure> {
        // What these two ask of QEMU may be asked again; of what the others make, half may be there.
        let repeats = matches!(self.phase, Phase::Switchover | Phase::Device);
        let may_repeat = matches!(failure, Failure::Missed) || (repeats && failure.is_interrupted());
        if !may_repeat {
            return Err(failure);
        }
        self.looks += 1;
        if self.looks > LOOKS_MAX {
            return Err(Failure::MonitorUnsteady(LOOKS_MAX));
        }
        tracing::info!(phase = self.phase.name(), "QEMU is asked what happened meanwhile");
        self.missed_events = true;
        Ok(())
    }
}
