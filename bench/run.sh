#!/bin/bash
# Builds and runs the benchmark; arguments go to the driver (--help lists them).
# As root all relays have the same congestion control, and there are slow and long links.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${VMFERRY_BENCH_PROFILE:-release}
lab=${VMFERRY_LAB:-.lab}
# A relay that is not there is named in the table.
tests/setup/relays.sh || echo "bench: not all relays of others are at hand" >&2
cargo build --locked --profile "$profile" --example bench --example bench-tls-copy --example bench-vmferry --example bench-other
target=${CARGO_TARGET_DIR:-target}
[ "$profile" = dev ] && profile=debug
exec "$target/$profile/examples/bench" --relays "$lab/relays/bin" "$@"
