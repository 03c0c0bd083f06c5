//! What the agent takes from itself, so that whoever gets hold of it gets less. All of it is inherited by what
//! the agent starts and can never be given back, therefore:
//!
//! * *Landlock* only where the agent starts no program of the configuration's choosing, for nobody knows what a
//!   QEMU or a hook opens; and, unless it is asked for, not for root, who sees into other processes: a process
//!   under Landlock may not (`/proc/PID/fd`), and with it goes what is known of images.
//! * *seccomp* everywhere, in two sizes. A process that starts commands refuses only what neither a QEMU nor a
//!   hook has any business with. It also takes `no_new_privs`, with which setuid programs are ordinary ones: where
//!   the service manager has not set that already and there are commands, it has to be asked for.
//!
//! A helper kept outside of it, which would start QEMUs for the agent, would be a second program with the agent's
//! rights and an open door to it: whoever has the agent could have anything started all the same.

mod applied;
mod file_rules;
mod syscalls;

use std::path::Path;

use nix::sys::prctl::get_no_new_privs;
use nix::unistd::geteuid;

use crate::config::Config;
use crate::error_chain::chain;
pub(super) use applied::Applied;
use applied::no;

/// What was taken before there was a second thread.
#[derive(Debug)]
pub struct Early(Applied);

/// What is taken in all.
#[derive(Debug, Clone)]
pub(super) struct Confinement {
    pub(super) landlock: Applied,
    pub(super) seccomp: Applied,
}

/// Confines this thread, and all that it starts from now on, to the files and ports of the configuration at `path`.
/// A configuration that is wrong is told by whoever starts the agent with it.
pub fn confine(path: &Path) -> Early {
    let Ok(config) = Config::load(path) else { return Early(no("the configuration is wrong")) };
    let applied = match (config.sandbox.landlock, config.runs_commands()) {
        (Some(false), _) => no("the configuration says so"),
        (_, true) => no("the agent starts commands of the configuration, which would be confined with it"),
        (None, false) if geteuid().is_root() => no("as root only where `sandbox.landlock` asks for it"),
        _ => file_rules::apply(&config).unwrap_or_else(|e| no(&chain(&e))),
    };
    Early(applied.told("Landlock"))
}

/// Refuses system calls from now on, in all threads.
pub(super) fn confine_calls(config: &Config, Early(landlock): Early) -> Confinement {
    let runs_commands = config.runs_commands();
    let takes_privileges = !get_no_new_privs().unwrap_or(false);
    let applied = match config.sandbox.seccomp {
        Some(false) => no("the configuration says so"),
        None if runs_commands && takes_privileges => {
            no("it would take setuid programs from the commands of the configuration (`sandbox.seccomp`)")
        }
        _ => syscalls::apply(runs_commands).unwrap_or_else(|e| no(&chain(&e))),
    };
    Confinement { landlock, seccomp: applied.told("seccomp filter") }
}
