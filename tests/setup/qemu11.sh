#!/bin/bash
# Puts the newest QEMU of Debian's suites (sid's, 11 or newer) beside the other two, with everything below it
# down to libc and its loader, for it cannot run on Debian 12's libc. Only `make versions` needs it.
#   usage: qemu11.sh      makes .lab/qemu11/bin/*
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

root=$lab/qemu11
loader=$root/usr/lib64/ld-linux-x86-64.so.2
libraries=$root/usr/lib/x86_64-linux-gnu
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
programs="qemu-system-x86_64 qemu-img qemu-io qemu-nbd qemu-storage-daemon"
packages="qemu-system-x86 qemu-system-data qemu-utils seabios ipxe-qemu patchelf"

if is_made "$root" "$this"; then exit 0; fi
lock_lab
if is_made "$root" "$this"; then exit 0; fi
open_private_apt
turn_to_suite sid "$lab/aptsid"

update() { private_apt_get -qq update; }

# shellcheck disable=SC2086
download() { download_packages $packages; }

# Programs, libraries and firmware only, in a tree whose /lib is /usr/lib.
unpack() {
  local deb name
  mkdir -p "$root"/bin "$root"/usr/{bin,sbin,lib,lib64}
  for name in lib lib64 sbin; do ln -s "usr/$name" "$root/$name"; done
  for deb in "$apt_state/packages"/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --keep-directory-symlink --exclude='./bin' --exclude='./etc' --exclude='./var' \
      --exclude='./run' --exclude='./usr/sbin' --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' \
      --exclude='./usr/share/perl*' --exclude='./usr/lib/x86_64-linux-gnu/perl*'
  done
  # The closure brings passwd(1) and the like, some of them setuid: none of our business.
  find "$root/usr/bin" ! -type d ! -name 'qemu-*' ! -name patchelf -delete
}

# wrapper PROGRAM: has the program find its own loader and libraries, and only itself: what it starts (`exec:`)
# is the machine's. Runs it with its own modules and firmware.
wrapper() {
  local program=$1 firmware=""
  "$loader" --inhibit-cache --library-path "$libraries" "$root/usr/bin/patchelf" --set-interpreter "$loader" \
    --force-rpath --set-rpath "$libraries" "$root/usr/bin/$program"
  [ "$program" != qemu-system-x86_64 ] ||
    firmware=" -L '$root/usr/share/qemu' -L '$root/usr/share/seabios' -L '$root/usr/lib/ipxe/qemu'"
  cat >"$root/bin/$program" <<WRAPPER
#!/bin/sh
QEMU_MODULE_DIR='$root/usr/lib/x86_64-linux-gnu/qemu'
export QEMU_MODULE_DIR
exec '$root/usr/bin/$program'$firmware "\$@"
WRAPPER
  chmod +x "$root/bin/$program"
}

say "reading the package index of Debian sid"
retry 5 update || die "the index of Debian sid cannot be read (sources: $apt_state/sources.list)"
say "downloading QEMU and all that is below it from sid"
retry 5 download || die "the packages could not be downloaded"
rm -rf "$root"
unpack
for program in $programs; do
  [ -x "$root/usr/bin/$program" ] || die "the packages hold no $program"
  wrapper "$program"
  said=$("$root/bin/$program" --version 2>&1 | sed -n 1p) || die "$program does not run: $said"
  case $said in *" 1"[1-9].*) ;; *) die "$program is older than 11: $said" ;; esac
done
rm -rf "$apt_state" "$root/usr/bin/patchelf"
mark_made "$root" "$this"
say "qemu11: $("$root/bin/qemu-system-x86_64" --version | sed -n 1p)"
