#!/bin/bash
# Puts the relays that the benchmark compares vmferry with side by side, without installing any:
# installed, most of them would start a server. From Debian 12's packages, unpacked with all the
# libraries they need. Only the benchmarks and `make libvirt` run them.
#   usage: relays.sh      makes .lab/relays/bin/*
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
. "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh"

root=$lab/relays
this=$(recipe "${BASH_SOURCE[0]}" "$(dirname "${BASH_SOURCE[0]}")/private-apt.sh")-$lab
packages="openssh-client openssh-server stunnel4 nginx-light libnginx-mod-stream haproxy socat ethtool"
# program:the option that makes it tell its version. ethtool is for the delay line.
programs="usr/bin/ssh:-V usr/bin/ssh-keygen: usr/sbin/sshd: usr/bin/stunnel4:-version
  usr/sbin/nginx:-v usr/sbin/haproxy:-v usr/bin/socat:-V sbin/ethtool:--version"
# These belong to the machine's own loader and run-time: a second copy beside it would not fit together.
of_the_machine=" libc6 libc-bin libcrypt1 libgcc-s1 gcc-12-base libstdc++6 "

if is_made "$root" "$this"; then exit 0; fi
lock_lab
open_private_apt

download() {
  mkdir -p "$lab/apt/relays/partial"
  # shellcheck disable=SC2086
  private_apt_get -qq -y -o Dir::Cache::archives="$lab/apt/relays" --download-only --target-release bookworm install $packages
}

say "downloading the relays of the benchmark and their libraries"
retry 5 download || die "the packages could not be downloaded"
rm -rf "$root"
mkdir -p "$root/bin"
for deb in "$lab/apt/relays"/*.deb; do
  name=$(basename "$deb")
  case $of_the_machine in *" ${name%%_*} "*) continue ;; esac
  dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --exclude='./etc' --exclude='./var' --exclude='./usr/share'
done
for pair in $programs; do
  program=${pair%%:*} ask=${pair##*:}
  [ -x "$root/$program" ] || die "the packages hold no $program"
  keep="${keep:-} ! -name $(basename "$program")"
  wrapper=$root/bin/$(basename "$program")
  cat >"$wrapper" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH='$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu'
export LD_LIBRARY_PATH
exec '$root/$program' "\$@"
WRAPPER
  chmod +x "$wrapper"
  [ -z "$ask" ] || "$wrapper" "$ask" >/dev/null 2>&1 || die "$program does not run: $("$wrapper" "$ask" 2>&1 | sed -n 1p)"
done
# What else came along, some of it setuid, is none of our business.
# shellcheck disable=SC2086
find "$root"/bin "$root"/sbin "$root"/usr/bin "$root"/usr/sbin ! -type d $keep -delete 2>/dev/null || true
rm -rf "$lab/apt/relays"
mark_made "$root" "$this"
say "$(ls "$root/bin" | tr '\n' ' ')"
