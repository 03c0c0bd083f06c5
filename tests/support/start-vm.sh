#!/bin/sh
# Starts a fresh QEMU for @NAME@ in the background and returns when its monitors listen.
#   start-@NAME@        waits for a guest to come in (what vmferry's configuration names)
#   start-@NAME@ boot   boots the guest, or starts it from a saved state: more words go to QEMU
#   start-@NAME@ ready  boots the guest up to where it waits for its words (tests/guest/writer.c)
set -eu
cd '@DIR@'
# QEMU keeps the lock as long as it lives: never two of one guest on this host.
exec 9>lock
flock -w 10 9 || { echo '@NAME@: a QEMU of this guest is still running' >&2; exit 1; }
words="@WORDS@ vf_seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')"
starts=starts
case "${1:-}" in
  boot) shift ;;
  ready) words=wait starts=/dev/null; shift ;;
  *) set -- -incoming defer -S ;;
esac
rm -f agent.qmp test.qmp
echo "$*" >>$starts
setsid @QEMU@ -fw_cfg "name=opt/vmferry/words,string=$words" "$@" </dev/null >>qemu.log 2>&1 &
echo $! >qemu.pid
tries=0
# The file of a socket is there a moment before anybody listens: __SO_ACCEPTCON of unix(7)'s flags tells.
listens() { grep -q " 00010000 .* @DIR@/$1\$" /proc/net/unix; }
until listens agent.qmp && listens test.qmp; do
  tries=$((tries + 1))
  if [ "$tries" -gt 600 ] || ! kill -0 "$(cat qemu.pid)" 2>/dev/null; then
    echo '@NAME@: QEMU did not start:' >&2
    tail -5 qemu.log >&2
    exit 1
  fi
  sleep 0.05
done
