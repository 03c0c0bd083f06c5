//! System calls that are refused with EPERM (seccomp).

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter_all_threads};

use super::applied::Applied;

/// What neither the agent nor a QEMU nor a hook has any business with: another kernel or another part of it, other
/// processes' memory, the clock, the hardware itself.
const NOBODYS: &[i64] = &[
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_perf_event_open,
    libc::SYS_fanotify_init,
    libc::SYS_open_by_handle_at,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_lookup_dcookie,
    libc::SYS_syslog,
];

/// What the agent, `systemctl` and `journalctl` do not need, and commands may: mounts, namespaces, BPF, keys,
/// descriptors of other processes, io_uring, page faults.
const NOT_OURS: &[i64] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_pidfd_getfd,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_vhangup,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_mbind,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
];

/// By this bit a call says that it is one of x32's (asm/unistd.h), where most have the same numbers.
const X32: i64 = 0x4000_0000;
/// Those of them that have numbers of their own: ptrace, kexec_load, process_vm_readv, process_vm_writev.
const X32_OWN: &[i64] = &[521, 528, 539, 540];

#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    #[error("no filter can be made for this processor")]
    Make(#[from] seccompiler::BackendError),
    #[error("the kernel does not take it")]
    Apply(#[from] seccompiler::Error),
}

/// Refuses these calls in all threads of this process, and in all that it starts.
pub(super) fn apply(runs_commands: bool) -> Result<Applied, FilterError> {
    apply_filter_all_threads(&filter(runs_commands)?)?;
    let refused = NOBODYS.len() + if runs_commands { 0 } else { NOT_OURS.len() };
    let left = if runs_commands { "; others are left to the commands that the agent starts" } else { "" };
    Ok(Applied::Yes(format!("{refused} system calls are denied{left}")))
}

fn filter(runs_commands: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let not_ours = if runs_commands { &[] } else { NOT_OURS };
    let plain = NOBODYS.iter().chain(not_ours).copied();
    let x32 = plain.clone().chain(X32_OWN.iter().copied()).map(|number| number | X32);
    let rules: BTreeMap<_, _> = plain.chain(x32).map(|number| (number, Vec::new())).collect();
    let (others, these) = (SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32));
    SeccompFilter::new(rules, others, these, TargetArch::try_from(std::env::consts::ARCH)?)?.try_into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{IoSlice, IoSliceMut};

    use nix::errno::Errno;
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::uio::{RemoteIoVec, process_vm_readv};
    use nix::unistd::Pid;

    use super::*;

    /// Reads this process's own memory, and makes a namespace: in a thread of its own, and whether each is
    /// refused by EPERM.
    fn refused(runs_commands: Option<bool>) -> [bool; 2] {
        let thread = std::thread::spawn(move || {
            if let Some(runs_commands) = runs_commands {
                seccompiler::apply_filter(&filter(runs_commands).unwrap()).unwrap();
            }
            let (text, mut copy) = ([7_u8; 4], [0_u8; 4]);
            let here = RemoteIoVec { base: text.as_ptr() as usize, len: text.len() };
            let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut copy)], &[here]);
            // Nothing, but it is asked for.
            let unshared = unshare(CloneFlags::empty());
            // What everybody needs goes on.
            let (mut to, from) = std::os::unix::net::UnixStream::pair().unwrap();
            std::io::Write::write_vectored(&mut to, &[IoSlice::new(b"on")]).unwrap();
            drop(from);
            assert!(std::fs::metadata("/").is_ok());
            [read == Err(Errno::EPERM), unshared == Err(Errno::EPERM)]
        });
        thread.join().unwrap()
    }

    #[test]
    fn what_nobody_needs_is_refused_and_commands_keep_what_they_may_need() {
        assert_eq!(refused(None), [false, false]);
        assert_eq!(refused(Some(true)), [true, false]);
        assert_eq!(refused(Some(false)), [true, true]);
    }
}
