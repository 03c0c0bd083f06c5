#!/bin/bash
# Puts Debian 12's Prometheus and promtool into a folder, without installing them: installed, a server
# would start. Only `make observe` runs them.
#   usage: prometheus.sh      makes .lab/prometheus/bin/{prometheus,promtool}
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

root=$lab/prometheus
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
if is_made "$root" "$this"; then exit 0; fi
lock_lab
if is_made "$root" "$this"; then exit 0; fi
open_private_apt

fetched=$lab/apt/prometheus
# The programs need nothing but libc: what the package depends on is for its service.
download() { mkdir -p "$fetched" && (cd "$fetched" && rm -f ./*.deb && private_apt_get -qq download prometheus/bookworm); }

say "downloading Prometheus"
retry 5 download || die "the package could not be downloaded"
rm -rf "$root"
mkdir -p "$root/bin"
dpkg-deb --fsys-tarfile "$fetched"/prometheus_*.deb | tar -x -C "$root/bin" --strip-components=3 ./usr/bin/prometheus ./usr/bin/promtool
for program in prometheus promtool; do
  "$root/bin/$program" --version >/dev/null 2>&1 || die "$program does not run"
done
rm -rf "$fetched"
mark_made "$root" "$this"
