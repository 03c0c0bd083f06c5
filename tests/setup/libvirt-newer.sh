#!/bin/bash
# Puts a libvirt that is newer than Debian 12's (daemon, QEMU driver, virsh) and its QEMU, with everything
# below them down to libc, into a folder: a root file system of their own, for they cannot run on Debian 12's
# libc. The hosts of tests/libvirt that are to be newer run them in it. Only `make libvirt` needs it.
#   usage: libvirt-newer.sh 11|newest      makes .lab/libvirt11 of Debian 13, or .lab/libvirtnewest of sid
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

case ${1:-} in
11) suite=trixie root=$lab/libvirt11 libvirt=11. qemu=10. ;;
newest) suite=sid root=$lab/libvirtnewest libvirt=1[2-9]. qemu=1[1-9]. ;;
*) die "usage: libvirt-newer.sh 11|newest" ;;
esac
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
packages="libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-utils apparmor"
# path:what it must say when it is asked for its version.
programs="usr/sbin/libvirtd:$libvirt usr/bin/virsh:$libvirt usr/bin/qemu-system-x86_64:$qemu"

if is_made "$root" "$this"; then exit 0; fi
lock_lab
if is_made "$root" "$this"; then exit 0; fi
open_private_apt
turn_to_suite "$suite" "$lab/apt-$suite-libvirt"

update() { private_apt_get -qq update; }

# shellcheck disable=SC2086
download() { download_packages $packages; }

unpack() {
  local deb name
  mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
  for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
  mkdir "$root"/{dev,etc,proc,run,sys,tmp,var}
  for deb in "$apt_state/packages"/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --keep-directory-symlink --exclude='./etc' --exclude='./var' --exclude='./run' \
      --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale'
  done
}

say "reading the package index of Debian's $suite"
retry 5 update || die "the index of $suite cannot be read (sources: $apt_state/sources.list)"
say "downloading libvirt, QEMU and all that is below them from $suite"
retry 5 download || die "the packages could not be downloaded"
rm -rf "$root"
unpack
for pair in $programs; do
  program=${pair%%:*}
  [ -x "$root/$program" ] || die "the packages hold no $program"
  said=$(LC_ALL=C chroot "$root" "/$program" --version 2>&1 | sed -n 1p) || die "$program does not run: $said"
  # shellcheck disable=SC2254
  case " $said" in *" "${pair##*:}*) ;; *) die "$program is not version ${pair##*:}: $said" ;; esac
  say "$program: $said"
done
rm -rf "$apt_state"
mark_made "$root" "$this"
