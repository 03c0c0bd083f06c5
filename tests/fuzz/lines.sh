#!/bin/bash
# How much of each parser's own lines the committed corpus reaches: `make test`'s replay, with the compiler's counters.
#   usage: lines.sh [TARGET...]      all of them if none is named
# It takes LLVM's tools of the compiler's version: rustup component add llvm-tools. Only this project is counted, and
# built anew for it, in target/coverage.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup/shell.sh"

here=$checkout/tests/fuzz
room=${COVERAGE_ROOM:-$checkout/target/coverage}
tools=$(rustc --print sysroot)/lib/rustlib/x86_64-unknown-linux-gnu/bin
[ -x "$tools/llvm-cov" ] || die "no llvm-cov in $tools: rustup component add llvm-tools"

# The files that turn the target's bytes into something else, or refuse to. Of api, handoff, libvirt and messages serde's
# derived code does that, which has no lines.
declare -A parsers=(
  [blocks]="net/compress.rs"
  [config]="config"
  [enrol]="enrol/message.rs enrol/ticket.rs pki/enrolment.rs"
  [frames]="mux/frame.rs mux/assemble.rs mux/receive.rs mux/credit.rs"
  [hello]="mux/hello.rs"
  [identity]="net/identity.rs net/naming.rs"
  [journal]="migrate/journal/file.rs migrate/journal/line.rs migrate/journal/mod.rs"
  [journal-lines]="migrate/journal/file.rs migrate/journal/line.rs migrate/journal/mod.rs"
  [nbd]="qemu/nbd/mod.rs qemu/nbd/asking.rs qemu/nbd/reader.rs qemu/nbd/writer.rs qemu/nbd/writing.rs"
  [offering]="qemu/nbd/offering.rs"
  [probe]="net/probe.rs"
  [qmp]="qemu/wire.rs qemu/event.rs"
  [requests]="net/nbd_requests.rs"
  [session]="mux/receive.rs mux/credit.rs mux/inflow.rs mux/local.rs mux/transmit.rs mux/session.rs mux/snapshot.rs"
  [words]="printable.rs rate.rs size.rs config/forward/name.rs config/forward/socket.rs"
)

mkdir -p "$room"
wrapper=$room/count-ours
printf '#!/bin/sh\nexec "$@" -Cinstrument-coverage\n' >"$wrapper"
chmod +x "$wrapper"
program=$(cd "$checkout" && env -u CLIPPY_ARGS CARGO_INCREMENTAL=0 RUSTC_WORKSPACE_WRAPPER="$wrapper" CARGO_TARGET_DIR="$room" \
  LLVM_PROFILE_FILE="$room/build-%p.profraw" cargo test --locked --test quick --no-run --message-format=short 2>&1 |
  tee /dev/stderr | sed -n 's/.*(\(.*deps\/quick-[0-9a-f]*\)).*/\1/p')
[ -x "$program" ] || program=$checkout/$program
for target in ${*:-$(printf '%s\n' "${!parsers[@]}" | sort)}; do
  [ -n "${parsers[$target]:-}" ] || die "no target $target, or no files are named for it here"
  profile=$room/$target
  rm -f "$profile".*
  VMFERRY_FUZZ=$target LLVM_PROFILE_FILE="$profile.profraw" "$program" every_input_of_the_corpus >"$profile.log" 2>&1 ||
    die "$target fails: $profile.log"
  "$tools/llvm-profdata" merge -sparse -o "$profile.profdata" "$profile.profraw"
  files=()
  for file in ${parsers[$target]}; do
    mapfile -t -O ${#files[@]} files < <(find "$checkout/src/$file" -name '*.rs' -type f | sort)
  done
  "$tools/llvm-cov" report "$program" -instr-profile="$profile.profdata" --sources "${files[@]}" >"$profile.report" 2>/dev/null
  # Filename, then regions, functions, lines, branches: each all, missed, per cent.
  awk -v target="$target" '$1 == "TOTAL" { printf "%-14s %5d of %5d lines  %6s   %4d of %4d functions\n", target, $8 - $9, $8, $10, $5 - $6, $5 }' \
    "$profile.report"
done
