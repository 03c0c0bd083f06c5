//! What all migrations of one agent share: its configuration, and a store for each thing that one
//! migration has to know of another.

mod ask_error;
pub(crate) mod check_turns;
pub(crate) mod decisions;
pub(crate) mod destinations;
pub(crate) mod freeze;
pub(crate) mod journals;
pub mod known_vms;
pub(crate) mod peers;
pub(crate) mod replicas;
pub(crate) mod reservations;
pub mod running_qemu;
pub mod vm_state;
pub(crate) mod witness;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) use self::ask_error::AskError;
use self::check_turns::CheckTurns;
use self::decisions::Decisions;
use self::destinations::Destinations;
use self::freeze::Freeze;
use self::journals::Journals;
use self::peers::{Peers, listed};
use self::replicas::Replicas;
use self::reservations::{Holder, Looking, Reservation, Reservations};
use self::witness::Witness;
pub use self::witness::WitnessFigures;
use super::model::problem::{Problem, ProblemKind};
use super::protocol::message::{NEEDS_KNOWN, Offer};
use crate::access::{Action, Denied, Who, authorize};
use crate::audit::Audit;
use crate::config::{Config, PeerConfig, VmConfig};
use crate::control_streams::ControlStreams;
use crate::net::identity::Identity;
use crate::net::pool::Pool;
use crate::peer_refusals::{PeerRefusals, Reason};

/// One agent's host, shared by all its migrations.
#[derive(Debug)]
pub struct Host {
    pub config: Config,
    pub identity: Identity,
    pub pool: Arc<Pool>,
    /// Cancelled when the agent was told to stop.
    pub stopping: CancellationToken,
    pub(crate) peers: Peers,
    pub(crate) reservations: Reservations,
    pub(crate) destinations: Destinations,
    pub control_streams: Arc<ControlStreams>,
    pub(crate) check_turns: CheckTurns,
    pub(crate) journals: Journals,
    pub(crate) replicas: Replicas,
    pub(crate) decisions: Decisions,
    pub(crate) freeze: Freeze,
    pub(crate) witness: Option<Witness>,
    pub audit: Audit,
    pub refusals: Arc<PeerRefusals>,
    /// It is being emptied: no VM is received.
    draining: AtomicBool,
}

impl Host {
    /// A host without migrations.
    pub fn new(
        config: Config,
        identity: Identity,
        pool: Pool,
        stopping: CancellationToken,
        audit: Audit,
    ) -> Self {
        let pool = Arc::new(pool);
        let refusals = Arc::new(PeerRefusals::new(audit.clone()));
        let control_streams = ControlStreams::new(Arc::clone(pool.endpoint()), Arc::clone(&refusals));
        Self {
            peers: Peers::new(config.peers.clone(), identity.clone(), Arc::clone(&pool)),
            reservations: Reservations::default(),
            destinations: Destinations::default(),
            control_streams: Arc::new(control_streams),
            check_turns: CheckTurns::default(),
            journals: Journals::new(config.state_dir.join("migrations"), identity.clone()),
            replicas: Replicas::new(&config.state_dir),
            decisions: Decisions::default(),
            freeze: Freeze::new(),
            refusals,
            witness: config.witness.as_ref().map(Witness::new),
            audit,
            draining: AtomicBool::new(false),
            config,
            identity,
            pool,
            stopping,
        }
    }

    /// How often the witness was asked; none where there is none.
    pub fn witness_figures(&self) -> Option<WitnessFigures> {
        self.witness.as_ref().map(Witness::figures)
    }

    /// Waits until the witness was told what it is told in the background. Nothing may be added to that.
    pub async fn has_told_witness(&self) {
        if let Some(witness) = &self.witness {
            witness.background.close();
            witness.background.wait().await;
        }
    }

    /// Whether a migration of this host, in either role, has a witness and has not ended.
    pub fn has_a_witness(&self) -> bool {
        self.journals.have_a_witness()
    }

    /// How many journals are not believed.
    pub fn journals_refused(&self) -> usize {
        self.journals.refused().len()
    }

    /// The VM's configuration, for this host's own operators.
    pub(crate) fn vm(&self, name: &str, side: &str) -> Result<VmConfig, Problem> {
        self.config.vm(name).ok_or_else(|| self.no_vm(name, side, self.config.vms.keys()))
    }

    /// A peer by its name in the configuration, for this host's own operators.
    pub fn find_peer(&self, name: &str) -> Result<&PeerConfig, Problem> {
        self.peers.find(name)
    }

    /// Whether this VM may go to that peer, for this host's own operators.
    pub(crate) fn may_go(&self, vm: &str, peer: &str) -> Result<(), Problem> {
        let found = self.peers.find(peer)?;
        authorize(Action::GetVm(vm), Who::Peer(Some(found))).map_err(|Denied| {
            let text = format!("{} does not send VM {vm} to {peer}", self.identity);
            let remedy =
                format!("add it to `send` of [peer.{peer}] in the configuration of {}", self.identity);
            Problem::new(ProblemKind::NotSent, text, remedy)
        })
    }

    /// A peer, as somebody who asks for something.
    pub(crate) fn who(&self, peer: &Identity) -> Who<'_> {
        Who::Peer(self.config.peer_by_identity(peer).map(|(_, config)| config))
    }

    /// The configuration of a VM that `peer` may send here. No other VM is named to it.
    pub(crate) fn vm_from(&self, peer: &Identity, name: &str) -> Result<VmConfig, Problem> {
        let may_send = |vm: &str| authorize(Action::SendVm(vm), self.who(peer));
        may_send(name).map_err(|Denied| {
            self.refused(peer, Reason::NotPermitted, || format!("VM {name}"));
            self.not_permitted(peer, name)
        })?;
        let may_be_named = |vm: &&String| may_send(vm).is_ok();
        let found = self.config.vm(name);
        found.ok_or_else(|| self.no_vm(name, "destination", self.config.vms.keys().filter(may_be_named)))
    }

    /// Something was refused to a peer: counted, recorded, and said if the same was not said lately.
    pub(crate) fn refused(&self, peer: &Identity, reason: Reason, what: impl Fn() -> String) {
        self.refusals.refused(peer, reason, what);
    }

    /// From now on VMs are received, or none is; what is on its way comes all the same.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::SeqCst);
    }

    /// Whether it is being emptied.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// What keeps an offer of this peer from being looked at: this host is being emptied, something in the offer is
    /// not understood, or it is too large.
    pub(crate) fn not_acceptable(&self, peer: &Identity, offer: &Offer) -> Option<Problem> {
        if self.is_draining() {
            self.refused(peer, Reason::Draining, || format!("VM {}", offer.vm));
            let text = format!("{} is being emptied and takes no VM", self.identity);
            let remedy =
                "choose another host, or wait: `vmferry drain --status` there says when it has ended";
            return Some(Problem::new(ProblemKind::Draining, text, remedy));
        }
        let unknown = |need: &&String| !NEEDS_KNOWN.contains(&need.as_str());
        if let Some(needed) = offer.needs.iter().find(unknown) {
            self.refused(peer, Reason::NotUnderstood, || format!("an offer that needs \"{needed}\""));
            let text =
                format!("{} does not know \"{needed}\", which the source's agent insists on", self.identity);
            return Some(Problem::new(
                ProblemKind::Other,
                text,
                "give both hosts the same version of vmferry",
            ));
        }
        let (_, permits) = self.config.peer_by_identity(peer)?;
        let most = permits.receive_size?;
        let sizes = offer.disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.virtual_size);
        let size = sizes.fold(0, u64::saturating_add);
        if size <= most.bytes() {
            return None;
        }
        self.refused(peer, Reason::Quota, || format!("VM {} of {size} bytes", offer.vm));
        let text = format!(
            "{} permits {peer} to send VMs of {most} at most, the disks of {} have {size} bytes",
            self.identity, offer.vm
        );
        let remedy = format!(
            "raise `receive_size` of the peer with identity \"{peer}\" in the configuration of {}",
            self.identity
        );
        Some(Problem::new(ProblemKind::NotPermitted, text, remedy))
    }

    /// A place among the VMs that this peer may have on their way here.
    pub(crate) fn arrival(&self, peer: &Identity) -> Result<OwnedSemaphorePermit, Problem> {
        let at_once = self.config.peer_by_identity(peer).map_or(0, |(_, permits)| permits.receive_at_once);
        self.destinations.place(peer, at_once).ok_or_else(|| {
            self.refused(peer, Reason::Quota, || format!("more than {at_once} VMs at once"));
            let text = format!("{} takes {at_once} VMs of {peer} at once, and has them", self.identity);
            Problem::new(ProblemKind::Busy, text, "wait for one of them, or raise `receive_at_once` there")
        })
    }

    fn no_vm<'a>(&self, name: &str, side: &str, known: impl Iterator<Item = &'a String>) -> Problem {
        let text = format!("the {side} {} knows no VM {name}; it knows {}", self.identity, listed(known));
        let remedy = format!("add [vm.{name}] with its `qmp` to the configuration of {}", self.identity);
        Problem::new(ProblemKind::VmUnknown, text, remedy)
    }

    fn not_permitted(&self, peer: &Identity, vm: &str) -> Problem {
        let text = format!("{} does not permit {peer} to send VM {vm} there", self.identity);
        let remedy = format!(
            "add it to `receive` of the peer with identity \"{peer}\" in the configuration of {}",
            self.identity
        );
        Problem::new(ProblemKind::NotPermitted, text, remedy)
    }

    /// Reserves the VM for one migration on this host; not while nobody knows whose it is.
    pub(crate) fn reserve(&self, vm: &str, migration: Uuid) -> Result<Reservation, Problem> {
        self.reserve_for(vm, Holder::Migration(migration))
    }

    /// The same, and waits for a check to end: whoever checks a VM again and again keeps no migration of it out.
    pub(crate) async fn reserve_after_checks(
        &self,
        vm: &str,
        migration: Uuid,
    ) -> Result<Reservation, Problem> {
        let within = self.config.deadlines.qemu_start();
        // Whoever has it then says so below.
        let _waited = tokio::time::timeout(within, self.reservations.no_task(vm)).await;
        self.reserve(vm, migration)
    }

    /// Reserves the VM for something short that is no migration, in words.
    pub(crate) fn reserve_for_task(&self, vm: &str, task: &'static str) -> Result<Reservation, Problem> {
        self.reserve_for(vm, Holder::Task(task))
    }

    fn reserve_for(&self, vm: &str, holder: Holder) -> Result<Reservation, Problem> {
        self.is_known_whose(vm)?;
        self.reservations.reserve(vm, holder).map_err(|other| self.busy(vm, other))
    }

    /// Begins to look at a VM that nobody has; the look gives way to whoever takes it.
    pub(crate) fn look(&self, vm: &str) -> Result<Looking, Problem> {
        self.is_known_whose(vm)?;
        self.reservations.begin_look(vm).map_err(|other| self.busy(vm, other))
    }

    /// Somebody has the VM.
    pub(crate) fn busy(&self, vm: &str, holder: Holder) -> Problem {
        let (text, remedy) = match holder {
            Holder::Migration(id) => (
                format!("VM {vm} is already part of migration {id} on {}", self.identity),
                "wait for it or cancel it",
            ),
            Holder::Task(task) => {
                (format!("{} has {task} of VM {vm} under way", self.identity), "wait for its end")
            }
        };
        Problem::new(ProblemKind::Busy, text, remedy)
    }

    fn is_known_whose(&self, vm: &str) -> Result<(), Problem> {
        let mut refused = self.journals.refused().into_iter();
        let Some(refused) = refused.find(|r| r.vm.as_deref() == Some(vm)) else { return Ok(()) };
        let text = format!("whose VM {vm} is cannot be known on {}: {}", self.identity, refused.cause);
        let remedy = format!(
            "find out by hand where the VM runs, then take {} away; see `vmferry recover`",
            refused.path.display()
        );
        Err(Problem::new(ProblemKind::Busy, text, remedy))
    }
}
