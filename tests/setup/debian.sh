#!/bin/bash
# Makes a fresh Debian 12 as an operator has it before vmferry: systemd, QEMU, an SSH server, what firewalls there are.
# Only `make newcomer` uses it.
#   usage: debian.sh      makes .lab/debian12/root
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

room=$lab/debian12
packages=systemd,systemd-sysv,dbus,polkitd,procps,iproute2,openssh-server,qemu-system-x86,nftables,ufw,firewalld,curl,man-db,python3
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
if is_made "$room" "$this"; then exit 0; fi
lock_lab
if is_made "$room" "$this"; then exit 0; fi
open_private_apt
say "making a fresh Debian 12"
rm -rf "$room"
mkdir -p "$room"
grep ' bookworm main$' "$apt_state/sources.list" | sort -u >"$room/sources.list"
retry 3 mmdebstrap --quiet --variant=minbase --include="$packages" --skip=cleanup/apt/lists \
  --aptopt='APT::Install-Recommends "false"' bookworm "$room/root" - <"$room/sources.list" 2>"$room/log" ||
  { tail -20 "$room/log" >&2; die "no fresh Debian could be made"; }
mark_made "$room" "$this"
