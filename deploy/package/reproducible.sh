#!/bin/bash
# Whether the program is the same byte for byte when it is built twice, in two folders: builds this commit in each, and
# compares. What differs is said by section. docs/security.md has what came of it.
#   usage: reproducible.sh [FOLDER]      where both are built; a temporary one by default, removed when they are equal
# Both builds share cargo's folder, the compiler, and this machine.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
room=${1:-$(mktemp -d)}
cargo=${CARGO_HOME:-$HOME/.cargo}
triple=x86_64-unknown-linux-gnu

# As docs/security.md says it. The target is named so that none of the flags reach what only runs while it is built.
build() {
  local folder=$1
  mkdir -p "$folder"
  git -C "$checkout" archive HEAD | tar -x -C "$folder"
  (cd "$folder" && env -u RUSTC_WORKSPACE_WRAPPER -u CLIPPY_ARGS -u CARGO_INCREMENTAL \
    SOURCE_DATE_EPOCH="$(git -C "$checkout" log -1 --format=%ct)" CARGO_TARGET_DIR="$folder/target" \
    RUSTFLAGS="--remap-path-prefix $folder=/vmferry --remap-path-prefix $cargo=/cargo" \
    CFLAGS="-ffile-prefix-map=$folder=/vmferry -ffile-prefix-map=$cargo=/cargo" \
    nice -n 19 cargo build --locked --release --bins --target $triple)
}

one=$room/one other=$room/another-folder-with-a-longer-name
for folder in "$one" "$other"; do build "$folder"; done
program=target/$triple/release/vmferry
echo "$(git -C "$checkout" rev-parse HEAD), $(rustc --version), $(cc --version | head -1)"
sha256sum "$one/$program" "$other/$program"
if cmp "$one/$program" "$other/$program"; then
  echo "both are the same"
  [ -n "${1:-}" ] || rm -rf "$room"
  exit 0
fi
for section in $(objdump -h "$one/$program" | awk '$1 ~ /^[0-9]+$/ { print $2 }'); do
  contents() { objcopy -O binary --only-section="$section" --set-section-flags "$section=alloc" "$1/$program" /dev/stdout; }
  cmp -s <(contents "$one") <(contents "$other") || echo "they differ in $section"
done
echo "they differ: $room" >&2
exit 1
