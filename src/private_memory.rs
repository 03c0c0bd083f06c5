//! A process that holds keys is looked into by nobody but root.

/// No core dump is written of this process, and other processes of its user can neither trace it nor read
/// `/proc/PID/mem`. What it starts is as it would be without.
pub fn keep_private() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::error!(%error, "this process may be dumped: its keys can come to lie on a disk");
    }
}
