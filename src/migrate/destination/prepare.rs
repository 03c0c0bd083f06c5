//! Prepare: the QEMU that takes the guest is found or started, compared with the offer, and made ready.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::admission::{target_problems, unreachable};
use super::end::never_ran;
use super::error::Error;
use super::settling::never_begun;
use super::state::{Data, Destination, Guest, Served, Serving, beginning};
use super::{created_images, exports, image_stamp, witness};
use crate::config::VmConfig;
use crate::migrate::checks::disks::{self, bitmaps};
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::guest::process::{self, StartedQemu};
use crate::migrate::guest::start_order::StartOrder;
use crate::migrate::handover;
use crate::migrate::host::Host;
use crate::migrate::journal::{Journal, Role, Undo};
use crate::migrate::model::leftover::Leftover;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::{ProblemKind, chain};
use crate::migrate::model::progress::{Progress, ProgressSink};
use crate::migrate::protocol::message::{Export, Offer, Prepared};
use crate::migrate::transfer::verify::transcript::Transcripts;
use crate::net::identity::Identity;
use crate::qemu::{Abilities, Events, Qmp, Stop};

impl Destination {
    /// Finds or starts the QEMU and makes it ready for `offer`; undone again if that fails.
    pub(crate) async fn prepare(
        host: Arc<Host>,
        peer: Identity,
        migration: Uuid,
        offer: &Offer,
    ) -> Result<(Self, Prepared), Error> {
        let problem = |p| Error::Problems(vec![p]);
        let config = host.vm_from(&peer, &offer.vm).map_err(|p| match p.kind {
            ProblemKind::NotPermitted => Error::Refused(p),
            _ => problem(p),
        });
        let config = config?;
        if let Some(refused) = host.not_acceptable(&peer, offer) {
            return Err(Error::Refused(refused));
        }
        let place = host.arrival(&peer).map_err(Error::Refused)?;
        let reservation = host.reserve_after_checks(&offer.vm, migration).await.map_err(problem)?;
        let agreed = witness::agree(&host, &peer, migration, offer).await?;
        let mut journal = host.journals.begin(migration, Role::Destination, &peer, beginning(offer))?;
        let (started, qmp, events) = match find_or_start(&host, offer, &config, &mut journal).await {
            Ok(found) => found,
            Err(trouble) => {
                let mut left = never_begun(&host, &mut journal).await;
                // Nobody was granted them.
                let images = created_images::remove(&host.config, journal.past()).await;
                left.extend(images.into_iter().map(Leftover::from));
                let vm = if let Error::Vm(error) = &trouble { error.leftover() } else { None };
                left.extend(vm.map(Leftover::from));
                let is_clean = left.is_empty();
                let outcome = never_ran(&trouble, left);
                match is_clean {
                    true => host.journals.forget(journal, outcome),
                    false => host.journals.end(journal, outcome),
                }
                return Err(trouble);
            }
        };
        let served = Served::new(&host, migration, &peer, (host.config.deadlines.grant(), Some(place)));
        let noted = journal.note_qemu(qmp.process()).and_then(|()| witness::note(&mut journal, agreed));
        let guest = Guest::new((qmp, events), started, &host, (&offer.vm, &config));
        let mut progress = Progress::new(migration, &offer.vm, Role::Destination, peer.as_str());
        progress.paused = !offer.running;
        let progress = ProgressSink::new(progress).recorded_of_peer(&host.audit);
        let hashed = Transcripts::new(progress.clone());
        let mut destination = Self {
            host,
            vm: offer.vm.clone(),
            peer,
            journal,
            progress,
            guest,
            hashed,
            data: Data { exports: exports::exports(offer), ..Data::default() },
            served,
            handover: match offer.witness {
                Some(_) => handover::Destination::new().with_witness(),
                None => handover::Destination::new(),
            },
            serving: Serving::new(None, 0),
            granted: None,
            said_started: None,
            _reservation: reservation,
        };
        let ready = match noted {
            Ok(()) => destination.make_ready(offer).await,
            Err(e) => Err(e.into()),
        };
        match ready {
            Ok(prepared) => {
                destination.granted = Some((offer.clone(), prepared.clone()));
                Ok((destination, prepared))
            }
            Err(trouble) => Err(destination.give_up(trouble).await),
        }
    }

    async fn make_ready(&mut self, offer: &Offer) -> Result<Prepared, Error> {
        let made = created_images::present(self.journal.past());
        let found = target_problems(&self.guest.qmp, offer, made).await?;
        let findings = offer.policy.judge(found).map_err(Error::Problems)?;
        // A QEMU that was started without -S would run its guest unasked.
        self.guest.qmp.execute_until_answered(Stop).await?;
        let present = crate::qemu::disks(&self.guest.qmp).await?;
        let abilities = Abilities::ask(&self.guest.qmp).await?;
        let pairs = disks::pair(&offer.disks, &present);
        self.data.images =
            image_stamp::images(pairs.pairs.iter().map(|(want, have)| (want.name.as_str(), *have)));
        let since = offer.after.map_or_else(Vec::new, |after| {
            image_stamp::since(&self.host, &self.peer, &self.vm, after, &self.data.images)
        });
        let compared = exports::compared(offer);
        let node = |e: &Export| pairs.of(&e.disk).map(|d| d.node_name.clone());
        let granted = self.data.exports.iter().filter_map(|e| Some((e, node(e)?, true)));
        let nodes: Vec<_> =
            granted.chain(compared.iter().filter_map(|e| Some((e, node(e)?, false)))).collect();
        if !nodes.is_empty() {
            let folder = self.host.config.runtime_dir.join("nbd");
            let nbd =
                NbdServer::start(&self.guest.qmp, &mut self.journal, &folder, &nodes, &abilities).await?;
            let past = self.journal.past();
            let is_made = |disk: &str| pairs.of(disk).is_some_and(|disk| created_images::is_made(past, disk));
            exports::look_for_zeroes(&nbd, &mut self.data.exports, is_made).await;
            self.data.nbd = Some(nbd);
        }
        let (major, minor, micro) = abilities.version;
        // Again, because QEMU reads those of an image when it is exported.
        let bitmaps = match abilities.capability(bitmaps::CAPABILITY) {
            true => bitmaps::accepted(&offer.disks, &crate::qemu::disks(&self.guest.qmp).await?),
            false => BTreeMap::new(),
        };
        if offer.is_replica() {
            self.host.replicas.begin(self.journal.past())?;
        }
        self.enter(Phase::Prepare);
        self.show_disks(offer);
        Ok(Prepared {
            exports: self.data.exports.clone(),
            qemu: format!("QEMU {major}.{minor}.{micro}"),
            restartable: self.guest.started.is_some(),
            since,
            compress: offer.compress,
            leaves_out: offer.disks.iter().any(|disk| disk.left_out),
            tells_zeroes: true,
            bitmaps: Some(bitmaps),
            findings,
            hook_s: Some(self.hook_s()),
            witness: self.journal.past().witness.is_some(),
            audit_head: Some(self.host.audit.figures().head.to_string()),
        })
    }

    /// How long `before_start` may take here.
    fn hook_s(&self) -> u64 {
        let hook = self.host.config.vm(&self.vm).map(|vm| vm.before_start.is_empty());
        if hook.unwrap_or(true) { 0 } else { self.host.config.deadlines.hook_s }
    }
}

async fn find_or_start(
    host: &Host,
    offer: &Offer,
    config: &VmConfig,
    journal: &mut Journal,
) -> Result<(Option<StartedQemu>, Qmp, Events), Error> {
    let name = &offer.vm;
    match (process::connect(config).await, &config.start) {
        (Ok((qmp, events)), _) => Ok((None, qmp, events)),
        (Err(e), Some(start)) if e.is_not_listening() => {
            let disks = match host.config.create_for(config) {
                Some(create) => created_images::make(&host.config, create, offer, journal, true).await?,
                None => Vec::new(),
            };
            journal.will_make(Undo::Qemu)?;
            let purpose = journal.past().header.migration;
            let order = StartOrder { vm: name, config, how: start, disks: &disks };
            let (started, qmp, events) = process::start(&host.config, &order, purpose).await?;
            Ok((Some(started), qmp, events))
        }
        (Err(e), _) => Err(Error::Problems(vec![unreachable(name, &chain(&e))])),
    }
}
