#!/bin/bash
# Installs, from the machine's own Debian sources, the programs that the build, the tests and the
# demo call and that are not there yet. Does nothing, in no time, when all of them are.
#   usage: packages.sh [PROGRAM:PACKAGE...]       (as root, when something is missing; the words are wanted as well, and
#          /FILE:PACKAGE, for what is no program)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

# program:package, one for every program that the tests, the demo and these scripts run by name.
wanted="
  cc:gcc ld:binutils make:make
  ip:iproute2 ss:iproute2 tc:iproute2
  nft:nftables tcpdump:tcpdump
  setpriv:util-linux flock:util-linux nsenter:util-linux prlimit:util-linux losetup:mount mkfs.ext4:e2fsprogs
  ps:procps sysctl:procps
  openssl:openssl
  xz:xz-utils lz4:lz4 gzip:gzip zstd:zstd cpio:cpio
  awk:mawk sed:sed find:findutils tar:tar od:coreutils cksum:coreutils timeout:coreutils
  dpkg-deb:dpkg
  systemd-nspawn:systemd-container dbus-daemon:dbus
  $*
"

has_program() { case $1 in /*) [ -e "$1" ] ;; *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;; esac; }

missing=""
for pair in $wanted; do
  has_program "${pair%%:*}" || missing="$missing ${pair##*:}"
done
# Headers and certificates are no programs.
[ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
[ -n "${missing// /}" ] || exit 0

command -v apt-get >/dev/null || die "these are missing, and this is no Debian machine: $missing"
[ "$(id -u)" = 0 ] || die "not root, cannot install: run as root: apt-get install --no-install-recommends $missing"

export DEBIAN_FRONTEND=noninteractive
# Another apt at work is waited for; an index that could not be fetched is a failure to be retried.
options=(-q -o Acquire::Retries=5 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=600)
say "installing $missing"
lock_lab
retry 6 apt-get "${options[@]}" -o APT::Update::Error-Mode=any update >"$lab/packages.log" 2>&1 ||
  say "some package index could not be refreshed (see $lab/packages.log), trying with what is there"
# shellcheck disable=SC2086
retry 6 apt-get "${options[@]}" install -y --no-install-recommends $missing >>"$lab/packages.log" 2>&1 ||
  { tail -20 "$lab/packages.log" >&2; die "could not install $missing"; }
