//! What is said of each operation of the local API, and that `openapi.json` says it, with the schemas of the types
//! that agent and command line use. Another test holds the routes to it, and real agents' answers.

use serde_json::{Value, json};
use vmferry::api::{
    CheckReport, CheckRequest, Course, DrainPlan, DrainRequest, DrainStatus, EndReplicaRequest, Event,
    ForceRequest, Forward, ForwardRequest, Forwards, LibvirtLook, LibvirtMigration, LibvirtRequest, Limits,
    MigrateRequest, Migration, MigrationLimit, MigrationPlan, Names, PeerLimit, PeerLimitRequest, Ping,
    PingRequest, QemuCommand, QemuCommandRequest, RecoverQuery, Recovery, Replica, ReplicaEnd, ShareRequest,
    Status, Told,
};

use super::document::{Operation, document};

const KEY: &str = "A new one for each migration, of the same user: with one that was sent before, the answer is that \
                   migration, and nothing is begun.";
const UNKNOWN: &str = "Not known here.";
const NO_PEER: &str = "No such peer.";
const LEAVING: &str = "The agent is shutting down.";
const MORE_AT_ONCE: &str = "Not JSON of this shape, a value outside its range, or at_once is more than the configuration \
                            has.";
const NO_JOURNAL: &str = "No journal of that migration.";
const UNREADABLE: &str = "The journals cannot be read.";

/// Any object.
type Anything = serde_json::Map<String, Value>;

fn host() -> Vec<Operation> {
    use Operation as O;
    vec![
        O::view("/v1/status", "status", "The agent and its sessions").gives::<Status>(200, "The agent."),
        O::view(
            "/v1/names",
            "names",
            "The names of configured VMs and peers, without a question to any QEMU: for completions",
        )
        .gives::<Names>(200, "The names."),
        O::view("/v1/openapi.json", "openapi", "This description")
            .gives::<Anything>(200, "This description."),
        O::view(
            "/v1/limits",
            "limits",
            "What may be sent in a second, to each peer and by each migration under way",
        )
        .gives::<Limits>(200, "All limits."),
        O::operate(
            "/v1/peers/{name}/limit",
            "limit_peer",
            "Change what is sent to a peer in a second, over all migrations, until the agent stops",
        )
        .takes::<PeerLimitRequest>()
        .gives::<PeerLimit>(200, "As it is now.")
        .refuses(404, NO_PEER),
        O::operate("/v1/peers/{name}/ping", "ping", "Try the way to a peer")
            .takes::<PingRequest>()
            .gives::<Ping>(200, "What was found, that it is not reached included.")
            .refuses(404, NO_PEER),
        O::operate(
            "/v1/vms/{vm}/qemu-command",
            "qemu_command",
            "Make the command line of a VM's QEMU into that of one which waits for it on another host",
        )
        .takes::<QemuCommandRequest>()
        .gives::<QemuCommand>(200, "The command line, and what is to be said of it.")
        .refuses(404, "No such VM.")
        .refuses(409, "Its QEMU cannot be looked at now."),
    ]
}

fn migrations() -> Vec<Operation> {
    use Operation as O;
    vec![
        O::operate(
            "/v1/check",
            "check",
            "Everything that would make a migration fail; both hosts stay as they are",
        )
        .takes::<CheckRequest>()
        .gives::<CheckReport>(200, "What would fail."),
        O::view("/v1/migrations", "list", "Migrations of this host, in both directions, oldest first")
            .gives::<Vec<Migration>>(200, "All that are known."),
        O::operate(
            "/v1/migrations",
            "migrate",
            "Begin to move a virtual machine; its end is read from the migration",
        )
        .header("Idempotency-Key", "^[!-~]{1,255}$", KEY)
        .takes::<MigrateRequest>()
        .gives::<Migration>(200, "Begun before, with this Idempotency-Key.")
        .gives::<Migration>(201, "Begun.")
        .refuses(409, "This Idempotency-Key was that of a migration of another VM, or to another peer.")
        .refuses(503, LEAVING),
        O::operate(
            "/v1/migrations/plan",
            "plan",
            "What a migration would do, and what is to be expected of it; nothing is begun",
        )
        .takes::<MigrateRequest>()
        .gives::<MigrationPlan>(200, "What was found."),
        O::view("/v1/migrations/{id}", "migration", "One migration")
            .gives::<Migration>(200, "As it is now.")
            .refuses(404, UNKNOWN),
        O::view("/v1/migrations/{id}/timeline", "timeline", "What a migration has been through")
            .gives::<Course>(200, "As far as it is known to this agent.")
            .refuses(404, UNKNOWN),
        O::view(
            "/v1/migrations/{id}/events",
            "events",
            "One line of JSON for each change, until the migration's end",
        )
        .streams::<Event<Migration>>("A migration on each line.")
        .refuses(404, UNKNOWN),
        O::operate("/v1/migrations/{id}/cancel", "cancel", "Roll back; possible until the hand-over")
            .accepts("Being rolled back.")
            .refuses(404, UNKNOWN)
            .refuses(409, "Too late, or this host is the destination."),
        O::operate(
            "/v1/migrations/{id}/limit",
            "share",
            "Change what a migration may send, from the next frame on",
        )
        .takes::<ShareRequest>()
        .gives::<MigrationLimit>(200, "As it is now.")
        .refuses(404, UNKNOWN)
        .refuses(409, "It has ended, or this host is the destination."),
    ]
}

fn forwards() -> Vec<Operation> {
    use Operation as O;
    vec![
        O::view("/v1/forwards", "forwards", "Forwarded sockets of this host, and what peers may be connected to")
            .gives::<Forwards>(200, "All of them."),
        O::operate(
            "/v1/forwards",
            "add_forward",
            "Listen on a socket and carry its connections to a target of a peer, until it is ended or the agent stops",
        )
        .takes::<ForwardRequest>()
        .gives::<Forward>(201, "It listens.")
        .refuses(404, NO_PEER)
        .refuses(409, "It cannot listen there: another has the socket, or the operating system refuses.")
        .refuses(503, LEAVING),
        O::operate(
            "/v1/forwards/{id}/end",
            "end_forward",
            "Close a forwarding's socket and all its connections; one of the configuration begins again with the agent",
        )
        .gives::<Forward>(200, "As it was at its end.")
        .refuses(404, UNKNOWN),
        O::operate(
            "/v1/forwards/{id}/limit",
            "limit_forward",
            "Change what a forwarding may send, until it ends or the agent stops",
        )
        .takes::<ShareRequest>()
        .gives::<Forward>(200, "As it is now.")
        .refuses(404, UNKNOWN),
    ]
}

fn libvirt() -> Vec<Operation> {
    use Operation as O;
    const NOT_CONFIGURED: &str = "The configuration has no such peer.";
    vec![
        O::view(
            "/v1/libvirt",
            "libvirt_list",
            "Migrations that libvirt makes itself through the tunnel, in both directions, oldest first",
        )
        .gives::<Vec<LibvirtMigration>>(200, "All that are known."),
        O::operate(
            "/v1/libvirt",
            "libvirt_prepare",
            "Make the sockets of a migration on both hosts; who follows its events keeps them",
        )
        .takes::<LibvirtRequest>()
        .gives::<LibvirtMigration>(201, "They are there.")
        .refuses(404, NOT_CONFIGURED)
        .refuses(409, "Refused by the destination, or something is in the way on one of the hosts.")
        .refuses(503, LEAVING),
        O::operate(
            "/v1/libvirt/check",
            "libvirt_check",
            "Whether the destination would permit it, and what its host lacks; nothing is made",
        )
        .takes::<LibvirtRequest>()
        .gives::<LibvirtLook>(200, "It would.")
        .refuses(404, NOT_CONFIGURED)
        .refuses(409, "It would not, or cannot be asked."),
        O::view(
            "/v1/libvirt/{id}/events",
            "libvirt_events",
            "A line of JSON for each change and each second, until the end. The sockets are taken away soon after the \
             last reader is gone and nothing is connected",
        )
        .streams::<Event<LibvirtMigration>>("A migration of libvirt's on each line.")
        .refuses(404, UNKNOWN),
        O::operate(
            "/v1/libvirt/{id}/end",
            "libvirt_end",
            "End it: all its connections are cut, and the sockets are taken away on both hosts",
        )
        .takes::<Told>()
        .gives::<LibvirtMigration>(200, "What has become of it.")
        .refuses(404, "Not known here, or this host is its destination."),
    ]
}

fn drains() -> Vec<Operation> {
    use Operation as O;
    const NEVER: &str = "This host was never drained.";
    vec![
        O::view("/v1/drain", "drainStatus", "The drain that is under way, or the last one")
            .gives::<DrainStatus>(200, "The drain.")
            .refuses(404, NEVER),
        O::operate(
            "/v1/drain",
            "drain",
            "Empty this host. The same request while that drain is under way is that drain's",
        )
        .takes::<DrainRequest>()
        .gives::<DrainStatus>(200, "It is under way already.")
        .gives::<DrainStatus>(201, "Begun.")
        .refuses(400, MORE_AT_ONCE)
        .refuses(404, NO_PEER)
        .refuses(409, "Another drain is under way.")
        .refuses(500, "Its record cannot be written or understood.")
        .refuses(503, LEAVING),
        O::operate(
            "/v1/drain/plan",
            "drainPlan",
            "What a drain would do: the order, where each VM would go, what check says. Nothing is moved",
        )
        .takes::<DrainRequest>()
        .gives::<DrainPlan>(200, "What it would do.")
        .refuses(400, MORE_AT_ONCE)
        .refuses(404, NO_PEER),
        O::view(
            "/v1/drain/events",
            "drainEvents",
            "The drain whenever it changes, until its end. A stream that ends before ended the agent: ask again",
        )
        .streams::<Event<DrainStatus>>("One drain on each line.")
        .refuses(404, NEVER),
        O::operate("/v1/drain/cancel", "drainCancel", "Begin nothing further, and roll back what can be")
            .accepts("Asked for.")
            .refuses(404, "No drain is under way."),
    ]
}

fn remains() -> Vec<Operation> {
    use Operation as O;
    vec![
        O::view(
            "/v1/replicas",
            "replicas",
            "Replicas that peers have of this host's virtual machines, and those that it keeps for peers",
        )
        .gives::<Vec<Replica>>(200, "All that it remembers."),
        O::operate(
            "/v1/replicas/end",
            "end_replica",
            "End a replica of a virtual machine of this host at a peer, on both hosts",
        )
        .takes::<EndReplicaRequest>()
        .gives::<ReplicaEnd>(200, "It is ended, but for what stays.")
        .refuses(404, "No such peer, or neither host remembers such a replica.")
        .refuses(
            409,
            "The virtual machine is in a migration, its QEMU or the peer cannot be asked, or the peer does not permit it: \
             try again.",
        ),
        O::view(
            "/v1/recover",
            "look",
            "What is undecided, left over or not believed on this host; changes nothing",
        )
        .asks::<RecoverQuery>()
        .gives::<Recovery>(200, "All cases.")
        .refuses(404, NO_JOURNAL)
        .refuses(500, UNREADABLE),
        O::operate(
            "/v1/recover",
            "recover",
            "Clean up what is left over where that is possible by now, and say what still is",
        )
        .asks::<RecoverQuery>()
        .gives::<Recovery>(200, "The cases that remain.")
        .refuses(404, NO_JOURNAL)
        .refuses(500, UNREADABLE),
        O::admin(
            "/v1/recover/{id}",
            "force",
            "Decide whose a virtual machine is, when neither agent can know; it may run twice if this is wrong",
        )
        .takes::<ForceRequest>()
        .accepts("Decided, and on the disk.")
        .refuses(
            409,
            "Nothing is open, or it was not taken: the disk refused it, or the other host says that the guest is there.",
        )
        .refuses(504, "Whether it was taken is not known."),
    ]
}

fn description() -> Value {
    let info = json!({
        "title": "vmferry local API",
        "version": "1",
        "description": "HTTP on the agent's unix socket (/run/vmferry/vmferry.sock). Within /v1 fields are added, never \
            renamed or removed; ignore what you do not know. Any other path: 404 with an Error, any other method: 405 \
            with one. Events are lines of JSON; the last one says so (end). Where groups have roles (`[api]` in the \
            agent's configuration), whoever lacks an operation's `x-role` gets 403 with an Error; each role includes \
            those before it: view, operate, admin.",
        "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
    });
    let servers = json!([{
        "url": "http://vmferry",
        "description": "curl --unix-socket /run/vmferry/vmferry.sock http://vmferry/v1/status",
    }]);
    let all = [host(), migrations(), forwards(), libvirt(), drains(), remains()];
    document(&info, &servers, all.into_iter().flatten().collect())
}

/// `VMFERRY_WRITE_DOCS=1` writes it anew.
#[test]
fn the_description_is_that_of_the_types() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/openapi.json");
    let text = serde_json::to_string_pretty(&description()).unwrap() + "\n";
    if std::env::var_os("VMFERRY_WRITE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written == text, "src/api/openapi.json is stale: run this with VMFERRY_WRITE_DOCS=1");
}
