#!/bin/bash
# Builds and runs the benchmarks, which write bench/RESULTS.md, each its half of it.
#   bench/run.sh                  relays beside relays, then migrations of real QEMUs
#   bench/run.sh --moves [ARG…]   only the migrations (--moves --help lists what there is)
#   bench/run.sh --libvirt [ARG…] domains of a real libvirt: bench/LIBVIRT.md; not among the others
#   bench/run.sh ARG…             only the relays (--help)
# As root all relays have the same congestion control, and there are slow and long links; the
# migrations need root, and the QEMUs and the guest of `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${VMFERRY_BENCH_PROFILE:-release}
lab=${VMFERRY_LAB:-.lab}
programs=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}/examples

relays() {
  # A relay that is not there is named in the table.
  tests/setup/relays.sh || echo "bench: not all relays of others are at hand" >&2
  cargo build --locked --profile "$profile" --example bench --example bench-tls-copy --example bench-vmferry --example bench-other
  "$programs/bench" --relays "$lab/relays/bin" "$@"
}

moves() {
  cargo build --locked --profile "$profile" --bins --example bench-moves
  "$programs/bench-moves" "$@"
}

libvirt() {
  tests/setup/relays.sh
  tests/setup/libvirt-newer.sh 11
  cargo build --locked --profile "$profile" --bins --example bench-libvirt
  "$programs/bench-libvirt" --relays "$lab/relays/bin" "$@"
}

case ${1:-} in
  --libvirt) libvirt "${@:2}" ;;
  --moves) moves "${@:2}" ;;
  '') relays; moves ;;
  *) relays "$@" ;;
esac
