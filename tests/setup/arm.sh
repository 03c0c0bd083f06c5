#!/bin/bash
# Puts QEMU's qemu-system-aarch64 beside the qemu-system-x86_64 of the same version 10, with whose libraries it runs. Only
# `make arm` needs it.
#   usage: arm.sh      makes .lab/qemu10arm/bin/qemu-system-aarch64
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

root=$lab/qemu10arm
x86=$lab/qemu10
program=qemu-system-aarch64
version() { "$1" --version 2>/dev/null | sed -n 1p; }

wanted=$(version "$x86/bin/qemu-system-x86_64")
[ -n "$wanted" ] || die "there is no QEMU 10 yet: tests/setup/qemu.sh"
if [ "$(version "$root/bin/$program")" = "$wanted" ]; then exit 0; fi
lock_lab
open_private_apt
download() { mkdir -p "$root/package" && (cd "$root/package" && private_apt_get -qq download qemu-system-arm/bookworm-backports); }
say "downloading QEMU for Arm from bookworm-backports"
rm -rf "$root"
retry 5 download || die "the package could not be downloaded"
dpkg-deb --fsys-tarfile "$root"/package/*.deb | tar -x -C "$root" "./usr/bin/$program"
rm -rf "$root/package"
mkdir -p "$root/bin"
cat >"$root/bin/$program" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH='$x86/usr/lib/x86_64-linux-gnu:$x86/lib/x86_64-linux-gnu'
QEMU_MODULE_DIR='$x86/usr/lib/x86_64-linux-gnu/qemu'
export LD_LIBRARY_PATH QEMU_MODULE_DIR
exec '$root/usr/bin/$program' -L '$x86/usr/share/qemu' -L '$x86/usr/lib/ipxe/qemu' "\$@"
WRAPPER
chmod +x "$root/bin/$program"
[ "$(version "$root/bin/$program")" = "$wanted" ] || die "$("$root/bin/$program" --version 2>&1 | sed -n 1p) is not $wanted"
say "qemu10arm: $wanted"
