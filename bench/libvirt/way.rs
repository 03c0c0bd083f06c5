//! The ways, and what virsh is told in each.

use crate::relay::{FOLDER, Relay};

/// A way to move a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// QEMU's TLS, libvirt's connection by TLS. The one that all others are compared to.
    Tls,
    /// In clear.
    Clear,
    /// RAM within libvirt's own connection.
    Tunnelled,
    /// Unix sockets into a relay.
    Relay(Relay),
    Vmferry,
}

impl Way {
    pub(crate) const ALL: [Self; 7] = [
        Self::Tls,
        Self::Clear,
        Self::Tunnelled,
        Self::Relay(Relay::Socat),
        Self::Relay(Relay::Stunnel),
        Self::Relay(Relay::Ssh),
        Self::Vmferry,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tls => "libvirt's --tls",
            Self::Clear => "in clear (qemu+tcp)",
            Self::Tunnelled => "libvirt's --tunnelled (qemu+tls)",
            Self::Relay(relay) => relay.name(),
            Self::Vmferry => "vmferry",
        }
    }

    /// virsh's words for a move to a host; vmferry's own are its own.
    pub(crate) fn words(self, to: &str, copies: bool) -> Vec<String> {
        let mut words: Vec<String> = ["migrate", "--live", "--p2p"].map(str::to_owned).to_vec();
        if copies {
            words.push("--copy-storage-all".into());
        }
        let mut add = |more: &[String]| words.extend_from_slice(more);
        match self {
            Self::Tls => add(&[
                "--tls".into(),
                format!("--migrateuri=tcp://{to}"),
                format!("--desturi=qemu+tls://{to}/system"),
            ]),
            Self::Clear => {
                add(&[format!("--migrateuri=tcp://{to}"), format!("--desturi=qemu+tcp://{to}/system")]);
            }
            Self::Tunnelled => add(&["--tunnelled".into(), format!("--desturi=qemu+tls://{to}/system")]),
            Self::Relay(_) => {
                add(&[
                    format!("--migrateuri=unix://{FOLDER}/ram.sock"),
                    format!("--desturi=qemu+unix:///system?socket={FOLDER}/libvirt.sock"),
                ]);
                if copies {
                    add(&[format!("--disks-uri=unix://{FOLDER}/nbd.sock")]);
                }
            }
            Self::Vmferry => {}
        }
        words
    }
}
