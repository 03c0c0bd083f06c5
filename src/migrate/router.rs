//! Streams that peers open: control streams begin or settle migrations, data streams belong to
//! a grant. Whatever has no grant is refused before anything local is touched.

use std::sync::Arc;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::host::Host;
use super::model::progress::ProgressSink;
use super::protocol::server::Control;
use super::serve::serve;
use crate::mux::{Code, purpose};
use crate::net::purposes::Purposes;
use crate::net::session::IncomingStream;
use crate::peer_refusals::Reason;

/// Takes the streams of migrations. `announce` gets the progress of each migration that comes to
/// this host; what it returns is called at that migration's end.
pub fn accept_streams<E: FnOnce() + Send + 'static>(
    purposes: &mut Purposes,
    host: &Arc<Host>,
    announce: impl Fn(ProgressSink) -> E + Clone + Send + Sync + 'static,
) {
    let of_control = Arc::clone(host);
    purposes.register(purpose::CONTROL, move |stream| {
        serve_control(Arc::clone(&of_control), stream, announce.clone())
    });
    for data in [purpose::NBD, purpose::RAM] {
        let host = Arc::clone(host);
        purposes.register(data, move |stream| {
            offer_data(&host, stream);
            std::future::ready(())
        });
    }
}

/// Serves a control stream until its end.
async fn serve_control<E: FnOnce()>(
    host: Arc<Host>,
    stream: IncomingStream,
    announce: impl Fn(ProgressSink) -> E,
) {
    let migration = Uuid::from_bytes(stream.open.migration);
    let session = stream.session().clone();
    let peer = session.info().peer.clone();
    let what = || format!("a control stream of migration {migration}");
    let accepted = host.control_streams.accept(stream, host.who(&peer), what).await;
    let Some((stream, _place)) = accepted else { return };
    let mut ended = None;
    let announce = |progress| ended = Some(announce(progress));
    serve(Arc::clone(&host), peer, migration, Control::new(session, stream), announce).await;
    if let Some(ended) = ended {
        ended();
    }
}

/// Offers a data stream to the destination that granted it.
fn offer_data(host: &Host, stream: IncomingStream) {
    let migration = Uuid::from_bytes(stream.open.migration);
    let peer = stream.session().info().peer.clone();
    match host.destinations.stream_of(migration, &peer) {
        Ok(incoming) => {
            // A refused offer is dropped, and dropping refuses it.
            if let Err(mpsc::error::TrySendError::Full(stream)) = incoming.streams.try_send(stream) {
                let what = || format!("of migration {migration}: too many are waiting");
                host.refused(&peer, Reason::Quota, what);
                stream.refuse(Code::Limit);
            }
        }
        // Whoever has no grant is not told whether somebody else has it.
        Err(reason) => {
            host.refused(&peer, reason, || format!("of migration {migration}"));
            stream.refuse(Code::Denied);
        }
    }
}
