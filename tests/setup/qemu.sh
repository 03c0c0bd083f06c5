#!/bin/bash
# Puts two QEMUs side by side without installing either: Debian 12's (7.2) and that of its backports
# (10), each with all the libraries it needs, unpacked from Debian's packages.
#   usage: qemu.sh [DIR]      default .lab; makes DIR/qemu72/bin/* and DIR/qemu10/bin/*
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

dir=$(realpath -m "${1:-$lab}")
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$dir
programs="qemu-system-x86_64 qemu-img qemu-io qemu-nbd qemu-storage-daemon"
packages="qemu-system-x86 qemu-system-data qemu-utils seabios ipxe-qemu"
# These belong to the machine's own loader and run-time: a second copy beside it would not fit together.
of_the_machine=" libc6 libc-bin libcrypt1 libgcc-s1 gcc-12-base libstdc++6 "

# download SUITE INTO: the packages and everything they depend on, from an empty system's view.
download() {
  local suite=$1 into=$2
  mkdir -p "$into/partial"
  # shellcheck disable=SC2086
  private_apt_get -qq -y -o Dir::Cache::archives="$into" --download-only --target-release "$suite" install $packages
}

# Programs, libraries and firmware only: no documentation, no configuration, no other architecture.
unpack() {
  local from=$1 into=$2 deb name
  for deb in "$from"/*.deb; do
    name=$(basename "$deb")
    case $of_the_machine in *" ${name%%_*} "*) continue ;; esac
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$into" --exclude='./etc' --exclude='./var' --exclude='./bin' --exclude='./sbin' \
      --exclude='./usr/sbin' --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' --exclude='./usr/share/perl*'
  done
  # The closure brings passwd(1) and the like, some of them setuid: none of our business.
  find "$into/usr/bin" ! -type d ! -name 'qemu-*' -delete
}

# wrapper ROOT PROGRAM: runs the unpacked program with its own libraries, modules and firmware.
wrapper() {
  local root=$1 program=$2 firmware=""
  [ "$program" != qemu-system-x86_64 ] ||
    firmware=" -L '$root/usr/share/qemu' -L '$root/usr/share/seabios' -L '$root/usr/lib/ipxe/qemu'"
  cat >"$root/bin/$program" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH='$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu'
QEMU_MODULE_DIR='$root/usr/lib/x86_64-linux-gnu/qemu'
export LD_LIBRARY_PATH QEMU_MODULE_DIR
exec '$root/usr/bin/$program'$firmware "\$@"
WRAPPER
  chmod +x "$root/bin/$program"
}

# make_qemu NAME SUITE VERSION: it counts as made only when every program has told its version.
make_qemu() {
  local name=$1 suite=$2 version=$3 root=$dir/$1 program said
  is_made "$root" "$this" && return 0
  say "$name: downloading QEMU $version and its libraries from $suite"
  retry 5 download "$suite" "$lab/apt/$name" || die "$name: the packages could not be downloaded"
  rm -rf "$root"
  mkdir -p "$root/bin"
  unpack "$lab/apt/$name" "$root"
  for program in $programs; do
    [ -x "$root/usr/bin/$program" ] || die "$name: the packages hold no $program"
    wrapper "$root" "$program"
    said=$("$root/bin/$program" --version 2>&1 | sed -n 1p) || die "$name: $program does not run: $said"
    case $said in *" $version"*) ;; *) die "$name: $program is not version $version: $said" ;; esac
  done
  rm -rf "$lab/apt/$name"
  mark_made "$root" "$this"
  say "$name: $("$root/bin/qemu-system-x86_64" --version | sed -n 1p)"
}

if is_made "$dir/qemu72" "$this" && is_made "$dir/qemu10" "$this"; then exit 0; fi
lock_lab
open_private_apt
make_qemu qemu72 bookworm 7.2.
make_qemu qemu10 bookworm-backports 10.
