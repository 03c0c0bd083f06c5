//! Copies what changes of one disk, pass after pass: reads it from an export of the source's own QEMU, and writes
//! it to the destination's. `delta.rs` has the argument for why that is enough.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::bitmaps::{Bitmaps, GRANULARITY_BYTES};
use super::copied::Copied;
use super::error::DeltaError;
use crate::migrate::guest::nbd_server::NbdServer;
use crate::qemu::{
    BlockDirtyInfo, BlockExportAdd, NbdReader, NbdWriter, Qmp, QmpError, REQUEST_BYTES_MAX, delete_bitmap,
    delete_export, names,
};

/// Between two passes when little is left.
const PASS_EVERY: Duration = Duration::from_secs(1);
/// When this little was left by a pass, the next one waits.
const LITTLE_BYTES: u64 = 4 * 1024 * 1024;

/// A pass under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pass {
    /// The bitmap that holds what it copies.
    bitmap: String,
    /// So much that is.
    bytes: u64,
    /// Everything before this offset is written, or on its way to the destination.
    at: u64,
}

impl Pass {
    /// Whether its bitmap is still there, and holds what it did.
    fn is_open(&self, ours: &[BlockDirtyInfo]) -> bool {
        ours.iter().any(|bitmap| bitmap.name == self.bitmap && !bitmap.recording)
    }
}

/// A copier that has stopped.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) writer: NbdWriter,
    pub(super) pass: Option<Pass>,
    /// Both sides are equal; otherwise it was told to stop.
    pub(super) is_over: bool,
}

/// Copies one disk's changes.
pub(super) struct Copier {
    pub(super) qmp: Qmp,
    pub(super) disk: String,
    pub(super) bitmaps: Bitmaps,
    pub(super) server: Arc<NbdServer>,
    pub(super) copied: Arc<Copied>,
    pub(super) at_rest: watch::Receiver<bool>,
    /// The pass under way, perhaps since an earlier process.
    pub(super) pass: Option<Pass>,
}

impl Copier {
    /// Until both sides are equal, or it is told to stop: then it does so in the middle of whatever it waits for.
    pub(super) async fn run_until(
        mut self,
        stop: CancellationToken,
        mut writer: NbdWriter,
    ) -> Result<Stopped, DeltaError> {
        let is_over = tokio::select! {
            biased;
            () = stop.cancelled() => false,
            over = self.run(&mut writer) => over.map(|()| true)?,
        };
        Ok(Stopped { writer, pass: self.pass, is_over })
    }

    /// Until a pass is over that began with the guest at rest, or after all was asked for that a replica is to
    /// have.
    async fn run(&mut self, writer: &mut NbdWriter) -> Result<(), DeltaError> {
        writer.ready().await?;
        let ours = self.bitmaps.ours(&self.qmp);
        if let Some(pass) = of_an_earlier_process(&mut self.pass, ours).await? {
            self.finish(pass, writer).await?;
        }
        loop {
            let last = *self.at_rest.borrow_and_update();
            let bytes = self.pass(writer).await?;
            if last {
                return Ok(());
            }
            if bytes <= LITTLE_BYTES {
                self.copied.rests(true);
                let _ = tokio::time::timeout(PASS_EVERY, self.at_rest.changed()).await;
                self.copied.rests(false);
            }
        }
    }

    /// Copies what has been recorded until now; how much that was.
    async fn pass(&mut self, writer: &mut NbdWriter) -> Result<u64, DeltaError> {
        let (bitmap, bytes) = self.bitmaps.freeze(&self.qmp).await?;
        self.copied.begin_pass(bytes);
        self.finish(Pass { bitmap, bytes, at: 0 }, writer).await?;
        Ok(bytes)
    }

    async fn finish(&mut self, pass: Pass, writer: &mut NbdWriter) -> Result<(), DeltaError> {
        let (bitmap, bytes) = (pass.bitmap.clone(), pass.bytes);
        self.pass = Some(pass);
        if bytes > 0 {
            self.copy(&bitmap, writer).await?;
        }
        delete_bitmap(&self.qmp, &self.bitmaps.node, &bitmap).await?;
        self.pass = None;
        self.copied.end_pass();
        Ok(())
    }

    async fn copy(&mut self, frozen: &str, writer: &mut NbdWriter) -> Result<(), DeltaError> {
        let id = names::export_id(&self.disk);
        let add = BlockExportAdd {
            id: id.clone(),
            node_name: self.bitmaps.node.clone(),
            name: self.disk.clone(),
            writable: false,
            bitmaps: vec![frozen.to_owned()],
            allocation_depth: false,
        };
        self.qmp.execute(add).await?;
        let socket = self.server.connect().map_err(DeltaError::Connect)?;
        let mut reader = NbdReader::connect(socket, &self.disk, frozen).await?;
        self.copy_dirty(&mut reader, writer).await?;
        writer.flush().await?;
        drop(reader);
        delete_export(&self.qmp, &id).await?;
        Ok(())
    }

    async fn copy_dirty(&mut self, reader: &mut NbdReader, writer: &mut NbdWriter) -> Result<(), DeltaError> {
        let (source_bytes, destination_bytes) = (reader.size(), writer.size());
        if source_bytes != destination_bytes {
            return Err(DeltaError::Size { source_bytes, destination_bytes });
        }
        let mut buffer = vec![0; REQUEST_BYTES_MAX];
        let mut from = self.pass.as_ref().map_or(0, |pass| pass.at);
        while from < source_bytes {
            let (dirty, next) = reader.dirty(from).await?;
            for range in dirty {
                let mut at = range.start;
                while at < range.end {
                    let bytes = (range.end - at).min(REQUEST_BYTES_MAX as u64);
                    let data = &mut buffer[..bytes as usize];
                    reader.read(at, data).await?;
                    self.write(writer, at, data).await?;
                    at += bytes;
                }
            }
            from = next;
        }
        Ok(())
    }

    /// In pieces of the bitmap's, so that zeroes among data are not sent.
    async fn write(&mut self, writer: &mut NbdWriter, at: u64, data: &[u8]) -> Result<(), DeltaError> {
        let is_zero = |piece: &[u8]| piece.iter().all(|&byte| byte == 0);
        let mut offset = at;
        for run in data
            .chunks(GRANULARITY_BYTES as usize)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| is_zero(a) == is_zero(b))
        {
            let bytes: usize = run.iter().map(|piece| piece.len()).sum();
            let start = (offset - at) as usize;
            writer.room().await?;
            // Nothing is waited for between these.
            writer.begin_write(offset, &data[start..start + bytes])?;
            offset += bytes as u64;
            self.copied.wrote(bytes as u64);
            if let Some(pass) = &mut self.pass {
                pass.at = offset;
            }
        }
        // What was begun is sent while the next part is read.
        Ok(writer.room().await?)
    }
}

/// The pass that another process has begun. One whose bitmap is gone was over. Told to stop while it asks, this one
/// leaves it as it is: begun anew, all of it would be copied again.
async fn of_an_earlier_process(
    pass: &mut Option<Pass>,
    ours: impl Future<Output = Result<Vec<BlockDirtyInfo>, QmpError>>,
) -> Result<Option<Pass>, QmpError> {
    if pass.is_some() {
        let ours = ours.await?;
        pass.take_if(|pass| !pass.is_open(&ours));
    }
    Ok(pass.clone())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::future::{pending, ready};

    use tokio::time::timeout;

    use super::*;

    fn bitmaps(name: &str, recording: bool) -> Vec<BlockDirtyInfo> {
        let bitmap =
            serde_json::json!([{"name": name, "count": 1, "granularity": 65536, "recording": recording}]);
        serde_json::from_value(bitmap).unwrap()
    }

    #[tokio::test]
    async fn a_pass_goes_on_though_a_process_is_replaced_before_it_knows_whether_it_may() {
        let begun = Some(Pass { bitmap: "a".into(), bytes: 9, at: 5 });
        let mut pass = begun.clone();
        let stopped = timeout(Duration::ZERO, of_an_earlier_process(&mut pass, pending())).await;
        assert!(stopped.is_err());
        assert_eq!(pass, begun);
        let goes_on = of_an_earlier_process(&mut pass, ready(Ok(bitmaps("a", false)))).await.unwrap();
        assert_eq!((&goes_on, &pass), (&begun, &begun));
        for over in [bitmaps("a", true), bitmaps("b", false), Vec::new()] {
            let mut pass = begun.clone();
            let goes_on = of_an_earlier_process(&mut pass, ready(Ok(over))).await.unwrap();
            assert_eq!((goes_on, pass), (None, None));
        }
    }
}
