#!/bin/bash
# Puts Debian 12's etcd and etcdctl into a folder, without installing them: installed, a server would start. The tests
# of a witness run them.
#   usage: etcd.sh      makes .lab/etcd/bin/{etcd,etcdctl}
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

root=$lab/etcd
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
if is_made "$root" "$this"; then exit 0; fi
lock_lab
if is_made "$root" "$this"; then exit 0; fi
open_private_apt

fetched=$lab/apt/etcd
# The programs need nothing but libc: what the packages depend on is for the service.
download() { mkdir -p "$fetched" && (cd "$fetched" && rm -f ./*.deb && private_apt_get -qq download etcd-server/bookworm etcd-client/bookworm); }

say "downloading etcd"
retry 5 download || die "the packages could not be downloaded"
rm -rf "$root"
mkdir -p "$root/bin"
dpkg-deb --fsys-tarfile "$fetched"/etcd-server_*.deb | tar -x -C "$root/bin" --strip-components=3 ./usr/bin/etcd
dpkg-deb --fsys-tarfile "$fetched"/etcd-client_*.deb | tar -x -C "$root/bin" --strip-components=3 ./usr/bin/etcdctl
"$root/bin/etcd" --version >/dev/null 2>&1 || die "etcd does not run"
"$root/bin/etcdctl" version >/dev/null 2>&1 || die "etcdctl does not run"
rm -rf "$fetched"
mark_made "$root" "$this"
