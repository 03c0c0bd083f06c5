#!/bin/bash
# A throw-away machine with a real systemd as its first process: this machine's own root (or that in
# CONTAINER_LOWER) under a layer in memory, in the network namespace of a host of the lab. As root. With
# CONTAINER_WALLS it may have a firewall of its own.
#   usage: container.sh up DIR NETNS SHARED...    boots it; SHARED folders are the same inside
#          container.sh exec DIR COMMAND...       runs a command inside
#          container.sh ended DIR                 whether it has shut down by itself
#          container.sh boot DIR NETNS SHARED...  boots one again that has
#          container.sh down DIR                  ends it and takes everything away
set -euo pipefail
export LC_ALL=C.UTF-8 SYSTEMD_LOG_LEVEL=warning

what=$1 dir=$2
shift 2

die() { printf 'container.sh: %s\n' "$*" >&2; exit 1; }
inside() { nsenter -t "$(cat "$dir/leader")" -a env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_PAGER= "$@"; }

# Waits for a command to succeed.
await() {
  local tries
  for tries in $(seq 300); do "$@" && return 0; sleep 0.1; done
  return 1
}

has_leader() {
  local child
  child=$(pgrep -P "$(cat "$dir/nspawn")" | head -1) || return 1
  [ "$(cat "/proc/$child/comm" 2>/dev/null)" = systemd ] && echo "$child" >"$dir/leader"
}

# Machines share this one's hierarchies. Without a group of its own in each that systemd manages, one
# machine would remove the group of the other's service of the same name, just when that one starts.
groups() {
  local root
  for root in /sys/fs/cgroup /sys/fs/cgroup/{unified,systemd,cpu,cpuacct,blkio,memory,devices,pids}; do
    if [ -w "$root/cgroup.procs" ]; then echo "$root/vmferry-$(echo "$dir" | md5sum | cut -c1-12)"; fi
  done
}

is_up() { case $(inside systemctl is-system-running 2>/dev/null) in running | degraded) return 0 ;; esac; return 1; }

boot() {
  local netns=$1 shared options
  shift
  options=(--quiet --directory="$dir/root" --machine="vmferry-$(basename "$dir")" --register=no --keep-unit --console=pipe
    --kill-signal=SIGRTMIN+3 --resolv-conf=off --timezone=off --link-journal=no
    --network-namespace-path="/run/netns/$netns")
  # A host has it; nspawn's own list of calls has it not.
  options+=(--system-call-filter="landlock_create_ruleset landlock_add_rule landlock_restrict_self")
  [ -z "${CONTAINER_WALLS:-}" ] || options+=(--capability=CAP_NET_ADMIN)
  for shared in "$@"; do options+=("--bind=$shared"); done
  (
    for group in $(groups); do mkdir -p "$group" && echo "$BASHPID" >"$group/cgroup.procs"; done
    exec systemd-nspawn "${options[@]}" /usr/lib/systemd/systemd --unit=multi-user.target --show-status=no
  ) </dev/null >"$dir/console.log" 2>&1 &
  echo $! >"$dir/nspawn"
  await has_leader || die "it did not start: $(tail -5 "$dir/console.log")"
  await is_up || die "it did not boot: $(inside systemctl list-jobs --no-pager 2>&1)"
}

case $what in
up)
  mkdir -p "$dir"
  mount -t tmpfs -o mode=755,size=1G vmferry-container "$dir"
  mkdir "$dir/upper" "$dir/work" "$dir/root"
  mount -t overlay -o "lowerdir=${CONTAINER_LOWER:-/},upperdir=$dir/upper,workdir=$dir/work" vmferry-container "$dir/root"
  : >"$dir/root/etc/machine-id"
  # Nothing but what every systemd starts, and what a test asks for.
  rm -rf "$dir"/root/etc/systemd/system/*.wants "$dir/root/etc/systemd/system/default.target" "$dir/root/etc/fstab"
  boot "$@"
  ;;
exec) inside "$@" ;;
ended) ! kill -0 "$(cat "$dir/nspawn")" 2>/dev/null ;;
boot) boot "$@" ;;
down)
  if [ -s "$dir/leader" ]; then
    kill -RTMIN+4 "$(cat "$dir/leader")" 2>/dev/null || true
    gone() { ! kill -0 "$(cat "$dir/nspawn")" 2>/dev/null; }
    await gone || kill -9 "$(cat "$dir/leader")" "$(cat "$dir/nspawn")" 2>/dev/null || true
  fi
  for group in $(groups); do find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || true; done
  umount -l "$dir/root" 2>/dev/null || true
  umount -l "$dir" 2>/dev/null || true
  ;;
*) die "unknown: $what" ;;
esac
