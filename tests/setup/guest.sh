#!/bin/bash
# Builds the small guest of the tests from Debian's cloud kernel and the C sources in tests/guest:
#   DIR/vmlinuz     the kernel as an ELF file, which QEMU boots by PVH without decompressing it in the guest
#   DIR/initrd.img  init and the writer, nothing else
#   DIR/verify      runs on the host: checks what the writer left on a disk
#   DIR/states      where tests keep states of booted guests (tests/support/saved.rs)
#   usage: guest.sh [DIR]      default .lab/guest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

dir=$(realpath -m "${1:-$lab/guest}")
source=$checkout/tests/guest
this=$(recipe "${BASH_SOURCE[0]}" "$source"/*.[ch])
# In the order in which they must be loaded: each needs those before it.
modules="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk"

is_made "$dir" "$this" && exit 0
lock_lab
# Whoever held the lock may have made it meanwhile.
is_made "$dir" "$this" && exit 0
work=$(mktemp -d "$lab/guest.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$dir" "$work/root/modules"

# The meta package names the kernel package of the day.
kernel_package() { private_apt_cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-[0-9]/ && !seen++ { print $2 }'; }
download_kernel() { (cd "$work" && private_apt_get -qq download "$1"); }

# Only the few files that are wanted: unpacking the whole package is slow.
unpack_kernel_package() {
  local module patterns=()
  for module in $modules; do patterns+=("*/$module.ko*"); done
  dpkg-deb --fsys-tarfile "$work"/linux-image-*.deb | tar -x -C "$work" --wildcards './boot/vmlinuz-*' "${patterns[@]}"
  find "$work/lib" -name '*.ko.xz' -exec xz -d {} +
}

copy_modules() {
  local module number=0 file
  for module in $modules; do
    number=$((number + 1))
    file=$(find "$work/lib" -name "$module.ko")
    [ -n "$file" ] || die "the kernel package holds no module $module"
    cp "$file" "$work/root/modules/$number-$module.ko"
  done
}

little_endian() { od -An -t u4 -j "$2" -N 4 "$1" | tr -d ' '; }

# elf_of BZIMAGE ELF: cuts the payload out of the boot image (Linux x86 boot protocol, fields
# setup_sects, payload_offset, payload_length) and decompresses it. The last 4 bytes are its size.
elf_of() {
  local image=$1 sectors start length payload=$work/payload
  sectors=$(od -An -t u1 -j $((0x1f1)) -N 1 "$image" | tr -d ' ')
  [ "$sectors" != 0 ] || sectors=4
  start=$(((sectors + 1) * 512 + $(little_endian "$image" $((0x248)))))
  length=$(($(little_endian "$image" $((0x24c))) - 4))
  dd if="$image" of="$payload" bs=1M iflag=skip_bytes,count_bytes skip="$start" count="$length" status=none
  case $(od -An -t x1 -N 4 "$payload" | tr -d ' ') in
    02214c18) lz4 -q -dc <"$payload" >"$2" ;;
    fd377a58) xz -dc --single-stream <"$payload" >"$2" ;;
    28b52ffd) zstd -q -dc <"$payload" >"$2" ;;
    1f8b*) gzip -dc <"$payload" >"$2" ;;
    *) die "the kernel is packed in a way that this script does not know" ;;
  esac
  [ "$(od -An -c -j 1 -N 3 "$2" | tr -d ' ')" = ELF ] || die "what was packed in the kernel is no ELF file"
}

compile() {
  cc -O2 -Wall -Wextra -Werror -static -s -pthread -o "$work/root/init" "$source/init.c"
  cc -O2 -Wall -Wextra -Werror -static -s -pthread -o "$work/root/writer" "$source/writer.c"
  cc -O2 -Wall -Wextra -Werror -o "$work/verify" "$source/verify.c"
}

pack_initrd() { (cd "$work/root" && find . -print0 | LC_ALL=C sort -z | cpio -0 --quiet -o -H newc -R 0:0 | gzip -n >"$work/initrd.img"); }

open_private_apt
kernel=$(kernel_package)
[ -n "$kernel" ] || die "Debian 12's archive names no cloud kernel"
say "building the guest: $kernel and tests/guest"
retry 5 download_kernel "$kernel" || die "could not download $kernel"
unpack_kernel_package
copy_modules
elf_of "$work"/boot/vmlinuz-* "$work/vmlinuz"
compile
mkdir -p "$work/root"/{dev,proc,sys}
pack_initrd
rm -rf "$dir/states"
mv "$work/vmlinuz" "$work/initrd.img" "$work/verify" "$dir/"
mark_made "$dir" "$this"
