//! Streams that peers open: control streams begin or settle migrations, data streams belong to
//! a grant. Whatever has no grant is refused before anything local is touched.

use std::sync::Arc;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::host::Host;
use super::progress::ProgressSink;
use super::reception::{self, Control};
use crate::mux::{Code, purpose};
use crate::net::session::IncomingStream;

/// Decides what one stream is for. A control stream is served until its end; `announce` gets
/// the progress of a migration that it begins.
pub async fn route(host: Arc<Host>, stream: IncomingStream, announce: impl FnOnce(ProgressSink)) {
    let migration = Uuid::from_bytes(stream.open.migration);
    let peer = stream.session().info().peer.clone();
    match stream.open.purpose {
        purpose::CONTROL => {
            let session = stream.session().clone();
            match stream.accept().await {
                Ok(stream) => {
                    let control = Control::new(session, stream);
                    reception::serve(host, peer, migration, control, announce).await;
                }
                Err(e) => tracing::debug!(%peer, error = %e, "a control stream ended before it began"),
            }
        }
        purpose::NBD | purpose::RAM => match host.destination(migration) {
            Some(incoming) if incoming.peer == peer => {
                // A refused offer is dropped, and dropping refuses it.
                if let Err(mpsc::error::TrySendError::Full(stream)) = incoming.streams.try_send(stream) {
                    stream.refuse(Code::Limit);
                }
            }
            _ => {
                tracing::warn!(%peer, %migration, "a stream without a grant was refused");
                stream.refuse(Code::Denied);
            }
        },
        _ => stream.refuse(Code::Unsupported),
    }
}
