#!/bin/bash
# Builds and runs the benchmark; arguments go to the driver (--help lists them).
# Root may choose the congestion control of a socket; without root the system's is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${VMFERRY_BENCH_PROFILE:-release}
cargo build --locked --profile "$profile" --example bench --example bench-tls-copy --example bench-vmferry
target=${CARGO_TARGET_DIR:-target}
[ "$profile" = dev ] && profile=debug
exec "$target/$profile/examples/bench" "$@"
