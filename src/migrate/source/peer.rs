//! A migration's destination as its source sees it: the control stream, the lanes of data, what it grants.

use tokio::task::yield_now;

use super::context::Context;
use super::failure::Failure;
use crate::migrate::model::label::Label;
use crate::migrate::protocol::client::{Link, WEIGHT};
use crate::migrate::protocol::message::{Notice, Prepared};
use crate::migrate::transfer::bandwidth::Attached;
use crate::mux::{Class, Name, Open};
use crate::net::compress::Coding;
use crate::net::lanes::Lanes;
use crate::net::session::Session;
use crate::net::stream::Stream;
use crate::net::trust;

/// A migration's destination as its source sees it.
pub(crate) struct Peer {
    pub(crate) link: Link,
    pub(crate) lanes: Lanes,
    pub(crate) grant: Option<Prepared>,
    /// It has the whole guest.
    pub(crate) loaded: bool,
    /// What may be sent to it.
    pub(crate) share: Attached,
}

impl Peer {
    pub(crate) fn new(context: &Context, link: Link) -> Self {
        let share = context.request.share.attach(link.lanes(), context.request.id);
        Self::with_share(link, share)
    }

    /// One that is sent to within `share` already.
    pub(crate) fn with_share(link: Link, share: Attached) -> Self {
        let lanes = link.lanes().clone();
        Self { link, lanes, grant: None, loaded: false, share }
    }

    /// Whether nothing can move for want of a connection.
    pub(crate) fn is_away(&self) -> bool {
        self.lanes.is_away()
    }

    /// Nothing is handed over to whom no connection would be made any more.
    pub(crate) fn is_trusted(&self, context: &Context) -> Result<(), Failure> {
        let endpoint = context.host.pool.endpoint();
        let judged = self.lanes.all().iter().try_for_each(|session| trust::judge(endpoint, session));
        judged.map_err(|cause| Failure::Untrusted { peer: context.request.peer.clone(), cause })
    }

    /// Waits for the destination to have loaded the guest, or to have failed.
    pub(crate) async fn loaded(&mut self) -> Result<(), Failure> {
        match self.link.notice().await? {
            // Another process of the destination says it again. Who says it without end keeps nothing else from its turn.
            Notice::Loaded if self.loaded => yield_now().await,
            Notice::Loaded => self.loaded = true,
            Notice::Failed { text } => return Err(Failure::Destination(text)),
        }
        Ok(())
    }

    /// How what is sent of disks is coded.
    pub(crate) fn disk_coding(&self) -> Coding {
        match &self.grant {
            Some(grant) if grant.compress => Coding::Compress,
            _ => Coding::Plain,
        }
    }

    /// Opens a data stream in the next of the lanes, which is this migration's from then on.
    pub(crate) async fn open(
        &self,
        context: &Context,
        label: &Label,
        purpose: u16,
        channel: u16,
    ) -> Result<(Session, Stream), Failure> {
        let (lane, mut stream) = self.begin_open(context, label, purpose, channel).await?;
        tokio::select! {
            accepted = stream.accepted() => accepted.map_err(|ended| Failure::refused(label, &lane, ended))?,
            () = context.cancel.cancelled() => return Err(context.cancelled()),
        }
        Ok((lane, stream))
    }

    /// The same without the destination's answer ([`Stream::accepted`]): a few bytes can be sent before.
    pub(crate) async fn begin_open(
        &self,
        context: &Context,
        label: &Label,
        purpose: u16,
        channel: u16,
    ) -> Result<(Session, Stream), Failure> {
        let migration = *context.request.id.as_bytes();
        let open = Open { purpose, class: Class::Bulk, weight: WEIGHT, migration, channel, name: Name::NONE };
        let opened = async {
            let lane = context.host.peers.lane(self.lanes.first(), &context.request.peer).await;
            self.lanes.add(&lane);
            self.share.spread();
            let stream = lane.begin_open(open).await;
            let stream = stream.map_err(|source| Failure::Open { stream: label.to_string(), source })?;
            Ok((lane, stream))
        };
        tokio::select! {
            opened = opened => opened,
            () = context.cancel.cancelled() => Err(context.cancelled()),
        }
    }
}
