#!/bin/bash
# Runs the fuzz targets under libFuzzer, guided by coverage, one process at a time.
#   usage: fuzz.sh run [TARGET...]       FUZZ_SECONDS for each (180); all targets if none is named
#          fuzz.sh minimise [TARGET...]  what is worth keeping of what was found goes into tests/fuzz/corpus
#          fuzz.sh one TARGET FILE       one input, as a crash names it
# What was found grows in .lab/fuzz/TARGET, and the inputs of crashes are there as crash-*, timeout-*, oom-*.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup/shell.sh"

here=$checkout/tests/fuzz
grown=$lab/fuzz
triple=x86_64-unknown-linux-gnu
# Longest input, by target; others take what a few frames or a long line need.
declare -A longest=([session]=2048 [frames]=4096 [words]=512 [identity]=2048 [nbd]=4096)
# Found by the targets of bytes; a file in the committed corpus is not longer.
kept_bytes=16384

# The compiler's own coverage pass, which needs no sanitizer and no nightly compiler: all of it are stable options.
flags="-Cpasses=sancov-module -Ccodegen-units=16"
for flag in level=4 inline-8bit-counters pc-table trace-compares; do
  flags="$flags -Cllvm-args=-sanitizer-coverage-$flag"
done

build() {
  (cd "$here" && env -u RUSTC_WORKSPACE_WRAPPER -u CLIPPY_ARGS RUSTFLAGS="--cfg fuzzing $flags" \
    CARGO_TARGET_DIR="$checkout/target/fuzz" cargo build --locked --release --target $triple)
  program=$checkout/target/fuzz/$triple/release/vmferry-fuzz
}

all_targets() { sed -n 's/^    ("\([a-z-]*\)", .*/\1/p' "$here/targets/mod.rs"; }

# Words of the corpus: comparisons of texts are not seen by the coverage.
words() {
  grep -aohE '[A-Za-z_][A-Za-z0-9_-]{2,30}' "$here/corpus/$1"/* | sort | uniq -c | sort -rn |
    awk 'NR <= 400 { print "\"" $2 "\"" }'
}

run() {
  local target=$1 log=$grown/$1.log said
  mkdir -p "$grown/$target"
  words "$target" >"$grown/$target.dict"
  VMFERRY_FUZZ=$target nice -n 19 "$program" "$grown/$target" "$here/corpus/$target" \
    -max_total_time="${FUZZ_SECONDS:-180}" -max_len="${longest[$target]:-8192}" -dict="$grown/$target.dict" \
    -timeout=20 -rss_limit_mb=1024 -len_control=20 -print_final_stats=1 -use_value_profile=1 -verbosity=1 \
    -artifact_prefix="$grown/$target." >"$log" 2>&1 || failed="$failed $target"
  said=$(grep -aE '^#[0-9]+.*cov:' "$log" | tail -1)
  printf '%-14s %12s executions %6s/s  %6s edges %7s features  %5s inputs  %5s MiB\n' "$target" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
    "$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")" \
    "$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' <<<"$said")" "$(sed -n 's/.* ft: \([0-9]*\) .*/\1/p' <<<"$said")" \
    "$(sed -n 's/.* corp: \([0-9]*\).*/\1/p' <<<"$said")" \
    "$(sed -n 's/^stat::peak_rss_mb: *//p' "$log")" | tee -a "$grown/figures"
}

# Of the inputs together the fewest that reach as much.
minimise() {
  local target=$1 old=$here/corpus/$1 new=$grown/$1.least
  rm -rf "$new"
  mkdir -p "$new" "$grown/$target"
  find "$grown/$target" -type f -size +${kept_bytes}c -delete
  VMFERRY_FUZZ=$target nice -n 19 "$program" -set_cover_merge=1 -rss_limit_mb=1024 "$new" "$old" "$grown/$target" \
    >"$grown/$target.merge.log" 2>&1 || die "$target: $grown/$target.merge.log"
  rm -rf "$old"
  mv "$new" "$old"
  printf '%-14s %5d inputs %8d bytes\n' "$target" "$(find "$old" -type f | wc -l)" "$(cat "$old"/* | wc -c)"
}

what=${1:-run}
shift || true
failed=""
build
case $what in
  one) VMFERRY_FUZZ=$1 exec "$program" "$2" ;;
  run | minimise) for target in ${*:-$(all_targets)}; do "$what" "$target"; done ;;
  *) die "run, minimise or one" ;;
esac
[ -z "$failed" ] || die "these failed, their inputs are in $grown:$failed"
