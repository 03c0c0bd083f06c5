#!/bin/bash
# Puts QEMU's qemu-system-aarch64 beside the qemu-system-x86_64 of the same version, with whose libraries it runs.
#   usage: arm.sh [VERSION...]      makes .lab/qemuVERSIONarm/bin/qemu-system-aarch64; 72 and 10 without a word, 11 on request
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

program=qemu-system-aarch64
version() { "$1" --version 2>/dev/null | sed -n 1p; }

# Where a version comes from.
package() {
  case $1 in
    72) echo qemu-system-arm/bookworm ;;
    10) echo qemu-system-arm/bookworm-backports ;;
    11) echo qemu-system-arm ;;
    *) die "no QEMU $1" ;;
  esac
}

update() { private_apt_get -qq update; }
download() { mkdir -p "$root/package" && (cd "$root/package" && private_apt_get -qq download "$(package "$1")"); }

# Sid's QEMU does not run on the machine's libc, but with the loader beside it.
wrapper() {
  local libraries firmware
  if [ "$1" = 11 ]; then
    libraries=$x86/usr/lib/x86_64-linux-gnu
    cat <<WRAPPER
#!/bin/sh
QEMU_MODULE_DIR='$libraries/qemu'
export QEMU_MODULE_DIR
exec '$x86/usr/lib64/ld-linux-x86-64.so.2' --inhibit-cache --library-path '$libraries' '$root/usr/bin/$program' -L '$x86/usr/share/qemu' -L '$x86/usr/lib/ipxe/qemu' "\$@"
WRAPPER
    return
  fi
  cat <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH='$x86/usr/lib/x86_64-linux-gnu:$x86/lib/x86_64-linux-gnu'
QEMU_MODULE_DIR='$x86/usr/lib/x86_64-linux-gnu/qemu'
export LD_LIBRARY_PATH QEMU_MODULE_DIR
exec '$root/usr/bin/$program' -L '$x86/usr/share/qemu' -L '$x86/usr/lib/ipxe/qemu' "\$@"
WRAPPER
}

make_it() {
  local wanted said apt_state=$apt_state
  root=$lab/qemu${1}arm
  x86=$lab/qemu$1
  wanted=$(version "$x86/bin/qemu-system-x86_64")
  [ -n "$wanted" ] || die "there is no QEMU $1 yet: tests/setup/qemu.sh, or qemu11.sh for 11"
  if [ "$(version "$root/bin/$program")" = "$wanted" ]; then return 0; fi
  lock_lab
  open_private_apt
  say "downloading QEMU $1 for Arm"
  if [ "$1" = 11 ]; then
    turn_to_suite sid "$lab/aptsid"
    retry 5 update || die "the index of Debian sid cannot be read (sources: $apt_state/sources.list)"
  fi
  rm -rf "$root"
  retry 5 download "$1" || die "the package could not be downloaded"
  dpkg-deb --fsys-tarfile "$root"/package/*.deb | tar -x -C "$root" "./usr/bin/$program"
  rm -rf "$root/package"
  mkdir -p "$root/bin"
  wrapper "$1" >"$root/bin/$program"
  chmod +x "$root/bin/$program"
  [ "$1" != 11 ] || rm -rf "$apt_state"
  said=$("$root/bin/$program" --version 2>&1 | sed -n 1p) || true
  [ "$said" = "$wanted" ] || die "$said is not $wanted (of a suite that has moved on: remove $x86, and make it anew)"
  say "qemu${1}arm: $wanted"
}

[ $# -gt 0 ] || set -- 72 10
for one in "$@"; do make_it "$one"; done
