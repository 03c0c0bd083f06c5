#!/bin/bash
# Puts Debian 12's libvirt (daemon, QEMU driver, virsh) with all the libraries it needs into a folder,
# without installing it: installed, it would start servers. The hosts of tests/libvirt lay the folder
# over their own /usr, together with the QEMU that tests/setup/qemu.sh made.
#   usage: libvirt.sh      makes .lab/libvirt/usr
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

root=$lab/libvirt
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
packages="libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
# path:the option that makes it tell its version.
programs="usr/sbin/libvirtd:--version usr/bin/virsh:--version"
# These belong to the machine's own loader and run-time: a second copy over it would not fit together.
of_the_machine=" libc6 libc-bin libcrypt1 libgcc-s1 gcc-12-base libstdc++6 tar dpkg "

if is_made "$root" "$this"; then exit 0; fi
lock_lab
if is_made "$root" "$this"; then exit 0; fi
open_private_apt

download() {
  mkdir -p "$lab/apt/libvirt/partial"
  # shellcheck disable=SC2086
  private_apt_get -qq -y -o Dir::Cache::archives="$lab/apt/libvirt" --download-only --target-release bookworm install $packages
}

# Debian 12 merges these into /usr; some packages still name the old places.
merge_usr() {
  local name
  mkdir -p "$1"/usr/{bin,sbin,lib}
  for name in bin sbin lib; do ln -s "usr/$name" "$1/$name"; done
}

unpack() {
  local deb name
  for deb in "$lab/apt/libvirt"/*.deb; do
    name=$(basename "$deb")
    case $of_the_machine in *" ${name%%_*} "*) continue ;; esac
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --keep-directory-symlink --exclude='./etc' --exclude='./var' \
      --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale'
  done
}

say "downloading libvirt and its libraries from bookworm"
retry 5 download || die "the packages could not be downloaded"
rm -rf "$root"
merge_usr "$root"
unpack
for pair in $programs; do
  program=${pair%%:*}
  [ -x "$root/$program" ] || die "the packages hold no $program"
  said=$(LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu "$root/$program" "${pair##*:}" 2>&1 | sed -n 1p) ||
    die "$program does not run: $said"
done
rm -rf "$lab/apt/libvirt"
mark_made "$root" "$this"
say "libvirt $said"
