//! What the streams of a source have carried, for its progress.

use std::time::Duration;

use tokio::time::Instant;

use super::Source;
use crate::migrate::model::label::Label;

/// The rate is over about the last second.
const RATE_OVER: Duration = Duration::from_millis(900);

impl Source {
    /// Brings the streams' bytes into the progress.
    pub(crate) fn count_bytes(&mut self) {
        let total = self.streams.total();
        let (since, before) = self.rate;
        let elapsed = since.elapsed();
        let rate = (elapsed >= RATE_OVER).then(|| {
            self.rate = (Instant::now(), total);
            ((total - before) as f64 / elapsed.as_secs_f64()) as u64
        });
        let streams = &self.streams;
        self.progress.update(|p| {
            for disk in &mut p.disks {
                let label = Label::Disk(disk.name.clone());
                (disk.stream_bytes, disk.saved_bytes) = (streams.bytes(&label), streams.saved(&label));
            }
            if let Some(ram) = &mut p.ram {
                ram.stream_bytes = streams.bytes(&Label::Ram);
            }
            p.rate_bytes_per_s = rate.unwrap_or(p.rate_bytes_per_s);
        });
    }
}
