#!/bin/bash
# cargo test with these words. A test that missed the moment for which it waited is run once more, alone.
#
# Guests under TCG take all processors, and beside them a copy can end, or not get far enough, before
# a test has seen what it waits for. Such a test proves nothing of the program, neither way. It is told
# by name, with what it said, to be mended; what it says alone counts. Any other failure counts at once:
# a guest that ran twice is not tried again. Nothing is run again where more than two have failed.
#
#   once_more.sh [words of cargo test] [-- [words of the test programs]]
set -euo pipefail

readonly at_most=2
# As an error or a cause of it begins: what it quotes may say anything.
readonly missed='^(Error:|  *[0-9]*:?) *(waited [0-9]+ s in vain|(it|one) ended (too soon|before))'

log=$(mktemp)
trap 'rm -f "$log"' EXIT

if cargo test "$@" 2>&1 | tee "$log"; then
  exit 0
fi

cargo_words=()
for word in "$@"; do
  [ "$word" != -- ] || break
  cargo_words+=("$word")
done

# Test programs list the names once more at their ends, one in a line.
mapfile -t failed < <(sed -n '/^failures:$/,/^test result:/s/^    \([a-z0-9_]*\(::[a-z0-9_]*\)*\)$/\1/p' "$log" | sort -u)
if [ "${#failed[@]}" -eq 0 ] || [ "${#failed[@]}" -gt "$at_most" ]; then
  exit 101
fi

# What the error of test $1 says, without logs, which may say anything.
error_of() {
  sed -n "/^---- $1 stdout ----\$/,/^---- /p" "$log" | sed -n '/^Error: /,/^Stack backtrace:/p'
}
for name in "${failed[@]}"; do
  if ! error_of "$name" | grep -Eq "$missed"; then
    printf '\n== %s failed\n' "$name"
    exit 101
  fi
done

for name in "${failed[@]}"; do
  printf '\n== %s missed its moment, and is run once more, alone\n' "$name"
  cargo test "${cargo_words[@]}" -- --exact "$name" --test-threads=1 2>&1 | tee "$log" || exit 101
  # A name that no program knows passes, too.
  grep -q '^test result: ok\. 1 passed' "$log" || exit 101
done
printf '\n== PASSED ONLY ALONE, and missed their moment beside others: %s\n' "${failed[*]}"
