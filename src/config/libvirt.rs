//! `[libvirt]`: where this host's libvirt is, for migrations that libvirt makes itself through the tunnel.

use std::path::PathBuf;

use serde::Deserialize;

/// A host whose virtual machines belong to libvirt. What is left out is found out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LibvirtConfig {
    /// Where each migration has its folder with sockets: the same path on all hosts, each with a file system
    /// of its own there. `libvirt` below `runtime_dir` if it is left out.
    pub folder: Option<PathBuf>,
    /// libvirt's socket; if it is left out, `/run/libvirt/libvirt-sock` or `virtqemud-sock` beside it,
    /// whichever answers.
    pub socket: Option<PathBuf>,
    /// The group of libvirt's QEMUs; `libvirt-qemu` or `qemu` if it is left out.
    pub qemu_group: Option<String>,
    /// Who may use libvirt's own connection through the tunnel, beside root: libvirt's users, who run virsh.
    pub client_group: Option<String>,
}
