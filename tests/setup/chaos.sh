#!/bin/bash
# Plays `make chaos` and writes tests/CHAOS.md: what was run, where, on what, and the table.
#   usage: CHAOS_SEED=n CHAOS_INJECTIONS=n [CHAOS_STAGES=n] chaos.sh [FILE]      default tests/CHAOS.md
# CHAOS_ONLY=n plays one injection of that seed alone, CHAOS_FAULT="words|others" only faults whose name has one of these
# words, CHAOS_KEEP_LOGS=1 keeps the logs of a good run.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

file=$(realpath -m "${1:-$checkout/tests/CHAOS.md}")
table=$(mktemp)
trap 'rm -f "$table"' EXIT
cd "$checkout"
commit=$(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)
code=0
CHAOS_TABLE=$table cargo test --locked --test real chaos::faults_drawn_from_a_seed -- --ignored --nocapture || code=$?
# A run that came to its end has a table, also when something was not as promised.
[ -s "$table" ] || die "no table was written"

cpu=$(awk -F': ' '/^model name/ { print $2; exit }' /proc/cpuinfo)
qemu=$("$lab/qemu10/bin/qemu-system-x86_64" --version | awk 'NR == 1 { print $4 }')
{
  cat <<HEAD
# Faults in real migrations, as measured

\`make chaos CHAOS_SEED=$CHAOS_SEED CHAOS_INJECTIONS=$CHAOS_INJECTIONS\` on $(date -u +%F), ${CHAOS_STAGES:-1} stages side by side, vmferry $commit, QEMU $qemu on both hosts (TCG, no KVM), Linux $(uname -r), $(nproc) CPUs ($cpu). Two hosts in network namespaces, a guest that goes there and back with a raw and a qcow2 disk of 64 MiB and writes 60 numbered blocks a second to each.

The agents' deadlines are short, so that what lasts for ever is over in seconds: \`dead_peer_s\` 2, \`resume_s\` 6, \`resume_paused_s\` 4, \`handover_s\` 8, \`stall_s\` 15. With the defaults a longer cut is survived, and a roll-back for want of a connection comes later (tests/real/survives.rs).

The guest reads over fw_cfg on whose QEMU it executes, and puts that into every block before it writes it. A watcher that knows nothing of vmferry reads the disks of both hosts all the time and ends the run if a block was made twice or is missing. After each fault the guest's next migration must succeed and nothing may be left.

* **phase**: what the source's agent had said last when the fault hit
* **moved**: \`vmferry migrate\` ended with 0; **moved after settling**: the guest moved, the command line was told something else first or had lost its agent; **rolled back**: it runs on where it was; **guest killed by the fault**: the fault killed the very QEMU that the guest belonged to
* **settled**: from the fault until no agent had anything open any more, the duration of the fault included
* **guest still**: the longest time without a new block since the migration began, as seen from outside: at least one move's pause, a SIGSTOP of its QEMU included

HEAD
  cat "$table"
} >"$file"
say "wrote ${file#"$checkout"/}"
exit "$code"
