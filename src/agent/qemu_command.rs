//! The command line of a VM's QEMU, for another host.

use axum::http::StatusCode;

use super::refusal::Refusal;
use crate::api::{QemuCommand, QemuCommandRequest};
use crate::migrate::problem::ProblemKind;
use crate::migrate::{Host, running_qemu};

pub(super) async fn qemu_command(
    host: &Host,
    vm: String,
    request: QemuCommandRequest,
) -> Result<QemuCommand, Refusal> {
    let QemuCommandRequest { program, images, paths } = request;
    let paths = paths.into_iter().map(|path| (path.from, path.to)).collect();
    let (pid, made) =
        running_qemu::for_elsewhere(host, &vm, (program, images, paths)).await.map_err(|problem| {
            let status = match problem.kind {
                ProblemKind::VmUnknown => StatusCode::NOT_FOUND,
                _ => StatusCode::CONFLICT,
            };
            Refusal::new(status, problem.text, problem.remedy)
        })?;
    let (words, changed) = (made.words, made.changed);
    Ok(QemuCommand { vm, pid, words, changed, undecided: made.undecided, paths: made.paths })
}
