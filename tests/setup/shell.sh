# What the set-up scripts share: messages, retries, the lab folder and its lock. Sourced, never run.
# shellcheck shell=bash

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything the set-up makes lives here; nothing outside it is touched, except by packages.sh.
lab=$(realpath -m "${VMFERRY_LAB:-$checkout/.lab}")

say() { printf "%s: %s\n" "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

# A command that fails where nobody asked is named: no script ends without a word.
set -E
trap 'say "line $LINENO failed: $BASH_COMMAND"' ERR

# retry TIMES COMMAND...: a hiccup of the network is no failure. Waits 2, 4, 8 ... seconds in between.
retry() {
  local times=$1 try=1 pause=2
  shift
  until "$@"; do
    [ "$try" -lt "$times" ] || { say "gave up after $times tries: $*"; return 1; }
    say "try $try of $times failed, again in $pause s: $*"
    sleep "$pause"
    try=$((try + 1)) pause=$((pause * 2))
  done
}

# Two `make` at once wait for each other here. The lock is held until this script ends, and handed
# down to scripts that it starts.
lock_lab() {
  [ -z "${VMFERRY_LAB_LOCKED:-}" ] || return 0
  mkdir -p "$lab"
  exec 9>"$lab/lock"
  flock -n 9 || { say "another set-up is at work in $lab, waiting"; flock -w 1800 9 || die "$lab/lock is still held after 30 minutes"; }
  export VMFERRY_LAB_LOCKED=1
}

# recipe FILE...: a number that changes whenever one of the files that make a result changes.
recipe() { cat "$@" | cksum | tr ' ' '-'; }

# is_made DIR RECIPE / mark_made DIR RECIPE: a result is there and was made by this recipe.
is_made() { [ "$(cat "$1/.made" 2>/dev/null)" = "$2" ]; }
mark_made() { printf '%s\n' "$2" >"$1/.made"; }
